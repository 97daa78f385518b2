"""Who is normal and who goes where: labels from the clinical table, splits by subject, refusals of mixed sets."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from preprocessing.clinical import CDR_WITHIN_DAYS, Clinical
from preprocessing.scans import SPLITS, DataError, Scan
from preprocessing.subjects import key_subject


def label_scans(
    scans: list[Scan], clinical: Clinical | None, label: str | None, blank: str | None
) -> tuple[list[Scan], list[tuple[str, str]]]:
    """Give each scan its label, age and sex; returns (scans, [(path, why it is left out)]).

    A label that a scan has from the split/label tree stands, and DataError is raised where the table says otherwise.
    `label` is that of all scans, `blank` the label of those whose cell in the table is empty (None leaves them out).
    """
    labelled, left_out = [], []
    for scan in scans:
        row = clinical.find(scan) if clinical else None
        if row:
            scan = replace(scan, age=row.age, sex=row.sex)
            if scan.label and row.label and row.label != scan.label:
                raise DataError(
                    f"{scan.path}: stands among the {scan.label} and is {row.label} in {clinical.path}; move it"
                )
        says = scan.label or label or (row and (row.label or blank))
        if says:
            lesion_mask = scan.lesion_mask if says == "abnormal" else None  # in a normal scan there is nothing to find
            labelled.append(replace(scan, label=says, lesion_mask=lesion_mask))
        elif row:
            why = (
                f"its {clinical.judged_by} is blank in {clinical.path.name}; --blank-cdr normal would take it as normal"
            )
            left_out.append((str(scan.path), why))
        else:
            near = f" within {CDR_WITHIN_DAYS} days" if scan.session.startswith("d") else ""
            left_out.append((str(scan.path), f"not in {clinical.path.name}{near}"))
    return labelled, left_out


def split_subjects(scans: list[Scan], fractions: tuple[float, ...], seed: int, kept: dict[str, str]) -> list[Scan]:
    """Give each scan its split: all of a subject in one, subjects with an abnormal scan in test.

    fractions  shares of the normal subjects for train, val and test, summing to 1
    kept       the splits that subjects have already; new ones fill up what falls short of its share
    """
    subjects = {key_subject(scan.subject): scan.subject for scan in scans}
    known = {key_subject(subject): split for subject, split in kept.items()}
    kept = {subject: known[key] for key, subject in subjects.items() if key in known}
    abnormal = {scan.subject for scan in scans if scan.label == "abnormal"}
    for scan in scans:
        if scan.subject in abnormal and kept.get(scan.subject, "test") != "test":
            raise DataError(
                f"{scan.path}: subject {scan.subject} has an abnormal scan and stands in {kept[scan.subject]} from an "
                "earlier run; delete the processed folder and preprocess again"
            )
    normal = sorted({scan.subject for scan in scans} - abnormal)
    splits = dict.fromkeys(abnormal, "test") | {subject: kept[subject] for subject in normal if subject in kept}
    counts = Counter(splits[subject] for subject in normal if subject in splits)
    new = [subject for subject in normal if subject not in splits]
    random.Random(seed).shuffle(new)
    for subject in new:
        share = dict(zip(SPLITS, fractions, strict=True))
        splits[subject] = max(SPLITS, key=lambda split: share[split] * len(normal) - counts[split])
        counts[splits[subject]] += 1
    return [replace(scan, split=splits[scan.subject]) for scan in scans]


def refuse_mixture(what: str, sides: Iterable[tuple[bool, str | Path]]) -> None:
    """Raise DataError with the list of the fewer where some scans are `what` and others not; takes (is, path) pairs."""
    groups = {True: [], False: []}
    for side, path in sides:
        groups[bool(side)].append(str(path))
    if groups[True] and groups[False]:
        fewer = min(groups, key=lambda side: len(groups[side]))
        raise DataError(
            f"{len(groups[True])} scans {what} and {len(groups[False])} do not: a model would learn the difference; "
            f"bring all to one state or take away those that {'do' if fewer else 'do not'}: {', '.join(groups[fewer])}"
        )
