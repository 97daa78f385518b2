"""A training from its first step to its last: batches, steps, validation, and what it leaves on disk.

All that is random follows from the seed and the number of the step (EDM2's idea), so a training that was interrupted
sees what an undisturbed one sees, and several processes see together what one alone would.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import distributed
from common.device import choose_precision as choose_precision
from common.files import write_figure, write_table
from models.anomaly import calibrate, reconstruct, smooth_residual
from models.autoencoder import take_middle
from models.checkpoint import build_model, save_checkpoint
from preprocessing.scans import DataError
from preprocessing.slices import ScanSlices, SliceDataset, check_same_settings
from training.corruption import corrupt, vary_appearance

LOG_COLUMNS = ("epoch", "step", "train_loss", "val_loss", "learning_rate", "slices_per_s")
LOOK_EVERY = 20  # steps between two looks at the losses: each makes a GPU wait
SAVE_EVERY_S = 60.0  # between two saves within an epoch
LARGEST_GRADIENT = 0.1  # norm; 0.03 is usual, and a burst of 20 once threw a training back by thousands of steps
SPOILED_TOGETHER = 16  # slices; a process corrupts whole groups of a batch, so its draws are those of one alone


@lru_cache(maxsize=2)
def _shuffle(count: int, seed: int, turn: int) -> np.ndarray:
    return np.random.default_rng([seed, turn]).permutation(count)


def pick_batch(step: int, batch_size: int, count: int, seed: int) -> np.ndarray:
    """Indices of the slices of this step: each turn through the `count` slices is shuffled anew."""
    places = step * batch_size + np.arange(batch_size)
    return np.array([_shuffle(count, seed, int(place // count))[place % count] for place in places])


def pick_groups(batch_size: int) -> list[range]:
    """The places in a batch that are corrupted together: at most eight groups."""
    group = max(SPOILED_TOGETHER, math.ceil(batch_size / 8))
    return [range(start, min(start + group, batch_size)) for start in range(0, batch_size, group)]


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


def sum_squares(reconstruction: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the squared errors over the brain's pixels, how many these are). Both arguments (B, 1, H, W).

    The loss is the one divided by the other: the mean squared error in the brain.
    """
    brain = (target > 0).float()
    return ((reconstruction - target) ** 2 * brain).sum(), brain.sum().clamp(min=1)


def make_pair(clean: torch.Tensor, corrupted: bool, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(input (B, C, H, W), target (B, 1, H, W)) of a training step from healthy slices (B, C, H, W)."""
    varied = vary_appearance(clean, generator)
    return (corrupt(varied, generator) if corrupted else varied), take_middle(varied)


class Trainer:
    """A training: the model, its optimiser and how far they are. `fit` runs it to its end.

    config     what decides the result, as train.py writes it to config.json
    in_memory  whether the slices are held in memory or read from disk ahead of need; the result is the same
    quiet      no progress bars
    """

    def __init__(
        self,
        config: dict,
        train: list[ScanSlices],
        validation: list[ScanSlices],
        device: torch.device,
        in_memory: bool = True,
        quiet: bool = False,
    ):
        self.config, self.device = config, device
        self.silent = quiet or None  # None: where there is no terminal
        self.precision = torch.bfloat16 if config["precision"] == "bf16" else torch.float32
        torch.manual_seed(config["seed"])
        self.model = model = build_model(config["network"]).to(device, memory_format=torch.channels_last)
        self.train, self.validation = (
            SliceDataset(scans, in_memory, device, model.find_neighbours) for scans in (train, validation)
        )
        self.network = distributed.share_gradients(self.model)  # the same model, for the steps of training
        if config["compile"]:
            self.network = torch.compile(self.network)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=config["lr"], fused=True)
        # a row of the log is one turn through the slices, but at least a fiftieth of the training and at most a fifth
        turn = math.ceil(len(self.train) / config["batch_size"])
        self.epoch_steps = min(max(turn, math.ceil(config["steps"] / 50)), math.ceil(config["steps"] / 5))
        self.groups = pick_groups(config["batch_size"])
        self.own = distributed.shard(config["batch_size"])
        self.own_groups = [g for g in range(len(self.groups)) if set(self.groups[g]) & set(self.own)]
        self.step, self.loss_sum, self.rows = 0, 0.0, []
        self.losses = []  # of the steps since the last look, on the device
        self.saved_step = 0  # what last.pt holds
        self.best = {"val_loss": math.inf, "weights": None}

    def forward(self, network: nn.Module, slices: torch.Tensor) -> torch.Tensor:
        slices = slices.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            return network(slices).float()

    def read_batches(self) -> Iterator[torch.Tensor]:
        """The healthy slices of each step from this one on, of those groups that this process has a part in."""
        config = self.config
        places = np.concatenate([self.groups[g] for g in self.own_groups])
        steps = range(self.step, config["steps"])
        yield from self.train.in_order(
            pick_batch(step, config["batch_size"], len(self.train), config["seed"])[places] for step in steps
        )

    def spoil(self, clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(input, target) of this step for this process's own places in the batch."""
        pairs = []
        for g, slices in zip(self.own_groups, clean.split(len(self.groups[0])), strict=True):
            numbers = (self.step, g) if g else (self.step,)
            pairs.append(
                make_pair(slices, self.model.corrupted, seed_generator(self.device, self.config["seed"], *numbers))
            )
        start = self.own.start - self.groups[self.own_groups[0]].start
        source, target = (torch.cat(parts)[start : start + len(self.own)] for parts in zip(*pairs, strict=True))
        return source, target

    def train_step(self, clean: torch.Tensor) -> torch.Tensor:
        """One optimiser step on what `read_batches` gave; returns its loss, still on the device."""
        source, target = self.spoil(clean)
        for group in self.optimiser.param_groups:
            group["lr"] = schedule_learning_rate(self.step, self.config["steps"], self.config["lr"])
        squares, pixels = sum_squares(self.forward(self.network, source), target)
        loss = squares / distributed.all_reduce(pixels)  # this process's part of it
        self.optimiser.zero_grad()
        (loss * distributed.world_size()).backward()  # of which the mean over the processes is taken
        self.update_weights()
        self.step += 1
        return distributed.all_reduce(loss.detach())

    def update_weights(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_GRADIENT)
        self.optimiser.step()

    @torch.inference_mode()
    def validate(self) -> float:
        """The loss over all validation slices, corrupted the same way each time; each process takes some batches."""
        self.model.eval()
        count, size = len(self.validation), self.config["batch_size"]
        starts = range(0, count, size)[distributed.rank() :: distributed.world_size()]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        batches = self.validation.in_order(range(start, min(start + size, count)) for start in starts)
        for start, clean in zip(starts, batches, strict=True):
            source = corrupt(clean, seed_generator(self.device, 0, start)) if self.model.corrupted else clean
            squares, pixels = sum_squares(self.forward(self.model, source), take_middle(clean))
            total += squares / pixels * len(clean)
        self.model.train()
        return distributed.all_reduce(total).item() / count

    def state(self) -> dict:
        return {
            "config": self.config, "model": self.model.state_dict(), "optimiser": self.optimiser.state_dict(),
            "step": self.step, "loss_sum": self.loss_sum, "rows": self.rows, "best": self.best,
        }  # fmt: skip

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.loss_sum, self.rows, self.best = (state[k] for k in ("step", "loss_sum", "rows", "best"))
        self.saved_step = self.step

    def fit(self, run: Path) -> None:
        """Train to the last step, leaving last.pt now and then, log and curves after each epoch.

        SIGINT (Ctrl-C) and SIGTERM save and end the program with code 130. A loss that is no number raises DataError.
        """
        steps, batches = self.config["steps"], self.read_batches()
        silent = self.silent if distributed.is_main() else True
        bar = tqdm(total=steps, initial=self.step, desc="training", unit="step", disable=silent)
        began, began_step, saved = time.perf_counter(), self.step, time.monotonic()
        self.model.train()
        with _open_board(run, self.rows) as board, bar, contextlib.closing(batches), _catch_signals() as caught:
            while True:
                since = self.step - (self.rows[-1]["step"] if self.rows else 0)
                if since and (since == self.epoch_steps or self.step == steps):
                    self.look_at_losses(run)
                    rate = (self.step - began_step) * self.config["batch_size"] / (time.perf_counter() - began)
                    self.end_epoch(run, board, self.loss_sum / since, rate)
                    began, began_step, saved = time.perf_counter(), self.step, time.monotonic()
                if self.step == steps:
                    return
                if distributed.any_of(bool(caught)):
                    self.save(run)
                    bar.close()
                    if distributed.is_main():
                        print(f"stopped at step {self.step} of {steps}; the same command goes on", file=sys.stderr)
                    sys.exit(130)
                self.losses.append(self.train_step(next(batches)))
                bar.update()
                if self.step % LOOK_EVERY == 0:
                    loss = self.look_at_losses(run)
                    bar.set_postfix(loss=f"{loss:.5f}")
                    if time.monotonic() - saved > SAVE_EVERY_S:
                        self.save(run)
                        saved = time.monotonic()

    def look_at_losses(self, run: Path) -> float:
        """Add up the losses since the last look, and return the last one; DataError names the step of a bad one."""
        losses = torch.stack(self.losses).tolist() if self.losses else [self.loss_sum]
        for step, loss in enumerate(losses, self.step - len(losses) + 1):
            if not math.isfinite(loss):
                self.give_up(run, f"the loss is not a number at step {step}")
        if self.losses:
            self.loss_sum += sum(losses)
        self.losses = []
        return losses[-1]

    def give_up(self, run: Path, why: str) -> None:
        saved = f"last.pt holds step {self.saved_step}, which was good" if self.saved_step else "nothing was saved yet"
        raise DataError(f"{run}: {why}; {saved}; try a lower --lr or --precision fp32 in a new --run")

    def save(self, run: Path) -> None:
        """Write last.pt, unless the training has gone bad."""
        self.look_at_losses(run)
        if not all(values.isfinite().all() for values in self.model.state_dict().values()):
            self.give_up(run, f"the weights are not numbers after step {self.step}")
        if distributed.is_main():
            save_checkpoint(run / "last.pt", self.state())
        self.saved_step = self.step

    def end_epoch(self, run: Path, board: SummaryWriter | None, train_loss: float, rate: float) -> None:
        val_loss = self.validate()
        if not math.isfinite(val_loss):
            self.give_up(run, f"the validation loss is not a number after step {self.step}")
        values = (len(self.rows) + 1, self.step, train_loss, val_loss, self.optimiser.param_groups[0]["lr"], rate)
        self.rows.append(dict(zip(LOG_COLUMNS, values, strict=True)))
        self.loss_sum = 0.0
        if val_loss < self.best["val_loss"]:
            weights = {key: value.clone() for key, value in self.model.state_dict().items()}
            self.best = {"val_loss": val_loss, "step": self.step, "weights": weights}
        self.save(run)
        if distributed.is_main():
            _add_to_board(board, self.rows[-1])
            pictures = [np.concatenate(slices[:, ::-1], axis=1) for slices in self.show_test_blobs().values()]
            board.add_image("reconstructions", np.concatenate(pictures).clip(0, 1), self.step, dataformats="HW")
            self.write_log(run)

    def write_log(self, run: Path) -> None:
        write_table(run / "log.csv", self.rows)
        draw_curves(run / "curves.png", self.rows)

    def finish(self, run: Path) -> None:
        """Take the best weights, calibrate them on the validation scans, and write model.pt."""
        self.write_log(run)  # again, for the training may have been killed between last.pt and these
        self.model.load_state_dict(self.best["weights"])
        self.model.eval()
        scans = self.validation.scans

        def compare(number: int) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
            scan, record = scans[number], scans[number].record
            stack, spacing = scan.read_stack(), record["spacing_mm"][2]
            reconstruction = reconstruct(
                self.model, stack, spacing, self.device, self.config["batch_size"], self.precision
            )
            return stack, reconstruction, (spacing, record["pixel_mm"])

        compared = _Computed(compare, len(scans))
        if self.validation.slices is not None:  # they fit into memory, so these do
            compared = list(tqdm(compared, desc="calibrating", unit="scan", disable=self.silent))
        self.draw_reconstructions(run / "reconstructions.png")
        content = {
            "config": self.config["network"],
            "weights": self.best["weights"],
            "calibration": calibrate(compared),
            "slices": check_same_settings(scans),
            "seen": sorted(scan.source_hash for scan in [*self.train.scans, *scans]),
            "precision": self.config["precision"],
            "step": self.best["step"],
            "val_loss": self.best["val_loss"],
        }
        save_checkpoint(run / "model.pt", content)

    @torch.inference_mode()
    def show_test_blobs(self, count: int = 8) -> dict[str, np.ndarray]:
        """{what: (count, H, W)}: healthy validation slices, the same with test blobs painted into them, the model's
        reconstruction of these, and the size of the smoothed residual: where the blobs are, if the model is good."""
        clean = self.validation[np.linspace(0, len(self.validation) - 1, count).astype(int)]
        source = corrupt(clean, seed_generator(self.device, 0, 0))
        training, _ = self.model.training, self.model.eval()
        output = torch.where(take_middle(clean) > 0, self.forward(self.model, source), 0)
        self.model.train(training)
        healthy, spoilt, drawn = (x[:, 0].float().cpu().numpy() for x in map(take_middle, (clean, source, output)))
        spacing = (1e3, self.validation.scans[0].record["pixel_mm"])  # far apart: these slices are no stack
        error = np.abs(smooth_residual(spoilt, drawn, spacing))
        return {"healthy slice": healthy, "with test blobs": spoilt, "reconstruction": drawn, "error x 4": 4 * error}

    def draw_reconstructions(self, path: Path) -> None:
        rows = self.show_test_blobs()
        count = len(rows["reconstruction"])
        figure, axes = plt.subplots(len(rows), count, figsize=(1.6 * count, 1.7 * len(rows)), layout="constrained")
        for line, (title, slices) in zip(axes, rows.items(), strict=True):
            for axis, values in zip(line, slices, strict=True):
                axis.imshow(values, cmap="gray", origin="lower", vmin=0, vmax=1)
                axis.axis("off")
            line[0].set_title(title, loc="left", fontsize=9)
        write_figure(path, figure)


class _Computed(Sequence):
    """Values that are made when asked for, and again when asked for again, because all would fill the memory."""

    def __init__(self, make: Callable[[int], np.ndarray], count: int):
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> np.ndarray:
        if number >= self.count:
            raise IndexError(number)
        return self.make(number)


def draw_curves(path: Path, rows: list[dict]) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    steps = [row["step"] for row in rows]
    axis.plot(steps, [row["train_loss"] for row in rows], label="training", marker=".")
    axis.plot(steps, [row["val_loss"] for row in rows], label="validation", marker=".")
    axis.set(xlabel="optimiser step", ylabel="loss (MSE in the brain)", yscale="log")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3, which="both")
    write_figure(path, figure)


@contextlib.contextmanager
def _open_board(run: Path, rows: list[dict]) -> Iterator[SummaryWriter | None]:
    """TensorBoard's events, with the rows that a resumed training has already; none but in the first process."""
    if not distributed.is_main():
        yield None
        return
    with SummaryWriter(run / "tensorboard", purge_step=0) as board:
        for row in rows:
            _add_to_board(board, row)
        yield board


def _add_to_board(board: SummaryWriter, row: dict) -> None:
    for key in LOG_COLUMNS[2:]:
        board.add_scalar(key, row[key], row["step"])


@contextlib.contextmanager
def _catch_signals() -> Iterator[list[int]]:
    """Gives a list that SIGINT and SIGTERM are added to: a step that has begun is ended before anything is saved."""
    caught = []
    before = {
        number: signal.signal(number, lambda n, _: caught.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
