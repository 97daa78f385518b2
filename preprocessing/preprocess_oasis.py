"""Turn brain scans into axial slices for training and evaluation.

Takes the OASIS discs as downloaded, several other data sets, or any folder of .nii, .nii.gz, .hdr/.img and .mgz files
or DICOM series, and writes slices: upright, cropped around the brain, in [0, 1], split by subject. A folder with
train/, val/ and test/, and in these normal/ and abnormal/, gives splits and labels itself; otherwise a clinical table
or --label says which scans are normal. Scans that are done and unchanged are skipped, so the same command resumes an
interrupted run.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.interrupts import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()  # while the rest is imported

from common.cli import SEED, Parser, bounded, parse_axes, parse_flags, run_script, set_up_logging
from preprocessing.layouts import LAYOUTS
from preprocessing.scans import DIAGNOSES, LABELS, MODALITIES, SPLITS, STRIP
from preprocessing.subjects import parse_pattern

EXAMPLE = """examples:
  python preprocessing/preprocess_oasis.py --raw Dataset/demo/raw --processed Dataset/demo/processed
  python preprocessing/preprocess_oasis.py --raw OASIS-1 --clinical oasis_cross-sectional.csv --dry-run"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line's flags, checked."""
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--raw", type=Path, default=Path("Dataset"), help="folder with the scans")
    parser.add_argument("--processed", type=Path, default=Path("Dataset/processed"), help="folder the slices go to")
    parser.add_argument("--layout", choices=[*LAYOUTS], help="how the folder is laid out; left out: what fits best")
    parser.add_argument("--modality", choices=MODALITIES, default="t1", help="contrast to take")
    parser.add_argument(
        "--subject-pattern",
        type=parse_pattern,
        metavar="REGEX",
        help="finds the subject, in parentheses, in each path below --raw; left out: read from the names",
    )
    parser.add_argument(
        "--clinical", type=Path, help="clinical table (csv, tsv, xlsx, xls) with diagnoses, ages and sexes"
    )
    for label in DIAGNOSES:
        parser.add_argument(
            f"--{label}-values", nargs="+", metavar="VALUE", help=f"values of the table's diagnosis that mean {label}"
        )
    parser.add_argument(
        "--blank-cdr", choices=DIAGNOSES, help="label where the table's cell is empty; left out: do not use such scans"
    )
    parser.add_argument("--label", choices=LABELS, help="label of all scans, where there is no table")
    parser.add_argument(
        "--split",
        type=bounded(least=0, most=1),
        nargs=3,
        metavar=tuple(SPLITS),
        default=[0.8, 0.1, 0.1],
        help="shares of normal subjects",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="seed of the split")
    parser.add_argument(
        "--axes", type=parse_axes, help="where the stored axes point, if the header does not say, such as ASL"
    )
    parser.add_argument("--volume", type=bounded(int, least=0), help="which volume of files with several, from 0")
    parser.add_argument(
        "--lesion-labels",
        type=bounded(int, least=1),
        nargs="+",
        metavar="LABEL",
        help="labels that mean lesion in lesion masks; left out: all above 0",
    )
    share, side = bounded(above=0, most=1), bounded(int, least=16, most=1024, multiple_of=16)
    width = bounded(least=100, most=1000)
    parser.add_argument("--keep", type=share, default=0.7, help="share of axial slices kept, the middle ones, (0, 1]")
    parser.add_argument("--size", type=side, default=128, help="pixels along each side of a slice")
    parser.add_argument("--fov-mm", type=width, help="side of a slice in mm; left out: 200 for brains, 256 for heads")
    parser.add_argument(
        "--strip",
        choices=STRIP,
        default="auto",
        help="extract the brain: auto, of heads without a brain mask; never; or always, of every scan",
    )
    workers = bounded(int, least=1)
    parser.add_argument("--workers", type=workers, default=os.cpu_count(), help="scans processed at a time")
    parser.add_argument("--dask", metavar="tcp://HOST:PORT", help="work on the Dask cluster of this scheduler")
    parser.add_argument("--dry-run", action="store_true", help="list what would be done, file by file, and do nothing")
    parser.add_argument("--quiet", action="store_true", help="print only warnings and errors")
    parser.add_argument("--json", action="store_true", help="print dataset.json on standard output, nothing else")
    args = parse_flags(parser, argv)
    if abs(sum(args.split) - 1) > 1e-6:
        parser.error("--split takes three shares that sum to 1")
    if args.json and args.dry_run:
        parser.error("--json prints what was done and --dry-run does nothing; leave one out")
    if (args.normal_values or args.abnormal_values) and not args.clinical:
        parser.error("--normal-values and --abnormal-values need a table; give --clinical")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse(argv)
    from preprocessing.dataset import preprocess  # what it imports takes a second, which --help should not

    set_up_logging(args.quiet or args.json)
    code = preprocess(args)
    if args.json:
        print((args.processed / "dataset.json").read_text(encoding="utf-8"))
    return code


if __name__ == "__main__":
    run_script(main)
