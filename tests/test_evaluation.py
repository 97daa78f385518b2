"""Figures agree with scikit-learn and with values worked by hand; an evaluation folder is complete."""

import csv
import json
import shutil

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from evaluation.evaluate import main as evaluate
from evaluation.metrics import (
    VoxelCounts,
    auroc,
    average_precision,
    counted_auroc,
    counted_average_precision,
    counted_dice,
    draw_weights,
    tabulate,
)
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
    assert regions
    for region in regions:
        anomaly = nib.load(out / "maps" / region["label"] / f"{region['scan']}_anomaly.nii.gz")
        assert float(region["peak"]) <= np.nanmax(anomaly.get_fdata()) * 1.001
        assert float(region["mean"]) >= content["calibration"]["voxel_threshold"] * 0.999


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
