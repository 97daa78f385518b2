"""Takes a trained model to another scanner: a few steps of training on its scans, then a calibration on them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset
from tqdm import trange

from common.cli import DataError, log
from common.device import fits_in_memory, keep_freed_memory
from common.files import hold_folder
from models.autoencoder import MODELS
from models.calibration import Calibration, count_needed_scans
from models.checkpoint import PRETRAINED, load_model, save_checkpoint
from preprocessing.cohort import explain_no_slices
from preprocessing.scans import LABELS
from preprocessing.store import StoredScan, check_same_settings, list_scans
from preprocessing.subjects import key_subject
from training.dataset import SliceDataset
from training.optimiser import OPTIMISERS
from training.trainer import Trainer

FEW_SCANS = 10
STEPS = 300
BATCH_SIZE = 32
PEAK_LEARNING_RATE = 6e-4  # a third of that of a training: what the model knows is to stay


def calibrate(args: argparse.Namespace, device: torch.device) -> None:
    """Write `out`/model.pt: the model of a run, adapted to these scans and calibrated on them. args: calibrate.py's."""
    run, steps = args.run or PRETRAINED, STEPS if args.steps is None else args.steps
    if args.out.resolve() == run.resolve() or (args.out / "last.pt").exists():
        raise DataError(f"{args.out}: holds a training run; give another --out")
    keep_freed_memory()
    content = load_run(run, device)
    scans = find_scans(args.data, args.unlabelled)
    check_same_settings(scans, content["slices"])
    seen = set(content["seen"])
    if known := sum(not seen.isdisjoint(scan.hashes) for scan in scans):
        log.warning("%d of these scans are known to the model; those that it was trained on look too normal", known)
    with hold_folder(args.out, "--out"):
        content = adapt(content, scans, steps, device, robust=args.unlabelled, quiet=args.quiet)
        save_checkpoint(args.out / "model.pt", content)
    log.info("calibrated on %d scans; model in %s", len(scans), args.out / "model.pt")
    if args.unlabelled:
        log.info("it is not known that these scans are healthy: p-values compare a scan with this cohort")
    for rate in (0.05, 0.1):
        if count_needed_scans(rate) > len(scans):
            log.info("a false-positive rate of %g needs %d scans", rate, count_needed_scans(rate))


def find_scans(data: Path, unlabelled: bool) -> list[StoredScan]:
    """The scans to calibrate on: those under normal/, or all of a cohort. DataError for fewer than two subjects."""
    scans = [scan for scan in list_scans(data) if unlabelled or scan.label == "normal"]
    if not scans:
        raise DataError(explain_no_slices(data, LABELS if unlabelled else ["normal"]))
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


def adapt(
    content: dict,
    scans: list[StoredScan],
    steps: int,
    device: torch.device,
    *,
    robust: bool = False,
    quiet: bool = False,
) -> dict:
    """The content of a model.pt with weights that were trained on these scans, and a calibration by them.

    Scans that a model was trained on look more normal than new ones. So two more models are trained, each on one half
    of the subjects, and the calibration is of what each makes of the other half (cross-conformal prediction: Vovk,
    2015). A single subject has only itself.

    steps   of the optimiser, for each of the three; with 0 the weights stay as they are
    robust  see `Calibration.fit`
    """

    def train(on: list[StoredScan], compare: list[StoredScan], what: str) -> Trainer:
        return _train(content, on, compare, steps, device, None if quiet else what)

    trainer = train(scans, scans, "adapting")
    halves = halve(scans)
    if steps and all(halves):
        one, other = (train(*pair, "adapting to a half") for pair in (halves, halves[::-1]))
        compared = ConcatDataset([one.compare_validation(), other.compare_validation()])
    else:
        compared = trainer.compare_validation()
    seen = {*content["seen"], *(key for scan in scans for key in scan.hashes)}
    calibration = Calibration.fit(compared, robust).to_state()
    return content | {"weights": trainer.model.state_dict(), "calibration": calibration, "seen": sorted(seen)}


def halve(scans: list[StoredScan]) -> list[list[StoredScan]]:
    """Two parts of the scans, all of a subject in one; the second is empty where there is one subject."""
    subjects = sorted({key_subject(scan.subject) for scan in scans})
    return [[scan for scan in scans if key_subject(scan.subject) in subjects[side::2]] for side in (0, 1)]


def _train(
    content: dict, scans: list[StoredScan], compare: list[StoredScan], steps: int, device: torch.device, bar: str | None
) -> Trainer:
    """A trainer whose model, that of a model.pt, was trained on some scans; others are its validation scans."""
    config = {
        "network": content["config"], "precision": content["precision"],
        "steps": steps, "batch_size": BATCH_SIZE, "lr": PEAK_LEARNING_RATE, "seed": 0,
        "optimiser": OPTIMISERS[content["config"]["model"]],
    }  # fmt: skip
    offsets = MODELS[content["config"]["model"]].neighbour_offsets
    slices = []
    for part in (scans, compare):
        in_memory, _ = fits_in_memory(sum(len(scan.indices) for scan in part), part[0].size, device)
        slices.append(SliceDataset(part, in_memory, device, offsets))
    trainer = Trainer(config, *slices, Path(), quiet=bar is None, init=content)
    trainer.model.train()
    pairs = trainer.read_pairs()
    for _ in trange(steps, desc=bar, unit="step", disable=bar is None or None):
        trainer.train_step(*next(pairs))
    trainer.model.eval()
    return trainer
