"""Figures show the numbers that they are given, with names on every axis."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import same_color
from scipy.stats import binom
from sklearn.metrics import precision_recall_curve, roc_curve

from evaluation.figures import (
    draw_ages,
    draw_calibration,
    draw_curves,
    draw_detectability,
    draw_dice,
    draw_histograms,
)

VERMILION, BLUE, GREEN = "#D55E00", "#0072B2", "#009E73"
METRIC = {"value": 0.5, "low": 0.41, "high": 0.62}


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def check_names(figure: plt.Figure) -> None:
    for axis in figure.axes:
        assert axis.get_xlabel(), axis.get_title()
        assert axis.get_ylabel(), axis.get_title()
        assert axis.get_legend(), axis.get_title()


def find_line(axis: plt.Axes, words: str):
    (line,) = [line for line in axis.lines if words in str(line.get_label())]
    return line


def read_legend(axis: plt.Axes) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_curves_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 3 == 0
    scores = {"anomaly map": rng.random(30) + labels, "plain": rng.random(30)}
    other = {"value": 0.7, "low": 0.6, "high": 0.8}
    figure = draw_curves(labels, scores, {"anomaly map": (METRIC, other), "plain": (other, METRIC)}, "scans")
    check_names(figure)
    left, right = figure.axes
    for name, values in scores.items():
        false_positive, true_positive, _ = roc_curve(labels, values)
        np.testing.assert_allclose(find_line(left, name).get_xydata(), np.c_[false_positive, true_positive])
        precision, recall, _ = precision_recall_curve(labels, values)
        np.testing.assert_allclose(find_line(right, name).get_xydata(), np.c_[recall, precision])
        assert find_line(right, name).get_drawstyle() == "steps-post"
    assert read_legend(left)[0] == "anomaly map, 0.50 (0.41–0.62)"
    assert read_legend(right)[0] == "anomaly map, 0.70 (0.60–0.80)"
    np.testing.assert_allclose(find_line(left, "chance").get_xydata(), [[0, 0], [1, 1]])
    assert set(find_line(right, "prevalence, 0.33").get_ydata()) == {1 / 3}
    assert left.get_title() == "ROC\n10 abnormal, 20 normal scans"
    assert right.get_title() == "precision-recall\n10 abnormal, 20 normal scans"
    assert (left.get_xlabel(), left.get_ylabel()) == ("false positive rate", "true positive rate")
    assert (right.get_xlabel(), right.get_ylabel()) == ("recall", "precision")
    assert right.get_ylim() == (0, 1.02)
    lines = [find_line(left, name) for name in scores]
    assert not same_color(lines[0].get_color(), lines[1].get_color())
    assert lines[0].get_linestyle() != lines[1].get_linestyle(), "told apart without colours too"


def test_histograms_count_by_label():
    rows = [{"label": "normal", "score": s, "mse": 0.1 * s} for s in (1.0, 1.0, 2.0)]
    rows += [{"label": "abnormal", "score": 5.0, "mse": 0.5}]
    figure = draw_histograms(rows, {"score": "score of scans", "mse": "MSE"}, {"score": (3.5, "above: p ≤ 0.05")})
    check_names(figure)
    left, right = figure.axes
    assert read_legend(left) == ["normal (3)", "abnormal (1)", "above: p ≤ 0.05"]
    assert read_legend(right) == ["normal (3)", "abnormal (1)"]
    assert [axis.get_title() for axis in figure.axes] == ["score of scans", "MSE"]
    assert set(find_line(left, "above").get_xdata()) == {3.5}
    for patch, colour, (last, most) in zip(left.patches, (BLUE, VERMILION), ((2, 2), (5, 1)), strict=True):
        assert same_color(patch.get_edgecolor(), colour)
        x, y = patch.get_xy().T
        assert y.max() == most
        assert x[y > 0].min() <= last <= x[y > 0].max()


def test_histograms_have_finer_bins_the_more_rows_there_are():
    for count, bins in ((10, 11), (100, 20), (1000, 40)):
        rows = [{"label": "normal", "score": float(i)} for i in range(count)]
        (axis,) = draw_histograms(rows, {"score": "score"}, {}).axes
        assert len(np.unique(axis.patches[0].get_xy()[:, 0])) == bins + 1


def test_the_curve_of_dice_marks_the_calibrated_threshold_and_the_best():
    thresholds, dice = np.array([8.0, 6, 4, 2]), np.array([0.1, 0.4, 0.3, 0.2])
    figure = draw_dice(thresholds, dice, 4.0, 0.3, "2 lesions")
    check_names(figure)
    (axis,) = figure.axes
    np.testing.assert_allclose(axis.lines[0].get_xydata(), np.c_[thresholds, dice])
    assert set(find_line(axis, "calibrated on normal scans: 0.300").get_xdata()) == {4}
    np.testing.assert_allclose(find_line(axis, "best, an upper bound: 0.400").get_xydata(), [[6, 0.4]])
    assert axis.get_xlim() == (0, 16)
    assert axis.get_ylim()[0] == 0
    assert axis.get_title().endswith("2 lesions")


def test_detectability_shows_recall_and_dice_with_their_intervals():
    recall, dice = {"value": 0.8, "low": 0.5, "high": 1.0}, {"value": 0.3, "low": 0.2, "high": 0.6}
    groups = [{"group": group, "recall": recall, "dice": dice, "lesions": 4, "scans": 3} for group in ("a", "b")]
    figure = draw_detectability({"volume": groups, "kind": groups[:1]})
    check_names(figure)
    assert [axis.get_title() for axis in figure.axes] == ["lesions by volume", "lesions by kind"]
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a\n4 in 3", "b\n4 in 3"]
    assert read_legend(axis) == ["share found", "mean Dice"]
    for container, wanted, colour in zip(axis.containers, (recall, dice), (VERMILION, BLUE), strict=True):
        points, _, (bars,) = container.lines
        assert same_color(points.get_color(), colour)
        np.testing.assert_allclose(points.get_ydata(), wanted["value"])
        np.testing.assert_allclose(np.rint(points.get_xdata()), [0, 1])
        for segment in bars.get_segments():
            np.testing.assert_allclose(segment[:, 1], [wanted["low"], wanted["high"]])
    xs = [container.lines[0].get_xdata() for container in axis.containers]
    assert (xs[0] < xs[1]).all(), "beside each other"
    assert axis.get_xlim() == (-0.5, 1.5)
    assert axis.get_ylim() == (-0.03, 1.03)


def test_calibration_shows_how_often_p_is_at_most_alpha():
    p_values = {"scans": np.array([0.1, 0.5, 0.5, 1.0]), "slices": np.array([0.25, 1.0])}
    figure = draw_calibration(p_values, 0.05)
    check_names(figure)
    (axis,) = figure.axes
    line = find_line(axis, "4 normal scans")
    share = dict(zip(np.round(line.get_xdata(), 3), line.get_ydata(), strict=True))
    assert [share[alpha] for alpha in (0.0, 0.095, 0.1, 0.495, 0.5, 1.0)] == [0, 0, 0.25, 0.25, 0.75, 1]
    assert line.get_drawstyle() == "steps-post"
    assert find_line(axis, "2 normal slices").get_ydata()[-1] == 1
    assert set(find_line(axis, "asked: 0.05").get_xdata()) == {0.05}
    np.testing.assert_allclose(find_line(axis, "valid p-values").get_xydata(), [[0, 0], [1, 1]])
    band = axis.collections[0].get_paths()[0].vertices
    at = band[np.abs(band[:, 0] - 0.5) < 0.003][:, 1]
    assert {at.min(), at.max()} == {binom.ppf(q, 4, 0.5) / 4 for q in (0.025, 0.975)}
    assert axis.get_xlim() == axis.get_ylim() == (0, 1)


def test_ages_are_drawn_by_sex_where_they_are_known():
    people = ((20, 1.0, "F"), (30, 2.0, "F"), (40, 3.0, "M"), (None, 9.0, "M"), (50, 4.0, None))
    rows = [{"age": age, "score": score, "sex": sex} for age, score, sex in people]
    figure = draw_ages(rows, (2.5, "above: p ≤ 0.05"))
    check_names(figure)
    (axis,) = figure.axes
    assert read_legend(axis) == ["F (2)", "M (1)", "sex unknown (1)", "above: p ≤ 0.05"]
    np.testing.assert_allclose(find_line(axis, "F (2)").get_xydata(), [[20, 1], [30, 2]])
    np.testing.assert_allclose(find_line(axis, "M (1)").get_xydata(), [[40, 3]])
    assert set(find_line(axis, "above").get_ydata()) == {2.5}
    assert len({line.get_marker() for line in axis.lines[:3]}) == 3
    assert "above" not in str(read_legend(draw_ages(rows, None).axes[0]))
