"""Folders of scans become folders of slices; bad ones are named, nothing is half-written, no subject leaks."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from preprocessing.contact_sheet import draw_contact_sheet
from preprocessing.preprocess_oasis import main as preprocess
from preprocessing.scans import DataError, find_scans, name_subject
from preprocessing.slices import SliceDataset, list_scans, read_scan, write_scan
from tests.conftest import SIZE, make_head


@pytest.mark.parametrize(
    ("name", "subject", "session"),
    [
        ("OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc", "OAS1_0001", "MR1"),
        ("OAS1_0001_MR2_mpr_n4_anon_111_t88_masked_gfc", "OAS1_0001", "MR2"),
        ("sub-OAS30001_ses-d0757_run-01_T1w", "OAS30001", "d0757"),
        ("sub-07_ses-a_T1w", "sub-07", "ses-a"),
        ("IXI105-HH-1471_T1w", "IXI105", ""),
        ("patient_T1w", "patient", ""),
    ],
)
def test_subject_and_session_from_a_name(name, subject, session):
    assert name_subject(name) == (subject, session)


def test_tree_and_masks_are_found(raw):
    scans = find_scans(raw)
    assert [(s.split, s.label) for s in scans].count(("train", "normal")) == 3
    assert {s.name for s in scans if s.lesion_mask} == {s.name for s in scans if s.label == "abnormal"}
    assert all(s.brain_mask for s in scans)
    for scan in scans:
        assert scan.brain_mask.name.startswith(scan.name.removesuffix("_T1w"))


def test_a_subject_in_two_splits_is_refused(raw, tmp_path, processed):
    shutil.copytree(raw, tmp_path / "raw")
    scan = next((tmp_path / "raw/train/normal").glob("*.nii.gz"))
    shutil.copy(scan, tmp_path / "raw/test/normal")
    with pytest.raises(DataError, match="one split"):
        find_scans(tmp_path / "raw")
    # the same against what stands in the store already
    shutil.move(scan, tmp_path / scan.name)
    with pytest.raises(DataError, match="one split"):
        preprocess(["--raw", str(tmp_path / "raw"), "--processed", str(processed)])


def test_quiet_says_nothing_with_several_workers(raw, processed, tmp_path, capfd):
    command = ["--raw", str(raw), "--processed", str(tmp_path / "quiet"), "--size", str(SIZE)]
    assert preprocess([*command, "--workers", "2", "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    for file in processed.rglob("*.npy"):
        assert (tmp_path / "quiet" / file.relative_to(processed)).read_bytes() == file.read_bytes()


def test_two_scans_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        path = tmp_path / "raw/train/normal" / folder / "x_T1w.nii"
        path.parent.mkdir(parents=True)
        nib.save(make_head(), path)
    with pytest.raises(DataError, match="would also be called x_T1w"):
        find_scans(tmp_path / "raw")


def test_second_run_does_nothing_and_a_changed_scan_is_done_again(raw, processed, tmp_path, capsys):
    shutil.copytree(raw, tmp_path / "raw")
    shutil.copytree(processed, tmp_path / "processed")
    command = [
        "--raw",
        str(tmp_path / "raw"),
        "--processed",
        str(tmp_path / "processed"),
        "--size",
        "32",
        "--workers",
        "1",
    ]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "processed").rglob("*.npy")}
    assert preprocess(command) == 0
    assert "0 done, 9 unchanged, 0 skipped" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "processed").rglob("*.npy")}
    scan = sorted((tmp_path / "raw/train/normal").glob("*.nii.gz"))[0]
    image = nib.load(scan)
    nib.save(nib.Nifti1Image(image.get_fdata() * 2, image.affine), scan)
    assert preprocess(command) == 0
    assert "1 done, 8 unchanged" in capsys.readouterr().out


def test_bad_scans_are_named_and_the_others_are_done(tmp_path, capsys):
    folder = tmp_path / "raw/train/normal"
    folder.mkdir(parents=True)
    head = make_head()
    nib.save(head, folder / "good_T1w.nii.gz")
    (folder / "empty_T1w.nii.gz").write_bytes(b"")
    (folder / "random_T1w.nii").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "cut_T1w.nii.gz").write_bytes((folder / "good_T1w.nii.gz").read_bytes()[:3000])
    nib.save(nib.Nifti1Image(np.stack([head.get_fdata()] * 3, -1), head.affine), folder / "series_T1w.nii.gz")
    nib.save(nib.Nifti1Image(np.full(head.shape, np.nan, np.float32), head.affine), folder / "nan_T1w.nii.gz")
    nib.save(nib.Nifti1Image(np.full(head.shape, 7, np.int16), head.affine), folder / "flat_T1w.nii.gz")
    command = ["--raw", str(tmp_path / "raw"), "--processed", str(tmp_path / "out"), "--size", "32", "--workers", "1"]
    assert preprocess(command) == 3
    captured = capsys.readouterr()
    assert "1 done, 0 unchanged, 6 skipped" in captured.out
    lines = [line for line in captured.err.splitlines() if line.startswith("skipped")]
    assert len(lines) == 6
    for name in ("empty", "random", "cut", "series", "nan", "flat"):
        assert sum(f"{name}_T1w" in line for line in lines) == 1
    assert [path.name for path in (tmp_path / "out/train/normal").iterdir()] == ["good_T1w"]


def test_no_scans_is_one_line(tmp_path):
    with pytest.raises(DataError, match="no scans"):
        find_scans(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        find_scans(tmp_path / "nowhere")


def test_slices_are_read_as_they_were_written_however_they_lay_in_memory(tmp_path):
    stack = np.random.default_rng(0).random((2, 16, 16)).astype(np.float16)
    record = {"slices": [3, 4], "size": 16, "subject": "a"}
    for name, order in (("a", stack), ("b", stack.transpose(0, 2, 1).copy().transpose(0, 2, 1)), ("c", stack[:, ::-1])):
        write_scan(tmp_path / "test/abnormal" / name, order, (order > 0.5).astype(np.uint8), record)
        scan = read_scan(tmp_path / "test/abnormal" / name)
        np.testing.assert_array_equal(scan.read_stack(), order)
        np.testing.assert_array_equal(scan.read_lesion(), order > 0.5)
        np.testing.assert_array_equal(np.load(tmp_path / f"test/abnormal/{name}/slice_003.npy"), order[0])


def test_half_written_scans_are_not_seen(tmp_path, monkeypatch):
    record = {"slices": [3, 4], "size": 16, "subject": "a"}
    folder = tmp_path / "train/normal/a_T1w"
    calls = []

    def fail_at_second(path, content):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("No space left on device")
        path.touch()

    monkeypatch.setattr(Path, "write_bytes", fail_at_second)
    with pytest.raises(OSError, match="No space"):
        write_scan(folder, np.zeros((2, 16, 16), np.float16), None, record)
    assert list(list_scans(tmp_path)) == []
    assert list(folder.parent.iterdir()) == []


def test_store_gives_back_what_was_put_in(tmp_path):
    rng = np.random.default_rng(0)
    stack = rng.random((5, 16, 16)).astype(np.float16)
    lesion = (stack > 0.9).astype(np.uint8)
    record = {"slices": [7, 8, 9, 10, 11], "size": 16, "subject": "a"}
    write_scan(tmp_path / "test/abnormal/a_T1w", stack, lesion, record)
    (scan,) = list_scans(tmp_path)
    np.testing.assert_array_equal(scan.read_stack(), stack)
    np.testing.assert_array_equal(scan.read_lesion(), lesion > 0)
    assert (tmp_path / "test/masks/a_T1w/slice_009.npy").exists()
    assert read_scan(tmp_path / "test/abnormal/b") is None


def test_dataset_gathers_batches_of_right_slices(processed):
    scans = list(list_scans(processed / "train"))
    dataset = SliceDataset(scans)
    assert len(dataset) == sum(len(scan.indices) for scan in scans)
    second = scans[1].read_stack()
    offset = len(scans[0].indices)
    batch = dataset[[offset, offset + 2]]
    assert batch.shape == (2, 1, 32, 32)
    np.testing.assert_array_equal(batch[:, 0].numpy(), second[[0, 2]].astype(np.float32))


def test_record_says_where_the_slices_come_from(processed, raw):
    for scan in list_scans(processed):
        record = json.loads((scan.folder / "scan.json").read_text())
        assert record["axes"] == "".join(nib.aff2axcodes(nib.load(record["source"]).affine))
        assert len(list(scan.folder.glob("slice_*.npy"))) == len(record["slices"])


def test_contact_sheet_has_forty_scans_a_page(processed, tmp_path):
    shutil.copytree(processed, tmp_path / "processed")
    scans = list(list_scans(tmp_path / "processed"))
    for number, names in ((41, ["qc.png", "qc-2.png"]), (9, ["qc.png"])):
        pages = draw_contact_sheet((scans * 5)[:number], tmp_path / "processed")
        assert [page.name for page in pages] == names
        assert sorted(path.name for path in (tmp_path / "processed").glob("qc*")) == sorted(names)


def test_sets_made_with_other_settings_do_not_mix(processed, raw, tmp_path):
    command = ["--raw", str(raw), "--processed", str(tmp_path), "--size", "32", "--workers", "1", "--keep", "0.5"]
    assert preprocess(command) == 0
    with pytest.raises(DataError, match=r"made with keep 0\.5, but .* with 0\.7"):
        SliceDataset([next(list_scans(processed)), next(list_scans(tmp_path))])


def test_one_name_under_both_labels_is_two_scans(tmp_path, capsys):
    for label in ("normal", "abnormal"):
        folder = tmp_path / "raw/test" / label
        folder.mkdir(parents=True)
        nib.save(make_head(), folder / "a_T1w.nii")
    command = ["--raw", str(tmp_path / "raw"), "--processed", str(tmp_path / "out"), "--size", "32", "--workers", "1"]
    assert preprocess(command) == 0
    assert preprocess(command) == 0
    assert "0 done, 2 unchanged" in capsys.readouterr().out
    (tmp_path / "raw/test/normal/a_T1w.nii").unlink()
    with pytest.raises(DataError, match="normal/a_T1w: is test/abnormal now"):
        preprocess(command)
