"""Files that are whole or absent: bytes, tables, figures; the lock of a folder."""

import csv
import os

import numpy as np
import pytest
from matplotlib import pyplot as plt

from common.cli import DataError
from common.files import hold_folder, write_atomically, write_figure, write_table


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.bin"
    for content in (b"long content", b"short"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch, step):
    path = tmp_path / "a.bin"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    write_atomically(tmp_path / "a.bin", b"content")
    assert done == ["fsync", "replace"]


def test_tables_by_hand(tmp_path):
    rows = [{"scan": "a, b", "score": 1 / 3, "flagged": True}, {"scan": "c", "score": 1234567.0, "flagged": False}]
    write_table(tmp_path / "a.csv", rows)
    text = (tmp_path / "a.csv").read_bytes()
    assert text == b'scan,score,flagged\r\n"a, b",0.333333,True\r\nc,1.23457e+06,False\r\n'


def test_a_table_without_rows_has_its_columns(tmp_path):
    write_table(tmp_path / "a.csv", [], ("scan", "score"))
    assert (tmp_path / "a.csv").read_bytes() == b"scan,score\r\n"


def test_columns_stand_in_the_order_asked_for(tmp_path):
    write_table(tmp_path / "a.csv", [{"b": 2, "a": 1}], ("a", "b", "c"))
    with open(tmp_path / "a.csv", newline="") as file:
        assert list(csv.reader(file)) == [["a", "b", "c"], ["1", "2", ""]]


def test_figures_are_png_of_110_dots_an_inch_and_closed(tmp_path):
    figure = plt.figure(figsize=(2, 1))
    write_figure(tmp_path / "a.png", figure)
    assert plt.imread(tmp_path / "a.png").shape == (110, 220, 4)
    assert not plt.fignum_exists(figure.number)


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        figure, axis = plt.subplots()
        axis.imshow(np.eye(3))
        write_figure(tmp_path / name, figure)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    folder = tmp_path / "new" / "run"
    with hold_folder(folder, "--run"):
        assert folder.is_dir()
        with (
            pytest.raises(DataError, match=r"run: another process works in it; .* another --run"),
            hold_folder(folder, "--run"),
        ):
            pass
    with hold_folder(folder, "--run"):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DataError, match=r"file/run: cannot be written .* another --out"),
        hold_folder(tmp_path / "file" / "run", "--out"),
    ):
        pass
