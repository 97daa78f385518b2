"""Anomaly maps that need no trained model: what the model is compared with."""

from __future__ import annotations

import torch

from models.anomaly import compute_residual
from models.calibration import Calibration


def map_brightness(stack: torch.Tensor) -> torch.Tensor:
    """Each brain pixel's rank among those of its scan, (n, H, W) float32 in (0, 1]; NaN outside the brain.

    Histogram equalisation turns intensities into ranks (Meissen et al., 2022). High is bright; 1 - rank is dark.
    """
    brain = stack > 0
    _, places, counts = torch.unique(stack[brain].float(), return_inverse=True, return_counts=True)
    ranks = torch.full(stack.shape, torch.nan, device=stack.device)
    ranks[brain] = (counts.cumsum(0).double() / counts.sum()).float()[places]
    return ranks


def map_deviation(stack: torch.Tensor, sampling_mm: tuple[float, float], calibration: Calibration) -> torch.Tensor:
    """|z-score| of the smoothed slices against healthy ones at the same place, (n, H, W); NaN outside the brain.

    stack (n, H, W) in [0, 1]; sampling_mm (between slices, between pixels).
    """
    mean, deviation = calibration.expect_intensity(len(stack))
    residual = compute_residual(stack, mean, sampling_mm).values
    return torch.where(stack > 0, residual.abs() / deviation, torch.nan)
