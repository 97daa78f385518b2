"""The calibration of a cohort in which most scans are healthy: medians over the scans of what each alone shows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.anomaly import find_largest_mass, score_scan, score_slices
from models.calibration import Calibration
from tests.reference import make_scan, map_scan


def fit(scans, robust=True) -> Calibration:
    return Calibration.fit([as_tensors(scan) for scan in scans], robust=robust)


def as_tensors(scan):
    return torch.from_numpy(scan[0]), torch.from_numpy(scan[1]), scan[2]


def make_flat(error: float):
    """A brain that fills the slices and is `error` brighter than drawn in its first column; nothing blurs."""
    stack = np.full((16, 24, 24), 0.5, np.float32)
    drawn = stack.copy()
    drawn[:, :, 0] -= error
    return stack, drawn, (1000.0, 1000.0)


def test_each_place_expects_the_median_over_scans():
    """Of errors of 0.01, 0.02, 0.03 and one of 0.4 the lower middle one is 0.02."""
    scans = [make_flat(error) for error in (0.4, 0.03, 0.01, 0.02)]
    np.testing.assert_allclose(fit(scans).expected_residual[0], 0.02, rtol=1e-4)
    assert (fit(scans, robust=False).expected_residual[0] > 0.2).all(), "the root mean square"


def test_scans_alike_are_calibrated_as_one_alone():
    scan = make_scan(1)
    robust, alone = fit([scan] * 3), fit([scan], robust=False)
    for name in ("expected_residual", "texture_edges", "texture_factor", "voxel_threshold"):
        np.testing.assert_allclose(np.asarray(getattr(robust, name)), np.asarray(getattr(alone, name)), rtol=1e-4)
    assert robust.scan_scores.tolist() == pytest.approx([alone.scan_scores[0].item()] * 3, rel=1e-4)


def test_one_contaminated_scan_hardly_changes_it():
    """One of eight with a large lesion, against the same eight without it: what the medians give, and the means."""
    healthy = [make_scan(seed, size=48) for seed in range(1, 8)]
    changes = {}
    for robust in (True, False):
        clean, dirty = (fit([*healthy, make_scan(9, size=48, offset=offset)], robust) for offset in (0.0, 0.9))
        changes[robust] = [
            (getattr(dirty, name) / getattr(clean, name) - 1).abs() for name in ("expected_residual", "texture_factor")
        ]
        changes[robust].append(torch.tensor(dirty.voxel_threshold / clean.voxel_threshold - 1).abs())
    assert all(change.mean() < 0.03 and change.max() < 0.35 for change in changes[True])
    assert all(change.max() > 1 for change in changes[False])


def test_scores_are_those_within_the_cohort_and_the_threshold_is_the_median():
    scans = [make_scan(seed, offset=offset) for seed, offset in ((1, 0.0), (2, 0.5), (3, 0.0))]
    calibration = fit(scans)
    maps = [map_scan(*as_tensors(scan), calibration) for scan in scans]
    masses = [
        find_largest_mass(one, calibration.voxel_threshold, scan[2]) for one, scan in zip(maps, scans, strict=True)
    ]
    assert calibration.region_masses.tolist() == pytest.approx(sorted(masses), rel=1e-4)
    assert calibration.scan_scores.tolist() == pytest.approx(sorted(score_scan(one) for one in maps), rel=1e-5)
    slices = torch.cat([score_slices(one) for one in maps]).sort().values
    np.testing.assert_allclose(calibration.slice_scores, slices, rtol=1e-5)
    unsharpened = replace(calibration, voxel_threshold=np.inf)
    own = [np.quantile(map_scan(*as_tensors(scan), unsharpened)[scan[0] > 0], 0.998) for scan in scans]
    assert calibration.voxel_threshold == pytest.approx(np.median(own), rel=1e-3)
