"""What is kept of a test set and measured on it: which slices count, who is flagged, what stands behind each figure."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from common.cli import DataError
from evaluation.metrics import count_voxels
from evaluation.predictor import DETECTORS
from evaluation.results import Results, ScanResult
from tests.predictions import make_prediction

KNOWN = {"without_lesion_mask": 0, "unlike_calibration": 0}


def make_results(kinds: dict | None = None) -> Results:
    return Results(kinds or {})


def make_slice(label: str, scan: str, lesion_voxels: int, score: float) -> dict:
    scores = dict.fromkeys(DETECTORS, score) | {"mse": -score}
    return {"label": label, "scan": scan, "subject": scan[0], "lesion_voxels": lesion_voxels, **scores}


def make_scan_row(label: str, scan: str, score: float, lesion_known: bool = True, **more) -> dict:
    scores = dict.fromkeys(DETECTORS, score) | {"mse": -score}
    who = {"label": label, "scan": scan, "subject": scan[0], "lesion_known": lesion_known, "age": None, "sex": None}
    return who | {"flagged": False} | scores | more


def add_prediction(results: Results, name="one_T1w", label="abnormal", lesion=True, **changes) -> Results:
    made = make_prediction(lesion=lesion)
    scan = replace(made.scan, name=name, label=label, **changes)
    row = make_scan_row(label, name, 5.0, lesion_known=lesion, subject=scan.subject)
    made = replace(
        made,
        scan=scan,
        maps=dict.fromkeys(DETECTORS, made.maps["score"]),
        slice_rows=[make_slice(label, name, 24, 5.0)],
        scan_row=row,
        regions=[{"volume_ml": 1.0, "peak_x_mm": 40.0, "peak_y_mm": 40.0, "peak_z_mm": 110.0}],
    )
    results.add(ScanResult.of(made))
    return results


def test_a_prediction_is_kept_as_rows_and_counts():
    results = add_prediction(make_results({"one": "infarct"}), subject="s")
    (row,), (region,), (lesion,) = results.scans, results.regions, results.lesions
    assert (row["scan"], row["score"]) == ("one_T1w", 5.0)
    assert (region["label"], region["scan"], region["volume_ml"]) == ("abnormal", "one_T1w", 1.0)
    assert (region["number"], region["slice"]) == (1, 55)
    assert {key: lesion[key] for key in ("label", "scan", "subject", "kind")} == {
        "label": "abnormal",
        "scan": "one_T1w",
        "subject": "s",
        "kind": "infarct",
    }
    assert lesion["volume_ml"] == pytest.approx(48 * 8 / 1000)
    assert (lesion["covered"], lesion["dice"], lesion["peak"]) == (1, 1, 8)
    assert results.marked == [([48, 48, 48], "s")]
    brain, lesion_pixels = int(np.isfinite(make_prediction().maps["score"]).sum()), 48
    for name in DETECTORS:
        thresholds, table = results.voxels[name].table()
        assert thresholds.tolist() == [8, 1]
        np.testing.assert_array_equal(table.toarray(), [[0, brain - lesion_pixels, lesion_pixels, 0]])
    assert results.count() == {"normal": 0, "abnormal": 1, "slices": 1, "subjects": 1, "lesions": 1} | KNOWN


def test_what_is_kept_of_a_scan_is_the_same_after_it_lay_on_disk(tmp_path):
    made = make_prediction()
    made = replace(made, maps=dict.fromkeys(DETECTORS, made.maps["score"]), misfit=2.0)
    kept = ScanResult.of(made, viewer_bytes=7)
    kept.save(tmp_path / "scan.json")
    assert ScanResult.read(tmp_path / "scan.json") == kept
    (tmp_path / "scan.json").write_text('{"older": 1}')
    with pytest.raises(DataError, match=r"scan\.json: is not a result of this version; delete it"):
        ScanResult.read(tmp_path / "scan.json")


def test_the_kind_of_a_lesion_goes_by_the_name_with_and_without_the_contrast():
    kinds = [add_prediction(make_results(k)).lesions[0]["kind"] for k in ({"one_T1w": "a"}, {"one": "b"}, {"two": "c"})]
    assert kinds == ["a", "b", None]


def test_a_scan_without_a_lesion_mask_counts_no_voxels():
    results = add_prediction(make_results(), lesion=False)
    assert results.lesions == []
    assert not results.voxels["score"].hold_lesions()
    assert len(results.scans) == len(results.slices) == len(results.regions) == 1


def test_results_are_counted():
    results = add_prediction(make_results(), "a_T1w", subject="a")
    add_prediction(results, "b_T1w", "normal", subject="b")
    add_prediction(results, "c_T1w", "normal", subject="b")
    assert results.count() == {"normal": 2, "abnormal": 1, "slices": 3, "subjects": 2, "lesions": 3} | KNOWN
    assert results.voxels["mse"].table()[1].shape[0] == 2, "voxels are counted by subject"


def test_a_slice_with_ten_lesion_voxels_counts_as_abnormal():
    results = make_results()
    results.slices = [make_slice("abnormal", "a", voxels, 1) for voxels in (0, 9, 10, 11)]
    results.slices.append(make_slice("normal", "n", 0, 1))
    results.scans = [make_scan_row("abnormal", "a", 1), make_scan_row("normal", "n", 1)]
    assert [(row["label"], row["lesion_voxels"]) for row in results.list_counted_slices()] == [
        ("abnormal", 10),
        ("abnormal", 11),
        ("normal", 0),
    ]
    results.scans[0]["lesion_known"] = False
    assert results.list_counted_slices() == results.slices[-1:], "which of its slices are abnormal is not known"


def test_lesions_are_compared_with_what_is_marked():
    made = make_prediction()
    made.anomaly[4, 42, 22] = 160.0  # the lesion's others have 8, a twentieth, and the threshold is 4
    result = ScanResult.of(made)
    assert result.marked == [1, 1, 48]
    assert result.lesions[0]["covered"] == pytest.approx(1 / 48)


def make_measured(masks_known: bool = True) -> Results:
    """Six scans of five subjects with three slices each; the mask of the last is perhaps not known."""
    results, rng = make_results(), np.random.default_rng(0)
    for i in range(6):
        label = "abnormal" if i < 3 else "normal"
        name = f"{'aabcde'[i]}{i}"
        results.scans.append(make_scan_row(label, name, rng.random() + (i < 3) / 4, lesion_known=masks_known or i != 2))
        results.slices += [
            make_slice(label, name, voxels, rng.random()) for voxels in ((0, 20, 30) if i < 3 else (0,) * 3)
        ]
    scores = np.array([8, 4, 4, 2, 1, 1], np.float32)
    for counts in results.voxels.values():
        counts.add("a", count_voxels(scores, np.array([1, 1, 0, 0, 1, 0], bool)))
    results.marked = [([2, 3, 3], "a")]
    return results


def test_figures_are_those_of_scikit_learn_with_what_stands_behind_them():
    results = make_measured()
    figures = results.measure(quiet=True)
    assert list(figures) == list(DETECTORS)
    for level, rows in (("slice", results.list_counted_slices()), ("scan", results.scans)):
        labels = [row["label"] == "abnormal" for row in rows]
        for name in DETECTORS:
            scores = [row[name] for row in rows]
            assert figures[name][f"{level}_auroc"]["value"] == roc_auc_score(labels, scores)
            assert figures[name][f"{level}_ap"]["value"] == average_precision_score(labels, scores)
    slice_auroc, scan_auroc = figures["score"]["slice_auroc"], figures["score"]["scan_auroc"]
    assert (slice_auroc["subjects"], slice_auroc["scans"], slice_auroc["slices"]) == (5, 6, 15)
    assert (scan_auroc["subjects"], scan_auroc["scans"], "slices" in scan_auroc) == (5, 6, False)
    assert figures["score"]["dice"]["value"] == pytest.approx(4 / 6), "as marked"
    assert "dice" not in figures["mse"], "of which nothing is marked"
    voxel = figures["bright"]["voxel_ap"]
    assert {key: voxel[key] for key in ("subjects", "slices", "lesions", "scans")} == {
        "subjects": 5,
        "slices": 18,
        "lesions": 0,
        "scans": 6,
    }
    assert figures["score"]["prevalence"] == 0.5


def test_what_needs_both_labels_is_not_measured_without():
    results = make_measured()
    results.scans, results.slices = results.scans[3:], results.slices[9:]
    assert "scan_auroc" not in results.measure(quiet=True)["score"]
    results.voxels = {name: type(counts)() for name, counts in results.voxels.items()}
    assert results.measure(quiet=True) == {name: {} for name in DETECTORS}


def test_an_abnormal_scan_without_a_mask_takes_itself_out_and_nobody_else():
    """The third scan, b2: its three slices go; all figures are those of the other five scans, but for scan figures."""
    all_known, one_unknown = make_measured(), make_measured(masks_known=False)
    assert one_unknown.name_unknown() == ["b2"]
    assert one_unknown.count()["without_lesion_mask"] == 1
    figures = one_unknown.measure(quiet=True)["score"]
    assert figures["scan_auroc"]["value"] == all_known.measure(quiet=True)["score"]["scan_auroc"]["value"]
    without = make_measured()
    without.scans = [row for row in without.scans if row["scan"] != "b2"]
    without.slices = [row for row in without.slices if row["scan"] != "b2"]
    others = without.measure(quiet=True)["score"]
    for name in ("slice_auroc", "slice_ap", "voxel_ap", "dice", "best_dice"):
        assert figures[name] == others[name]
    assert (figures["voxel_ap"]["scans"], figures["voxel_ap"]["slices"], figures["slice_auroc"]["slices"]) == (
        5,
        15,
        13,
    )


def test_lesions_are_measured_by_volume_and_by_kind():
    results = make_results()
    for ml, kind, found in ((0.2, "b", False), (0.5, "a", True), (0.6, None, False)):
        results.lesions.append(
            {
                "label": "abnormal",
                "scan": "s",
                "subject": "s",
                "volume_ml": ml,
                "kind": kind,
                "found": found,
                "dice": 0.5,
            }
        )
    by = results.measure_lesions()
    assert [(group["group"], group["lesions"]) for group in by["volume"]] == [("under 0.3 ml", 1), ("0.3–1 ml", 2)]
    assert [(group["group"], group["recall"]["value"]) for group in by["kind"]] == [("a", 1), ("b", 0)]
    for row in results.lesions:
        row["kind"] = None
    assert list(results.measure_lesions()) == ["volume"]
    assert make_results().measure_lesions() == {}


def test_flags_are_counted_by_label_and_of_normal_scans_by_sex_and_age():
    results = make_results()
    people = (
        ("normal", True, 29.9, "F"),
        ("normal", False, 30, "M"),
        ("normal", True, 44.9, "F"),
        ("normal", False, 45, None),
        ("normal", True, 60, "F"),
        ("normal", True, 75, "F"),
        ("normal", True, None, None),
        ("abnormal", True, 80, "M"),
    )
    results.scans = [
        make_scan_row(label, f"s{i}", 1, flagged=flagged, age=age, sex=sex)
        for i, (label, flagged, age, sex) in enumerate(people)
    ]
    counts = results.count_flagged()
    assert [(g, c["flagged"], c["scans"]) for g, c in counts["normal_by_sex"].items()] == [("F", 4, 4), ("M", 0, 1)]
    assert {group: (count["flagged"], count["scans"]) for group, count in counts["normal_by_age"].items()} == {
        "under 30": (1, 1),
        "30 to 44": (1, 2),
        "45 to 59": (0, 1),
        "60 to 74": (1, 1),
        "75 and above": (1, 1),
    }
    assert (counts["normal"]["flagged"], counts["normal"]["scans"]) == (5, 7)
    assert (counts["abnormal"]["flagged"], counts["abnormal"]["scans"]) == (1, 1)
    for row in results.scans:
        row["age"] = row["sex"] = None
    assert set(results.count_flagged()) == {"normal", "abnormal"}
    results.scans = results.scans[:-1]
    assert set(results.count_flagged()) == {"normal"}


def test_a_scan_that_does_not_fit_the_calibration_is_counted_and_says_so():
    results, made = make_results(), make_prediction()
    for name, misfit in (("fits", None), ("not", 2.56)):
        scan = replace(made.scan, name=name, warnings=("low",))
        made = replace(made, scan=scan, misfit=misfit, scan_row=make_scan_row("abnormal", name, 5.0))
        results.add(ScanResult.of(made))
    assert results.count()["unlike_calibration"] == 1
    assert results.warnings["abnormal", "fits"] == ["low"]
    misfit = results.warnings["abnormal", "not"][1]
    assert "reconstructed 2.6 times as badly" in misfit
    assert "training/calibrate.py" in misfit


def test_what_lies_outside_the_scored_slices_is_known_and_its_lesions_are_missed():
    results = add_prediction(make_results(), "a_T1w", unscored_share=0.1, unscored_lesions_ml=(0.5, 0.04, 12.0))
    add_prediction(results, "b_T1w", "normal", unscored_share=0.06, lesion=False)
    assert results.describe_coverage() == {"unscored_share": 0.08, "scans": 2, "lesions": 2, "unrecorded": 0}
    by = results.measure_lesions()["volume"]
    assert [(group["group"], group["lesions"], group["not_scored"]) for group in by] == [
        ("0.3–1 ml", 1, 1),
        ("10 ml and more", 0, 1),
    ], "those under 0.05 ml count nowhere"
    old = add_prediction(make_results())
    assert old.describe_coverage() == {"unscored_share": None, "scans": 0, "lesions": 0, "unrecorded": 1}


def test_unlabelled_scans_are_counted_and_flagged_but_measure_nothing():
    results, labelled = make_measured(), make_measured()
    results.scans.append(make_scan_row("unlabelled", "u", 99.0, lesion_known=False, flagged=True))
    results.slices.append(make_slice("unlabelled", "u", 0, 99.0))
    assert results.measure(quiet=True) == labelled.measure(quiet=True)
    assert results.count()["unlabelled"] == 1
    assert results.name_unknown() == []
    assert results.count_flagged()["unlabelled"]["flagged"] == 1
