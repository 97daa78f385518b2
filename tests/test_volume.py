"""A scan goes to its slices the right way up, and a map goes back to where it came from."""

import itertools

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy import ndimage

from preprocessing.scans import DataError
from preprocessing.volume import (
    BRAIN_FLOOR,
    cut_mask,
    cut_stack,
    fill_holes,
    find_brain,
    keep_middle,
    read_mask,
    read_volume,
    resampling_weights,
    restore_to_grid,
)
from tests.conftest import make_head

ALL_AXES = [
    "".join(sides) for order in itertools.permutations(("LR", "PA", "IS")) for sides in itertools.product(*order)
]


def store(image: nib.Nifti1Image, axes: str, path, oblique_degrees: float = 0.0):
    """Save the same brain with other storage axes, and tilted in scanner space."""
    to = ornt_transform(nib.io_orientation(image.affine), axcodes2ornt(axes))
    affine = image.affine @ inv_ornt_aff(to, image.shape)
    angle = np.deg2rad(oblique_degrees)
    tilt = np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    nib.save(nib.Nifti1Image(apply_orientation(image.get_fdata(dtype=np.float32), to), tilt @ affine), path)
    return path


def cut(path, keep=0.7, size=32):
    volume = read_volume(path)
    brain, skull_off = find_brain(volume)
    return cut_stack(volume, brain, skull_off, keep, size, 200.0)


def test_all_48_orientations_give_the_same_slices(tmp_path):
    stacks = [cut(store(make_head(), axes, tmp_path / f"{axes}.nii"))[0] for axes in ALL_AXES]
    assert len(stacks) == 48
    for stack in stacks[1:]:
        np.testing.assert_array_equal(stack, stacks[0])


def test_slices_are_upright_and_not_mirrored(tmp_path):
    image = make_head()
    values = image.get_fdata(dtype=np.float32).copy()
    values[30:33, 36:39, 20:24] = 3000  # right, anterior
    path = store(nib.Nifti1Image(values, image.affine), "PSR", tmp_path / "scan.nii.gz")
    stack, record = cut(path)
    assert record["axes"] == "PSR"
    _, row, column = np.unravel_index(stack.argmax(), stack.shape)
    assert row > 16, "anterior is up: the first axis runs posterior to anterior"
    assert column > 16, "right is right: the second axis runs left to right"


@pytest.mark.parametrize(("spacing", "shape"), [((2.0, 2.0, 2.0), (80, 96, 88)), ((2.0, 3.0, 4.0), (80, 64, 44))])
def test_voxel_size_hardly_changes_the_slices(tmp_path, spacing, shape):
    coarse = cut(store(make_head(), "RAS", tmp_path / "a.nii"), keep=1.0)[0]
    other, record = cut(store(make_head(shape, spacing), "LPI", tmp_path / "b.nii"), keep=1.0)
    a, b = coarse[len(coarse) // 2].astype(float), other[len(other) // 2].astype(float)
    both = (a > 0) & (b > 0)
    assert record["spacing_mm"] == list(spacing)
    assert both.sum() > 0.9 * max((a > 0).sum(), (b > 0).sum())
    assert np.abs(a - b)[both].mean() < 0.02


def test_holes_are_filled_as_in_scipy():
    rng = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.9, 1.0):
        inside = rng.random((9, 11, 10)) < share
        np.testing.assert_array_equal(fill_holes(inside), ndimage.binary_fill_holes(inside))
    assert not fill_holes(np.zeros((3, 3, 3), bool)).any()


def test_middle_seventy_percent():
    holds = np.zeros(60, dtype=bool)
    holds[10:31] = True  # 21 slices, 10 to 30: 14.7, so 15 are kept, 3 left out on each side
    assert keep_middle(holds, 0.7).tolist() == list(range(13, 28))
    assert keep_middle(np.ones(10, dtype=bool), 0.7).tolist() == list(range(1, 8))
    assert keep_middle(np.ones(1, dtype=bool), 0.7).tolist() == [0]
    holds[20] = False  # a gap does not end the brain
    assert keep_middle(holds, 1.0).tolist() == list(range(10, 31))


def test_range_and_brain_convention(processed):
    for path in sorted(processed.glob("*/*/*/slice_*.npy")):
        if path.parents[1].name == "masks":
            continue
        values = np.load(path)
        assert values.dtype == np.float16
        assert values.shape == (32, 32)
        assert values.min() == 0
        assert values.max() <= 1
        assert (values[values > 0] >= np.float16(BRAIN_FLOOR)).all()


def test_resampling_weights_keep_a_straight_line():
    weights = resampling_weights(50, 2.0, 24.5, 20, 3.0, 9.5, 3.0)
    positions = (np.arange(50) - 24.5) * 2.0
    wanted = (np.arange(20) - 9.5) * 3.0
    np.testing.assert_allclose((weights @ positions)[1:-1], wanted[1:-1], atol=0.3)  # mm, of samples 2 and 3 mm apart
    outside = resampling_weights(10, 1.0, 4.5, 30, 1.0, 14.5, 1.0)
    assert outside[0].sum() == 0
    np.testing.assert_allclose(outside[10:20], np.eye(10), atol=1e-6)


@pytest.mark.parametrize(("axes", "tilt"), [("RAS", 0), ("PSR", 0), ("LPI", 12), ("ASL", 0), ("SAL", -20)])
@pytest.mark.parametrize("spacing", [(4.0, 4.0, 4.0), (2.5, 3.0, 5.0)])
def test_a_planted_cube_comes_back_to_its_place(tmp_path, axes, tilt, spacing):
    shape = tuple(round(n * 4 / s) for n, s in zip((40, 48, 44), spacing, strict=True))
    image = make_head(shape, spacing)
    values = image.get_fdata(dtype=np.float32).copy()
    corner = [round(n * share) for n, share in zip(shape, (0.6, 0.35, 0.5), strict=True)]
    cube = tuple(slice(c, c + round(28 / s)) for c, s in zip(corner, spacing, strict=True))
    values[cube] = 4000
    path = store(nib.Nifti1Image(values, image.affine), axes, tmp_path / "scan.nii.gz", tilt)
    stack, record = cut(path, size=128)
    anomaly = np.where(stack > 0, np.abs(stack.astype(np.float32) - 0.3), np.nan)
    back = restore_to_grid(anomaly, record)
    stored = nib.load(path)
    assert back.shape == stored.shape
    truth = stored.get_fdata() == 4000
    assert truth[np.unravel_index(np.nanargmax(back), back.shape)], "the map peaks outside the cube"
    assert np.isnan(back[stored.get_fdata() == 0]).mean() > 0.9, "outside the brain nothing was scored"
    assert np.nanmean(back[truth]) > 2 * np.nanmean(back[~truth])


def test_every_brain_voxel_of_a_kept_slice_is_scored(tmp_path):
    path = store(make_head(), "RAS", tmp_path / "scan.nii")
    stack, record = cut(path, size=64)
    back = restore_to_grid(np.where(stack > 0, 1.0, np.nan), record)
    brain = nib.load(path).get_fdata() > 0
    kept = np.zeros_like(brain)
    kept[:, :, record["slices"]] = True
    scored = np.isfinite(back)
    assert not (scored & ~kept).any()
    assert (scored & brain).sum() > 0.98 * (brain & kept).sum()


def test_lesion_mask_lies_over_its_lesion(tmp_path):
    image = make_head()
    mask = np.zeros(image.shape, dtype=np.uint8)
    mask[25:30, 20:26, 18:24] = 1
    values = np.where(mask, 2000, image.get_fdata())
    path = store(nib.Nifti1Image(values.astype(np.float32), image.affine), "ASL", tmp_path / "scan.nii")
    mask_path = store(nib.Nifti1Image(mask.astype(np.float32), image.affine), "ASL", tmp_path / "mask.nii")
    stack, record = cut(path, size=64)
    lesion = cut_mask(read_mask(mask_path, read_volume(path)), record)
    assert lesion.sum() > 50
    assert stack[lesion > 0].astype(float).mean() > stack[(stack > 0) & (lesion == 0)].astype(float).max() - 0.1


def test_a_mask_on_another_grid_is_refused(tmp_path):
    path = store(make_head(), "RAS", tmp_path / "scan.nii")
    nib.save(nib.Nifti1Image(np.ones((40, 48, 44), np.uint8), np.diag([4.0, 4, 4, 1])), tmp_path / "mask.nii")
    with pytest.raises(DataError, match=r"mask\.nii.*resample"):
        read_mask(tmp_path / "mask.nii", read_volume(path))


def test_analyze_is_read(tmp_path):
    image = make_head()
    nib.save(nib.Spm2AnalyzeImage(image.get_fdata().astype(np.int16), image.affine), tmp_path / "scan.img")
    assert read_volume(tmp_path / "scan.img").shape == image.shape


def test_a_trailing_axis_of_one_is_dropped(tmp_path):
    image = make_head()
    nib.save(nib.Nifti1Image(image.get_fdata()[..., None], image.affine), tmp_path / "scan.nii")
    assert read_volume(tmp_path / "scan.nii").values.shape == image.shape


def test_a_head_with_skull_counts_all_slices(tmp_path):
    rng = np.random.default_rng(0)
    shape, spacing = (60, 70, 60), (4.0, 4.0, 4.0)
    grid = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)], indexing="ij")
    head = (grid[0] / 80) ** 2 + (grid[1] / 100) ** 2 + (grid[2] / 110) ** 2 < 1
    values = np.where(head, 400, 0) + np.abs(rng.normal(0, 15, shape))
    nib.save(nib.Nifti1Image(values.astype(np.float32), np.diag([4.0, 4, 4, 1])), tmp_path / "head.nii")
    volume = read_volume(tmp_path / "head.nii")
    brain, skull_off = find_brain(volume)
    assert not skull_off
    assert (brain == head).mean() > 0.98
    stack, _ = cut_stack(volume, brain, skull_off, 0.7, 32, 256.0)
    assert len(stack) == 42
