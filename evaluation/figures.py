"""The figures of an evaluation: curves, scores, detectability, calibration, age and sex.

They are drawn at the size of a column or of a page of a paper, a colour a detector throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import binom
from sklearn.metrics import precision_recall_curve, roc_curve

from common.files import write_atomically
from evaluation.pictures import embed_vectors, save_pdf
from evaluation.predictor import DETECTORS
from evaluation.results import Results
from evaluation.table import format_figure
from preprocessing.scans import LABELS

COLUMN, PAGE = 3.5, 7.0  # widths in inches
STYLE = {"font.size": 8, "axes.titlesize": 8, "legend.fontsize": 7, "legend.title_fontsize": 7, "lines.linewidth": 1.2,
         "pdf.fonttype": 42, "svg.hashsalt": "report"}  # fmt: skip
# Okabe and Ito's colours, which the colour-blind can tell apart; dashes for those who see none
DETECTOR_STYLES = {
    "score": {"color": "#D55E00", "linestyle": "-"},
    "mse": {"color": "#0072B2", "linestyle": "--"},
    "bright": {"color": "#009E73", "linestyle": "-."},
    "dark": {"color": "#CC79A7", "linestyle": ":"},
    "deviation": {"color": "#E69F00", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
}
OURS = DETECTOR_STYLES["score"]["color"]
VALIDATION = "healthy, validation"
SEX_MARKERS = {"F": "o", "M": "s", None: "D"}
MOST_VECTORS = 500  # points of a strip; more are drawn as a picture
MOST_STEPS = 2000  # of a curve, which is some 200 points long on paper


def draw_curves(
    labels: np.ndarray, scores: dict[str, np.ndarray], figures: dict[str, tuple[dict, dict]], what: str
) -> plt.Figure:
    """ROC and precision-recall curves of several detectors' scores, (n,) each, over the same labels (n,) bool.

    figures: (AUROC, average precision) of each, with its interval, for the legend.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 4.9))
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.36, top=0.92, wspace=0.2)
    for name, values in scores.items():
        false_positive, true_positive, _ = roc_curve(labels, values)
        precision, recall, _ = precision_recall_curve(labels, values)
        area, average = (format_figure(measured, digits=2) for measured in figures[name])
        left.plot(*_thin(false_positive, true_positive), label=f"{DETECTORS[name]}, {area}", **DETECTOR_STYLES[name])
        right.step(
            *_thin(recall, precision), where="post", label=f"{DETECTORS[name]}, {average}", **DETECTOR_STYLES[name]
        )
    left.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="chance, 0.5")
    share = float(np.mean(labels))
    right.axhline(share, color="0.6", linewidth=1, label=f"prevalence, {share:.2f}")
    counts = f"{int(labels.sum())} abnormal, {int((~labels).sum())} normal {what}"
    left.set(title=f"ROC\n{counts}", xlabel="false positive rate", ylabel="true positive rate")
    right.set(title=f"precision-recall\n{counts}", xlabel="recall", ylabel="precision", ylim=(0, 1.02))
    for axis, measured in ((left, "area"), (right, "average precision")):
        axis.set_box_aspect(1)
        axis.grid(alpha=0.3)
        title = f"{measured} (95 % interval over subjects)"
        axis.legend(frameon=False, title=title, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return figure


def _thin(*axes: np.ndarray) -> list[np.ndarray]:
    """At most MOST_STEPS of the points of a curve, evenly chosen, the first and the last among them."""
    count = len(axes[0])
    chosen = np.linspace(0, count - 1, min(count, MOST_STEPS)).round().astype(int)
    return [axis[chosen] for axis in axes]


def draw_scores(groups: dict[str, np.ndarray], name: str, mark: tuple[float, str] | None) -> plt.Figure:
    """Every score of each group, {what it is: (n,)}, as a strip of points with its median.

    name: of the axis; mark: (the score above which something is flagged, its name)
    """
    figure, axis = plt.subplots(figsize=(COLUMN, 1.1 + 0.35 * len(groups)), layout="constrained")
    rng = np.random.default_rng(0)
    for row, values in enumerate(groups.values()):
        heights = row + rng.uniform(-0.28, 0.28, len(values))
        style = {"markersize": 3 if len(values) < MOST_VECTORS else 1.5, "alpha": 0.6, "markeredgewidth": 0}
        axis.plot(values, heights, "o", color=OURS, rasterized=len(values) > MOST_VECTORS, **style)
        axis.plot([np.median(values)] * 2, [row - 0.35, row + 0.35], color="black", label="median" if not row else None)
    if mark:
        axis.axvline(mark[0], color="black", linestyle=":", label=mark[1])
    axis.set_yticks(range(len(groups)), [f"{what} ({len(values)})" for what, values in groups.items()])
    if min(values.min() for values in groups.values()) > 0:
        axis.set_xscale("log")
    axis.set_ylim(len(groups) - 0.5, -0.5)
    figure.supxlabel(name, fontsize="medium")  # the axis is narrower than its name
    axis.grid(alpha=0.3, axis="x")
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    return figure


def draw_dice(thresholds: np.ndarray, dice: np.ndarray, calibrated: float, reached: float, counts: str) -> plt.Figure:
    """Dice (bins,) of the anomaly map over its thresholds (bins,), with the calibrated one and what marking reaches."""
    figure, axis = plt.subplots(figsize=(COLUMN, 2.9), layout="constrained")
    axis.plot(thresholds, dice, color=OURS)
    best = int(dice.argmax())
    axis.axvline(calibrated, color="black", linestyle=":", label="calibrated on normal scans")
    axis.plot(calibrated, reached, "D", color=OURS, label=f"as marked: {reached:.3f}", zorder=3)
    axis.plot(
        thresholds[best], dice[best], "o", color="black", label=f"best by the test labels: {dice[best]:.3f}", zorder=3
    )
    axis.set(
        title=f"Dice of the anomaly map\n{counts}",
        xlabel="threshold, times the scan's median",
        ylabel="Dice",
        xlim=(0, 4 * calibrated),
        ylim=(0, None),
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def draw_detectability(by: dict[str, list[dict]]) -> plt.Figure:
    """Recall and mean Dice of lesions in groups; by: {what the groups are: as `measure_detectability` gives them}."""
    figure, axes = plt.subplots(1, len(by), figsize=(COLUMN * len(by), 2.9), layout="constrained", squeeze=False)
    for axis, (what, groups) in zip(axes[0], by.items(), strict=True):
        for name, title, filled, marker, shift in (
            ("recall", "share found", OURS, "o", -0.08),
            ("dice", "mean Dice", "white", "s", 0.08),
        ):
            value = np.array([group[name]["value"] for group in groups])
            reach = [[group[name][side] for group in groups] for side in ("low", "high")]
            errors = np.maximum([value - reach[0], reach[1] - value], 0)
            places = np.arange(len(groups)) + shift
            style = {"color": OURS, "markerfacecolor": filled, "marker": marker, "capsize": 3, "linestyle": ""}
            axis.errorbar(places, value, errors, label=title, **style)
        ticks = [f"{group['group']}\n{group['lesions']} in {group['scans']}" for group in groups]
        axis.set_xticks(range(len(groups)), ticks)
        axis.set(
            title=f"lesions by {what}",
            xlabel=f"{what}; lesions in how many scans",
            ylabel="as marked",
            xlim=(-0.5, len(groups) - 0.5),
            ylim=(-0.03, 1.03),
        )
        axis.grid(alpha=0.3, axis="y")
        axis.legend(frameon=False)
    return figure


def draw_calibration(p_values: dict[str, np.ndarray], false_positive_rate: float) -> plt.Figure:
    """How often normal test scans and slices ({"scans": (n,), ...}) have a p-value of at most alpha, over alpha.

    Valid p-values lie on or below the diagonal; the band is where 95 % of sets of so many independent scans lie.
    """
    figure, axis = plt.subplots(figsize=(COLUMN, 3.1), layout="constrained")
    alphas = np.linspace(0, 1, 201)
    count = len(p_values["scans"])
    band = binom.ppf([[0.025], [0.975]], count, alphas) / count
    axis.fill_between(alphas, *band, color="0.9", label="95 % of such sets of scans", step="mid")
    axis.plot([0, 1], [0, 1], color="0.5", linewidth=1, label="valid p-values")
    for (what, values), dash in zip(p_values.items(), ("-", "--"), strict=True):
        share = np.searchsorted(np.sort(values), alphas, side="right") / len(values)
        axis.step(alphas, share, where="post", color=OURS, linestyle=dash, label=f"{len(values)} normal {what}")
    axis.axvline(
        false_positive_rate, color="black", linestyle=":", linewidth=1, label=f"asked: {false_positive_rate:g}"
    )
    axis.set(
        title="p-values of normal test scans",
        xlabel="alpha",
        ylabel="share with p ≤ alpha",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def draw_ages(rows: list[dict], mark: tuple[float, str] | None) -> plt.Figure:
    """The scores of normal scans against age, a mark for each sex; mark: (the score above which a scan is flagged, its
    name)."""
    figure, axis = plt.subplots(figsize=(COLUMN, 2.9), layout="constrained")
    for sex, marker in SEX_MARKERS.items():
        known = [(row["age"], row["score"]) for row in rows if row["sex"] == sex and row["age"] is not None]
        if known:
            style = {"color": OURS, "markerfacecolor": "white" if sex == "M" else OURS}
            style["rasterized"] = len(known) > MOST_VECTORS
            axis.plot(*zip(*known, strict=True), marker, label=f"{sex or 'sex unknown'} ({len(known)})", **style)
    if mark:
        axis.axhline(mark[0], color="black", linestyle=":", label=mark[1])
    axis.set(title="normal scans", xlabel="age, years", ylabel="score, times the scan's median")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def draw_figures(
    out: Path, results: Results, content: dict, healthy: dict[str, np.ndarray]
) -> dict[str, tuple[str, str]]:
    """Draw the figures of what metrics.json says and write each to `out` as PDF.

    Returns {what it shows: (its file, SVG as a data URL)}.

    healthy  scores of the calibration's validation "scan"s and "slice"s, (n,) each
    """
    shown = {}
    with plt.rc_context(STYLE):
        for name, (words, draw) in list_figures(results, content, healthy).items():
            figure = draw()
            shown[words] = f"{name}.pdf", embed_vectors(figure)
            write_atomically(out / f"{name}.pdf", save_pdf(figure))
            plt.close(figure)
    return shown


def list_figures(
    results: Results, content: dict, healthy: dict[str, np.ndarray]
) -> dict[str, tuple[str, Callable[[], plt.Figure]]]:
    """{file name without its ending: (what it shows, what draws it)} of the figures that these results allow."""
    calibration, counts, measured = content["calibration"], content["counts"], content["figures"]
    asked, figures = content["settings"]["false_positive_rate"], {}
    for level, counted, rows in (
        ("scan", results.list_labelled(), results.scans),
        ("slice", results.list_counted_slices(), results.list_counted_slices()),
    ):
        labels = np.array([row["label"] == "abnormal" for row in counted])
        if labels.any() and not labels.all():
            scores = {name: np.array([row[name] for row in counted]) for name in DETECTORS}
            areas = {name: tuple(measured[name][f"{level}_{of}"] for of in ("auroc", "ap")) for name in DETECTORS}
            figures[f"curves_{level}s"] = (
                f"ROC and precision-recall curves of {level}s",
                lambda given=(labels, scores, areas, f"{level}s"): draw_curves(*given),
            )
        mark = calibration[f"{level}_score"]
        mark = None if mark is None else (mark, f"above: p ≤ {asked:g}")
        groups = {VALIDATION: healthy[level]}
        groups |= {label: np.array([row["score"] for row in rows if row["label"] == label]) for label in LABELS}
        groups = {what: values for what, values in groups.items() if len(values)}
        figures[f"scores_{level}s"] = (
            f"Scores of {level}s, those of the healthy validation {level}s above them",
            lambda given=(groups, f"score of {level}s, times the scan's median", mark): draw_scores(*given),
        )
    if "dice" in measured["score"]:
        lesions = f"{counts['lesions']} lesions, {len(results.scans)} scans, {counts['subjects']} subjects"
        reached = calibration["voxel_threshold"], measured["score"]["dice"]["value"], lesions
        figures["dice"] = (
            "Dice of the anomaly map against its threshold, the calibrated one marked",
            lambda: draw_dice(*results.voxels["score"].dice_curve(), *reached),
        )
    if by := {what: found for what, groups in content["detectability"].items() if (found := _keep_scored(groups))}:
        words = "Share of lesions found and their Dice by " + " and by ".join(by)
        figures["detectability"] = words, lambda: draw_detectability(by)
    p_values = {
        f"{level}s": np.array([row["p_value"] for row in rows if row["label"] == "normal"])
        for level, rows in (("scan", results.scans), ("slice", results.slices))
    }
    if len(p_values["scans"]):
        words = "How often normal scans have a p-value of at most alpha, against alpha"
        figures["calibration"] = words, lambda: draw_calibration(p_values, asked)
    if "normal_by_age" in content["flagged"]:
        mark = calibration["scan_score"]
        mark = None if mark is None else (mark, f"above: p ≤ {asked:g}")
        normal = [row for row in results.scans if row["label"] == "normal"]
        figures["age"] = "Scores of normal scans against age", lambda: draw_ages(normal, mark)
    return figures


def _keep_scored(groups: list[dict]) -> list[dict]:
    """The groups of lesions of which any was scored."""
    return [group for group in groups if group["lesions"]]
