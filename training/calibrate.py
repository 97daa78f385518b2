"""Take a trained model to another scanner, by healthy scans of it: ten or more, as preprocess_oasis.py wrote them.

The model is trained on them for a minute, and what healthy scans show is measured anew. Where it is not known which
scans are healthy, --unlabelled takes a whole cohort: most of most scans is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.interrupts import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()  # while the rest is imported

from common.cli import Parser, add_device_flag, bounded, check_run, parse_flags, run_script, set_up_logging

EXAMPLE = """example:
  python preprocessing/preprocess_oasis.py --raw OWN --label normal --split 0 1 0 --processed Dataset/own
  python training/calibrate.py --data Dataset/own --out runs/own"""


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=EXAMPLE)
    parser.add_argument("--run", type=Path, help="run folder of train.py; left out: the model that ships")
    parser.add_argument("--data", type=Path, required=True, help="slices of preprocess_oasis.py, at any depth")
    parser.add_argument("--out", type=Path, required=True, help="folder of the newly calibrated model")
    parser.add_argument(
        "--unlabelled", action="store_true", help="take all scans, healthy or not; most of them must be"
    )
    parser.add_argument(
        "--steps",
        type=bounded(int, least=0),
        help="optimiser steps on these scans; left out: 300; 0: none, only measure",
    )
    add_device_flag(parser)
    parser.add_argument("--quiet", action="store_true", help="print only warnings and errors")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parse_flags(parser, argv)
    check_run(parser, args.run, args.data)
    from common.device import choose_device  # torch takes seconds to load, which --help should not
    from training.adaptation import calibrate

    device = choose_device(parser, args.device)
    set_up_logging(args.quiet)
    calibrate(args, device)
    return 0


if __name__ == "__main__":
    run_script(main)
