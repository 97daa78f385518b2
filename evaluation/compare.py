"""Set evaluations side by side: one table of several models and the baselines.

Reads the metrics.json of each evaluation folder; all must be of the same data.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.interrupts import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()  # while the rest is imported

from common.cli import DataError, Parser, log, run_script, set_up_logging
from common.files import read_json
from evaluation.table import format_latex, format_markdown

EXAMPLE = """example:
  python evaluation/compare.py runs/demo-cae/evaluation runs/demo-dae/evaluation --latex"""


def read_metrics(folder: Path) -> dict:
    """metrics.json of a finished evaluation. DataError where there is none, or one that no table can be made of."""
    path = folder / "metrics.json"
    cure = "run evaluation/evaluate.py first"
    try:
        content = read_json(path, cure)
        content["settings"]["data"], Path(content["run"])  # there, or an error
        format_markdown({"": content})
    except FileNotFoundError as error:
        raise DataError(f"{path}: no finished evaluation; {cure}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: no finished evaluation of this version; {cure}") from error
    return content


def name_runs(metrics: dict[Path, dict]) -> dict[str, dict]:
    """{name: metrics}, no two alike: the run's name, its path, or where that is shared the evaluation's path."""
    for name in (lambda _, content: Path(content["run"]).name, lambda _, content: content["run"]):
        names = [name(folder, content) for folder, content in metrics.items()]
        if max(Counter(names).values()) == 1:
            return dict(zip(names, metrics.values(), strict=True))
    return {str(folder): content for folder, content in metrics.items()}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=EXAMPLE)
    parser.add_argument("evaluations", type=Path, nargs="+", help="evaluation folders of evaluate.py")
    parser.add_argument("--latex", action="store_true", help="a LaTeX tabular instead of Markdown")
    args = parser.parse_args(argv)
    set_up_logging(quiet=False)
    folders = {os.path.abspath(folder): folder for folder in args.evaluations}  # each once
    metrics = {}
    for folder in folders.values():
        try:
            metrics[folder] = read_metrics(folder)
        except DataError as error:
            if len(folders) == 1:
                raise
            log.warning("skipped %s", error)
    if not metrics:
        raise DataError(f"{args.evaluations[0]}: none of the {len(folders)} evaluations can be read; see above")
    if len({content["settings"]["data"] for content in metrics.values()}) > 1:
        raise DataError(f"{args.evaluations[0]}: the evaluations are of different data; compare those of one test set")
    print((format_latex if args.latex else format_markdown)(name_runs(metrics)))
    return 3 if len(metrics) < len(folders) else 0


if __name__ == "__main__":
    run_script(main)
