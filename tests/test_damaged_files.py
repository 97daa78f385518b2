"""Whatever lies in a folder, the good scans are done, the bad ones named in one line, and memory stays bounded."""

import gzip
import os
import random
import resource
import shutil

import nibabel as nib
import numpy as np

from preprocessing.preprocess_oasis import main as preprocess
from preprocessing.store import list_scans
from tests.conftest import make_head
from tests.test_images import BAD_HEADERS, write_header


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


def test_mutated_files(tmp_path, capsys):
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
    for i in range(15):
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
    assert len([name for name in os.listdir(folder) if not name.endswith(".hdr")]) == 93
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    command = ["--raw", str(tmp_path / "raw"), "--processed", str(tmp_path / "out"), "--size", "16", "--workers", "1"]
    command += ["--axes", "RAS", "--fov-mm", "200"]
    assert preprocess(command) == 3
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    skipped = [line for line in captured.err.splitlines() if line.startswith("skipped")]
    done = {scan.name: scan for scan in list_scans(tmp_path / "out")}
    assert len(skipped) + len(done) == 93
    assert len(skipped) > 35
    for name in good:
        assert done[name].read_stack().shape[1:] == (16, 16)
    assert all(np.isfinite(scan.read_stack()).all() for scan in done.values())
    assert grown_mb < 150
