"""Make a small cohort of simulated T1 brain scans, healthy and with lesions.

Nothing is downloaded and no patient is involved: the scans are simulated from the MNI152 template that nilearn brings.
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

from common.cli import SEED, Parser, bounded, log, run_script, set_up_logging

EXAMPLE = """example:
  python preprocessing/demo_cohort.py --raw Dataset/demo/raw --voxel-size 1.5 --seed 1"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line's flags, checked."""
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--raw", type=Path, default=Path("Dataset/demo"), help="folder the scans go to")
    scans = bounded(int, least=0)
    parser.add_argument("--train", type=scans, default=24, help="healthy scans to train on")
    parser.add_argument("--val", type=scans, default=20, help="healthy scans to validate on")
    parser.add_argument("--test-normal", type=scans, default=8, help="healthy scans to test on")
    parser.add_argument("--test-abnormal", type=scans, default=8, help="scans with a lesion to test on")
    voxel_size = bounded(least=0.8, most=8)
    parser.add_argument("--voxel-size", type=voxel_size, default=2.0, help="mm, 0.8 to 8; scans vary around it")
    parser.add_argument("--workers", type=int, default=-1, help="processes; -1 is one for each core")
    parser.add_argument("--seed", type=SEED, default=0, help="the same seed makes the same bytes")
    args = parser.parse_args(argv)
    if args.workers == 0:
        parser.error("--workers is not 0")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse(argv)
    from preprocessing.simulated_cohort import CohortSettings, make_cohort  # takes a second, which --help should not

    set_up_logging(quiet=False)
    numbers = (args.train, args.val, args.test_normal, args.test_abnormal)
    made, there = make_cohort(args.raw, CohortSettings(*numbers, args.voxel_size, args.seed), args.workers)
    log.info(f"made {made} scans; {there} made earlier with the same settings were kept")
    log.info(f"scans are in {args.raw}; they are simulated from the MNI152 template and are not patients")
    return 0


if __name__ == "__main__":
    run_script(main)
