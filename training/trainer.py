"""A training run from its first step to model.pt: steps, validation, saving, resuming, calibration."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common import distributed
from common.cli import DataError, log
from common.device import PRECISIONS
from models.anomaly import compute_residual
from models.autoencoder import take_middle
from models.calibration import Calibration, Compared, compare
from models.checkpoint import build_model, save_checkpoint
from preprocessing.store import check_same_settings
from training.batches import count_epoch_steps, mix_seed, pick_batch, schedule_learning_rate, seed_generator
from training.corruption import corrupt, make_pair
from training.dataset import SliceDataset
from training.optimiser import make_optimisers
from training.recording import Recording
from training.run_log import LOG_COLUMNS, RunLog, draw_reconstructions, write_log

VALIDATED = 512  # slices at most, evenly over the validation scans: they choose the best weights, and stay in memory
READ_LOSSES_EVERY = 20  # steps; a GPU waits each time
SAVE_EVERY_S = 60.0  # within an epoch
LARGEST_GRADIENT = 0.1  # norm; 0.03 is typical, and a burst of 20 once threw a run back by thousands of steps


def sum_squares(reconstruction: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the squared errors in the brain, its number of pixels, at least 1). Both arguments (B, 1, H, W).

    The loss is their quotient: the mean squared error in the brain.
    """
    brain = (target > 0).float()
    return ((reconstruction - target) ** 2 * brain).sum(), brain.sum().clamp(min=1)


class Trainer:
    """A run: the model, its optimisers and how far they are. `fit` trains it to its end, `finish` writes model.pt.

    config      what decides the result, as train.py writes it to config.json
    train       healthy slices to train on
    validation  healthy slices of other subjects, to choose the best weights and to calibrate
    run         the folder of the run
    quiet       no progress bars
    init        the content of a model.pt whose weights it starts from; None: random ones
    """

    def __init__(
        self,
        config: dict,
        train: SliceDataset,
        validation: SliceDataset,
        run: Path,
        quiet: bool = False,
        init: dict | None = None,
    ):
        self.config, self.train, self.validation, self.run = config, train, validation, run
        self.device = train.device
        self.hide_bars = quiet or None  # None: hidden where there is no terminal
        self.precision = PRECISIONS[config["precision"]]
        torch.manual_seed(config["seed"])
        self.model = build_model(config["network"]).to(self.device, memory_format=torch.channels_last)
        if init:
            self.model.load_state_dict(init["weights"])
        self.seen_before = set(init["seen"]) if init else set()  # hashes of the scans that made those weights
        self.network = distributed.share_gradients(self.model)  # the same model, for the steps of training
        self.learning_rate = torch.tensor(config["lr"], device=self.device)
        self.optimisers = make_optimisers(self.model, config["optimiser"], self.learning_rate, self.precision)
        self.generator = torch.Generator(self.device)
        self.draw_pair = Recording(partial(self.make_pair, generator=self.generator), self.generator)
        self.learn = Recording(self.move_weights) if distributed.is_alone() else self.move_weights
        self.epoch_steps = count_epoch_steps(len(train), config["batch_size"], config["steps"])
        self.step, self.loss_sum, self.rows = 0, 0.0, []
        self.unread_losses = []  # of the last steps, on the device
        self.saved_step = 0  # the step that last.pt holds
        self.best = {"val_loss": math.inf, "weights": None}

    def forward(self, network: nn.Module, slices: torch.Tensor) -> torch.Tensor:
        """What the network makes of slices (B, C, H, W), in the run's precision: (B, 1, H, W) float32."""
        slices = slices.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            return network(slices).float()

    def read_pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(input, target) of each step from the current one on: this process's healthy slices, corrupted.

        Each process has random numbers of its own. A GPU makes a pair while it trains on the one before.
        """
        config, shard = self.config, distributed.shard(self.config["batch_size"])
        steps = range(self.step, config["steps"])
        batches = self.train.read_batches(
            pick_batch(step, config["batch_size"], self.train.slices_by_scanner, config["seed"])[shard]
            for step in steps
        )
        aside = torch.cuda.Stream() if self.device.type == "cuda" else None
        with contextlib.closing(batches):
            for step in steps:
                self.generator.manual_seed(mix_seed(config["seed"], step, distributed.rank()))
                with torch.cuda.stream(aside):
                    pair = self.draw_pair(next(batches))
                if aside:
                    torch.cuda.current_stream().wait_stream(aside)
                    for values in pair:
                        values.record_stream(torch.cuda.current_stream())
                yield pair

    def make_pair(self, clean: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """(input, target) of the network, from healthy slices."""
        return make_pair(clean, self.model.corrupted, generator)

    def train_step(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """One optimiser step with a pair of `read_pairs`; returns the loss, still on the device."""
        self.learning_rate.fill_(schedule_learning_rate(self.step, self.config["steps"], self.config["lr"]))
        self.step += 1
        return self.learn(source, target)

    def move_weights(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """What the device does in a step, the same each time; returns the loss."""
        squares, pixels = sum_squares(self.forward(self.network, source), target)
        loss = squares / distributed.all_reduce(pixels)  # this process's part of it
        self.model.zero_grad()
        (loss * distributed.world_size()).backward()  # gradients are averaged over the processes
        self.update_weights()
        return distributed.all_reduce(loss.detach())

    def update_weights(self) -> None:
        """A step of the optimisers, with the gradient clipped to a norm of LARGEST_GRADIENT."""
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_GRADIENT)
        for optimiser in self.optimisers:
            optimiser.step()

    @cached_property
    def validation_pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(input, target) of this process's batches of validation slices, at most VALIDATED of all processes.

        They are varied and corrupted by their place alone, so once is enough.
        """
        count, size = min(len(self.validation), VALIDATED), self.config["batch_size"]
        places = np.linspace(0, len(self.validation) - 1, count).round().astype(int)
        starts = range(0, count, size)[distributed.rank() :: distributed.world_size()]
        batches = self.validation.read_batches(places[start : start + size] for start in starts)
        return [
            self.make_pair(clean, seed_generator(self.device, 0, start))
            for start, clean in zip(starts, batches, strict=True)
        ]

    @torch.inference_mode()
    def validate(self) -> float:
        """The loss over `validation_pairs` of all processes."""
        distributed.share_statistics(self.model)
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for source, target in tqdm(
            self.validation_pairs, desc="validating", unit="batch", leave=False, disable=self.hide_bars
        ):
            squares, pixels = sum_squares(self.forward(self.model, source), target)
            total += torch.stack([squares / pixels, torch.ones_like(pixels)]) * len(source)
        self.model.train()
        loss, slices = distributed.all_reduce(total).tolist()
        return loss / slices

    def fit(self) -> None:
        """Train to the last step: last.pt is saved each epoch and each minute, the log each epoch.

        SIGINT (Ctrl-C) and SIGTERM save and end the program with code 130. A loss that is not a number raises
        DataError.
        """
        steps, pairs = self.config["steps"], self.read_pairs()
        hide_bar = self.hide_bars if distributed.is_main() else True
        bar = tqdm(total=steps, initial=self.step, desc="training", unit="step", disable=hide_bar)
        self.model.train()
        with self._open_log() as run_log, bar, contextlib.closing(pairs), _catch_signals() as caught:
            clock = _Clock(self.step)
            while True:
                if self._at_end_of_epoch():
                    self.end_epoch(run_log, clock.measure_rate(self.step, self.config["batch_size"]))
                    clock = _Clock(self.step)
                if self.step == steps:
                    return
                if distributed.any_of(bool(caught)):
                    bar.close()
                    self.stop()
                self.unread_losses.append(self.train_step(*next(pairs)))
                bar.update()
                if self.step % READ_LOSSES_EVERY == 0:
                    bar.set_postfix(loss=f"{self.read_losses():.5f}")
                    if time.monotonic() - clock.saved > SAVE_EVERY_S:
                        self.save()
                        clock.saved = time.monotonic()

    def _at_end_of_epoch(self) -> bool:
        since = self._count_steps_of_epoch()
        return since > 0 and (since == self.epoch_steps or self.step == self.config["steps"])

    def _count_steps_of_epoch(self) -> int:
        return self.step - (self.rows[-1]["step"] if self.rows else 0)

    def _open_log(self) -> contextlib.AbstractContextManager[RunLog | None]:
        return RunLog(self.run, self.rows) if distributed.is_main() else contextlib.nullcontext()

    def read_losses(self) -> float:
        """Add the losses of the last steps to the epoch's sum, and return the last; DataError if one is not finite."""
        losses = torch.stack(self.unread_losses).tolist() if self.unread_losses else [0.0]
        for step, loss in enumerate(losses, self.step - len(losses) + 1):
            if not math.isfinite(loss):
                self.fail(f"the loss is not a number at step {step}")
        self.loss_sum += sum(losses)
        self.unread_losses = []
        return losses[-1]

    def fail(self, reason: str) -> NoReturn:
        saved = f"last.pt holds step {self.saved_step}, which was good" if self.saved_step else "nothing was saved yet"
        raise DataError(f"{self.run}: {reason}; {saved}; try a lower --lr or --precision fp32 in a new --run")

    def stop(self) -> NoReturn:
        """Save, and end the program as one that was interrupted."""
        self.save()
        if distributed.is_main():
            log.warning(
                "stopped at step %d of %d; run the same command again to resume", self.step, self.config["steps"]
            )
        sys.exit(130)

    def end_epoch(self, run_log: RunLog | None, slices_per_s: float) -> None:
        """Validate, keep the best weights, save, and write the log."""
        self.read_losses()
        train_loss, val_loss = self.loss_sum / self._count_steps_of_epoch(), self.validate()
        if not math.isfinite(val_loss):
            self.fail(f"the validation loss is not a number after step {self.step}")
        values = (len(self.rows) + 1, self.step, train_loss, val_loss, self.learning_rate.item(), slices_per_s)
        self.rows.append(dict(zip(LOG_COLUMNS, values, strict=True)))
        self.loss_sum = 0.0
        if val_loss < self.best["val_loss"]:
            weights = {key: value.clone() for key, value in self.model.state_dict().items()}
            self.best = {"val_loss": val_loss, "step": self.step, "weights": weights}
        self.save()
        if run_log:
            run_log.add_epoch(self.show_reconstructions())

    def save(self) -> None:
        """Write last.pt, unless the losses or the weights are not numbers."""
        self.read_losses()
        if not all(values.isfinite().all() for values in self.model.state_dict().values()):
            self.fail(f"the weights are not numbers after step {self.step}")
        if distributed.is_main():
            content = {"config": self.config, "model": self.model.state_dict()}
            content |= {"optimisers": [optimiser.state_dict() for optimiser in self.optimisers]}
            content |= {"step": self.step, "loss_sum": self.loss_sum, "rows": self.rows, "best": self.best}
            save_checkpoint(self.run / "last.pt", content)
        self.saved_step = self.step

    def resume(self, state: dict) -> None:
        """Go on from the content of a last.pt."""
        self.model.load_state_dict(state["model"])
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
            optimiser.param_groups[0]["lr"] = self.learning_rate
        self.step, self.loss_sum, self.rows, self.best = (state[k] for k in ("step", "loss_sum", "rows", "best"))
        self.saved_step = self.step

    def finish(self) -> None:
        """Take the best weights, calibrate them on the validation scans, and write model.pt."""
        write_log(self.run, self.rows)  # again: the run may have been killed between last.pt and its log
        self.model.load_state_dict(self.best["weights"])
        self.model.eval()
        draw_reconstructions(self.run / "reconstructions.png", self.show_reconstructions())
        scans = [*self.train.scans, *self.validation.scans]
        content = {
            "config": self.config["network"],
            "weights": self.best["weights"],
            "calibration": Calibration.fit(self.compare_validation()).to_state(),
            "slices": check_same_settings(scans),
            "seen": sorted(self.seen_before | {one for scan in scans for one in scan.hashes}),
            "precision": self.config["precision"],
            "step": self.best["step"],
            "val_loss": self.best["val_loss"],
        }
        save_checkpoint(self.run / "model.pt", content)

    def compare_validation(self) -> Sequence[Compared]:
        """The validation scans with their reconstructions, as `Calibration.fit` takes them."""
        compared = _Reconstructed(self)
        if self.validation.slices is None:
            return compared
        return list(tqdm(compared, desc="calibrating", unit="scan", disable=self.hide_bars))  # both fit into memory

    @torch.inference_mode()
    def show_reconstructions(self, count: int = 8) -> dict[str, np.ndarray]:
        """{title: (count, H, W) in [0, 1]} of validation slices: healthy, corrupted, reconstructed, smoothed error.

        The error is bright where the corruption is, if the model is good.
        """
        clean = self.validation[np.linspace(0, len(self.validation) - 1, count).astype(int)]
        source = corrupt(clean, seed_generator(self.device, 0, 0))
        was_training = self.model.training
        self.model.eval()
        output = torch.where(take_middle(clean) > 0, self.forward(self.model, source), 0)
        self.model.train(was_training)
        healthy, corrupted, drawn = (x[:, 0].float() for x in (take_middle(clean), take_middle(source), output))
        sampling_mm = (1e3, self.validation.scans[0].geometry.pixel_mm)  # far apart: these slices are no stack
        error = compute_residual(corrupted, drawn, sampling_mm).values.abs()
        pictures = {"healthy slice": healthy, "corrupted": corrupted, "reconstruction": drawn, "error x 4": 4 * error}
        return {title: slices.cpu().numpy() for title, slices in pictures.items()}


class _Reconstructed(Sequence):
    """The validation scans with their reconstructions, made each time one is read: all would fill the memory."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def __len__(self) -> int:
        return len(self.trainer.validation.scans)

    def __getitem__(self, number: int) -> Compared:
        trainer, scan = self.trainer, self.trainer.validation.scans[number]
        batch_size = trainer.config["batch_size"]
        return compare(trainer.model, scan.read_stack(), scan.geometry.sampling_mm, batch_size, trainer.precision)


class _Clock:
    """When a stretch of training began, and when it was last saved."""

    def __init__(self, step: int):
        self.step, self.began, self.saved = step, time.perf_counter(), time.monotonic()

    def measure_rate(self, step: int, batch_size: int) -> float:
        """Slices per second since it began."""
        return (step - self.step) * batch_size / (time.perf_counter() - self.began)


@contextlib.contextmanager
def _catch_signals() -> Iterator[list[int]]:
    """Yields a list that SIGINT and SIGTERM are added to, so that a step that has begun ends before it is saved."""
    caught = []
    before = {
        number: signal.signal(number, lambda n, _: caught.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
