"""One scan from its file to its verdict: what is printed, what is left, which slices are shown."""

import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
import torch

import evaluation.single_scan as single_scan
from common.cli import DataError
from evaluation.evaluate import main as evaluate
from evaluation.predictor import Predictor
from evaluation.single_scan import choose_apart, choose_name
from preprocessing.worker import CutSettings, cut_scan
from tests.conftest import make_head
from tests.predictions import SETTINGS, make_calibration, make_geometry, make_prediction, make_scan, write_model

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


def run_json(folder: Path, capsys, *more: str, scan: str = "head_T1w.nii.gz") -> dict:
    capsys.readouterr()
    assert run_scan(folder, *more, "--json", scan=scan) == 0
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
    calibrate(folder, [0.0] * 39, voxel_threshold=1.25)
    content = run_json(folder, capsys, "--smallest-ml", "0.3")
    (found,) = content["scans"]
    assert sorted(content) == ["false_positive_rate", "normal_scans", "run", "scans", "skipped"]
    assert content["skipped"] == []
    assert found["file"] == str(folder / "head_T1w.nii.gz")
    assert found["threshold"] == 1.25
    files = {what: Path(path) for what, path in found["files"].items()}
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(path.name for path in files.values())
    endings = {"map": "_anomaly.nii.gz", "mask": "_mask.nii.gz", "picture": ".png", "page": ".html", "record": ".json"}
    assert {what: path.name for what, path in files.items()} == {k: f"head_T1w{end}" for k, end in endings.items()}
    assert json.loads(files["record"].read_text()) == found
    anomaly, mask = (nib.load(files[what]) for what in ("map", "mask"))
    np.testing.assert_allclose(anomaly.affine, make_head().affine, atol=1e-4)
    assert anomaly.shape == make_head().shape
    np.testing.assert_array_equal(mask.get_fdata() > 0, np.nan_to_num(anomaly.get_fdata()) >= 1.25)
    volumes = [region["volume_ml"] for region in found["regions"]]
    assert volumes == sorted(volumes, reverse=True)
    assert volumes[-1] >= 0.3
    all_volumes = [r["volume_ml"] for r in run_json(folder, capsys, "--smallest-ml", "0")["scans"][0]["regions"]]
    assert [volume for volume in all_volumes if volume >= 0.3] == volumes
    assert sum(all_volumes) == pytest.approx(mask.get_fdata().sum() * 0.064, rel=1e-3)
    page = files["page"].read_text()
    assert f"score {found['score']:.1f}, p {found['p_value']:.3f}" in page
    assert page.count("data:image/webp") == 4, "its worst slices, its montage and the two pictures of the viewer"
    assert 'id="volumes-scan-head_T1w"' in page
    assert not re.search(r"(src|href)=.?(https?:)?//", page)
    assert len(all_volumes) == len(re.findall(r"<td>(?:left|right|middle)</td>", page))
    assert plt.imread(files["picture"])[..., :3].std() > 0.05
    assert [one["score"] for one in found["slices"]] == sorted((one["score"] for one in found["slices"]), reverse=True)


def test_regions_are_printed_the_ten_largest_first(folder, capsys):
    calibrate(folder, [0.0] * 39, voxel_threshold=1.2, region_masses=torch.zeros(39))
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


def test_regions_that_healthy_scans_commonly_show_are_counted_only(folder, capsys):
    calibrate(folder, [0.0] * 39, voxel_threshold=1.3125, region_masses=torch.zeros(39))
    regions = run_json(folder, capsys, "--smallest-ml", "0")["scans"][0]["regions"]
    largest, second = sorted((region["volume_ml"] * region["mean"] for region in regions), reverse=True)[:2]
    healthy = torch.tensor([0.0] * 30 + [(largest + second) / 2] * 3 + [2 * largest] * 6).float()
    calibrate(folder, [0.0] * 39, voxel_threshold=1.3125, region_masses=healthy)
    assert run_scan(folder, "--smallest-ml", "0") == 0
    lines = capsys.readouterr().out.splitlines()
    (printed,) = [line for line in lines if "peak" in line]
    assert printed.endswith("as large and strong in 6 of 39 healthy scans")
    assert any(re.match(rf"  1 region of .*; beside {len(regions) - 1} that healthy scans", line) for line in lines)
    assert f"; beside {len(regions) - 1} that healthy scans" in (folder / "out/head_T1w.html").read_text()


def test_a_model_of_slices_that_were_cut_otherwise_is_refused(folder):
    write_model(folder / "run/model.pt", slices=SETTINGS | {"format": 3})
    with pytest.raises(DataError, match=r"slices of version 3, and scans are now cut as version \d+; preprocess and"):
        run_scan(folder)


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
    assert out.index("RAS is assumed, as --axes says") < out.index("at a false-positive rate of")
    assert run_scan(folder, "--axes", "RAS", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "RAS is assumed, as --axes says" in captured.err
    found = run_json(folder, capsys, "--axes", "RAS")["scans"][0]
    assert "RAS is assumed, as --axes says" in found["unlike_training"][0]


def test_a_scan_of_another_scanner_is_told_to_calibrate(folder, capsys):
    calibrate(folder, [0.0] * 39, median_residuals=torch.full((39,), 1e-6))
    assert run_scan(folder, "--quiet") == 0
    assert "calibrate the model on healthy scans of this scanner" in capsys.readouterr().err
    calibrate(folder, [0.0] * 39)
    assert not [why for why in run_json(folder, capsys)["scans"][0]["unlike_training"] if "calibrate" in why]


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


# Whose files they are.


def list_owners(out: Path) -> dict[str, np.ndarray]:
    """{name of a map: where it was scored}."""
    return {path.name: np.isfinite(nib.load(path).get_fdata()) for path in sorted(out.glob("*_anomaly.nii.gz"))}


def save_patients(folder: Path) -> list[Path]:
    """Two patients with one file name, whose brains differ in size."""
    paths = []
    for number, name in enumerate(("anna", "bert")):
        head = make_head()
        values = np.where(head.get_fdata() > 480 + 60 * number, head.get_fdata(), 0)
        (folder / name).mkdir()
        nib.save(nib.Nifti1Image(values.astype(np.float32), head.affine), folder / name / "T1.nii.gz")
        paths.append(folder / name / "T1.nii.gz")
    return paths


def test_two_patients_with_one_file_name_keep_their_own_files(folder, capsys):
    paths = save_patients(folder)
    for _ in range(2):  # one after the other, and again: each finds its own
        names = []
        for path in paths:
            capsys.readouterr()
            assert run_scan(folder, "--json", scan=str(path.relative_to(folder))) == 0
            (found,) = json.loads(capsys.readouterr().out)["scans"]
            names.append(Path(found["files"]["map"]).name)
        assert names == ["T1_anomaly.nii.gz", "bert_T1_anomaly.nii.gz"]
        scored = list_owners(folder / "out")
        assert list(scored) == names
        assert scored[names[0]].sum() > 1.2 * scored[names[1]].sum()
    assert len(list((folder / "out").iterdir())) == 10


def test_several_scans_of_one_name_at_once(folder, capsys):
    anna, bert = save_patients(folder)
    copy = folder / "carl/T1.nii.gz"
    copy.parent.mkdir()
    copy.write_bytes(bert.read_bytes())
    command = ["--json", "--scan", str(bert), str(copy)]
    capsys.readouterr()
    assert run_scan(folder, *command, scan="anna/T1.nii.gz") == 0
    found = json.loads(capsys.readouterr().out)["scans"]
    assert [Path(one["files"]["map"]).name for one in found] == [
        "T1_anomaly.nii.gz", "bert_T1_anomaly.nii.gz", "carl_T1_anomaly.nii.gz",
    ]  # fmt: skip
    assert [one["file"] for one in found] == [str(path) for path in (anna, bert, copy)]


@pytest.mark.parametrize("theirs", ["head_T1w.png", "head_T1w_mask.nii.gz", "head_T1w_anomaly.nii.gz"])
def test_a_users_file_is_not_written_over(theirs, folder, capsys):
    (folder / "out").mkdir()
    (folder / "out" / theirs).write_bytes(b"a user's own")
    (found,) = run_json(folder, capsys)["scans"]
    assert (folder / "out" / theirs).read_bytes() == b"a user's own"
    assert Path(found["files"]["map"]).name == f"{folder.name}_head_T1w_anomaly.nii.gz"


def test_names_go_up_the_folders_and_then_by_number(tmp_path):
    scan = make_scan(name="T1", source="/data/site/anna/T1.nii", hashes=("v1", "f1"))
    names = set()
    for wanted in ("T1", "anna_T1", "site_anna_T1", "T1_2", "T1_3"):
        assert choose_name(scan, tmp_path, names) == wanted
        names.add(wanted)
    with pytest.raises(DataError, match="its name takes more than 200 bytes"):
        choose_name(replace(scan, name="x" * 201), tmp_path, set())


@pytest.mark.parametrize("kind", [0, 1])
def test_a_scan_that_the_model_has_seen_gets_no_verdict(kind, folder, capsys):
    """By its voxels, packed and named otherwise; by its file where the model is of an older version."""
    scan = cut_scan(folder / "head_T1w.nii.gz", None, CutSettings(keep=0.7, size=32))
    write_model(folder / "run/model.pt", seen=[scan.hashes[kind]])
    content = run_json(folder, capsys)
    (found,) = content["scans"]
    assert found["verdict"] == "no verdict"
    assert found["unlike_training"][0].startswith("the model was trained or calibrated on this scan")
    assert "No verdict at a false-positive rate of" in Path(found["files"]["page"]).read_text()
    assert run_scan(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    said = next(i for i, line in enumerate(lines) if "the model was trained or calibrated on this scan" in line)
    assert said < next(i for i, line in enumerate(lines) if "  no verdict at a false-positive rate of" in line)
    nib.save(make_head(), folder / "renamed.nii")
    (found,) = run_json(folder, capsys, scan="renamed.nii")["scans"]
    assert (found["verdict"] == "no verdict") == (kind == 0)
    nib.save(make_head(seed=1), folder / "other.nii")
    (found,) = run_json(folder, capsys, scan="other.nii")["scans"]
    assert found["verdict"] != "no verdict"


def test_what_is_no_file_is_not_waited_for(folder):
    os.mkfifo(folder / "fifo.nii")
    (folder / "zero.nii").symlink_to("/dev/zero")
    for name in ("fifo.nii", "zero.nii"):
        with pytest.raises(DataError, match=rf"{name}: is not a regular file"):
            run_scan(folder, scan=name)


def test_a_full_disk_ends_it_and_one_lost_file_does_not(folder, monkeypatch, capsys):
    nib.save(make_head(seed=1), folder / "other.nii")
    more = ["--scan", str(folder / "other.nii")]
    write = single_scan.write_figure

    def fail(number, path, figure):
        if path.name == "head_T1w.png":
            raise OSError(number, os.strerror(number), str(path))
        write(path, figure)

    monkeypatch.setattr(single_scan, "write_figure", lambda *given: fail(errno.ENOSPC, *given))
    with pytest.raises(OSError, match="No space"):
        run_scan(folder, *more)
    monkeypatch.setattr(single_scan, "write_figure", lambda *given: fail(errno.EIO, *given))
    assert run_scan(folder, *more) == 3
    assert f"skipped {folder}/out/head_T1w.png: Input/output error; check the disk" in capsys.readouterr().err


def test_no_link_leads_a_map_outside(folder):
    (folder / "kept").write_text("kept")
    (folder / "out").mkdir()
    for name in ("head_T1w.png", ".partial-head_T1w.png", ".partial-head_T1w_anomaly.nii.gz", ".head_T1w_mask.nii.gz"):
        (folder / "out" / name).symlink_to(folder / "kept")
    assert run_scan(folder) == 0
    assert (folder / "kept").read_text() == "kept"


def test_a_name_that_is_no_utf_8_goes_through(folder, capsys):
    path = Path(os.fsdecode(os.fsencode(folder) + b"/M\xfcller.nii"))
    nib.save(make_head(), path)
    (found,) = run_json(folder, capsys, scan=path.name)["scans"]
    assert Path(found["files"]["map"]).name == "M%FCller_anomaly.nii.gz"
    assert Path(found["files"]["picture"]).exists()


def test_the_page_of_a_scan_says_what_speaks_against_it(folder):
    scan = cut_scan(folder / "head_T1w.nii.gz", None, CutSettings(keep=0.7, size=32))
    write_model(folder / "run/model.pt", seen=[scan.hashes[0]])
    assert run_scan(folder) == 0
    page = (folder / "out/head_T1w.html").read_text()
    assert "the model was trained or calibrated on this scan" in page
    assert "of the brain&#39;s voxels lie outside them" in page, "coverage"
    assert '<h2 id="results">' not in page
