"""Finds the scans in a folder and knows whose they are: split, label, subject, session, masks."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "val", "test")
LABELS = ("normal", "abnormal")
ENDINGS = (".nii.gz", ".nii", ".img")  # an .img brings its .hdr along
CONTRAST = re.compile(r"[_-](T1w|T2w|FLAIR|PDw|T1|T2|PD)$", re.IGNORECASE)
# Names in which the subject is only a part: OASIS-1 and -2, OASIS-3, BIDS, IXI.
SUBJECTS = (r"OAS[12]_\d{4}", r"OAS3\d{4}", r"sub-[A-Za-z0-9]+", r"IXI\d{3}")
SESSIONS = (r"_(MR\d+)", r"_(?:ses-)?(d\d{4})", r"_(ses-[A-Za-z0-9]+)")


class DataError(ValueError):
    """Something is wrong with the user's data; the message is one line that names the file and the cure."""


@dataclass(frozen=True)
class Scan:
    """One volume on disk and what is known about it."""

    path: Path
    name: str  # the file's name without its ending: what the scan is called everywhere
    split: str
    label: str
    subject: str
    session: str
    brain_mask: Path | None
    lesion_mask: Path | None


def name_scan(path: Path) -> str:
    """`ID_T1w` for `.../ID_T1w.nii.gz`."""
    return next(path.name[: -len(ending)] for ending in ENDINGS if path.name.lower().endswith(ending))


def name_subject(name: str) -> tuple[str, str]:
    """(subject, session) from a scan's name; a name that follows no known pattern is a subject of its own."""
    found = (re.search(pattern, name) for pattern in SUBJECTS)
    subject = next((match.group() for match in found if match), CONTRAST.sub("", name))
    found = (re.search(pattern, name) for pattern in SESSIONS)
    return subject, next((match.group(1) for match in found if match), "")


def find_scans(raw: Path) -> list[Scan]:
    """All scans under `<raw>/{train,val,test}/{normal,abnormal}`, at any depth, sorted by split, label and name.

    Masks are looked for in `<raw>/<split>/masks` as `<id>_brain` and `<id>_lesion`, where id is the scan's name with
    or without its contrast (`_T1w`). Lesion masks belong to abnormal scans. Raises DataError where there are no
    scans, where two files would get one name, or where a subject stands in two splits.
    """
    if not raw.is_dir():
        raise DataError(f"{raw}: no such folder; give --raw the folder that holds train/, val/ and test/")
    scans = []
    for split in SPLITS:
        masks = {name_scan(path): path for path in _list_volumes(raw / split / "masks")}
        for label in LABELS:
            for path in _list_volumes(raw / split / label):
                name = name_scan(path)
                ids = (name, CONTRAST.sub("", name))
                brain, lesion = (
                    next((masks[f"{i}_{kind}"] for i in ids if f"{i}_{kind}" in masks), None)
                    for kind in ("brain", "lesion")
                )
                subject, session = name_subject(name)
                scans.append(
                    Scan(path, name, split, label, subject, session, brain, lesion if label == "abnormal" else None)
                )
    if not scans:
        raise DataError(
            f"{raw}: no scans (.nii, .nii.gz, .img) under train/, val/ or test/, normal/ or abnormal/; "
            f"put healthy scans into {raw / 'train' / 'normal'}"
        )
    _refuse_same_names(scans)
    refuse_leaks((scan.subject, scan.split, str(scan.path)) for scan in scans)
    return scans


def refuse_leaks(subjects) -> None:
    """Raise DataError if one subject stands in two splits; takes (subject, split, where) triples."""
    seen = {}
    for subject, split, where in subjects:
        other_split, other = seen.setdefault(subject, (split, where))
        if other_split != split:
            raise DataError(
                f"{where}: subject {subject} is in {split} and in {other_split} ({other}); "
                "all scans of a subject belong in one split, move or delete one side"
            )


def _list_volumes(folder: Path) -> list[Path]:
    files = (path for path in sorted(folder.rglob("*")) if path.name.lower().endswith(ENDINGS))
    return [path for path in files if not path.name.startswith(".")]


def _refuse_same_names(scans: list[Scan]) -> None:
    by_name = defaultdict(list)
    for scan in scans:
        by_name[scan.split, scan.label, scan.name].append(str(scan.path))
    for (_, _, name), paths in by_name.items():
        if len(paths) > 1:
            raise DataError(f"{paths[0]}: {paths[1]} would also be called {name}; rename one of them")
