"""A file becomes a volume the right way up, and the brain in it is found, whatever its units."""

from dataclasses import replace

import fill_voids
import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, io_orientation
from scipy import ndimage
from scipy.spatial.transform import Rotation
from skimage.filters import threshold_otsu

from common.cli import DataError
from preprocessing.volume import Volume, find_brain, read_volume
from tests.conftest import ALL_AXES, make_head, store

SMALL = np.arange(24, dtype=np.int16).reshape(2, 3, 4)  # left-right, posterior-anterior, inferior-superior


def save_small(path, axes="RAS", values=SMALL):
    return store(nib.Nifti1Image(values, np.diag([1.5, 2.5, 3.5, 1.0])), axes, path)


def make_volume(values, spacing_mm=(10.0, 10.0, 10.0)):
    """A volume in memory; its voxels are 1 ml unless said otherwise."""
    return Volume(np.asarray(values), np.diag([*spacing_mm, 1.0]), "RAS", np.shape(values), spacing_mm)


def make_block(shape, *blocks):
    """Zeros with these blocks ((starts, stops), value) in them, float32."""
    values = np.zeros(shape, np.float32)
    for start, stop, value in blocks:
        values[tuple(slice(*ends) for ends in zip(start, stop, strict=True))] = value
    return values


@pytest.mark.parametrize("axes", ALL_AXES)
def test_every_stored_orientation_reads_as_ras(axes, tmp_path):
    volume = read_volume(save_small(tmp_path / "a.nii", axes))
    np.testing.assert_array_equal(volume.values, SMALL)
    assert volume.spacing_mm == (1.5, 2.5, 3.5), "in canonical order, not in the file's"
    assert volume.axes == axes
    stored = nib.load(tmp_path / "a.nii")
    assert volume.shape == stored.shape
    np.testing.assert_array_equal(volume.affine, stored.affine)
    assert volume.missing is None


def test_voxels_that_are_no_number_become_zero_and_are_listed(tmp_path):
    values = SMALL.astype(np.float32)
    values[1, 2, 3], values[0, 1, 2], values[1, 0, 0] = np.nan, np.inf, -np.inf
    volume = read_volume(save_small(tmp_path / "a.nii", "LPI", values))
    np.testing.assert_array_equal(volume.missing, ~np.isfinite(values))
    np.testing.assert_array_equal(volume.values, np.where(np.isfinite(values), values, 0))
    nothing = save_small(tmp_path / "b.nii", "RAS", np.full_like(values, np.nan))
    with pytest.raises(DataError, match=r"b\.nii: holds no finite value"):
        read_volume(nothing)


def test_a_trailing_axis_of_one_is_dropped(tmp_path):
    nib.save(nib.Nifti1Image(SMALL[..., None], np.eye(4)), tmp_path / "a.nii")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii").values, SMALL)


@pytest.mark.parametrize("background", [0, -7])
def test_a_stripped_scan_is_all_that_is_not_its_background(background):
    values = make_block((14, 14, 14), ((2, 2, 2), (12, 12, 12), 5), ((2, 5, 5), (4, 8, 8), -12))
    values = np.where(values == 0, background, values)
    values[3, 3, 3] = background  # a hole inside the brain is brain
    brain, skull_off = find_brain(make_volume(values))
    assert skull_off
    np.testing.assert_array_equal(brain, make_block((14, 14, 14), ((2, 2, 2), (12, 12, 12), 1)) > 0)


def test_no_brain_is_larger_than_2200_ml():
    """Voxels of 1 ml, so that voxels are counted."""
    values = np.zeros((20, 20, 20), np.float32)
    flat = values[1:-1, 1:-1, 1:-1]
    for count, skull_off in ((2199, True), (2200, False)):
        flat[:] = (np.arange(flat.size) < count).reshape(flat.shape)
        assert find_brain(make_volume(values))[1] is skull_off
    assert find_brain(make_volume(values, (10.0, 10.0, 9.0)))[1], "it is counted in ml"


def test_the_background_is_looked_for_at_the_four_sides_but_not_above_and_below():
    values = make_block((20, 20, 6), ((1, 1, 0), (19, 19, 6), 5))  # cut off through the neck and at the vertex
    brain, skull_off = find_brain(make_volume(values))
    assert skull_off
    np.testing.assert_array_equal(brain, values > 0)
    leaning = make_block((6, 20, 20), ((0, 1, 0), (5, 19, 20), 5), ((5, 0, 0), (6, 1, 1), -9))  # touches the left
    brain, skull_off = find_brain(make_volume(leaning))
    assert skull_off
    assert not brain[5, 1:].any()
    tall = make_block((20, 20, 60), ((1, 0, 0), (19, 20, 60), 5))  # touches front and back
    assert not find_brain(make_volume(tall))[0][0].any()


def test_an_empty_scan_has_no_brain():
    brain, _ = find_brain(make_volume(np.full((5, 5, 5), 3)))
    assert not brain.any()


HEAD = ((10, 10, 10), (40, 40, 40))  # a cube of 27 l that stands for a head


def find_head(*blocks, shape=(52, 52, 52)):
    values = make_block(shape, *blocks)
    values[::2] += 1  # air is never constant in a head with its skull on
    found, skull_off = find_brain(make_volume(values))
    assert not skull_off
    return found


def test_a_head_is_what_lies_above_half_of_otsus_threshold():
    values = make_block((100, 52, 52), ((10, 10, 10), (90, 40, 40), 1))
    values *= 3.0 * np.arange(-9, 91)[:, None, None]  # brighter from left to right
    values[::2] += 0.5
    found = find_brain(make_volume(values))[0][:, 25, 25]
    np.testing.assert_array_equal(found, values[:, 25, 25] > threshold_otsu(values) / 2)


def test_in_a_head_specks_go_slits_close_and_cavities_are_filled():
    """Opened by 2 voxels and closed by 3, over faces: rods 3 wide go, 5 wide stay; slits 6 wide close, 8 wide not."""
    rods = [((2, 2, 10), (5, 5, 40), 100), ((45, 45, 10), (50, 50, 40), 100)]
    slits = [((10, 10, 17), (40, 30, 23), 0), ((10, 10, 28), (40, 30, 36), 0)]
    found = find_head((*HEAD, 100), *rods, *slits)
    assert not found[3, 3, 25]
    assert found[47, 47, 25]
    assert found[25, 20, 17:23].all()
    assert not found[25, 20, 32]
    cavity = find_head((*HEAD, 100), ((18, 18, 18), (30, 30, 30), 0))
    assert cavity[24, 24, 24]


def test_a_head_is_found_as_it_is():
    rng = np.random.default_rng(0)
    grid = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * 4.0 for n in (60, 70, 60)], indexing="ij")
    head = (grid[0] / 80) ** 2 + (grid[1] / 100) ** 2 + (grid[2] / 110) ** 2 < 1
    values = np.where(head, 400, 0) + np.abs(rng.normal(0, 15, head.shape))
    found, skull_off = find_brain(make_volume(values, (4.0, 4.0, 4.0)))
    assert not skull_off
    assert (found == head).mean() > 0.98


def make_whole_head(shrink=1.0, bone=40.0, noise=20.0):
    """(volume of 3 mm voxels, its brain, its head): a brain of 1.4 l with bone and scalp around it, noise everywhere.

    shrink: of all lengths in mm.
    """
    x, y, z = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * 3.0 for n in (64, 76, 64)], indexing="ij")
    radius = np.sqrt((x / 64) ** 2 + (y / 82) ** 2 + (z / 64) ** 2)
    values = np.select([radius < 1, radius < 1.06, radius < 1.16, radius < 1.28], [600 + x + y, 150, bone, 800], 0.0)
    rng = np.random.default_rng(0)
    values = np.hypot(values + rng.normal(0, noise, values.shape), rng.normal(0, noise, values.shape))
    return make_volume(values.astype(np.float32), (3.0 * shrink,) * 3), radius < 1, radius < 1.28


def change(volume, values):
    return replace(volume, values=values, shape=values.shape)


def overlap(a, b):
    """Dice."""
    return 2 * (a & b).sum() / (a.sum() + b.sum())


OTHER_UNITS = {
    "hounsfield": lambda values: values - 1024,
    "above 0": lambda values: values + 500,
    "z-scores": lambda values: (values - values.mean()) / values.std(),
    "-1 to 1": lambda values: values / values.max() * 2 - 1,
}


@pytest.mark.parametrize("unit", OTHER_UNITS)
@pytest.mark.parametrize("stripped", [True, False])
def test_a_brain_or_head_is_the_same_in_all_units(unit, stripped):
    volume, brain, _ = make_whole_head()
    values = volume.values * brain if stripped else volume.values
    wanted, skull_off = find_brain(change(volume, values))
    assert skull_off is stripped
    found, skull_off = find_brain(change(volume, OTHER_UNITS[unit](values)))
    assert skull_off is stripped
    assert (found != wanted).mean() < 1e-5, "rounding alone"


@pytest.mark.parametrize("stripped", [True, False])
def test_what_was_padded_after_its_values_were_shifted_is_background_too(stripped):
    volume, brain, _ = make_whole_head()
    values = volume.values * brain if stripped else volume.values
    wanted = find_brain(change(volume, values))[0]
    for shifted in (values - 300, values + 1000):
        found, skull_off = find_brain(change(volume, np.pad(shifted, 9)))
        assert skull_off is stripped
        assert overlap(found[9:-9, 9:-9, 9:-9], wanted) > 0.99


def test_a_brain_of_values_about_0_with_0_around_is_stripped():
    volume, brain, _ = make_whole_head()
    values = np.where(brain, (volume.values - 600) / 50, 0)
    found, skull_off = find_brain(change(volume, values))
    assert skull_off
    np.testing.assert_array_equal(found, brain)
    found, skull_off = find_brain(change(volume, resample(values, 3)))
    assert skull_off, "after a spline as well"
    assert overlap(found, resample(brain.astype(float), 1) > 0.5) > 0.93


def resample(values, order):
    """Turned by 6 degrees, as registration does, with splines of that order."""
    turn = Rotation.from_euler("z", 6, degrees=True).as_matrix()
    centre = (np.array(values.shape) - 1) / 2
    return ndimage.affine_transform(values.astype(np.float64), turn, centre - turn @ centre, order=order)


@pytest.mark.parametrize("order", [3, 5])
@pytest.mark.parametrize("finish", [np.float32, np.round, lambda values: np.clip(values, 0, None)])
def test_what_a_spline_leaves_around_a_stripped_brain_is_no_skull(order, finish):
    volume, brain, _ = make_whole_head()
    values = finish(resample(volume.values * brain, order))
    assert (np.abs(values[~(resample(brain, 0) > 0)]) > 0).sum() > 1000
    found, skull_off = find_brain(change(volume, values))
    assert skull_off
    assert overlap(found, resample(brain.astype(float), 1) > 0.5) > 0.94


@pytest.mark.parametrize("shrink", [0.8, 0.7, 0.6])
@pytest.mark.parametrize("coarse", [1, 2, 3])
@pytest.mark.parametrize("quiet", [False, True])
def test_a_small_head_is_no_stripped_brain(shrink, coarse, quiet):
    volume, brain, head = make_whole_head(shrink)
    assert head.sum() * np.prod(volume.spacing_mm) / 1000 < 2200
    values = np.where(head, volume.values, 0) if quiet else np.round(volume.values / 100)  # air of 0, or nearly
    part = (slice(None, None, coarse),) * 3
    small = replace(change(volume, values[part]), spacing_mm=tuple(coarse * side for side in volume.spacing_mm))
    assert not find_brain(small)[1]
    small = change(small, np.where(brain, volume.values, 0)[part])
    assert find_brain(small)[1], "the brain of the same head"


def test_noise_around_it_makes_a_head_where_bone_is_not_dark():
    volume, _, head = make_whole_head(0.6, bone=300.0, noise=30.0)
    assert find_brain(change(volume, np.where(head, volume.values, 0)))[1], "nothing tells it from a brain"
    assert not find_brain(change(volume, np.round(volume.values / 100)))[1]


@pytest.mark.parametrize("factor", [1e40, 1e-50])
def test_values_out_of_float32_are_named(factor, tmp_path):
    head = make_head((10, 12, 11), (16.0, 16.0, 16.0))
    nib.save(nib.Nifti1Image(head.get_fdata() * factor, head.affine), tmp_path / "a.nii")
    with pytest.raises(DataError, match=r"a\.nii: its values go up to .*, out of the range of intensities"):
        read_volume(tmp_path / "a.nii")


def test_holes_are_filled_as_in_scipy():
    rng = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.9, 1.0):
        inside = rng.random((9, 11, 10)) < share
        np.testing.assert_array_equal(fill_voids.fill(inside), ndimage.binary_fill_holes(inside))
    assert not fill_voids.fill(np.zeros((3, 3, 3), bool)).any()


def test_axes_and_distrusted_axes_are_handed_on(tmp_path):
    path = save_small(tmp_path / "a.nii", "PSR")
    assert read_volume(path, axes="RAS", distrusted="PSR").axes == "RAS"


def test_an_oblique_scan_keeps_its_affine(tmp_path):
    path = store(make_head(), "LPI", tmp_path / "a.nii", tilt_degrees=12)
    volume = read_volume(path)
    canonical = apply_orientation(nib.load(path).get_fdata(), io_orientation(nib.load(path).affine))
    np.testing.assert_array_equal(volume.values, canonical)
    assert volume.spacing_mm == (4.0, 4.0, 4.0)
