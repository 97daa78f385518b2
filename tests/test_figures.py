"""Figures show the numbers that they are given, with names on every axis."""

import base64

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import same_color
from scipy.stats import binom
from sklearn.metrics import precision_recall_curve, roc_curve

from evaluation.figures import (
    STYLE,
    draw_ages,
    draw_calibration,
    draw_curves,
    draw_detectability,
    draw_dice,
    draw_figures,
    draw_scores,
)
from evaluation.predictor import DETECTORS
from evaluation.results import Results

VERMILION = "#D55E00"
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
    scores = {"score": rng.random(30) + labels, "mse": rng.random(30)}
    other = {"value": 0.7, "low": 0.6, "high": 0.8}
    figure = draw_curves(labels, scores, {"score": (METRIC, other), "mse": (other, METRIC)}, "scans")
    check_names(figure)
    left, right = figure.axes
    for name, values in scores.items():
        false_positive, true_positive, _ = roc_curve(labels, values)
        np.testing.assert_allclose(find_line(left, DETECTORS[name]).get_xydata(), np.c_[false_positive, true_positive])
        precision, recall, _ = precision_recall_curve(labels, values)
        np.testing.assert_allclose(find_line(right, DETECTORS[name]).get_xydata(), np.c_[recall, precision])
        assert find_line(right, DETECTORS[name]).get_drawstyle() == "steps-post"
    assert read_legend(left)[0] == "anomaly map of the model, 0.50 (0.41–0.62)"
    assert read_legend(right)[0] == "anomaly map of the model, 0.70 (0.60–0.80)"
    np.testing.assert_allclose(find_line(left, "chance").get_xydata(), [[0, 0], [1, 1]])
    assert set(find_line(right, "prevalence, 0.33").get_ydata()) == {1 / 3}
    assert left.get_title() == "ROC\n10 abnormal, 20 normal scans"
    assert right.get_title() == "precision-recall\n10 abnormal, 20 normal scans"
    assert (left.get_xlabel(), left.get_ylabel()) == ("false positive rate", "true positive rate")
    assert (right.get_xlabel(), right.get_ylabel()) == ("recall", "precision")
    assert right.get_ylim() == (0, 1.02)
    lines = [find_line(left, DETECTORS[name]) for name in scores]
    assert not same_color(lines[0].get_color(), lines[1].get_color())
    assert lines[0].get_linestyle() != lines[1].get_linestyle(), "told apart without colours too"


def test_curves_of_very_many_slices_are_thinned_and_stay_where_they_were():
    rng = np.random.default_rng(0)
    labels = rng.random(50_000) < 0.3
    scores = {"score": rng.normal(size=50_000) + labels}
    figure = draw_curves(labels, scores, {"score": (METRIC, METRIC)}, "slices")
    precision, recall, _ = precision_recall_curve(labels, scores["score"])
    for axis, (x, y) in zip(figure.axes, (roc_curve(labels, scores["score"])[:2], (recall, precision)), strict=True):
        drawn_x, drawn_y = find_line(axis, "anomaly map").get_data()
        assert len(drawn_x) <= 2000
        assert [drawn_x[0], drawn_x[-1]] == [x[0], x[-1]]
        rising = np.argsort(x, kind="stable")
        middle = (x > 0.05) & (x < 0.95)
        order = np.argsort(drawn_x, kind="stable")
        near = np.interp(x[middle], drawn_x[order], drawn_y[order])
        np.testing.assert_allclose(near, np.interp(x[middle], x[rising], y[rising]), atol=5e-3)


def test_every_score_is_a_point_in_the_strip_of_its_group():
    groups = {"healthy, validation": np.array([1.0, 2.0, 4.0]), "abnormal": np.array([3.0, 90.0])}
    figure = draw_scores(groups, "score of scans", (3.5, "above: p ≤ 0.05"))
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["healthy, validation (3)", "abnormal (2)"]
    strips = [line for line in axis.lines if line.get_marker() == "o"]
    for row, (strip, values) in enumerate(zip(strips, groups.values(), strict=True)):
        np.testing.assert_array_equal(strip.get_xdata(), values)
        assert np.abs(strip.get_ydata() - row).max() < 0.3, "within its strip"
    medians = [line.get_xdata()[0] for line in axis.lines if line not in strips and line.get_linestyle() == "-"]
    assert medians == [2, 46.5]
    assert set(find_line(axis, "above").get_xdata()) == {3.5}
    assert axis.get_xscale() == "log"
    assert axis.get_ylim()[0] > axis.get_ylim()[1], "the first on top"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["median", "above: p ≤ 0.05"]
    assert draw_scores({"normal": np.array([-1.0, 2.0])}, "score", None).axes[0].get_xscale() == "linear"


def test_figures_are_legible_at_the_width_of_a_column():
    metric = {"value": 0.5, "low": 0.4, "high": 0.6}
    groups = [{"group": "a", "recall": metric, "dice": metric, "lesions": 4, "scans": 3}]
    with plt.rc_context(STYLE):
        drawn = [
            draw_scores({"normal": np.array([1.0, 2.0])}, "score", None),
            draw_dice(np.array([8.0, 4]), np.array([0.1, 0.3]), 4.0, 0.3, "2 lesions"),
            draw_detectability({"volume": groups}),
            draw_calibration({"scans": np.array([0.1, 1.0]), "slices": np.array([0.25, 1.0])}, 0.05),
            draw_ages([{"age": 20, "score": 1.0, "sex": "F"}], None),
        ]
        for figure in drawn:
            assert figure.get_figwidth() == 3.5
            texts = [text for text in figure.findobj(plt.Text) if text.get_text()]
            assert min(text.get_fontsize() for text in texts) >= 7


def test_figures_are_left_as_pdf_and_shown_as_svg(tmp_path):
    results = Results({})
    results.scans = [
        {"label": label, "scan": str(i), "subject": str(i), "lesion_known": True, "flagged": False, "p_value": 0.5}
        | dict.fromkeys(DETECTORS, float(i + 1))
        for i, label in enumerate(("normal", "abnormal", "unlabelled"))
    ]
    results.slices = [row | {"lesion_voxels": 20} for row in results.scans]
    figures = {name: {f"{level}_{of}": METRIC for level in ("scan", "slice") for of in ("auroc", "ap")}
               for name in DETECTORS}  # fmt: skip
    content = {"settings": {"false_positive_rate": 0.05}, "figures": figures, "detectability": {}, "flagged": {}}
    content |= {"calibration": {"voxel_threshold": 4.0, "scan_score": 2.0, "slice_score": None}, "counts": {}}
    healthy = {"scan": np.array([1.0, 2.0]), "slice": np.array([1.0])}
    shown = draw_figures(tmp_path, results, content, healthy)
    files = {"curves_scans.pdf", "curves_slices.pdf", "scores_scans.pdf", "scores_slices.pdf", "calibration.pdf"}
    assert {path.name for path in tmp_path.iterdir()} == {file for file, _ in shown.values()} == files
    for file, source in shown.values():
        assert (tmp_path / file).read_bytes().startswith(b"%PDF")
        assert b"<svg" in base64.b64decode(source.removeprefix("data:image/svg+xml;base64,"))
    assert draw_figures(tmp_path, results, content, healthy) == shown, "the same again"


def test_the_curve_of_dice_marks_the_calibrated_threshold_and_the_best():
    thresholds, dice = np.array([8.0, 6, 4, 2]), np.array([0.1, 0.4, 0.3, 0.2])
    figure = draw_dice(thresholds, dice, 4.0, 0.3, "2 lesions")
    check_names(figure)
    (axis,) = figure.axes
    np.testing.assert_allclose(axis.lines[0].get_xydata(), np.c_[thresholds, dice])
    assert set(find_line(axis, "calibrated on normal scans").get_xdata()) == {4}
    np.testing.assert_allclose(find_line(axis, "best by the test labels: 0.400").get_xydata(), [[6, 0.4]])
    np.testing.assert_allclose(find_line(axis, "as marked: 0.300").get_xydata(), [[4, 0.3]])
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
    markers = [container.lines[0].get_marker() for container in axis.containers]
    assert len(set(markers)) == 2, "told apart by shape, since they are one detector's"
    for container, wanted in zip(axis.containers, (recall, dice), strict=True):
        points, _, (bars,) = container.lines
        assert same_color(points.get_color(), VERMILION)
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
    assert not any(line.get_rasterized() for line in axis.lines)
    many = draw_ages(rows * 600, None).axes[0]
    assert find_line(many, "F (1200)").get_rasterized(), "as a picture: 100,000 points would fill the page's memory"
