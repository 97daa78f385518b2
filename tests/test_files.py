"""Files that are whole or absent: bytes, tables, figures; the lock of a folder."""

import csv
import errno
import json
import os
import socket

import numpy as np
import pytest
from matplotlib import pyplot as plt

from common.cli import DataError
from common.files import (
    MOST_JSON_BYTES,
    hold_folder,
    make_folder,
    open_regular,
    read_json,
    replace_when_whole,
    write_atomically,
    write_figure,
    write_table,
)


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
            pytest.raises(DataError, match=r"run: another process is using it; .* another --run"),
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


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def fill_up(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fill_up)
    with pytest.raises(OSError, match="No space") as error:
        write_atomically(tmp_path / "a.bin", b"new")
    assert error.value.filename == str(tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupt():
        with replace_when_whole(tmp_path / "a.nii.gz") as partial:
            assert partial.name.endswith(".nii.gz"), "of the same ending, which writers go by"
            partial.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert list(tmp_path.iterdir()) == []


def test_no_link_leads_a_write_outside(tmp_path):
    """Neither one of the file's name, nor of the name that is written to first, nor one of a folder's."""
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    outside.mkdir()
    (outside / "kept").write_text("kept")
    for name in ("a.bin", ".partial-a.bin", ".a.bin.partial"):
        (out / name).symlink_to(outside / "kept")
    write_atomically(out / "a.bin", b"new")
    assert (out / "a.bin").read_bytes() == b"new"
    assert not (out / "a.bin").is_symlink()
    assert (outside / "kept").read_text() == "kept"
    (out / "maps").symlink_to(outside)
    for folder in (out / "maps", out / "maps/normal"):
        with pytest.raises(DataError, match=r"a link leads out of .*out; remove the link"):
            make_folder(folder, out)
    assert [path.name for path in outside.iterdir()] == ["kept"]
    (out / "real").mkdir()
    (out / "inside").symlink_to(out / "real")
    make_folder(out / "inside/normal", out)
    (tmp_path / "link").symlink_to(out)
    make_folder(tmp_path / "link/new", tmp_path / "link")
    assert (out / "real/normal").is_dir()
    assert (out / "new").is_dir()


def test_a_lock_that_is_a_link_empties_no_file(tmp_path):
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(tmp_path / "kept")
    with pytest.raises(DataError, match=r"\.lock: is a link"), hold_folder(tmp_path / "run", "--run"):
        pass
    assert (tmp_path / "kept").read_text() == "kept"


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    os.symlink("/dev/zero", "device")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in ("fifo", "device", "socket", "."):
            with pytest.raises(OSError, match="is not a regular file"):
                open_regular(tmp_path / name)
    (tmp_path / "file").write_bytes(b"content")
    os.symlink("file", "link")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"content"


def test_a_record_is_read_or_refused_in_one_line(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError):
        read_json(path, "delete it")
    path.write_text(json.dumps({"a": 1}))
    assert read_json(path, "delete it") == {"a": 1}
    for content in (b"", b"{", b"[1]", b"3", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.json: cannot be read .*; delete it$") as error:
            read_json(path, "delete it")
        assert "\n" not in str(error.value)
    with open(path, "wb") as file:
        file.truncate(MOST_JSON_BYTES + 1)
    with pytest.raises(DataError, match="more than 64 MB"):
        read_json(path, "delete it")


def test_no_cell_begins_a_formula(tmp_path):
    texts = ["=1+1", "+1", "-a", "@SUM(A1)", "\tx", "\rx", "a=b", "'", "sub-01", ""]
    write_table(tmp_path / "a.csv", [{"scan": text, "x": -1.5, "n": -3} for text in texts])
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["scan"] for row in rows] == [f"'{text}" for text in texts[:6]] + texts[6:]
    assert {(row["x"], row["n"]) for row in rows} == {("-1.5", "-3")}, "numbers are numbers"


def test_names_that_are_no_utf_8_are_written(tmp_path):
    write_table(tmp_path / "a.csv", [{"scan": "a\udcffb"}])
    assert (tmp_path / "a.csv").read_bytes() == b"scan\r\na\\udcffb\r\n"
