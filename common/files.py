"""Files written whole or not at all, safe reading of files from elsewhere, and the lock of a folder."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import filelock

from common.cli import DataError, explain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_JSON_BYTES = 1 << 26  # a record of 100,000 scans takes less
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what starts a formula in a spreadsheet


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file and rename it, so that `path` is always a whole file. OSErrors name the file."""
    with replace_when_whole(path) as partial, open(partial, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replace_when_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside it, with the same ending; at the end of the block that file is renamed to `path`.

    Where the block fails or is interrupted, the temporary file is deleted. OSErrors name the file, which the system's
    own do not where the disk is full.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        partial.unlink(missing_ok=True)  # if it were a link, the write would go elsewhere
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def make_folder(folder: Path, root: Path) -> None:
    """Make a folder at or below `root`. DataError where a link leads out of `root`."""
    if not folder.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{folder}: a link leads out of {root}; remove the link or give another folder")
    folder.mkdir(parents=True, exist_ok=True)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. OSError for a fifo, a device or a socket, which may never end, and for a folder."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return open(path, "rb")


def read_json(path: Path, cure: str) -> dict:
    """The object in a JSON file; FileNotFoundError where there is no file, DataError with that cure for a bad one."""
    try:
        with open_regular(path) as file:
            content = file.read(MOST_JSON_BYTES + 1)
        if len(content) > MOST_JSON_BYTES:
            raise ValueError(f"more than {MOST_JSON_BYTES >> 20} MB")
        record = json.loads(content.decode())
        if not isinstance(record, dict):
            raise ValueError("it holds no record")
        return record
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, "No such file", str(path)) from error
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: cannot be read ({reason}); {cure}") from error


def write_table(path: Path, rows: list[dict], columns: tuple[str, ...] = ()) -> None:
    """Write rows as CSV, floats with six significant digits; left out, the columns are the first row's keys.

    Text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or rows[0])
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _format_cell(value) for key, value in row.items()})
    write_atomically(path, text.getvalue().encode(errors="backslashreplace"))


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG and close it."""
    import matplotlib.pyplot as plt  # here, because it is slow to import

    buffer = io.BytesIO()
    packed = {"compress_level": 3}  # the usual 6 takes twice as long for files of much the same size
    figure.savefig(buffer, dpi=110, format="png", pil_kwargs=packed)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


@contextlib.contextmanager
def hold_folder(folder: Path, flag: str) -> Iterator[None]:
    """Keep other processes from working in this folder at the same time: DataError for the second.

    It is the system's own lock on `<folder>/.lock`, released when its process ends, however it ends. `flag` is the flag
    that sets this folder, such as "--run"; it is named in the error.
    """
    lock = filelock.FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / ".lock").is_symlink():  # locking would empty the file that it points to
            raise DataError(f"{folder / '.lock'}: is a link; remove it")
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise DataError(f"{folder}: another process is using it; wait until it ends or give another {flag}") from error
    except (OSError, NotImplementedError) as error:
        why = explain(error) if isinstance(error, OSError) else error
        raise DataError(f"{folder}: cannot be written ({why}); give another {flag}") from error
    try:
        yield
    finally:
        lock.release()


def _format_cell(value):
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
