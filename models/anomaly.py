"""The way from a reconstruction to an anomaly map to a score: one path for every model.

    residual     slice - reconstruction, signed, in units of the slice's [0, 1], smoothed over the stack, without what
                 varies only over centimetres: a coil's shading, not a lesion
    anomaly map  |residual| / what healthy scans show of that sign at that place / what they show where the
                 reconstruction looks like that: folds are drawn less surely than white matter; smoothed again, for what
                 lies together says more than single pixels; / the scan's median
    score        of a slice, the mean over the worst share of its brain; of a scan, likewise over its stack

    p-value      conformal: how often a healthy scan scores as high

Stacks are (n, H, W) with the background at 0, so `stack > 0` is the brain. What healthy scans show (`calibrate`) comes
from validation scans alone, needs no lesions, and travels in model.pt. The division by the scan's own median makes maps
of scans with more noise or other contrast comparable: a value of 10 is ten times what is usual in this scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

from models.autoencoder import take_middle

SMOOTHING_MM = 2.0  # standard deviation of the Gaussian over the residual and over the map, in all three directions
SHADING_MM = 20.0  # standard deviation of the Gaussian mean that is taken off the residual
SHADING_LIMIT = 4.0  # medians of |residual|; what is more does not count as shading, or large lesions would
SHADING_CELL = 4  # pixels along each side of what the shading is taken of
LOOKS = 12  # bins of the reconstruction's mean and of its standard deviation around a pixel
LEVELS = 16  # places along the inferior-superior axis at which healthy residuals are kept
PLACE_SMOOTHING = (1, 4, 4)  # standard deviations of the Gaussian over healthy residuals: levels, pixels, pixels
VOXELS_FLAGGED = 0.002  # share of a healthy brain above the calibrated voxel threshold
WORST_IN_SLICE = 0.01  # share of the brain whose mean anomaly is the slice's score
WORST_IN_SCAN = 0.002


@torch.inference_mode()
def reconstruct(
    model: nn.Module,
    stack: np.ndarray,
    spacing_mm: float,
    device: str = "cpu",
    batch_size: int = 32,
    precision: torch.dtype = torch.float32,
) -> np.ndarray:
    """The model's reconstruction of a stack (n, H, W) in [0, 1] whose slices are `spacing_mm` apart.

    The same shape, float32, 0 outside the brain. At the ends of the stack a slice stands for its missing neighbour.
    """
    slices = torch.from_numpy(np.asarray(stack, dtype=np.float32))
    places = torch.arange(len(slices))[:, None] + torch.tensor(model.find_neighbours(spacing_mm))
    parts = []
    for window in places.clamp(0, len(slices) - 1).split(batch_size):
        batch = slices[window].to(device, memory_format=torch.channels_last)
        with torch.autocast(batch.device.type, precision, enabled=precision != torch.float32):
            output = model(batch)
        parts.append(torch.where(take_middle(batch) > 0, output.float(), 0).squeeze(1).cpu())
    return torch.cat(parts).numpy()


def score_mse(stack: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """(n,) plain reconstruction error: the mean squared residual over each slice's brain."""
    brain = stack > 0
    squared = np.where(brain, stack.astype(np.float32) - reconstruction, 0) ** 2
    return squared.sum(axis=(1, 2)) / np.maximum(brain.sum(axis=(1, 2)), 1)


def smooth_residual(stack: np.ndarray, reconstruction: np.ndarray, spacing_mm: tuple[float, float]) -> np.ndarray:
    """The signed residual smoothed within the brain and without shading: (n, H, W) float32, 0 outside the brain.

    Noise changes its sign from pixel to pixel and cancels; a lesion keeps its sign. The brain's rim, where masks differ
    and partial volume rules, is faded in. `spacing_mm`: between slices, between pixels.
    """
    return compare(stack, reconstruction, spacing_mm)[0]


def compare(
    stack: np.ndarray, reconstruction: np.ndarray, spacing_mm: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """(residual (n, H, W) as `smooth_residual` gives it, look (2, n, H, W)), both float32.

    The look is what the reconstruction looks like around each pixel, its mean and its standard deviation: of the
    reconstruction and not of the slice, whose lesion would speak for itself.
    """
    values, drawn = (torch.from_numpy(np.asarray(part, np.float32)) for part in (stack, reconstruction))
    brain = (values > 0).float()
    drawn = drawn * brain
    parts = torch.stack([brain, values - drawn, drawn, drawn * drawn])
    share, residual, mean, squares = _smooth(parts, SMOOTHING_MM, spacing_mm)
    within = 1 / share.clamp(min=0.1)
    residual, mean, squares = residual * within, mean * within, squares * within
    residual -= _estimate_shading(residual, brain, spacing_mm)
    residual *= brain * (2 * share - 1).clamp(0, 1)
    return residual.numpy(), torch.stack([mean, (squares - mean * mean).clamp(min=0).sqrt()]).numpy()


def _estimate_shading(residual: torch.Tensor, brain: torch.Tensor, spacing_mm: tuple[float, float]) -> torch.Tensor:
    """What of a smoothed residual varies only over centimetres, by a wide Gaussian mean within the brain.

    It is taken over cells of pixels, which so wide a Gaussian does not see.
    """
    limit = SHADING_LIMIT * _find_median(residual[brain > 0].abs())
    cells = F.avg_pool2d(torch.stack([residual.clamp(-limit, limit) * brain, brain]), SHADING_CELL)
    total, share = _smooth(cells, SHADING_MM, (spacing_mm[0], spacing_mm[1] * SHADING_CELL))
    shading = (total / (share + 0.02))[:, None]
    return F.interpolate(shading, size=residual.shape[1:], mode="bilinear", align_corners=False)[:, 0]


def _smooth(values: torch.Tensor, sigma_mm: float, spacing_mm: tuple[float, float]) -> torch.Tensor:
    """A Gaussian over the last three axes (n, H, W), as matrix products: many times faster than filters."""
    across, down, along = (
        _weigh(count, sigma_mm / spacing)
        for count, spacing in zip(values.shape[-3:], (spacing_mm[0], spacing_mm[1], spacing_mm[1]), strict=True)
    )
    return (across @ (down @ values @ along.T).flatten(-2)).view(values.shape)


@lru_cache(maxsize=16)
def _weigh(count: int, sigma: float) -> torch.Tensor:
    """(count, count) float32 Gaussian weights of all places for each place; each row sums to 1."""
    places = torch.arange(count, dtype=torch.float64)
    weights = torch.exp(-0.5 * ((places[:, None] - places) / sigma) ** 2)
    weights[weights < 1e-9] = 0  # smaller ones change nothing, and denormal numbers make products ten times slower
    return (weights / weights.sum(1, keepdim=True)).float()


def calibrate(scans: Sequence[tuple[np.ndarray, np.ndarray, tuple[float, float]]]) -> dict:
    """What healthy validation scans show, for maps, thresholds and p-values.

    scans  of each its stack (n, H, W), its reconstruction likewise, and `spacing_mm`; gone through three times

    Returns a dict of tensors:
    expected      (2, LEVELS, H, W) root mean square of the residual's positive (0) and negative (1) part by place
    looks         (2, LOOKS - 1) the limits between the bins of a look's mean and standard deviation
    by_look       (2, LOOKS, LOOKS) what is left of it by sign and look
    intensity     (2, LEVELS, H, W) mean and standard deviation of the slices' values by place (`map_deviation`)
    scan_scores   (scans,) and slice_scores (slices,) sorted
    threshold     () the anomaly above which VOXELS_FLAGGED of a healthy brain lies

    Each scan is mapped with what the others show, for its own residuals would make it look more usual than a new one;
    a single scan has only itself.
    """
    places, limits, intensity = 0, [], 0
    for stack, reconstruction, spacing_mm in scans:
        residual, look = compare(stack, reconstruction, spacing_mm)
        places = places + _sum_by_place(residual)
        limits.append(np.quantile(look[:, stack > 0], np.linspace(0, 1, LOOKS + 1)[1:-1], axis=1).T)
        intensity = intensity + _sum_intensity(stack)
    usual = {"looks": np.mean(limits, axis=0).astype(np.float32), "by_look": np.ones((2, LOOKS, LOOKS), np.float32)}

    def leave_out(totals: np.ndarray, own: np.ndarray) -> np.ndarray:
        return np.maximum(totals - own, 0) if len(scans) > 1 else totals

    def map_as_new(stack: np.ndarray, reconstruction: np.ndarray, spacing_mm: tuple[float, float]) -> tuple:
        residual, look = compare(stack, reconstruction, spacing_mm)
        usual["expected"] = _expect(leave_out(places, _sum_by_place(residual)))
        return residual, look, _divide_by_usual(residual, look, stack > 0, usual)

    looks = []
    for scan in scans:
        residual, look, anomaly = map_as_new(*scan)
        looks.append(_sum_by_look(residual, look, anomaly, usual["looks"]))
    scan_scores, slice_scores, sample = [], [], []
    for scan, own in zip(scans, looks, strict=True):
        usual["by_look"] = _expect_look(leave_out(sum(looks), own))
        anomaly = _smooth_map(map_as_new(*scan)[-1], scan[-1])
        scan_scores.append(score_scan(anomaly))
        slice_scores.extend(score_slices(anomaly))
        sample.append(np.quantile(anomaly[scan[0] > 0], np.linspace(0, 1, 10001)))
    calibration = {
        "expected": _expect(places),
        "looks": usual["looks"],
        "by_look": _expect_look(sum(looks)),
        "intensity": _describe_intensity(intensity),
        "scan_scores": np.sort(scan_scores),
        "slice_scores": np.sort(slice_scores),
        "threshold": np.quantile(sample, 1 - VOXELS_FLAGGED),
    }
    return {key: torch.tensor(value, dtype=torch.float32) for key, value in calibration.items()}


def map_anomalies(
    stack: np.ndarray, reconstruction: np.ndarray, spacing_mm: tuple[float, float], calibration: dict
) -> np.ndarray:
    """The anomaly map (n, H, W) float32, in times the scan's usual residual; NaN outside the brain."""
    residual, look = compare(stack, reconstruction, spacing_mm)
    usual = {key: calibration[key].numpy() for key in ("expected", "looks", "by_look")}
    return _smooth_map(_divide_by_usual(residual, look, stack > 0, usual), spacing_mm)


def map_deviation(stack: np.ndarray, spacing_mm: tuple[float, float], calibration: dict) -> np.ndarray:
    """A baseline that needs no training: |z-score| of the smoothed slice against healthy ones at that place.

    (n, H, W) float32, NaN outside the brain.
    """
    mean, deviation = _at_levels(calibration["intensity"].numpy(), len(stack))
    residual = smooth_residual(stack, mean * (stack > 0), spacing_mm)
    return np.where(stack > 0, np.abs(residual) / deviation, np.nan).astype(np.float32)


def give_p_values(scores: np.ndarray, healthy: np.ndarray) -> np.ndarray:
    """Conformal p-values (Vovk et al., 2005): (1 + how many healthy scores are as high) / (1 + how many there are).

    scores (n,), healthy (m,) sorted. If a new healthy scan is like those of the calibration, p <= alpha happens to it
    with a probability of at most alpha; p is never below 1 / (m + 1).
    """
    as_high = len(healthy) - np.searchsorted(healthy, scores, side="left")
    return (1 + as_high) / (1 + len(healthy))


def count_needed(false_alarms: float) -> int:
    """How many healthy validation scans a p-value of this size needs."""
    return int(np.ceil(1 / false_alarms - 1e-9)) - 1


def find_regions(anomaly: np.ndarray, affine: np.ndarray, threshold: float, smallest_ml: float) -> list[dict]:
    """Connected regions of a map on a scan's grid (I, J, K) at or above the threshold, the largest first.

    Each with its volume (ml), its centre of mass in scanner mm (RAS+), its highest and its mean anomaly.
    """
    labels, count = ndimage.label(np.nan_to_num(anomaly, nan=-1) >= threshold)
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    indices = np.arange(1, count + 1)
    volumes = np.bincount(labels.ravel(), minlength=count + 1)[1:] * voxel_ml
    indices = indices[volumes >= smallest_ml]
    values = np.nan_to_num(anomaly)
    centres = (
        np.array(ndimage.center_of_mass(values, labels, indices)).reshape(-1, 3) @ affine[:3, :3].T + affine[:3, 3]
    )
    regions = [
        {
            "volume_ml": float(volumes[index - 1]),
            **{f"{axis}_mm": float(place) for axis, place in zip("xyz", centre, strict=True)},
            "peak": float(peak),
            "mean": float(mean),
        }
        for index, centre, peak, mean in zip(
            indices,
            centres,
            ndimage.maximum(values, labels, indices),
            ndimage.mean(values, labels, indices),
            strict=True,
        )
    ]
    return sorted(regions, key=lambda region: -region["volume_ml"])


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


def _levels(count: int) -> np.ndarray:
    """(count,) where each kept slice stands between the lowest (0) and the highest (LEVELS - 1)."""
    return np.linspace(0, LEVELS - 1, count)


def _between_levels(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(count,) the level below each kept slice, and how far it is to the next one, 0 to 1."""
    below = np.minimum(_levels(count).astype(int), LEVELS - 2)
    return below, (_levels(count) - below).astype(np.float32)


def _at_levels(places: np.ndarray, count: int) -> np.ndarray:
    """What is known by place (..., LEVELS, H, W), drawn out to a stack's slices: (..., count, H, W)."""
    below, share = _between_levels(count)
    share = share[:, None, None]
    return places[..., below, :, :] * (1 - share) + places[..., below + 1, :, :] * share


def _sum_by_place(residual: np.ndarray) -> np.ndarray:
    """(3, LEVELS, H, W) sums over a stack: squared positive part, squared negative part, how many pixels."""
    total = np.zeros((3, LEVELS, *residual.shape[1:]), dtype=np.float32)
    level = np.rint(_levels(len(residual))).astype(int)
    for part, values in enumerate((np.maximum(residual, 0) ** 2, np.minimum(residual, 0) ** 2, residual != 0)):
        np.add.at(total[part], level, values)
    return total


def _expect(total: np.ndarray) -> np.ndarray:
    """(2, LEVELS, H, W) root mean squares from `_sum_by_place` of some scans.

    Few scans stand behind a pixel, so its neighbours are asked too, and the overall mean counts for half a scan.
    """
    overall = total[:2].sum(axis=(1, 2, 3), keepdims=True) / max(total[2].sum(), 1)
    squares, weight = (ndimage.gaussian_filter(part, (0, *PLACE_SMOOTHING)) for part in (total[:2], total[2:]))
    return np.sqrt((squares + 0.5 * overall) / (weight + 0.5))


def _sum_by_look(residual: np.ndarray, look: np.ndarray, anomaly: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """(3, LOOKS, LOOKS) sums over a stack: squared anomaly of positive and of negative residuals, how many pixels."""
    brain = np.isfinite(anomaly)
    mean, deviation = (np.searchsorted(*pair) for pair in zip(limits, look[:, brain], strict=True))
    total = np.zeros((3, LOOKS, LOOKS), dtype=np.float32)
    np.add.at(total, ((residual[brain] <= 0).astype(int), mean, deviation), anomaly[brain] ** 2)
    np.add.at(total[2], (mean, deviation), 1)
    return total


def _expect_look(total: np.ndarray) -> np.ndarray:
    """(2, LOOKS, LOOKS) root mean squares from `_sum_by_look`; a bin that few pixels stand behind is near 1."""
    return np.sqrt((total[:2] + 10) / (total[2] + 10))


def _divide_by_usual(residual: np.ndarray, look: np.ndarray, brain: np.ndarray, usual: dict) -> np.ndarray:
    """The anomaly map from a smoothed residual (n, H, W): by sign, place and look, and by the scan's own median."""
    places = torch.from_numpy(np.flatnonzero(brain))
    number, pixel = places // brain[0].size, places % brain[0].size
    values, mean, deviation = (torch.from_numpy(volume).flatten()[places] for volume in (residual, *look))
    sign = (values <= 0).long()
    below, share = (torch.from_numpy(part)[number] for part in _between_levels(len(residual)))
    usual = {name: torch.from_numpy(part) for name, part in usual.items()}
    expected, size = usual["expected"].flatten(), brain[0].size
    lower = (sign * LEVELS + below) * size + pixel
    expected = torch.lerp(expected[lower], expected[lower + size], share)
    bins = [torch.bucketize(*pair) for pair in zip((mean, deviation), usual["looks"], strict=True)]
    anomaly = values.abs() / (expected * usual["by_look"][sign, bins[0], bins[1]])
    mapped = torch.full(residual.shape, torch.nan)
    mapped.view(-1)[places] = anomaly / max(_find_median(anomaly), 1e-6)
    return mapped.numpy()


def _smooth_map(anomaly: np.ndarray, spacing_mm: tuple[float, float]) -> np.ndarray:
    """An anomaly map (n, H, W), NaN outside the brain, smoothed within it and in units of its median."""
    anomaly = torch.from_numpy(anomaly)
    brain = anomaly.isfinite()
    total, share = _smooth(torch.stack([anomaly.nan_to_num(0), brain.float()]), SMOOTHING_MM, spacing_mm)
    mean = total / share.clamp(min=1e-6)
    return torch.where(brain, mean / max(_find_median(mean[brain]), 1e-6), torch.nan).numpy()


def _find_median(values: torch.Tensor) -> float:
    """The median of some 100,000 pixels, of every seventh of them: nearly the same, in a seventh of the time."""
    return float(values[::7].median()) if len(values) else 0.0


def _sum_intensity(stack: np.ndarray) -> np.ndarray:
    """(3, LEVELS, H, W) sums over a stack by place: values, their squares, how many brain pixels."""
    total = np.zeros((3, LEVELS, *stack.shape[1:]), dtype=np.float32)
    level = np.rint(_levels(len(stack))).astype(int)
    values = stack.astype(np.float32)
    for part, summand in enumerate((values, values**2, stack > 0)):
        np.add.at(total[part], level, summand)
    return total


def _describe_intensity(total: np.ndarray) -> np.ndarray:
    """(2, LEVELS, H, W) mean and standard deviation of healthy slices by place, from neighbouring brain pixels."""
    overall = total[:2].sum(axis=(1, 2, 3)) / max(total[2].sum(), 1)
    values, squares, weight = ndimage.gaussian_filter(total, (0, 0.5, 1, 1))
    mean = (values + 0.5 * overall[0]) / (weight + 0.5)
    variance = (squares + 0.5 * overall[1]) / (weight + 0.5) - mean**2
    return np.stack([mean, np.sqrt(np.maximum(variance, 1e-4))])
