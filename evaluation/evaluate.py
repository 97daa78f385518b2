"""Score scans by how badly the model reconstructs them, and show where.

Of a test set, `<data>/{normal,abnormal}` as preprocess_oasis.py wrote it, leaves an evaluation folder: report.html,
scores.csv (slices), scans.csv, regions.csv, lesions.csv, metrics.json, a table, figures, panels and montages, and NIfTI
maps with --maps or --bids. With --scan FILE goes from a scan's file straight to its score, p-value, regions and maps.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.interrupts import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()  # while the rest is imported

from common.cli import (
    Parser,
    add_device_flag,
    bounded,
    check_run,
    list_flags,
    log,
    parse_axes,
    parse_flags,
    run_script,
    set_up_logging,
)
from preprocessing.scans import ENDINGS, STRIP

if TYPE_CHECKING:
    from evaluation.predictor import Predictor

HOME = Path("runs/pretrained")  # where what the model that ships finds is left
EXAMPLE = """examples:
  python evaluation/evaluate.py --run runs/dae --data Dataset/processed/test --maps
  python evaluation/evaluate.py --scan patient_T1w.nii.gz"""


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=EXAMPLE)
    parser.add_argument("--run", type=Path, help="run folder of train.py; left out: the model that ships")
    stores = "slices: normal/, abnormal/, unlabelled/"
    parser.add_argument("--data", type=Path, default=Path("Dataset/processed/test"), help=stores)
    parser.add_argument(
        "--scan",
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="scan files, or folders of a DICOM series, to predict instead of --data",
    )
    parser.add_argument(
        "--brain-mask",
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="a brain mask for each --scan, in the same order",
    )
    parser.add_argument(
        "--strip",
        choices=STRIP,
        default="auto",
        help="extract the brain of a --scan: auto, where it shows the head and has no mask; never; always",
    )
    parser.add_argument(
        "--axes", type=parse_axes, help="where a scan's axes point, if its header does not say, such as ASL"
    )
    parser.add_argument("--series", type=bounded(int, least=0), help="which DICOM series of a folder with several")
    parser.add_argument("--volume", type=bounded(int, least=0), help="which volume of a --scan with several, from 0")
    parser.add_argument(
        "--out",
        type=Path,
        help="output folder; left out: evaluation/, or scans/ for --scan, in runs/pretrained or --run",
    )
    on_or_off = argparse.BooleanOptionalAction
    parser.add_argument(
        "--maps", action=on_or_off, default=False, help="write each scan's maps as NIfTI on its own grid"
    )
    parser.add_argument("--bids", action=on_or_off, default=False, help="write the maps as a BIDS derivative in bids/")
    parser.add_argument(
        "--panels", type=parse_panels, default="worst", help="slices drawn of each scan: worst, all or how many"
    )
    parser.add_argument("--lesions", type=Path, help="csv with the columns scan and kind: detection by kind of lesion")
    parser.add_argument(
        "--false-positive-rate",
        "--false-alarms",
        type=bounded(above=0, below=1),
        default=0.05,
        metavar="RATE",
        help="share of normal scans that may be flagged",
    )
    parser.add_argument("--smallest-ml", type=bounded(least=0), default=0.1, help="smallest region listed, ml")
    parser.add_argument("--batch-size", type=bounded(int, least=1), default=32, help="slices reconstructed at a time")
    add_device_flag(parser)
    workers = bounded(int, least=1)
    parser.add_argument("--workers", type=workers, default=os.cpu_count(), help="scans of --data predicted at a time")
    parser.add_argument("--dask", metavar="tcp://HOST:PORT", help="work on the Dask cluster of this scheduler")
    parser.add_argument("--quiet", action="store_true", help="print only warnings and errors")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output, nothing else")
    return parser


def parse_panels(text: str) -> str:
    """worst, all or a number, as argparse wants it."""
    if text not in ("worst", "all") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: give worst, all or a number of slices")
    return text


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the script as wrong usage does where flags do not go together."""
    check_run(parser, args.run, args.data)
    if args.brain_mask and len(args.brain_mask) != len(args.scan or ()):
        parser.error("--brain-mask takes one mask for each --scan")
    if args.scan and args.bids:
        parser.error("--bids is for --data; --scan leaves plain maps")
    for path in args.scan or ():
        if not path.name.lower().endswith(ENDINGS) and not path.is_dir():
            takes = f"{', '.join(ENDINGS)} and folders of a DICOM series"
            parser.error(f"{path}: does not have the name of a scan; --scan takes {takes}")
    if args.series is not None and not any(path.is_dir() for path in args.scan or ()):
        parser.error("--series chooses from a folder of DICOM files; give that with --scan")


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parse_flags(parser, argv)
    check_flags(parser, args)
    from common.device import choose_device, keep_freed_memory  # torch takes seconds to load, which --help should not
    from evaluation.predictor import Predictor
    from models.checkpoint import PRETRAINED

    device = choose_device(parser, args.device)
    set_up_logging(args.quiet or args.json)
    keep_freed_memory()
    run = args.run or Path(os.path.relpath(PRETRAINED))
    if not args.run:
        log.info("with the model that ships (%s); --run takes another", run)
    predictor = Predictor.load(
        run / "model.pt",
        device,
        batch_size=args.batch_size,
        false_positive_rate=args.false_positive_rate,
        smallest_ml=args.smallest_ml,
    )
    code, content = (evaluate_files if args.scan else evaluate_test_set)(args, run, predictor)
    if args.json:
        print(json.dumps(content, indent=1))
    return code


def evaluate_files(args: argparse.Namespace, run: Path, predictor: Predictor) -> tuple[int, dict]:
    """Predict the files of --scan; returns (exit code, what was found)."""
    from evaluation.single_scan import ScanFiles, predict_files

    out = args.out or (args.run or HOME) / "scans"
    files = list(zip(args.scan, args.brain_mask or [None] * len(args.scan), strict=True))
    bar = args.json and not args.quiet  # verdicts show the progress where they are printed
    scans = ScanFiles(files, out, args.axes, args.volume, bar, args.strip, args.series)
    code, content = predict_files(scans, predictor)
    return code, {"run": str(run)} | content


def evaluate_test_set(args: argparse.Namespace, run: Path, predictor: Predictor) -> tuple[int, dict]:
    """Evaluate the slices of --data; returns (exit code, what metrics.json says)."""
    from evaluation.test_set import TestSet, evaluate

    test_set = TestSet(
        run=run,
        data=args.data,
        out=args.out or (args.run or HOME) / "evaluation",
        maps=args.maps,
        bids=args.bids,
        panels=args.panels,
        lesions=args.lesions,
        device=args.device,
        workers=args.workers,
        dask=args.dask,
        quiet=args.quiet,
        flags=list_flags(args),
    )
    return evaluate(test_set, predictor)


if __name__ == "__main__":
    run_script(main)
