"""A file becomes a volume the right way up, and the brain in it is found."""

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, io_orientation
from scipy import ndimage
from skimage.filters import threshold_otsu

from common.cli import DataError
from preprocessing.volume import Volume, fill_holes, find_brain, read_mask, read_volume
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


def test_a_mask_is_what_lies_above_zero_the_way_its_scan_lies(tmp_path):
    volume = read_volume(save_small(tmp_path / "a.nii", "PSR"))
    values = np.where(SMALL % 3 == 0, 0.5, np.where(SMALL % 3 == 1, 0, -1)).astype(np.float32)
    mask = read_mask(save_small(tmp_path / "m.nii", "PSR", values), volume)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, SMALL % 3 == 0)


def test_an_analyze_mask_is_read_with_the_axes_of_its_scan(tmp_path):
    head = make_head()
    path = store(head, "ASL", tmp_path / "a.img", nib.AnalyzeImage)
    mask = nib.Nifti1Image((head.get_fdata() > 600).astype(np.int16), head.affine)
    mask_path = store(mask, "ASL", tmp_path / "m.img", nib.AnalyzeImage)
    np.testing.assert_array_equal(read_mask(mask_path, read_volume(path, "ASL"), "ASL"), head.get_fdata() > 600)


def test_a_mask_that_does_not_fit_is_refused(tmp_path):
    volume = read_volume(save_small(tmp_path / "a.nii"))
    for name, shift_mm, values in (("moved", 0.02, SMALL), ("cut", 0, SMALL[:, :, 1:])):
        affine = volume.affine.copy()
        affine[2, 3] += shift_mm
        nib.save(nib.Nifti1Image(values, affine), tmp_path / f"{name}.nii")
        with pytest.raises(DataError, match=rf"{name}\.nii.*do not fit.*resample"):
            read_mask(tmp_path / f"{name}.nii", volume)
    affine = volume.affine.copy()
    affine[2, 3] += 0.005  # less than rounding in a header
    nib.save(nib.Nifti1Image(SMALL, affine), tmp_path / "rounded.nii")
    assert read_mask(tmp_path / "rounded.nii", volume).sum() == 23
    with pytest.raises(DataError, match=r"e\.nii: is empty"):
        read_mask(save_small(tmp_path / "e.nii", values=np.zeros_like(SMALL)), volume)


@pytest.mark.parametrize("background", [0, -7])
def test_a_stripped_scan_is_all_that_is_not_its_background(background):
    values = make_block((14, 14, 14), ((2, 2, 2), (12, 12, 12), 5), ((2, 5, 5), (4, 8, 8), -9))
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


def test_holes_are_filled_as_in_scipy():
    rng = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.9, 1.0):
        inside = rng.random((9, 11, 10)) < share
        np.testing.assert_array_equal(fill_holes(inside), ndimage.binary_fill_holes(inside))
    assert not fill_holes(np.zeros((3, 3, 3), bool)).any()


def test_axes_and_distrusted_axes_are_handed_on(tmp_path):
    path = save_small(tmp_path / "a.nii", "PSR")
    assert read_volume(path, axes="RAS", distrusted="PSR").axes == "RAS"
    assert read_mask(path, read_volume(path, "LPI", "PSR"), "LPI", "PSR").sum() == 23


def test_an_oblique_scan_keeps_its_affine(tmp_path):
    path = store(make_head(), "LPI", tmp_path / "a.nii", tilt_degrees=12)
    volume = read_volume(path)
    canonical = apply_orientation(nib.load(path).get_fdata(), io_orientation(nib.load(path).affine))
    np.testing.assert_array_equal(volume.values, canonical)
    assert volume.spacing_mm == (4.0, 4.0, 4.0)
