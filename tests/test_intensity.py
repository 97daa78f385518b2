"""A scan's intensity is brought to [0, 1] by what lies in the interior of its brain."""

import numpy as np
import pytest
from scipy import ndimage

from common.cli import DataError
from preprocessing.geometry import scale_intensity
from tests.test_geometry import BRAIN, SHAPE, cut, make_brain, scale

RNG = np.random.default_rng(0)


def test_the_percentiles_become_0_and_1_and_the_median_062():
    values = RNG.gamma(3, 50, 5000)
    low, high, exponent = scale_intensity(values)
    assert (low, high) == pytest.approx(tuple(np.percentile(values, (0.5, 99.5))))
    assert np.median(scale(values, low, high, exponent)) == pytest.approx(0.62, abs=1e-3)


@pytest.mark.parametrize(
    ("median", "share"), [(0.1, 0.2), (0.19, 0.2), (0.21, 0.21), (0.94, 0.94), (0.96, 0.95), (0.99, 0.95)]
)
def test_the_median_is_moved_no_further_than_from_02_or_095(median, share):
    values = np.concatenate([np.zeros(100), np.full(800, median), np.ones(100)])
    assert scale_intensity(values) == pytest.approx((0, 1, np.log(0.62) / np.log(share)))


def test_a_constant_brain_is_refused():
    with pytest.raises(DataError, match="constant inside the brain"):
        scale_intensity(np.full(100, 7.0))


def test_percentiles_are_taken_of_every_second_voxel_at_1_mm_deeper_than_6_mm():
    values = RNG.gamma(3, 50, (24, 24, 24))
    brain = make_brain(values.shape, (1, 2, 3), (23, 22, 21))
    for spacing_mm, step, rim in (
        ((1.0, 1.0, 1.0), (2, 2, 2), (3, 3, 3)),
        ((1.0, 2.0, 0.5), (2, 1, 4), (3, 3, 3)),  # the rim in steps of 2 mm, rounded
        ((4.0, 3.0, 2.0), (1, 1, 1), (2, 2, 3)),
    ):
        _, _, intensity = cut(values, brain, spacing_mm)
        seen = values[1:23, 2:22, 3:21][tuple(slice(None, None, n) for n in step)]
        interior = seen[tuple(slice(n, -n) for n in rim)]
        seen = interior if interior.size else seen  # a small brain has no interior
        assert intensity[:2] == pytest.approx(np.percentile(seen, (0.5, 99.5)), rel=1e-5)


def test_what_a_tool_leaves_at_the_rim_does_not_change_the_scale():
    """Air, bone or fluid around a brain of tissue."""
    place = np.indices((40, 40, 40)) - 19.5
    depth = 15 - np.sqrt((place**2).sum(0))
    tissue = RNG.normal(600, 50, depth.shape)
    scales = []
    for rim, value in ((0, 0), (2, 5), (2, 1500)):
        values = np.where(depth > 0, tissue, value).astype(np.float32)
        scales.append(cut(values, depth > -rim)[2])
    assert scales[0] == pytest.approx(scales[1], rel=0.05)
    assert scales[0] == pytest.approx(scales[2], rel=0.05)


def test_only_the_brain_decides_the_scale_even_where_its_box_holds_more():
    values = RNG.gamma(3, 50, SHAPE)
    brain = BRAIN.copy()
    brain[2:4, 3:5] = False
    brain[2, 3, 1] = True  # the box is the same
    values[2:4, 3:5, 2:] = 1e5
    _, _, intensity = cut(values, brain)
    interior = ndimage.binary_erosion(brain, np.ones((7, 7, 7)))  # 3 voxels of 2 mm on all sides
    assert intensity[:2] == pytest.approx(np.percentile(values[interior], (0.5, 99.5)), rel=1e-5)
