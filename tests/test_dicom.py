"""DICOM series: left stays left, every slice is there, and what cannot be read is named."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.uid import MediaStorageDirectoryStorage, RLELossless

import preprocessing.dicom as dicom
from common.cli import DataError
from evaluation.evaluate import main as evaluate
from preprocessing.dicom import list_series, open_scan
from preprocessing.preprocess_oasis import main as preprocess
from preprocessing.store import list_scans
from preprocessing.subjects import identify
from tests.predictions import write_model
from tests.series import SHAPE, make_image, write_series
from tests.trees import SMALL, read_places, read_record, run, save


def read(folder: Path, number: int | None = None) -> nib.Nifti1Image:
    """The series in this folder, in memory and nearest to RAS."""
    with open_scan(folder, number) as file:
        image = nib.load(file)
        return nib.as_closest_canonical(nib.Nifti1Image(image.get_fdata(), image.affine))


def list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """{path: (size, time)} of all that is in a folder."""
    states = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path.relative_to(folder)): (state.st_size, state.st_mtime_ns) for path, state in states.items()}


# One series becomes one volume.


@pytest.mark.parametrize(
    ("axes", "tilt_degrees"), [("LPS", 0), ("LPI", 0), ("PIR", 0), ("PIL", 0), ("LIP", 0), ("RAS", 0), ("PIR", 12)]
)
def test_each_voxel_stays_where_it_was(axes, tilt_degrees, tmp_path):
    write_series(tmp_path / "T1", make_image(axes, tilt_degrees))
    image, wanted = read(tmp_path / "T1"), nib.as_closest_canonical(make_image(axes, tilt_degrees))
    np.testing.assert_allclose(image.affine, wanted.affine, atol=1e-3)
    np.testing.assert_array_equal(image.get_fdata(), wanted.get_fdata())


def test_values_are_rescaled(tmp_path):
    write_series(tmp_path / "T1", RescaleSlope="0.5", RescaleIntercept="-100")
    wanted = nib.as_closest_canonical(make_image()).get_fdata() * 0.5 - 100
    np.testing.assert_allclose(read(tmp_path / "T1").get_fdata(), wanted)


def test_compressed_files_are_unpacked(tmp_path):
    for path in write_series(tmp_path / "T1"):
        packed = pydicom.dcmread(path)
        packed.compress(RLELossless)
        packed.save_as(path)
    wanted = nib.as_closest_canonical(make_image()).get_fdata()
    np.testing.assert_array_equal(read(tmp_path / "T1").get_fdata(), wanted)


@pytest.mark.parametrize("name", ["IM{:04d}", "MR.1.3.12.{}", "{}.IMA", "image {} (1).DCM"])
def test_files_are_known_by_their_content(name, tmp_path):
    write_series(tmp_path, name=name)
    for other in ("notes.txt", "Thumbs.db", "README", "._001.dcm"):
        (tmp_path / other).write_text("not an image")
    report = pydicom.dcmread(write_series(tmp_path / "report", SeriesNumber=99)[0])
    shutil.rmtree(tmp_path / "report")
    report.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    del report.Rows, report.Columns, report.PixelData
    report.save_as(tmp_path / "DICOMDIR")
    assert read(tmp_path).shape == SHAPE


def test_a_series_in_several_folders_is_one_and_copies_are_several(tmp_path):
    files = write_series(tmp_path / "exam/part1")
    (tmp_path / "exam/part2").mkdir()
    for path in files[::3]:
        path.rename(tmp_path / "exam/part2" / path.name)
    (one,) = list_series(tmp_path, tmp_path / "out").series
    assert (one.folder, len(one.files)) == (tmp_path / "exam", SHAPE[2])
    assert read(tmp_path).shape == SHAPE
    shutil.copytree(tmp_path / "exam", tmp_path / "copy")
    assert [(two.folder.parent.name, len(two.files)) for two in list_series(tmp_path, tmp_path / "out").series] == [
        ("copy", 14), ("copy", 8), ("exam", 14), ("exam", 8),
    ]  # fmt: skip


# What cannot be read ends in one line.


def cut_in_the_middle(files):
    os.truncate(files[7], files[7].stat().st_size - 100)
    return rf"{files[7].name}: dcm2niix cannot convert it \(File not large enough .*\); copy the series again, or"


def cut_in_the_header(files):
    os.truncate(files[7], 300)
    return f"{files[7].name}: cannot be read as DICOM .*; copy it again or remove it"


def cut_before_the_pixels(files):
    """At the last slice, where no gap shows it."""
    os.truncate(files[-1], files[-1].stat().st_size - 2 * SHAPE[0] * SHAPE[1] - 20)
    return "only 21 files can be used; copy it again"


def empty(files):
    os.truncate(files[0], 0)
    return rf"{files[0].name}: is empty \(0 bytes\); copy it again or remove it"


def overwrite(files):
    files[0].write_bytes(b"nonsense" * 100)
    return f"{files[0].name}: is no DICOM file; copy it again or remove it"


def scramble_header(files):
    content = bytearray(files[0].read_bytes())
    content[140:400] = bytes(random.Random(1).randbytes(260))
    files[0].write_bytes(content)
    return rf"({files[0].name}: cannot be read|series .*(convert|read))"


def lose_a_slice(files):
    files[9].unlink()
    return r"series 4 \(T1 MPRAGE, 21 files\): the distance between its slices varies, so some are missing; copy"


def mix_two_echoes(files):
    for path in files[::2]:
        one = pydicom.dcmread(path)
        one.EchoTime, one.EchoNumbers = 30, 2
        one.save_as(path)
    return "holds 2 images, such as echoes; convert it with dcm2niix and give one"


DAMAGES = [
    cut_in_the_middle,
    cut_in_the_header,
    cut_before_the_pixels,
    empty,
    overwrite,
    scramble_header,
    lose_a_slice,
    mix_two_echoes,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_series_is_refused_in_one_line(damage, tmp_path):
    why = damage(write_series(tmp_path / "T1"))
    with pytest.raises(DataError, match=why) as error:
        read(tmp_path / "T1")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "T1") in str(error.value)


def test_one_of_several_series_is_chosen(tmp_path):
    write_series(tmp_path / "exam", make_image(seed=1))
    write_series(tmp_path / "exam", make_image(seed=2), "b{}", SeriesNumber=9, SeriesDescription="T1/late; Gd")
    known = r"4 \(T1 MPRAGE, 22 files\), 9 \(T1/late; Gd, 22 files\)"
    with pytest.raises(DataError, match=f"holds 2 series: {known}; choose one with --series NUMBER, or give"):
        read(tmp_path / "exam")
    with pytest.raises(DataError, match=f"holds no series of number 5; it has {known}; choose"):
        read(tmp_path / "exam", 5)
    for number, seed in ((4, 1), (9, 2)):
        wanted = nib.as_closest_canonical(make_image(seed=seed)).get_fdata()
        np.testing.assert_array_equal(read(tmp_path / "exam", number).get_fdata(), wanted)
    write_series(tmp_path / "exam/again")
    with pytest.raises(DataError, match=r"holds 2 series of number 4: .*; give the folder of one"):
        read(tmp_path / "exam", 4)


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ({"Modality": "CT"}, "its modality is CT, not MR"),
        ({"ScanningSequence": ["EP", "GR"]}, "echo-planar"),
        ({"SeriesDescription": "AAHead_Scout"}, "a localizer"),
    ],
)
def test_what_is_no_anatomical_mri_is_not_taken(tags, why, tmp_path):
    write_series(tmp_path / "raw/anna/1", **tags)
    with pytest.raises(DataError, match=f"raw/anna/1, series 4 .*: {why}"):
        read(tmp_path / "raw/anna/1")
    write_series(tmp_path / "raw/anna/2")
    assert run(tmp_path / "raw", tmp_path / "out", "--label", "normal") == 0
    assert len(read_places(tmp_path / "out")) == 1
    (left_out,) = read_record(tmp_path / "out")["left_out"]
    assert "raw/anna/1, series 4" in left_out["file"]
    assert left_out["why"].startswith(why)


# A scan straight to its verdict.


def test_a_folder_is_predicted_like_its_nifti_file(tmp_path, capsys):
    write_model(tmp_path / "run/model.pt")
    write_series(tmp_path / "anna/T1")
    nib.save(make_image(), tmp_path / "anna.nii.gz")

    command = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--device", "cpu", "--scan"]

    def predict(scan, *more):
        assert evaluate([*command, str(tmp_path / scan), "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)["scans"][0]

    folder, file = predict("anna/T1"), predict("anna.nii.gz")
    assert folder["score"] == pytest.approx(file["score"], rel=1e-4)
    assert folder["file"] == str(tmp_path / "anna/T1")
    assert Path(folder["files"]["map"]).name == "T1_4_T1_MPRAGE_anomaly.nii.gz"
    maps = [nib.as_closest_canonical(nib.load(one["files"]["map"])) for one in (folder, file)]
    np.testing.assert_allclose(maps[0].affine, maps[1].affine, atol=1e-3)
    assert predict("anna/T1", "--series", "4")["files"] == folder["files"]  # its own files, written anew
    assert evaluate([*command, str(tmp_path / "anna/T1")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / "anna/T1")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none: holds no DICOM images; give the folder of a DICOM series, or"):
        predict("none")
    for wrong in (["anna/T1/001.dcm"], ["anna.nii.gz", "--series", "4"]):
        with pytest.raises(SystemExit):
            predict(*wrong)


# A set of scans.


def test_a_series_goes_the_road_of_a_file(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_series(raw / "sub-01/ses-1/T1", make_image(seed=1), "IM{:04d}")
    write_series(raw / "sub-01/ses-1/T2", SeriesNumber=5, SeriesDescription="T2 TSE")
    write_series(raw / "sub-01/ses-2/mixed", make_image(seed=2), SeriesDescription="t1_mprage_sag_p2_iso")
    write_series(raw / "sub-01/ses-2/mixed", None, "f{}", SeriesNumber=7, SeriesDescription="FLAIR")
    save(raw / "sub-02/T1.nii.gz")
    before = list_files(raw)
    flags = ["--label", "normal", "--split", "1", "0", "0"]
    assert run(raw, out, *flags, "--dry-run") == 0
    said = capsys.readouterr().out
    assert not out.exists()
    assert f"subject sub-01, session ses-1, {raw}/sub-01/ses-1/T1, series 4 (T1 MPRAGE, 22 files)" in said
    assert f"{raw}/sub-01/ses-1/T2, series 5 (T2 TSE, 22 files): shows t2, not t1" in said
    assert f"{raw}/sub-01/ses-2/mixed, series 7 (FLAIR, 22 files): shows flair, not t1" in said
    assert run(raw, out, *flags) == 0
    assert list_files(raw) == before
    names = ["sub-01_ses-1", "sub-01_ses-2_mixed", "sub-02"]
    scans = {scan.name: scan for scan in list_scans(out)}
    assert sorted(scans) == names
    assert [(scans[name].subject, scans[name].record["session"]) for name in names] == [
        ("sub-01", "ses-1"), ("sub-01", "ses-2"), ("sub-02", ""),
    ]  # fmt: skip
    record = scans[names[0]].record
    assert record["dicom"] == str(raw / "sub-01/ses-1/T1")
    assert record["source"] == str(out / "dicom/sub-01/ses-1/T1/dicom-4_T1_MPRAGE.nii.gz")
    assert "dicom" not in scans["sub-02"].record


def test_a_folder_gives_its_best_series_and_a_mask_is_for_its_own_folder(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    for number, name in enumerate("ab", 1):
        write_series(raw / name, make_image(seed=number), SeriesDescription="AX T1 SE thin slices")
    write_series(raw / "a", None, "f{}", SeriesNumber=2, SeriesDescription="field map")
    with open_scan(raw / "b") as file:
        image = nib.load(file)
        inside = (image.get_fdata() > 0).astype(np.uint8)
    for name in ("a/mask.nii.gz", "b/dicom-4_AX_T1_SE_thin_slices_brain_mask.nii.gz"):
        nib.save(nib.Nifti1Image(inside, image.affine), raw / name)
    assert run(raw, out, "--label", "normal", "--split", "1", "0", "0") == 0
    files = {scan.name: sorted(scan.record["sources"]) for scan in list_scans(out)}
    assert files["a"] == ["dicom-4_AX_T1_SE_thin_slices.nii.gz", "mask.nii.gz"]
    assert files["b"] == ["dicom-4_AX_T1_SE_thin_slices.nii.gz", "dicom-4_AX_T1_SE_thin_slices_brain_mask.nii.gz"]
    (left_out,) = read_record(out)["left_out"]
    assert left_out["file"] == f"{raw}/a, series 2 (field map, 22 files)"
    assert "its session is read from" in left_out["why"]


def test_the_split_label_tree_takes_series(tmp_path):
    write_series(tmp_path / "raw/train/normal/a", make_image(seed=1))
    write_series(tmp_path / "raw/val/normal/b", make_image(seed=2))
    write_series(tmp_path / "raw/test/abnormal/c", make_image(seed=3))
    assert run(tmp_path / "raw", tmp_path / "out") == 0
    assert read_places(tmp_path / "out") == {
        "a": "train/normal",
        "b": "val/normal",
        "c": "test/abnormal",
    }


def test_a_series_is_converted_once_and_again_when_its_files_change(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_series(raw / "a", make_image(seed=1))
    write_series(raw / "b", make_image(seed=2))
    command = [raw, out, "--label", "normal", "--split", "1", "0", "0"]
    assert run(*command) == 0
    before = list_files(out / "dicom")
    assert len(before) == 4
    assert run(*command) == 0
    assert "0 done, 2 unchanged" in capsys.readouterr().out
    assert list_files(out / "dicom") == before
    shutil.rmtree(raw / "b")
    write_series(raw / "b", make_image(seed=3))
    assert run(*command) == 0
    assert "1 done, 1 unchanged" in capsys.readouterr().out
    changed = {path for path, state in list_files(out / "dicom").items() if state != before[path]}
    assert changed == {path for path in before if path.startswith("b/")}
    moved = raw.rename(tmp_path / "moved")
    assert run(moved, *command[1:]) == 0
    assert "0 done, 2 unchanged" in capsys.readouterr().out
    assert {Path(scan.record["dicom"]).parent for scan in list_scans(out)} == {moved}
    shutil.rmtree(moved / "b")
    assert run(moved, *command[1:]) == 0
    assert list(read_places(out)) == ["a"]


def test_a_bad_series_is_named_and_the_rest_goes_on(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    for number, name in enumerate("abcd", 1):
        write_series(raw / name, make_image(seed=number))
    command = [raw, out, "--label", "normal", "--split", "1", "0", "0"]
    assert run(*command) == 0
    os.truncate(raw / "b/003.dcm", 1000)
    os.truncate(raw / "c/003.dcm", 0)
    (raw / "d/003.dcm").unlink()
    assert run(*command) == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert [line.split(f"{raw}/")[1][:9] for line in lines] == ["c/003.dcm", "b/003.dcm", "d, series"]
    assert list(read_places(out)) == ["a"]


def test_what_is_left_is_whole_or_absent(tmp_path, monkeypatch):
    write_series(tmp_path / "raw/a")
    command = ["--raw", str(tmp_path / "raw"), "--processed", str(tmp_path / "out"), "--label", "normal", *SMALL]
    name, place = "dicom-4_T1_MPRAGE", tmp_path / "out/dicom/a"

    def fill_disk(options, **how):
        Path(options[options.index("-o") + 1], "volume.nii.gz").write_bytes(b"partial")
        return subprocess.CompletedProcess(options, 1, b"Convert 22 DICOM as volume", b"")

    monkeypatch.setattr(dicom.dcm2niix, "main", fill_disk)
    with pytest.raises(DataError, match="not one of its 1 scans"):
        preprocess(command)
    assert list_files(place) == {}
    monkeypatch.undo()
    fill_disk(["-o", place])  # as a process that was killed leaves it
    (place / "volume.nii.gz").rename(place / f"{name}.nii.gz")
    (place / f".partial-{name}.nii.gz").mkdir()
    fill_disk(["-o", place / f".partial-{name}.nii.gz"])
    assert preprocess(command) == 0
    assert sorted(list_files(place)) == [f"{name}.json", f"{name}.nii.gz"]


def test_nobody_is_named_by_a_description():
    for path, subject in {
        "anna/dicom-4_t1_mpr_p2_iso": "anna",
        "anna/t1_mprage_p2/dicom-4_t1_mprage_p2": "anna",
        "anna/T1_MPRAGE_P2_0004/dicom-4_t1_mprage_p2": "anna",
        "0012/t1_mprage_sag_p2_iso/dicom-4": "0012",
        "dicom-4_t1": "unnamed",
    }.items():
        assert identify(path + ".nii.gz").subject == subject
