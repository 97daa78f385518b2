"""Figures agree with scikit-learn and with values worked by hand; an evaluation folder is complete."""

import csv
import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from evaluation.compare import main as compare
from evaluation.evaluate import Evaluation, find_flag_score
from evaluation.evaluate import main as evaluate
from evaluation.metrics import (
    VoxelCounts,
    auroc,
    average_precision,
    counted_auroc,
    counted_average_precision,
    counted_dice,
    draw_weights,
    list_lesions,
    mean,
    measure_detectability,
    name_volume,
    tabulate,
)
from models.anomaly import give_p_values
from models.checkpoint import CheckpointError
from preprocessing.scans import DataError
from preprocessing.slices import list_scans


def test_metrics_against_scikit_learn():
    rng = np.random.default_rng(0)
    labels, scores = rng.random(200) < 0.3, rng.random(200)
    subjects = np.arange(200)
    assert auroc(labels, scores, subjects)["value"] == roc_auc_score(labels, scores)
    assert average_precision(labels, scores, subjects)["value"] == average_precision_score(labels, scores)


def test_auroc_by_hand():
    # of the 2 x 3 pairs (abnormal, normal) five are the right way round
    figure = auroc([True, True, False, False, False], [0.9, 0.4, 0.5, 0.2, 0.1], list("abcde"))
    assert figure["value"] == pytest.approx(5 / 6)


def test_voxel_figures_against_scikit_learn():
    rng = np.random.default_rng(0)
    counts, all_scores, all_lesions = VoxelCounts(), [], []
    for subject in ("a", "b", "c", "a"):
        lesion = rng.random(3000) < 0.05
        scores = np.exp(rng.normal(size=3000) + 1.5 * lesion).astype(np.float32)
        counts.add(subject, scores, lesion)
        all_scores.append(scores)
        all_lesions.append(lesion)
    scores, lesion = np.concatenate(all_scores), np.concatenate(all_lesions)
    figures = counts.figures()
    assert figures["voxel_ap"]["value"] == pytest.approx(average_precision_score(lesion, scores), abs=2e-3)
    dice = [2 * (lesion & (scores >= t)).sum() / ((scores >= t).sum() + lesion.sum()) for t in np.unique(scores)]
    assert figures["best_dice"]["value"] == pytest.approx(max(dice), abs=2e-3)
    assert figures["prevalence"] == pytest.approx(lesion.mean())
    assert figures["voxel_ap"]["low"] < figures["voxel_ap"]["value"] < figures["voxel_ap"]["high"]


def test_resampled_figures_count_as_scikit_learn_weighs():
    rng = np.random.default_rng(1)
    labels, scores, subjects = rng.random(300) < 0.4, rng.integers(0, 40, 300) / 40, rng.integers(0, 7, 300)
    weights = draw_weights(7, 3, seed=2)
    counts = np.tensordot(weights, tabulate(labels, scores, subjects), axes=1)
    for metric, counted in ((roc_auc_score, counted_auroc), (average_precision_score, counted_average_precision)):
        wanted = [metric(labels, scores, sample_weight=w[subjects]) for w in weights]
        np.testing.assert_allclose(counted(counts), wanted, rtol=1e-9)


def test_dice_by_hand():
    # bins by falling score: 1 lesion voxel, then 1 of each, then 2 outside
    np.testing.assert_allclose(counted_dice(np.array([[0, 1, 2], [1, 1, 0]])), [2 / 3, 4 / 5, 4 / 7])  # fmt: skip


def test_intervals_are_over_subjects():
    labels = np.tile([True, False], 20)
    whose = np.repeat(np.arange(4), 10)
    scores = np.where(whose < 3, labels, ~labels).astype(float)  # all right in three subjects, all wrong in one
    by_slice = auroc(labels, scores, np.arange(40))
    by_subject = auroc(labels, scores, whose)
    assert by_subject["high"] - by_subject["low"] > by_slice["high"] - by_slice["low"]
    assert auroc(labels, scores, np.arange(40)) == by_slice, "seeded"


def test_evaluation_is_complete(evaluation, processed):
    out, _ = evaluation
    scans = list(list_scans(processed / "test"))
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert len(rows) == sum(len(scan.indices) for scan in scans)
    assert {(row["label"], row["scan"]) for row in rows} == {(scan.label, scan.name) for scan in scans}
    assert len(list(csv.DictReader((out / "scans.csv").open()))) == len(scans)
    figures = json.loads((out / "metrics.json").read_text())["figures"]
    for detector in ("score", "mse", "bright", "dark", "deviation"):
        for name in ("slice_auroc", "scan_auroc", "slice_ap", "scan_ap", "voxel_ap", "best_dice"):
            assert 0 <= figures[detector][name]["value"] <= 1, (detector, name)
    pictures = sorted((out / "error_maps").rglob("*.png"))
    assert len(pictures) == 2 * len(scans), "the two worst slices of each scan"
    montages = sorted((out / "montages").rglob("*.png"))
    assert [(path.parent.name, path.stem) for path in montages] == sorted((scan.label, scan.name) for scan in scans)
    for path in [*pictures, *montages, *out.glob("*.png")]:
        assert plt.imread(path)[..., :3].std() > 0.05, f"{path} is blank"


def test_p_values_flags_and_regions_agree(evaluation, run):
    out, _ = evaluation
    content = json.loads((out / "metrics.json").read_text())
    assert content["calibration"]["normal_scans"] == 2
    scans = list(csv.DictReader((out / "scans.csv").open()))
    for row in scans:
        assert float(row["p_value"]) >= 1 / 3 - 1e-6
        assert row["flagged"] == "False", "two validation scans cannot give p <= 0.05"
    for label in ("normal", "abnormal"):
        assert content["flagged"][label] == {
            "flagged": 0,
            "scans": 2,
            "low": 0.0,
            "high": pytest.approx(0.842, abs=1e-3),
        }
    regions = list(csv.DictReader((out / "regions.csv").open()))
    threshold = content["calibration"]["voxel_threshold"]
    for row in scans:
        image = nib.load(out / "maps" / row["label"] / f"{row['scan']}_anomaly.nii.gz")
        above = np.nan_to_num(image.get_fdata()) >= threshold
        mine = [r for r in regions if (r["label"], r["scan"]) == (row["label"], row["scan"])]
        assert bool(mine) == above.any()
        volume_ml = above.sum() * np.prod(image.header.get_zooms()) / 1000
        assert sum(float(r["volume_ml"]) for r in mine) == pytest.approx(volume_ml, rel=1e-3)
        assert all(float(r["peak"]) >= float(r["mean"]) >= threshold * 0.999 for r in mine)


def test_metrics_agree_with_the_tables(evaluation):
    out, _ = evaluation
    figures = json.loads((out / "metrics.json").read_text())["figures"]
    scans = list(csv.DictReader((out / "scans.csv").open()))
    labels = [row["label"] == "abnormal" for row in scans]
    assert figures["score"]["scan_auroc"]["value"] == roc_auc_score(labels, [float(row["score"]) for row in scans])
    rows = [
        r
        for r in csv.DictReader((out / "scores.csv").open())
        if r["label"] == "normal" or int(r["lesion_voxels"]) >= 10
    ]
    labels = [row["label"] == "abnormal" for row in rows]
    assert any(labels)
    wanted = roc_auc_score(labels, [float(row["score"]) for row in rows])
    assert figures["score"]["slice_auroc"]["value"] == pytest.approx(wanted, abs=1e-4)


def test_maps_lie_on_their_scans(evaluation, processed):
    out, _ = evaluation
    for scan in list_scans(processed / "test"):
        source = nib.load(scan.record["source"])
        anomaly = nib.load(out / "maps" / scan.label / f"{scan.name}_anomaly.nii.gz")
        assert anomaly.shape == source.shape
        np.testing.assert_allclose(anomaly.affine, source.affine, atol=1e-4)
        scored = np.isfinite(anomaly.get_fdata())
        assert scored.any()
        assert (source.get_fdata()[scored] != 0).mean() > 0.85


def test_second_evaluation_does_nothing(evaluation, capsys):
    out, command = evaluation
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert evaluate(command) == 0
    assert "holds this evaluation already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_another_evaluation_leaves_nothing_of_the_old_one(evaluation, tmp_path):
    out, command = evaluation
    shutil.copytree(out, tmp_path / "out")
    command = [word for word in command if word not in ("--maps", "--bids")]
    assert evaluate([*command, "--out", str(tmp_path / "out"), "--panels", "1"]) == 0
    assert not (tmp_path / "out/maps").exists()
    assert not (tmp_path / "out/bids").exists()
    assert len(list((tmp_path / "out/error_maps").rglob("*.png"))) == 4


def test_normal_scans_alone_and_a_broken_slice(run, processed, tmp_path, capsys):
    shutil.copytree(processed / "test/normal", tmp_path / "test/normal")
    first, second = sorted((tmp_path / "test/normal").iterdir())
    next(second.glob("slice_*.npy")).write_bytes(b"\x93NUMPY")
    command = ["--run", str(run), "--data", str(tmp_path / "test"), "--out", str(tmp_path / "out"), "--panels", "1"]
    assert evaluate(command) == 3
    assert second.name in capsys.readouterr().err
    assert [row["scan"] for row in csv.DictReader((tmp_path / "out/scans.csv").open())] == [first.name]


def test_user_errors_are_one_line(run, processed, tmp_path):
    with pytest.raises(DataError, match="no slices"):
        evaluate(["--run", str(run), "--data", str(tmp_path)])
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        evaluate(["--run", str(tmp_path), "--data", str(processed / "test")])
    small = tmp_path / "small/normal"
    shutil.copytree(processed / "test/normal", small)
    for record in small.glob("*/scan.json"):
        record.write_text(record.read_text().replace('"size": 32', '"size": 64'))
    with pytest.raises(DataError, match="made with size 64, but the model's training slices with 32"):
        evaluate(["--run", str(run), "--data", str(tmp_path / "small")])


@pytest.mark.parametrize("split", ["train", "val"])
def test_scans_that_the_model_has_seen_are_refused_under_any_name(split, run, processed, tmp_path):
    shutil.copytree(processed / "test/normal", tmp_path / "normal")
    shutil.copytree(next((processed / split / "normal").iterdir()), tmp_path / "normal/sub-999_T1w")
    with pytest.raises(DataError, match=r"sub-999_T1w: the model was trained or calibrated on this scan; test it on"):
        evaluate(["--run", str(run), "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_lesions_by_hand():
    lesion = np.zeros((6, 20, 20), dtype=bool)
    lesion[1:3, 2:7, 2:7] = True  # 50 pixels, half of them flagged below
    lesion[1, 8, 2] = True  # less than two pixels away: the same lesion
    lesion[4:6, 15:18, 15:18] = True  # 18 pixels, one flagged: not found
    lesion[0, 19, 19] = True  # too small to be one
    anomaly = np.ones(lesion.shape, dtype=np.float32)
    anomaly[1, 2:7, 2:7] = 5
    anomaly[1, 2:7, 7:9] = 5  # 10 more of the same region
    anomaly[4, 15, 15] = 5
    anomaly[5, 0:3, 15:18] = 5  # a region that touches no lesion
    first, second = list_lesions(lesion, anomaly, 5.0, (2.0, 2.0))
    assert first["volume_ml"] == pytest.approx(51 * 8 / 1000)
    assert first["covered"] == pytest.approx(25 / 51)
    assert first["found"]
    assert first["dice"] == pytest.approx(2 * 25 / (51 + 35))
    assert not second["found"]
    assert (second["dice"], second["covered"]) == (pytest.approx(2 / 19), pytest.approx(1 / 18))


def test_detectability_counts_what_stands_behind_it():
    rows = [
        {"label": "abnormal", "scan": s, "subject": s, "volume_ml": ml, "found": found, "dice": dice}
        for s, ml, found, dice in (
            ("a", 0.5, True, 0.5),
            ("a", 0.7, False, 0.0),
            ("b", 0.31, False, 0.1),
            ("b", 20, 1, 1),
        )
    ]
    small, large = measure_detectability(rows, name_volume, ["0.3–1 ml", "1–3 ml", "10 ml and more"])
    assert (small["group"], small["lesions"], small["scans"], small["subjects"]) == ("0.3–1 ml", 3, 2, 2)
    assert small["recall"]["value"] == pytest.approx(1 / 3)
    assert small["recall"]["low"] == 0
    assert small["recall"]["high"] == pytest.approx(1 / 2), "both draws of the subject with one of two found"
    assert small["dice"]["value"] == pytest.approx(0.2)
    assert large["recall"]["value"] == 1
    assert mean([1, 0], ["a", "a"])["low"] == 0.5, "of one subject no interval can be had"


@pytest.mark.parametrize("false_alarms", [0.05, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("count", [5, 9, 19, 40])
def test_flag_score_is_where_the_p_value_says(count, false_alarms):
    healthy = np.sort(np.random.default_rng(0).random(count))
    scores = np.concatenate([healthy, np.random.default_rng(1).random(50), [2.0]])
    flagged = give_p_values(scores, healthy) <= false_alarms
    mark = find_flag_score(healthy, false_alarms)
    np.testing.assert_array_equal(flagged, scores > mark if mark is not None else np.zeros(len(scores), dtype=bool))


def test_false_alarms_are_counted_among_normal_scans_by_sex_and_age():
    evaluation = Evaluation({})
    people = (
        ("normal", True, 29.9, "F"),
        ("normal", False, 30, "M"),
        ("normal", True, 75, "F"),
        ("normal", True, None, None),
    )
    for label, flagged, age, sex in (*people, ("abnormal", True, 80, "M")):
        evaluation.scans.append({"label": label, "flagged": flagged, "age": age, "sex": sex})
    counts = evaluation.count_flagged()
    assert [(g, c["flagged"], c["scans"]) for g, c in counts["normal_by_sex"].items()] == [("F", 2, 2), ("M", 0, 1)]
    by_age = {group: (count["flagged"], count["scans"]) for group, count in counts["normal_by_age"].items()}
    assert by_age == {"under 30": (1, 1), "30 to 44": (0, 1), "75 and above": (1, 1)}
    assert (counts["normal"]["flagged"], counts["normal"]["scans"]) == (3, 4)


def test_counts_behind_the_figures(evaluation):
    out, _ = evaluation
    content = json.loads((out / "metrics.json").read_text())
    assert content["counts"]["lesions"] == len(list(csv.DictReader((out / "lesions.csv").open()))) > 0
    figures = content["figures"]["score"]
    assert (figures["scan_auroc"]["scans"], figures["scan_auroc"]["subjects"]) == (4, 4)
    assert figures["slice_auroc"]["slices"] < content["counts"]["slices"], "slices without the lesion do not count"
    assert figures["voxel_ap"]["lesions"] == content["counts"]["lesions"]
    assert {group["group"] for group in content["detectability"]["kind"]} == {"kind 0", "kind 1"}
    table = (out / "table.md").read_text()
    tex = (out / "table.tex").read_text()
    for name in ("voxel_ap", "scan_auroc"):
        assert f"{figures[name]['value']:.3f} ({figures[name]['low']:.3f}" in table
        assert f"{figures[name]['value']:.3f} ({figures[name]['low']:.3f}" in tex
    assert tex.count("&") == 5 * 6, "five figures of a head, three baselines and two of the model"


def test_compare_sets_models_side_by_side(evaluation, tmp_path, capsys):
    out, _ = evaluation
    content = json.loads((out / "metrics.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps(content | {"run": "runs/other_one"}))
    assert compare([str(out), str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert (out / "table.md").read_text().splitlines()[:7] == table.splitlines()[:7]
    assert "| other_one, anomaly map |" in table
    assert compare([str(out), str(tmp_path), "--latex"]) == 0
    assert r"other\_one, anomaly map & " in capsys.readouterr().out


def test_json_alone_on_standard_output(evaluation, capsys):
    out, command = evaluation
    assert evaluate([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "metrics.json").read_text())
    assert evaluate(["--config", str(out / "metrics.json"), "--quiet"]) == 0, "its record is a file of flags"
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def find_files(scan) -> list[str]:
    """--scan and --brain-mask of a scan of the store."""
    source = Path(scan.record["source"])
    mask = source.parents[1] / "masks" / source.name.replace("_T1w", "_brain")
    return ["--scan", str(source), "--brain-mask", str(mask)]


def test_one_scan_from_its_file_gets_what_the_test_set_gave_it(evaluation, run, processed, tmp_path, capsys):
    out, _ = evaluation
    rows = {(row["label"], row["scan"]): row for row in csv.DictReader((out / "scans.csv").open())}
    for scan in list_scans(processed / "test"):
        command = ["--run", str(run), *find_files(scan), "--out", str(tmp_path), "--smallest-ml", "0", "--json"]
        assert evaluate(command) == 0
        found = json.loads(capsys.readouterr().out)["scans"][0]
        row = rows[scan.label, scan.name]
        assert found["score"] == pytest.approx(float(row["score"]), rel=1e-5)
        assert found["p_value"] == pytest.approx(float(row["p_value"]), rel=1e-5)
        anomaly = nib.load(tmp_path / f"{scan.name}_anomaly.nii.gz")
        same = nib.load(out / "maps" / scan.label / f"{scan.name}_anomaly.nii.gz")
        np.testing.assert_array_equal(anomaly.get_fdata(), same.get_fdata())
        np.testing.assert_allclose(anomaly.affine, nib.load(scan.record["source"]).affine, atol=1e-4)
        mask = nib.load(tmp_path / f"{scan.name}_mask.nii.gz").get_fdata()
        np.testing.assert_array_equal(mask > 0, np.nan_to_num(anomaly.get_fdata()) >= found["threshold"])
        assert plt.imread(tmp_path / f"{scan.name}.png")[..., :3].std() > 0.05
        volumes = [r["volume_ml"] for r in found["regions"]]
        assert sum(volumes) == pytest.approx(mask.sum() * np.prod(anomaly.header.get_zooms()) / 1000, rel=1e-3)


def test_several_scans_a_bad_one_among_them(run, processed, tmp_path, capsys):
    first, second = list_scans(processed / "test/normal")
    (tmp_path / "bad_T1w.nii.gz").write_bytes(b"nothing")
    files = [Path(scan.record["source"]) for scan in (first, second)]
    command = ["--run", str(run), "--out", str(tmp_path), "--scan", str(files[0]), str(tmp_path / "bad_T1w.nii.gz")]
    assert evaluate([*command, "--scan", str(files[1])]) == 3
    captured = capsys.readouterr()
    assert "bad_T1w.nii.gz: is not gzip" in captured.err
    assert captured.out.count("no verdict at a false-alarm rate of 0.05") == 2
    assert captured.out.count("score") == 2
    with pytest.raises(DataError, match="is not gzip"):
        evaluate([*command[:4], "--scan", str(tmp_path / "bad_T1w.nii.gz")])
    with pytest.raises(DataError, match="no such file"):
        evaluate([*command[:4], "--scan", str(tmp_path / "none.nii.gz")])
    for wrong in (["--scan", "a.txt"], ["--scan", "a.nii", "b/a.nii"], ["--scan", "a.nii", "--brain-mask", "b", "c"]):
        with pytest.raises(SystemExit) as stop:
            evaluate([*command[:4], *wrong])
        assert stop.value.code == 2


def change(name: str, values: np.ndarray, image: nib.Nifti1Image) -> nib.Nifti1Image:
    """A scan unlike those that the model was trained on; values (X, Y, Z) in RAS, 0 outside the brain."""
    affine, brain = image.affine, values > 0
    if name == "contrast":
        values = np.where(brain, np.where(values > np.median(values[brain]), 1, 3), 0)  # white matter dark
    elif name == "upside down":
        values = values[:, :, ::-1]
    elif name == "thick":
        values, affine = values[:, :, ::2], affine @ np.diag([1, 1, 2, 1])
    elif name == "skull":
        values = np.where(ndimage.binary_dilation(brain, iterations=2), 0.8 * values.max(), 0)
        values = values + 5 * np.random.default_rng(0).random(values.shape)
    changed = nib.Nifti1Image(np.ascontiguousarray(values, dtype=np.float32), affine)
    if name == "axes":
        changed.set_sform(None, code=0)
        changed.set_qform(None, code=0)
    return changed


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", None),
        ("contrast", "standard deviations from healthy scans"),
        ("upside down", "like a healthy brain upside down"),
        ("thick", "mm are coarser than what the model was tried on"),
        ("skull", "with skull and scalp and the model was trained on scans without skull"),
        ("axes", "does not tell its orientation; RAS is taken on trust"),
    ],
)
def test_scans_unlike_the_training_are_said_to_be(name, words, run, processed, tmp_path, capsys):
    scan = next(iter(list_scans(processed / "test/normal")))
    files = find_files(scan)
    image, mask = (nib.as_closest_canonical(nib.load(files[i])) for i in (1, 3))
    values = np.where(mask.get_fdata() > 0, image.get_fdata(), 0)
    nib.save(change(name, values, image), tmp_path / "scan.nii.gz")
    command = ["--run", str(run), "--scan", str(tmp_path / "scan.nii.gz"), "--out", str(tmp_path)]
    if name == "axes":
        with pytest.raises(DataError, match="say with --axes"):
            evaluate(command)
        command += ["--axes", "RAS"]
    assert evaluate(command) == 0
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if "unlike what the model was trained on" in line]
    verdict = next(i for i, line in enumerate(lines) if "verdict" in line)
    if words is None:
        assert not said
    else:
        assert any(words in line for line in said), said
        assert lines.index(said[-1]) < verdict
