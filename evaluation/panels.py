"""Pictures of slices: a panel for one slice, a montage for a scan. Nose up, the subject's left on the left.

The colours are those of `colours`. A white line is the border of what is marked, a sky-blue one that of a known lesion.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.patheffects import withStroke
from skimage.util import montage

from common.files import write_figure
from evaluation.colours import (
    ANOMALY_COLOURS,
    BORDER_COLOUR,
    HIGHEST,
    LESION_COLOUR,
    LOWEST,
    NOT_SCORED,
    RESIDUAL_COLOURS,
    RESIDUAL_TOP,
    list_ticks,
    overlay,
)
from evaluation.places import find_file_slice, find_mm, format_mm, name_slice
from evaluation.predictor import Prediction
from evaluation.table import format_p
from preprocessing.geometry import Geometry

ANOMALY_LABEL = "anomaly, times the scan's median"
COLUMNS = 8  # of a montage
MONTAGE_SLICES = 48


def draw_panels(prediction: Prediction, shown: list[int], title: str) -> plt.Figure:
    """Kept slices of a scan, a row each: slice, reconstruction, signed residual, anomaly map over the slice."""
    # Places by hand, in inches: a layout engine takes longer than all the rest, and pictures should be alike.
    width, side, top = 12.6, 2.57, 0.6
    height = top + len(shown) * (side + 0.06)
    figure = plt.figure(figsize=(width, height))

    def add_axes(left: float, bottom: float, wide: float, tall: float) -> plt.Axes:
        return figure.add_axes((left / width, bottom / height, wide / width, tall / height))

    names, numbers = ("slice", "reconstruction", "signed residual", "anomaly map"), prediction.region_numbers
    for row, i in enumerate(shown):
        bottom = height - top - (row + 1) * (side + 0.06) + 0.06
        axes = [add_axes(left, bottom, side, side) for left in (0.06, 2.69, 5.32, 8.87)]
        drawn = _draw_row(axes, prediction, i)
        _write_numbers(axes[3], numbers[i])
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
            text = name_slice(prediction.scan.geometry, i)
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
    axes[3].imshow(overlay(slice_, prediction.anomaly[i], prediction.threshold), origin="lower")
    for axis, colour in zip(axes, ("white", "white", "black", "black"), strict=True):
        axis.set_axis_off()
        for x, letter in ((0.04, "L"), (0.96, "R")):
            style = {"color": colour, "weight": "bold", "ha": "center", "va": "center"}
            axis.text(x, 0.5, letter, transform=axis.transAxes, **style)
    _draw_line(axes[3], np.nan_to_num(prediction.anomaly[i] / prediction.limits[i]), 1, BORDER_COLOUR)
    if lesion is not None:
        for axis in (axes[0], axes[2], axes[3]):
            _draw_line(axis, lesion[i], 0.5, LESION_COLOUR)
    return drawn


def draw_montage(prediction: Prediction, title: str) -> plt.Figure:
    """All kept slices of a scan from the lowest to the highest, at most 48 of them, with the anomaly map over each."""
    scan = prediction.scan
    shown = np.unique(np.linspace(0, len(scan.stack) - 1, MONTAGE_SLICES).round().astype(int))
    multiples = np.nan_to_num(prediction.anomaly[shown] / prediction.limits[shown])
    crop = find_crop((scan.stack > 0).any(axis=0))

    def tile(slices: np.ndarray, fill: float | list[float]) -> np.ndarray:
        upright = slices[(slice(None), *crop)][:, ::-1]  # the canvas is drawn from the top, a slice from the bottom
        rows = -(-len(slices) // COLUMNS)
        return montage(upright, fill=fill, grid_shape=(rows, COLUMNS), channel_axis=-1 if slices.ndim == 4 else None)

    canvas = tile(overlay(scan.stack[shown], prediction.anomaly[shown], prediction.threshold), [NOT_SCORED] * 3)
    tall, wide = (side.stop - side.start for side in crop)
    width, height, top = 11.0, 10.0 * canvas.shape[0] / canvas.shape[1], 0.4
    figure = plt.figure(figsize=(width, height + top))
    axis = figure.add_axes((0, 0, 10 / width, height / (height + top)))
    axis.imshow(canvas, interpolation="none")
    axis.set_axis_off()
    _draw_line(axis, tile(multiples, 0), 1, BORDER_COLOUR)
    if scan.lesion is not None:
        _draw_line(axis, tile(scan.lesion[shown].astype(np.float32), 0), 0.5, LESION_COLOUR)
    _write_numbers(axis, tile(_keep_largest(prediction.region_numbers[shown]), 0))
    for place, i in enumerate(shown):
        row, column = divmod(place, COLUMNS)
        name, style = _name_tile(scan.geometry, i), {"fontsize": 7, "color": "white", "va": "top"}
        axis.text((column + 0.03) * wide, (row + 0.02) * tall, name, **style)  # white is read on the rim of a brain too
    for x, side in ((0.04, "L"), (0.96, "R")):
        axis.text(x * wide, tall / 2, side, fontsize=10, color="black", ha="center", va="center", weight="bold")
    _draw_anomaly_bar(figure, figure.add_axes((10.1 / width, 0.15, 0.014, 0.7)), prediction.threshold)
    figure.text(0.005, 1 - 0.22 / (height + top), title, fontsize=10, va="center", parse_math=False)
    return figure


def draw_scan(out: Path, prediction: Prediction, panels: str) -> None:
    """Write the montage of a scan and the panels asked for: its worst slice, its N worst or "all"."""
    scan, rows, row = prediction.scan, prediction.slice_rows, prediction.scan_row
    title = f"{scan.name} ({scan.label})"
    scored = f"{title}: score {row['score']:.1f}, p {format_p(row['p_value'])}"
    write_figure(out / "montages" / scan.label / f"{scan.name}.png", draw_montage(prediction, scored))
    count = {"worst": 1, "all": len(rows)}.get(panels) or int(panels)
    for i in prediction.rank_slices()[:count]:
        title_of_slice = (
            f"{title}, {name_slice(scan.geometry, i)}: score {rows[i]['score']:.1f}, p {format_p(rows[i]['p_value'])}, "
            f"MSE {rows[i]['mse']:.5f}"
        )
        path = out / "error_maps" / scan.label / f"{scan.name}_slice_{rows[i]['slice']:03d}.png"
        write_figure(path, draw_panels(prediction, [i], title_of_slice))


def find_crop(brain: np.ndarray, margin: int = 5) -> tuple[slice, slice]:
    """The rows and columns that hold a brain (H, W) bool, with a margin in pixels, within the picture."""
    held = (np.flatnonzero(brain.any(axis=axis)) for axis in (1, 0))
    return tuple(
        slice(max(0, i[0] - margin), min(side, i[-1] + 1 + margin)) for i, side in zip(held, brain.shape, strict=True)
    )


def _keep_largest(numbers: np.ndarray) -> np.ndarray:
    """Numbers of regions (n, H, W), each kept only in the slice that has most of it."""
    kept = np.zeros_like(numbers)
    for number in np.unique(numbers[numbers > 0]):
        within = numbers == number
        largest = int(within.sum(axis=(1, 2)).argmax())
        kept[largest][within[largest]] = number
    return kept


def _write_numbers(axis: plt.Axes, numbers: np.ndarray) -> None:
    """The number of each region in a picture (H, W) of them, to the right of it."""
    for number in np.unique(numbers[numbers > 0]):
        rows, columns = np.nonzero(numbers == number)
        style = {"fontsize": 8, "color": "white", "weight": "bold", "va": "center"}
        text = axis.text(columns.max() + 1, rows.mean(), str(number), **style)
        text.set_path_effects([withStroke(linewidth=2, foreground="black")])


def _name_tile(geometry: Geometry, place: int) -> str:
    """`z 12, k 87`: mm, and the file's own index where it has one."""
    found = find_file_slice(geometry, geometry.slices[place])
    return f"z {format_mm(find_mm(geometry, place))}" + (f", {found[0]} {found[1]}" if found else "")


def _draw_line(axis: plt.Axes, values: np.ndarray, level: float, colour: str) -> None:
    """A line around what is at or above a level in a picture (H, W), with a dark rim to be seen on any ground."""
    if (values >= level).any() and (values < level).any():
        lines = axis.contour(values, [level], colors=colour, linewidths=1.1)
        lines.set_path_effects([withStroke(linewidth=2.2, foreground=(0, 0, 0, 0.6))])


def _draw_anomaly_bar(figure: plt.Figure, axis: plt.Axes, threshold: float) -> None:
    """The bar of the anomaly's colours, the calibrated threshold marked."""
    scale = ScalarMappable(LogNorm(LOWEST * threshold, HIGHEST * threshold), ANOMALY_COLOURS)
    bar = figure.colorbar(scale, cax=axis, extend="max")
    bar.set_label(ANOMALY_LABEL, fontsize=8)
    axis.axhline(threshold, color=BORDER_COLOUR, linewidth=2)
    ticks = list_ticks(threshold)
    bar.set_ticks(ticks, labels=[f"{tick:.3g}{' ◂' * (tick == threshold)}" for tick in ticks], fontsize=8)
    bar.minorticks_off()
