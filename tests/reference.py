"""The anomaly map and its calibration in NumPy and SciPy, as models/anomaly.py and calibration.py describe them.

Slow, and with every number written out: what the fast code must give. The benchmarks time against it.
Stacks are (n, H, W) with the background at 0; `sampling_mm` is (between slices, between pixels).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from skimage.transform import resize

from models.anomaly import compute_residual, map_anomalies
from models.calibration import Calibration

SMOOTHING_MM, SHADING_MM, SHADING_LIMIT = 2.0, 20.0, 4.0
WINDOW_MM, EDGE, EDGE_CELL = 3.0, 0.03, 2
CORE_MM, HALO, CORE_CELL = 10.0, 0.4, 4
LEVELS, TEXTURE_BINS = 16, 12
Scan = tuple[np.ndarray, np.ndarray, tuple[float, float]]  # stack, reconstruction, sampling_mm


def smooth(values: np.ndarray, sigma_mm: float, sampling_mm: tuple[float, float]) -> np.ndarray:
    """The Gaussian mean around each pixel of what lies inside the stack."""
    for axis, spacing in enumerate((sampling_mm[0], sampling_mm[1], sampling_mm[1])):
        sigma, shape = sigma_mm / spacing, [1, 1, 1]
        shape[axis] = values.shape[axis]
        inside = ndimage.gaussian_filter1d(np.ones(shape[axis]), sigma, mode="constant").reshape(shape)
        values = ndimage.gaussian_filter1d(values, sigma, axis, mode="constant") / inside
    return values


def find_median(values: np.ndarray) -> float:
    """That of every seventh pixel, the lower of the two in the middle: what is near enough is in the method's units."""
    return np.quantile(values[::7], 0.5, method="lower")


def compare_plainly(
    stack: np.ndarray, reconstruction: np.ndarray, sampling_mm: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed residual without shading, and the reconstruction's local mean and standard deviation."""
    brain = stack > 0
    stack, drawn = (np.where(brain, values, 0).astype(np.float32) for values in (stack, reconstruction))
    share = smooth(brain.astype(np.float32), SMOOTHING_MM, sampling_mm)
    within = np.maximum(share, 0.1)
    residual, mean, squares = (
        smooth(values, SMOOTHING_MM, sampling_mm) / within for values in (stack - drawn, drawn, drawn**2)
    )
    limit = SHADING_LIMIT * find_median(np.abs(residual[brain]))
    shading = smooth(np.clip(residual, -limit, limit) * brain, SHADING_MM, sampling_mm)
    residual -= shading / (smooth(brain.astype(np.float32), SHADING_MM, sampling_mm) + 0.02)
    residual *= brain * np.clip(2 * share - 1, 0, 1)
    return residual, mean, np.sqrt(np.maximum(squares - mean**2, 0))


def map_scan(
    stack: torch.Tensor, reconstruction: torch.Tensor, sampling_mm: tuple[float, float], calibration: Calibration
) -> torch.Tensor:
    """The fast code's anomaly map."""
    divided = calibration.divide(compute_residual(stack, reconstruction, sampling_mm), stack > 0)
    return map_anomalies(divided, stack, reconstruction, sampling_mm, calibration.voxel_threshold)


def map_plainly(
    stack: np.ndarray, reconstruction: np.ndarray, sampling_mm: tuple[float, float], calibration: Calibration
) -> np.ndarray:
    """The anomaly map, NaN outside the brain."""
    names = ("expected_residual", "texture_edges", "texture_factor")
    expected, edges, factor = (getattr(calibration, name).numpy() for name in names)
    compared = compare_plainly(stack, reconstruction, sampling_mm)
    mapped = smooth_plainly(divide_plainly(compared, stack > 0, expected, edges, factor), stack, sampling_mm)
    return sharpen_plainly(mapped, stack, reconstruction, sampling_mm, calibration.voxel_threshold)


def divide_plainly(compared: tuple, brain: np.ndarray, expected, edges, factor) -> np.ndarray:
    """|residual| in times what healthy scans show there and with that texture, in units of its median."""
    residual, mean, deviation = compared
    expected = ndimage.zoom(expected, (1, len(residual) / LEVELS, 1, 1), order=1)
    negative = residual <= 0
    factors = factor[negative.astype(int), np.searchsorted(edges[0], mean), np.searchsorted(edges[1], deviation)]
    divided = np.where(brain, np.abs(residual) / (np.where(negative, expected[1], expected[0]) * factors), np.nan)
    return divided / find_median(divided[brain])


def smooth_plainly(divided: np.ndarray, stack: np.ndarray, sampling_mm: tuple[float, float]) -> np.ndarray:
    """The map smoothed within the brain along the stack's edges, in units of its median: He and Sun's guided filter."""
    brain, cells_mm = stack > 0, (sampling_mm[0], sampling_mm[1] * EDGE_CELL)
    guide, values = stack.astype(np.float64), np.where(brain, divided, 0)
    share = average_windows(brain, cells_mm)
    guide_mean, mean, squares, products = (
        average_windows(part, cells_mm) / np.maximum(share, 1e-3) for part in (guide, values, guide**2, guide * values)
    )
    slope = (products - guide_mean * mean) / (squares - guide_mean**2 + EDGE**2)
    lines = [
        smooth(part * average_cells(brain, EDGE_CELL), WINDOW_MM, cells_mm) / np.maximum(share, 1e-3)
        for part in (slope, mean - slope * guide_mean)
    ]
    slope, level = (stretch(part, stack.shape[1:]) for part in lines)
    mapped = np.maximum(slope * guide + level, 0)
    return np.where(brain, mapped / find_median(mapped[brain]), np.nan)


def sharpen_plainly(
    mapped: np.ndarray, stack: np.ndarray, drawn: np.ndarray, sampling_mm: tuple[float, float], threshold: float
) -> np.ndarray:
    """The map with what stands out compared with its core, which is what stands out within 10 mm."""
    places = np.nan_to_num(mapped) >= threshold / 2
    values, stack, drawn = np.nan_to_num(mapped), stack.astype(np.float64), drawn.astype(np.float64)

    def average(what: np.ndarray) -> np.ndarray:
        weights, cells_mm = places * values**2, (sampling_mm[0], sampling_mm[1] * CORE_CELL)
        total, weight = (smooth(average_cells(x, CORE_CELL), CORE_MM, cells_mm) for x in (weights * what, weights))
        return total / np.maximum(weight, 1e-6)

    core, core_drawn, slices = average(stack), average(drawn), stack.shape[1:]
    contrast = stretch(average(stack**2) - 2 * core_drawn * core + core_drawn**2, slices)
    weighted = values / (1 + (stack - stretch(core, slices)) ** 2 / np.maximum(contrast, 1e-6))
    halo = HALO * stretch(average(values), slices)
    low = (threshold < weighted) & (weighted < halo)
    bent = np.where(low, threshold + (weighted - threshold) ** 2 / np.where(low, halo - threshold, 1), weighted)
    return np.where(places, bent, mapped)


def average_cells(values: np.ndarray, side: int) -> np.ndarray:
    """(n, H / side, W / side) means of square cells."""
    slices, height, width = values.shape
    return values.reshape(slices, height // side, side, width // side, side).mean((2, 4))


def stretch(cells: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Such means as (n, H, W), bilinear."""
    return np.stack([resize(plane, shape, order=1, mode="edge") for plane in cells])


def average_windows(values: np.ndarray, cells_mm: tuple[float, float]) -> np.ndarray:
    """The Gaussian mean around each cell."""
    return smooth(average_cells(values, EDGE_CELL), WINDOW_MM, cells_mm)


def calibrate_plainly(scans: list[Scan]) -> dict:
    """What healthy scans show, each scan mapped with what the others show; needs two scans or more."""
    compared = [compare_plainly(*scan) for scan in scans]
    brains = [stack > 0 for stack, _, _ in scans]
    others = [[j for j in range(len(scans)) if j != i] for i in range(len(scans))]
    shares = np.arange(1, TEXTURE_BINS) / TEXTURE_BINS
    edges = np.mean(
        [[np.quantile(part[brains[i]], shares) for part in compared[i][1:]] for i in range(len(scans))], axis=0
    )
    flat = np.ones((2, TEXTURE_BINS, TEXTURE_BINS))
    expected = [expect_at_place([compared[j][0] for j in others[i]]) for i in range(len(scans))]
    divided = [divide_plainly(compared[i], brains[i], expected[i], edges, flat) for i in range(len(scans))]
    maps = []
    for i, (stack, _, sampling_mm) in enumerate(scans):
        factor = expect_with_texture([compared[j] for j in others[i]], [divided[j] for j in others[i]], edges)
        mapped = divide_plainly(compared[i], brains[i], expected[i], edges, factor)
        maps.append(smooth_plainly(mapped, stack, sampling_mm))
    threshold = np.quantile([np.nanquantile(mapped, np.linspace(0, 1, 10001)) for mapped in maps], 0.998)
    maps = [sharpen_plainly(mapped, *scan, threshold) for mapped, scan in zip(maps, scans, strict=True)]
    masses = [find_largest_mass(mapped, threshold, scan[2]) for mapped, scan in zip(maps, scans, strict=True)]
    return {
        "expected_residual": expect_at_place([parts[0] for parts in compared]),
        "texture_edges": edges,
        "texture_factor": expect_with_texture(compared, divided, edges),
        "intensity": describe_intensity([stack for stack, _, _ in scans]),
        "scan_scores": np.sort([mean_of_worst(mapped, 0.002) for mapped in maps]),
        "slice_scores": np.sort([mean_of_worst(plane, 0.01) for mapped in maps for plane in mapped]),
        "voxel_threshold": threshold,
        "region_masses": np.sort(masses),
    }


def find_largest_mass(mapped: np.ndarray, threshold: float, sampling_mm: tuple[float, float]) -> float:
    """The largest sum of a map over one of its connected parts at or above the threshold, in ml."""
    parts, count = ndimage.label(np.nan_to_num(mapped) >= threshold)
    sums = [mapped[parts == part].sum() for part in range(1, count + 1)]
    return max(sums, default=0) * sampling_mm[0] * sampling_mm[1] ** 2 / 1000


def expect_at_place(residuals: list[np.ndarray]) -> np.ndarray:
    """(2, LEVELS, H, W) root mean square of the positive and negative parts; the overall one counts for half a scan."""
    parts = []
    counts = sum(sum_at_levels(residual != 0) for residual in residuals)
    weight = ndimage.gaussian_filter(counts, (1, 4, 4))
    for sign in (1, -1):
        squares = sum(sum_at_levels(np.maximum(sign * residual, 0) ** 2) for residual in residuals)
        overall = squares.sum() / counts.sum()
        parts.append(np.sqrt((ndimage.gaussian_filter(squares, (1, 4, 4)) + overall / 2) / (weight + 0.5)))
    return np.stack(parts)


def expect_with_texture(compared: list, divided: list, edges: np.ndarray) -> np.ndarray:
    """(2, bins, bins) root mean square of what is left after places, by sign and texture; ten pixels of 1 are added."""
    squares, counts = np.full((2, TEXTURE_BINS, TEXTURE_BINS), 10.0), np.full((TEXTURE_BINS, TEXTURE_BINS), 10)
    for (residual, mean, deviation), values in zip(compared, divided, strict=True):
        for place in np.argwhere(np.isfinite(values)):
            place = tuple(place)
            row, column = (edges[0] < mean[place]).sum(), (edges[1] < deviation[place]).sum()
            counts[row, column] += 1
            squares[int(residual[place] <= 0), row, column] += values[place] ** 2
    return np.sqrt(squares / counts)


def describe_intensity(stacks: list[np.ndarray]) -> np.ndarray:
    """(2, LEVELS, H, W) mean and standard deviation of the values; the overall ones count for half a scan."""
    sums = [sum(sum_at_levels(stack.astype(float) ** power) for stack in stacks) for power in (1, 2)]
    counts = sum(sum_at_levels(stack > 0) for stack in stacks)
    weight = ndimage.gaussian_filter(counts, (0.5, 1, 1)) + 0.5
    mean, squares = (
        (ndimage.gaussian_filter(total, (0.5, 1, 1)) + total.sum() / counts.sum() / 2) / weight for total in sums
    )
    return np.stack([mean, np.sqrt(np.maximum(squares - mean**2, 1e-4))])


def sum_at_levels(values: np.ndarray) -> np.ndarray:
    """(LEVELS, H, W) sums of a stack's slices by the nearest of the levels from its lowest to its highest."""
    total = np.zeros((LEVELS, *values.shape[1:]))
    for number, plane in enumerate(values):
        total[round(number / (len(values) - 1) * (LEVELS - 1))] += plane
    return total


def mean_of_worst(values: np.ndarray, share: float) -> float:
    """The mean of the highest share of all numbers, at least of one."""
    values = np.sort(values[np.isfinite(values)])
    return values[-max(1, round(share * len(values))) :].mean()


def make_scan(seed: int, slices: int = 12, size: int = 32, offset: float = 0.0) -> Scan:
    """An ellipsoid brain that goes on beyond the stack, with its reconstruction: no axis, side or sign is like another.

    The errors are larger in one half and where the tissue is dark, shaded, and in part `offset` brighter than drawn.
    """
    rng = np.random.default_rng(seed)
    z, y, x = np.mgrid[-1 : 1 : slices * 1j, -1 : 1 : size * 1j, -1 : 1 : size * 1j]
    brain = (x / 0.8) ** 2 + ((y + 0.04) / 0.9) ** 2 + (z / 1.3) ** 2 < 1
    drawn = 0.5 + 0.2 * np.sin(9 * x + seed) * np.cos(8 * y) + 0.1 * z
    error = ndimage.gaussian_filter(rng.normal(size=brain.shape), (0.5, 1, 1)) * (0.05 + 0.1 * (x > 0) + 0.1 * (z > 0))
    error = error * np.where(drawn < 0.45, 2, 1) + 0.05 * x
    error = error + offset * ((np.abs(x - 0.2) < 0.2) & (np.abs(y + 0.3) < 0.2) & (np.abs(z - 0.3) < 0.3))
    stack = np.where(brain, np.clip(drawn + error, 0.01, 1), 0).astype(np.float32)
    return stack, np.where(brain, drawn, 0.3).astype(np.float32), (2.5, 1.5)
