"""Scans that are gone leave the store, and nothing is lost; copies of one scan stand on one side."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.cli import DataError, set_up_logging
from preprocessing.cohort import find_withdrawn, refuse_copies
from preprocessing.store import StoredScan
from tests.test_cohort import make_scan
from tests.test_store import RECORD
from tests.trees import make_tree, read_places, read_record, run, save, save_lesion


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path)


def test_a_scan_that_was_withdrawn_is_said_and_out_of_use(tree, capsys):
    save_lesion(tree)
    gone = save(tree / "raw/train/normal/gone_T1w.nii")
    assert run(tree / "raw", tree / "out") == 0
    gone.unlink()
    capsys.readouterr()
    assert run(tree / "raw", tree / "out", "--dry-run") == 0
    assert (
        f"would withdraw {tree}/out/train/normal/gone_T1w: {gone} is no longer among the scans"
        in capsys.readouterr().err
    )
    assert "gone_T1w" in read_places(tree / "out")
    assert run(tree / "raw", tree / "out") == 0
    place = tree / "out/.withdrawn/train/normal/gone_T1w"
    assert capsys.readouterr().err.splitlines() == [
        f"{gone}: is no longer among the scans; its slices were moved to {place}"
    ]
    assert read_places(tree / "out") == {"a_T1w": "train/normal", "b_T1w": "val/normal", "c_T1w": "test/abnormal"}
    assert read_record(tree / "out")["scans"]["train/normal"] == 1
    assert (place / "scan.json").exists()
    assert run(tree / "raw", tree / "out") == 0
    assert capsys.readouterr().err == ""


def test_scans_of_another_folder_stay_in_use(tree):
    save(tree / "more/train/normal/d_T1w.nii")
    run(tree / "raw", tree / "out")
    run(tree / "more", tree / "out")
    assert set(read_places(tree / "out")) == {"a_T1w", "b_T1w", "c_T1w", "d_T1w"}


def test_a_copy_on_the_other_side_is_refused(tree):
    content = (tree / "raw/train/normal/a_T1w.nii").read_bytes()
    copy = tree / "raw/test/normal/other_T1w.nii.gz"
    copy.parent.mkdir()
    copy.write_bytes(gzip.compress(content))
    for _ in range(2):
        with pytest.raises(DataError, match="holds the same scan as") as error:
            run(tree / "raw", tree / "out")
        assert str(copy) in str(error.value)
        assert "raw/train/normal/a_T1w.nii" in str(error.value)
    copy.unlink()
    assert run(tree / "raw", tree / "out") == 0


def make_copy(tmp_path, place, *hashes):
    folder = tmp_path / "out" / place
    folder.mkdir(parents=True)
    source = f"/raw/{folder.name}.nii"
    (folder / "scan.json").write_text(json.dumps(RECORD | {"source": source, "sources": {f"{folder.name}.nii": "f"}}))
    return StoredScan(folder, folder.name, range(1), (), hashes)


def test_a_copy_on_another_side_is_refused_with_both_names(tmp_path):
    one, other = make_copy(tmp_path, "train/normal/a", "v1", "f1"), make_copy(tmp_path, "test/normal/b", "v1", "f2")
    third, old = make_copy(tmp_path, "val/normal/c", "v3", "f3"), make_copy(tmp_path, "test/normal/d", "f3")
    refuse_copies([("train", one), ("val", third)])
    for first, second in ((one, other), (third, old)):
        with pytest.raises(DataError, match=r"is in (train|val) and one in test|is in test and one in") as error:
            refuse_copies([(scan.split, scan) for scan in (first, second)])
        for name in (first.folder, second.folder, f"/raw/{first.name}.nii", f"/raw/{second.name}.nii"):
            assert str(name) in str(error.value)


def test_a_copy_on_the_same_side_is_warned_of(tmp_path, capsys):
    set_up_logging(quiet=True)
    scans = [make_copy(tmp_path, f"test/normal/{name}", "v1", f"f{name}") for name in "abc"]
    refuse_copies(("test", scan) for scan in scans)
    words = capsys.readouterr().err
    assert words.startswith(f"{scans[1].folder}: holds the same scan as {scans[0].folder}, and 1 more such; it counts")
    refuse_copies([("test", scans[0]), ("test", make_copy(tmp_path, "test/normal/d", "v2", "fd"))])
    assert capsys.readouterr().err == ""


def test_what_came_from_a_folder_and_is_not_taken_from_it_any_more_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = [make_copy(tmp_path, f"train/normal/{name}") for name in ("kept", "gone", "other")]
    for scan, source in zip(stored, ("raw/kept.nii", str(tmp_path / "raw/gone.nii"), "raw2/other.nii"), strict=True):
        record = RECORD | {"source": source, "sources": {Path(source).name: "f"}}
        (scan.folder / "scan.json").write_text(json.dumps(record))
    planned = [replace(make_scan(tmp_path, "kept"), split="train", label="normal")]
    assert find_withdrawn(Path("raw"), planned, stored) == [stored[1]]
    assert find_withdrawn(tmp_path / "raw/", planned, stored) == [stored[1]]
    moved = [replace(planned[0], split="test")]
    assert find_withdrawn(Path("raw"), moved, stored) == stored[:2]
