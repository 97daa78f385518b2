"""Whether a name in a table and a name of a scan are one person's, and one visit's."""

from __future__ import annotations

import datetime
import re

from preprocessing.layouts import name_subject


def identify(name: str) -> tuple[str, str]:
    """(subject, session) of a name in a table; MIRIAD's label of a visit is `miriad_188_1_MR_1`."""
    miriad = re.match(r"(miriad_\d{3})_(\d+)_MR", name, re.IGNORECASE)
    return miriad.groups() if miriad else name_subject(name)


def make_key(name: str) -> str:
    """A name whatever its case, separators and zero padding: sub-01, SUB_1 and 1 are one, OAS1_0001 and OAS10001 too.

    ADNI's and AIBL's subjects go with and without the study's name.
    """
    plain = re.sub(r"\.0$", "", name.strip().casefold())
    plain = re.sub(r"^(?:subject|subj|sub|session|ses)(?:[-_\s]+|(?=\d))", "", plain)
    plain = re.sub(r"^(?:sub-)?oas(?:is)?[-_\s]?([12])[-_\s]?(\d{4})(?!\d)", r"oas \1 \2", plain)
    parts = [part.lstrip("0") or part[-1] for part in re.findall(r"[^\W\d_]+|\d+", plain)]
    return "-".join(parts[1:] if parts[:1] in (["adni"], ["aibl"]) and len(parts) > 1 else parts) or plain


def read_subject_number(subject: str) -> str:
    """The number that a table may give for a subject: 105 of IXI105, 413 of ADNI's 002_S_0413; "" of two numbers."""
    public = re.search(r"(?:OAS[12]_|(?<!\d)\d{3}_?S_?)(\d{4})(?!\d)", subject, re.IGNORECASE)
    numbers = [public[1]] if public else re.findall(r"\d+", subject)
    return numbers[0].lstrip("0") or "0" if len(numbers) == 1 else ""


def make_session_key(session: str) -> str:
    """A session whatever its spelling, without a date beside it."""
    key = make_key(re.sub(r"_?(?:19|20)\d\d-\d\d-\d\d_?", "", session) or session)
    return "m-0" if key in ("bl", "baseline") else key


def is_same_session(one: str, other: str) -> bool:
    """Whether two sessions are one: M012 and m12, or MR2 and 2."""
    keys = make_session_key(one), make_session_key(other)
    return keys[0] == keys[1] or (
        any(key.isdigit() for key in keys) and re.findall(r"\d+", keys[0]) == re.findall(r"\d+", keys[1])
    )


def is_comparable(one: str, other: str) -> bool:
    """Whether two sessions use the same numbering, so that unequal ones differ: MR1 and MR2, not m12 and S7."""
    kinds = [_name_kind(session) for session in (one, other)]
    return bool(one and other) and (kinds[0] == kinds[1] or ("" in kinds and "date" not in kinds))


def _name_kind(session: str) -> str:
    """`mr` of MR1, `m` of m12, "" of a bare number, `date` of a day or a year."""
    key = make_session_key(session)
    return "date" if read_day(session) or re.match(r"(19|20)\d\d(?!\d)", key) else re.sub(r"[\d-]", "", key)


def read_day(text: str) -> int | None:
    """`d0757` as 757, and a date as its ordinal: 2006-05-19, 20060519, 5/19/2006 as LONI writes it, 19.5.2006."""
    study_day = re.search(r"d(\d{4,})$", text)
    if study_day:
        return int(study_day[1])
    iso = re.search(r"(?<!\d)((?:19|20)\d\d)[-_/]?(\d\d)[-_/]?(\d\d)(?!\d)", text)
    slashes = re.match(r"(\d{1,2})/(\d{1,2})/((?:19|20)?\d\d)(?!\d)", text)
    dots = re.match(r"(\d{1,2})\.(\d{1,2})\.((?:19|20)\d\d)(?!\d)", text)
    if iso:
        year, month, day = map(int, iso.groups())
    elif slashes:
        month, day, year = map(int, slashes.groups())
        month, day = (day, month) if month > 12 else (month, day)
    elif dots:
        day, month, year = map(int, dots.groups())
    else:
        return None
    try:
        return datetime.date(year + 2000 * (year < 100), month, day).toordinal()
    except ValueError:
        return None


def find_day(session: str, path: str) -> int | None:
    """The day of a scan: that of its LONI folder (ADNI, AIBL) if any, for names there give that of processing."""
    visit = re.search(r"/(\d{4}-\d\d-\d\d)_\d\d_\d\d_\d\d\.\d+/", path)
    return read_day(visit[1] if visit else session)


def is_same_calendar(one: int, other: int) -> bool:
    return (one > 100_000) == (other > 100_000)  # a date's ordinal is above, the days of a study are below
