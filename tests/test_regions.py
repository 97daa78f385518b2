"""Connected regions of an anomaly map, and the side of the brain that they are on."""

import nibabel as nib
import numpy as np
import pytest

from evaluation.regions import find_regions, list_regions

AFFINE = np.array([[0, -2.0, 0, -20], [2.0, 0, 0, 5], [0, 0, 3.0, 7], [0, 0, 0, 1]])  # voxels of 0.012 ml


def make_map(*boxes):
    """(20, 20, 20) map, 1 in a brain of 16 voxels a side, NaN outside; boxes are (slices, value)."""
    anomaly = np.full((20, 20, 20), np.nan, np.float32)
    anomaly[2:18, 2:18, 2:18] = 1
    for place, value in boxes:
        anomaly[place] = value
    return anomaly


def find(anomaly, threshold=5.0, smallest_ml=0.0):
    return list_regions(anomaly, AFFINE, threshold, smallest_ml)[0]


def reorient(image: nib.Nifti1Image, axes: str) -> nib.Nifti1Image:
    ornt = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(axes)))
    return image.as_reoriented(ornt)


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


def test_a_region_as_small_as_asked_for_is_listed():
    anomaly = make_map((np.s_[10, 10, 10:13], 7))
    assert len(list_regions(anomaly, np.eye(4), 5.0, 0.003)[0]) == 1


def test_voxels_that_touch_at_an_edge_are_two_regions():
    assert len(find(make_map((np.s_[4, 4, 4], 6), (np.s_[5, 5, 4], 6)))) == 2
    assert len(find(make_map((np.s_[4, 4, 4], 6), (np.s_[5, 4, 4], 6)))) == 1


def test_outside_the_brain_is_no_region():
    (region,) = find(make_map(), threshold=0)
    assert region["volume_ml"] == pytest.approx(16**3 * 0.012)


@pytest.mark.parametrize("axes", ["RAS", "LIP"])
def test_regions_know_their_side(axes):
    # voxels of 4 mm; the brain's middle is at x = 38 mm, the edge of what counts as the middle at 33 and 43 mm
    values = np.ones((20, 20, 20), dtype=np.float32)
    values[16:19, 2:5, 2:5], values[2:5, 8:11, 8:11], values[9:11, 3:5, 9:11] = 9, 9, 9
    image = reorient(nib.Nifti1Image(values, np.diag([4.0, 4.0, 4.0, 1.0])), axes)
    regions, _ = list_regions(image.get_fdata(), image.affine, 5.0, 0.0)
    assert sorted((region["side"], round(region["x_mm"])) for region in regions) == [
        ("left", 12),
        ("middle", 38),
        ("right", 68),
    ]


def test_a_region_within_five_mm_of_the_middle_is_on_neither_side():
    values = np.full((41, 3, 9), np.nan, dtype=np.float32)
    values[5:36] = 1  # the middle of what was scored is at x = 20 mm, not that of the grid's other end
    values[36:41] = np.nan
    for y, x in ((0, 16), (2, 15), (4, 24), (6, 25)):
        values[x, 1, y] = 9
    regions, _ = list_regions(values, np.eye(4), 5.0, 0.0)
    assert {region["x_mm"]: region["side"] for region in regions} == {
        16: "middle",
        15: "left",
        24: "middle",
        25: "right",
    }


def test_the_middle_is_that_of_the_scored_brain():
    values = np.full((60, 3, 3), np.nan, dtype=np.float32)
    values[:21] = 1
    values[20, 1, 1] = 9
    ((region,), _) = list_regions(values, np.eye(4), 5.0, 0.0)
    assert (region["x_mm"], region["side"]) == (20, "right")


def test_regions_are_numbered_from_the_largest_on_and_know_where_they_are_highest():
    anomaly = make_map((np.s_[4, 4, 4:6], 6), (np.s_[10:13, 10, 10], 7), (np.s_[6, 6, 6], 8))
    anomaly[11, 10, 10] = 9
    _, labels = list_regions(anomaly, AFFINE, 5.0, 0.0)
    assert [labels[place] for place in ((11, 10, 10), (4, 4, 5), (6, 6, 6), (0, 0, 0), (8, 8, 8))] == [1, 2, 3, 0, 0]
    assert np.bincount(labels.ravel()).tolist() == [8000 - 6, 3, 2, 1]
    largest = find(anomaly)[0]
    peak = [largest[f"peak_{axis}_mm"] for axis in "xyz"]
    np.testing.assert_allclose(peak, nib.affines.apply_affine(AFFINE, (11, 10, 10)))


def test_a_region_ends_at_a_share_of_its_peak_and_its_mass_does_not():
    anomaly = make_map((np.s_[3:14, 10, 10], 6), (np.s_[5:8, 10, 10], 13), (np.s_[6, 10, 10], 104), (np.s_[6, 4, 4], 6))
    anomaly[5, 10, 10] = 12.9  # the limit is 13
    strong, weak = find(anomaly)
    assert strong["volume_ml"] == pytest.approx(2 * 0.012)
    assert strong["mean"] == pytest.approx((104 + 13) / 2)
    assert strong["mass"] == pytest.approx((104 + 13 + 12.9 + 8 * 6) * 0.012), "of all that is above the threshold"
    assert (weak["volume_ml"], weak["mass"]) == (pytest.approx(0.012), pytest.approx(6 * 0.012)), "at the threshold"
    _, numbers = list_regions(anomaly, AFFINE, 5.0, 0.0)
    wanted = np.zeros(anomaly.shape, int)
    wanted[6:8, 10, 10], wanted[6, 4, 4] = 1, 2
    np.testing.assert_array_equal(numbers, wanted)
    np.testing.assert_array_equal(anomaly >= find_regions(anomaly, 5.0)[1], wanted > 0)


def test_limits_are_the_threshold_outside_of_regions_and_a_share_of_the_peak_within():
    anomaly = make_map((np.s_[3:6, 10, 10], 6), (np.s_[3, 10, 10], 104), (np.s_[9, 9, 9], 6))
    regions, limits = find_regions(anomaly, 5.0)
    assert [regions[place] for place in ((4, 10, 10), (9, 9, 9), (8, 8, 8), (0, 0, 0))] == [1, 2, 0, 0]
    assert [limits[place] for place in ((4, 10, 10), (9, 9, 9), (8, 8, 8), (0, 0, 0))] == [13, 5, 5, 5]


def test_nothing_is_marked_where_nothing_reaches_the_threshold():
    assert (find_regions(make_map(), 5.0)[1] == 5).all()
    regions, numbers = list_regions(make_map(), AFFINE, 5.0, 0.0)
    assert regions == []
    assert numbers.shape == (20, 20, 20)
    assert not numbers.any()


def test_what_is_too_small_to_be_listed_is_marked_and_has_the_last_numbers():
    regions, numbers = list_regions(make_map((np.s_[4, 4, 4], 9), (np.s_[10:13, 10, 10], 6)), AFFINE, 5.0, 0.02)
    assert len(regions) == 1
    assert (numbers[11, 10, 10], numbers[4, 4, 4]) == (1, 2)
