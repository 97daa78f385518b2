"""Set evaluations side by side: one Markdown table of several models and the intensity threshold.

Reads the metrics.json of each evaluation folder; all must be of the same data.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

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


def read_metrics(folder: Path) -> dict:
    """metrics.json of a finished evaluation; ends the script with one line where there is none."""
    try:
        return json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError):
        sys.exit(f"{folder / 'metrics.json'}: no finished evaluation; run evaluation/evaluate.py first")


def format_table(named: dict[str, dict]) -> str:
    """The Markdown table of {name: metrics}; the baselines are hardly touched by the model and stand first."""
    rows = [(title, next(iter(named.values()))["figures"][key]) for key, title in BASELINES.items()]
    for name, metrics in named.items():
        rows += [(f"{name}, {title}", metrics["figures"][key]) for key, title in DETECTORS.items()]
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    for title, figures in rows:
        cells = [figures.get(column) for column in COLUMNS]
        text = (f"{c['value']:.3f} ({c['low']:.3f}–{c['high']:.3f})" if c else "" for c in cells)
        lines.append(f"| {title} | " + " | ".join(text) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("evaluations", type=Path, nargs="+", help="evaluation folders of evaluate.py")
    args = parser.parse_args(argv)
    metrics = {folder: read_metrics(folder) for folder in args.evaluations}
    if len({content["settings"]["data"] for content in metrics.values()}) > 1:
        sys.exit(f"{args.evaluations[0]}: the evaluations are of different data; compare those of one test set")
    print(format_table({Path(content["run"]).name: content for content in metrics.values()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
