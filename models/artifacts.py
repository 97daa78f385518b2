"""What a run or an evaluation leaves on disk, written whole or not at all: bytes, tables, figures."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only; scripts run where there is no screen
import matplotlib.pyplot as plt


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


def write_figure(path: Path, figure: plt.Figure) -> None:
    """Write a figure as PNG and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    plt.close(figure)
    write_atomically(path, buffer.getvalue())
