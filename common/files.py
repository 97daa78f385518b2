"""Files that are whole or absent: bytes, tables, figures; and the lock that keeps a folder to one process."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from common.cli import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside and rename: a file of this name is always a whole one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_table(path: Path, rows: list[dict], columns: tuple[str, ...] = ()) -> None:
    """Write rows as CSV, floats with six significant digits; left out, the columns are the first row's keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or rows[0])
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    write_atomically(path, text.getvalue().encode())


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG and close it."""
    import matplotlib.pyplot as plt  # here, because it is slow to import

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


@contextlib.contextmanager
def hold_folder(folder: Path, flag: str) -> Iterator[None]:
    """Keep other processes from working in this folder at the same time: DataError for the second.

    It is the system's own lock on `<folder>/.lock`, which dies with its holder, however that ends. `flag` is what the
    user gives another folder with, such as "--run".
    """
    lock = filelock.FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise DataError(f"{folder}: another process works in it; wait for its end or give another {flag}") from error
    except (OSError, NotImplementedError) as error:
        raise DataError(f"{folder}: cannot be written ({error}); give another {flag}") from error
    try:
        yield
    finally:
        lock.release()
