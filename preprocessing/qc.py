"""The contact sheet: the middle slice of every scan, so that one glance finds the one that lies wrong."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from preprocessing.store import StoredScan

COLUMNS, ROWS = 8, 5
SIDES = {
    "L": (0.02, 0.5),
    "R": (0.98, 0.5),
    "A": (0.5, 0.98),
    "P": (0.5, 0.02),
}  # nose up, the subject's left on the left


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
            middle = scan.read_middle()
            axes.imshow(middle.astype(np.float32), cmap="gray", vmin=0, vmax=1, origin="lower")
            name = scan.name if len(scan.name) <= 26 else f"{scan.name[:12]}…{scan.name[-13:]}"
            place = scan.folder.relative_to(processed)
            title = f"{name}\n{place.parts[0]}/{scan.label} {scan.record['axes']}"
            title = title.encode("utf-8", "replace").decode()
            axes.set_title(title, fontsize=7, color="white", pad=2, parse_math=False)
            for side, (x, y) in SIDES.items():
                axes.text(x, y, side, transform=axes.transAxes, color="orange", fontsize=7, ha="center", va="center")
        path = processed / ("qc.png" if start == 0 else f"qc-{start // (COLUMNS * ROWS) + 1}.png")
        unfinished = path.with_name(f".{path.name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that the font lacks: a box stands for them
            figure.savefig(unfinished, dpi=110, format="png")
        unfinished.replace(path)
        pages.append(path)
    return pages
