"""One scan from its file to its verdict: what is printed, what is left, which slices are shown."""

import json
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
import torch

from common.cli import DataError
from evaluation.evaluate import main as evaluate
from evaluation.predictor import Predictor
from evaluation.single_scan import choose_apart
from preprocessing.worker import CutSettings, cut_scan
from tests.conftest import make_head
from tests.predictions import SETTINGS, make_calibration, make_geometry, make_prediction, write_model

HIGH = 1e6  # a score that no scan has


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a model, a run of its own, and a scan."""
    write_model(tmp_path / "run/model.pt")
    nib.save(make_head(), tmp_path / "head_T1w.nii.gz")
    return tmp_path


def run_scan(folder: Path, *more: str, scan: str = "head_T1w.nii.gz") -> int:
    command = ["--run", str(folder / "run"), "--out", str(folder / "out"), "--device", "cpu"]
    return evaluate([*command, "--scan", str(folder / scan), *more])


def run_json(folder: Path, capsys, *more: str) -> dict:
    capsys.readouterr()
    assert run_scan(folder, *more, "--json") == 0
    return json.loads(capsys.readouterr().out)


def calibrate(folder: Path, scan_scores: list[float], **changes) -> None:
    calibration = make_calibration(scan_scores=torch.tensor(scan_scores, dtype=torch.float32), **changes)
    write_model(folder / "run/model.pt", calibration)


@pytest.mark.parametrize(
    ("scan_scores", "rate", "verdict"),
    [
        ([0.0] * 39, 0.05, "unusual"),  # p = 1 / 40
        ([0.0] * 19, 0.05, "unusual"),  # p = 1 / 20, exactly what is asked for
        ([0.0] * 18 + [HIGH], 0.05, "not unusual"),
        ([0.0] * 18 + [HIGH], 0.1, "unusual"),
        ([0.0] * 18, 0.05, "no verdict"),  # too few healthy scans to say
    ],
)
def test_the_verdict_follows_from_the_p_value(scan_scores, rate, verdict, folder, capsys):
    calibrate(folder, scan_scores)
    content = run_json(folder, capsys, "--false-positive-rate", str(rate))
    (found,) = content["scans"]
    assert found["verdict"] == verdict
    assert found["p_value"] == pytest.approx((1 + scan_scores.count(HIGH)) / (1 + len(scan_scores)))
    assert content["normal_scans"] == len(scan_scores)


def test_what_is_left_of_a_scan_agrees(folder, capsys):
    calibrate(folder, [0.0] * 39, voxel_threshold=1.5)
    content = run_json(folder, capsys, "--smallest-ml", "0.3")
    (found,) = content["scans"]
    assert sorted(content) == ["false_positive_rate", "normal_scans", "run", "scans", "skipped"]
    assert content["skipped"] == []
    assert found["file"] == str(folder / "head_T1w.nii.gz")
    assert found["threshold"] == 1.5
    files = {what: Path(path) for what, path in found["files"].items()}
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(path.name for path in files.values())
    assert [files[what].name for what in ("map", "mask", "picture")] == [
        "head_T1w_anomaly.nii.gz",
        "head_T1w_mask.nii.gz",
        "head_T1w.png",
    ]
    anomaly, mask = (nib.load(files[what]) for what in ("map", "mask"))
    np.testing.assert_allclose(anomaly.affine, make_head().affine, atol=1e-4)
    assert anomaly.shape == make_head().shape
    np.testing.assert_array_equal(mask.get_fdata() > 0, np.nan_to_num(anomaly.get_fdata()) >= 1.5)
    volumes = [region["volume_ml"] for region in found["regions"]]
    assert volumes == sorted(volumes, reverse=True)
    assert volumes[-1] >= 0.3
    all_volumes = [r["volume_ml"] for r in run_json(folder, capsys, "--smallest-ml", "0")["scans"][0]["regions"]]
    assert [volume for volume in all_volumes if volume >= 0.3] == volumes
    assert sum(all_volumes) == pytest.approx(mask.get_fdata().sum() * 0.064, rel=1e-3)
    assert plt.imread(files["picture"])[..., :3].std() > 0.05
    assert [one["score"] for one in found["slices"]] == sorted((one["score"] for one in found["slices"]), reverse=True)


def test_regions_are_printed_the_ten_largest_first(folder, capsys):
    calibrate(folder, [0.0] * 39, voxel_threshold=1.8)
    regions = run_json(folder, capsys, "--smallest-ml", "0")["scans"][0]["regions"]
    assert len(regions) > 10
    assert run_scan(folder, "--smallest-ml", "0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  unusual at a false-positive rate of 0.05: score ") for line in lines)
    printed = [line.split() for line in lines if "peak" in line]
    assert [row[0] for row in printed] == [f"{region['volume_ml']:.2f}" for region in regions[:10]]
    assert [row[2] for row in printed] == [region["side"] for region in regions[:10]]
    assert f"    and {len(regions) - 10} smaller ones" in lines
    assert any(line.startswith(f"  {len(regions)} regions of at least 0 ml") for line in lines)


def test_it_is_said_why_there_is_no_verdict(folder, capsys):
    calibrate(folder, [0.0] * 18)
    assert run_scan(folder) == 0
    out = capsys.readouterr().out
    assert "  no verdict at a false-positive rate of 0.05" in out
    assert "that needs 19 normal validation scans, the model has 18" in out


def test_warnings_come_before_the_verdict_and_are_said_even_where_the_rest_is_silent(folder, capsys):
    head = make_head()
    head.set_sform(None, code=0)
    head.set_qform(None, code=0)
    nib.save(head, folder / "head_T1w.nii.gz")
    assert run_scan(folder, "--axes", "RAS") == 0
    out = capsys.readouterr().out
    assert out.index("RAS is taken on trust") < out.index("at a false-positive rate of")
    assert run_scan(folder, "--axes", "RAS", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "RAS is taken on trust" in captured.err
    found = run_json(folder, capsys, "--axes", "RAS")["scans"][0]
    assert "RAS is taken on trust" in found["unlike_training"][0]


def test_several_scans_a_bad_one_among_them(folder, capsys):
    (folder / "bad_T1w.nii.gz").write_bytes(b"nothing")
    nib.save(make_head(seed=1), folder / "other_T1w.nii.gz")
    more = ["--scan", str(folder / "bad_T1w.nii.gz"), str(folder / "other_T1w.nii.gz")]
    assert run_scan(folder, *more) == 3
    captured = capsys.readouterr()
    assert "bad_T1w.nii.gz: is not gzip" in captured.err
    assert (
        captured.out.count(" verdict at a false-positive rate of")
        + captured.out.count("unusual at a false-positive rate of")
        == 2
    )
    assert run_scan(folder, *more, "--json") == 3
    content = json.loads(capsys.readouterr().out)
    assert [Path(one["file"]).name for one in content["scans"]] == ["head_T1w.nii.gz", "other_T1w.nii.gz"]
    assert [Path(one["file"]).name for one in content["skipped"]] == ["bad_T1w.nii.gz"]
    with pytest.raises(DataError, match="is not gzip"):
        run_scan(folder, scan="bad_T1w.nii.gz")
    with pytest.raises(DataError, match=r"none.nii.gz: no such file"):
        run_scan(folder, scan="none.nii.gz")
    with pytest.raises(DataError, match="not one of the 2 scans could be used"):
        run_scan(folder, "--scan", str(folder / "none.nii.gz"), scan="bad_T1w.nii.gz")


def test_each_scan_takes_its_own_brain_mask(folder, capsys):
    head = make_head()
    for name, inside in (("a", head.get_fdata() > 0), ("b", head.get_fdata() > 520)):
        nib.save(head, folder / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(inside.astype(np.uint8), head.affine), folder / f"{name}_mask.nii.gz")
    masks = [str(folder / f"{name}_mask.nii.gz") for name in "ab"]
    assert run_scan(folder, "--scan", str(folder / "b.nii.gz"), "--brain-mask", *masks, scan="a.nii.gz") == 0
    scored = [np.isfinite(nib.load(folder / f"out/{name}_anomaly.nii.gz").get_fdata()).sum() for name in "ab"]
    assert scored[0] > 1.5 * scored[1]
    with pytest.raises(DataError, match=r"missing.nii.gz: no such file"):
        run_scan(folder, "--brain-mask", str(folder / "missing.nii.gz"))


def test_the_slices_shown_are_the_worst_and_ten_mm_apart():
    # 2.5 mm between slices: four of them are 10 mm
    geometry = make_geometry(20, 40, 64, (1.0, 1.0, 2.5), 2.0)
    scores = [0.0] * 20
    for place, score in ((9, 9), (10, 8), (12, 7), (13, 6), (5, 5), (1, 4), (17, 3)):
        scores[place] = score
    rows = [{"slice": 40 + i, "score": score} for i, score in enumerate(scores)]
    made = make_prediction(slice_rows=rows)
    prediction = replace(made, scan=replace(made.scan, geometry=geometry))
    assert choose_apart(prediction) == [9, 13, 5, 1]
    assert choose_apart(prediction, count=2) == [9, 13]


def test_a_scan_is_cut_as_the_training_slices_were(folder, capsys):
    write_model(folder / "run/model.pt", slices=SETTINGS | {"keep": 0.5, "pixel_mm": 6.0})
    found = run_json(folder, capsys)["scans"][0]
    predictor = Predictor.load(folder / "run/model.pt", torch.device("cpu"))
    scan = cut_scan(folder / "head_T1w.nii.gz", None, CutSettings(keep=0.5, size=32, fov_mm=192.0))
    assert found["score"] == pytest.approx(predictor.predict(scan, baselines=False).scan_row["score"])


def test_one_volume_of_several_is_taken(folder, capsys):
    head = make_head()
    values = head.get_fdata(dtype=np.float32)
    series = nib.Nifti1Image(np.stack([values[::-1], values], axis=-1), head.affine)
    whole = run_json(folder, capsys)["scans"][0]
    nib.save(series, folder / "head_T1w.nii.gz")
    assert run_json(folder, capsys, "--volume", "1")["scans"][0]["score"] == whole["score"]
    assert run_json(folder, capsys, "--volume", "0")["scans"][0]["score"] != whole["score"]
