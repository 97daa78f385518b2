"""Finds the subject and session of a scan from its path.

A path is read from the file's name up to the topmost folder. In each part of it, what tells scans of one person apart
(visits, dates, runs, contrasts, processing) is set aside; what remains names the person. The names of public data sets
come first, BIDS among them. In doubt, scans are joined as one person's, and a name that can be read in two ways
keeps the other reading, so that it can be reported.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

from preprocessing.vocabulary import (
    DD,
    END,
    ENDINGS,
    GAP,
    GROUPS,
    JOINT,
    KNOWN,
    LETTERED_PERSON,
    MM,
    PLACE,
    SET_ASIDE,
    SORTING,
    SPELLED_PERSON,
    START,
    YEAR,
)

UNNAMED = "unnamed"  # the subject where a path holds sessions and nobody's name
_NOBODY, _WORD, _NUMBERED, _LETTERED, _SPELLED, _PUBLIC = range(6)  # how certainly a part names a person


@dataclass(frozen=True)
class Identity:
    """Whose scan it is."""

    subject: str
    session: str = ""
    otherwise: str = ""  # the subject in another reading of the path, empty where there is none
    branch: str = field(default="", compare=False)  # folders above the subject that may be a site or a group
    place: int = field(default=0, compare=False)  # of the part of the path that names the subject

    @property
    def ambiguous(self) -> bool:
        return bool(self.otherwise)


@dataclass(frozen=True)
class _Reading:
    """What one part of a path gives."""

    subject: str
    sureness: int
    session: str = ""
    otherwise: str = ""
    fallback: str = ""  # may be a name where nothing else is


def strip_ending(path: str) -> str:
    """`a/ID_T1w` for `a/ID_T1w.nii.gz`; any other text as it is."""
    return next((path[: -len(ending)] for ending in ENDINGS if path.lower().endswith(ending)), path)


def parse_pattern(text: str) -> str:
    """Check --subject-pattern, whose group `subject` (or first group) is the subject and `session` the session."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is not a regular expression ({error})") from error
    if not pattern.groups:
        raise argparse.ArgumentTypeError(f"{text} has no group; put the subject in parentheses, such as '(p[0-9]+)_'")
    return text


def identify(path: str, pattern: str | None = None) -> Identity | None:
    """Who is in this scan: a path below the folder searched, with `/`, or only a name, with an ending or without.

    With a pattern, searched in the path, only its group counts; None where it does not match.
    """
    parts = [part for part in strip_ending(path).split("/") if part]
    if parts and (series := re.fullmatch(r"dicom-\d+_?(.*)", parts[-1])):
        parts.pop()  # a series' number and description, such as t1_mpr_p2_iso, name nobody
        own, above = (re.sub(r"[\W_]", "", text).lower() for text in (series[1], "".join(parts[-1:])))
        if len(parts) > 1 and own and re.fullmatch(rf"\d*{own}\d*", above):
            parts.pop()  # nor does a folder that is called the same
    if any(re.fullmatch(r"images(?:tr|ts)", part, re.IGNORECASE) for part in parts):
        parts[-1] = re.sub(r"_\d{4}$", "", parts[-1])  # nnU-Net's channels
    readings = [_read(part) for part in parts]
    sessions = [reading.session for reading in readings if reading.session]
    session = sessions[-1] if sessions else ""
    if pattern:
        match = re.search(pattern, path)
        subject = match and match["subject" if "subject" in match.groupdict() else 1]
        if not subject:
            return None
        rest = _find_session(path[: match.start()] + "/" + path[match.end() :])
        return Identity(subject, match.groupdict().get("session") or rest)
    place, other, visit = _choose(parts, readings)
    padded = re.fullmatch(r"\D*(?:scan|mri|vol|volume)\D?\d{3,}", readings[-1].fallback) if readings else None
    if place is None or (padded and readings[place].sureness == _WORD):
        return _name_by_number(parts, readings, session, None if place is None else readings[place].subject)
    subject, otherwise = readings[place].subject, readings[place].otherwise
    if other is not None:
        otherwise = readings[other].subject
        session = session or (otherwise if visit else "")
    branch = "/".join(
        part
        for part, reading in zip(parts[:place], readings, strict=False)
        if GROUPS.fullmatch(part)
        or (reading.subject and not SORTING.fullmatch(part) and key_subject(reading.subject) != key_subject(subject))
    )
    if place and readings[place].sureness < _PUBLIC and _is_place(parts[place - 1]):
        otherwise, subject, place = otherwise or subject, f"{parts[place - 1]}_{subject}", place - 1
    if key_subject(otherwise) == key_subject(subject):
        otherwise = ""
    return Identity(subject, session, otherwise, branch, place)


def key_subject(subject: str) -> tuple[str, ...]:
    """The same key for all spellings of one person: case, zero padding and separators do not count.

    `OAS1_0001`, `oas1-1` and Clinica's `sub-OASIS10001` are one, so are `002_S_0295` and `sub-ADNI002S0295`.
    """
    plain = re.sub(r"^sub[-_ ]", "", subject.strip().casefold())
    plain = re.sub(r"^adni[-_]?(?=\d{3}[-_]?s[-_]?\d)", "", plain)
    plain = re.sub(r"^oas(?:is)?([12])_?(?=\d{4}$)", r"oas\1_", plain)
    plain = re.sub(r"^oas(?:is)?([34])(\d{4})$", r"oas\1\2", plain)
    return tuple(run.lstrip("0") or "0" for run in re.findall(r"\d+|[^\W\d_]+", plain)) or (plain,)


def unify(identities: list[Identity]) -> list[Identity]:
    """The identities with one spelling for each subject, the most frequent (then the first in the alphabet)."""
    spellings = defaultdict(Counter)
    for one in identities:
        spellings[key_subject(one.subject)][one.subject] += 1
    chosen = {key: min(count, key=lambda name: (-count[name], name)) for key, count in spellings.items()}
    return [replace(one, subject=chosen[key_subject(one.subject)]) for one in identities]


def find_ambiguous(identities: list[Identity]) -> list[int]:
    """The indices of identities whose other reading would join or separate scans of this set, rising.

    A subject below two branches (`Utrecht/01`, `Singapore/01`) may be two people as well.
    """
    keys = [key_subject(one.subject) for one in identities]
    others = [key_subject(one.otherwise) if one.otherwise else key for one, key in zip(identities, keys, strict=True)]
    here, there, branches = defaultdict(set), defaultdict(set), defaultdict(set)
    for index, (key, other) in enumerate(zip(keys, others, strict=True)):
        here[key].add(index)
        there[other].add(index)
        branches[key].add(identities[index].branch)
    return [
        index
        for index, (key, other) in enumerate(zip(keys, others, strict=True))
        if (other != key and here[key] != there[other]) or len(branches[key]) > 1
    ]


def _is_person_word(word: str) -> bool:
    match = SPELLED_PERSON.fullmatch(word)
    return bool(match and not match[2])


def _is_place(part: str) -> bool:
    return PLACE.fullmatch(part) is not None


def _name_by_number(parts: list[str], readings: list[_Reading], session: str, folder: str | None) -> Identity:
    """Who is in `scan_001`, `M001_visit1` or `visit1/T1`, where nothing else in the path names a person."""
    fallback = next((reading.fallback for reading in reversed(readings) if reading.fallback), "")
    if fallback:
        place = max(place for place, reading in enumerate(readings) if reading.fallback == fallback)
        return Identity(fallback, _find_session(parts[place].replace(fallback, "")), folder or "", place=place)
    if session:
        return Identity(UNNAMED, session, "/".join(parts))
    return Identity(parts[-1] if parts else UNNAMED, place=max(len(parts) - 1, 0))


def _choose(parts: list[str], readings: list[_Reading]) -> tuple[int | None, int | None, bool]:
    """(the part that names the person, another that may, whether that one is more likely a session)."""
    last = len(parts) - 1
    named = [
        place
        for place, (part, reading) in enumerate(zip(parts, readings, strict=True))
        if reading.sureness == _PUBLIC
        or (reading.subject and not (place < last and (SORTING.fullmatch(part) or _is_place(part))))
    ]
    if not named:
        return None, None, False
    sureness = [reading.sureness for reading in readings]
    surest = max(sureness[place] for place in named)
    best = [place for place in named if sureness[place] == surest]
    numbered = [place for place in named if sureness[place] >= _NUMBERED]
    inner = named[-1]
    if surest >= _SPELLED:
        return best[-1], None, False
    if surest == _LETTERED:
        if readings[best[-1]].subject[0] in "sS" and numbered[0] < best[-1]:  # `p7/s1`: s1 is more likely a session
            return numbered[0], best[-1], True
        return best[-1], None, False
    if surest == _NUMBERED and (inner < last or numbered[0] < inner):
        above, own = (key_subject(readings[place].subject) for place in (numbered[0], inner))
        if inner < last or sureness[inner] == _WORD or own[: len(above)] == above:
            return numbered[0], None if own == above else inner, inner < last  # `001/002/T1`
    outer = named[-2] if len(named) > 1 else None
    if inner == last and outer is not None:
        visited = any(reading.session and not reading.subject for reading in readings[outer + 1 : last])
        if visited and (sureness[outer] >= _NUMBERED or sureness[last] == _WORD):
            return outer, last, False
        return last, outer if visited else None, False
    return inner, None, False


@functools.lru_cache(maxsize=4096)  # folders are in many paths
def _read(part: str) -> _Reading:
    """The person and session in one part of a path."""
    part = re.sub(r"\.long\..*", "", part)  # FreeSurfer's longitudinal folders: `p7_m12.long.p7_base`
    for pattern in KNOWN:
        match = pattern.search(part)
        if match:
            groups = match.groupdict()
            subject, rest = groups.get("subject") or match[0], part[: match.start()] + "_" + part[match.end() :]
            if subject.lower().startswith("sub-"):  # `sub-01visit2`, against the rules of BIDS
                glued = JOINT.search(subject)
                subject, rest = (
                    (subject[: glued.start()], subject[glued.start() :] + rest) if glued else (subject, rest)
                )
            session = groups.get("session") or _find_session(rest)
            return _Reading(subject, _PUBLIC, re.sub(r"^ses-(?=d\d{4}$)", "", session))  # OASIS-3's days
    text = JOINT.sub("_", part)
    bare = SET_ASIDE.sub(lambda match: "\0" * len(match[0]), text)
    words = [(match[0], match.start(), match.end()) for match in re.finditer(r"[^\W_]+", bare)]
    session = _find_session(text)
    if len(words) == 1 and re.fullmatch(YEAR, words[0][0]):
        return _Reading("", _NOBODY, words[0][0], fallback=words[0][0])
    if not words or (len(words) == 1 and _is_person_word(words[0][0])):
        if words and not session:
            return _Reading("", _NOBODY, fallback=words[0][0])  # `patient_T1w`
        own = re.search(rf"{START}(?:[mvywrd]\d+|(?:scan|mri?|im|img|image|file|vol|volume){GAP}\d+){END}", text, re.I)
        return _Reading("", _NOBODY, session, fallback=own[0] if own else "")
    who, sureness = _find_name([word for word, _, _ in words])

    def spell(places):
        pieces = bare[words[places[0]][1] : words[places[-1]][2]]
        return re.sub(r"[\W_]*\0[\W_]*", "_", pieces) if "\0" in pieces else pieces

    rest = [place for place in range(len(words)) if place not in who]
    subject = spell(who) if who == list(range(who[0], who[-1] + 1)) else "_".join(words[place][0] for place in who)
    otherwise = spell(list(range(len(words)))) if rest else ""
    numbers = [words[place][0] for place in rest if re.fullmatch(r"\d+|\w|s\d+", words[place][0], re.I)]
    letter = re.fullmatch(r"(.*\d)([a-d])", subject, re.IGNORECASE)
    if letter and re.fullmatch(r"[^\W\d_]*\d+[a-d]", words[who[-1]][0], re.IGNORECASE):  # `p7a` and `p7b`
        subject, otherwise = letter[1], otherwise or subject
        numbers.insert(0, letter[2])
    if not otherwise and sureness == _NUMBERED and len(who) > 1 and len(words[who[-1]][0]) == 1:
        otherwise = spell(who[:-1])  # `anna_1` may be the first scan of anna
    return _Reading(subject, sureness, session or "_".join(numbers), otherwise)


def _find_session(text: str) -> str:
    """The sessions in a text, days as 2010-12-31, joined by `_`; empty where there is none."""
    found = []
    for match in SET_ASIDE.finditer(JOINT.sub("_", text)):
        day = re.match(rf"({YEAR})[-_. ]?(\d\d)[-_. ]?(\d\d)", match[0]) if match["date"] else None
        what = "-".join(day.groups()) if day else match["date"] or match["session"]
        if what and what not in found:
            found.append(what)
    return "_".join(found)


def _find_name(words: list[str]) -> tuple[list[int], int]:
    """(places of the words that name the person, how certainly), of the words not set aside."""
    for sureness, person in ((_SPELLED, SPELLED_PERSON), (_LETTERED, LETTERED_PERSON)):
        for place, word in enumerate(words):
            match = person.fullmatch(word)
            following = words[place + 1] if place + 1 < len(words) else ""
            apart = (
                following.isdigit()
                if sureness == _LETTERED
                else re.search(r"\d", following) or len(following) in (1, 2)
            )
            if not match or not (match[2] or apart):
                continue
            if sureness == _LETTERED and place and match[1] in "sS" and any(map(_has_digit, words[:place])):
                continue  # `AB12_s2`
            end = place + (1 if match[2] else 2)
            return [i for i in range(end) if i >= place or not re.fullmatch(YEAR, words[i])], sureness
    numbered = [place for place, word in enumerate(words) if _has_digit(word)]
    long = [place for place in numbered if len(words[place]) > 2 and not re.fullmatch(YEAR, words[place])]
    days = {place for place in long if _is_day(words[place]) and len(long) > 1}
    days |= {place for place in numbered if re.fullmatch(YEAR, words[place]) and len(words) > 1}
    numbered = [place for place in numbered if place not in days]
    if not numbered:
        rest = [place for place in range(len(words)) if place not in days]
        return (rest, _WORD) if rest else ([0], _NUMBERED)
    end = first = numbered[0]
    if _is_place("".join(words[max(first - 1, 0) : first + 1])) or _is_place(words[first]):
        end = min(first + 1, len(words) - 1)
    elif (
        len(re.sub(r"\D", "", words[first])) <= 2
        and first + 1 in numbered
        and re.fullmatch(r"\d{3,}", words[first + 1])
    ):
        end = first + 1  # a site and its person: TCIA01_131
    return [place for place in range(end + 1) if place not in days], _NUMBERED


def _has_digit(word: str) -> bool:
    return any(map(str.isdigit, word))


def _is_day(word: str) -> bool:
    """Whether a number may be a day without its century, or day and month before the year."""
    return any(
        re.fullmatch(day, word) for day in (rf"\d\d{MM}{DD}", rf"{DD}{MM}\d\d", rf"{DD}{MM}{YEAR}", rf"{MM}{DD}{YEAR}")
    )
