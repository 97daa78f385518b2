"""A copy is the same scan, however it is packed, called and stored; another scan is another one."""

import gzip
import shutil

import nibabel as nib
import numpy as np
import pytest

from preprocessing.identity import hash_file, hash_voxels
from preprocessing.volume import read_volume
from tests.conftest import ALL_AXES, make_head, store

RNG = np.random.default_rng(0)
HEAD = make_head((21, 24, 22), (8.0, 8.0, 8.0), seed=1)
WHOLE = np.round(HEAD.get_fdata()).astype(np.int16)  # as scanners store it


def identify(path):
    volume = read_volume(path)
    return hash_voxels(volume.values, volume.spacing_mm)


def save(path, values=WHOLE, affine=HEAD.affine, kind=nib.Nifti1Image):
    nib.save(kind(values, affine), path)
    return path


@pytest.fixture
def scan(tmp_path):
    return save(tmp_path / "a.nii")


def test_a_copy_under_another_name_is_the_same_scan(scan, tmp_path):
    shutil.copy(scan, tmp_path / "b.nii")
    assert identify(tmp_path / "b.nii") == identify(scan)
    assert len(identify(scan)) == 32


@pytest.mark.parametrize("level", [1, 9])
def test_packing_makes_no_difference(level, scan, tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(scan.read_bytes(), level))
    assert identify(tmp_path / "a.nii.gz") == identify(scan)
    assert hash_file(tmp_path / "a.nii.gz") != hash_file(scan)


def test_words_in_the_header_make_no_difference(scan, tmp_path):
    image = nib.Nifti1Image(WHOLE, HEAD.affine)
    image.header["descrip"] = b"another program"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 1000))
    nib.save(image, tmp_path / "b.nii")
    assert identify(tmp_path / "b.nii") == identify(scan)


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.float32, np.float64])
def test_another_data_type_makes_no_difference(dtype, scan, tmp_path):
    assert identify(save(tmp_path / "b.nii", WHOLE.astype(dtype))) == identify(scan)


@pytest.mark.parametrize("kind", [nib.Nifti2Image, nib.MGHImage])
def test_another_format_makes_no_difference(kind, scan, tmp_path):
    path = tmp_path / ("b.mgz" if kind is nib.MGHImage else "b.nii")
    assert identify(save(path, WHOLE.astype(np.int32), kind=kind)) == identify(scan)


@pytest.mark.parametrize("axes", ALL_AXES[::5])
def test_the_order_of_storage_makes_no_difference(axes, scan, tmp_path):
    path = store(nib.Nifti1Image(WHOLE, HEAD.affine), axes, tmp_path / "b.nii")
    assert identify(path) == identify(scan)


def test_a_scale_factor_and_the_last_digit_of_what_it_makes_are_no_difference(tmp_path):
    """FSL multiplies in float32, nibabel in float64: what they store differs in the last bit."""
    slope, intercept = np.float32(0.0137), np.float32(-3.1)
    scaled = nib.Nifti1Image(WHOLE, HEAD.affine)
    scaled.header.set_slope_inter(slope, intercept)
    header = scaled.header.copy()
    path = tmp_path / "scaled.nii"
    nib.save(nib.Nifti1Image(WHOLE, HEAD.affine), path)
    content = bytearray(path.read_bytes())
    header["scl_slope"], header["scl_inter"] = slope, intercept
    content[:348] = header.binaryblock[:108] + np.float32(352).tobytes() + header.binaryblock[112:]
    path.write_bytes(content)
    assert nib.load(path).get_fdata().max() < 20, "scaled"
    narrow = WHOLE.astype(np.float32) * slope + intercept
    wide = (WHOLE.astype(np.float64) * float(slope) + float(intercept)).astype(np.float32)
    assert (narrow != wide).any()
    hashes = {identify(path), *(identify(save(tmp_path / f"{i}.nii", v)) for i, v in enumerate((narrow, wide)))}
    assert len(hashes) == 1


def test_an_origin_that_was_moved_makes_no_difference(scan, tmp_path):
    affine = HEAD.affine.copy()
    affine[:3, 3] += 12.3
    assert identify(save(tmp_path / "b.nii", affine=affine)) == identify(scan)


def test_sizes_that_differ_by_rounding_are_the_same():
    for size in (0.9375, 1.0, 1.2, 1.25, 0.46875, 1.171875, 1.05, 0.95):
        others = {hash_voxels(WHOLE, (size + change, 1.0, 1.0)) for change in (0, 1e-4, -1e-4)}
        assert len(others) == 1, size


def test_another_scan_is_another(scan, tmp_path):
    one_voxel = WHOLE.copy()
    one_voxel[10, 12, 11] += 1000
    others = [
        save(tmp_path / "seed.nii", np.round(make_head((21, 24, 22), (8.0,) * 3, seed=2).get_fdata()).astype(np.int16)),
        save(tmp_path / "voxel.nii", one_voxel),
        save(tmp_path / "flipped.nii", WHOLE[::-1].copy()),
        save(tmp_path / "coarser.nii", affine=np.diag([9.0, 9.0, 9.0, 1.0])),
        save(tmp_path / "cropped.nii", WHOLE[:-1]),
    ]
    assert len({identify(path) for path in [scan, *others]}) == 6


def test_voxels_that_are_no_number_are_as_nothing(tmp_path):
    values = WHOLE.astype(np.float32)
    holed = np.where(values == 0, np.nan, values).astype(np.float32)
    assert identify(save(tmp_path / "a.nii", values)) == identify(save(tmp_path / "b.nii", holed))


def test_a_large_scan_is_told_by_a_part_of_its_voxels():
    values = RNG.integers(0, 1000, (130, 70, 200)).astype(np.int16)
    other = np.roll(values, 1, axis=2)
    assert hash_voxels(values, (1, 1, 1)) != hash_voxels(other, (1, 1, 1))
    assert hash_voxels(values, (1, 1, 1)) == hash_voxels(np.asfortranarray(values).astype("f8"), (1, 1, 1))


def test_the_hash_of_a_file_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_digits_of_a_scan_stay_as_they_are():
    """Models that are trained know their scans by them."""
    values = (np.arange(420).reshape(70, 3, 2) * 7 % 11).astype(np.int16)
    for stored in (values, values * np.float32(0.1) - 1):
        assert hash_voxels(stored, (1.0, 1.25, 2.0)) == "00cfc1912a3f12bd1d1a858c325e9f98"
