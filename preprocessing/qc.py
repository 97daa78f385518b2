"""The contact sheet: the middle slice of every scan, to find a wrongly oriented scan at a glance."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.files import write_figure
from preprocessing.store import StoredScan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS, ROWS = 8, 5
SIDES = {"L": (0.02, 0.5), "R": (0.98, 0.5), "A": (0.5, 0.98), "P": (0.5, 0.02)}  # nose up, left on the left


def draw_contact_sheet(scans: list[StoredScan], processed: Path) -> list[Path]:
    """Draw `qc.png`, `qc-2.png`, …: 40 scans a page, each with its name and its stored axes; returns the pages."""
    from matplotlib.figure import Figure  # here, because it is slow to import and the workers do without

    for old in processed.glob("qc-*.png"):
        old.unlink()
    pages = []
    for start in range(0, len(scans), COLUMNS * ROWS):
        page = scans[start : start + COLUMNS * ROWS]
        rows = -(-len(page) // COLUMNS)
        figure = Figure(figsize=(2.2 * COLUMNS, 2.6 * rows), facecolor="black")
        grid = figure.subplots(rows, COLUMNS, squeeze=False, gridspec_kw={"wspace": 0.05, "hspace": 0.25})
        figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=1 - 0.35 / (2.6 * rows))
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, scan in zip(grid.flat, page, strict=False):
            draw_scan(axes, scan)
        pages.append(processed / ("qc.png" if start == 0 else f"qc-{len(pages) + 1}.png"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about letters that the font lacks, drawn as boxes
            write_figure(pages[-1], figure)
    return pages


def draw_scan(axes: Axes, scan: StoredScan) -> None:
    """A scan's middle slice with its sides, under its name, place and stored axes; an extracted brain as an outline."""
    middle, head = scan.read_middle().astype(np.float32), scan.read_head()
    axes.imshow(middle if head is None else head.astype(np.float32), cmap="gray", vmin=0, vmax=1, origin="lower")
    if head is not None:
        axes.contour(middle > 0, levels=[0.5], colors="orange", linewidths=0.7)
    name = scan.name if len(scan.name) <= 26 else f"{scan.name[:12]}…{scan.name[-13:]}"
    title = f"{name}\n{scan.split}/{scan.label} {scan.record['axes']}".encode("utf-8", "replace").decode()
    axes.set_title(title, fontsize=7, color="white", pad=2, parse_math=False)
    for side, (x, y) in SIDES.items():
        axes.text(x, y, side, transform=axes.transAxes, color="orange", fontsize=7, ha="center", va="center")
