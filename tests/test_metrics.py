"""Metrics agree with scikit-learn, with values worked by hand and with what statistics books say."""

import json

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, roc_auc_score

from evaluation.metrics import (
    VoxelCounts,
    auroc,
    average_precision,
    best_dice,
    count_marked,
    count_voxels,
    counted_auroc,
    counted_average_precision,
    counted_dice,
    dice,
    draw_weights,
    list_lesions,
    mean,
    measure_detectability,
    name_volume,
    rate,
    tabulate,
)


def count(scores, lesion) -> dict:
    return json.loads(json.dumps(count_voxels(np.array(scores, dtype=np.float32), np.array(lesion, dtype=bool))))


def make_counts(scores, lesion) -> VoxelCounts:
    counts = VoxelCounts()
    counts.add("a", count(scores, lesion))
    return counts


def test_metrics_against_scikit_learn():
    rng = np.random.default_rng(0)
    labels, scores = rng.random(200) < 0.3, rng.integers(0, 50, 200)
    assert auroc(labels, scores, np.arange(200))["value"] == roc_auc_score(labels, scores)
    assert average_precision(labels, scores, np.arange(200))["value"] == average_precision_score(labels, scores)


def test_auroc_by_hand():
    # of the 2 x 3 pairs (abnormal, normal) five are the right way round
    figure = auroc([True, True, False, False, False], [0.9, 0.4, 0.5, 0.2, 0.1], list("abcde"))
    assert figure["value"] == pytest.approx(5 / 6)


def test_resampled_metrics_count_as_scikit_learn_weighs():
    rng = np.random.default_rng(1)
    labels, scores, subjects = rng.random(300) < 0.4, rng.integers(0, 40, 300) / 40, rng.integers(0, 7, 300)
    weights = draw_weights(7, 3, np.random.default_rng(2))
    counts = (weights @ tabulate(labels, scores, subjects)).reshape(3, 2, -1)
    for metric, counted in ((roc_auc_score, counted_auroc), (average_precision_score, counted_average_precision)):
        wanted = [metric(labels, scores, sample_weight=w[subjects]) for w in weights]
        np.testing.assert_allclose(counted(counts), wanted, rtol=1e-9)


def test_a_table_counts_by_subject_label_and_falling_score():
    table = tabulate([True, False, True, True], [2, 3, 2, 1], ["b", "a", "b", "a"])
    np.testing.assert_array_equal(table.toarray(), [[1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 2, 0]])


def test_an_interval_of_very_many_scores_is_that_of_steps_of_them(monkeypatch):
    """The value stays that of the scores; the interval of 3,000 scores in 300 steps is nearly the same."""
    rng = np.random.default_rng(0)
    labels, subjects = rng.random(3000) < 0.3, rng.integers(0, 20, 3000)
    scores = rng.normal(size=3000) + 0.8 * labels
    exact = [figure(labels, scores, subjects) for figure in (auroc, average_precision)]
    monkeypatch.setattr("evaluation.metrics.MOST_STEPS", 300)
    assert tabulate(labels, scores, subjects).shape == (20, 600)
    for wanted, figure in zip(exact, (auroc, average_precision), strict=True):
        stepped = figure(labels, scores, subjects)
        assert stepped["value"] == wanted["value"]
        assert stepped == pytest.approx(wanted, abs=5e-3)


def test_a_table_of_many_subjects_is_sparse():
    """2,000 subjects of 50 slices: dense it would have 320 million cells."""
    whose = np.repeat(np.arange(2000), 50)
    table = tabulate(whose % 2, np.random.default_rng(0).random(100_000), whose)
    assert table.sum() == 100_000
    assert table.nnz <= 100_000


def test_the_highest_score_may_be_missing_from_a_resample():
    counts = np.array([[0, 0, 1], [0, 1, 0]])
    assert counted_average_precision(counts) == 1
    np.testing.assert_allclose(counted_dice(counts), [0, 1, 2 / 3])


def test_two_thousand_resamples_draw_subjects_with_replacement():
    weights = draw_weights(50, 2000, np.random.default_rng(0))
    assert weights.shape == (2000, 50)
    assert (weights.sum(axis=1) == 50).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(50), abs=0.1)
    assert weights.var() == pytest.approx(1 - 1 / 50, abs=0.02)


def test_the_interval_of_a_mean_is_that_of_the_books():
    values = np.random.default_rng(0).normal(size=400)
    figure = mean(values, np.arange(400))
    reach = 1.96 * values.std() / np.sqrt(400)
    assert figure["value"] == pytest.approx(values.mean())
    assert figure["low"] == pytest.approx(values.mean() - reach, abs=0.08 * reach)
    assert figure["high"] == pytest.approx(values.mean() + reach, abs=0.08 * reach)


def test_intervals_are_percentiles_over_subjects():
    rng = np.random.default_rng(3)
    labels, scores, subjects = rng.random(60) < 0.5, rng.random(60), np.repeat(np.arange(6), 10)
    weights = draw_weights(6, 2000, np.random.default_rng(0))
    resampled = counted_auroc((weights @ tabulate(labels, scores, subjects)).reshape(2000, 2, -1))
    figure = auroc(labels, scores, subjects)
    np.testing.assert_allclose([figure["low"], figure["high"]], np.percentile(resampled, (2.5, 97.5)))


def test_slices_of_one_subject_stay_together():
    labels = np.tile([True, False], 20)
    whose = np.repeat(np.arange(4), 10)
    scores = np.where(whose < 3, labels, ~labels).astype(float)  # all right in three subjects, all wrong in one
    by_slice, by_subject = auroc(labels, scores, np.arange(40)), auroc(labels, scores, whose)
    assert by_subject["high"] - by_subject["low"] > by_slice["high"] - by_slice["low"]
    assert mean([1, 0], ["a", "a"]) == {"value": 0.5, "low": 0.5, "high": 0.5}, "one subject has no interval"


def test_resamples_without_both_labels_are_left_out():
    # half of the resamples draw one of the two subjects twice
    assert auroc([True, False], [2, 1], ["a", "b"]) == {"value": 1, "low": 1, "high": 1}
    assert average_precision([True, False], [2, 1], ["a", "b"]) == {"value": 1, "low": 1, "high": 1}


def test_a_rate_has_its_exact_interval():
    assert rate([False, False]) == {"flagged": 0, "scans": 2, "low": 0, "high": pytest.approx(1 - 0.025**0.5)}
    assert rate([True] * 10)["low"] == pytest.approx(0.025**0.1)
    three = rate([True] * 3 + [False] * 7)
    assert (three["flagged"], three["scans"]) == (3, 10)
    assert (three["low"], three["high"]) == (pytest.approx(0.0667, abs=1e-4), pytest.approx(0.6525, abs=1e-4))


def test_voxel_metrics_against_scikit_learn():
    rng = np.random.default_rng(0)
    counts, all_scores, all_lesions = VoxelCounts(), [], []
    for subject in ("a", "b", "c", "a"):
        lesion = rng.random(3000) < 0.05
        scores = np.exp(rng.normal(size=3000) + 1.5 * lesion).astype(np.float32)
        counts.add(subject, count(scores, lesion))
        all_scores.append(scores)
        all_lesions.append(lesion)
    scores, lesion = np.concatenate(all_scores), np.concatenate(all_lesions)
    figures = counts.figures()
    assert figures["voxel_ap"]["value"] == pytest.approx(average_precision_score(lesion, scores), abs=2e-3)
    dice = {t: 2 * (lesion & (scores >= t)).sum() / ((scores >= t).sum() + lesion.sum()) for t in scores}
    assert figures["best_dice"]["value"] == pytest.approx(max(dice.values()), abs=2e-3)
    assert dice[min(dice, key=lambda t: abs(t - figures["best_dice_threshold"]))] == pytest.approx(
        max(dice.values()), abs=5e-3
    )
    assert figures["prevalence"] == pytest.approx(lesion.mean())
    assert figures["voxel_ap"]["low"] < figures["voxel_ap"]["value"] < figures["voxel_ap"]["high"]


def test_voxel_metrics_by_hand():
    counts = make_counts([8, 4, 4, 2, 1, 1], [1, 1, 0, 0, 1, 0])
    thresholds, dice = counts.dice_curve()
    assert thresholds.tolist() == [8, 4, 2, 1]
    np.testing.assert_allclose(dice, [2 / 4, 4 / 6, 4 / 7, 6 / 9])
    assert best_dice(counts.table()[1].sum(axis=0).reshape(2, -1)) == pytest.approx(4 / 6)
    figures = counts.figures()
    assert figures["best_dice_threshold"] == 4, "the highest of equals"
    assert figures["prevalence"] == 0.5


def test_a_score_of_a_voxel_is_known_to_four_thousandths():
    scores = np.linspace(1, 2, 10001)[:-1]
    thresholds, _ = make_counts(scores, np.zeros(len(scores))).dice_curve()
    assert len(thresholds) == 256
    np.testing.assert_allclose(thresholds, np.arange(256)[::-1] / 256 + 1), "each the lower end of its bin"
    assert make_counts([-1, 0], [1, 0]).dice_curve()[0].tolist() == [0], "no score is below 0"


def test_voxels_are_counted_by_subject():
    counts = make_counts([2, 1], [1, 0])
    counts.add("b", count([2], [1]))
    counts.add("a", count([2, 2, 4], [1, 0, 1]))
    thresholds, table = counts.table()
    assert thresholds.tolist() == [4, 2, 1]
    np.testing.assert_array_equal(table.toarray(), [[0, 1, 1, 1, 2, 0], [0, 0, 0, 0, 1, 0]])
    assert counts.hold_lesions()
    assert not make_counts([1, 2], [0, 0]).hold_lesions()


def test_the_interval_of_dice_is_over_subjects():
    # all of one's lesion is marked, none of the other's; a third scan is the first subject's and has no lesion
    scans = (([1], [1]), ([0], [1]), ([0, 1], [0, 0]))  # marked, lesion
    marked = [count_marked(*(np.array(part, bool) for part in scan)) for scan in scans]
    assert marked == [[1, 1, 1], [0, 0, 1], [0, 1, 0]]
    assert dice(marked, ["a", "b", "a"]) == {"value": 2 / 4, "low": 0, "high": pytest.approx(2 / 3)}
    assert dice([[0, 0, 0]], ["a"])["value"] == 0


def test_dice_by_hand():
    # bins by falling score: 1 lesion voxel, then 1 of each, then 2 outside
    np.testing.assert_allclose(counted_dice(np.array([[0, 1, 2], [1, 1, 0]])), [2 / 3, 4 / 5, 4 / 7])  # fmt: skip


def test_lesions_by_hand():
    lesion = np.zeros((6, 20, 20), dtype=bool)
    lesion[1:3, 2:7, 2:7] = True  # 50 pixels, half of them flagged below
    lesion[1, 8, 2] = True  # a pixel away: the same lesion
    lesion[4:6, 15:18, 15:18] = True  # 18 pixels, one flagged: not found
    lesion[0, 19, 19] = True  # 0.004 ml: none
    anomaly = np.ones(lesion.shape, dtype=np.float32)
    anomaly[1, 2:7, 2:7] = 5
    anomaly[1, 3, 3] = 7
    anomaly[1, 2:7, 7:9] = 5  # 10 more of the same region
    anomaly[0, 2:4, 9] = 5  # touches that region over an edge only: another one
    anomaly[4, 15, 15] = 5
    anomaly[5, 0:3, 15:18] = 5  # a region that touches no lesion
    first, second = list_lesions(lesion, anomaly, anomaly >= 5, (1.0, 2.0))
    assert (first["lesion"], second["lesion"]) == (1, 2)
    assert first["volume_ml"] == pytest.approx(51 * 4 / 1000)
    assert first["covered"] == pytest.approx(25 / 51)
    assert first["found"] is True
    assert first["dice"] == pytest.approx(2 * 25 / (51 + 35))
    assert (first["peak"], second["peak"]) == (7, 5)
    assert second["found"] is False
    assert (second["dice"], second["covered"]) == (pytest.approx(2 / 19), pytest.approx(1 / 18))


def test_all_regions_that_touch_a_lesion_count_in_its_dice():
    lesion = np.zeros((1, 12, 40), dtype=bool)
    lesion[0, 4:8, 4:34] = True
    anomaly = lesion * 2.0
    anomaly[0, :, 10:20] = 9
    anomaly[0, 4:8, 30:36] = 9
    anomaly[0, 0, 38] = 9
    (found,) = list_lesions(lesion, anomaly, anomaly >= 9, (2.0, 2.0))
    assert found["covered"] == pytest.approx((40 + 16) / 120)
    assert found["dice"] == pytest.approx(2 * 56 / (120 + 120 + 24))


@pytest.mark.parametrize(("between", "count"), [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("steps", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
def test_parts_with_two_pixels_between_them_are_one_lesion(between, count, steps):
    lesion = np.zeros((16, 16, 16), dtype=bool)
    lesion[2:5, 2:5, 2:5] = True
    start = [2 + step * (3 + between) for step in steps]
    lesion[tuple(slice(i, i + 3) for i in start)] = True
    assert len(list_lesions(lesion, np.ones(lesion.shape), ~lesion, (3.0, 3.0))) == count


def test_a_tenth_of_a_lesion_makes_it_found():
    lesion, anomaly = np.zeros((1, 10, 10), dtype=bool), np.ones((1, 10, 10))
    lesion[0, 2:6, 2:7] = True  # 20 pixels
    for flagged, found in ((1, False), (2, True)):
        anomaly[0, 2, 2 : 2 + flagged] = 5
        assert [one["found"] for one in list_lesions(lesion, anomaly, anomaly >= 5, (3.0, 3.0))] == [found]


def test_the_smallest_lesion_has_a_twentieth_of_a_millilitre():
    lesion = np.zeros((1, 12, 12), dtype=bool)
    lesion[0, 1, 1:4] = lesion[0, 8, 1:5] = True  # three and four pixels of 0.0125 ml
    (found,) = list_lesions(lesion, np.ones(lesion.shape), ~lesion, (2.0, 2.5))
    assert (found["lesion"], found["volume_ml"]) == (1, pytest.approx(0.05))


def test_what_was_not_scored_is_no_part_of_a_lesion():
    lesion, anomaly = np.ones((1, 4, 4), dtype=bool), np.full((1, 4, 4), 9.0)
    anomaly[0, 2:] = np.nan
    (found,) = list_lesions(lesion, anomaly, anomaly >= 5, (4.0, 4.0))
    assert (found["volume_ml"], found["covered"], found["dice"]) == (pytest.approx(8 * 0.064), 1, 1)


def test_a_volume_falls_into_its_bin():
    volumes = {
        0.29: "under 0.3 ml",
        0.3: "0.3–1 ml",
        0.99: "0.3–1 ml",
        1.0: "1–3 ml",
        2.9: "1–3 ml",
        3.0: "3–10 ml",
        9.9: "3–10 ml",
        10.0: "10 ml and more",
    }
    assert {volume: name_volume({"volume_ml": volume}) for volume in volumes} == volumes


def test_detectability_counts_what_stands_behind_it():
    rows = [
        {"label": label, "scan": scan, "subject": subject, "volume_ml": ml, "found": found, "dice": dice}
        for label, scan, subject, ml, found, dice in (
            ("abnormal", "a1", "a", 0.5, True, 0.5),
            ("abnormal", "a2", "a", 0.7, False, 0.0),
            ("abnormal", "b1", "b", 0.31, False, 0.1),
            ("abnormal", "b1", "b", 20, True, 1),
        )
    ]
    small, large = measure_detectability(rows, name_volume, ["0.3–1 ml", "1–3 ml", "10 ml and more"])
    assert (small["group"], small["lesions"], small["scans"], small["subjects"]) == ("0.3–1 ml", 3, 3, 2)
    assert small["recall"]["value"] == pytest.approx(1 / 3)
    exact = binomtest(1, 3).proportion_ci(method="exact")
    assert (small["recall"]["low"], small["recall"]["high"]) == (exact.low, exact.high)
    assert small["dice"]["value"] == pytest.approx(0.2)
    assert (large["group"], large["recall"]["value"], large["dice"]["value"]) == ("10 ml and more", 1, 1)
    assert large["recall"]["low"] == pytest.approx(0.025), "one of one says little"
    assert (small["not_scored"], large["not_scored"]) == (0, 0)
    unscored = [{"volume_ml": 0.4}, {"volume_ml": 5}, {"volume_ml": 0.4}]
    groups = measure_detectability(rows, name_volume, ["0.3–1 ml", "3–10 ml"], unscored)
    assert [(group["lesions"], group["not_scored"]) for group in groups] == [(3, 2), (0, 1)]
    assert groups[1]["recall"] is groups[1]["dice"] is None, "nothing of this size was scored"
