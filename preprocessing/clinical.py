"""The clinical table: diagnosis, age and sex of each subject."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from common.cli import DataError, log
from preprocessing.columns import Table, read_table
from preprocessing.diagnosis import (
    BLANK,
    CDR,
    CODES,
    Choice,
    judge,
    list_values,
    read_legend,
    read_number,
    refuse_unknown,
    refuse_wrong_choice,
    show,
    spell,
)
from preprocessing.layouts import CONTRAST
from preprocessing.scans import ENDINGS, Scan
from preprocessing.spreadsheet import Line
from preprocessing.visits import (
    find_day,
    identify,
    is_comparable,
    is_same_calendar,
    is_same_session,
    make_key,
    make_session_key,
    read_day,
    read_subject_number,
)

SEXES = dict.fromkeys(("f", "female", "woman", "women", "girl", "w", "weiblich", "femme"), "F") | dict.fromkeys(
    ("m", "male", "man", "men", "boy", "mannlich", "homme"), "M"
)
SEX_CODES = {"1": "M", "2": "F"}  # as OASIS-3, NACC, IXI and ADNI document them; unknown in other tables
CDR_WITHIN_DAYS = 365  # of the scan; a rating further away says little about it
MOST_VALUES = 50  # listed one by one
YOUNG = 60  # years; OASIS-1 rated few below


class Row(NamedTuple):
    """One line of the table; None and "" are blank."""

    number: int  # of the line, from 1
    name: str  # of the scan or subject, as written there
    subject: str
    person: str  # the subject that a column gives, which overrides the scan's name
    session: str
    day: int | None  # since the subject entered the study, or a date as its ordinal
    value: str  # of the column that gives the label
    label: str | None  # normal or abnormal
    age: float | None  # years
    sex: str | None  # "F" or "M"


@dataclass(frozen=True)
class Clinical:
    """A clinical table by the names in it."""

    path: Path
    judged_by: str  # the column that gives the label, "" where there is none
    rows: dict[str, list[Row]]  # by the key of a scan or subject

    def find(self, scan: Scan) -> Row | None:
        """The line about this scan: its own, its session's, the nearest in days, or what all its lines agree on."""
        return self._choose(scan)[0]

    def explain(self, scan: Scan) -> str:
        """Why there is no line about this scan."""
        return self._choose(scan)[1]

    def describe(self, blank: str | None = None) -> list[str]:
        """How each value of the table is read, with the number of its lines; `blank` is the label of empty cells."""
        if not self.judged_by:
            return [f"{self.path.name}: no column gives a diagnosis; only ages and sexes are used"]
        rows = {row.number: row for rows in self.rows.values() for row in rows}.values()
        counts = Counter((("normal", "abnormal", None).index(row.label), row.value) for row in rows)
        lines = []
        for (label, value), count in sorted(counts.items(), key=lambda one: (one[0][0], -one[1], one[0][1])):
            meaning = ("normal", "abnormal", blank or "left out")[label]
            words = f"{self.judged_by} {show(value) or 'blank'} -> {meaning}"
            lines.append(f"{self.path.name}: {words} ({count} line{'s' * (count != 1)})")
        more = len(lines) - MOST_VALUES
        return [*lines[:MOST_VALUES], f"{self.path.name}: {more} more values"] if more > 0 else lines

    def name_persons(self, scans: list[Scan]) -> list[Scan]:
        """The scans with the subjects that the table's column of persons gives, if it has one.

        A scan without a line goes with the others of its subject where these are one person. Raises DataError where a
        bare number in the table (7) would be two subjects of the scans (a7 and b7).
        """
        self._refuse_shared_numbers(scans)
        found = [(scan, self.find(scan)) for scan in scans]
        persons, spelling = defaultdict(dict), {}
        for scan, row in found:
            if row and row.person:
                persons[scan.subject][make_key(row.person)] = spelling.setdefault(make_key(row.person), row.person)
        named = []
        for scan, row in found:
            others = persons[scan.subject]
            key = make_key(row.person) if row and row.person else next(iter(others), "") if len(others) == 1 else ""
            same = not key or key in (make_key(scan.subject), read_subject_number(scan.subject))
            named.append(scan if same else replace(scan, subject=others[key], otherwise="", branch=""))
        return named

    def _refuse_shared_numbers(self, scans: list[Scan]) -> None:
        seen = {}
        for scan in scans:
            number, key = read_subject_number(scan.subject), make_key(scan.subject)
            if number in self.rows and key not in self.rows:
                other = seen.setdefault(number, scan.subject)
                if make_key(other) != key:
                    raise DataError(
                        f"{self.path}: its {self.rows[number][0].name} may be {other} or {scan.subject}; write the "
                        "subjects there as in the scans' names"
                    )

    def _choose(self, scan: Scan) -> tuple[Row | None, str]:
        """(the line about a scan, or None and why there is none)."""
        names = (scan.name, CONTRAST.sub("", scan.name), *re.findall(r"_(I\d+)$", scan.name), scan.subject)
        keys = (*map(make_key, names), read_subject_number(scan.subject))
        rows = next((self.rows[key] for key in keys if key in self.rows), None)
        if rows is None:
            example = next(iter(self.rows.values()))[0].name
            return None, f"not in {self.path.name}, which has names such as {show(example)}"
        day = find_day(scan.session, scan.path.as_posix())
        dated = [row for row in rows if row.day is not None and day is not None and is_same_calendar(row.day, day)]
        if dated:
            nearest = min([row for row in dated if row.label] or dated, key=lambda row: (abs(row.day - day), row.day))
            if abs(nearest.day - day) <= CDR_WITHIN_DAYS:
                return nearest, ""
            return None, f"not in {self.path.name} within {CDR_WITHIN_DAYS} days"
        exact = [row for row in rows if row.session and is_same_session(row.session, scan.session)]
        general = [row for row in rows if not row.session and row.day is None]
        if not (exact or general) and any(is_comparable(row.session, scan.session) for row in rows):
            return None, f"not in {self.path.name}, which has {show(rows[0].subject)} but not its {scan.session}"
        return self._agree(exact or general or rows)

    def _agree(self, rows: list[Row]) -> tuple[Row | None, str]:
        """What several lines have in common; nothing where their labels differ."""
        first, *others = [row for row in rows if row.label] or rows
        other = next((row for row in others if row.label != first.label), None)
        if other:
            return None, (
                f"in {self.path.name} it is {show(first.value)} on line {first.number} and {show(other.value)} on line "
                f"{other.number}; put the visit into the scan's name, or leave one line"
            )
        ages, sexes = {row.age for row in rows} - {None}, {row.sex for row in rows} - {None}
        age, sex = (values.pop() if len(values) == 1 else None for values in (ages, sexes))
        return first._replace(age=age, sex=sex), ""


def read_clinical(
    path: Path, normal_values: Iterable[str] = (), abnormal_values: Iterable[str] = (), needs_labels: bool = True
) -> Clinical:
    """Read the table of a public data set or one's own, as csv, tsv, xlsx or xls.

    CDR 0 is normal, above 0 abnormal; without a CDR a diagnosis or group counts, by the words in
    preprocessing/diagnosis.py and the values that the user maps. Raises DataError where the table cannot be read, where
    it has values that are not known, and where a subject has two labels at one visit. Without `needs_labels` it may
    have no such column, and unknown values are blank: the labels come from elsewhere.
    """
    choice = Choice(tuple(normal_values), tuple(abnormal_values))
    table = read_table(path)
    there = [what for what in ("cdr", "group") if what in table.columns]
    filled = [what for what in there if any(spell(cell) not in BLANK for cell in table.count(what))]
    judged_by = (filled or there or [""])[0]
    if not judged_by and (needs_labels or choice != Choice()):
        raise DataError(
            f"{path}: has none of the columns CDR, DX, diagnosis, group, so it gives no labels; name the column that "
            "does diagnosis, or give --label normal or --label abnormal"
        )
    meanings = _judge(table, judged_by, choice, needs_labels) if judged_by else {}
    named = [line for line in table.lines if table.read(line, "scan") or table.read(line, "subject")]
    if not named:
        raise DataError(f"{path}: no line has a name in {table.columns.get('scan', table.columns.get('subject'))[1]}")
    rows = [_read_row(table, line, table.read(line, judged_by), meanings) for line in named]
    _refuse_conflicts(path, rows)
    _warn(table)
    by_key = defaultdict(list)
    for row in rows:
        for key in {make_key(name): row for name in (row.name, CONTRAST.sub("", row.name), row.subject)}:
            by_key[key].append(row)
    return Clinical(path, table.columns[judged_by][1] if judged_by else "", dict(by_key))


def _judge(table: Table, judged_by: str, choice: Choice, needs_labels: bool) -> dict[str, str]:
    """{value of the column that judges: normal, abnormal or ""}."""
    column, values = table.columns[judged_by][1], table.count(judged_by)
    legend = read_legend(column)
    words, _ = judge(Counter(legend.values()), {}, Choice())
    scale = CDR if judged_by == "cdr" else CODES.get(table.name(judged_by), {})
    scale = scale | {code: words[word] for code, word in legend.items() if words[word]}
    refuse_wrong_choice(table.path, column, values, choice)
    meanings, unknown = judge(values, scale, choice)
    if needs_labels:
        refuse_unknown(table.path, column, values, unknown, judged_by == "cdr")
    elif unknown:
        log.warning(
            f"{table.path}: its column {column} has values that are not known and are not compared with the labels of "
            f"the scans: {list_values(values, unknown)}"
        )
    return meanings


def _read_row(table: Table, line: Line, value: str, meanings: dict[str, str]) -> Row:
    scan, who = re.split(r"[/\\]", table.read(line, "scan"))[-1], table.read(line, "subject")
    scan = next((scan[: -len(ending)] for ending in ENDINGS if scan.lower().endswith(ending)), scan)
    if table.name("subject") in ("ixiid", "ixi") and who.isdigit():  # IXI's own table leaves the first letters out
        who = f"IXI{int(who):03d}"
    subject, session = identify(who or scan)
    session = (identify(scan)[1] if scan else session) or table.read(line, "session") or session
    day = table.read(line, "day")
    return Row(
        number=line.number,
        name=scan or who,
        subject=subject,
        person=table.read(line, "person"),
        session=session,
        day=read_day(day) if read_number(day) is None or len(day) == 8 else int(read_number(day)),
        value=value,
        label=meanings.get(value) or None,
        age=_read_age(table, line),
        sex=_read_sex(table, table.read(line, "sex")),
    )


def _read_age(table: Table, line: Line) -> float | None:
    """Years; None for what is no number ("89+") or no age."""
    cell = re.sub(r"(?<=\d)\s*y(ears?|rs?)?$", "", table.read(line, "age"), flags=re.IGNORECASE)
    age, later = read_number(cell), read_number(table.read(line, "years")) or 0
    if age is None:
        return None
    years = age / 12 if "month" in table.columns["age"][1].lower() else age + later
    return years if 0 < years <= 120 else None


def _read_sex(table: Table, cell: str) -> str | None:
    word = spell(cell)
    legend = read_legend(table.columns["sex"][1]) if cell else {}
    documented = {table.name("subject"), table.name("sex")} & {"oasisid", "naccid", "ixiid", "ptgender"}
    return SEXES.get(spell(legend.get(word, word))) or (SEX_CODES.get(word) if documented else None)


def _refuse_conflicts(path: Path, rows: list[Row]) -> None:
    """Raise DataError with the subjects that have two labels at one visit, and warn of those with two ages."""
    visits = defaultdict(list)
    for row in rows:
        visits[make_key(row.name), make_key(row.subject), make_session_key(row.session), row.day].append(row)
    conflicts, ages = [], []
    for same in visits.values():
        first, *others = [row for row in same if row.label] or same
        other = next((row for row in others if row.label != first.label), None)
        if other:
            lines = f"{show(first.value)} on line {first.number} and as {show(other.value)} on line {other.number}"
            conflicts.append(f"{show(first.name)} appears twice, as {lines}")
        if len({row.age for row in same} - {None}) > 1:
            ages.append(show(first.name))
    if conflicts:
        more = f" and {len(conflicts) - 5} more" if len(conflicts) > 5 else ""
        raise DataError(
            f"{path}: {', '.join(conflicts[:5])}{more}; correct them, or name the visits in a column called session"
        )
    if ages:
        log.warning(
            f"{path}: names with several lines and different ages, of which none is used: {len(ages)} "
            f"({', '.join(ages[:10])})"
        )


def _warn(table: Table) -> None:
    """Warn of lines and values that are not used, and of empty cells that seem to have been filled with 0."""
    unnamed = [line for line in table.lines if not (table.read(line, "scan") or table.read(line, "subject"))]
    unnamed = [line for line in unnamed if any(table.read(line, what) for what in ("cdr", "group", "age", "sex"))]
    if unnamed:
        log.warning(
            f"{table.path}: lines without a name, which are not used: {len(unnamed)}, the first is "
            f"line {unnamed[0].number}; fill in their names"
        )
    sexes = table.count("sex")
    codes = [cell for cell in sexes if cell and spell(cell) != "0" and not _read_sex(table, cell)]
    if codes:
        log.warning(
            f"{table.path}: its column {table.columns['sex'][1]} has values that are neither F nor M and are not used: "
            f"{list_values(sexes, codes)}"
        )
    filled = [
        line
        for line in table.lines
        if {"cdr", "mmse"} <= set(table.columns)
        and spell(table.read(line, "cdr")) == "0"
        and not read_number(table.read(line, "mmse"))  # an MMSE of 0 cannot go with a CDR of 0
        and (_read_age(table, line) or YOUNG) < YOUNG
    ]
    if filled:
        log.warning(
            f"{table.path}: people below {YOUNG} with CDR 0 and no MMSE: {len(filled)}; probably they were not "
            "rated and empty cells were filled with 0; use the table as published, where they are blank"
        )
