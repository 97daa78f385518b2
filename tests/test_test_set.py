"""The folder of an evaluation: what makes it another one, and that nothing of an older one is left in it."""

import json

import pytest

from common.cli import DataError
from evaluation.test_set import clear_folder, explain_no_flag, hash_records, read_kinds
from preprocessing.store import list_scans


def test_another_evaluation_leaves_nothing_of_the_old_one(tmp_path):
    pictures = [tmp_path / folder / "normal/old.png" for folder in ("error_maps", "montages", "maps", "bids")]
    for path in pictures:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    (tmp_path / "mine.txt").write_text("a user's own")
    assert clear_folder(tmp_path, {"panels": "1"}) is None
    assert all(path.exists() for path in pictures), "an evaluation that was interrupted goes on"
    content = {"settings": {"panels": "1"}, "counts": {}}
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    assert clear_folder(tmp_path, {"panels": "1"}) == content
    assert all(path.exists() for path in [*pictures, tmp_path / "metrics.json"])
    assert clear_folder(tmp_path, {"panels": "2"}) is None
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if not path.is_dir()) == [
        "mine.txt"
    ]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"error_maps", "montages"}


def test_data_are_told_apart_by_their_records(processed):
    scans = list(list_scans(processed / "test"))
    assert hash_records(scans) == hash_records(list(list_scans(processed / "test")))
    assert len({hash_records(scans), hash_records(scans[:-1]), hash_records(scans[::-1])}) == 3


def test_kinds_of_lesions_are_read(tmp_path):
    path = tmp_path / "kinds.csv"
    path.write_text("\ufeffscan,volume,kind\na_T1w,3,infarct\nb,4,\n", encoding="utf-8")
    assert read_kinds(path) == {"a_T1w": "infarct", "b": ""}
    path.write_text("scan,what\na,b\n")
    with pytest.raises(DataError, match=r"kinds.csv: has no column 'kind'; name its columns scan and kind"):
        read_kinds(path)
    for missing in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_kinds(missing)


def test_why_no_scan_can_be_flagged():
    assert explain_no_flag(0.05, 19) is None
    words = explain_no_flag(0.05, 18)
    assert "no scan can be flagged at 0.05: that needs 19 normal validation scans, the model has 18" in words
    assert "0.053 or more" in words, "1 / 19, rounded up"
    assert explain_no_flag(0.053, 18) is None
