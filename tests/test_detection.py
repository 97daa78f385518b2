"""The benchmark of detection: what it counts, who calibrates whom, and that it ends with a line of figures."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from benchmarks import detection
from benchmarks.detection import Tally, pair_halves, shrink_brain
from benchmarks.gallery import Gallery
from benchmarks.lesions import VOLUME_ML
from common.cli import DataError
from preprocessing.store import list_scans
from tests.predictions import make_prediction, mark


def make_random(seed: int, abnormal: bool):
    """A prediction of a disc with random anomalies and scores; in an abnormal one, two slices hold 24 lesion voxels."""
    rng, whole = np.random.default_rng(seed), make_prediction()
    scan = whole.scan if abnormal else replace(whole.scan, label="normal", lesion=None)
    anomaly = np.where(np.isfinite(whole.anomaly), rng.gamma(2, size=whole.anomaly.shape), np.nan)
    if abnormal:
        anomaly = anomaly + 2 * scan.lesion
        anomaly[4, 41, 22] = 60
    voxels = scan.lesion.sum(axis=(1, 2)) if abnormal else np.zeros(10, int)
    rows = [{"score": rng.normal() + (n > 0), "lesion_voxels": int(n)} for n in voxels]
    row = {"score": rng.normal() + abnormal, "p_value": (seed % 4 + 1) / 20}
    scan = replace(scan, subject=str(seed))
    return replace(whole, scan=scan, maps={"score": anomaly.astype(np.float32)}, slice_rows=rows, scan_row=row)


def test_figures_by_scikit_learn():
    predictions = [make_random(seed, abnormal=seed % 2 == 0) for seed in range(6)]
    tally = Tally({})
    for prediction in predictions:
        tally.add(prediction)
    figures = tally.measure()
    pairs = []
    for one in predictions:
        inside = np.isfinite(one.anomaly)
        lesion = np.zeros(inside.shape, bool) if one.scan.lesion is None else one.scan.lesion
        pairs.append((lesion[inside], one.anomaly[inside]))
    lesion, anomaly = (np.concatenate(part) for part in zip(*pairs, strict=True))
    assert figures["voxel_ap"] == pytest.approx(average_precision_score(lesion, anomaly), rel=0.02)
    assert figures["scan_ap"] == pytest.approx(np.mean([average_precision_score(*pairs[i]) for i in (0, 2, 4)]))
    marked = np.concatenate([mark(one.anomaly, 4)[np.isfinite(one.anomaly)] for one in predictions])
    assert figures["dice"] == pytest.approx(2 * (marked & lesion).sum() / (marked.sum() + lesion.sum()))
    steps = np.linspace(0, 60, 2000)
    dice = [2 * ((anomaly >= t) & lesion).sum() / ((anomaly >= t).sum() + lesion.sum()) for t in steps]
    assert figures["best_dice"] == pytest.approx(max(dice), rel=0.03)
    holds = [(one.scan.label == "abnormal", one.scan_row["score"]) for one in predictions]
    assert figures["scan_auroc"] == pytest.approx(roc_auc_score(*zip(*holds, strict=True)))
    rows = [
        (row["lesion_voxels"] > 0, row["score"])
        for one in predictions
        for row in one.slice_rows
        if row["lesion_voxels"] > 0 or one.scan.label == "normal"
    ]
    assert len(rows) == 3 * 2 + 3 * 10, "slices of abnormal scans without a lesion are neither"
    assert figures["slice_auroc"] == pytest.approx(roc_auc_score(*zip(*rows, strict=True)))


def test_false_positives_are_those_of_normal_scans():
    """The p-values of seeds 1, 3, 5 are 0.1, 0.2, 0.1; an abnormal scan does not count."""
    tally = Tally({})
    for seed in (1, 3, 5):
        tally.add(make_random(seed, abnormal=False))
    tally.add(make_random(0, abnormal=True))
    assert [tally.count_false_positives(rate)["flagged"] for rate in (0.05, 0.1, 0.2)] == [0, 2, 3]
    count = tally.count_false_positives(0.05)
    assert count["scans"] == 3
    assert count["high"] == pytest.approx(1 - 0.025 ** (1 / 3)), "none of three, exactly"


def test_what_cannot_be_taken_is_left_out():
    tally = Tally({})
    tally.add(make_random(1, abnormal=False))
    assert tally.measure() == {}
    assert Tally({}).count_false_positives(0.05) is None


def test_no_subject_calibrates_for_itself(processed, tmp_path):
    for scan in list_scans(processed / "train"):
        for name in (scan.name, f"{scan.name}_again"):
            shutil.copytree(scan.folder, tmp_path / "train/normal" / name)
    scans = list(list_scans(tmp_path / "train"))
    parts = pair_halves(scans, copies=1)
    assert sum(len(part.scans) for part in parts) == 12
    for part in parts:
        assert not {scan.subject for scan in part.scans} & {scan.subject for scan in part.healthy}
        normal = [scan for scan in part.scans if scan.label == "normal"]
        assert len(part.scans) == 2 * len(normal)
    assert {scan.name for part in parts for scan in part.healthy} == {scan.name for scan in scans}


def test_the_script_ends_with_a_line_of_figures(untrained, processed, tmp_path, capsys):
    shutil.copytree(processed / "val", tmp_path / "sets/home/val")
    shutil.copytree(processed / "test/abnormal", tmp_path / "sets/real/test/abnormal")
    shutil.copytree(processed / "test/masks", tmp_path / "sets/real/test/masks")
    command = [str(untrained), "--sets", str(tmp_path / "sets"), "--copies", "1", "--steps", "2", "--shrunk"]
    assert detection.main([*command, "--pictures", str(tmp_path / "pictures")]) == 0
    lines = capsys.readouterr().out.splitlines()
    (table,) = json.loads(lines[-1]).values()
    assert list(table) == [
        *(f"home dev, {how}" for how in ("own", "anew", "adapted")),
        *("real test, own", "home dev shrunk, own", "real test shrunk, own"),
    ]
    assert len(lines) == 8
    assert table["real test, own"]["voxel_ap"] != table["real test shrunk, own"]["voxel_ap"]
    home = table["home dev, anew"]
    assert set(detection.FIGURES) <= set(home)
    assert home["false_positives_0.1"]["scans"] == 2
    assert len({table[f"home dev, {how}"]["voxel_ap"] for how in ("own", "anew", "adapted")}) == 3
    assert sum(group["lesions"] for group in home["by_kind"]) == sum(group["lesions"] for group in home["by_volume"])
    assert {group["group"] for group in home["by_kind"]} <= set(VOLUME_ML)
    page = (tmp_path / "pictures/index.html").read_text()
    pictures = sorted(path.name for path in (tmp_path / "pictures").glob("*.png"))
    assert {f"false_positive_{number}.png" for number in range(1, 7)} < set(pictures)
    assert all(f'src="{name}"' in page for name in pictures)
    assert table["real test, own"]["false_positives_0.1"] is None


def test_the_tests_are_looked_at_when_asked(processed, tmp_path):
    (tmp_path / "home").symlink_to(processed)
    names = {test: [name for name, _ in detection.read_sets(tmp_path, 1, test)] for test in (False, True)}
    assert names == {False: ["home dev"], True: ["home dev", "home test"]}


def test_a_missing_folder_is_one_line(untrained):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        detection.main([str(untrained), "--sets", "nowhere"])


def test_the_gallery_keeps_the_worst_and_says_what_they_are(tmp_path):
    gallery, made = Gallery(count=2), make_prediction()
    for score in (3.0, 9.0, 5.0):
        scan = replace(made.scan, label="normal", lesion=None, name=f"healthy {score:g}")
        gallery.add("abroad", replace(made, scan=scan, scan_row=made.scan_row | {"score": score}))
    for name, threshold in (("found", 4.0), ("missed", 99.0)):
        gallery.add("abroad", replace(made, scan=replace(made.scan, name=name), threshold=threshold))
    gallery.write(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert page.index("healthy 9") < page.index("healthy 5") < page.index("missed,") < page.index(" found,")
    assert "healthy 3" not in page
    assert "0% found" in page
    assert "100% found" in page
    assert "0.30 brighter than its reconstruction" in page
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_a_shrunk_brain_has_lost_a_pixel_of_its_rim_and_nothing_else():
    scan = make_prediction().scan
    shrunk = shrink_brain(scan)
    brain = ndimage.binary_erosion(scan.stack > 0, np.ones((1, 3, 3)))
    np.testing.assert_array_equal(shrunk.stack, np.where(brain, scan.stack, 0))
    np.testing.assert_array_equal(shrunk.lesion, scan.lesion & brain)
    assert shrink_brain(replace(scan, lesion=None)).lesion is None
