"""The way from a reconstruction to an anomaly map to a score: one path for every model.

    residual     slice - reconstruction, signed, in units of the slice's [0, 1], smoothed over the stack
    anomaly map  |residual| / what healthy scans show of that sign at that place / the scan's median of the same
    score        of a slice, the mean over the worst share of its brain; of a scan, likewise over its stack

Stacks are (n, H, W) with the background at 0, so `stack > 0` is the brain. What healthy scans show (`calibrate`) comes
from validation scans alone and travels in model.pt. The division by the scan's own median makes maps of scans with
more noise or other contrast comparable: a value of 10 is ten times what is usual in this scan.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import nn

SMOOTHING_MM = 2.0  # standard deviation of the Gaussian over the residual, in the plane and across slices
RIM_PIXELS = 3.0  # the brain's rim, where masks differ and partial volume rules, is faded in over this
LEVELS = 16  # places along the inferior-superior axis at which healthy residuals are kept
PLACE_SMOOTHING = (1, 4, 4)  # standard deviations of the Gaussian over healthy residuals: levels, pixels, pixels
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
    """The signed residual smoothed within the brain: (n, H, W) float32, 0 outside the brain.

    Noise changes its sign from pixel to pixel and cancels; a lesion keeps its sign. `spacing_mm`: between slices,
    between pixels.
    """
    brain = (stack > 0).astype(np.float32)
    sigma = [SMOOTHING_MM / spacing_mm[0], SMOOTHING_MM / spacing_mm[1], SMOOTHING_MM / spacing_mm[1]]
    residual = (stack.astype(np.float32) - reconstruction) * brain
    smoothed = ndimage.gaussian_filter(residual, sigma, truncate=3)
    share = ndimage.gaussian_filter(brain, sigma, truncate=3)
    rim = np.stack([ndimage.distance_transform_edt(plane) for plane in brain]).astype(np.float32)
    return smoothed / np.maximum(share, 0.1) * brain * np.clip(rim / RIM_PIXELS, 0, 1)


def calibrate(residuals: list[np.ndarray]) -> dict:
    """What healthy scans show: {"expected": (2, LEVELS, H, W)}, the root mean square of the residual's positive part
    (0) and of its negative part (1) at each place, for `map_anomalies`.

    residuals: one stack (n, H, W) a healthy scan, 0 outside its brain, as `smooth_residual` gives them.
    """
    total = np.zeros((2, LEVELS, *residuals[0].shape[1:]), dtype=np.float32)
    weight = np.zeros_like(total[0])
    for residual in residuals:
        level = np.rint(np.linspace(0, LEVELS - 1, len(residual))).astype(int)
        for sign, part in enumerate((residual, -residual)):
            np.add.at(total[sign], level, np.maximum(part, 0) ** 2)
        np.add.at(weight, level, residual != 0)
    # few scans stand behind a pixel, so neighbours are asked too, and the overall mean counts for half a scan
    overall = total.sum(axis=(1, 2, 3), keepdims=True) / max(weight.sum(), 1)
    weight = ndimage.gaussian_filter(weight, PLACE_SMOOTHING) + 0.5
    expected = np.stack([ndimage.gaussian_filter(part, PLACE_SMOOTHING) for part in total]) + 0.5 * overall
    return {"expected": torch.from_numpy(np.sqrt(expected / weight))}


def map_anomalies(
    stack: np.ndarray, reconstruction: np.ndarray, spacing_mm: tuple[float, float], calibration: dict
) -> np.ndarray:
    """The anomaly map (n, H, W) float32, in times the scan's usual residual; NaN outside the brain."""
    brain = stack > 0
    residual = smooth_residual(stack, reconstruction, spacing_mm)
    expected = calibration["expected"].numpy()
    position = np.linspace(0, LEVELS - 1, len(stack))
    below = np.minimum(position.astype(int), LEVELS - 2)
    share = (position - below).astype(np.float32)[:, None, None]
    expected = expected[:, below] * (1 - share) + expected[:, below + 1] * share
    anomaly = np.abs(residual) / np.where(residual > 0, expected[0], expected[1])
    return np.where(brain, anomaly / max(float(np.median(anomaly[brain])), 1e-6), np.nan).astype(np.float32)


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
