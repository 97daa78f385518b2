"""What healthy scans lead one to expect at each place and for each texture: sums over scans, and means from them.

Sums of single scans add up, so what all scans but one show is a difference.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from models.anomaly import Residual, multiply_axes

TEXTURE_BINS = 12  # of the reconstruction's local mean, and as many of its local standard deviation
LEVELS = 16  # places along the inferior-superior axis at which healthy scans are described
PLACE_SMOOTHING = (1, 4, 4)  # standard deviations of the Gaussian over healthy residuals: levels, pixels, pixels
INTENSITY_SMOOTHING = (0.5, 1, 1)
OVERALL_WEIGHT = 0.5  # weight of the overall mean at each place, in scans
TEXTURE_PRIOR = 10  # pixels with a factor of 1 that are added to each texture bin


def _place_slices(slices: int) -> torch.Tensor:
    """(slices,) float64: where each kept slice lies between the lowest (0) and the highest (LEVELS - 1)."""
    return torch.arange(slices, dtype=torch.float64) * ((LEVELS - 1) / max(slices - 1, 1))


def find_levels(slices: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(slices,) the level below each kept slice, and the share of the way to the next level, 0 to 1."""
    places = _place_slices(slices)
    below = places.long().clamp(max=LEVELS - 2)
    return below.to(device), (places - below).float().to(device)


def sum_by_level(values: torch.Tensor) -> torch.Tensor:
    """(k, LEVELS, H, W) sums of the slices of (k, n, H, W) nearest to each level."""
    nearest = _place_slices(values.shape[1]).round().long()
    chosen = F.one_hot(nearest, LEVELS).T.float().to(values.device)  # a product: sums in one order on every device
    return (chosen @ values.float().flatten(2)).unflatten(2, values.shape[2:])


def sum_by_place(residual: torch.Tensor) -> torch.Tensor:
    """(3, LEVELS, H, W) sums over a stack: squared positive part, squared negative part, number of pixels."""
    return sum_by_level(torch.stack([residual.clamp(min=0) ** 2, residual.clamp(max=0) ** 2, residual != 0]))


def expect_at_place(sums: torch.Tensor) -> torch.Tensor:
    """(2, LEVELS, H, W) root mean squares from `sum_by_place` of some scans, each place with its neighbours."""
    return _average_nearby(sums, PLACE_SMOOTHING).sqrt()


def describe_intensity(sums: torch.Tensor) -> torch.Tensor:
    """(2, LEVELS, H, W) mean and standard deviation from sums of values, of squares and of pixels."""
    mean, squares = _average_nearby(sums, INTENSITY_SMOOTHING)
    return torch.stack([mean, (squares - mean**2).clamp(min=1e-4).sqrt()])


def _average_nearby(sums: torch.Tensor, sigmas: tuple[float, float, float]) -> torch.Tensor:
    """(2, LEVELS, H, W) means from (3, LEVELS, H, W): two sums and the number of pixels, each smoothed over places.

    Few scans reach a pixel, so the overall mean has the weight of half a scan.
    """
    overall = sums[:2].sum((1, 2, 3), keepdim=True) / sums[2].sum().clamp(min=1)
    weights = (_weigh_reflected(*pair, sums.device) for pair in zip(sums.shape[1:], sigmas, strict=True))
    *totals, count = multiply_axes(sums, *weights)
    return (torch.stack(totals) + OVERALL_WEIGHT * overall) / (count + OVERALL_WEIGHT)


@lru_cache(maxsize=8)
def _weigh_reflected(count: int, sigma: float, device: torch.device) -> torch.Tensor:
    """(count, count) float32 Gaussian weights up to 4 sigma, reflected at the ends (scipy.ndimage.gaussian_filter)."""
    reach = int(4 * sigma + 0.5)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2).double()
    places = (torch.arange(count)[:, None] + offsets) % (2 * count)
    places = torch.minimum(places, 2 * count - 1 - places)
    matrix = torch.zeros(count, count, dtype=torch.float64)
    return matrix.scatter_add_(1, places, (weights / weights.sum()).expand(places.shape)).float().to(device)


def sum_by_texture(residual: Residual, anomaly: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """(3, TEXTURE_BINS, TEXTURE_BINS) sums: squared anomaly of positive and negative residuals, number of pixels."""
    brain = anomaly.isfinite()
    row, column = (torch.bucketize(part[brain], limits) for part, limits in zip(residual.texture, edges, strict=True))
    bins = row * TEXTURE_BINS + column
    signed = bins + (residual.values[brain] <= 0) * TEXTURE_BINS**2
    squares = torch.bincount(signed, anomaly[brain].double() ** 2, 2 * TEXTURE_BINS**2)
    pixels = torch.bincount(bins, minlength=TEXTURE_BINS**2)
    return torch.cat([squares, pixels]).view(3, TEXTURE_BINS, TEXTURE_BINS)


def expect_with_texture(sums: torch.Tensor) -> torch.Tensor:
    """(2, TEXTURE_BINS, TEXTURE_BINS) root mean squares from `sum_by_texture`; near 1 in bins of few pixels."""
    return ((sums[:2] + TEXTURE_PRIOR) / (sums[2] + TEXTURE_PRIOR)).sqrt().float()
