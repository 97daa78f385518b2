"""Whatever lies in a folder, the good scans are done, the bad ones named in one line, and memory stays bounded."""

import gzip
import itertools
import os
import random
import resource
import shutil
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from preprocessing.images import read_image
from preprocessing.preprocess_oasis import main as preprocess
from preprocessing.scans import DataError
from preprocessing.slices import list_scans, read_scan
from preprocessing.volume import cut_stack, find_brain, read_mask, read_volume
from tests.conftest import make_head

ALL_AXES = [
    "".join(sides) for order in itertools.permutations(("LR", "PA", "IS")) for sides in itertools.product(*order)
]


def save_reoriented(image, axes, path, kind=nib.Nifti1Image):
    to = ornt_transform(nib.io_orientation(image.affine), axcodes2ornt(axes))
    values = apply_orientation(image.get_fdata(), to).astype(np.int16)
    affine = None if kind is nib.AnalyzeImage else image.affine @ inv_ornt_aff(to, image.shape)
    stored = kind(values, affine)
    stored.header.set_zooms(np.array(image.header.get_zooms())[np.argsort(to[:, 0])])
    nib.save(stored, path)
    return path


def cut(path, **reading):
    volume = read_volume(path, **reading)
    return cut_stack(volume, *find_brain(volume), 1.0, 32, 200.0)[0]


@pytest.mark.parametrize("spacing", [(4.0, 4.0, 4.0), (4.0, 5.0, 6.0)])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.AnalyzeImage])
def test_all_48_orientations_give_the_same_slices(kind, spacing, tmp_path):
    """NIfTI says them itself, Analyze with --axes."""
    head = make_head(tuple(round(n * 4 / s) for n, s in zip((40, 48, 44), spacing, strict=True)), spacing)
    ending = "img" if kind is nib.AnalyzeImage else "nii"
    stacks = [
        cut(save_reoriented(head, axes, tmp_path / f"{axes}.{ending}", kind), axes=axes if ending == "img" else None)
        for axes in ALL_AXES
    ]
    assert len(stacks) == 48
    for stack in stacks[1:]:
        np.testing.assert_array_equal(stack, stacks[0])


def save_oblique(head, path, codes=1):
    angle = np.deg2rad(11)
    tilt = np.eye(4)
    tilt[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    image = nib.Nifti1Image(head.get_fdata(dtype=np.float32), tilt @ head.affine)
    image.set_qform(image.affine, codes)
    image.set_sform(image.affine, codes)
    nib.save(image, path)
    return path


def test_oblique_scans_are_trusted_and_silent_ones_refused(tmp_path):
    straight = cut(save_reoriented(make_head(), "RAS", tmp_path / "a.nii"))
    oblique = cut(save_oblique(make_head(), tmp_path / "b.nii.gz"))
    np.testing.assert_allclose(straight.astype(float), oblique.astype(float), atol=2e-3)  # int16 against float32
    silent = save_oblique(make_head(), tmp_path / "c.nii.gz", codes=0)
    with pytest.raises(DataError, match=r"c\.nii\.gz.*does not tell its orientation.*--axes"):
        read_volume(silent)
    np.testing.assert_array_equal(cut(silent, axes="RAS"), oblique)
    assert read_volume(silent, axes="PIR").axes == "PIR"
    analyze = save_reoriented(make_head(), "RAS", tmp_path / "d.img", nib.AnalyzeImage)
    with pytest.raises(DataError, match="--axes"):
        read_volume(analyze)


def test_a_header_that_tells_is_trusted_over_axes(tmp_path):
    path = save_reoriented(make_head(), "PSR", tmp_path / "a.nii")
    assert read_volume(path, axes="RAS").axes == "PSR"
    assert read_volume(path, axes="RAS", doubted="PSR").axes == "RAS"


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


def test_no_more_voxels_than_a_brain_has(tmp_path, monkeypatch):
    nib.save(make_head(), tmp_path / "a.nii.gz")
    monkeypatch.setattr("preprocessing.images.MOST_VOXELS", 40 * 48 * 44)
    read_image(tmp_path / "a.nii.gz")
    monkeypatch.setattr("preprocessing.images.MOST_VOXELS", 40 * 48 * 44 - 1)
    with pytest.raises(DataError, match="too many for a brain"):
        read_image(tmp_path / "a.nii.gz")


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


def make_bad_folder(folder):
    """One of each kind of bad scan, by name."""
    folder.mkdir(parents=True)
    head = make_head()
    values = head.get_fdata().astype(np.float32)
    for name, fields in BAD_HEADERS.items():
        nib.save(head, folder / f"{name}.nii")
        write_header(folder / f"{name}.nii", **fields)
    plain = (folder / "negative.nii").with_name("packed as.nii")
    nib.save(head, plain)
    packed = gzip.compress(plain.read_bytes())
    (folder / "not packed.nii.gz").write_bytes(plain.read_bytes())
    plain.write_bytes(packed)
    (folder / "cut.nii.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "cut at the end.nii.gz").write_bytes(packed[:-4])
    damaged = bytearray(packed)
    damaged[-6] ^= 1  # the checksum
    (folder / "damaged.nii.gz").write_bytes(damaged)
    bomb = bytearray(gzip.decompress(packed)[:352])
    (folder / "bomb.nii.gz").write_bytes(gzip.compress(bytes(bomb) + bytes(300 << 20), 9))
    (folder / "empty.nii").write_bytes(b"")
    (folder / "random.mgz").write_bytes(random.Random(0).randbytes(4000))
    (folder / "no header.img").write_bytes(values.tobytes())
    nib.save(nib.Nifti1Image(np.stack([values] * 2, -1), head.affine), folder / "series.nii.gz")
    nib.save(nib.Nifti1Image(values.astype(np.complex64), head.affine), folder / "complex.nii.gz")
    colour = np.zeros(head.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colour, head.affine), folder / "colour.nii.gz")
    nib.save(nib.Nifti1Image(np.full_like(values, np.nan), head.affine), folder / "nan.nii.gz")
    nib.save(nib.Nifti1Image(np.full_like(values, np.inf), head.affine), folder / "inf.nii.gz")
    hole = values.copy()
    hole[18:22, 20:24, 20:24] = np.nan
    nib.save(nib.Nifti1Image(hole, head.affine), folder / "hole.nii.gz")
    nib.save(nib.Nifti1Image(np.full_like(values, 7), head.affine), folder / "constant.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros_like(values), head.affine), folder / "zeros.nii.gz")
    (folder / "circle.nii").symlink_to(folder / "circle.nii")
    nib.save(head, folder / "twice.nii")
    nib.save(head, folder / "twice.nii.gz")
    return {path.name for path in folder.iterdir()} - {"twice.nii"}


def test_every_kind_of_bad_scan_is_named_and_the_good_ones_are_done(tmp_path, capsys):
    folder = tmp_path / "raw/train/normal"
    bad = make_bad_folder(folder)
    for name in ("gut mit Leerzeichen", "größe_β_脳", "nan around"):
        nib.save(make_head(), folder / f"{name}.nii.gz")
    around = make_head().get_fdata().astype(np.float32)
    around[around == 0] = np.nan
    nib.save(nib.Nifti1Image(around, make_head().affine), folder / "nan around.nii.gz")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    command = ["--raw", str(tmp_path / "raw"), "--processed", str(tmp_path / "out"), "--size", "32", "--workers", "1"]
    assert preprocess(command) == 3
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("skipped")]
    for name in bad:
        (line,) = (line for line in lines if line.startswith(f"skipped {folder / name}"))
        assert ";" in line, "the cure comes after the semicolon"
    assert len(lines) == len(bad) + 1, "and the other one of the same name"
    assert f"3 done, 0 unchanged, {len(bad) + 1} skipped" in captured.out
    assert {scan.name for scan in list_scans(tmp_path / "out")} == {"gut mit Leerzeichen", "größe_β_脳", "nan around"}
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert grown_mb < 200


def make_masked(tmp_path):
    folder = tmp_path / "raw/test"
    head = make_head()
    for place in ("abnormal", "masks"):
        (folder / place).mkdir(parents=True)
    brain = nib.Nifti1Image((head.get_fdata() > 0).astype(np.uint8), head.affine)
    nib.save(head, folder / "abnormal/a_T1w.nii")
    nib.save(brain, folder / "masks/a_brain.nii")
    lesion = np.zeros(head.shape, np.uint8)
    lesion[20:25, 20:25, 20:25] = 1
    nib.save(nib.Nifti1Image(lesion, head.affine), folder / "masks/a_lesion.nii")
    return folder


@pytest.mark.parametrize("kind", ["brain", "lesion"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda image: nib.Nifti1Image(np.zeros_like(image.get_fdata(), "u1"), image.affine), "is empty"),
        (lambda image: nib.Nifti1Image(image.get_fdata()[1:].astype("u1"), image.affine), "do not fit"),
        (lambda image: nib.Nifti1Image(image.get_fdata().astype("u1"), image.affine + 0.5), "do not fit"),
    ],
)
def test_bad_masks_skip_their_scan(kind, spoil, words, tmp_path, capsys):
    folder = make_masked(tmp_path)
    path = folder / f"masks/a_{kind}.nii"
    spoiled = spoil(nib.Nifti1Image.from_bytes(path.read_bytes()))
    nib.save(spoiled, path)
    with pytest.raises(DataError, match="not one of its 1 scans"):
        preprocess(["--raw", str(tmp_path / "raw"), "--processed", str(tmp_path / "out"), "--workers", "1"])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped"))
    assert f"a_{kind}.nii" in line
    assert words in line
    assert read_scan(tmp_path / "out/test/abnormal/a_T1w") is None


def test_masks_are_read_the_way_their_scan_is(tmp_path):
    head = make_head()
    path = save_reoriented(head, "ASL", tmp_path / "a.img", nib.AnalyzeImage)
    mask = nib.Nifti1Image((head.get_fdata() > 600).astype(np.int16), head.affine)
    mask_path = save_reoriented(mask, "ASL", tmp_path / "m.img", nib.AnalyzeImage)
    inside = read_mask(mask_path, read_volume(path, "ASL"), "ASL")
    np.testing.assert_array_equal(inside, head.get_fdata() > 600)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "raw/train/normal").mkdir(parents=True)
    nib.save(make_head(), tmp_path / "raw/train/normal/a.nii")
    (tmp_path / "out").write_text("a file, where a folder should be")
    with pytest.raises(DataError, match=r"cannot be written.*--processed"):
        preprocess(["--raw", str(tmp_path / "raw"), "--processed", str(tmp_path / "out"), "--workers", "1"])


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    make_masked(tmp_path)
    shutil.rmtree(tmp_path / "raw/test/masks")
    nib.save(make_head(), tmp_path / "raw/test/abnormal/b_T1w.nii")
    write, calls = Path.write_bytes, []

    def fill_up(path, content):
        calls.append(path)
        if len(calls) > 40 and "b_T1w" in str(path):
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    command = ["--raw", str(tmp_path / "raw"), "--processed", str(tmp_path / "out"), "--size", "32", "--workers", "1"]
    assert preprocess(command) == 3
    assert "b_T1w: cannot be written ([Errno 28] No space left on device); free some space" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out/test/abnormal").iterdir()] == ["a_T1w"]
    monkeypatch.undo()
    assert preprocess(command) == 0
    assert "1 done, 1 unchanged" in capsys.readouterr().out


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One of the ways in which a file goes wrong."""
    content = bytearray(content)
    way = rng.randrange(6)
    if way == 0:
        return bytes(content[: rng.randrange(len(content))])
    if way == 1:  # a few bytes of the header
        for _ in range(rng.randint(1, 6)):
            content[rng.randrange(min(352, len(content)))] = rng.randrange(256)
    elif way == 2:  # extreme numbers in the header
        place = rng.randrange(0, min(348, len(content) - 4), 2)
        extreme = rng.choice(
            [b"\xff\xff", b"\x00\x80", b"\xff\x7f", b"\x00\x00", b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f"]
        )
        content[place : place + len(extreme)] = extreme
    elif way == 3:  # anywhere
        for _ in range(rng.randint(1, 200)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif way == 4:  # a piece goes missing or comes twice
        start = rng.randrange(len(content))
        end = start + rng.randrange(1, 5000)
        return bytes(content[:start] + (content[start:end] * 2 if rng.random() < 0.5 else b"") + content[end:])
    else:
        return rng.randbytes(rng.randrange(5000))
    return bytes(content)


def test_360_mutated_files(tmp_path, capsys):
    """No traceback, no good scan lost, no runaway memory."""
    head = make_head((16, 20, 18), (10.0, 10.0, 10.0))
    values = head.get_fdata().astype(np.int16)
    nib.save(nib.Nifti1Image(values, head.affine), tmp_path / "a.nii")
    nib.save(nib.Nifti1Image(values, head.affine), tmp_path / "a.nii.gz")
    nib.save(nib.MGHImage(values, head.affine), tmp_path / "a.mgz")
    nib.save(nib.Nifti2Image(values, head.affine), tmp_path / "b.nii")
    nib.save(nib.AnalyzeImage(values, None), tmp_path / "a.img")
    folder = tmp_path / "raw/train/normal"
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for i in range(60):
        for source, ending in (("a.nii", ".nii"), ("a.nii.gz", ".nii.gz"), ("a.mgz", ".mgz"), ("b.nii", ".nii")):
            name = f"{source.replace('.', '-')}-{i:03d}{ending}"
            (folder / name).write_bytes(mutate((tmp_path / source).read_bytes(), rng))
        repacked = gzip.compress(mutate((tmp_path / "a.nii").read_bytes(), rng))  # gzip itself is whole
        (folder / f"packed{i:03d}.nii.gz").write_bytes(repacked)
        (folder / f"pair{i:03d}.hdr").write_bytes(mutate((tmp_path / "a.hdr").read_bytes(), rng))
        shutil.copy(tmp_path / "a.img", folder / f"pair{i:03d}.img")
    good = [f"good{i}" for i in range(3)]
    for name in good:
        shutil.copy(tmp_path / "a.nii.gz", folder / f"{name}.nii.gz")
    assert len([name for name in os.listdir(folder) if not name.endswith(".hdr")]) == 363
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    command = ["--raw", str(tmp_path / "raw"), "--processed", str(tmp_path / "out"), "--size", "16", "--workers", "1"]
    command += ["--axes", "RAS", "--fov-mm", "200"]
    assert preprocess(command) == 3
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    skipped = [line for line in captured.err.splitlines() if line.startswith("skipped")]
    done = {scan.name: scan for scan in list_scans(tmp_path / "out")}
    assert len(skipped) + len(done) == 363
    assert len(skipped) > 150
    for name in good:
        assert done[name].read_stack().shape[1:] == (16, 16)
    assert all(np.isfinite(scan.read_stack()).all() for scan in done.values())
    assert grown_mb < 150
