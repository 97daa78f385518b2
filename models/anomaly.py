"""From a slice and its reconstruction to an anomaly map and a score: one path for every model.

    residual     smooth(slice - reconstruction), signed, in units of the slice's [0, 1]; without what varies only over
                 centimetres, which is a coil's shading, not a lesion
    anomaly map  |residual| / expected residual, smoothed again, because lesions are connected and noise is not, but
                 not across edges of the slice, where lesions end; in units of the scan's median. What is expected of
                 healthy scans depends on the residual's sign, on the place and on the texture of the reconstruction
                 there (models/calibration.py). Where it stands out, what does not look like its core is lowered
    score        of a slice, the mean over the worst share of its brain; of a scan, the same over its stack

The division by the scan's own median makes scans of different noise and contrast comparable: 10 is ten times what is
typical of this scan. Everything is a torch tensor on the device of its inputs. Stacks are (n, H, W) with the
background at 0, so `stack > 0` is the brain; `sampling_mm` is the distance (between slices, between pixels).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

from models.autoencoder import take_middle

SMOOTHING_MM = 2.0  # standard deviation of the Gaussian over the residual, in all three directions
WINDOW_MM = 3.0  # standard deviation of the Gaussian windows in which the map follows the slice
EDGE_CELL = 2  # pixels along each side of the cells over which it is estimated
EDGE = 0.03  # contrast in a window, as a standard deviation of [0, 1], above which it is an edge
CORE_MM = 10.0  # standard deviation of the Gaussian window in which what stands out is compared with its core
CORE_CELL = 4  # pixels along each side of the cells over which it is estimated
NOTABLE = 0.5  # share of the voxel threshold from which on the map is compared with its core
HALO = 0.4  # share of the core's anomaly below which a pixel may be healthy tissue that the smoothing reached
SHADING_MM = 20.0  # standard deviation of the Gaussian mean that is subtracted from the residual
SHADING_LIMIT = 4.0  # medians of |residual|; larger values are clipped, or large lesions would count as shading
SHADING_CELL = 4  # pixels along each side of the cells over which the shading is estimated
WORST_IN_SLICE = 0.01  # share of the brain whose mean anomaly is the slice's score
WORST_IN_SCAN = 0.002


class Residual(NamedTuple):
    """What `compute_residual` finds in a stack, float32.

    values   (n, H, W) smoothed slice - reconstruction without shading: positive where the slice is brighter; 0 outside
             the brain
    texture  (2, n, H, W) mean and standard deviation of the reconstruction around each pixel. Not of the slice:
             a lesion would be compared with tissue that looks like lesions
    """

    values: torch.Tensor
    texture: torch.Tensor


@torch.inference_mode()
def reconstruct(
    model: nn.Module,
    stack: torch.Tensor | np.ndarray,
    slice_spacing_mm: float,
    batch_size: int = 32,
    precision: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The model's reconstruction of a stack (n, H, W) in [0, 1]: the same shape, float32, on the model's device.

    It is 0 outside the brain. At the ends of the stack a slice replaces its missing neighbour.
    """
    device = next(model.parameters()).device
    slices = torch.as_tensor(stack, dtype=torch.float32, device=device)
    indices = torch.arange(len(slices))[:, None] + torch.tensor(model.neighbour_offsets(slice_spacing_mm))
    parts = []
    for window in indices.clamp(0, len(slices) - 1).split(batch_size):
        batch = slices[window.to(device)].contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            output = model(batch)
        parts.append(torch.where(take_middle(batch) > 0, output.float(), 0).squeeze(1))
    return torch.cat(parts)


def compute_residual(stack: torch.Tensor, reconstruction: torch.Tensor, sampling_mm: tuple[float, float]) -> Residual:
    """The smoothed signed residual of a stack (n, H, W), and the texture of its reconstruction.

    Noise changes its sign from pixel to pixel and cancels; a lesion keeps its sign. The residual fades out towards the
    rim of the brain, where masks differ and partial volume dominates.
    """
    stack = stack.float()
    brain = (stack > 0).float()
    drawn = reconstruction * brain
    parts = torch.stack([brain, stack - drawn, drawn, drawn * drawn])
    share, values, mean, squares = smooth(parts, SMOOTHING_MM, sampling_mm)
    within = 1 / share.clamp(min=0.1)
    values, mean, squares = values * within, mean * within, squares * within
    values -= _estimate_shading(values, brain, sampling_mm)
    values *= brain * (2 * share - 1).clamp(0, 1)
    return Residual(values, torch.stack([mean, (squares - mean * mean).clamp(min=0).sqrt()]))


def _estimate_shading(residual: torch.Tensor, brain: torch.Tensor, sampling_mm: tuple[float, float]) -> torch.Tensor:
    """The part of a smoothed residual that varies only over centimetres: a wide Gaussian mean within the brain.

    Cells of 4x4 pixels lose nothing under so wide a Gaussian and take a fraction of the time.
    """
    limit = SHADING_LIMIT * find_median(residual[brain > 0].abs())
    cells = F.avg_pool2d(torch.stack([residual.clamp(-limit, limit) * brain, brain]), SHADING_CELL)
    total, share = smooth(cells, SHADING_MM, (sampling_mm[0], sampling_mm[1] * SHADING_CELL))
    return _stretch((total / (share + 0.02))[None], SHADING_CELL)[0]


def map_anomalies(
    divided: torch.Tensor,
    stack: torch.Tensor,
    reconstruction: torch.Tensor,
    sampling_mm: tuple[float, float],
    threshold: float,
) -> torch.Tensor:
    """The anomaly map (n, H, W), float32, in units of the scan's median; NaN outside the brain.

    divided    |residual| / expected residual (`Calibration.divide`); stack and reconstruction likewise (n, H, W)
    threshold  the voxel threshold, from half of which on the map is compared with its core
    """
    return sharpen_map(smooth_map(divided, stack, sampling_mm), stack, reconstruction, sampling_mm, threshold)


def smooth_map(divided: torch.Tensor, stack: torch.Tensor, sampling_mm: tuple[float, float]) -> torch.Tensor:
    """The anomaly map (n, H, W) of a stack from |residual| / expected residual, both (n, H, W); NaN outside the brain.

    Fast guided filter (He and Sun, 2015) with Gaussian windows: in each, the map is a straight line over the stack's
    intensity, flat where there is no edge. So a lesion is filled, and what is beyond its edge is not.
    """
    brain, guide = stack > 0, stack.float()
    values = torch.where(brain, divided, 0)
    cells_mm = (sampling_mm[0], sampling_mm[1] * EDGE_CELL)
    parts = torch.stack([brain.float(), guide, values, guide * guide, guide * values])
    cells = F.avg_pool2d(parts, EDGE_CELL)
    means = smooth(cells, WINDOW_MM, cells_mm)
    within = 1 / means[0].clamp(min=1e-3)
    guide_mean, value_mean, squares, products = means[1:] * within
    variance = (squares - guide_mean * guide_mean).clamp(min=0)
    slope = (products - guide_mean * value_mean) / (variance + EDGE**2)
    lines = torch.stack([slope, value_mean - slope * guide_mean]) * cells[0]
    lines = smooth(lines, WINDOW_MM, cells_mm) * within
    slope, level = _stretch(lines, EDGE_CELL)
    smoothed = (slope * guide + level).clamp(min=0)
    return torch.where(brain, smoothed / max(find_median(smoothed[brain]), 1e-6), torch.nan)


def sharpen_map(
    smoothed: torch.Tensor,
    stack: torch.Tensor,
    reconstruction: torch.Tensor,
    sampling_mm: tuple[float, float],
    threshold: float,
) -> torch.Tensor:
    """The smoothed map (n, H, W) with less of the healthy tissue in what stands out: from NOTABLE of the threshold on.

    Smoothing spreads a lesion over the tissue next to it. So a pixel that stands out is compared with the core around
    it: what stands out within CORE_MM, weighted by the square of the map. It counts whole where its intensity is the
    core's, and half where it differs from that as much as the core differs from its reconstruction (root mean square;
    Cauchy's weights of robust statistics). What is then below HALO of the core is bent down, for the surroundings of a
    strong lesion shall not count more than a weak lesion. Other pixels are unchanged, NaN outside the brain.
    """
    places = (smoothed >= NOTABLE * threshold).flatten().nonzero()[:, 0]  # NaN is not
    values, intensity, drawn = (part.flatten()[places].float() for part in (smoothed, stack, reconstruction))
    parts = torch.stack([torch.ones_like(values), values, intensity, drawn, intensity * intensity])
    weighted = values.new_zeros(len(parts), smoothed.numel())
    weighted[:, places] = values**2 * parts
    cells = F.avg_pool2d(weighted.view(-1, *smoothed.shape), CORE_CELL)
    total, *parts = smooth(cells, CORE_MM, (sampling_mm[0], sampling_mm[1] * CORE_CELL))
    level, core, core_drawn, squares = (part / total.clamp(min=1e-6) for part in parts)
    contrast = (squares - 2 * core_drawn * core + core_drawn * core_drawn).clamp(min=1e-6)
    level, core, contrast = _stretch(torch.stack([level, core, contrast]), CORE_CELL).flatten(1)[:, places]
    above = values * contrast / (contrast + (intensity - core) ** 2) - threshold
    room = HALO * level - threshold
    bent = torch.where((above > 0) & (above < room), above * above / room, above)
    sharpened = smoothed.clone()
    sharpened.view(-1)[places] = threshold + bent
    return sharpened


def _stretch(cells: torch.Tensor, side: int) -> torch.Tensor:
    """(k, n, H / side, W / side) values of cells of so many pixels a side as (k, n, H, W), bilinear."""
    return F.interpolate(cells, scale_factor=float(side), mode="bilinear", align_corners=False)


def score_mse(stack: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """(n,) plain reconstruction error: the mean squared residual over each slice's brain."""
    brain = stack > 0
    squared = torch.where(brain, stack - reconstruction, 0) ** 2
    return squared.sum((1, 2)) / brain.sum((1, 2)).clamp(min=1)


def score_slices(anomaly: torch.Tensor) -> torch.Tensor:
    """(n,) score of each slice of a map, NaN outside the brain: the mean of its worst pixels."""
    return _average_worst(anomaly.flatten(1), WORST_IN_SLICE)


def score_scan(anomaly: torch.Tensor) -> float:
    """The score of a scan: the mean of the worst pixels of its whole map."""
    return float(_average_worst(anomaly.flatten()[None], WORST_IN_SCAN))


def _average_worst(values: torch.Tensor, share: float) -> torch.Tensor:
    """(k,) mean of the highest share, and at least of one, of what is not NaN in each row of (k, m) values >= 0."""
    counts = (share * values.isfinite().sum(1).double()).round().clamp(min=1).long()
    highest = values.nan_to_num(0).topk(int(counts.max())).values
    chosen = torch.arange(highest.shape[1], device=values.device) < counts[:, None]
    return torch.where(chosen, highest, 0).sum(1) / counts


def find_median(values: torch.Tensor) -> float:
    """The median of every seventh of some 100,000 pixels: nearly that of all, in a seventh of the time; of none, 0."""
    return float(values[::7].median()) if len(values) else 0.0


def find_largest_mass(anomaly: torch.Tensor, threshold: float, sampling_mm: tuple[float, float]) -> float:
    """The largest sum over a region of a map (n, H, W) at or above the threshold, times a pixel's volume in ml.

    Pixels are connected over faces, NaN is outside; 0 where nothing reaches the threshold.
    """
    values = anomaly.nan_to_num(0).cpu().numpy()
    labels, count = ndimage.label(values >= threshold)
    masses = ndimage.sum_labels(values, labels, range(1, count + 1))
    return float(max(masses, default=0)) * sampling_mm[0] * sampling_mm[1] ** 2 / 1000


def smooth(values: torch.Tensor, sigma_mm: float, sampling_mm: tuple[float, float]) -> torch.Tensor:
    """A Gaussian mean over the last three axes (n, H, W) within the stack, which is not padded with zeros."""
    spacings = (sampling_mm[0], sampling_mm[1], sampling_mm[1])
    return multiply_axes(
        values,
        *(
            _weigh(count, sigma_mm / spacing, values.device)
            for count, spacing in zip(values.shape[-3:], spacings, strict=True)
        ),
    )


def multiply_axes(values: torch.Tensor, across: torch.Tensor, down: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """Apply one square matrix to each of the last three axes: filters as products, many times faster than loops."""
    return (across @ (down @ values @ along.T).flatten(-2)).view(values.shape)


@lru_cache(maxsize=16)
def _weigh(count: int, sigma: float, device: torch.device) -> torch.Tensor:
    """(count, count) float32 Gaussian weights, a row for each place; each row sums to 1."""
    places = torch.arange(count, dtype=torch.float64)
    weights = torch.exp(-0.5 * ((places[:, None] - places) / sigma) ** 2)
    weights[weights < 1e-9] = 0  # smaller ones have no effect, and denormal numbers make products ten times slower
    return (weights / weights.sum(1, keepdim=True)).float().to(device)
