"""Connected regions of an anomaly map."""

import numpy as np
import pytest
from evaluation.regions import find_regions

AFFINE = np.array([[0, -2.0, 0, -20], [2.0, 0, 0, 5], [0, 0, 3.0, 7], [0, 0, 0, 1]])  # voxels of 0.012 ml


def make_map(*boxes):
    """(20, 20, 20) map, 1 in a brain of 16 voxels a side, NaN outside; boxes are (slices, value)."""
    anomaly = np.full((20, 20, 20), np.nan, np.float32)
    anomaly[2:18, 2:18, 2:18] = 1
    for place, value in boxes:
        anomaly[place] = value
    return anomaly


def find(anomaly, threshold=5.0, smallest_ml=0.0):
    return find_regions(anomaly, AFFINE, threshold, smallest_ml)


def test_a_region_by_hand():
    (region,) = find(make_map((np.s_[4:8, 4:8, 5:9], 6), (np.s_[5, 5, 5], 9)))
    assert region["volume_ml"] == pytest.approx(64 * 0.012)
    assert region["peak"] == 9
    assert region["mean"] == pytest.approx((63 * 6 + 9) / 64)
    total = 63 * 6 + 9  # the centre of mass is drawn to what is more abnormal
    voxel = (np.array([5.5, 5.5, 6.5]) * 64 * 6 + np.array([5, 5, 5]) * 3) / total
    np.testing.assert_allclose([region[f"{axis}_mm"] for axis in "xyz"], AFFINE[:3] @ [*voxel, 1], atol=1e-5)


def test_the_largest_comes_first():
    small, large = (np.s_[4, 4, 4:6], 9), (np.s_[10:13, 10, 10], 6)
    for boxes in ((small, large), (large, small)):
        assert [region["peak"] for region in find(make_map(*boxes))] == [6, 9]
    mirrored = make_map((np.s_[4:7, 4, 4], 6), (np.s_[10, 10, 10:12], 9))
    assert [region["peak"] for region in find(mirrored)] == [6, 9]


def test_the_threshold_itself_belongs_to_it():
    anomaly = make_map((np.s_[4, 4, 4], 5))
    assert len(find(anomaly, threshold=5)) == 1
    assert find(anomaly, threshold=5.01) == []


def test_regions_of_the_smallest_size_stay():
    anomaly = make_map((np.s_[4, 4, 4:6], 6), (np.s_[10, 10, 10:13], 7))
    assert len(find(anomaly, smallest_ml=0.0239)) == 2
    assert [region["peak"] for region in find(anomaly, smallest_ml=0.0241)] == [7]
    assert find(anomaly, smallest_ml=1) == []


def test_voxels_that_touch_at_an_edge_are_two_regions():
    assert len(find(make_map((np.s_[4, 4, 4], 6), (np.s_[5, 5, 4], 6)))) == 2
    assert len(find(make_map((np.s_[4, 4, 4], 6), (np.s_[5, 4, 4], 6)))) == 1


def test_outside_the_brain_is_no_region():
    (region,) = find(make_map(), threshold=0)
    assert region["volume_ml"] == pytest.approx(16**3 * 0.012)
