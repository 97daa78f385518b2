"""The table that people publish: figures with intervals, a row a detector, as Markdown and as LaTeX."""

from __future__ import annotations

COLUMNS = {
    "voxel_ap": "voxel AP",
    "best_dice": "best Dice (upper bound)",
    "dice": "Dice at calibrated threshold",
    "slice_auroc": "slice AUROC",
    "scan_auroc": "scan AUROC",
}
DETECTORS = {"score": "anomaly map", "mse": "plain MSE"}
BASELINES = {
    "bright": "intensity threshold, bright",
    "dark": "intensity threshold, dark",
    "deviation": "z-score of intensity",
}


def list_rows(named: dict[str, dict]) -> list[tuple[str, list[dict | None]]]:
    """(title, a figure or None for each of COLUMNS) of {name: metrics}; the first model's baselines first."""
    first = next(iter(named.values()))["figures"]
    rows = [(title, first[key]) for key, title in BASELINES.items()]
    for name, metrics in named.items():
        rows += [(f"{name}, {title}", metrics["figures"][key]) for key, title in DETECTORS.items()]
    return [(title, [figures.get(column) for column in COLUMNS]) for title, figures in rows]


def describe_counts(metrics: dict) -> str:
    """One sentence: how much stands behind the figures."""
    counts = metrics["counts"]
    lesions = f" with {counts['lesions']} lesions" if counts["lesions"] else ""
    return (
        f"{counts['normal']} normal and {counts['abnormal']} abnormal scans{lesions}, {counts['slices']} slices, "
        f"{counts['subjects']} subjects; 95 % intervals over subjects"
    )


def format_markdown(named: dict[str, dict]) -> str:
    """The Markdown table of {name: metrics}, all of the same data."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    lines += [f"| {title} | {' | '.join(map(format_figure, cells))} |" for title, cells in list_rows(named)]
    return "\n".join([*lines, "", describe_counts(next(iter(named.values()))) + "."])


def format_latex(named: dict[str, dict]) -> str:
    """The same as a LaTeX tabular; needs the package booktabs."""
    lines = [
        f"% {describe_counts(next(iter(named.values())))}",
        rf"\begin{{tabular}}{{l{'c' * len(COLUMNS)}}}",
        r"\toprule",
        " & ".join(["", *COLUMNS.values()]) + r" \\",
        r"\midrule",
    ]
    for title, cells in list_rows(named):
        text = [_escape(title), *(format_figure(cell).replace("–", "--") for cell in cells)]
        lines.append(" & ".join(text) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def format_figure(figure: dict | None) -> str:
    """`0.465 (0.308–0.612)`; nothing where the figure could not be taken."""
    return f"{figure['value']:.3f} ({figure['low']:.3f}–{figure['high']:.3f})" if figure else ""


def _escape(text: str) -> str:
    for sign in "\\&%$#_{}":
        text = text.replace(sign, {"\\": r"\textbackslash "}.get(sign, f"\\{sign}"))
    return text
