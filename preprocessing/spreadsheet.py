"""Reads a table's cells as text, from csv, tsv, xlsx or xls in any common encoding.

The content decides the format, not the ending. Nothing here knows what the columns mean.
"""

from __future__ import annotations

import codecs
import csv
import datetime
import io
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from common.cli import DataError

MOST_BYTES = 32e6  # of a file, more than twice what the largest public table (ADNIMERGE) has as csv
MOST_UNPACKED_BYTES = 100e6  # of all parts of an xlsx
MOST_MARKUP = 3e6  # tags and attributes of an xlsx, each an object of a hundred bytes while its sheet is read
MOST_ROWS = 500_000
MOST_CELLS = 5_000_000
SMALLER = "keep only the columns ID, diagnosis, age and sex, and save it as csv"
SEARCHED = 10  # lines in which a header may stand, below titles
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
ZIP, OLE, BIFF = b"PK\x03\x04", b"\xd0\xcf\x11\xe0", (b"\x09\x00\x04\x00", b"\x09\x02\x06\x00", b"\x09\x04\x06\x00")


class Line(NamedTuple):
    """One line of a table that is not empty."""

    number: int  # as an editor or a spreadsheet counts, from 1
    cells: tuple[str, ...]  # stripped; "" is empty


def read_sheets(path: Path) -> list[list[Line]]:
    """The sheets of a table, each a list of lines; a text file has one.

    Raises DataError where the file is no table, is damaged or would take more memory than a clinical table can need.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "no such file"
        raise DataError(f"{path}: {what}; give --clinical the clinical table")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise _TooLargeError(f"above {MOST_BYTES / 1e6:.0f} MB")
        content = path.read_bytes()
        if content.startswith(ZIP):
            return [_pad(_bound(sheet)) for sheet in _read_xlsx(content)]
        if content.startswith((OLE, *BIFF)):
            return [_pad(_bound(sheet)) for sheet in _read_xls(content)]
        return [_bound(_read_text(_decode(content)))]
    except _TooLargeError as error:
        raise DataError(f"{path}: is too large for a clinical table ({error}); {SMALLER}") from error
    except ImportError as error:
        raise DataError(f"{path}: needs {error.name}: pip install {error.name}, or save it as csv") from error
    except Exception as error:  # the readers raise anything on a broken table, and it always means the same
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read as a table ({reason}); save it as csv in UTF-8") from error


class _TooLargeError(ValueError):
    pass


def _bound(lines: Iterable[Line]) -> list[Line]:
    kept, cells = [], 0
    for line in lines:
        if any(line.cells):
            kept.append(line)
            cells += len(line.cells)
            if len(kept) > MOST_ROWS or cells > MOST_CELLS:
                raise _TooLargeError(f"above {MOST_ROWS} lines or {MOST_CELLS} cells")
    return kept


def _pad(lines: list[Line]) -> list[Line]:
    """A spreadsheet with its first lines padded to the longest one, since notes beside a table have no header."""
    width = max((len(line.cells) for line in lines), default=0)
    first = [line._replace(cells=line.cells + ("",) * (width - len(line.cells))) for line in lines[:SEARCHED]]
    return first + lines[SEARCHED:]


def _decode(content: bytes) -> str:
    for mark, encoding in BYTE_ORDER_MARKS:
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding)
    if b"\0" in content:  # UTF-16 without a mark: every other byte of Western text is zero
        even, odd = content[:2000:2].count(0), content[1:2000:2].count(0)
        if max(even, odd) < len(content[:2000]) / 4:
            raise ValueError("it is not text")
        return content.decode("utf-16-be" if even > odd else "utf-16-le")
    for encoding in ("utf-8", "cp1252"):  # cp1252 is Latin-1 with quotes and dashes where that has control characters
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    return content.decode("latin-1")


def _read_text(text: str) -> Iterator[Line]:
    if "\0" in text:
        raise ValueError("it is not text")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    reader = csv.reader(io.StringIO(text), delimiter=_find_delimiter(text), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"line {number}: {error}, quotes are not closed") from error
        if cells is None:
            return
        yield Line(number, tuple(cell.strip() for cell in cells))


def _find_delimiter(text: str) -> str:
    """The delimiter that gives most of the first lines the same number of cells, above one."""
    lines = [line for line in io.StringIO(text[:100_000]) if line.strip()][:50]

    def rate(delimiter: str) -> tuple[int, int]:
        (width, count), *_ = Counter(map(len, csv.reader(lines, delimiter=delimiter))).most_common(1) or [(0, 0)]
        return (count, width) if width > 1 else (0, 0)

    return max("\t;,|", key=rate)


def _read_xlsx(content: bytes) -> Iterator[Iterator[Line]]:
    from openpyxl import load_workbook  # here, because few tables need it

    with zipfile.ZipFile(io.BytesIO(content)) as parts:
        if sum(part.file_size for part in parts.infolist()) > MOST_UNPACKED_BYTES:
            raise _TooLargeError(f"above {MOST_UNPACKED_BYTES / 1e6:.0f} MB unpacked")
        markup = 0
        for part in parts.infolist():
            with parts.open(part) as stream:
                while chunk := stream.read(1 << 18):
                    if len(chunk) == 1 << 18 and b"<" not in chunk:  # no cell is that long; a tag would take minutes
                        raise _TooLargeError("one tag or cell above 262 kB")
                    markup += chunk.count(b"<") + chunk.count(b"=")
        if markup > MOST_MARKUP:
            raise _TooLargeError(f"above {MOST_MARKUP / 1e6:.0f} million tags and attributes")
    book = load_workbook(io.BytesIO(content), read_only=True, data_only=True)
    for sheet in book.worksheets:
        if sheet.sheet_state == "visible":
            sheet.reset_dimensions()  # the file's claim may be wrong; its rows count
            yield _number(sheet.iter_rows(values_only=True))
    book.close()


def _read_xls(content: bytes) -> Iterator[Iterator[Line]]:
    import xlrd  # here, because few tables need it

    with open(os.devnull, "w") as nowhere:  # for xlrd's remarks about a file
        book = xlrd.open_workbook(file_contents=content, logfile=nowhere, on_demand=True, ragged_rows=True)

        def read(cell: xlrd.sheet.Cell):
            if cell.ctype == xlrd.XL_CELL_DATE:
                return xlrd.xldate_as_datetime(cell.value, book.datemode)
            if cell.ctype == xlrd.XL_CELL_ERROR:
                return xlrd.error_text_from_code.get(cell.value, "#N/A")
            return bool(cell.value) if cell.ctype == xlrd.XL_CELL_BOOLEAN else cell.value

        for index in range(book.nsheets):
            sheet = book.sheet_by_index(index)
            if sheet.visibility == 0:
                yield _number([read(cell) for cell in sheet.row(row)] for row in range(sheet.nrows))


def _number(rows: Iterable[Iterable]) -> Iterator[Line]:
    for number, row in enumerate(rows, 1):
        cells = [_write(value) for value in row]
        while cells and not cells[-1]:
            cells.pop()
        yield Line(number, tuple(cells))


def _write(value) -> str:
    """A cell as a person would write it: 7 and not 7.0, a date without its midnight."""
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, datetime.datetime):
        return value.date().isoformat()
    return "" if value is None else str(value).strip()
