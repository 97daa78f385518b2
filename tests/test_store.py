"""What is put into the slice store comes out again, and nothing half-written or harmful ever does."""

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from common.cli import DataError, set_up_logging
from preprocessing.geometry import Geometry
from preprocessing.store import (
    SAME_SETTINGS,
    change_record,
    check_same_settings,
    clear_leftovers,
    list_scans,
    name_slice,
    read_scan,
    read_slice,
    withdraw,
    write_scan,
)

RNG = np.random.default_rng(0)
STACK = RNG.random((5, 16, 16)).astype(np.float16)
LESION = (STACK > 0.9).astype(np.uint8)
RECORD = {
    "source": "/raw/a_T1w.nii.gz",
    "sources": {"mask.nii.gz": "b" * 64, "a_T1w.nii.gz": "0123456789abcdef" * 4},
    "format": 3,
    "subject": "sub-a",
    "session": "ses-1",
    "age": 71.5,
    "sex": "F",
    "keep": 0.7,
    "lesion_voxels": [0, 1, 2, 3, 4],
    "shape": [20, 21, 22],
    "affine": np.eye(4).tolist(),
    "axes": "RAS",
    "spacing_mm": [1.0, 2.0, 3.0],
    "centre": [9.5, 10.0],
    "pixel_mm": 12.5,
    "size": 16,
    "slices": [7, 8, 9, 10, 11],
    "scale": [0.0, 900.0, 1.2],
    "skull_off": True,
}


def put(root, place="test/abnormal/a_T1w", stack=STACK, lesion=LESION, **changes):
    """Write a scan into the store and read its index entry back."""
    folder = root / place
    write_scan(folder, stack, lesion, RECORD | changes)
    return read_scan(folder)


def test_a_scan_comes_back_as_it_was_written(tmp_path):
    scan = put(tmp_path)
    assert (scan.name, scan.label, scan.split, scan.subject, scan.size) == ("a_T1w", "abnormal", "test", "sub-a", 16)
    assert list(scan.indices) == [7, 8, 9, 10, 11]
    assert scan.record == RECORD
    assert scan.hashes == ("0123456789abcdef" * 2,)
    np.testing.assert_array_equal(scan.read_stack(), STACK)
    np.testing.assert_array_equal(scan.read_lesion(), LESION > 0)
    assert scan.read_lesion().dtype == bool
    np.testing.assert_array_equal(scan.read_middle(), STACK[2])
    assert scan.geometry == Geometry.from_record(RECORD)


def test_a_loaded_scan_holds_everything_that_later_stages_need(tmp_path):
    loaded = put(tmp_path).load()
    np.testing.assert_array_equal(loaded.stack, STACK)
    np.testing.assert_array_equal(loaded.lesion, LESION > 0)
    assert (loaded.name, loaded.label, loaded.subject, loaded.session) == ("a_T1w", "abnormal", "sub-a", "ses-1")
    assert (loaded.age, loaded.sex, loaded.source) == (71.5, "F", "/raw/a_T1w.nii.gz")
    assert (loaded.scale, loaded.skull_off) == ((0.0, 900.0, 1.2), True)
    assert loaded.lesion_voxels == (0, 1, 2, 3, 4)
    assert loaded.geometry.slices == (7, 8, 9, 10, 11)
    assert loaded.warnings == ()
    old = {key: value for key, value in RECORD.items() if key not in ("session", "age", "sex", "lesion_voxels")}
    write_scan(tmp_path / "test/normal/b", STACK, None, old)
    loaded = read_scan(tmp_path / "test/normal/b").load()
    assert (loaded.session, loaded.age, loaded.sex, loaded.lesion_voxels) == ("", None, None, None)
    small = put(tmp_path, "test/normal/c", stack=STACK[:, :8, :8], lesion=None, size=8, skull_off=False)
    assert (small.size, small.load().skull_off) == (8, False)


def test_slices_stand_on_disk_as_the_readme_says(tmp_path):
    put(tmp_path)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    names = [f"slice_{index:03d}.npy" for index in RECORD["slices"]]
    places = ("test/abnormal/a_T1w", "test/masks/a_T1w")
    assert files == ["test/abnormal/a_T1w/scan.json", *(f"{place}/{name}" for place in places for name in names)]
    values = np.load(tmp_path / "test/abnormal/a_T1w/slice_008.npy")
    assert values.dtype == np.float16
    np.testing.assert_array_equal(values, STACK[1])
    assert np.load(tmp_path / "test/masks/a_T1w/slice_008.npy").dtype == np.uint8
    assert json.loads((tmp_path / "test/abnormal/a_T1w/scan.json").read_text()) == RECORD
    assert (name_slice(7), name_slice(123)) == ("slice_007.npy", "slice_123.npy")


@pytest.mark.parametrize("order", [STACK.transpose(0, 2, 1).copy().transpose(0, 2, 1), STACK[:, ::-1]])
def test_the_order_in_memory_does_not_matter(order, tmp_path):
    scan = put(tmp_path, stack=order, lesion=(order > 0.5).astype(np.uint8))
    np.testing.assert_array_equal(scan.read_stack(), order)
    np.testing.assert_array_equal(scan.read_lesion(), order > 0.5)
    np.testing.assert_array_equal(np.load(scan.folder / "slice_007.npy"), order[0])


def test_a_lesion_is_all_false_in_a_normal_scan_and_unknown_without_a_mask(tmp_path):
    assert not put(tmp_path, "test/normal/a", lesion=None).read_lesion().any()
    assert put(tmp_path, "test/normal/a", lesion=None).read_lesion().shape == STACK.shape
    assert put(tmp_path, "test/abnormal/b", lesion=None).read_lesion() is None


def test_a_scan_written_again_replaces_all_of_the_old_one(tmp_path):
    put(tmp_path)
    put(tmp_path, "test/normal/a_T1w", lesion=None)
    assert (tmp_path / "test/masks/a_T1w").is_dir(), "a normal scan of that name does not own it"
    scan = put(tmp_path, stack=STACK[:2], lesion=None, slices=[3, 4], lesion_voxels=[0, 1])
    assert sorted(path.name for path in scan.folder.iterdir()) == ["scan.json", "slice_003.npy", "slice_004.npy"]
    assert scan.read_lesion() is None
    assert not (tmp_path / "test/masks/a_T1w").exists()


def test_gaps_between_slices_are_kept(tmp_path):
    scan = put(tmp_path, slices=[3, 4, 6, 7, 9])
    assert list(scan.indices) == [3, 4, 6, 7, 9]
    np.testing.assert_array_equal(scan.read_stack(), STACK)
    assert put(tmp_path, "test/abnormal/b").indices == range(7, 12)


def test_scans_are_listed_in_order_from_any_depth(tmp_path):
    for place in ("val/normal/b", "train/normal/masks", "train/normal/a", "test/abnormal/c"):
        put(tmp_path, place)
    (tmp_path / "train/normal/unfinished").mkdir()
    shutil.copytree(tmp_path / "train/normal/a", tmp_path / "train/normal/.a.123.partial")
    shutil.copytree(tmp_path / "train/normal/a", tmp_path / "train/masks/normal/a")
    names = [str(scan.folder.relative_to(tmp_path)) for scan in list_scans(tmp_path)]
    assert names == ["test/abnormal/c", "train/normal/a", "train/normal/masks", "val/normal/b"]
    assert [scan.name for scan in list_scans(tmp_path / "train")] == ["a", "masks"]
    assert [scan.name for scan in list_scans(tmp_path / "train/normal")] == ["a", "masks"]
    assert read_scan(tmp_path / "train/normal/unfinished") is None
    assert read_scan(tmp_path / "train/normal/none") is None


# Settings.


@pytest.mark.parametrize(
    ("setting", "other"), [("size", 32), ("format", 2), ("skull_off", False), ("keep", 0.5), ("pixel_mm", 8.0)]
)
def test_scans_made_with_other_settings_do_not_mix(setting, other, tmp_path):
    scans = [put(tmp_path, "train/normal/a"), put(tmp_path, "train/normal/b", **{setting: other})]
    with pytest.raises(DataError, match=rf"b: made with {setting} {other}, but .*a with {RECORD[setting]}"):
        check_same_settings(scans)
    wanted = {name: RECORD[name] for name in SAME_SETTINGS}
    assert check_same_settings(scans[:1]) == wanted
    assert check_same_settings(scans[:1], wanted) == wanted
    with pytest.raises(DataError, match=rf"b: made with {setting} {other}, but the model's training slices"):
        check_same_settings(scans[1:], wanted)


def test_what_may_differ_does(tmp_path):
    check_same_settings([put(tmp_path, "train/normal/a"), put(tmp_path, "train/normal/b", spacing_mm=[2, 2, 2])])


# Failures.


@pytest.mark.parametrize("fails_at", [2, 7])  # among the masks, among the slices
def test_a_full_disk_leaves_nothing_half_written(fails_at, tmp_path, monkeypatch):
    calls = []

    def fill_up(path, content):
        calls.append(path)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        path.touch()

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(OSError, match="No space"):
        put(tmp_path)
    assert list(list_scans(tmp_path)) == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_leftovers_of_killed_processes_are_cleared_and_nothing_else(tmp_path):
    scan = put(tmp_path)
    ours = ["test/abnormal/.a.7.partial", "test/masks/.a.7.old", "train/normal/.b c.2.12345.old"]
    others = [
        ".venv.old", ".a.7.old", "test/.a.7.old", "test/abnormal/.kept", "test/abnormal/b.old", "test/abnormal/.b.old",
        "test/abnormal/.b.x.partial", "test/abnormal/a_T1w/.a.7.old", "other/normal/.a.7.old",
        "raw/train/normal/.a.7.old",
    ]  # fmt: skip
    for place in (*ours, *others):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "slice_001.npy").touch()
    mixed = tmp_path / "val/normal/.c.8.old"
    mixed.mkdir(parents=True)
    for name in ("slice_001.npy", "slice_x.npy", "notes.txt", "scan.json"):
        (mixed / name).touch()
    (tmp_path / "val/normal/.d.8.old").symlink_to(tmp_path / "other")
    clear_leftovers(tmp_path)
    assert [place for place in ours if (tmp_path / place).exists()] == []
    assert [place for place in others if not (tmp_path / place / "slice_001.npy").exists()] == []
    assert sorted(path.name for path in mixed.iterdir()) == ["notes.txt", "slice_x.npy"]
    np.testing.assert_array_equal(scan.read_stack(), STACK)


def test_a_worker_whose_leftover_is_cleared_while_it_writes_leaves_nothing(tmp_path, monkeypatch):
    """It outlived its killed parent; the next run clears leftovers. Half of a scan must not get the scan's name."""

    def clear_first(index):
        if index == RECORD["slices"][-1]:
            (partial,) = tmp_path.rglob(".*.partial")
            (partial / "late").touch()  # as if it wrote between the deletion of the rest and of the folder
            clear_leftovers(tmp_path)
        return name_slice(index)

    monkeypatch.setattr("preprocessing.store.name_slice", clear_first)
    with pytest.raises(FileNotFoundError):
        put(tmp_path, "train/normal/a")
    assert list(list_scans(tmp_path)) == []


def test_a_leftover_that_its_worker_completes_meanwhile_is_left_alone(tmp_path, monkeypatch):
    scan = put(tmp_path, "train/normal/a")
    partial = tmp_path / "train/normal/.a.7.partial"
    partial.mkdir()

    def complete_first(path, target):
        path.rmdir()
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(Path, "rename", complete_first)
    clear_leftovers(tmp_path)
    np.testing.assert_array_equal(scan.read_stack(), STACK)


def test_what_a_user_put_beside_the_slices_stays(tmp_path):
    scan = put(tmp_path)
    (scan.folder / "notes.txt").write_text("looked at")
    (tmp_path / "test/masks/a_T1w/slice_notes").mkdir()
    put(tmp_path, stack=STACK[:2], lesion=None, slices=[3, 4], lesion_voxels=[0, 1])
    assert (scan.folder / "notes.txt").read_text() == "looked at"
    assert [path.name for path in (tmp_path / "test/masks/a_T1w").iterdir()] == ["slice_notes"]
    raw = tmp_path / "train/normal/b"  # a folder of that name that is no scan of the store
    raw.mkdir(parents=True)
    (raw / "b.nii").write_text("voxels")
    put(tmp_path, "train/normal/b", lesion=None)
    assert (raw / "b.nii").read_text() == "voxels"
    assert [path.name for path in raw.parent.iterdir()] == ["b"]


def test_no_link_leads_slices_outside(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    store = tmp_path / "store"
    store.mkdir()
    for link, place in (("train", "train/normal/a"), ("test/masks", "test/abnormal/a"), ("val/normal", "val/normal/a")):
        (store / link).parent.mkdir(exist_ok=True)
        (store / link).symlink_to(outside)
        with pytest.raises(DataError, match="a link leads out of"):
            put(store, place)
    (store / "test/normal").mkdir()
    (store / "test/normal/a").symlink_to(outside)
    (outside / "slice_007.npy").write_text("kept")
    scan = put(store, "test/normal/a", lesion=None)
    assert not scan.folder.is_symlink()
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("slice_007.npy", "kept")]


def test_a_bad_record_takes_only_itself_out(tmp_path):
    for name in "abc":
        put(tmp_path, f"train/normal/{name}", lesion=None)
    (tmp_path / "train/normal/b/scan.json").write_text("{}")
    os.mkfifo(tmp_path / "train/normal/c/slice_000.npy")
    refused = []
    assert [scan.name for scan in list_scans(tmp_path, refused)] == ["a", "c"]
    (error,) = refused
    assert str(tmp_path / "train/normal/b/scan.json") in str(error)
    with pytest.raises(DataError, match="is not a regular file"):
        read_slice(tmp_path / "train/normal/c/slice_000.npy", 16)


def test_a_bad_record_is_named_in_a_warning_where_nobody_asks(tmp_path, capsys):
    set_up_logging(quiet=True)
    put(tmp_path, "train/normal/a", lesion=None)
    (tmp_path / "train/normal/a/scan.json").write_text("{}")
    assert list(list_scans(tmp_path)) == []
    assert capsys.readouterr().err.startswith(f"skipped {tmp_path}/train/normal/a/scan.json: is not a record of a scan")


def test_a_withdrawn_scan_is_out_of_the_store_and_not_lost(tmp_path):
    for number in range(3):
        scan = put(tmp_path, stack=STACK / (number + 1))
        place = withdraw(scan.folder)
        assert place == tmp_path / f".withdrawn/test/abnormal/a_T1w{f'.{number + 1}' if number else ''}"
        assert list(list_scans(tmp_path)) == []
        kept = read_scan(place)
        np.testing.assert_array_equal(kept.read_stack(), STACK / (number + 1))
        np.testing.assert_array_equal(kept.read_lesion(), LESION > 0)
        assert not scan.folder.exists()
        assert not (tmp_path / "test/masks/a_T1w").exists()
    put(tmp_path)
    normal = put(tmp_path, "test/normal/a_T1w", lesion=None)
    withdraw(normal.folder)
    assert read_scan(tmp_path / "test/abnormal/a_T1w").read_lesion() is not None, "its namesake's masks stay"


def test_a_record_is_changed_in_one_place(tmp_path):
    scan = put(tmp_path)
    changes = {"source": "/moved/a_T1w.nii.gz"}
    change_record(scan.folder, **changes)
    assert json.loads((scan.folder / "scan.json").read_text()) == RECORD | changes
    np.testing.assert_array_equal(read_scan(scan.folder).read_stack(), STACK)


def test_a_scan_is_known_by_its_voxels_and_by_its_file(tmp_path):
    content = "c" * 32
    assert put(tmp_path, content=content).hashes == (content, "0123456789abcdef" * 2)
    assert put(tmp_path, content=content).load().hashes == (content, "0123456789abcdef" * 2)
    assert put(tmp_path).hashes == ("0123456789abcdef" * 2,), "of an older version"


def test_the_index_of_many_scans_is_small(tmp_path):
    for number in range(300):
        folder = tmp_path / f"train/normal/sub-{number:06d}_T1w"
        os.makedirs(folder)
        (folder / "scan.json").write_text(json.dumps(RECORD))
    next(list_scans(tmp_path))
    tracemalloc.start()
    scans = list(list_scans(tmp_path))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(scans) == 300
    assert used / 300 < 1100, "bytes a scan, two hashes among them"
