"""Fit an autoencoder on normal slices.

Reads `<data>/train/normal` (and `<data>/val/normal`; without it some subjects of train are set aside) as
preprocess_oasis.py wrote them, and leaves a run folder with the model, its log, curves and reconstructions.
The same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from common import distributed
from common.cli import list_flags, parse_flags, silence
from common.device import choose_precision, fits_in_memory, keep_freed_memory
from common.files import write_atomically
from models.autoencoder import MODELS
from models.checkpoint import CheckpointError, load_checkpoint
from preprocessing.scans import DataError, refuse_leaks
from preprocessing.slices import ScanSlices, check_same_settings, hold_folder, list_scans
from training.trainer import Trainer

PROJECT = Path(__file__).resolve().parents[1]
DEFAULTS = {"dae": {"width": 64, "steps": 50000}, "cae": {"width": 32, "steps": 3000}}  # measured in EXPERIMENTS.md


def find_training_scans(data: Path, val_fraction: float, seed: int) -> tuple[list[ScanSlices], list[ScanSlices]]:
    """(training scans, validation scans), all normal, no subject on both sides. DataError where that cannot be had."""
    abnormal = next(list_scans(data / "train" / "abnormal"), None)
    if abnormal:
        raise DataError(f"{abnormal.folder}: an abnormal scan among the training scans; move it to {data / 'test'}")
    train = list(list_scans(data / "train" / "normal"))
    if not train:
        raise DataError(f"{data / 'train' / 'normal'}: no slices; run preprocessing/preprocess_oasis.py first")
    validation = list(list_scans(data / "val" / "normal"))
    if not validation:
        subjects = sorted({scan.subject for scan in train})
        if len(subjects) < 2:
            raise DataError(f"{data / 'train'}: only one subject; add scans of others, one is needed for validation")
        count = max(1, round(val_fraction * len(subjects)))
        held_out = set(np.random.default_rng(seed).permutation(subjects)[:count])
        validation = [scan for scan in train if scan.subject in held_out]
        train = [scan for scan in train if scan.subject not in held_out]
    test = list_scans(data / "test")
    refuse_leaks(
        (scan.subject, split, str(scan.folder))
        for split, scans in (("train", train), ("val", validation), ("test", test))
        for scan in scans
    )
    check_same_settings(train + validation)
    return train, validation


def read_commit() -> str:
    """The checkout's commit, "-dirty" behind it where files differ from it; "" outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def load_state(run: Path, config: dict) -> dict | None:
    """What last.pt holds of this training, None where there is none yet; fills in the precision that it began with.

    DataError where the folder's training has another configuration.
    """
    if not (run / "last.pt").exists():
        return None
    state = load_checkpoint(run / "last.pt")
    if config["precision"] == "auto":
        config["precision"] = state["config"]["precision"]
    if state["config"] != config:
        changed = ", ".join(key for key in config if state["config"].get(key) != config[key])
        raise DataError(f"{run}: was trained with other settings ({changed}); give another --run, or delete this one")
    return state


def train(config: dict, args: argparse.Namespace, device: torch.device) -> None:
    """Train one run to its end, from the start or from where it was."""
    data, run, in_memory = args.data, args.run, args.in_memory  # None: decided by their size
    train_scans, validation_scans = find_training_scans(data, config["val_fraction"], config["seed"])
    size = config["network"]["size"] = train_scans[0].size
    config["train_subjects"] = sorted({scan.subject for scan in train_scans})
    config["val_subjects"] = sorted({scan.subject for scan in validation_scans})
    asked = config["precision"]
    with hold_folder(run, "--run") if distributed.is_main() else nullcontext():
        state = distributed.broadcast(load_state(run, config) if distributed.is_main() else None)
        if state and (run / "model.pt").exists():
            say(f"{run} is trained already ({config['steps']} steps); delete it to train again")
            return
        if state:
            config["precision"], why = state["config"]["precision"], "as this training began"
        elif asked == "auto":
            config["precision"], why = distributed.broadcast(choose_precision(device))
        else:
            why = "as asked for"
        say(f"{config['precision']} on {device.type}: {why}")
        count = sum(len(scan.indices) for scan in train_scans + validation_scans)
        fits, why = fits_in_memory(count, size, device)
        in_memory = fits if in_memory is None else in_memory
        say(f"slices {'held in memory' if in_memory else 'read from disk ahead of need'}: {why}")
        try:
            if distributed.is_main():
                about = {"flags": list_flags(args), "commit": read_commit()}
                about |= {"torch": torch.__version__, "python": platform.python_version()}
                write_atomically(run / "config.json", json.dumps(config | about, indent=1).encode())
            trainer = Trainer(config, train_scans, validation_scans, device, in_memory, args.quiet)
            if state:
                trainer.load(state)
                say(f"going on at step {trainer.step} of {config['steps']}")
            parameters = sum(p.numel() for p in trainer.model.parameters())
            say(
                f"{config['network']['model']} ({parameters / 1e6:.1f} M weights): {len(trainer.train)} slices of "
                f"{len(config['train_subjects'])} subjects, validation on {len(trainer.validation)} slices of "
                f"{len(config['val_subjects'])} subjects, {config['steps']} steps"
            )
            trainer.fit(run)
            if distributed.is_main():
                trainer.finish(run)
        except OSError as error:  # those of reading name their file and are DataErrors
            raise DataError(
                f"{run}: cannot be written ({error}); free some space or give another --run; last.pt is whole, "
                "the same command goes on from it"
            ) from error
        best = trainer.best
        say(f"best validation loss {best['val_loss']:.6f} at step {best['step']}; model in {run / 'model.pt'}")


def say(text: str) -> None:
    """Print a line, once whatever the number of processes."""
    if distributed.is_main():
        print(text, flush=True)


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=formatter)
    parser.add_argument("--data", type=Path, default=Path("Dataset/processed"), help="slices of preprocess_oasis.py")
    parser.add_argument("--run", type=Path, default=Path("runs/dae"), help="folder of this training")
    parser.add_argument("--model", choices=MODELS, default="dae", help="which autoencoder")
    parser.add_argument("--width", type=int, help="channels of the first level; left out: 64 for dae, 32 for cae")
    parser.add_argument("--depth", type=int, default=3, help="levels of the dae")
    parser.add_argument("--latent", type=int, default=64, help="numbers in the bottleneck of the cae")
    parser.add_argument(
        "--steps", type=int, help="optimiser steps; left out: 50000 for dae, 3000 for cae; the learning rate follows"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="slices a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of Adam")
    parser.add_argument(
        "--val-fraction", type=float, default=0.1, help="share of subjects set aside without val/normal"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and corruptions")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one"
    )
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where measured to be faster"
    )
    parser.add_argument(
        "--in-memory",
        action=argparse.BooleanOptionalAction,
        help="hold the slices in memory or read them from disk ahead of need; left out: by their size",
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="compile the model first (a minute)"
    )
    parser.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="the same bytes each time on a GPU too, somewhat slower; on a CPU it is always so",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, nothing on standard output; errors remain")
    args = parse_flags(parser, argv)
    for name in ("width", "depth", "latent", "steps", "batch_size", "lr"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is above 0")
    if not 0 < args.val_fraction < 1:
        parser.error("--val-fraction lies between 0 and 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; leave --device out")
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    width, steps = (getattr(args, name) or DEFAULTS[args.model][name] for name in ("width", "steps"))
    network = {"model": args.model, "width": width}
    network |= {"depth": args.depth} if args.model == "dae" else {"latent": args.latent}
    config = {
        "data": str(args.data), "network": network, "steps": steps, "batch_size": args.batch_size, "lr": args.lr,
        "val_fraction": args.val_fraction, "seed": args.seed, "device": device.type, "precision": args.precision,
        "compile": args.compile, "deterministic": args.deterministic,
    }  # fmt: skip
    keep_freed_memory()
    with distributed.join(device) as device, silence(args.quiet):
        if args.batch_size < distributed.world_size():
            raise DataError(f"--batch-size {args.batch_size} is less than a slice for each process; raise it")
        torch.backends.cudnn.benchmark = not args.deterministic
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        train(config, args, device)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (DataError, CheckpointError, OSError) as error:
        sys.exit(str(error) if distributed.is_main() else 1)
    except KeyboardInterrupt:
        if distributed.is_main():
            print("stopped; the same command goes on from what was saved", file=sys.stderr)
        sys.exit(130)
