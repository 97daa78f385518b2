"""Set evaluations side by side: one table of several models and the baselines.

Reads the metrics.json of each evaluation folder; all must be of the same data.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from evaluation.table import format_latex, format_markdown


def read_metrics(folder: Path) -> dict:
    """metrics.json of a finished evaluation; ends the script with one line where there is none."""
    try:
        return json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError):
        sys.exit(f"{folder / 'metrics.json'}: no finished evaluation; run evaluation/evaluate.py first")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("evaluations", type=Path, nargs="+", help="evaluation folders of evaluate.py")
    parser.add_argument("--latex", action="store_true", help="a LaTeX tabular instead of Markdown")
    args = parser.parse_args(argv)
    metrics = {folder: read_metrics(folder) for folder in args.evaluations}
    if len({content["settings"]["data"] for content in metrics.values()}) > 1:
        sys.exit(f"{args.evaluations[0]}: the evaluations are of different data; compare those of one test set")
    named = {Path(content["run"]).name: content for content in metrics.values()}
    print(format_latex(named) if args.latex else format_markdown(named))
    return 0


if __name__ == "__main__":
    sys.exit(main())
