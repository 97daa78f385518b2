"""Which scan is normal and which split it goes to: labels, splits by subject, and refusals of leaks and mixed sets."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.cli import DataError, log
from preprocessing.clinical import Clinical, read_clinical
from preprocessing.dicom import Listing
from preprocessing.scans import LABELS, SPLITS, TREE, Scan, Search, explain_no_scans, search
from preprocessing.store import StoredScan, list_scans
from preprocessing.subjects import key_subject


@dataclass(frozen=True)
class CohortRules:
    """How a folder becomes a cohort.

    layout           how the folder is laid out; None: the layout that fits its paths best
    modality         the contrast to take
    pattern          a regular expression searched in each path, its group is the subject; None: read from names
    clinical         the clinical table
    normal_values    more values of the table that mean a healthy person
    abnormal_values  more values of the table that mean a patient
    label            label of all scans, where there is no table
    blank            label of the scans whose cell in the table is empty; None leaves them out
    fractions        shares of the normal subjects for train, val and test, summing to 1
    seed             of the split
    axes             where the stored axes point, if the header does not say; None: the layout's
    """

    layout: str | None = None
    modality: str = "t1"
    pattern: str | None = None
    clinical: Path | None = None
    normal_values: tuple[str, ...] = ()
    abnormal_values: tuple[str, ...] = ()
    label: str | None = None
    blank: str | None = None
    fractions: tuple[float, ...] = (0.8, 0.1, 0.1)
    seed: int = 0
    axes: str | None = None


def plan(
    raw: Path,
    processed: Path,
    rules: CohortRules,
    stored: list[StoredScan],
    splits: dict[str, str],
    dicom: Listing | None = None,
) -> Search:
    """Find the scans and give each its label and split; no file is read but the clinical table.

    stored  what the slice store `processed` holds: its subjects keep their split
    splits  {subject: split} of an earlier plan, whose scans may not be in the store yet
    dicom   the DICOM series below `raw`
    """
    found = search(raw, rules.layout, rules.modality, processed, rules.pattern, dicom)
    if not found.scans:
        raise DataError(found.refused[0][1] if found.refused else explain_no_scans(raw, found.left_out))
    in_tree = found.layout.startswith(TREE)
    if in_tree and rules.label:
        raise DataError(f"{raw}: its folders give the labels already; leave --label out")
    if not (in_tree or rules.label or rules.clinical):
        raise DataError(
            f"{raw}: it is unknown which of its {len(found.scans)} scans are normal; give the clinical table with "
            "--clinical FILE, or --label normal (split by subject) or --label abnormal (all for testing); --label "
            "unlabelled where nobody knows (all for testing)"
        )
    scans, clinical = found.scans, None
    if rules.clinical:
        needs_labels = not (in_tree or rules.label)
        clinical = read_clinical(rules.clinical, rules.normal_values, rules.abnormal_values, needs_labels)
        scans = clinical.name_persons(scans)
        found = found._replace(notes=tuple(clinical.describe(rules.blank if needs_labels else None)))
    scans, not_labelled = label_scans(scans, clinical, rules.label, rules.blank)
    subjects = {scan.name: scan.subject for scan in scans}  # as names are read now, even if the store has it otherwise
    kept = [(subjects.get(old.name, old.subject), old.split, str(old.folder)) for old in stored]
    if not in_tree:
        refuse_leaks(kept)
        splits = splits | {subject: split for subject, split, _ in kept}
        scans = split_subjects(scans, rules.fractions, rules.seed, splits)
    if rules.axes:
        scans = [replace(scan, axes=rules.axes, distrusted=None) for scan in scans]
    scans.sort(key=lambda scan: (SPLITS.index(scan.split), LABELS.index(scan.label), scan.name))
    if not scans:
        raise DataError(f"{raw}: none of its {len(found.scans)} scans has a label; {not_labelled[0][1]}")
    refuse_relabelled(scans, stored)
    refuse_leaks([(scan.subject, scan.split, str(scan.path)) for scan in scans] + kept)
    refuse_mixture("have a brain mask", ((scan.brain_mask is not None, scan.path) for scan in scans))
    return found._replace(scans=scans, left_out=found.left_out + not_labelled)


def label_scans(
    scans: list[Scan], clinical: Clinical | None, label: str | None, blank: str | None
) -> tuple[list[Scan], list[tuple[str, str]]]:
    """Give each scan its label, age and sex; returns (scans, [(path, why it is left out)]).

    A scan keeps the label that it has from the split/label tree; DataError is raised where the table contradicts it.
    `label` is that of all scans and must not contradict the table either, `blank` that of scans whose cell in the table
    is empty (None leaves them out).
    """
    labelled, left_out = [], []
    for scan in scans:
        row = clinical.find(scan) if clinical else None
        if row:
            scan = replace(scan, age=row.age, sex=row.sex)
            known = scan.label or label
            if known and row.label and row.label != known:
                where, cure = (
                    (f"is in a folder of {known} scans", "move it")
                    if scan.label
                    else (f"--label is {known}", "leave it out")
                )
                raise DataError(f"{scan.path}: {where} and is {row.label} in {clinical.path}; {cure}")
        given = scan.label or label or (row and (row.label or blank))
        if given:
            lesion_mask = scan.lesion_mask if given == "abnormal" else None  # a normal scan has no lesion
            labelled.append(replace(scan, label=given, lesion_mask=lesion_mask))
        elif row:
            why = (
                f"its {clinical.judged_by} is blank in {clinical.path.name}; --blank-cdr normal would take it as normal"
            )
            left_out.append((str(scan.path), why))
        else:
            left_out.append((str(scan.path), clinical.explain(scan)))
    return labelled, left_out


def split_subjects(scans: list[Scan], fractions: tuple[float, ...], seed: int, kept: dict[str, str]) -> list[Scan]:
    """Give each scan its split: all of a subject in one, subjects with an abnormal or unlabelled scan in test.

    fractions  shares of the normal subjects for train, val and test, summing to 1
    kept       the splits that subjects have already; new subjects go where the share is not reached
    """
    subjects = {key_subject(scan.subject): scan.subject for scan in scans}
    known = {key_subject(subject): split for subject, split in kept.items()}
    kept = {subject: known[key] for key, subject in subjects.items() if key in known}
    abnormal = {scan.subject: scan.label for scan in scans if scan.label != "normal"}
    for scan in scans:
        if scan.subject in abnormal and kept.get(scan.subject, "test") != "test":
            raise DataError(
                f"{scan.path}: subject {scan.subject} has an {abnormal[scan.subject]} scan and is in "
                f"{kept[scan.subject]} from an earlier run; delete the processed folder and preprocess again"
            )
    normal = sorted({scan.subject for scan in scans} - abnormal.keys())
    splits = dict.fromkeys(abnormal, "test") | {subject: kept[subject] for subject in normal if subject in kept}
    counts = Counter(splits[subject] for subject in normal if subject in splits)
    new = [subject for subject in normal if subject not in splits]
    random.Random(seed).shuffle(new)
    for subject in new:
        share = dict(zip(SPLITS, fractions, strict=True))
        splits[subject] = max(SPLITS, key=lambda split: share[split] * len(normal) - counts[split])
        counts[splits[subject]] += 1
    return [replace(scan, split=splits[scan.subject]) for scan in scans]


def refuse_relabelled(scans: list[Scan], stored: list[StoredScan]) -> None:
    """Raise DataError where the store holds a scan under a label that it no longer has.

    A name under both labels is two scans (before and after treatment); under the other label alone, it was relabelled.
    """
    planned = {(scan.split, scan.label, scan.name) for scan in scans}
    for old in stored:
        now = [label for label in LABELS if (old.split, label, old.name) in planned]
        if now and old.label not in now:
            raise DataError(f"{old.folder}: is {old.split}/{now[0]} now; delete this folder and preprocess again")


def refuse_leaks(subjects: Iterable[tuple[str, str, str]]) -> None:
    """Raise DataError if one subject, however spelled, is in two splits; takes (subject, split, where) triples."""
    seen = {}
    for subject, split, where in subjects:
        other_split, other = seen.setdefault(key_subject(subject), (split, where))
        if other_split != split:
            raise DataError(
                f"{where}: subject {subject} is in {split} and in {other_split} ({other}); "
                "all scans of a subject belong in one split, move or delete one side"
            )


def explain_no_slices(data: Path, folders: Sequence[str]) -> str:
    """What is wrong with a folder that holds no slices in any of these folders, with the cure for --data."""
    if not data.is_dir():
        return f"{data}: no such folder; run preprocessing/preprocess_oasis.py first, or correct --data"
    if (data / "model.pt").exists():
        return f"{data}: holds a model, not slices; give it as --run, and the slices as --data"
    wanted = " or ".join(f"{folder}/" for folder in folders)
    around = [data.parent, data.parent.parent, *sorted(path for path in data.iterdir() if path.is_dir())]
    for near in around:
        if any(next(list_scans(near / folder), None) for folder in folders):
            return f"{data}: no slices in {wanted}; give --data {near}, which has some"
    return f"{data}: no slices in {wanted}; run preprocessing/preprocess_oasis.py first"


def refuse_copies(sides: Iterable[tuple[str, StoredScan]]) -> None:
    """Raise DataError if one scan, whatever it is called, is on two sides; takes (side, scan) pairs.

    Copies on the same side are warned of: they count twice.
    """
    seen, copies = {}, []
    for side, scan in sides:
        others = [seen.setdefault(one, (side, scan)) for one in scan.hashes]
        for other_side, other in others:
            if other_side != side:
                raise DataError(
                    f"{scan.folder}: holds the same scan as {other.folder}, one is in {side} and one in {other_side}; "
                    f"delete one of {scan.origin} and {other.origin}"
                )
        copies += [(scan, other) for _, other in others[:1] if other is not scan]
    if copies:
        (scan, other), more = copies[0], f", and {len(copies) - 1} more such" if copies[1:] else ""
        log.warning("%s", f"{scan.folder}: holds the same scan as {other.folder}{more}; it counts twice, delete one")


def find_withdrawn(raw: Path, scans: list[Scan], stored: list[StoredScan]) -> list[StoredScan]:
    """The stored scans that came from this folder and are no longer among its scans."""
    planned, top = {(scan.split, scan.label, scan.name) for scan in scans}, os.path.abspath(raw)
    gone = [old for old in stored if (old.split, old.label, old.name) not in planned]
    return [old for old in gone if Path(os.path.abspath(old.origin)).is_relative_to(top)]


def refuse_mixture(what: str, sides: Iterable[tuple[bool, str | Path]]) -> None:
    """Raise DataError where some scans are `what` and others not, listing the fewer; takes (whether, path) pairs."""
    groups = {True: [], False: []}
    for side, path in sides:
        groups[bool(side)].append(str(path))
    if groups[True] and groups[False]:
        fewer = min(groups, key=lambda side: len(groups[side]))
        raise DataError(
            f"{len(groups[True])} scans {what} and {len(groups[False])} do not: a model would learn the difference; "
            f"make all alike or remove those that {'do' if fewer else 'do not'}: {', '.join(groups[fewer])}"
        )
