"""Finds the header of a clinical table, and which column holds what."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common.cli import DataError
from preprocessing.diagnosis import BLANK, CDR, read_number, show, spell
from preprocessing.spreadsheet import SEARCHED, Line, read_sheets

# What tables call their columns, best first; case, separators and text in brackets do not count:
# OASIS-1, -2 and -3, BIDS, ADNI, AIBL, NACC, MIRIAD, IXI, ABIDE and what people write themselves.
COLUMNS = {
    "scan": "mri id, mr id, mri session, mr session, scan, scan id, scan name, image data id, image id, image, file,"
    " file name, nifti path, image path, file path, path, file id",
    "subject": "participant id, oasis id, nacc id, ixi id, ptid, subject id, subject, sub id, subj id, patient id,"
    " subject label, subject name, subject code, rid, id, sub, subj, patient, participant, ixi, case id, person id,"
    " proband",
    "person": "subject, subject id, person, person id",
    "session": "session id, session, viscode, visit, visit id, visit code, timepoint, tp",
    "day": "days to visit, exam date, acq date, scan date, mri date, visit date, date, oasis session label,"
    " adrc adrcclinicaldata id",
    "cdr": "cdr, cdrtot, cdr global, cdglobal, cdrglob, global cdr, clinical dementia rating",
    "group": "dx, diagnosis, group, research group, diagnostic group, diagnosis group, dx group, dx bl, naccudsd,"
    " dxcurren, normcog, clinical diagnosis, disease, disease status, disease group, condition, patient group,"
    " subject group, subject type, participant type, pathology, phenotype, cohort, case control, class, status,"
    " diagnose, gruppe, label",
    "age": "age, age at visit, age at scan, age at mri, mri age, scan age, naccage, age years, age in years, age mri,"
    " age at entry, age months, age in months, alter",
    "sex": "m/f, sex, gender, ptgender, sex id, gender id, geschlecht, sexe",
    "mmse": "mmse, mmscore, mini mental state examination",
    "years": "years bl",  # since the visit at which ADNIMERGE's age was taken
}
COLUMNS = {what: tuple(spell(name) for name in names.split(",")) for what, names in COLUMNS.items()}
# Public tables that are also found without their header.
HEADERLESS = (
    "ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay",
    "Subject ID,MRI ID,Group,Visit,MR Delay,M/F,Hand,Age,EDUC,SES,MMSE,CDR,eTIV,nWBV,ASF",
)


class Table(NamedTuple):
    """A sheet whose columns are known."""

    path: Path
    columns: dict[str, tuple[int, str]]  # {content: (index, header)}
    lines: list[Line]  # below the header

    def read(self, line: Line, what: str) -> str:
        """A cell, "" where it is blank or there is no such column."""
        index, _ = self.columns.get(what, (len(line.cells), ""))
        cell = line.cells[index] if index < len(line.cells) else ""
        return cell if what in ("cdr", "group") or spell(cell) not in BLANK else ""

    def count(self, what: str) -> Counter[str]:
        """How many lines have each cell of a column."""
        return Counter(self.read(line, what) for line in self.lines)

    def name(self, what: str) -> str:
        """A column's header without its brackets, in one spelling; "" where there is no such column."""
        return _spell_header(self.columns.get(what, (0, ""))[1])


def read_table(path: Path) -> Table:
    """Read a file and find the sheet and the header line that name most of the columns.

    Raises DataError where no header has a subject and something about it, or a line is longer than its header.
    """
    sheets = read_sheets(path)
    found = [table for lines in sheets for table in _find_headers(path, lines)]
    found = found or [table for lines in sheets for table in _add_header(path, lines)]
    if not found:
        first = next((lines[0].cells for lines in sheets if lines), ())
        if not first:
            raise DataError(f"{path}: cannot be read as a table (it is empty); give --clinical the clinical table")
        raise DataError(
            f"{path}: needs one of the columns ID, subject, participant_id, PTID, MRI ID, scan, file and one of CDR, "
            f"DX, diagnosis, group, age, sex; its first line is {', '.join(map(show, first[:20]))}; "
            "add a header line"
        )
    table = max(found, key=lambda table: len(table.columns))  # the first of the best
    if not table.lines:
        raise DataError(f"{path}: has a header but no lines; add a line for each subject")
    return _take_label_for_scan(table)


def _find_headers(path: Path, lines: list[Line]) -> list[Table]:
    """The tables that begin with one of the first lines. A header's blank cells take the text above them."""
    tables, above = [], {}
    for index, line in enumerate(lines[:SEARCHED]):
        width = max(len(line.cells), *(position + 1 for position in above), 0)
        cells = [line.cells[i] if i < len(line.cells) and line.cells[i] else above.get(i, "") for i in range(width)]
        above |= {i: cell for i, cell in enumerate(line.cells) if cell}
        columns, doubled = _name_columns(cells)
        if len(columns) > 1 and not {"scan", "subject"}.isdisjoint(columns):
            tables.append((len(columns), Table(path, columns, lines[index + 1 :]), len(line.cells), doubled))
    if not tables:
        return []
    _, table, width, doubled = max(tables, key=lambda one: one[0])
    if doubled:
        raise DataError(f"{path}: has two columns called {doubled}; rename or delete one of them")
    long = next((line for line in table.lines if any(line.cells[width:])), None)
    if long:
        raise DataError(
            f"{path}, line {long.number}: has {len(long.cells)} cells, and the header {width}; name every column, and "
            "where decimal commas stand in a table separated by commas, separate it by semicolons"
        )
    return [table]


def _name_columns(headers: list[str]) -> tuple[dict[str, tuple[int, str]], str]:
    """({content: (index, header)}, the name of a column that appears twice or "")."""
    spelled = [_spell_header(header) for header in headers]
    columns, used = {}, set()
    for what, names in COLUMNS.items():
        name = next((name for name in names if name in spelled and (what != "person" or name not in used)), None)
        if name:
            columns[what] = (spelled.index(name), headers[spelled.index(name)])
            used.add(name)
    if "scan" in columns and "subject" in columns:  # the subject is the person, unless another column is
        columns.setdefault("person", columns["subject"])
    doubled = next((header for _, header in columns.values() if spelled.count(_spell_header(header)) > 1), "")
    return columns, doubled


def _spell_header(header: str) -> str:
    return spell(re.sub(r"(?<=\w)\s*[(\[].*", "", header))


def _add_header(path: Path, lines: list[Line]) -> list[Table]:
    """A public table without its header, if its columns hold what they should."""
    for header in HEADERLESS:
        headers = header.split(",")
        table = Table(path, _name_columns(headers)[0], lines)
        fits = all(len(line.cells) <= len(headers) and _is_of_oasis(table, line) for line in lines)
        if lines and fits:
            return [table]
    return []


def _is_of_oasis(table: Table, line: Line) -> bool:
    age, mmse = (read_number(table.read(line, what)) for what in ("age", "mmse"))
    cdr = spell(table.read(line, "cdr"))
    return (
        re.fullmatch(r"OAS[12]_\d{4}(_MR\d+)?", line.cells[0], re.IGNORECASE) is not None
        and table.read(line, "sex").upper() in ("M", "F")
        and age is not None
        and 10 < age < 120
        and (cdr in CDR or cdr in BLANK)
        and (not table.read(line, "mmse") or (mmse is not None and 0 <= mmse <= 30))
    )


def _take_label_for_scan(table: Table) -> Table:
    """XNAT (MIRIAD) calls the session's name, which begins with the subject's, its label."""
    columns = dict(table.columns)
    if table.name("group") != "label" or "subject" not in columns or "scan" in columns:
        return table
    index, _ = columns["scan"] = columns.pop("group")
    named = (line.cells[index].startswith(table.read(line, "subject")) for line in table.lines if line.cells[index:])
    columns.setdefault("person", columns["subject"])
    return table._replace(columns=columns) if all(named) and any(table.count("subject")) else table
