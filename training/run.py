"""A training run, from its folders of slices to model.pt: which scans, from which state, with which settings."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from common import distributed
from common.cli import DataError, explain, list_flags, log, read_commit
from common.device import choose_precision, fits_in_memory, keep_freed_memory
from common.files import hold_folder, write_atomically
from models.autoencoder import MODELS
from models.checkpoint import load_checkpoint, load_model
from preprocessing.cohort import explain_no_slices, refuse_copies, refuse_leaks
from preprocessing.store import StoredScan, check_same_settings, list_scans
from preprocessing.subjects import key_subject
from training.dataset import SliceDataset
from training.optimiser import OPTIMISERS
from training.trainer import Trainer

NO_STATE = "is not the state of a training run; delete it to train again"


def find_training_scans(
    folders: Sequence[Path], val_fraction: float, seed: int
) -> tuple[list[StoredScan], list[StoredScan]]:
    """(training scans, validation scans) of one scanner's folder after the other, all normal. DataError for none.

    No subject of a folder and no scan at all is on two sides; subjects of two folders are two, whatever their names.
    """
    parts = [split_scans(data, val_fraction, seed) for data in folders]
    refuse_copies((split, scan) for part in parts for split, scans in part.items() for scan in scans)
    train, validation = ([scan for part in parts for scan in part[split]] for split in ("train", "val"))
    check_same_settings(train + validation)
    return train, validation


def split_scans(data: Path, val_fraction: float, seed: int) -> dict[str, list[StoredScan]]:
    """The scans to train on, validate with and test on later in one folder of the store, no subject on two sides.

    val_fraction and seed choose the subjects set aside where the store holds no validation scans.
    """
    abnormal = next(list_scans(data / "train" / "abnormal"), None)
    if abnormal:
        raise DataError(f"{abnormal.folder}: is abnormal, but among the training scans; move it to {data / 'test'}")
    train = list(list_scans(data / "train" / "normal"))
    if not train:
        raise DataError(explain_no_slices(data, ["train/normal"]))
    validation = list(list_scans(data / "val" / "normal"))
    if not validation:
        subjects = sorted({key_subject(scan.subject): scan.subject for scan in train}.values())  # each in one spelling
        if len(subjects) < 2:
            raise DataError(f"{data / 'train'}: only one subject; add another, since one is needed for validation")
        count = min(max(1, round(val_fraction * len(subjects))), len(subjects) - 1)
        held_out = {key_subject(subject) for subject in np.random.default_rng(seed).permutation(subjects)[:count]}
        validation = [scan for scan in train if key_subject(scan.subject) in held_out]
        train = [scan for scan in train if key_subject(scan.subject) not in held_out]
    splits = {"train": train, "val": validation, "test": list(list_scans(data / "test"))}
    refuse_leaks((scan.subject, split, str(scan.folder)) for split, scans in splits.items() for scan in scans)
    return splits


def list_subjects(scans: list[StoredScan], by_folder: bool) -> list[str]:
    """The subjects' names, rising; behind that of their folder where there are several."""
    return sorted({f"{scan.folder.parents[2]}/{scan.subject}" if by_folder else scan.subject for scan in scans})


def load_state(run: Path, config: dict) -> dict | None:
    """The content of a run's last.pt, None where there is none; DataError if it began with another configuration."""
    if not (run / "last.pt").exists():
        return None
    state = load_checkpoint(run / "last.pt")
    kept = state.get("config")
    if not isinstance(kept, dict):
        raise DataError(f"{run / 'last.pt'}: {NO_STATE}")
    changed = [key for key in config if kept.get(key) != config[key] and (key, config[key]) != ("precision", "auto")]
    if changed:
        changed = ", ".join(changed)
        raise DataError(f"{run}: was trained with other settings ({changed}); give another --run, or delete this one")
    return state


def load_init(run: Path | None, size: int) -> dict | None:
    """The content of the model.pt to start from; DataError where it is none, or of slices of another size."""
    if run is None:
        return None
    _, content = load_model(run / "model.pt")
    if content["config"]["size"] != size:
        raise DataError(
            f"{run / 'model.pt'}: takes slices of {content['config']['size']} pixels and these have {size}; preprocess "
            f"again with --size {content['config']['size']}"
        )
    return content


def settle_precision(asked: str, state: dict | None, device: torch.device) -> str:
    """bf16 or fp32: as asked, as the run began, or what is faster on this device."""
    if state:
        precision, why = state["config"]["precision"], "as this run began"
    elif asked == "auto":
        precision, why = distributed.broadcast(choose_precision(device))
    else:
        precision, why = asked, "as asked for"
    log.info("%s on %s: %s", precision, device.type, why)
    return precision


def train(config: dict, args: argparse.Namespace, device: torch.device) -> None:
    """Train a run to its end, in each of the processes that torchrun started.

    config  everything that decides the result; its subjects and slice size are added once known
    args    the flags of train.py, for what does not
    """
    keep_freed_memory()
    with distributed.join(device) as device:
        if args.batch_size < distributed.world_size():
            raise DataError(f"--batch-size {args.batch_size} is less than one slice a process; raise it")
        torch.backends.cudnn.benchmark = not args.deterministic
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        start_or_resume(config, args, device)


def start_or_resume(config: dict, args: argparse.Namespace, device: torch.device) -> None:
    """Train one run to its end, from the start or from its last saved step."""
    run = args.run
    scans = find_training_scans(args.data, config["val_fraction"], config["seed"])
    size = scans[0][0].size
    init = load_init(args.init, size)
    config["network"] = init["config"] if init else config["network"] | {"size": size}
    config["optimiser"] = config["optimiser"] or OPTIMISERS[config["network"]["model"]]
    if (coarsest := 4 * 2 ** (config["network"].get("depth", 1) - 1)) > size or size % coarsest:
        raise DataError(
            f"--depth {config['network']['depth']}: {size} pixels, the side of a slice, is not a multiple of {coarsest}"
        )
    config["train_subjects"], config["val_subjects"] = (
        list_subjects(part, by_folder=len(args.data) > 1) for part in scans
    )
    with hold_folder(run, "--run") if distributed.is_main() else nullcontext():
        state = distributed.broadcast(load_state(run, config) if distributed.is_main() else None)
        if state and (run / "model.pt").exists():
            log.info("%s is trained already (%d steps); delete it to train again", run, config["steps"])
            return
        config["precision"] = settle_precision(config["precision"], state, device)
        try:
            trainer = start(config, args, scans, device, init)
            if state:
                try:
                    trainer.resume(state)
                except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                    raise DataError(f"{run / 'last.pt'}: {NO_STATE}") from error
                log.info("resuming at step %d of %d", trainer.step, config["steps"])
            trainer.fit()
            if distributed.is_main():
                trainer.finish()
        except OSError as error:  # of writing: those of reading are DataErrors
            raise DataError(
                f"{error.filename or run}: cannot be written ({explain(error)}); last.pt is whole if there is one; "
                "free space or give another --run"
            ) from error
        best = trainer.best
        log.info("best validation loss %.6f at step %d; model in %s", best["val_loss"], best["step"], run / "model.pt")


def start(
    config: dict,
    args: argparse.Namespace,
    scans: tuple[list[StoredScan], list[StoredScan]],
    device: torch.device,
    init: dict | None,
) -> Trainer:
    """Write config.json, read the slices of the (training, validation) scans, and build the model."""
    if init and (known := sum(not set(init["seen"]).isdisjoint(scan.hashes) for scan in scans[1])):
        log.warning(
            "%d validation scans are known to the model of --init, so new scans may be flagged too often", known
        )
    if distributed.is_main():
        about = {"flags": list_flags(args), "commit": read_commit()}
        about |= {"torch": torch.__version__, "python": platform.python_version()}
        write_atomically(args.run / "config.json", json.dumps(config | about, indent=1).encode())
    count = sum(len(scan.indices) for part in scans for scan in part)
    fits, why = fits_in_memory(count, scans[0][0].size, device)
    in_memory = fits if args.in_memory is None else args.in_memory
    log.info("slices %s: %s", "held in memory" if in_memory else "read from disk ahead of need", why)
    name = config["network"]["model"]
    datasets = [SliceDataset(part, in_memory, device, MODELS[name].neighbour_offsets) for part in scans]
    trainer = Trainer(config, *datasets, args.run, args.quiet, init)
    weights = sum(parameter.numel() for parameter in trainer.model.parameters())
    log.info(
        "%s (%.1f M weights): %d slices of %d subjects, validation on %d slices of %d subjects, %d steps",
        *(name, weights / 1e6, len(datasets[0]), len(config["train_subjects"])),
        *(len(datasets[1]), len(config["val_subjects"]), config["steps"]),
    )
    return trainer
