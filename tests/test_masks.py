"""Masks mean what their makers meant: hard or soft, of one label or several, after a spline, with stray pieces."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from common.cli import DataError
from preprocessing.masks import cut_mask, drop_stray_pieces, read_mask
from preprocessing.volume import read_volume
from tests.conftest import make_head, store

SMALL = np.arange(24, dtype=np.int16).reshape(2, 3, 4)  # left-right, posterior-anterior, inferior-superior
GRID = np.indices((24, 24, 24)) - 11.5
BALL = np.sqrt((GRID**2).sum(0)) < 7
SOFT = ndimage.gaussian_filter(BALL.astype(np.float64), 1.2)


def save_small(path, axes="RAS", values=SMALL):
    return store(nib.Nifti1Image(values, np.diag([1.5, 2.5, 3.5, 1.0])), axes, path)


@pytest.mark.parametrize("value", [1, 255, 0.7, 4])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float32, np.float64, bool])
def test_a_hard_mask_is_all_that_is_not_0(value, kind):
    values = (BALL * value).astype(kind)
    if values.any():
        inside, how = cut_mask(values)
        np.testing.assert_array_equal(inside, BALL)
        assert how == ""


def test_a_mask_of_one_value_is_everything_or_nothing():
    assert cut_mask(np.ones((3, 3, 3)))[0].all()
    assert not cut_mask(np.zeros((3, 3, 3)))[0].any()


def test_1_and_minus_1_are_inside_and_outside():
    np.testing.assert_array_equal(cut_mask(np.where(BALL, 1, -1))[0], BALL)


def test_what_is_no_number_lies_outside():
    np.testing.assert_array_equal(cut_mask(np.where(BALL, 1, np.nan))[0], BALL)
    np.testing.assert_array_equal(cut_mask(np.where(BALL, 1.0, np.inf))[0], BALL)


def test_probabilities_are_cut_at_one_half():
    inside, how = cut_mask(SOFT)
    np.testing.assert_array_equal(inside, SOFT > 0.5)
    assert how == "", "as everybody means it"
    np.testing.assert_array_equal(cut_mask(np.clip(SOFT, 1e-4, 1))[0], SOFT > 0.5)
    assert not cut_mask(SOFT * 0.4)[0].any(), "a probability that is nowhere more likely than not"


@pytest.mark.parametrize(("scale", "kind"), [(100, np.float32), (100, np.uint8), (255, np.uint8), (1000, np.int16)])
def test_a_soft_mask_of_another_range_is_cut_at_half_of_it_and_said(scale, kind):
    values = np.round(SOFT / SOFT.max() * scale).astype(kind)
    inside, how = cut_mask(values)
    np.testing.assert_array_equal(inside, values > scale / 2)
    assert how == f"soft, and cut at one half (0 to {scale:.3g}, cut at {scale / 2:.3g})"


@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize("radius", [3, 4, 7])
def test_what_a_spline_made_of_a_mask_is_cut_at_one_half_and_said(scale, radius):
    ball = (np.sqrt((GRID**2).sum(0)) < radius).astype(float)
    values = ndimage.affine_transform(ball * scale, np.eye(3), [0.4, 0.5, 0.3], order=3)
    assert values.min() < -0.03 * scale
    inside, how = cut_mask(values)
    linear = ndimage.affine_transform(ball, np.eye(3), [0.4, 0.5, 0.3], order=1)
    assert inside.sum() == pytest.approx((linear > 0.5).sum(), rel=0.25)
    assert inside.sum() == pytest.approx(ball.sum(), rel=0.25)
    assert scale != 1 or (inside == (values > 0.5)).all(), "of the mask that it was"
    assert how.startswith("soft, and cut at one half (-")


@pytest.mark.parametrize("values", [[-1, 0, 1], [-3.2, 0.0, 4.0], [-1024, -5, 300]])
def test_intensities_are_no_mask(values):
    with pytest.raises(DataError, match="unlike a mask"):
        cut_mask(np.resize(values, (4, 4, 4)))


def test_all_labels_are_taken_or_those_that_are_asked_for():
    values = BALL * np.where(GRID[0] > 0, 4, np.where(GRID[1] > 0, 2, 1))
    inside, how = cut_mask(values)
    np.testing.assert_array_equal(inside, BALL)
    assert how == "all its labels are taken (1, 2, 4)"
    for labels in ([4], [1, 4], (2, 9)):
        inside, how = cut_mask(values.astype(np.float32), labels)
        np.testing.assert_array_equal(inside, np.isin(values, labels))
        assert how == ""
    with pytest.raises(DataError, match=r"holds none of the labels 3, 5; it has 1, 2, 4"):
        cut_mask(values, [3, 5])


def test_many_labels_are_labels_where_neighbours_are_alike():
    """30 labels in blocks, as of an atlas; the same numbers as a slope are a soft mask."""
    blocks = np.repeat(np.arange(31), 4)[:, None, None] * np.ones((1, 5, 5), int)
    assert cut_mask(blocks)[0].sum() == 30 * 4 * 25
    slope = np.arange(31)[:, None, None] * np.ones((1, 5, 5), int)
    assert cut_mask(slope)[0].sum() == 15 * 25, "16 to 30 of 0 to 30"


def test_a_mask_lies_the_way_its_scan_lies(tmp_path):
    volume = read_volume(save_small(tmp_path / "a.nii", "PSR"))
    mask, how = read_mask(save_small(tmp_path / "m.nii", "PSR", (SMALL % 3 == 0).astype(np.uint8)), volume)
    assert mask.dtype == bool
    assert how == ""
    np.testing.assert_array_equal(mask, SMALL % 3 == 0)


def test_an_analyze_mask_is_read_with_the_axes_of_its_scan(tmp_path):
    head = make_head()
    path = store(head, "ASL", tmp_path / "a.img", nib.AnalyzeImage)
    mask = nib.Nifti1Image((head.get_fdata() > 600).astype(np.int16), head.affine)
    mask_path = store(mask, "ASL", tmp_path / "m.img", nib.AnalyzeImage)
    np.testing.assert_array_equal(read_mask(mask_path, read_volume(path, "ASL"), "ASL")[0], head.get_fdata() > 600)
    path = save_small(tmp_path / "b.nii", "PSR")
    assert read_mask(path, read_volume(path, "LPI", "PSR"), "LPI", "PSR", [7])[0].sum() == 1


def test_a_mask_that_does_not_fit_is_refused(tmp_path):
    volume = read_volume(save_small(tmp_path / "a.nii"))
    ones = np.ones_like(SMALL)
    for name, shift_mm, values in (("moved", 0.02, ones), ("cut", 0, ones[:, :, 1:])):
        affine = volume.affine.copy()
        affine[2, 3] += shift_mm
        nib.save(nib.Nifti1Image(values, affine), tmp_path / f"{name}.nii")
        with pytest.raises(DataError, match=rf"{name}\.nii.*do not fit.*resample"):
            read_mask(tmp_path / f"{name}.nii", volume)
    affine = volume.affine.copy()
    affine[2, 3] += 0.005  # less than rounding in a header
    nib.save(nib.Nifti1Image(ones, affine), tmp_path / "rounded.nii")
    assert read_mask(tmp_path / "rounded.nii", volume)[0].all()
    with pytest.raises(DataError, match=r"e\.nii: is empty"):
        read_mask(save_small(tmp_path / "e.nii", values=np.zeros_like(SMALL)), volume)
    with pytest.raises(DataError, match=r"i\.nii: holds values from -12 to 11, unlike a mask"):
        read_mask(save_small(tmp_path / "i.nii", values=SMALL - 12), volume)


def test_stray_pieces_are_dropped_and_counted():
    brain = np.zeros((30, 30, 30), bool)
    brain[5:20, 5:20, 5:20] = True  # 3375 voxels
    eyes = brain.copy()
    eyes[24:27, 24:27, 24:27] = eyes[25, 2, 25] = True
    kept, dropped = drop_stray_pieces(eyes)
    np.testing.assert_array_equal(kept, brain)
    assert dropped == 28
    assert drop_stray_pieces(brain)[1] == 0


def test_what_touches_over_a_corner_or_lies_in_a_cavity_or_is_large_is_kept():
    brain = np.zeros((30, 30, 30), bool)
    brain[5:20, 5:20, 5:20] = True
    brain[8:15, 8:15, 8:15] = False
    brain[11, 11, 11] = True  # in a ventricle
    brain[20, 20, 20] = True  # over a corner
    brain[22:27, 5:20, 5:20] = True  # a third of the rest
    kept, dropped = drop_stray_pieces(brain)
    np.testing.assert_array_equal(kept, brain)
    assert dropped == 0
