"""A slice is believed only where it can be one; what is broken or harmful is refused by name."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest

from common.cli import DataError
from preprocessing.store import read_slice
from tests.test_store import put


class Evil:
    def __reduce__(self):
        return (open, ("evil-was-here", "w"))


def make_evil_slices():
    pickled, archive, huge, wrong = (io.BytesIO() for _ in range(4))
    np.save(pickled, np.array([[Evil()]]), allow_pickle=True)
    np.savez(archive, values=np.zeros((16, 16), np.float16))
    np.lib.format.write_array_header_1_0(huge, {"descr": "<f2", "fortran_order": False, "shape": (10**9, 10**9)})
    np.save(wrong, np.zeros((16, 17), np.float16))
    contents = [file.getvalue() for file in (pickled, archive, huge, wrong)]
    return dict(zip(("pickled", "archive", "huge", "wrong"), contents, strict=True)) | {
        "code": pickle.dumps(Evil()),
        "empty": b"",
    }


@pytest.mark.parametrize("content", make_evil_slices().values(), ids=make_evil_slices().keys())
def test_a_broken_or_harmful_slice_is_refused_by_name(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scan = put(tmp_path)
    (scan.folder / "slice_009.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"slice_009\.npy") as error:
        scan.read_stack()
    assert "\n" not in str(error.value)
    assert not Path("evil-was-here").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.01, 1.01])
def test_values_that_are_none_of_a_slice_are_refused_by_name(value, tmp_path):
    values = np.zeros((4, 4), np.float16)
    values[1, 2] = value
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(DataError, match=r"a\.npy: holds values outside 0 to 1"):
        read_slice(tmp_path / "a.npy", 4)


def test_slices_of_letters_are_refused_and_a_missing_one_named(tmp_path):
    np.save(tmp_path / "a.npy", np.full((4, 4), "x"))
    for name in ("a.npy", "none.npy"):
        with pytest.raises(DataError, match=name):
            read_slice(tmp_path / name, 4)
