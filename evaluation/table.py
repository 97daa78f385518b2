"""The table that people publish: figures with intervals, a row a detector, as Markdown and as LaTeX."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {
    "voxel_ap": "voxel AP",
    "best_dice": "best Dice (threshold by the labels)",
    "dice": "Dice as marked",
    "slice_auroc": "slice AUROC",
    "scan_auroc": "scan AUROC",
}
DETECTORS = {"score": "anomaly map", "mse": "plain MSE"}
BASELINES = {
    "bright": "intensity threshold, bright",
    "dark": "intensity threshold, dark",
    "deviation": "z-score of intensity",
}


def make_table(named: dict[str, dict]) -> pd.DataFrame:
    """The table of {name: metrics}, all of the same data, as text; the baselines, which they share, come first."""
    import pandas as pd  # slow to import, and a single scan needs no table

    first = next(iter(named.values()))["figures"]
    rows = {title: first[detector] for detector, title in BASELINES.items()}
    for name, metrics in named.items():
        name = " ".join(name.split())
        rows |= {f"{name}, {title}": metrics["figures"][detector] for detector, title in DETECTORS.items()}
    cells = [[format_figure(figures.get(column)) for column in COLUMNS] for figures in rows.values()]
    return pd.DataFrame(cells, index=list(rows), columns=list(COLUMNS.values()))


def describe_counts(metrics: dict) -> str:
    """The sample sizes in one sentence."""
    counts = metrics["counts"]
    lesions = f" with {counts['lesions']} lesions" if counts["lesions"] else ""
    unknown = counts.get("without_lesion_mask")  # missing in evaluations of older versions
    left_out = f"; {unknown} abnormal scans without a lesion mask count for scan figures alone" if unknown else ""
    scans = f"{counts['normal']} normal and {counts['abnormal']} abnormal scans{lesions}"
    if counts.get("unlabelled"):
        labelled = f"{scans} and " if counts["normal"] or counts["abnormal"] else ""
        scans = f"{labelled}{counts['unlabelled']} unlabelled scans"
    return f"{scans}, {counts['slices']} slices, {counts['subjects']} subjects; 95 % intervals over subjects{left_out}"


def format_markdown(named: dict[str, dict]) -> str:
    """The Markdown table of {name: metrics}, all of the same data, with the sample sizes in a sentence."""
    table = make_table(named)
    lines = ["| | " + " | ".join(table.columns) + " |", "|---|" + "---|" * len(table.columns)]
    lines += [
        f"| {' | '.join([escape_markdown(title), *cells])} |"
        for title, cells in zip(table.index, table.values, strict=True)
    ]
    return "\n".join([*lines, "", describe_counts(next(iter(named.values()))) + "."])


def escape_markdown(text: str) -> str:
    """Text for a cell: nothing in it ends the cell, is a link, a picture or HTML."""
    return re.sub(r"([\\|`*<>\[\]])", r"\\\1", text)


def format_latex(named: dict[str, dict]) -> str:
    """The same as a LaTeX tabular; needs the package booktabs."""
    tabular = make_table(named).to_latex(column_format=f"l{'c' * len(COLUMNS)}", escape=True)
    return f"% {describe_counts(next(iter(named.values())))}\n{tabular.replace('–', '--').rstrip()}"


def format_p(p_value: float) -> str:
    """`0.028`; never 0."""
    return f"{p_value:.3f}" if p_value >= 0.0005 else "<0.001"


def format_figure(figure: dict | None, digits: int = 3) -> str:
    """`0.465 (0.308–0.612)`; nothing where the figure could not be taken.

    No interval where all resamples gave the same or none gave anything: that is no certainty.
    """
    if not figure:
        return ""
    value, low, high = (f"{figure[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low}–{high})" if figure["low"] < figure["high"] else value
