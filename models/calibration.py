"""What healthy scans show: the expected residual, the voxel threshold, and p-values for scores.

It comes from validation scans alone, needs no lesions, and is stored in model.pt. A residual is divided by
`expected_residual` of its sign and place, which is larger where anatomy varies, and by `texture_factor` of its sign and
texture bin, which is larger where the reconstruction is less certain, as in cortical folds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from common.cli import DataError
from models.anomaly import (
    Residual,
    compute_residual,
    find_largest_mass,
    find_median,
    map_anomalies,
    reconstruct,
    score_scan,
    score_slices,
    smooth_map,
)
from models.expectation import (
    LEVELS,
    TEXTURE_BINS,
    describe_intensity,
    expect_at_place,
    expect_with_texture,
    find_levels,
    sum_by_level,
    sum_by_place,
    sum_by_texture,
)

VERSION = 3  # of the anomaly map: what is expected of one says nothing about another
VOXELS_FLAGGED = 0.002  # share of a healthy brain above the voxel threshold
STATE_KEYS = {  # field: its key in model.pt
    "expected_residual": "expected",
    "texture_edges": "looks",
    "texture_factor": "by_look",
    "intensity": "intensity",
    "scan_scores": "scan_scores",
    "slice_scores": "slice_scores",
    "voxel_threshold": "threshold",
    "median_residuals": "median_residuals",
    "region_masses": "region_masses",
}
OF_SCANS = ("scan_scores", "slice_scores", "median_residuals", "region_masses")
Compared = tuple[torch.Tensor, torch.Tensor, tuple[float, float]]  # stack, reconstruction, sampling_mm
Expected = tuple["Calibration", Compared, Residual]  # what is expected of a scan, the scan, its residual


@dataclass(frozen=True)
class Calibration:
    """What healthy validation scans show, float32. First index of signed arrays: 0 for positive residuals, else 1.

    expected_residual  (2, LEVELS, H, W) root mean square of the residual by sign and place
    texture_edges      (2, TEXTURE_BINS - 1) limits between the bins of the local mean and of the standard deviation
    texture_factor     (2, TEXTURE_BINS, TEXTURE_BINS) what remains after the division by place, by sign and texture
    intensity          (2, LEVELS, H, W) mean and standard deviation of the slices' values by place
    scan_scores        (scans,) sorted
    slice_scores       (slices,) sorted
    voxel_threshold    the anomaly above which VOXELS_FLAGGED of a healthy brain lies
    median_residuals   (scans,) sorted medians over each brain of `divide`
    region_masses      (scans,) sorted: the largest mass of a connected region at or above the threshold, 0 where none
                       is (`anomaly.find_largest_mass`)
    """

    expected_residual: torch.Tensor
    texture_edges: torch.Tensor
    texture_factor: torch.Tensor
    intensity: torch.Tensor
    scan_scores: torch.Tensor
    slice_scores: torch.Tensor
    voxel_threshold: float
    median_residuals: torch.Tensor
    region_masses: torch.Tensor

    @classmethod
    def fit(cls, scans: Sequence[Compared], robust: bool = False) -> Calibration:
        """Calibrate with healthy scans, read four times: (stack (n, H, W), reconstruction likewise, sampling_mm).

        Each scan is mapped with what the other scans show: its own residuals would make it look more normal than a new
        scan. A single scan has only itself.

        robust  for scans of which most are healthy, but not surely all: what is expected is the median over the scans
                (of two in the middle, the lower) of what each alone shows, and so is the threshold of a voxel. No scan
                is left out, so that p-values then compare a scan within this cohort
        """
        draft, place_sums = _describe_places(scans)
        if robust:
            return draft._fit_robustly(scans)
        texture_sums = [_sum_by_texture(*expected) for expected in draft._leave_each_out(scans, place_sums)]
        total = sum(texture_sums)
        factors = [expect_with_texture(_leave_out(total, own, len(scans))) for own in texture_sums]

        def leave_each_out() -> Iterator[Expected]:
            left_out = draft._leave_each_out(scans, place_sums)
            for (others, scan, residual), factor in zip(left_out, factors, strict=True):
                yield replace(others, texture_factor=factor), scan, residual

        medians, quantiles = _describe_maps(leave_each_out())
        threshold = float(_find_quantiles(quantiles.flatten(), 1 - VOXELS_FLAGGED))
        found = _score_scans(leave_each_out(), threshold) | {"median_residuals": medians}
        return replace(draft, texture_factor=expect_with_texture(total), voxel_threshold=threshold, **found)

    def _fit_robustly(self, scans: Sequence[Compared]) -> Calibration:
        """This draft with the medians over the scans of what each expects by place, then by texture."""
        by_place = [expect_at_place(sum_by_place(compute_residual(*scan).values)) for scan in scans]
        placed = replace(self, expected_residual=torch.stack(by_place).median(0).values)
        by_texture = [expect_with_texture(_sum_by_texture(placed, scan, compute_residual(*scan))) for scan in scans]
        fitted = replace(placed, texture_factor=torch.stack(by_texture).median(0).values)

        def expect_all() -> Iterator[Expected]:
            return ((fitted, scan, compute_residual(*scan)) for scan in scans)

        medians, quantiles = _describe_maps(expect_all())
        thresholds = torch.stack([_find_quantiles(own, 1 - VOXELS_FLAGGED) for own in quantiles])
        found = _score_scans(expect_all(), threshold := float(thresholds.median())) | {"median_residuals": medians}
        return replace(fitted, voxel_threshold=threshold, **found)

    def _leave_each_out(self, scans: Sequence[Compared], place_sums: torch.Tensor) -> Iterator[Expected]:
        """Each scan, with this calibration expecting at each place what the other scans show there."""
        for scan in scans:
            residual = compute_residual(*scan)
            others = _leave_out(place_sums, sum_by_place(residual.values), len(scans))
            yield replace(self, expected_residual=expect_at_place(others)), scan, residual

    @classmethod
    def from_state(cls, state: dict) -> Calibration:
        """The calibration that `to_state` wrote, on the devices of its tensors. ValueError where they do not fit.

        DataError, which says how to calibrate anew, for another version of the anomaly map.
        """
        values = {name: state[key] for name, key in STATE_KEYS.items()}
        if state.get("version") != VERSION:
            raise DataError(
                "its calibration is for another version of the anomaly map; calibrate it anew: delete it and run "
                "train.py again where last.pt is whole, or run calibrate.py with healthy scans"
            )
        _refuse_not_finite(values)
        size = values["intensity"].shape[-1]
        shapes = {"expected_residual": (2, LEVELS, size, size), "intensity": (2, LEVELS, size, size)}
        shapes |= {"texture_edges": (2, TEXTURE_BINS - 1), "texture_factor": (2, TEXTURE_BINS, TEXTURE_BINS)}
        shapes |= {name: (values[name].numel(),) for name in OF_SCANS}
        wrong = [name for name, shape in shapes.items() if tuple(values[name].shape) != shape or not min(shape)]
        if wrong:
            raise ValueError(f"the calibration's {', '.join(wrong)} have wrong shapes")
        return cls(**values | {"voxel_threshold": float(values["voxel_threshold"])})

    def to_state(self) -> dict[str, torch.Tensor | int]:
        """What model.pt keeps of it: float32 tensors on the CPU, and VERSION. DataError where it is not finite."""
        _refuse_not_finite(vars(self))
        tensors = {key: torch.as_tensor(getattr(self, name)).cpu() for name, key in STATE_KEYS.items()}
        return tensors | {"version": VERSION}

    def to(self, device: torch.device | str) -> Calibration:
        """The same on another device."""
        tensors = {name: getattr(self, name).to(device) for name in STATE_KEYS if name != "voxel_threshold"}
        return replace(self, **tensors)

    @property
    def normal_scans(self) -> int:
        """How many healthy scans it was made with."""
        return len(self.scan_scores)

    def normalise(self, residual: Residual, brain: torch.Tensor) -> torch.Tensor:
        """`divide` in units of its median."""
        divided = self.divide(residual, brain)
        return divided / max(find_median(divided[brain]), 1e-6)

    def measure_misfit(self, median_residual: float) -> float | None:
        """How many times as large as healthy scans' a scan's median of `divide` is; None where that may be chance.

        A lesion hardly changes a median over the brain; another scanner does. Chance goes up to twice as far above the
        healthy scans' median as the highest of them, on a logarithmic scale.
        """
        middle, highest = float(self.median_residuals.median()), float(self.median_residuals[-1])
        return median_residual / middle if median_residual > highest * (highest / middle) else None

    def divide(self, residual: Residual, brain: torch.Tensor) -> torch.Tensor:
        """|residual| / expected residual: (n, H, W) not yet smoothed, NaN outside the brain."""
        size = brain[0].numel()
        places = brain.flatten().nonzero()[:, 0]
        pixel = places % size
        values, mean, deviation = (part.flatten()[places] for part in (residual.values, *residual.texture))
        below, share = (part[places // size] for part in find_levels(len(brain), brain.device))
        sign = (values <= 0).long()
        lower = (sign * LEVELS + below) * size + pixel
        expected = self.expected_residual.flatten()
        expected = torch.lerp(expected[lower], expected[lower + size], share)
        bins = [torch.bucketize(part, edges) for part, edges in zip((mean, deviation), self.texture_edges, strict=True)]
        divided = torch.full(brain.shape, torch.nan, device=brain.device)
        divided.view(-1)[places] = values.abs() / (expected * self.texture_factor[sign, bins[0], bins[1]])
        return divided

    def expect_intensity(self, slices: int) -> torch.Tensor:
        """(2, slices, H, W) mean and standard deviation of healthy values, for a stack of so many slices."""
        below, share = find_levels(slices, self.intensity.device)
        return torch.lerp(self.intensity[:, below], self.intensity[:, below + 1], share[:, None, None])

    def p_values_of_scans(self, scores: float | Sequence[float] | torch.Tensor) -> torch.Tensor:
        """`compute_p_values` of scores of `score_scan`."""
        return compute_p_values(scores, self.scan_scores)

    def p_values_of_slices(self, scores: float | Sequence[float] | torch.Tensor) -> torch.Tensor:
        """`compute_p_values` of scores of `score_slices`."""
        return compute_p_values(scores, self.slice_scores)

    def p_values_of_regions(self, masses: Sequence[float]) -> list[float]:
        """The probability that a healthy scan shows a region of such a mass anywhere, of each.

        The p-value of cluster mass corrected by the largest of each scan (Bullmore et al., IEEE TMI 1999), with healthy
        scans in the place of permutations.
        """
        return compute_p_values(masses, self.region_masses).tolist()

    def flag_score(self, level: str, false_positive_rate: float) -> float | None:
        """The score of a "scan" or a "slice" above which its p-value is at most this rate (< 1).

        Up to this score, too many healthy scores are as high. None where no p-value can be so small.
        """
        healthy = self.scan_scores if level == "scan" else self.slice_scores
        allowed = math.floor(false_positive_rate * (len(healthy) + 1) + 1e-9) - 1  # healthy scores that may be as high
        return float(healthy[len(healthy) - 1 - allowed]) if allowed >= 0 else None


def compare(
    model: nn.Module, stack: np.ndarray, sampling_mm: tuple[float, float], batch_size: int, precision: torch.dtype
) -> Compared:
    """A healthy scan's stack (n, H, W) in [0, 1] with its reconstruction, on the model's device, for `fit`."""
    values = torch.from_numpy(stack).float().to(next(model.parameters()).device)
    return values, reconstruct(model, values, sampling_mm[0], batch_size, precision), sampling_mm


def _refuse_not_finite(fields: dict[str, torch.Tensor | float]) -> None:
    for name, values in fields.items():
        if not torch.as_tensor(values).isfinite().all():
            raise DataError(f"the {name.replace('_', ' ')} of its calibration is not finite; train again")


def compute_p_values(scores: float | Sequence[float] | torch.Tensor, healthy: torch.Tensor) -> torch.Tensor:
    """Conformal p-values (Vovk et al., 2005), float64: (1 + healthy scores that are as high) / (1 + healthy scores).

    scores (n,) or a number, healthy (m,) sorted. If a new healthy scan is exchangeable with those of the calibration,
    p <= alpha has a probability of at most alpha; p is at least 1 / (m + 1).
    """
    healthy = healthy.double()
    scores = torch.as_tensor(scores, dtype=torch.float64, device=healthy.device)
    as_high = len(healthy) - torch.searchsorted(healthy, scores)
    return (1 + as_high.double()) / (1 + len(healthy))


def count_needed_scans(false_positive_rate: float) -> int:
    """The number of healthy validation scans without which no p-value is as small as this rate."""
    return math.ceil(1 / false_positive_rate - 1e-9) - 1


def _describe_places(scans: Sequence[Compared]) -> tuple[Calibration, torch.Tensor]:
    """(a calibration without texture factors and scores, the sums over all scans by `sum_by_place`)."""
    place_sums, edges, intensity_sums = 0, [], 0
    shares = torch.arange(1, TEXTURE_BINS, dtype=torch.float64) / TEXTURE_BINS
    for stack, reconstruction, sampling_mm in scans:
        residual = compute_residual(stack, reconstruction, sampling_mm)
        place_sums = place_sums + sum_by_place(residual.values)
        edges.append(torch.stack([_find_quantiles(part[stack > 0], shares) for part in residual.texture]))
        intensity_sums = intensity_sums + sum_by_level(torch.stack([stack.float(), stack.float() ** 2, stack > 0]))
    return Calibration(
        expected_residual=expect_at_place(place_sums),
        texture_edges=torch.stack(edges).mean(0),
        texture_factor=torch.ones(2, TEXTURE_BINS, TEXTURE_BINS, device=place_sums.device),
        intensity=describe_intensity(intensity_sums),
        voxel_threshold=math.nan,
        **dict.fromkeys(OF_SCANS, torch.empty(0)),
    ), place_sums


def _sum_by_texture(expected: Calibration, scan: Compared, residual: Residual) -> torch.Tensor:
    return sum_by_texture(residual, expected.normalise(residual, scan[0] > 0), expected.texture_edges)


def _describe_maps(scans: Iterable[Expected]) -> tuple[torch.Tensor, torch.Tensor]:
    """(the sorted median residuals of healthy scans, (scans, 10001) quantiles of their smoothed maps)."""
    medians, quantiles = [], []
    shares = torch.linspace(0, 1, 10001, dtype=torch.float64)  # as many of each scan, so that all weigh the same
    for expected, (stack, _, sampling_mm), residual in scans:
        brain = stack > 0
        divided = expected.divide(residual, brain)
        medians.append(find_median(divided[brain]))
        quantiles.append(_find_quantiles(smooth_map(divided, stack, sampling_mm)[brain], shares))
    return torch.tensor(medians, device=quantiles[0].device).sort().values, torch.stack(quantiles)


def _score_scans(scans: Iterable[Expected], threshold: float) -> dict[str, torch.Tensor]:
    """The sorted scores of healthy scans, and the largest mass of a region of each, with this voxel threshold."""
    found = {"scan_scores": [], "slice_scores": [], "region_masses": []}
    for expected, scan, residual in scans:
        anomaly = map_anomalies(expected.divide(residual, scan[0] > 0), *scan, threshold)
        found["scan_scores"].append(torch.tensor([score_scan(anomaly)]))
        found["slice_scores"].append(score_slices(anomaly))
        found["region_masses"].append(torch.tensor([find_largest_mass(anomaly, threshold, scan[2])]))
    return {name: torch.cat([one.to(anomaly.device) for one in values]).sort().values for name, values in found.items()}


def _leave_out(total: torch.Tensor, own: torch.Tensor, scans: int) -> torch.Tensor:
    """The sums of all scans but one; of a single scan, its own."""
    return (total - own).clamp(min=0) if scans > 1 else total


def _find_quantiles(values: torch.Tensor, shares: torch.Tensor | float) -> torch.Tensor:
    """The interpolated quantiles of (n,) numbers; torch.quantile takes 16 million at most."""
    ranked = values.sort().values
    places = torch.as_tensor(shares, dtype=torch.float64, device=values.device) * (len(ranked) - 1)
    below = places.long()
    return torch.lerp(ranked[below], ranked[(below + 1).clamp(max=len(ranked) - 1)], (places - below).float())
