"""Set evaluations side by side: one table of several models and the baselines.

Reads the metrics.json of each evaluation folder; all must be of the same data.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.interrupts import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()  # while the rest is imported

from common.cli import Parser, run_script, set_up_logging

EXAMPLE = """example:
  python evaluation/compare.py runs/demo-cae/evaluation runs/demo-dae/evaluation --latex"""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=EXAMPLE)
    parser.add_argument("evaluations", type=Path, nargs="+", help="evaluation folders of evaluate.py")
    parser.add_argument("--latex", action="store_true", help="a LaTeX tabular instead of Markdown")
    args = parser.parse_args(argv)
    set_up_logging(quiet=False)
    from evaluation.comparison import compare  # what it imports takes a second, which --help should not

    table, skipped = compare(args.evaluations, args.latex)
    print(table)
    return 3 if skipped else 0


if __name__ == "__main__":
    run_script(main)
