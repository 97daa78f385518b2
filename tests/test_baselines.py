"""Anomaly maps without a model."""

import numpy as np
import torch

from models.baselines import map_brightness, map_deviation
from models.calibration import LEVELS, Calibration

FAR_MM = 1000.0  # slices so far apart do not blur into each other


def make_calibration(intensity):
    """A calibration of which only the intensity counts."""
    nothing = torch.zeros(1)
    return Calibration(
        nothing, nothing, nothing, torch.tensor(intensity).float(), nothing, nothing, 5.0, nothing, nothing
    )


def test_deviation_is_the_z_score_of_the_smoothed_slice():
    """The deviation is 0.1 at the lowest level and 0.4 at the highest: 0.25 at the slice between them."""
    stack = np.full((3, 32, 32), 0.5, np.float32)
    stack[:, 3:10, 3:10] += 0.2  # few of the pixels, so that none of it is shading
    stack[:, 19:26, 3:10] -= 0.2
    stack[:, 0, 0] = 0
    intensity = np.full((2, LEVELS, 32, 32), 0.5)
    intensity[1] = np.linspace(0.1, 0.4, LEVELS)[:, None, None]
    mapped = map_deviation(torch.from_numpy(stack), (FAR_MM, 6.0), make_calibration(intensity))
    assert mapped.dtype == torch.float32
    assert mapped[:, 0, 0].isnan().all()
    for row in (6, 22):
        np.testing.assert_allclose(mapped[:, row, 6], [2, 0.8, 0.5], rtol=1e-3)


def test_deviation_is_from_the_mean_at_that_level():
    """The mean rises from 0.2 to 0.8: a patch of 0.4 lies as far above the lowest as below the middle of a slice."""
    stack = np.broadcast_to(np.linspace(0.2, 0.8, 5, dtype=np.float32)[:, None, None], (5, 32, 32)).copy()
    stack[:, 3:10, 3:10] = 0.4
    intensity = np.full((2, LEVELS, 32, 32), 0.1)
    intensity[0] = np.linspace(0.2, 0.8, LEVELS)[:, None, None]
    mapped = map_deviation(torch.from_numpy(stack), (FAR_MM, 6.0), make_calibration(intensity))
    np.testing.assert_allclose(mapped[:, 6, 6], [2, 0.5, 1, 2.5, 4], rtol=1e-3)
    np.testing.assert_allclose(mapped[:, 20, 20], 0, atol=1e-3)


def test_brightness_ranks_by_hand():
    stack = np.zeros((2, 2, 3), np.float16)
    stack[0, 0] = [0.2, 0.4, 0.4]
    stack[1, 1, 0] = 0.9
    mapped = map_brightness(torch.from_numpy(stack))
    assert mapped.dtype == torch.float32
    nan = np.nan
    np.testing.assert_allclose(mapped, [[[0.25, 0.75, 0.75], [nan] * 3], [[nan] * 3, [1, nan, nan]]])
