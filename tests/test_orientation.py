"""A scan stored in any orientation gives the same slices, and maps and masks lie where they belong in its file."""

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, ornt_transform

from preprocessing.geometry import cut_stack
from preprocessing.masks import read_mask
from preprocessing.volume import find_brain, read_volume
from tests.conftest import ALL_AXES, make_head, store

RNG = np.random.default_rng(0)


def cut_file(path, keep=0.7, size=32):
    volume = read_volume(path)
    return cut_stack(volume, *find_brain(volume), keep, size, 200.0)


@pytest.mark.parametrize("axes", ALL_AXES)
def test_every_orientation_gives_the_same_slices_and_takes_the_map_back(axes, tmp_path):
    head = make_head((20, 32, 22), (8.0, 6.0, 8.0))
    stack, geometry, _ = cut_file(store(head, "RAS", tmp_path / "ras.nii"))
    other, other_geometry, _ = cut_file(store(head, axes, tmp_path / "other.nii"))
    np.testing.assert_array_equal(other, stack)
    anomaly_map = np.where(stack > 0, RNG.random(stack.shape), np.nan)
    wanted = apply_orientation(geometry.restore(anomaly_map), ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes)))
    np.testing.assert_array_equal(other_geometry.restore(anomaly_map), wanted)
    assert wanted.shape == nib.load(tmp_path / "other.nii").shape


@pytest.mark.parametrize(("axes", "tilt"), [("RAS", 0), ("LPI", 12), ("SAL", -20)])
@pytest.mark.parametrize("spacing", [(4.0, 4.0, 4.0), (2.5, 3.0, 5.0)])
def test_a_planted_cube_comes_back_to_its_place(tmp_path, axes, tilt, spacing):
    shape = tuple(round(n * 4 / s) for n, s in zip((40, 48, 44), spacing, strict=True))
    image = make_head(shape, spacing)
    values = image.get_fdata(dtype=np.float32).copy()
    corner = [round(n * share) for n, share in zip(shape, (0.6, 0.35, 0.5), strict=True)]
    values[tuple(slice(c, c + round(28 / s)) for c, s in zip(corner, spacing, strict=True))] = 4000
    path = store(nib.Nifti1Image(values, image.affine), axes, tmp_path / "scan.nii", tilt_degrees=tilt)
    stack, geometry, _ = cut_file(path, size=128)
    back = geometry.restore(np.where(stack > 0, np.abs(stack.astype(np.float32) - 0.3), np.nan))
    stored = nib.load(path).get_fdata()
    truth = stored == 4000
    assert truth[np.unravel_index(np.nanargmax(back), back.shape)], "the map peaks outside the cube"
    assert np.isnan(back[stored == 0]).mean() > 0.9, "outside the brain nothing was scored"
    assert np.nanmean(back[truth]) > 2 * np.nanmean(back[~truth])


def test_every_brain_voxel_of_a_kept_slice_is_scored(tmp_path):
    path = store(make_head(), "RAS", tmp_path / "scan.nii")
    stack, geometry, _ = cut_file(path, size=64)
    scored = np.isfinite(geometry.restore(np.where(stack > 0, 1.0, np.nan)))
    brain = nib.load(path).get_fdata() > 0
    kept = np.zeros_like(brain)
    kept[:, :, list(geometry.slices)] = True
    assert not (scored & ~kept).any()
    assert (scored & brain).sum() > 0.98 * (brain & kept).sum()


def test_a_lesion_mask_lies_over_its_lesion(tmp_path):
    image = make_head()
    mask = np.zeros(image.shape, np.float32)
    mask[25:30, 20:26, 18:24] = 1
    values = np.where(mask, 2000, image.get_fdata()).astype(np.float32)
    path = store(nib.Nifti1Image(values, image.affine), "ASL", tmp_path / "scan.nii")
    mask_path = store(nib.Nifti1Image(mask, image.affine), "ASL", tmp_path / "mask.nii")
    stack, geometry, _ = cut_file(path, size=64)
    lesion = geometry.cut_mask(read_mask(mask_path, read_volume(path))[0])
    assert lesion.sum() > 50
    assert stack[lesion > 0].astype(float).mean() > stack[(stack > 0) & (lesion == 0)].astype(float).max() - 0.1


@pytest.mark.parametrize(("spacing", "shape"), [((2.0, 2.0, 2.0), (80, 96, 88)), ((2.0, 3.0, 4.0), (80, 64, 44))])
def test_voxel_size_hardly_changes_the_slices(tmp_path, spacing, shape):
    coarse = cut_file(store(make_head(), "RAS", tmp_path / "a.nii"), keep=1.0)[0]
    other = cut_file(store(make_head(shape, spacing), "LPI", tmp_path / "b.nii"), keep=1.0)[0]
    a, b = coarse[len(coarse) // 2].astype(float), other[len(other) // 2].astype(float)
    both = (a > 0) & (b > 0)
    assert both.sum() > 0.9 * max((a > 0).sum(), (b > 0).sum())
    assert np.abs(a - b)[both].mean() < 0.02
