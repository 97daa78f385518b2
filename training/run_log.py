"""The outputs that show a run's progress: log.csv, curves.png, reconstructions.png and TensorBoard events."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only; scripts run where there is no screen
import matplotlib.pyplot as plt
import numpy as np
from torch.utils.tensorboard import SummaryWriter

from common.files import make_folder, write_figure, write_table

LOG_COLUMNS = ("epoch", "step", "train_loss", "val_loss", "learning_rate", "slices_per_s")


class RunLog:
    """The log of a run's epochs. `rows` are the Trainer's own, those of a resumed run included.

    A row has the values of LOG_COLUMNS. Losses are mean squared errors in the brain, of values in [0, 1].
    """

    def __init__(self, run: Path, rows: list[dict]):
        self.run, self.rows = run, rows
        make_folder(run / "tensorboard", run)
        self.board = SummaryWriter(run / "tensorboard", purge_step=0)
        for row in rows:
            self._show_losses(row)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_) -> None:
        self.board.close()

    def add_epoch(self, pictures: dict[str, np.ndarray]) -> None:
        """Write the last row, and its pictures {title: (n, H, W)} as rows of one image."""
        row = self.rows[-1]
        self._show_losses(row)
        image = np.concatenate([np.concatenate(slices[:, ::-1], axis=1) for slices in pictures.values()])
        self.board.add_image("reconstructions", image.clip(0, 1), row["step"], dataformats="HW")
        write_log(self.run, self.rows)

    def _show_losses(self, row: dict) -> None:
        for key in LOG_COLUMNS[2:]:
            self.board.add_scalar(key, row[key], row["step"])


def write_log(run: Path, rows: list[dict]) -> None:
    """Write log.csv and curves.png of a run with at least one row."""
    write_table(run / "log.csv", rows)
    draw_curves(run / "curves.png", rows)


def draw_curves(path: Path, rows: list[dict]) -> None:
    """Training and validation loss over the steps."""
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    steps = [row["step"] for row in rows]
    axis.plot(steps, [row["train_loss"] for row in rows], label="training", marker=".")
    axis.plot(steps, [row["val_loss"] for row in rows], label="validation", marker=".")
    axis.set(xlabel="optimiser step", ylabel="loss (MSE in the brain)", yscale="log")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3, which="both")
    write_figure(path, figure)


def draw_reconstructions(path: Path, pictures: dict[str, np.ndarray]) -> None:
    """A row of slices in [0, 1] for each title, {title: (n, H, W)}."""
    count = max(map(len, pictures.values()))
    figure, axes = plt.subplots(len(pictures), count, figsize=(1.6 * count, 1.7 * len(pictures)), layout="constrained")
    for line, (title, slices) in zip(axes, pictures.items(), strict=True):
        for axis, values in zip(line, slices, strict=True):
            axis.imshow(values, cmap="gray", origin="lower", vmin=0, vmax=1)
            axis.axis("off")
        line[0].set_title(title, loc="left", fontsize=9)
    write_figure(path, figure)
