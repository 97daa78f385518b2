"""scan.json is believed only where all of it could be a scan's; every bad value is named in one line."""

import json
import os

import pytest

from common.cli import DataError
from preprocessing.record import read_record
from preprocessing.store import read_scan
from tests.test_store import RECORD, put

BAD = {
    "subject": [None, 3, ["a"], "", {}],
    "source": [None, 5, "../../x", "", {"a": 1}],
    "sources": [None, {}, [], {"a_T1w.nii.gz": 3}, "a_T1w.nii.gz"],
    "content": [3, []],
    "session": [{"a": 1}, 7, ["x"]],
    "age": ["old", -1, 131, float("nan"), float("inf"), True, [70]],
    "sex": ["X", 1, "<img src=x onerror=alert(1)>", ["F"]],
    "size": [0, -32, 32.0, "32", True, 10**9, None],
    "keep": [0, -1, 1.01, float("nan"), {}, "0.7"],
    "format": ["3", None, 3.0, []],
    "skull_off": [1, None, "yes"],
    "shape": [[5000, 5000, 5000], [20, 21], [20, 21, 0], [20, 21, -22], [20, 21, 22.0], "abc", None, [[1], 2, 3]],
    "spacing_mm": [[0, 0, 0], [1, 1], [1, 1, -1], [1, 1, float("nan")], [1, 1, 1e9], ["1", 1, 1], None],
    "pixel_mm": [0, -1, float("inf"), "1", None, 1e9],
    "affine": [
        "abc", [[0] * 4] * 4, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]], None,
        [[float("nan"), 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], [["1", 0, 0, 0]] * 4,
    ],
    "axes": ["XYZ", "RAR", "ras", None, 3, ["R", "A", "S"], "RASL"],
    "centre": [[1], [1, float("nan")], None, ["a", "b"], [1, 2, 3]],
    "scale": [[0, 1], [0, float("inf"), 1], "x"],
    "slices": [
        [], None, [0, 300000000], [-1, 0], [3, 3, 4, 5, 6], [9, 8, 7, 6, 5], [7, 8, 9, 10, 22], ["7"], [7.0], [True],
        {"0": 1}, "78",
    ],
    "unscored_share": [-0.1, 1.5, "0.1", True, float("nan")],
    "unscored_lesions_ml": ["1", [-1], [float("inf")], ["1"], {"a": 1}],
    "lesion_voxels": [[1], "abc", [0, 1, 2, 3, -4], [0, 1, 2, 3, 4.0], [0, 1, 2, 3, 10**12], {"0": 1}],
}  # fmt: skip


def write(folder, record):
    (folder / "scan.json").write_text(json.dumps(record))
    return folder


def test_a_good_record_is_given_back_as_it_is(tmp_path):
    assert read_record(write(tmp_path, RECORD)) == RECORD
    more = RECORD | {"content": "c" * 32, "new": [1], "slices": [0, 5, 6, 20, 21]}
    assert read_record(write(tmp_path, more)) == more


@pytest.mark.parametrize("known", ["session", "age", "sex", "lesion_voxels", "unscored_share", "content"])
def test_what_older_versions_did_not_write_may_be_missing(known, tmp_path):
    old = {key: value for key, value in RECORD.items() if key != known}
    assert read_record(write(tmp_path, old)) == old


@pytest.mark.parametrize("key", BAD)
def test_a_value_that_cannot_be_a_scans_is_named(key, tmp_path):
    for value in BAD[key]:
        with pytest.raises(DataError, match=r"scan\.json: is not a record of a scan .*delete the folder") as error:
            read_record(write(tmp_path, RECORD | {key: value}))
        words = str(error.value)
        assert "\n" not in words
        assert len(words) < 300 + len(str(tmp_path))
        assert key.removesuffix("s") in words or key == "sources", (value, words)


@pytest.mark.parametrize("key", ["subject", "source", "sources", "size", "shape", "affine", "slices", "skull_off"])
def test_a_missing_key_is_named(key, tmp_path):
    record = {name: value for name, value in RECORD.items() if name != key}
    with pytest.raises(DataError, match=rf"'{key}' is missing"):
        read_record(write(tmp_path, record))


def test_a_slice_lies_in_the_scan_whatever_the_order_of_its_axes(tmp_path):
    """Stored along SLP, the first of the file's axes is the one that slices are counted along."""
    record = RECORD | {"axes": "SLP", "shape": [11, 20, 21], "slices": [6, 7, 8, 9, 10]}
    read_record(write(tmp_path, record))
    with pytest.raises(DataError, match="slices are not rising numbers below 10"):
        read_record(write(tmp_path, record | {"shape": [10, 20, 21]}))


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "scan.json")
    with pytest.raises(DataError, match="is not a regular file"):
        read_record(tmp_path)
    (tmp_path / "scan.json").unlink()
    (tmp_path / "scan.json").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="is not a regular file"):
        read_record(tmp_path)
    (tmp_path / "scan.json").unlink()
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"slices": ["../../../outside"]},
        {"slices": [-1]},
        {"slices": []},
        {"slices": [True]},
        {"slices": {"0": 1}},
        {"size": "32"},
        {"subject": ["a"]},
        {"keep": {}},
        None,
    ],
)
def test_a_record_cannot_lead_out_of_its_folder(change, tmp_path):
    folder = put(tmp_path).folder
    (folder / "scan.json").write_text(json.dumps(RECORD | change if change else [RECORD]))
    with pytest.raises(DataError, match=r"scan\.json"):
        read_scan(folder)


def test_a_record_that_cannot_be_read_is_refused(tmp_path):
    folder = put(tmp_path).folder
    for content in (b"", b"{", b"\xff", b"[" * 100_000):
        (folder / "scan.json").write_bytes(content)
        with pytest.raises(DataError, match=r"scan\.json: cannot be read"):
            read_scan(folder)
