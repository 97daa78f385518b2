"""Image files are read as nibabel reads them, and what is wrong with one is said in one line."""

import argparse
import gzip
import os
import struct
import time
import tracemalloc

import nibabel as nib
import numpy as np
import pytest

import preprocessing.images as images
from common.cli import DataError, parse_axes
from preprocessing.images import read_image
from tests.conftest import ALL_AXES, make_head, store


def save_silent(path, tilt_degrees=11):
    """A tilted scan whose header says nothing about its orientation."""
    store(make_head(), "RAS", path, tilt_degrees=tilt_degrees)
    image = nib.load(path)
    image.set_qform(image.affine, 0)
    image.set_sform(image.affine, 0)
    nib.save(image, path)
    return path


@pytest.mark.parametrize("axes", ALL_AXES)
def test_axes_make_an_affine_for_a_header_that_is_silent(axes, tmp_path):
    """Analyze says only how large voxels are; the scanner's centre is put into the volume's middle."""
    head = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([1.0, 2.0, 3.0, 1.0]))
    affine = read_image(store(head, axes, tmp_path / "a.img", nib.AnalyzeImage), axes).affine
    assert "".join(nib.aff2axcodes(affine)) == axes
    stored = nib.load(tmp_path / "a.img")
    np.testing.assert_allclose(nib.affines.voxel_sizes(affine), stored.header.get_zooms())
    np.testing.assert_allclose(affine @ [*(np.array(stored.shape) - 1) / 2, 1], [0, 0, 0, 1], atol=1e-9)


def test_a_silent_header_is_refused_without_axes(tmp_path):
    silent = save_silent(tmp_path / "c.nii.gz")
    with pytest.raises(DataError, match=r"c\.nii\.gz.*does not give its orientation.*--axes"):
        read_image(silent)
    assert nib.aff2axcodes(read_image(silent, axes="PIR").affine) == ("P", "I", "R")
    analyze = store(make_head(), "RAS", tmp_path / "d.img", nib.AnalyzeImage)
    with pytest.raises(DataError, match="--axes"):
        read_image(analyze)


def test_spm_stores_the_orientation_beside_an_analyze_file(tmp_path):
    image = make_head()
    nib.save(nib.Spm2AnalyzeImage(image.get_fdata().astype(np.int16), image.affine), tmp_path / "scan.img")
    np.testing.assert_allclose(read_image(tmp_path / "scan.img").affine, image.affine)


def test_a_header_with_an_orientation_is_believed_over_axes_unless_distrusted(tmp_path):
    path = store(make_head(), "PSR", tmp_path / "a.nii")
    for options, axes in (
        ({"axes": "RAS"}, "PSR"),
        ({"axes": "RAS", "distrusted": "PSR"}, "RAS"),
        ({"axes": "RAS", "distrusted": "LIA"}, "PSR"),
    ):
        assert "".join(nib.aff2axcodes(read_image(path, **options).affine)) == axes


@pytest.mark.parametrize("text", ["ASL", "asl", "RAS"])
def test_axes_are_three_letters(text):
    assert parse_axes(text) == text.upper()


@pytest.mark.parametrize("text", ["", "RA", "RASA", "RAL", "XAS", "RRS"])
def test_other_axes_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="three axes"):
        parse_axes(text)


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_one_volume_of_several(ending, tmp_path):
    head = make_head()
    series = np.stack([head.get_fdata() * factor for factor in (1, 2, 3)], -1).astype(np.float32)
    nib.save(nib.Nifti1Image(series, head.affine), tmp_path / f"a.{ending}")
    with pytest.raises(DataError, match="--volume"):
        read_image(tmp_path / f"a.{ending}")
    for index in range(3):
        np.testing.assert_array_equal(read_image(tmp_path / f"a.{ending}", index=index).values, series[..., index])
    with pytest.raises(DataError, match="at most 2"):
        read_image(tmp_path / f"a.{ending}", index=3)


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i2", "i4", "f4", ">f4", "f8"])
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_reads_what_nibabel_reads(dtype, ending, tmp_path):
    values = (np.arange(2 * 3 * 4).reshape(2, 3, 4) * 7).astype(dtype)
    image = nib.Nifti1Image(values, np.diag([2.0, 2, 2, 1]))
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / f"a.{ending}")
    ours, theirs = read_image(tmp_path / f"a.{ending}"), nib.load(tmp_path / f"a.{ending}")
    np.testing.assert_allclose(ours.values, theirs.get_fdata(), rtol=1e-6)
    np.testing.assert_array_equal(ours.affine, theirs.affine)


def test_no_more_voxels_than_a_brain_has(tmp_path):
    """512^3: at 0.5 mm 25 cm a side. No such file is written: the next check is of its size."""
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), tmp_path / "a.nii")
    for shape, words in (((512, 512, 512), "is truncated"), ((512, 512, 513), "too many for a brain")):
        write_header(tmp_path / "a.nii", dim=(3, *shape, 1, 1, 1, 1))
        with pytest.raises(DataError, match=words):
            read_image(tmp_path / "a.nii")


@pytest.mark.parametrize(("size_mm", "fits"), [(0.05, True), (0.049, False), (20, True), (20.1, False)])
@pytest.mark.parametrize("axis", [0, 2])
def test_voxels_have_a_size_that_a_brain_scan_can_have(size_mm, fits, axis, tmp_path):
    sizes = [1.0, 1.0, 1.0]
    sizes[axis] = size_mm
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.diag([*sizes, 1])), tmp_path / "a.nii")
    if fits:
        read_image(tmp_path / "a.nii")
    else:
        with pytest.raises(DataError, match=r"claims voxels of .*correct the header"):
            read_image(tmp_path / "a.nii")


def test_as_much_as_gzip_can_pack_is_read(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((128, 128, 128), np.int16), np.eye(4)), tmp_path / "a.nii")
    content = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content, 9))
    assert len(content) > 1000 * (tmp_path / "a.nii.gz").stat().st_size
    assert read_image(tmp_path / "a.nii.gz").values.shape == (128, 128, 128)


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_a_little_may_follow_the_voxels_but_not_much(ending, tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "a.nii")
    content = (tmp_path / "a.nii").read_bytes()
    for extra, fits in ((65536, True), (65537, False)):
        longer = content + b"x" * extra
        (tmp_path / f"b.{ending}").write_bytes(gzip.compress(longer) if ending.endswith("gz") else longer)
        if fits:
            read_image(tmp_path / f"b.{ending}")
        else:
            with pytest.raises(DataError, match="where its header says"):
                read_image(tmp_path / f"b.{ending}")


def test_an_empty_file_is_called_so(tmp_path):
    for name in ("a.nii", "a.nii.gz"):
        (tmp_path / name).touch()
        with pytest.raises(DataError, match=rf"{name}: is empty \(0 bytes\); copy it again"):
            read_image(tmp_path / name)


def test_a_single_file_of_two_voxels_a_side_is_the_smallest(tmp_path):
    for shape, fits in (((2, 2, 2), True), ((2, 2, 1), False), ((2, 2), False)):
        nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4)), tmp_path / "a.nii")
        if fits:
            read_image(tmp_path / "a.nii")
        else:
            with pytest.raises(DataError, match="is not a volume"):
                read_image(tmp_path / "a.nii")


def test_gzip_of_several_members_and_padding_is_read(tmp_path):
    nib.save(make_head(), tmp_path / "a.nii")
    content = (tmp_path / "a.nii").read_bytes()
    packed = gzip.compress(content[:5000]) + gzip.compress(content[5000:]) + bytes(512)
    (tmp_path / "b.nii.gz").write_bytes(packed)
    np.testing.assert_array_equal(read_image(tmp_path / "b.nii.gz").values, read_image(tmp_path / "a.nii").values)


def write_header(path, **fields):
    """Change fields of a NIfTI-1 file in place, without the checks of nibabel."""
    places = {"dim": (40, "8h"), "datatype": (70, "2h"), "pixdim": (76, "8f"), "vox_offset": (108, "f"),
              "sform_code": (254, "h"), "qform_code": (252, "h"), "srow_x": (280, "4f")}  # fmt: skip
    content = bytearray(path.read_bytes())
    for name, values in fields.items():
        place, form = places[name]
        content[place : place + struct.calcsize(form)] = struct.pack(f"<{form}", *np.atleast_1d(values).tolist())
    path.write_bytes(content)


BAD_HEADERS = {
    "negative": {"dim": (3, -40, 48, 44, 1, 1, 1, 1)},
    "zero": {"dim": (3, 0, 48, 44, 1, 1, 1, 1)},
    "huge": {"dim": (3, 32000, 32000, 32000, 1, 1, 1, 1)},
    "large": {"dim": (3, 400, 480, 440, 1, 1, 1, 1)},
    "many": {"dim": (7, 40, 48, 44, 32000, 32000, 32000, 32000)},
    "smaller": {"dim": (3, 20, 48, 44, 1, 1, 1, 1)},
    "flat": {"dim": (2, 40, 48, 1, 1, 1, 1, 1)},
    "unknown type": {"datatype": (77, 16)},
    "voxels of nothing": {"pixdim": (1, 0, 0, 0, 0, 0, 0, 0), "sform_code": 0, "qform_code": 1},
    "voxels of a metre": {"pixdim": (1, 1e3, 1e3, 1e3, 0, 0, 0, 0), "sform_code": 0, "qform_code": 1},
    "voxels of nan": {"pixdim": (1, np.nan, 1, 1, 0, 0, 0, 0), "sform_code": 0, "qform_code": 1},
    "singular": {"srow_x": (0, 0, 0, 0)},
    "endless": {"srow_x": (np.inf, 0, 0, 0)},
    "offset beyond": {"vox_offset": 1e9},
    "offset before": {"vox_offset": -5000},
}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("huge", "too many for a brain"),
        ("large", "is truncated"),
        ("smaller", "where its header says"),
        ("flat", "is not a volume"),
        ("voxels of nothing", "voxels of 0, 0, 0 mm"),
        ("voxels of a metre", "voxels of 1000, 1000, 1000 mm"),
        ("voxels of nan", "is singular"),
        ("singular", "is singular"),
        ("endless", "is singular"),
        ("offset beyond", "says that the voxels begin at byte 1000000000"),
    ],
)
def test_a_bad_header_is_called_what_it_is(kind, words, tmp_path):
    nib.save(make_head(), tmp_path / "a.nii")
    write_header(tmp_path / "a.nii", **BAD_HEADERS[kind])
    with pytest.raises(DataError, match=words):
        read_image(tmp_path / "a.nii")


def test_voxel_sizes_are_the_affines_where_the_header_has_one(tmp_path):
    nib.save(make_head(), tmp_path / "a.nii")
    write_header(tmp_path / "a.nii", pixdim=(1, 0, 0, 0, 0, 0, 0, 0), sform_code=1, qform_code=0)
    np.testing.assert_array_equal(nib.affines.voxel_sizes(read_image(tmp_path / "a.nii").affine), [4, 4, 4])


def test_a_quaternion_is_an_orientation(tmp_path):
    image = nib.load(store(make_head(), "PSR", tmp_path / "b.nii"))
    image.set_qform(image.affine, 1)
    nib.save(image, tmp_path / "a.nii")
    write_header(tmp_path / "a.nii", sform_code=0, qform_code=1)
    assert "".join(nib.aff2axcodes(read_image(tmp_path / "a.nii").affine)) == "PSR"


def test_voxels_missing_inside_a_whole_gzip_are_missed(tmp_path):
    nib.save(make_head(), tmp_path / "a.nii")
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()[:-1]))
    with pytest.raises(DataError, match=r"is truncated: 337916 of 337920 bytes; copy it again"):
        read_image(tmp_path / "b.nii.gz")


def test_gzip_goes_by_its_name(tmp_path):
    nib.save(make_head(), tmp_path / "a.nii")
    content = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(content)
    (tmp_path / "c.nii").write_bytes(gzip.compress(content))
    for name, words in (("b.nii.gz", "is not gzip, unlike its name"), ("c.nii", "is gzip, unlike its name")):
        with pytest.raises(DataError, match=words):
            read_image(tmp_path / name)


# Bounds.


def write_extended(path, size, stated=None, offset=None):
    """A NIfTI file with a header extension of so many bytes, which may say that it is longer."""
    image = nib.Nifti1Image(np.arange(64, dtype=np.uint8).reshape(4, 4, 4), np.eye(4))
    header = image.header.copy()
    header["vox_offset"] = 352 + size if offset is None else offset
    header["magic"] = b"n+1"
    extension = np.array([size if stated is None else stated, 6], "<i4").tobytes() + bytes(size - 8)
    content = header.binaryblock + b"\1\0\0\0" + extension + image.get_fdata().astype(np.uint8).tobytes("F")
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_extensions_of_a_header_are_not_read(ending, tmp_path):
    for size, stated in ((48, None), (1 << 24, None), (48, 2**31 - 16), (48, -5)):
        path = write_extended(tmp_path / f"a.{ending}", size, stated)
        tracemalloc.start()
        values = read_image(path).values
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        np.testing.assert_array_equal(values, np.arange(64).reshape(4, 4, 4))
        assert peak < 3e6
    with pytest.raises(DataError, match="its header says that the voxels begin at byte 100663296; convert it again"):
        read_image(write_extended(tmp_path / f"a.{ending}", 48, offset=3 << 25))


def test_a_header_in_a_file_of_its_own_is_not_read_further_than_a_header_goes(tmp_path):
    nib.save(nib.Nifti1Pair(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "a.img")
    with open(tmp_path / "a.hdr", "r+b") as file:
        file.seek(348)
        file.write(b"\1\0\0\0" + np.array([1 << 28, 6], "<i4").tobytes())
        file.truncate(1 << 28)
    tracemalloc.start()
    read_image(tmp_path / "a.img")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3e6


def test_a_matrix_of_spm_is_small(tmp_path):
    nib.save(nib.Spm99AnalyzeImage(np.zeros((4, 4, 4), np.uint8), np.diag([2, 2, 2, 1])), tmp_path / "a.img")
    read_image(tmp_path / "a.img")
    with open(tmp_path / "a.mat", "ab") as file:
        file.truncate((1 << 16) + 1)
    with pytest.raises(DataError, match=r"a\.mat: is not an SPM matrix, which takes less than 64 kB; remove it"):
        read_image(tmp_path / "a.img")
    (tmp_path / "a.mat").unlink()
    os.mkfifo(tmp_path / "a.mat")
    with pytest.raises(DataError, match=r"a\.mat: is not an SPM matrix"):
        read_image(tmp_path / "a.img")


@pytest.mark.parametrize("name", ["a.img", "a.hdr"])
def test_a_fifo_is_not_waited_for(name, tmp_path):
    nib.save(nib.AnalyzeImage(np.zeros((4, 4, 4), np.uint8), None), tmp_path / "a.img")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="is not a regular file"):
        read_image(tmp_path / "a.img", axes="RAS")


@pytest.mark.parametrize("deep", [(2049, 2, 2), (2, 2049, 2), (2, 2, 2049)])
def test_a_stack_is_no_deeper_than_a_brain_can_be(deep, tmp_path):
    nib.save(nib.Nifti1Image(np.zeros(deep, np.uint8), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(DataError, match="too many for a brain"):
        read_image(tmp_path / "a.nii")
    nib.save(nib.Nifti1Image(np.zeros([min(n, 2048) for n in deep], np.uint8), np.eye(4)), tmp_path / "a.nii")
    read_image(tmp_path / "a.nii")


def test_a_packed_file_is_not_read_beyond_what_it_should_hold(tmp_path):
    """64 voxels and 64 MB of zeros, which take 64 kB: the end, which is missing, is not come to."""
    content = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)).to_bytes()
    packed = gzip.compress(content + bytes(1 << 26))
    (tmp_path / "a.nii.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match="where its header says 416"):
        read_image(tmp_path / "a.nii.gz")


def test_many_empty_pieces_of_gzip_take_no_time(tmp_path):
    content = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)).to_bytes()
    empty = gzip.compress(b"")
    (tmp_path / "a.nii.gz").write_bytes(empty * 1000 + gzip.compress(content) + empty * 1000)
    read_image(tmp_path / "a.nii.gz")
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content) + empty * 70_000)
    began = time.process_time()
    with pytest.raises(DataError, match="is packed in more than 65536 pieces"):
        read_image(tmp_path / "a.nii.gz")
    assert time.process_time() - began < 20


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "mgz"])
@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.int16])
def test_wide_values_are_narrowed_on_the_way_where_there_are_many(ending, dtype, tmp_path, monkeypatch):
    values = np.random.default_rng(0).integers(-1000, 1000, (70, 80, 90))
    if ending == "mgz" and dtype == np.float64:
        pytest.skip("MGH has no float64")
    kind = nib.MGHImage if ending == "mgz" else nib.Nifti1Image
    nib.save(kind(values.astype(dtype), np.eye(4)), tmp_path / f"a.{ending}")
    for limit, wide in ((1 << 29, False), (1 << 18, dtype == np.float64)):
        monkeypatch.setattr(images, "WIDE_BYTES", limit)
        read = read_image(tmp_path / f"a.{ending}").values
        np.testing.assert_array_equal(read, values)
        assert read.dtype == (np.float32 if wide else np.dtype(dtype).newbyteorder(">" if ending == "mgz" else "="))
