"""What evaluate.py leaves to look at: error maps, curves, histograms as PNG, anomaly maps as NIfTI."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

from models.artifacts import write_figure

ANOMALY_COLOURS = "inferno"  # rises in lightness, so it reads in grey and for the colour-blind
LABEL_COLOURS = {"normal": "#0072B2", "abnormal": "#D55E00"}
NOT_SCORED = "0.5"


def draw_error_map(
    path: Path,
    slice_: np.ndarray,
    reconstruction: np.ndarray,
    anomaly: np.ndarray,
    lesion: np.ndarray | None,
    title: str,
    error_top: float,
    anomaly_top: float,
) -> None:
    """One slice (H, W), its reconstruction, its error and its anomaly map (NaN outside the brain) side by side.

    The same `error_top` and `anomaly_top` for every picture of an evaluation keep their colours comparable.
    """
    figure, axes = plt.subplots(1, 4, figsize=(12.5, 3.7), layout="constrained")
    figure.suptitle(title, fontsize=11)
    brain = slice_ > 0
    error = np.where(brain, np.abs(slice_ - reconstruction), np.nan)
    hot = matplotlib.colormaps[ANOMALY_COLOURS].with_extremes(bad=NOT_SCORED)
    axes[0].imshow(slice_, cmap="gray", origin="lower", vmin=0, vmax=1)
    axes[1].imshow(reconstruction, cmap="gray", origin="lower", vmin=0, vmax=1)
    drawn_error = axes[2].imshow(error, cmap=hot, origin="lower", vmin=0, vmax=error_top)
    axes[3].imshow(slice_, cmap="gray", origin="lower", vmin=0, vmax=1)
    strength = np.clip(np.nan_to_num(anomaly) / anomaly_top, 0, 1)
    drawn_anomaly = axes[3].imshow(
        np.where(brain, anomaly, np.nan),
        cmap=ANOMALY_COLOURS,
        origin="lower",
        vmin=0,
        vmax=anomaly_top,
        alpha=np.clip(2 * strength, 0, 0.85),
    )
    figure.colorbar(drawn_error, ax=axes[2], shrink=0.75, label="share of full intensity", extend="max")
    bar = plt.cm.ScalarMappable(drawn_anomaly.norm, ANOMALY_COLOURS)
    figure.colorbar(bar, ax=axes[3], shrink=0.75, label="times the usual residual", extend="max")
    names = ("slice", "reconstruction", "error", "anomaly map")
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
        for x, side in ((0.02, "L"), (0.98, "R")):
            colour = "black" if name == "error" else "white"
            axis.text(x, 0.5, side, color=colour, transform=axis.transAxes, ha="left" if side == "L" else "right")
    if lesion is not None and lesion.any():
        for axis in axes[[0, 3]]:
            axis.contour(lesion, [0.5], colors="#56B4E9", linewidths=1)
    write_figure(path, figure)


def draw_curves(path: Path, labels: np.ndarray, scores: dict[str, np.ndarray], what: str) -> None:
    """ROC and precision-recall curves of several scores, (n,) each, over the same labels (n,) bool."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.4), layout="constrained")
    for name, values in scores.items():
        false_positive, true_positive, _ = roc_curve(labels, values)
        precision, recall, _ = precision_recall_curve(labels, values)
        left.plot(false_positive, true_positive, label=name)
        right.plot(recall, precision, label=name)
    left.plot([0, 1], [0, 1], color="0.7", linestyle=":", label="chance")
    right.axhline(np.mean(labels), color="0.7", linestyle=":", label="chance (prevalence)")
    left.set(title=f"ROC, {what}", xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    right.set(title=f"precision-recall, {what}", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    right.set_box_aspect(1)
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    write_figure(path, figure)


def draw_histograms(path: Path, rows: list[dict], columns: dict[str, str]) -> None:
    """Histograms of columns ({name: axis label}) of score rows by label, as densities."""
    figure, axes = plt.subplots(1, len(columns), figsize=(4.8 * len(columns), 3.6), layout="constrained", squeeze=False)
    for axis, (column, name) in zip(axes[0], columns.items(), strict=True):
        edges = np.histogram_bin_edges([row[column] for row in rows], 40)
        for label, colour in LABEL_COLOURS.items():
            values = [row[column] for row in rows if row["label"] == label]
            if values:
                axis.hist(values, edges, density=True, alpha=0.6, color=colour, label=f"{label} ({len(values)})")
        axis.set(xlabel=name, ylabel="density")
        axis.legend(frameon=False)
    write_figure(path, figure)


def write_map(path: Path, anomaly: np.ndarray, affine: np.ndarray) -> None:
    """Write an anomaly map on its scan's own grid, (I, J, K) with NaN where nothing was scored, as NIfTI."""
    image = nib.Nifti1Image(anomaly, affine)
    image.header["descrip"] = "anomaly map, times the usual residual"
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    nib.save(image, partial)
    os.replace(partial, path)
