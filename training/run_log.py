"""The outputs that show a run's progress: log.csv, curves.png, reconstructions.png and TensorBoard events."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only; scripts run where there is no screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullLocator
from scipy import ndimage
from torch.utils.tensorboard import SummaryWriter

from common.files import make_folder, write_figure, write_table

CHANGED = 0.08  # by more than this a place is outlined as corrupted
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
    """Training and validation loss and the learning rate over the steps, and the step of the lowest validation loss."""
    figure, axis = plt.subplots(figsize=(6.5, 3.5), layout="constrained")
    steps = [row["step"] for row in rows]
    axis.plot(steps, [row["train_loss"] for row in rows], label="training", marker=".")
    axis.plot(steps, [row["val_loss"] for row in rows], label="validation", marker=".")
    best = min(rows, key=lambda row: row["val_loss"])
    axis.axvline(best["step"], color="grey", linestyle=":", label=f"best: step {best['step']}, {best['val_loss']:.3g}")
    axis.set(xlabel="optimiser step", ylabel="loss (MSE in the brain)", yscale="log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    rate = axis.twinx()
    rate.plot(steps, [row["learning_rate"] for row in rows], color="grey", linewidth=0.8)
    rate.set(ylabel="learning rate (grey)", ylim=(0, None))
    write_figure(path, figure)


def draw_reconstructions(path: Path, pictures: dict[str, np.ndarray]) -> None:
    """A row of slices in [0, 1] a title, {title: (n, H, W)}; outlined where the second differs from the first."""
    count = max(map(len, pictures.values()))
    figure, axes = plt.subplots(len(pictures), count, figsize=(1.6 * count, 1.7 * len(pictures)), layout="constrained")
    healthy, corrupted, *_ = pictures.values()
    changed = np.abs(ndimage.gaussian_filter(corrupted - healthy, (0, 2, 2))) > CHANGED  # not pixel by pixel
    for row, (line, (title, slices)) in enumerate(zip(axes, pictures.items(), strict=True)):
        colours = "inferno" if title.startswith("error") else "gray"
        for number, (axis, values) in enumerate(zip(line, slices, strict=True)):
            axis.imshow(values, cmap=colours, origin="lower", vmin=0, vmax=1)
            if row and changed[number].any():
                axis.contour(changed[number], levels=[0.5], colors="deepskyblue", linewidths=0.6)
            axis.axis("off")
        line[0].set_title(title, loc="left", fontsize=9)
    write_figure(path, figure)
