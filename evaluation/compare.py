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

from common.cli import DataError, HelpFormatter, run_script
from evaluation.table import format_latex, format_markdown

EXAMPLE = """example:
  python evaluation/compare.py runs/demo-cae/evaluation runs/demo-dae/evaluation --latex"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=EXAMPLE, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("evaluations", type=Path, nargs="+", help="evaluation folders of evaluate.py")
    parser.add_argument("--latex", action="store_true", help="a LaTeX tabular instead of Markdown")
    return parser


def read_metrics(folder: Path) -> dict:
    """metrics.json of a finished evaluation. DataError where there is none."""
    path = folder / "metrics.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no finished evaluation; run evaluation/evaluate.py first") from error


def name_metrics(folders: list[Path]) -> dict[str, dict]:
    """{run's name: metrics}; where two runs share a name, {evaluation folder: metrics}. DataError if data differ."""
    metrics = {folder: read_metrics(folder) for folder in folders}
    if len({content["settings"]["data"] for content in metrics.values()}) > 1:
        raise DataError(f"{folders[0]}: the evaluations are of different data; compare those of one test set")
    named = {Path(content["run"]).name: content for content in metrics.values()}
    return named if len(named) == len(metrics) else {str(folder): content for folder, content in metrics.items()}


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    named = name_metrics(args.evaluations)
    print(format_latex(named) if args.latex else format_markdown(named))
    return 0


if __name__ == "__main__":
    run_script(main)
