"""The way from a reconstruction to an anomaly map to a score: one path for every model.

    residual = slice - reconstruction            signed, in units of the slice's [0, 1]
    anomaly map = |smoothed residual|, over the whole stack, divided by what healthy scans show at that place
    slice score = mean of the worst share of the slice's brain; scan score likewise over the stack

Stacks are (n, H, W) with the background at 0, so `stack > 0` is the brain. What healthy scans show (`calibrate`) comes
from validation scans alone and travels in model.pt.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import nn

SMOOTHING_MM = 2.0  # standard deviation of the Gaussian over the residual, in the plane and across slices
RIM_PIXELS = 3.0  # the brain's rim, where masks differ and partial volume rules, is faded in over this
LEVELS = 16  # places along the inferior-superior axis at which healthy residuals are kept
WORST_IN_SLICE = 0.03  # share of the brain whose mean anomaly is the slice's score
WORST_IN_SCAN = 0.01


@torch.inference_mode()
def reconstruct(
    model: nn.Module,
    stack: np.ndarray,
    device: str = "cpu",
    batch_size: int = 32,
    precision: torch.dtype = torch.float32,
) -> np.ndarray:
    """The model's reconstruction of a stack (n, H, W) in [0, 1]: the same shape, float32, 0 outside the brain."""
    slices = torch.from_numpy(np.asarray(stack, dtype=np.float32)).unsqueeze(1)
    parts = []
    for batch in slices.split(batch_size):
        batch = batch.to(device, memory_format=torch.channels_last)
        with torch.autocast(batch.device.type, precision, enabled=precision != torch.float32):
            output = model(batch)
        parts.append(torch.where(batch > 0, output.float(), 0).squeeze(1).cpu())
    return torch.cat(parts).numpy()


def score_mse(stack: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """(n,) plain reconstruction error: the mean squared residual over each slice's brain."""
    brain = stack > 0
    squared = np.where(brain, stack.astype(np.float32) - reconstruction, 0) ** 2
    return squared.sum(axis=(1, 2)) / np.maximum(brain.sum(axis=(1, 2)), 1)


def smooth_residual(stack: np.ndarray, reconstruction: np.ndarray, spacing_mm: tuple[float, float]) -> np.ndarray:
    """|residual| after smoothing its signed value within the brain: (n, H, W) float32, 0 outside the brain.

    Noise changes its sign from pixel to pixel and cancels; a lesion keeps its sign. `spacing_mm`: between slices,
    between pixels.
    """
    brain = (stack > 0).astype(np.float32)
    sigma = [SMOOTHING_MM / spacing_mm[0], SMOOTHING_MM / spacing_mm[1], SMOOTHING_MM / spacing_mm[1]]
    residual = (stack.astype(np.float32) - reconstruction) * brain
    smoothed = ndimage.gaussian_filter(residual, sigma, truncate=3)
    share = ndimage.gaussian_filter(brain, sigma, truncate=3)
    rim = np.stack([ndimage.distance_transform_edt(plane) for plane in brain])
    return np.abs(smoothed) / np.maximum(share, 0.1) * brain * np.clip(rim / RIM_PIXELS, 0, 1)


def place_levels(count: int) -> np.ndarray:
    """(count,) where each kept slice stands between the lowest (0) and the highest (LEVELS - 1)."""
    return np.linspace(0, LEVELS - 1, count)


def calibrate(residuals: list[np.ndarray]) -> dict:
    """What healthy scans show: the mean smoothed residual at each place, (LEVELS, H, W), and its mean over the brain.

    residuals: one stack (n, H, W) a healthy scan, 0 outside its brain, as `smooth_residual` gives them.
    """
    total = np.zeros((LEVELS, *residuals[0].shape[1:]), dtype=np.float32)
    weight = np.zeros_like(total)
    for residual in residuals:
        level = np.rint(place_levels(len(residual))).astype(int)
        np.add.at(total, level, residual)
        np.add.at(weight, level, residual > 0)
    # few scans stand behind a pixel, so neighbours are asked too, and the overall mean counts as a few scans
    sigma = (1, 4, 4)
    overall = total.sum() / max(weight.sum(), 1)
    expected = (ndimage.gaussian_filter(total, sigma) + 0.5 * overall) / (ndimage.gaussian_filter(weight, sigma) + 0.5)
    return {"expected": torch.from_numpy(expected), "overall": float(overall)}


def map_anomalies(
    stack: np.ndarray, reconstruction: np.ndarray, spacing_mm: tuple[float, float], calibration: dict
) -> np.ndarray:
    """The anomaly map (n, H, W) float32: how many times the healthy residual at that place; NaN outside the brain."""
    residual = smooth_residual(stack, reconstruction, spacing_mm)
    expected = calibration["expected"].numpy()
    position = place_levels(len(stack))
    below = np.minimum(position.astype(int), LEVELS - 2)
    share = (position - below).astype(np.float32)[:, None, None]
    expected = expected[below] * (1 - share) + expected[below + 1] * share
    return np.where(stack > 0, residual / expected, np.nan)


def map_brightness(stack: np.ndarray) -> np.ndarray:
    """The baseline that needs no model: each brain pixel's rank among its scan's, (0, 1]; NaN outside the brain.

    Ranks are what histogram equalisation makes of intensities (Meissen et al., 2022); high is bright, 1 - rank is dark.
    """
    brain = stack > 0
    _, place, counts = np.unique(stack[brain], return_inverse=True, return_counts=True)
    ranks = np.full(stack.shape, np.nan, dtype=np.float32)
    ranks[brain] = (np.cumsum(counts) / counts.sum())[place]
    return ranks


def score_slices(anomaly: np.ndarray) -> np.ndarray:
    """(n,) score of each slice: the mean of its worst brain pixels."""
    return np.array([_mean_of_worst(plane, WORST_IN_SLICE) for plane in anomaly])


def score_scan(anomaly: np.ndarray) -> float:
    """The scan's score: the mean of the worst pixels of its whole stack."""
    return _mean_of_worst(anomaly, WORST_IN_SCAN)


def _mean_of_worst(values: np.ndarray, share: float) -> float:
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0
    count = max(1, round(share * len(values)))
    return float(np.partition(values, -count)[-count:].mean())
