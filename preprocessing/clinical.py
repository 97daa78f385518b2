"""The clinical table: who was judged healthy, how old, which sex."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.cli import DataError
from preprocessing.layouts import name_subject
from preprocessing.scans import Scan

# What each table calls its columns, in lower case: OASIS-1, OASIS-2, OASIS-3, BIDS.
COLUMNS = {
    "scan": ("mri id", "id", "subject id", "oasisid", "participant_id", "subject"),
    "session": ("session_id",),
    "day": ("days_to_visit",),
    "cdr": ("cdr", "cdrtot"),
    "group": ("group", "diagnosis", "dx"),
    "age": ("age", "age at visit"),
    "sex": ("m/f", "sex", "gender"),
}
NORMAL_GROUPS = {"control", "controls", "healthy", "healthy control", "hc", "cn", "nc", "con", "normal", "nondemented"}
CDR_WITHIN_DAYS = 365  # of the scan; a rating further away says little about it


class Row(NamedTuple):
    """One line of the table; None is blank."""

    session: str
    day: int | None  # since the subject entered the study
    label: str | None  # normal or abnormal
    age: float | None  # years
    sex: str | None  # "F" or "M"


@dataclass(frozen=True)
class Clinical:
    """A clinical table by subject."""

    path: Path
    judged_by: str  # the column that gives the label
    rows: dict[str, list[Row]]

    def find(self, scan: Scan) -> Row | None:
        """The line that is about this scan: its session's, the nearest in days, or the subject's only one."""
        rows = self.rows.get(_plain(scan.subject), [])
        day = re.search(r"d(\d{4,})$", scan.session)
        if day and any(row.day is not None for row in rows):
            near = [(abs(row.day - int(day[1])), row.day, row) for row in rows if row.day is not None and row.label]
            near = near or [(abs(row.day - int(day[1])), row.day, row) for row in rows if row.day is not None]
            distance, _, row = min(near, key=lambda one: one[:2])
            return row if distance <= CDR_WITHIN_DAYS else None
        exact = [row for row in rows if row.session and _plain(row.session) == _plain(scan.session)]
        return next(iter(exact or [row for row in rows if not row.session and row.day is None]), None)


def read_clinical(path: Path) -> Clinical:
    """Read OASIS-1's, OASIS-2's or OASIS-3's table or a BIDS participants.tsv, as csv, tsv or xlsx.

    CDR 0 is normal, above 0 abnormal; without a CDR column a group or diagnosis column counts, where words such as
    "control" are normal. Raises DataError where the table cannot be read or says neither.
    """
    import pandas as pd  # here, because it is slow to import and the workers do without

    if not path.is_file():
        raise DataError(f"{path}: no such file; give --clinical the clinical table")
    options = {"dtype": str, "na_values": [".", "?"]}
    try:
        if path.suffix.lower() in (".xlsx", ".xls"):
            table = pd.read_excel(path, **options)
        else:
            separator = "\t" if path.suffix.lower() == ".tsv" else None
            table = pd.read_csv(path, sep=separator, engine="python", encoding="utf-8-sig", **options)
    except Exception as error:  # pandas and its readers raise anything on a broken table, and it always means the same
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read as a table ({reason}); save it as csv") from error
    headers = {str(header).strip().lower(): header for header in table.columns}
    found = {what: next((headers[name] for name in names if name in headers), None) for what, names in COLUMNS.items()}
    judged_by = "cdr" if found["cdr"] is not None else "group"
    for what in ("scan", judged_by):
        if found[what] is None:
            wanted = COLUMNS["scan"] if what == "scan" else COLUMNS["cdr"] + COLUMNS["group"]
            raise DataError(f"{path}: has none of the columns {', '.join(wanted)}; it has {', '.join(headers)}")

    rows = defaultdict(list)
    judge = _judge_cdr if judged_by == "cdr" else _judge_group
    for index, line in table.iterrows():
        cells = {what: _read_cell(line, header) for what, header in found.items()}
        if cells["scan"] is None:
            continue
        try:
            subject, session = name_subject(cells["scan"])
            day = None if cells["day"] is None else int(float(cells["day"]))
            label = None if cells[judged_by] is None else judge(cells[judged_by])
            age = None if cells["age"] is None else _read_age(cells["age"])
        except ValueError as error:
            raise DataError(f"{path}, line {index + 2}: {error}; correct the table") from error
        sex = (cells["sex"] or "")[:1].upper()
        row = Row(cells["session"] or session, day, label, age, sex if sex in ("F", "M") else None)
        for other in rows[_plain(subject)]:
            if (other.session, other.day) == (row.session, row.day) and other.label != row.label:
                raise DataError(f"{path}, line {index + 2}: {cells['scan']} stands twice with different labels")
        rows[_plain(subject)].append(row)
    return Clinical(path, str(found[judged_by]), dict(rows))


def _read_cell(line, header) -> str | None:
    value = None if header is None else line[header]
    return value.strip() if isinstance(value, str) and value.strip() else None


def _judge_cdr(cell: str) -> str:
    cdr = float(cell)
    if not 0 <= cdr <= 3:
        raise ValueError(f"{cell} is no clinical dementia rating, which runs from 0 to 3")
    return "normal" if cdr == 0 else "abnormal"


def _judge_group(cell: str) -> str:
    return "normal" if cell.lower() in NORMAL_GROUPS else "abnormal"


def _read_age(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None  # "89+": not a number, and nothing hangs on it


def _plain(name: str) -> str:
    return re.sub(r"^(sub|ses)-", "", name).lower()
