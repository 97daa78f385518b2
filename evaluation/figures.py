"""The figures of an evaluation: curves, histograms, detectability, calibration, age and sex."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import binom
from sklearn.metrics import precision_recall_curve, roc_curve

from common.files import write_figure
from evaluation.predictor import DETECTORS
from evaluation.results import Results

# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
LABEL_COLOURS = {"normal": "#0072B2", "abnormal": "#D55E00"}
SEX_MARKERS = {"F": "o", "M": "s", None: "D"}


def draw_curves(
    labels: np.ndarray, scores: dict[str, np.ndarray], figures: dict[str, tuple[dict, dict]], what: str
) -> plt.Figure:
    """ROC and precision-recall curves of several scores, (n,) each, over the same labels (n,) bool.

    figures: (AUROC, average precision) of each, with its interval, for the legend.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 6.8))
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.3, top=0.92, wspace=0.2)
    for (name, values), colour, dash in zip(scores.items(), COLOURS, DASHES, strict=False):
        false_positive, true_positive, _ = roc_curve(labels, values)
        precision, recall, _ = precision_recall_curve(labels, values)
        style = {"color": colour, "linestyle": dash}
        area, average = (f"{f['value']:.2f} ({f['low']:.2f}–{f['high']:.2f})" for f in figures[name])
        left.plot(false_positive, true_positive, label=f"{name}, {area}", **style)
        right.step(recall, precision, where="post", label=f"{name}, {average}", **style)
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
        axis.legend(
            frameon=False, fontsize=8, title=title, title_fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12)
        )
    return figure


def draw_histograms(rows: list[dict], columns: dict[str, str], marks: dict[str, tuple[float, str]]) -> plt.Figure:
    """Histograms of columns ({name: axis label}) of score rows by label; marks: {name: (score, what it is)}."""
    figure, axes = plt.subplots(1, len(columns), figsize=(5 * len(columns), 3.8), layout="constrained", squeeze=False)
    for axis, (column, name) in zip(axes[0], columns.items(), strict=True):
        edges = np.histogram_bin_edges([row[column] for row in rows], min(40, 10 + len(rows) // 10))
        for label, colour in LABEL_COLOURS.items():
            values = [row[column] for row in rows if row["label"] == label]
            if values:
                style = {"histtype": "stepfilled", "facecolor": (colour, 0.3), "edgecolor": colour}
                dash = "-" if label == "normal" else "--"
                axis.hist(values, edges, label=f"{label} ({len(values)})", linestyle=dash, **style)
        if column in marks:
            score, words = marks[column]
            axis.axvline(score, color="black", linestyle=":", label=words)
        axis.locator_params(axis="x", nbins=5)
        axis.set(xlabel=name, ylabel="how many", title=name)
        axis.legend(frameon=False, fontsize=8)
    return figure


def draw_dice(thresholds: np.ndarray, dice: np.ndarray, calibrated: float, reached: float, counts: str) -> plt.Figure:
    """Dice (bins,) of the anomaly map over its thresholds (bins,), with the calibrated one and what it reaches."""
    figure, axis = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    axis.plot(thresholds, dice, color=COLOURS[0])
    best = int(dice.argmax())
    axis.axvline(calibrated, color="black", linestyle=":", label=f"calibrated on normal scans: {reached:.3f}")
    axis.plot(
        thresholds[best], dice[best], "o", color=COLOURS[1], label=f"best, an upper bound: {dice[best]:.3f}", zorder=3
    )
    axis.set(
        title=f"Dice of the anomaly map\n{counts}",
        xlabel="threshold, times the scan's median",
        ylabel="Dice",
        xlim=(0, 4 * calibrated),
        ylim=(0, None),
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return figure


def draw_detectability(by: dict[str, list[dict]]) -> plt.Figure:
    """Recall and mean Dice of lesions in groups; by: {what the groups are: as `measure_detectability` gives them}."""
    figure, axes = plt.subplots(1, len(by), figsize=(5.6 * len(by), 4), layout="constrained", squeeze=False)
    for axis, (what, groups) in zip(axes[0], by.items(), strict=True):
        for name, title, colour, marker, shift in (
            ("recall", "share found", COLOURS[0], "o", -0.08),
            ("dice", "mean Dice", COLOURS[1], "s", 0.08),
        ):
            groups = [group for group in groups if group["lesions"]]
            value = np.array([group[name]["value"] for group in groups])
            reach = [[group[name][side] for group in groups] for side in ("low", "high")]
            errors = np.maximum([value - reach[0], reach[1] - value], 0)
            places = np.arange(len(groups)) + shift
            axis.errorbar(places, value, errors, color=colour, marker=marker, capsize=3, linestyle="", label=title)
        ticks = [f"{group['group']}\n{group['lesions']} in {group['scans']}" for group in groups]
        axis.set_xticks(range(len(groups)), ticks, fontsize=8)
        axis.set(
            title=f"lesions by {what}",
            xlabel=f"{what}; lesions in how many scans",
            ylabel="at the calibrated threshold",
            xlim=(-0.5, len(groups) - 0.5),
            ylim=(-0.03, 1.03),
        )
        axis.grid(alpha=0.3, axis="y")
        axis.legend(frameon=False, fontsize=8)
    return figure


def draw_calibration(p_values: dict[str, np.ndarray], false_positive_rate: float) -> plt.Figure:
    """How often normal test scans and slices ({"scans": (n,), ...}) have a p-value of at most alpha, over alpha.

    Valid p-values lie on or below the diagonal; the band is where 95 % of sets of so many independent scans lie.
    """
    figure, axis = plt.subplots(figsize=(5.6, 4.4), layout="constrained")
    alphas = np.linspace(0, 1, 201)
    count = len(p_values["scans"])
    band = binom.ppf([[0.025], [0.975]], count, alphas) / count
    axis.fill_between(alphas, *band, color="0.9", label="95 % of such sets of scans", step="mid")
    axis.plot([0, 1], [0, 1], color="0.5", linewidth=1, label="valid p-values")
    for (what, values), colour, dash in zip(p_values.items(), COLOURS, DASHES, strict=False):
        share = np.searchsorted(np.sort(values), alphas, side="right") / len(values)
        axis.step(alphas, share, where="post", color=colour, linestyle=dash, label=f"{len(values)} normal {what}")
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
    axis.legend(frameon=False, fontsize=8)
    return figure


def draw_ages(rows: list[dict], mark: tuple[float, str] | None) -> plt.Figure:
    """The scores of normal scans against age, a mark for each sex; mark: (the score above which a scan is flagged, its
    name)."""
    figure, axis = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    for (sex, marker), colour in zip(SEX_MARKERS.items(), COLOURS, strict=False):
        known = [(row["age"], row["score"]) for row in rows if row["sex"] == sex and row["age"] is not None]
        if known:
            axis.plot(*zip(*known, strict=True), marker, color=colour, label=f"{sex or 'sex unknown'} ({len(known)})")
    if mark:
        axis.axhline(mark[0], color="black", linestyle=":", label=mark[1])
    axis.set(title="normal scans", xlabel="age, years", ylabel="score, times the scan's median")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return figure


def draw_figures(out: Path, results: Results, content: dict) -> dict[str, str]:
    """The figures of what metrics.json says, as PNG; returns {file name: what it shows, in words}."""
    calibration, counts, flagged = content["calibration"], content["counts"], content["flagged"]
    asked, threshold = content["settings"]["false_positive_rate"], calibration["voxel_threshold"]
    pictures = {}
    for level, rows in (("slices", results.list_counted_slices()), ("scans", results.scans)):
        labels = np.array([row["label"] == "abnormal" for row in rows])
        one = level.removesuffix("s")
        if labels.any() and not labels.all():
            scores = {title: np.array([row[name] for row in rows]) for name, title in DETECTORS.items()}
            measured = {
                title: tuple(content["figures"][name][f"{one}_{figure}"] for figure in ("auroc", "ap"))
                for name, title in DETECTORS.items()
            }
            write_figure(out / f"curves_{level}.png", draw_curves(labels, scores, measured, level))
            pictures[f"curves_{level}.png"] = f"ROC and precision-recall curves of {level}"
        columns = {"score": f"score of {level}", "mse": f"reconstruction MSE of {level}"}
        mark = calibration[f"{one}_score"]
        marks = {"score": (mark, f"above: p ≤ {asked:g}")} if mark is not None else {}
        write_figure(out / f"histograms_{level}.png", draw_histograms(rows, columns, marks))
        pictures[f"histograms_{level}.png"] = f"Histograms of the scores of {level} by label"
    if "dice" in content["figures"]["score"]:
        lesions = f"{counts['lesions']} lesions, {len(results.scans)} scans, {counts['subjects']} subjects"
        curve, reached = results.voxels["score"].dice_curve(), content["figures"]["score"]["dice"]["value"]
        write_figure(out / "dice.png", draw_dice(*curve, threshold, reached, lesions))
        pictures["dice.png"] = "Dice of the anomaly map against its threshold, the calibrated one marked"
    if content["detectability"]:
        write_figure(out / "detectability.png", draw_detectability(content["detectability"]))
        pictures["detectability.png"] = "Share of lesions found and their Dice by " + " and by ".join(
            content["detectability"]
        )
    normal = {
        level: np.array([row["p_value"] for row in rows if row["label"] == "normal"])
        for level, rows in (("scans", results.scans), ("slices", results.slices))
    }
    if len(normal["scans"]):
        write_figure(out / "calibration.png", draw_calibration(normal, asked))
        pictures["calibration.png"] = "How often normal scans have a p-value of at most alpha, against alpha"
    if "normal_by_age" in flagged:
        mark = calibration["scan_score"]
        rows = [row for row in results.scans if row["label"] == "normal"]
        write_figure(out / "age.png", draw_ages(rows, None if mark is None else (mark, f"above: p ≤ {asked:g}")))
        pictures["age.png"] = "Scores of normal scans against age"
    return pictures
