"""Finds the scans in a folder: whose they are, their masks, and in a split/label tree their split and label."""

from __future__ import annotations

import os
import re
import stat
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from common.cli import DataError
from preprocessing.layouts import CONTRAST, ENDINGS, LAYOUTS, arrange, recognise, strip_ending

SPLITS = ("train", "val", "test")
LABELS = ("normal", "abnormal")
TREE = "split/label tree"


@dataclass(frozen=True)
class Scan:
    """One volume on disk and what is known about it; split and label are empty until they are known."""

    path: Path
    name: str  # what the scan is called everywhere: the file's name without its ending, as a rule
    split: str
    label: str
    subject: str
    session: str
    brain_mask: Path | None
    lesion_mask: Path | None
    axes: str | None = None  # where the stored axes point to, if the header does not say
    distrusted: str | None = None  # axes that are not believed where the header says them
    age: float | None = None  # years
    sex: str | None = None  # "F" or "M"


class Search(NamedTuple):
    """What was found in a folder."""

    layout: str
    scans: list[Scan]
    left_out: list[tuple[str, str]]  # (path, why): not meant to be used
    refused: list[tuple[str, str]]  # (path, why and its cure): meant, but cannot be used


def name_scan(path: Path) -> str:
    """`ID_T1w` for `.../ID_T1w.nii.gz`."""
    return spell(strip_ending(path.name))


def spell(name: str) -> str:
    """A file's name as text: what is no UTF-8 in it, in the way of URLs."""
    return re.sub("[\udc80-\udcff]", lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", name)


def search(raw: Path, layout: str | None = None, modality: str = "t1", besides: Path | None = None) -> Search:
    """Find the scans under a folder, symbolic links followed once, `besides` (the slice store) left alone.

    Where there is a tree `<raw>/{train,val,test}/{normal,abnormal}`, it gives split and label, and each of its folders
    may have any layout. Otherwise the layout is `layout` or the one that fits the paths best, and split and label are
    left empty. In the tree, masks are also looked for in `<raw>/<split>/masks` as `<id>_brain` and `<id>_lesion`, where
    id is the scan's name with or without its contrast (`_T1w`). Only abnormal scans have lesion masks.
    """
    if not raw.is_dir():
        raise DataError(f"{raw}: no such folder; give --raw the folder that holds the scans")
    places = [(split, label) for split in SPLITS for label in LABELS if (raw / split / label).is_dir()]
    in_tree = bool(places) and layout in (None, TREE)
    if not in_tree:
        if layout == TREE:
            raise DataError(explain_no_scans(raw))
        found = _search_folder(raw, layout, modality, besides)
    else:
        parts = []
        for split, label in places:
            part = _search_folder(raw / split / label, None, modality, besides)
            masks = {name_scan(path): path for path in list_volumes(raw / split / "masks")}
            parts.append(part._replace(scans=[_place(scan, split, label, masks) for scan in part.scans]))
        layouts = sorted({part.layout for part in parts if part.scans} - {"folder"})
        name = f"{TREE} of {', '.join(layouts)}" if layouts else TREE
        found = Search(name, *(_join(lists) for lists in list(zip(*parts, strict=True))[1:]))
    scans, same_names = _part_same_names(found.scans)
    return found._replace(scans=scans, refused=found.refused + same_names)


def explain_no_scans(raw: Path) -> str:
    return (
        f"{raw}: no scans ({', '.join(ENDINGS)}) in it that its layout knows; put healthy scans into "
        f"{raw / 'train' / 'normal'}, or give --raw another folder"
    )


def list_volumes(folder: Path, besides: Path | None = None) -> list[Path]:
    """The image files under a folder in order of path; each folder once, though links may lead to it in circles."""
    return walk(folder, besides)[0]


def walk(
    folder: Path, besides: Path | None = None
) -> tuple[list[Path], list[tuple[Path, str]], list[tuple[Path, str]]]:
    """(image files; those that are none but by their name, with why; folders that cannot be read, with why)."""
    seen = {os.path.realpath(besides)} if besides else set()
    files, passed_over, closed = [], [], []

    def note(error: OSError) -> None:
        path = Path(error.filename)
        closed.append((path, f"{path}: cannot be read ({error.strerror}), nor what is in it; allow access to it"))

    for place, folders, names in os.walk(folder, followlinks=True, onerror=note):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(place, name) for name in names if name.lower().endswith(ENDINGS) and name[0] != "."):
            if _is_special(path):
                passed_over.append((path, "no regular file"))
            else:
                files.append(path)
    return sorted(files), sorted(passed_over), sorted(closed)


def _is_special(path: Path) -> bool:
    """Whether it is a fifo, a device or a socket, which reading may never end; a file that is lost is not."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _search_folder(folder: Path, layout: str | None, modality: str, besides: Path | None) -> Search:
    files, passed_over, closed = walk(folder, besides)
    paths = [path.relative_to(folder).as_posix() for path in files]
    rules = LAYOUTS[layout] if layout else recognise(paths, modality)
    if modality != "t1" and modality not in rules.modalities:
        raise DataError(f"{folder}: the layout {rules.name} has no {modality}; it has {', '.join(rules.modalities)}")
    found, left_out = arrange(rules, paths, modality)
    scans = [
        Scan(
            path=folder / one.path,
            name=spell(one.name),
            split="",
            label="",
            subject=spell(one.subject),
            session=spell(one.session),
            brain_mask=folder / one.brain_mask if one.brain_mask else None,
            lesion_mask=folder / one.lesion_mask if one.lesion_mask else None,
            axes=one.axes,
            distrusted=one.distrusted,
        )
        for one in found
    ]
    left_out = [(str(folder / path), why) for path, why in left_out] + [(str(path), why) for path, why in passed_over]
    return Search(rules.name, scans, left_out, [(str(path), why) for path, why in closed])


def _place(scan: Scan, split: str, label: str, masks: dict[str, Path]) -> Scan:
    """The scan with what the tree says about it."""
    ids = (scan.name, CONTRAST.sub("", scan.name))
    brain, lesion = (
        next((masks[f"{i}_{kind}"] for i in ids if f"{i}_{kind}" in masks), None) for kind in ("brain", "lesion")
    )
    return replace(
        scan,
        split=split,
        label=label,
        brain_mask=brain or scan.brain_mask,
        lesion_mask=(lesion or scan.lesion_mask) if label == "abnormal" else None,
    )


def _join(lists):
    return [one for part in lists for one in part]


def _part_same_names(scans: list[Scan]) -> tuple[list[Scan], list[tuple[str, str]]]:
    """(the scans that have their name alone, those that share one with why)."""
    by_name = defaultdict(list)
    for scan in scans:
        by_name[scan.split, scan.label, scan.name].append(scan)
    alone = [same[0] for same in by_name.values() if len(same) == 1]
    refused = []
    for same in by_name.values():
        for scan, other in zip(same, same[1:] + same[:1], strict=True):
            if scan is not other:
                why = f"{scan.path}: {other.path} would also be called {scan.name}; rename one of them"
                refused.append((str(scan.path), why))
    return alone, refused
