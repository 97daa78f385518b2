"""Train an autoencoder on the slices of healthy scans.

Reads `<data>/train/normal` and `<data>/val/normal` of each --data as preprocess_oasis.py wrote them; without the
latter, some subjects of train are set aside. Writes a run folder: the model, its log, curves and reconstructions. The
same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.interrupts import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()  # while the rest is imported

import numpy as np
import torch

from common import distributed
from common.cli import (
    SEED,
    DataError,
    Parser,
    bounded,
    explain,
    list_flags,
    log,
    parse_flags,
    read_commit,
    run_script,
    set_up_logging,
)
from common.device import add_device_flag, choose_device, choose_precision, fits_in_memory, keep_freed_memory
from common.files import hold_folder, write_atomically
from models.autoencoder import MODELS
from models.checkpoint import load_checkpoint, load_model
from preprocessing.cohort import refuse_copies, refuse_leaks
from preprocessing.store import StoredScan, check_same_settings, list_scans
from preprocessing.subjects import key_subject
from training.dataset import SliceDataset
from training.trainer import Trainer

DEFAULTS = {"dae": {"width": 64, "steps": 36000}, "cae": {"width": 32, "steps": 3000}}  # see docs/experiments.md
FROM_A_MODEL = {"steps": 4000, "lr": 3e-4}  # what it knows is to stay
NO_STATE = "is not the state of a training run; delete it to train again"
EXAMPLE = "example:\n  python training/train.py --data Dataset/processed --run runs/dae"


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
        raise DataError(f"{data / 'train' / 'normal'}: no slices; run preprocessing/preprocess_oasis.py first")
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
    """Train one run to its end, from the start or from its last saved step."""
    run = args.run
    scans = find_training_scans(args.data, config["val_fraction"], config["seed"])
    size = scans[0][0].size
    init = load_init(args.init, size)
    config["network"] = init["config"] if init else config["network"] | {"size": size}
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


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=EXAMPLE)
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[Path("Dataset/processed")], metavar="FOLDER",
        help="slices of preprocess_oasis.py; a folder for each scanner, which are drawn from equally often",
    )  # fmt: skip
    parser.add_argument("--run", type=Path, default=Path("runs/dae"), help="folder of this run")
    parser.add_argument(
        "--init", type=Path, metavar="RUN", help="start from the model of this run, such as models/pretrained, with "
        "its network; --model, --width, --depth and --latent then do nothing"
    )  # fmt: skip
    parser.add_argument("--model", choices=MODELS, default="dae", help="which autoencoder")
    count = bounded(int, least=1)
    parser.add_argument("--width", type=count, help="channels of the first level; left out: 64 for dae, 32 for cae")
    parser.add_argument("--depth", type=bounded(int, least=1, most=6), default=3, help="levels of the dae")
    parser.add_argument("--latent", type=count, default=64, help="numbers in the bottleneck of the cae")
    parser.add_argument(
        "--steps", type=count, help="optimiser steps, which the learning rate follows; left out: 36000 for dae, "
        "3000 for cae, 4000 with --init"
    )  # fmt: skip
    parser.add_argument("--batch-size", type=count, default=16, help="slices a step")
    parser.add_argument(
        "--lr", type=bounded(above=0), help="peak learning rate of Adam; left out: 0.001, or 0.0003 with --init"
    )
    share = bounded(above=0, below=1)
    parser.add_argument(
        "--val-fraction", type=share, default=0.1, help="share of subjects set aside where there is no val/normal"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="seed of weights, batches and corruption")
    add_device_flag(parser)
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where it is measured faster"
    )
    parser.add_argument(
        "--in-memory",
        action=argparse.BooleanOptionalAction,
        help="hold the slices in memory, or read them from disk; left out: in memory where they fit",
    )
    parser.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="give the same bytes each time on a GPU too, somewhat slower; on a CPU this is always so",
    )
    parser.add_argument("--quiet", action="store_true", help="print only warnings and errors")
    return parser


def configure(args: argparse.Namespace, device: torch.device) -> dict:
    """Everything that decides a run's result; its subjects and slice size are added once known."""
    defaults = DEFAULTS[args.model] | (FROM_A_MODEL if args.init else {"lr": 1e-3})
    width, steps, lr = (getattr(args, name) or defaults[name] for name in ("width", "steps", "lr"))
    network = {"model": args.model, "width": width}
    network |= {"depth": args.depth} if args.model == "dae" else {"latent": args.latent}
    return {
        "data": " ".join(map(str, args.data)), "network": network, "steps": steps, "batch_size": args.batch_size,
        "lr": lr, "init": args.init and str(args.init), "val_fraction": args.val_fraction, "seed": args.seed,
        "device": device.type, "precision": args.precision, "deterministic": args.deterministic,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parse_flags(parser, argv)
    device = choose_device(parser, args.device)
    set_up_logging(args.quiet)
    keep_freed_memory()
    with distributed.join(device) as device:
        if args.batch_size < distributed.world_size():
            raise DataError(f"--batch-size {args.batch_size} is less than one slice a process; raise it")
        torch.backends.cudnn.benchmark = not args.deterministic
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        train(configure(args, device), args, device)
    return 0


if __name__ == "__main__":
    run_script(main)
