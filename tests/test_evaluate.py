"""evaluate.py from its command line to the folder it leaves: complete, consistent, once, and of one evaluation only."""

import csv
import hashlib
import json
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from common.cli import DataError
from evaluation.evaluate import main as evaluate
from evaluation.table import format_figure
from models.checkpoint import load_checkpoint
from preprocessing.store import list_scans
from tests.predictions import mark


def read_rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_metrics(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def rank_slices(out: Path, label: str, scan: str) -> list[str]:
    """A scan's slices, the worst first, as three digits."""
    rows = [row for row in read_rows(out / "scores.csv") if (row["label"], row["scan"]) == (label, scan)]
    return [f"{int(row['slice']):03d}" for row in sorted(rows, key=lambda row: -float(row["score"]))]


def test_the_tables_have_a_row_for_each(evaluation, processed):
    out, _ = evaluation
    scans = list(list_scans(processed / "test"))
    slices, rows = read_rows(out / "scores.csv"), read_rows(out / "scans.csv")
    wanted = [(scan.label, scan.name, str(index)) for scan in scans for index in scan.indices]
    assert sorted((row["label"], row["scan"], row["slice"]) for row in slices) == sorted(wanted)
    assert [(row["label"], row["scan"]) for row in rows] == [(scan.label, scan.name) for scan in sorted(
        scans, key=lambda scan: ("normal", "abnormal").index(scan.label))]  # fmt: skip
    scores = ["score", "mse", "bright", "dark", "deviation"]
    assert list(slices[0]) == ["label", "scan", "subject", "slice", "lesion_voxels", "p_value", *scores]
    known = ["label", "scan", "subject", "lesion_known", "p_value", "flagged"]
    assert list(rows[0]) == [*known, *scores, "age", "sex"]
    regions = ["label", "scan", "volume_ml", "x_mm", "y_mm", "z_mm", "side", "peak", "mean"]
    regions += [
        "peak_x_mm",
        "peak_y_mm",
        "peak_z_mm",
        "number",
        "slice",
        "file_axis",
        "file_index",
        "on_lesion",
        "p_value",
    ]
    assert (out / "regions.csv").read_text().splitlines()[0] == ",".join(regions)
    lesions = ["label", "scan", "subject", "kind", "lesion", "volume_ml", "covered", "found", "dice", "peak"]
    assert (out / "lesions.csv").read_text().splitlines()[0] == ",".join(lesions)


def test_pictures_are_those_of_the_worst_slices(evaluation, processed):
    out, _ = evaluation
    wanted = []
    for scan in list_scans(processed / "test"):
        worst = rank_slices(out, scan.label, scan.name)[:2]
        wanted += [f"{scan.label}/{scan.name}_slice_{index}.png" for index in worst]
    found = [path.relative_to(out / "error_maps").as_posix() for path in (out / "error_maps").rglob("*.png")]
    assert sorted(found) == sorted(wanted)
    montages = sorted((path.parent.name, path.stem) for path in (out / "montages").rglob("*.png"))
    assert montages == sorted((scan.label, scan.name) for scan in list_scans(processed / "test"))
    for path in [*out.rglob("*.png")]:
        assert plt.imread(path)[..., :3].std() > 0.05, f"{path} is blank"
    names = {f"{what}_{level}" for what in ("curves", "scores") for level in ("scans", "slices")}
    assert {path.stem for path in out.glob("*.pdf")} == names | {"dice", "detectability", "calibration"}


def test_metrics_agree_with_the_tables(evaluation):
    out, _ = evaluation
    content = read_metrics(out)
    figures, scans = content["figures"], read_rows(out / "scans.csv")
    labels = [row["label"] == "abnormal" for row in scans]
    assert figures["score"]["scan_auroc"]["value"] == roc_auc_score(labels, [float(row["score"]) for row in scans])
    slices = read_rows(out / "scores.csv")
    rows = [row for row in slices if row["label"] == "normal" or int(row["lesion_voxels"]) >= 10]
    labels = [row["label"] == "abnormal" for row in rows]
    assert any(labels)
    wanted = roc_auc_score(labels, [float(row["score"]) for row in rows])
    assert figures["score"]["slice_auroc"]["value"] == pytest.approx(wanted, abs=1e-4)
    assert figures["score"]["slice_auroc"]["slices"] == len(rows) < len(slices)
    lesions = read_rows(out / "lesions.csv")
    assert content["counts"] == {
        "normal": 2,
        "abnormal": 2,
        "slices": len(slices),
        "subjects": 4,
        "lesions": len(lesions),
        "without_lesion_mask": 0,
        "unlike_calibration": 0,
        "skipped": 0,
    }
    assert [group["group"] for group in content["detectability"]["kind"]] == ["kind 0", "kind 1"]
    found = [row["found"] == "True" for row in lesions if row["kind"] == "kind 0"]
    assert content["detectability"]["kind"][0]["recall"]["value"] == np.mean(found)
    table = (out / "table.md").read_text()
    metric = figures["score"]["voxel_ap"]
    assert f"| {metric['value']:.3f} ({metric['low']:.3f}–{metric['high']:.3f}) |" in table
    assert f"{metric['value']:.3f} ({metric['low']:.3f}--" in (out / "table.tex").read_text()


def test_p_values_flags_and_calibration_agree(evaluation, untrained):
    out, _ = evaluation
    content = read_metrics(out)
    calibration = load_checkpoint(untrained / "model.pt")["calibration"]
    assert content["calibration"] == {
        "normal_scans": 2,
        "voxel_threshold": float(calibration["threshold"]),
        "scan_score": None,
        "slice_score": float(np.sort(calibration["slice_scores"])[-int(0.05 * (len(calibration["slice_scores"]) + 1))]),
    }
    for row in read_rows(out / "scans.csv"):
        as_high = int((calibration["scan_scores"] >= float(row["score"])).sum())
        assert float(row["p_value"]) == pytest.approx((1 + as_high) / 3, abs=1e-5)
        assert row["flagged"] == "False", "two healthy scans cannot give p <= 0.05"
    assert {label: flags["flagged"] for label, flags in content["flagged"].items()} == {"normal": 0, "abnormal": 0}


def test_regions_and_maps_agree(evaluation, processed):
    out, _ = evaluation
    regions, threshold = read_rows(out / "regions.csv"), read_metrics(out)["calibration"]["voxel_threshold"]
    for scan in list_scans(processed / "test"):
        source = nib.load(scan.record["source"])
        image = nib.load(out / "maps" / scan.label / f"{scan.name}_anomaly.nii.gz")
        assert image.shape == source.shape
        np.testing.assert_allclose(image.affine, source.affine, atol=1e-4)
        anomaly = image.get_fdata()
        assert (source.get_fdata()[np.isfinite(anomaly)] != 0).mean() > 0.85
        marked = mark(anomaly, threshold)
        mask = nib.load(out / "maps" / scan.label / f"{scan.name}_mask.nii.gz").get_fdata()
        np.testing.assert_array_equal(mask, marked)
        mine = [row for row in regions if (row["label"], row["scan"]) == (scan.label, scan.name)]
        volume_ml = marked.sum() * np.prod(image.header.get_zooms()) / 1000
        assert sum(float(row["volume_ml"]) for row in mine) == pytest.approx(volume_ml, rel=1e-3)
        assert bool(mine) == marked.any()
        subject = re.sub(r"^sub-|[^0-9a-zA-Z]", "", scan.subject)
        (bids,) = (out / "bids").rglob(f"sub-{subject}*_statmap.nii.gz")
        np.testing.assert_array_equal(nib.load(bids).get_fdata(), anomaly)
        sidecar = json.loads(bids.with_name(bids.name.replace(".nii.gz", ".json")).read_text())
        row = next(r for r in read_rows(out / "scans.csv") if (r["label"], r["scan"]) == (scan.label, scan.name))
        link = json.loads((out / "bids/dataset_description.json").read_text())["DatasetLinks"]["raw"]
        (uri,) = sidecar["Sources"]
        assert uri.replace("bids:raw:", f"{link}/") == Path(scan.record["source"]).absolute().as_uri()
        assert sidecar["Label"] == scan.label
        assert sidecar["Score"] == pytest.approx(float(row["score"]), rel=1e-5)
        assert sidecar["PValue"] == pytest.approx(float(row["p_value"]), rel=1e-5)
    assert regions, "nothing was tested"


def test_a_scan_from_its_file_gets_what_the_test_set_gave_it(evaluation, untrained, processed, tmp_path, capsys):
    out, _ = evaluation
    rows = {(row["label"], row["scan"]): row for row in read_rows(out / "scans.csv")}
    for scan in list_scans(processed / "test"):
        source = Path(scan.record["source"])
        mask = source.parents[1] / "masks" / source.name.replace("_T1w", "_brain")
        command = ["--run", str(untrained), "--scan", str(source), "--brain-mask", str(mask), "--out", str(tmp_path)]
        capsys.readouterr()
        assert evaluate([*command, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["scans"][0]
        row = rows[scan.label, scan.name]
        assert found["score"] == pytest.approx(float(row["score"]), rel=1e-5)
        assert found["p_value"] == pytest.approx(float(row["p_value"]), rel=1e-5)
        here = nib.load(tmp_path / f"{scan.name}_anomaly.nii.gz").get_fdata()
        there = nib.load(out / "maps" / scan.label / f"{scan.name}_anomaly.nii.gz").get_fdata()
        np.testing.assert_array_equal(here, there)


def test_a_second_evaluation_does_nothing(evaluation, capsys):
    out, command = evaluation
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert evaluate(command) == 0
    assert "holds this evaluation already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_the_settings_of_an_evaluation_are_all_that_changes_what_it_leaves(evaluation, untrained):
    out, _ = evaluation
    settings = read_metrics(out)["settings"]
    assert settings["model"] == hashlib.sha256((untrained / "model.pt").read_bytes()).hexdigest()
    assert len(settings["data"]) == len(settings["kinds"]) == 64
    assert {key: settings[key] for key in settings if key not in ("model", "data", "kinds")} == {
        "maps": True,
        "bids": True,
        "panels": "2",
        "false_positive_rate": 0.05,
        "smallest_ml": 0,
    }


def test_normal_scans_alone_and_a_broken_slice(untrained, processed, tmp_path, capsys):
    shutil.copytree(processed / "test/normal", tmp_path / "test/normal")
    first, second = sorted((tmp_path / "test/normal").iterdir())
    next(second.glob("slice_*.npy")).write_bytes(b"\x93NUMPY")
    command = ["--run", str(untrained), "--data", str(tmp_path / "test"), "--out", str(tmp_path / "out")]
    assert evaluate(command) == 3
    assert f"skipped {second}" in capsys.readouterr().err
    assert [row["scan"] for row in read_rows(tmp_path / "out/scans.csv")] == [first.name]
    assert read_metrics(tmp_path / "out")["counts"]["skipped"] == 1
    assert evaluate(command) == 3, "the same answer where it is done already"
    next(first.glob("slice_*.npy")).write_bytes(b"")
    with pytest.raises(DataError, match="not one of its 2 scans could be read"):
        evaluate([*command, "--out", str(tmp_path / "other")])


@pytest.mark.parametrize("split", ["train", "val"])
def test_scans_that_the_model_has_seen_are_refused_under_any_name(split, untrained, processed, tmp_path):
    shutil.copytree(processed / "test/normal", tmp_path / "normal")
    shutil.copytree(next((processed / split / "normal").iterdir()), tmp_path / "normal/sub-999_T1w")
    with pytest.raises(DataError, match=r"sub-999_T1w: the model was trained or calibrated on this scan; test it on"):
        evaluate(["--run", str(untrained), "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_user_errors_are_one_line(untrained, processed, tmp_path):
    with pytest.raises(DataError, match="no slices"):
        evaluate(["--run", str(untrained), "--data", str(tmp_path)])
    with pytest.raises(DataError, match="no such checkpoint"):
        evaluate(["--run", str(tmp_path), "--data", str(processed / "test")])
    small = tmp_path / "small/normal"
    shutil.copytree(processed / "test/normal", small)
    for record in small.glob("*/scan.json"):
        record.write_text(record.read_text().replace('"size": 32', '"size": 64'))
    with pytest.raises(DataError, match="made with size 64, but the model's training slices with 32"):
        evaluate(["--run", str(untrained), "--data", str(tmp_path / "small")])
    (tmp_path / "kinds.csv").write_text("scan,what\na,b\n")
    for path, words in ((tmp_path / "kinds.csv", "has no column"), (tmp_path / "none.csv", "cannot be read")):
        with pytest.raises(DataError, match=words):
            evaluate(["--run", str(untrained), "--data", str(processed / "test"), "--lesions", str(path)])


@pytest.mark.parametrize(
    "wrong",
    [
        ["--false-positive-rate", "0"],
        ["--false-positive-rate", "1"],
        ["--batch-size", "0"],
        ["--panels", "some"],
        ["--scan", "a.txt"],
        ["--scan", "a.nii", "--brain-mask", "b", "c"],
        ["--brain-mask", "b"],
        ["--scan", "a.nii", "--bids"],
        ["--axes", "RAR"],
    ],
)
def test_wrong_usage_ends_with_code_2(wrong, untrained, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate(["--run", str(untrained), *wrong])
    assert stop.value.code == 2
    assert wrong[0] in capsys.readouterr().err.splitlines()[-1]


def test_json_alone_on_standard_output(evaluation, capsys):
    out, command = evaluation
    assert evaluate([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read_metrics(out)
    assert evaluate(["--config", str(out / "metrics.json"), "--quiet"]) == 0, "its record is a file of flags"
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_the_printed_table_says_what_the_metrics_say(evaluation, capsys):
    out, command = evaluation
    assert evaluate(command) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = read_metrics(out)["figures"]
    printed = next(line for line in lines if line.startswith("anomaly map of the model"))
    names = ("voxel_ap", "best_dice", "dice", "slice_auroc", "scan_auroc")
    cells = [format_figure(figures["score"][name]).replace("–", "-") for name in names]
    assert [cell for cell in cells if cell not in printed] == []
    assert printed.index(cells[0]) < printed.index(cells[-1])
    assert any(line.startswith("0 of 2 normal scans flagged at a false-positive rate of 0.05") for line in lines)
    assert any("no scan can be flagged at 0.05: that needs 19 normal validation scans" in line for line in lines)


def copy_store(processed, tmp_path) -> Path:
    shutil.copytree(processed / "test", tmp_path / "test")
    return tmp_path / "test"


def test_a_bad_record_takes_only_itself_out(untrained, processed, tmp_path, capsys):
    data = copy_store(processed, tmp_path)
    (bad, *_), good = sorted((data / "normal").iterdir()), list(list_scans(data))
    (bad / "scan.json").write_text((bad / "scan.json").read_text().replace('"axes": "', '"axes": "X'))
    command = ["--run", str(untrained), "--data", str(data), "--out", str(tmp_path / "out"), "--panels", "0"]
    for _ in range(2):
        assert evaluate(command) == 3
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
        assert len(err) == 1
        assert err[0].startswith(f"skipped {bad / 'scan.json'}: is not a record of a scan (axes is X")
    assert read_metrics(tmp_path / "out")["counts"]["skipped"] == 1
    assert len(read_rows(tmp_path / "out/scans.csv")) == len(good) - 1
    assert not (tmp_path / "out/.evaluation.json").exists()


def test_a_copy_of_a_scan_that_was_trained_on_is_refused(untrained, processed, tmp_path):
    """Its file is another one, its voxels are not."""
    data = copy_store(processed, tmp_path)
    trained = next(list_scans(processed / "train"))
    copy = data / "normal/renamed"
    shutil.copytree(trained.folder, copy)
    record = trained.record | {"source": "/else/renamed.nii", "sources": {"renamed.nii": "f" * 64}}
    (copy / "scan.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"renamed: the model was trained or calibrated on this scan"):
        evaluate(["--run", str(untrained), "--data", str(data), "--out", str(tmp_path / "out")])


def test_a_scan_under_both_labels_is_refused(untrained, processed, tmp_path):
    data = copy_store(processed, tmp_path)
    ill = next(list_scans(data / "abnormal"))
    shutil.copytree(ill.folder, data / "normal/well")
    with pytest.raises(DataError, match="holds the same scan as"):
        evaluate(["--run", str(untrained), "--data", str(data), "--out", str(tmp_path / "out")])


def test_an_unlabelled_cohort_gets_its_page_and_no_figures_of_detection(untrained, processed, tmp_path):
    shutil.copytree(processed / "test/abnormal", tmp_path / "test/unlabelled")
    shutil.copytree(processed / "test/masks", tmp_path / "test/masks")  # of abnormal scans with the same names
    out = tmp_path / "out"
    assert evaluate(["--run", str(untrained), "--data", str(tmp_path / "test"), "--out", str(out)]) == 0
    content = read_metrics(out)
    assert {label: content["counts"].get(label) for label in ("normal", "abnormal", "unlabelled")} == {
        "normal": 0,
        "abnormal": 0,
        "unlabelled": 2,
    }
    assert not any(content["figures"].values()), "nothing is measured where nothing is known"
    assert content["counts"]["without_lesion_mask"] == 0
    assert (content["flagged"]["unlabelled"]["flagged"], content["flagged"]["unlabelled"]["scans"]) == (0, 2)
    page = (out / "report.html").read_text()
    assert "0 of 2 unlabelled scans are flagged" in page
    assert "2 unlabelled scans, " in page
    assert page.count('class="viewer"') == 2
    assert "voxel AP" not in page.split("<script")[0]
