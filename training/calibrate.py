"""Calibrate a trained model anew, on healthy scans of the scanner that it is to be used on.

Takes seconds and trains nothing: the weights stay, what healthy scans show is measured again. Ten scans or more, as
preprocess_oasis.py wrote them. Where nobody knows which scans are healthy, --unlabelled calibrates on a whole cohort.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

from common.cli import DataError, HelpFormatter, log, parse_flags, run_script, set_up_logging
from common.device import PRECISIONS, add_device_flag, choose_device, keep_freed_memory
from common.files import hold_folder
from models.anomaly import reconstruct
from models.calibration import Calibration, Compared, count_needed_scans
from models.checkpoint import load_model, save_checkpoint
from preprocessing.store import StoredScan, check_same_settings, list_scans
from preprocessing.subjects import key_subject

FEW_SCANS = 10
EXAMPLE = """example:
  python preprocessing/preprocess_oasis.py --raw OWN --label normal --split 0 1 0 --processed Dataset/own
  python training/calibrate.py --run runs/dae --data Dataset/own --out runs/dae-own"""


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


def load_run(run: Path, device: torch.device) -> tuple[torch.nn.Module, dict]:
    """`load_model` of the run; DataError where the content lacks what a new calibration needs."""
    path = run / "model.pt"
    model, content = load_model(path, device)
    missing = {"slices", "seen", "precision"} - content.keys()
    if missing:
        raise DataError(f"{path}: does not hold a model of this version ({', '.join(sorted(missing))}); train again")
    return model, content


def compare(model: torch.nn.Module, content: dict, scans: list[StoredScan], hide_bar: bool | None) -> list[Compared]:
    """Each scan with its reconstruction, as `Calibration.fit` takes them."""
    device, precision = next(model.parameters()).device, PRECISIONS[content["precision"]]
    compared = []
    for scan in tqdm(scans, desc="reconstructing", unit="scan", disable=hide_bar):
        stack, sampling_mm = torch.from_numpy(scan.read_stack()).float().to(device), scan.geometry.sampling_mm
        compared.append((stack, reconstruct(model, stack, sampling_mm[0], precision=precision), sampling_mm))
    return compared


def calibrate(args: argparse.Namespace, device: torch.device) -> None:
    """Write `out`/model.pt: the model of `run` with a new calibration."""
    if args.out.resolve() == args.run.resolve() or (args.out / "last.pt").exists():
        raise DataError(f"{args.out}: holds a training run; give another --out")
    model, content = load_run(args.run, device)
    scans = find_scans(args.data, args.unlabelled)
    check_same_settings(scans, content["slices"])
    seen = set(content["seen"])
    if known := sum(not seen.isdisjoint(scan.hashes) for scan in scans):
        log.warning("%d of these scans are known to the model; those that it was trained on look too normal", known)
    with hold_folder(args.out, "--out"):
        calibration = Calibration.fit(compare(model, content, scans, args.quiet or None), robust=args.unlabelled)
        content["calibration"] = calibration.to_state()
        content["seen"] = sorted(seen.union(*(scan.hashes for scan in scans)))
        save_checkpoint(args.out / "model.pt", content)
    log.info("calibrated on %d scans; model in %s", len(scans), args.out / "model.pt")
    if args.unlabelled:
        log.info("nobody says that these are healthy: p-values compare a scan with this cohort")
    for rate in (0.05, 0.1):
        if count_needed_scans(rate) > len(scans):
            log.info("a false-positive rate of %g needs %d scans", rate, count_needed_scans(rate))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=EXAMPLE, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, default=Path("runs/dae"), help="run folder of train.py")
    parser.add_argument("--data", type=Path, required=True, help="slices of preprocess_oasis.py, at any depth")
    parser.add_argument("--out", type=Path, required=True, help="folder of the newly calibrated model")
    parser.add_argument(
        "--unlabelled", action="store_true", help="take all scans, healthy or not; most of them must be"
    )
    add_device_flag(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress, nothing on standard output; errors remain")
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
