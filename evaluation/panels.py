"""Pictures of slices: a panel for one slice, a montage for a scan. Nose up, the subject's left on the left.

The colours mean the same in every picture of a model: the anomaly's scale ends at twice the calibrated threshold, the
residual's at RESIDUAL_TOP. Grey is what was not scored; the lesion's outline, where one is known, is sky blue.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from scipy import ndimage
from skimage.util import montage

from common.files import write_figure
from evaluation.predictor import Prediction

ANOMALY_COLOURS = matplotlib.colormaps["inferno"]  # rises in lightness, so it reads in grey and for the colour-blind
RESIDUAL_COLOURS = matplotlib.colormaps["PuOr_r"].with_extremes(bad="0.5")
RESIDUAL_TOP = 0.3  # of full intensity
NOT_SCORED = 0.5  # grey
LESION_COLOUR = "#56B4E9"
ANOMALY_LABEL = "anomaly, times the scan's median"
COLUMNS = 8  # of a montage
MONTAGE_SLICES = 48


def overlay(slice_: np.ndarray, anomaly: np.ndarray, top: float) -> np.ndarray:
    """The anomaly map laid over slices, both (..., H, W), as RGB (..., H, W, 3) in [0, 1]; strongest where highest."""
    strength = np.clip(np.nan_to_num(anomaly) / top, 0, 1)[..., None]
    grey = np.repeat(slice_.astype(np.float32)[..., None], 3, axis=-1)
    opacity = np.clip(2 * strength - 0.3, 0, 0.85)  # expected values leave the slice as it is
    mixed = grey * (1 - opacity) + ANOMALY_COLOURS(strength[..., 0])[..., :3] * opacity
    return np.where(np.isfinite(anomaly)[..., None], mixed, NOT_SCORED)


def draw_panels(prediction: Prediction, shown: list[int], title: str) -> plt.Figure:
    """Kept slices of a scan, a row each: slice, reconstruction, signed residual, anomaly map over the slice."""
    # Places by hand, in inches: a layout engine takes longer than all the rest, and pictures should be alike.
    width, side, top = 12.6, 2.57, 0.6
    height = top + len(shown) * (side + 0.06)
    figure = plt.figure(figsize=(width, height))

    def add_axes(left: float, bottom: float, wide: float, tall: float) -> plt.Axes:
        return figure.add_axes((left / width, bottom / height, wide / width, tall / height))

    names = ("slice", "reconstruction", "signed residual", "anomaly map")
    for row, i in enumerate(shown):
        bottom = height - top - (row + 1) * (side + 0.06) + 0.06
        axes = [add_axes(left, bottom, side, side) for left in (0.06, 2.69, 5.32, 8.87)]
        drawn = _draw_row(axes, prediction, i)
        if row == 0:
            for axis, name in zip(axes, names, strict=True):
                axis.set_title(name, fontsize=10)
            bar = figure.colorbar(drawn, cax=add_axes(7.98, bottom + 0.23, 0.12, side - 0.46), extend="both")
            bar.set_label("share of full intensity", fontsize=8)
            bar.set_ticks(np.linspace(-RESIDUAL_TOP, RESIDUAL_TOP, 5))
            bar.ax.tick_params(labelsize=8)
            for y, word in ((side - 0.1, "brighter"), (0, "darker")):
                figure.text(7.95 / width, (bottom + y) / height, word, fontsize=7)
            _draw_anomaly_bar(figure, add_axes(11.53, bottom + 0.23, 0.12, side - 0.46), prediction.threshold)
        if len(shown) > 1:
            text = f"slice {prediction.scan.geometry.slices[i]}"
            axes[0].text(0.03, 0.97, text, color="white", transform=axes[0].transAxes, va="top")
    figure.suptitle(title, fontsize=11, y=1 - 0.05 / height, parse_math=False)
    return figure


def _draw_row(axes: list[plt.Axes], prediction: Prediction, i: int):
    """Draw the four pictures of one slice; returns that of the residual, for its colour bar."""
    slice_, lesion = prediction.scan.stack[i].astype(np.float32), prediction.scan.lesion
    residual = np.where(slice_ > 0, slice_ - prediction.reconstruction[i], np.nan)
    grey = {"cmap": "gray", "origin": "lower", "vmin": 0, "vmax": 1}
    axes[0].imshow(slice_, **grey)
    axes[1].imshow(prediction.reconstruction[i], **grey)
    drawn = axes[2].imshow(residual, cmap=RESIDUAL_COLOURS, origin="lower", vmin=-RESIDUAL_TOP, vmax=RESIDUAL_TOP)
    axes[3].imshow(overlay(slice_, prediction.anomaly[i], 2 * prediction.threshold), origin="lower")
    for axis, colour in zip(axes, ("white", "white", "black", "black"), strict=True):
        axis.set_axis_off()
        for x, letter in ((0.04, "L"), (0.96, "R")):
            style = {"color": colour, "weight": "bold", "ha": "center", "va": "center"}
            axis.text(x, 0.5, letter, transform=axis.transAxes, **style)
    if lesion is not None and lesion[i].any():
        for axis, colour in ((axes[0], LESION_COLOUR), (axes[2], "black"), (axes[3], LESION_COLOUR)):
            axis.contour(lesion[i], [0.5], colors=colour, linewidths=1.2)
    return drawn


def draw_montage(prediction: Prediction, title: str) -> plt.Figure:
    """All kept slices of a scan from the lowest to the highest, at most 48 of them, with the anomaly map over each."""
    scan = prediction.scan
    shown = np.unique(np.linspace(0, len(scan.stack) - 1, MONTAGE_SLICES).round().astype(int))
    tiles = overlay(scan.stack[shown], prediction.anomaly[shown], 2 * prediction.threshold)
    if scan.lesion is not None:
        tiles[outline(scan.lesion[shown])] = to_rgb(LESION_COLOUR)
    tiles = tiles[(slice(None), *find_crop((scan.stack > 0).any(axis=0)))]
    (tall, wide), rows = tiles.shape[1:3], -(-len(tiles) // COLUMNS)
    upright = tiles[:, ::-1]  # the canvas is drawn from the top, a slice from the bottom
    canvas = montage(upright, fill=[NOT_SCORED] * 3, grid_shape=(rows, COLUMNS), channel_axis=-1)
    width, height, top = 11.0, 10.0 * canvas.shape[0] / canvas.shape[1], 0.4
    figure = plt.figure(figsize=(width, height + top))
    axis = figure.add_axes((0, 0, 10 / width, height / (height + top)))
    axis.imshow(canvas, interpolation="none")
    axis.set_axis_off()
    for place, i in enumerate(shown):
        row, column = divmod(place, COLUMNS)
        axis.text((column + 0.03) * wide, row * tall + 0.1 * wide, scan.geometry.slices[i], fontsize=8, color="black")
    for x, side in ((0.04, "L"), (0.96, "R")):
        axis.text(x * wide, tall / 2, side, fontsize=10, color="black", ha="center", va="center", weight="bold")
    _draw_anomaly_bar(figure, figure.add_axes((10.1 / width, 0.15, 0.014, 0.7)), prediction.threshold)
    figure.text(0.005, 1 - 0.22 / (height + top), title, fontsize=10, va="center", parse_math=False)
    return figure


def draw_scan(out: Path, prediction: Prediction, panels: str) -> None:
    """Write the montage of a scan and the panels asked for: its worst slice, its N worst or "all"."""
    scan, rows, row = prediction.scan, prediction.slice_rows, prediction.scan_row
    title = f"{scan.name} ({scan.label})"
    scored = f"{title}: score {row['score']:.1f}, p {row['p_value']:.3f}"
    write_figure(out / "montages" / scan.label / f"{scan.name}.png", draw_montage(prediction, scored))
    count = {"worst": 1, "all": len(rows)}.get(panels) or int(panels)
    for i in prediction.rank_slices()[:count]:
        title_of_slice = (
            f"{title}, slice {rows[i]['slice']}: score {rows[i]['score']:.1f}, p {rows[i]['p_value']:.3f}, "
            f"MSE {rows[i]['mse']:.5f}"
        )
        path = out / "error_maps" / scan.label / f"{scan.name}_slice_{rows[i]['slice']:03d}.png"
        write_figure(path, draw_panels(prediction, [i], title_of_slice))


def find_crop(brain: np.ndarray, margin: int = 5) -> tuple[slice, slice]:
    """The rows and columns that hold a brain (H, W) bool, with a margin in pixels."""
    held = (np.flatnonzero(brain.any(axis=axis)) for axis in (1, 0))
    return tuple(slice(max(0, i[0] - margin), i[-1] + 1 + margin) for i in held)


def outline(mask: np.ndarray) -> np.ndarray:
    """The rim of masks (n, H, W) bool, one pixel wide and outside them, so that what is within stays seen."""
    return ndimage.binary_dilation(mask, np.ones((1, 3, 3))) & ~mask


def _draw_anomaly_bar(figure: plt.Figure, axis: plt.Axes, threshold: float) -> None:
    """The bar of the anomaly's colours, the calibrated threshold marked."""
    scale = ScalarMappable(Normalize(0, 2 * threshold), ANOMALY_COLOURS)
    bar = figure.colorbar(scale, cax=axis, extend="max")
    bar.set_label(ANOMALY_LABEL, fontsize=8)
    axis.axhline(threshold, color="white", linewidth=1.5)
    axis.axhline(threshold, color="black", linewidth=1.5, linestyle=(0, (2, 2)))
    ticks = np.linspace(0, 2 * threshold, 5)
    bar.set_ticks(ticks, labels=[f"{tick:.1f}{' ◂' if i == 2 else ''}" for i, tick in enumerate(ticks)], fontsize=8)
