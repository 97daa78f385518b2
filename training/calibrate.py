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

import torch

from common.cli import DataError, Parser, bounded, log, parse_flags, run_script, set_up_logging
from common.device import add_device_flag, choose_device, keep_freed_memory
from common.files import hold_folder
from models.calibration import count_needed_scans
from models.checkpoint import PRETRAINED, load_model, save_checkpoint
from preprocessing.store import StoredScan, check_same_settings, list_scans
from preprocessing.subjects import key_subject
from training.adaptation import STEPS, adapt

FEW_SCANS = 10
EXAMPLE = """example:
  python preprocessing/preprocess_oasis.py --raw OWN --label normal --split 0 1 0 --processed Dataset/own
  python training/calibrate.py --data Dataset/own --out runs/own"""


def find_scans(data: Path, unlabelled: bool) -> list[StoredScan]:
    """The scans to calibrate on: those under normal/, or all of a cohort. DataError for fewer than two subjects."""
    scans = [scan for scan in list_scans(data) if unlabelled or scan.label == "normal"]
    subjects = len({key_subject(scan.subject) for scan in scans})
    if subjects < 2:
        kind = "" if unlabelled else "normal "
        raise DataError(f"{data}: holds {kind}scans of {subjects} subjects; give those of {FEW_SCANS} or more")
    if len(scans) < FEW_SCANS:
        log.warning("%d scans are few to calibrate on; give %d or more", len(scans), FEW_SCANS)
    return scans


def load_run(run: Path, device: torch.device) -> dict:
    """The content of the run's model.pt; DataError where it lacks what a new calibration needs."""
    path = run / "model.pt"
    _, content = load_model(path, device)
    missing = {"slices", "seen", "precision"} - content.keys()
    if missing:
        raise DataError(f"{path}: does not hold a model of this version ({', '.join(sorted(missing))}); train again")
    return content


def calibrate(args: argparse.Namespace, device: torch.device) -> None:
    """Write `out`/model.pt: the model of `run`, adapted to these scans and calibrated on them."""
    if args.out.resolve() == args.run.resolve() or (args.out / "last.pt").exists():
        raise DataError(f"{args.out}: holds a training run; give another --out")
    content = load_run(args.run, device)
    scans = find_scans(args.data, args.unlabelled)
    check_same_settings(scans, content["slices"])
    seen = set(content["seen"])
    if known := sum(not seen.isdisjoint(scan.hashes) for scan in scans):
        log.warning("%d of these scans are known to the model; those that it was trained on look too normal", known)
    with hold_folder(args.out, "--out"):
        content = adapt(content, scans, args.steps, device, robust=args.unlabelled, quiet=args.quiet)
        save_checkpoint(args.out / "model.pt", content)
    log.info("calibrated on %d scans; model in %s", len(scans), args.out / "model.pt")
    if args.unlabelled:
        log.info("it is not known that these scans are healthy: p-values compare a scan with this cohort")
    for rate in (0.05, 0.1):
        if count_needed_scans(rate) > len(scans):
            log.info("a false-positive rate of %g needs %d scans", rate, count_needed_scans(rate))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=EXAMPLE)
    parser.add_argument(
        "--run", type=Path, default=PRETRAINED, help="run folder of train.py; left out: the model that ships"
    )
    parser.add_argument("--data", type=Path, required=True, help="slices of preprocess_oasis.py, at any depth")
    parser.add_argument("--out", type=Path, required=True, help="folder of the newly calibrated model")
    parser.add_argument(
        "--unlabelled", action="store_true", help="take all scans, healthy or not; most of them must be"
    )
    parser.add_argument(
        "--steps",
        type=bounded(int, least=0),
        default=STEPS,
        help="optimiser steps on these scans; 0: none, only measure",
    )
    add_device_flag(parser)
    parser.add_argument("--quiet", action="store_true", help="print only warnings and errors")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parse_flags(parser, argv)
    device = choose_device(parser, args.device)
    set_up_logging(args.quiet)
    keep_freed_memory()
    calibrate(args, device)
    return 0


if __name__ == "__main__":
    run_script(main)
