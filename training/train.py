"""Fit an autoencoder on normal slices.

Reads `<data>/train/normal` (and `<data>/val/normal`; without it some subjects of train are set aside) as
preprocess_oasis.py wrote them, and leaves a run folder with the model, its log, curves and reconstructions.
The same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models.anomaly import calibrate, reconstruct, smooth_residual
from models.artifacts import write_atomically, write_figure, write_table
from models.autoencoder import MODELS
from models.checkpoint import CheckpointError, build_model, load_checkpoint, save_checkpoint
from preprocessing.scans import DataError, refuse_leaks
from preprocessing.slices import ScanSlices, SliceDataset, check_same_settings, list_scans
from training.corruption import corrupt, vary_appearance

PROJECT = Path(__file__).resolve().parents[1]
LOG_COLUMNS = ("epoch", "step", "train_loss", "val_loss", "learning_rate", "slices_per_s")


def find_training_scans(data: Path, val_fraction: float, seed: int) -> tuple[list[ScanSlices], list[ScanSlices]]:
    """(training scans, validation scans), all normal, no subject on both sides. DataError where that cannot be had."""
    abnormal = next((scan for scan in list_scans(data / "train") if scan.label != "normal"), None)
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


@lru_cache(maxsize=2)
def _shuffle(count: int, seed: int, turn: int) -> np.ndarray:
    return np.random.default_rng([seed, turn]).permutation(count)


def pick_batch(step: int, batch_size: int, count: int, seed: int) -> np.ndarray:
    """Indices of the slices of this step: each turn through the `count` slices is shuffled anew.

    Depends on nothing but its arguments, so a resumed training sees what an uninterrupted one sees (EDM2's idea).
    """
    places = step * batch_size + np.arange(batch_size)
    return np.array([_shuffle(count, seed, int(place // count))[place % count] for place in places])


def seed_generator(device: torch.device, *numbers: int) -> torch.Generator:
    """A generator on the device whose stream depends on these numbers alone."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> 1))


def schedule_learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 4 % of the steps, then half a cosine down to 0."""
    warm_up = max(1, round(0.04 * steps))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def brain_mse(reconstruction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error over the brain's pixels: the loss. Both (B, 1, H, W)."""
    brain = (target > 0).float()
    return ((reconstruction - target) ** 2 * brain).sum() / brain.sum().clamp(min=1)


def make_pair(clean: torch.Tensor, corrupted: bool, generator: torch.Generator):
    """(input, target) of a training step from healthy slices (B, 1, H, W)."""
    target = vary_appearance(clean, generator)
    return (corrupt(target, generator) if corrupted else target), target


class Trainer:
    """A training: the model, its optimiser and how far they are. `fit` runs it to its end."""

    def __init__(self, config: dict, train: list[ScanSlices], validation: list[ScanSlices], device: torch.device):
        self.config, self.device = config, device
        self.train, self.validation = SliceDataset(train), SliceDataset(validation)
        self.validation_scans = validation
        self.precision = torch.bfloat16 if config["precision"] == "bf16" else torch.float32
        torch.manual_seed(config["seed"])
        self.model = build_model(config["network"]).to(device, memory_format=torch.channels_last)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=config["lr"])
        # a row of the log is one turn through the slices; for a tiny set, a fiftieth of the training
        turn = math.ceil(len(self.train) / config["batch_size"])
        self.epoch_steps = max(turn, math.ceil(config["steps"] / 50))
        self.step, self.loss_sum, self.rows = 0, 0.0, []
        self.best = {"val_loss": math.inf, "weights": None}

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        slices = slices.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            return self.model(slices).float()

    def train_step(self) -> torch.Tensor:
        """One optimiser step; returns its loss, still on the device."""
        config, step = self.config, self.step
        indices = pick_batch(step, config["batch_size"], len(self.train), config["seed"])
        clean = self.train[indices].to(self.device)
        source, target = make_pair(clean, self.model.corrupted, seed_generator(self.device, config["seed"], step))
        for group in self.optimiser.param_groups:
            group["lr"] = schedule_learning_rate(step, config["steps"], config["lr"])
        loss = brain_mse(self.forward(source), target)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.step += 1
        return loss.detach()

    @torch.inference_mode()
    def validate(self) -> float:
        """The loss over all validation slices, corrupted the same way each time."""
        self.model.eval()
        total = 0.0
        for start in range(0, len(self.validation), self.config["batch_size"]):
            clean = self.validation[slice(start, start + self.config["batch_size"])].to(self.device)
            generator = seed_generator(self.device, 0, start)
            source = corrupt(clean, generator) if self.model.corrupted else clean
            total += brain_mse(self.forward(source), clean).item() * len(clean)
        self.model.train()
        return total / len(self.validation)

    def state(self) -> dict:
        return {
            "config": self.config, "model": self.model.state_dict(), "optimiser": self.optimiser.state_dict(),
            "step": self.step, "loss_sum": float(self.loss_sum), "rows": self.rows, "best": self.best,
        }  # fmt: skip

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.loss_sum, self.rows, self.best = (state[k] for k in ("step", "loss_sum", "rows", "best"))

    def fit(self, run: Path) -> None:
        """Train to the last step, leaving log, curves and last.pt after each epoch. Ctrl-C saves first."""
        config, steps = self.config, self.config["steps"]
        board = SummaryWriter(run / "tensorboard", purge_step=self.step)
        bar = tqdm(total=steps, initial=self.step, desc="training", unit="step", disable=None)
        began, began_step = time.perf_counter(), self.step
        self.model.train()
        try:
            while self.step < steps:
                self.loss_sum += self.train_step()
                bar.update()
                since = (self.step - 1) % self.epoch_steps + 1
                ends = since == self.epoch_steps or self.step == steps
                if self.step % 20 and not ends:
                    continue
                mean_loss = float(self.loss_sum) / since
                if not math.isfinite(mean_loss):
                    raise DataError(
                        f"{run}: the loss is no longer a number at step {self.step}; last.pt is the last good state: "
                        "try a lower --lr or --precision fp32 in a new --run"
                    )
                rate = (self.step - began_step) * config["batch_size"] / (time.perf_counter() - began)
                bar.set_postfix(loss=f"{mean_loss:.5f}", slices_per_s=f"{rate:.0f}")
                if ends:
                    self.end_epoch(run, board, mean_loss, rate)
                    began, began_step = time.perf_counter(), self.step
        except KeyboardInterrupt:
            save_checkpoint(run / "last.pt", self.state())
            bar.close()
            sys.exit(f"\nstopped at step {self.step} of {steps}; the same command goes on from there")
        finally:
            bar.close()
            board.close()

    def end_epoch(self, run: Path, board: SummaryWriter, train_loss: float, rate: float) -> None:
        val_loss = self.validate()
        values = (len(self.rows) + 1, self.step, train_loss, val_loss, self.optimiser.param_groups[0]["lr"], rate)
        row = dict(zip(LOG_COLUMNS, values, strict=True))
        self.rows.append(row)
        self.loss_sum = 0.0
        if val_loss < self.best["val_loss"]:
            weights = {key: value.clone() for key, value in self.model.state_dict().items()}
            self.best = {"val_loss": val_loss, "step": self.step, "weights": weights}
        for key in LOG_COLUMNS[2:]:
            board.add_scalar(key, row[key], self.step)
        save_checkpoint(run / "last.pt", self.state())
        write_table(run / "log.csv", self.rows)
        draw_curves(run / "curves.png", self.rows)

    def finish(self, run: Path) -> None:
        """Take the best weights, calibrate them on the validation scans, and write model.pt."""
        self.model.load_state_dict(self.best["weights"])
        self.model.eval()
        stacks, residuals = [], []
        for scan in tqdm(self.validation_scans, desc="calibrating", unit="scan", disable=None):
            stack = scan.read_stack()
            reconstruction = reconstruct(self.model, stack, self.device, self.config["batch_size"], self.precision)
            spacing = (scan.record["spacing_mm"][2], scan.record["pixel_mm"])
            stacks.append(stack)
            residuals.append(smooth_residual(stack, reconstruction, spacing))
        self.draw_reconstructions(run / "reconstructions.png")
        content = {
            "config": self.config["network"],
            "weights": self.best["weights"],
            "calibration": calibrate(stacks, residuals),
            "slices": check_same_settings(self.validation_scans),
            "precision": self.config["precision"],
            "step": self.best["step"],
            "val_loss": self.best["val_loss"],
        }
        save_checkpoint(run / "model.pt", content)

    @torch.inference_mode()
    def draw_reconstructions(self, path: Path, count: int = 8) -> None:
        """Healthy validation slices, what the model is given, and what it makes of them."""
        clean = self.validation[np.linspace(0, len(self.validation) - 1, count).astype(int)].to(self.device)
        source = corrupt(clean, seed_generator(self.device, 0, 0)) if self.model.corrupted else clean
        output = torch.where(clean > 0, self.forward(source), 0)
        rows = [("healthy slice", clean), ("input", source), ("reconstruction", output)]
        figure, axes = plt.subplots(len(rows), count, figsize=(1.6 * count, 1.7 * len(rows)), layout="constrained")
        for line, (title, slices) in zip(axes, rows, strict=True):
            for axis, values in zip(line, slices[:, 0].float().cpu().numpy(), strict=True):
                axis.imshow(values, cmap="gray", origin="lower", vmin=0, vmax=1)
                axis.axis("off")
            line[0].set_title(title, loc="left", fontsize=9)
        write_figure(path, figure)


def draw_curves(path: Path, rows: list[dict]) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    steps = [row["step"] for row in rows]
    axis.plot(steps, [row["train_loss"] for row in rows], label="training", marker=".")
    axis.plot(steps, [row["val_loss"] for row in rows], label="validation", marker=".")
    axis.set(xlabel="optimiser step", ylabel="loss (MSE in the brain)", yscale="log")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3, which="both")
    write_figure(path, figure)


def choose_precision(device: torch.device) -> str:
    """bf16 where the hardware multiplies it natively, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def read_commit() -> str:
    """The checkout's commit, "-dirty" behind it where files differ from it; "" outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def train(config: dict, data: Path, run: Path, val_fraction: float, device: torch.device) -> None:
    """Train one run to its end, from the start or from where it was."""
    train_scans, validation_scans = find_training_scans(data, val_fraction, config["seed"])
    config["network"]["size"] = train_scans[0].record["size"]
    config["train_subjects"] = sorted({scan.subject for scan in train_scans})
    config["val_subjects"] = sorted({scan.subject for scan in validation_scans})
    run.mkdir(parents=True, exist_ok=True)
    last = run / "last.pt"
    state = load_checkpoint(last, device) if last.exists() else None
    if state and state["config"] != config:
        changed = ", ".join(key for key in config if state["config"].get(key) != config[key])
        raise DataError(f"{run}: was trained with other settings ({changed}); give another --run, or delete this one")
    if state and (run / "model.pt").exists():
        print(f"{run} is trained already ({config['steps']} steps); delete it to train again")
        return
    about = {"commit": read_commit(), "torch": torch.__version__, "python": platform.python_version()}
    write_atomically(run / "config.json", json.dumps(config | about, indent=1).encode())
    trainer = Trainer(config, train_scans, validation_scans, device)
    if state:
        trainer.load(state)
        print(f"going on at step {trainer.step} of {config['steps']}")
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{config['network']['model']} ({parameters / 1e6:.1f} M weights) on {device.type}, {config['precision']}: "
        f"{len(trainer.train)} slices of {len(config['train_subjects'])} subjects, validation on "
        f"{len(trainer.validation)} slices of {len(config['val_subjects'])} subjects, {config['steps']} steps"
    )
    trainer.fit(run)
    trainer.finish(run)
    best = trainer.best
    print(f"best validation loss {best['val_loss']:.6f} at step {best['step']}; model in {run / 'model.pt'}")


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=formatter)
    parser.add_argument("--data", type=Path, default=Path("Dataset/processed"), help="slices of preprocess_oasis.py")
    parser.add_argument("--run", type=Path, default=Path("runs/dae"), help="folder of this training")
    parser.add_argument("--model", choices=MODELS, default="dae", help="which autoencoder")
    parser.add_argument("--width", type=int, help="channels of the first level; left out: 64 for dae, 32 for cae")
    parser.add_argument("--depth", type=int, default=3, help="levels of the dae")
    parser.add_argument("--latent", type=int, default=64, help="numbers in the bottleneck of the cae")
    parser.add_argument("--steps", type=int, default=5000, help="optimiser steps; the learning rate's schedule follows")
    parser.add_argument("--batch-size", type=int, default=16, help="slices a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of Adam")
    parser.add_argument(
        "--val-fraction", type=float, default=0.1, help="share of subjects set aside without val/normal"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and corruptions")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one"
    )
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where native")
    args = parser.parse_args(argv)
    for name in ("width", "depth", "latent", "steps", "batch_size", "lr"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is above 0")
    if not 0 < args.val_fraction < 1:
        parser.error("--val-fraction lies between 0 and 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; leave --device out")
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    network = {"model": args.model, "width": args.width or {"dae": 64, "cae": 32}[args.model]}
    network |= {"depth": args.depth} if args.model == "dae" else {"latent": args.latent}
    config = {
        "data": str(args.data), "network": network, "steps": args.steps, "batch_size": args.batch_size, "lr": args.lr,
        "val_fraction": args.val_fraction, "seed": args.seed, "device": device.type,
        "precision": choose_precision(device) if args.precision == "auto" else args.precision,
    }  # fmt: skip
    train(config, args.data, args.run, args.val_fraction, device)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (DataError, CheckpointError, OSError) as error:
        sys.exit(str(error))
