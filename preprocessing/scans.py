"""Finds the scans in a folder: whose they are, their masks, and in a split/label tree their split and label."""

from __future__ import annotations

import json
import os
import re
import stat
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.cli import DataError
from preprocessing.folders import arrange_folder, read_mask_name
from preprocessing.layouts import CONTRAST, LAYOUTS, arrange, name_contrast, recognise
from preprocessing.subjects import find_ambiguous, strip_ending, unify
from preprocessing.vocabulary import ENDINGS

if TYPE_CHECKING:
    from preprocessing.dicom import Listing, Series

EXAMPLE = os.path.realpath(Path(__file__).resolve().parents[1] / "Dataset" / "example")  # scans to try
SPLITS = ("train", "val", "test")
STRIP = ("auto", "never", "always")  # whose brains are extracted: of heads without a mask, of none, of every scan
MODALITIES = ("t1", "t2", "flair", "t1ce")
DIAGNOSES = ("normal", "abnormal")
LABELS = (*DIAGNOSES, "unlabelled")  # of scans of which nobody has said yet; for testing alone
TREE = "split/label tree"
NO_SCAN = "a mask without a scan"


@dataclass(frozen=True)
class Scan:
    """One volume on disk and what is known about it; split and label are empty until they are known."""

    path: Path
    name: str  # the scan's name everywhere: usually the file's, without its ending
    split: str
    label: str
    subject: str
    session: str
    brain_mask: Path | None
    lesion_mask: Path | None
    axes: str | None = None  # where the stored axes point to, if the header does not say
    distrusted: str | None = None  # axes that are not believed where the header claims them
    age: float | None = None  # years
    sex: str | None = None  # "F" or "M"
    otherwise: str = ""  # the subject in another reading of the path (`subjects.Identity`)
    branch: str = ""  # folders above the subject's
    series: Series | None = None  # the DICOM series that `path` is made of, by the worker


class Search(NamedTuple):
    """What was found in a folder."""

    layout: str
    scans: list[Scan]
    left_out: list[tuple[str, str]]  # (path, why): not meant as scans
    refused: list[tuple[str, str]]  # (path, why and the cure): meant as scans, but unusable
    notes: tuple[str, ...] = ()  # lines for the user: how the values of the clinical table are read


def name_scan(path: Path) -> str:
    """`ID_T1w` for `.../ID_T1w.nii.gz`."""
    return spell(strip_ending(path.name))


def spell(name: str) -> str:
    """A file's name as text; bytes that are not UTF-8 as in URLs (%E9)."""
    return re.sub("[\udc80-\udcff]", lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", name)


def search(
    raw: Path,
    layout: str | None = None,
    modality: str = "t1",
    besides: Path | None = None,
    pattern: str | None = None,
    dicom: Listing | None = None,
) -> Search:
    """Find the scans under a folder, following symbolic links once and leaving out `besides` (the slice store).

    Each series of `dicom`, of the same folder, counts as a NIfTI file in its own folder.

    Where there is a tree `<raw>/{train,val,test}/{normal,abnormal}`, it gives split and label, and each of its folders
    may have any layout. Otherwise the layout is `layout` or the one that fits the paths best, and split and label are
    left empty. In the tree, masks are also looked for in `<raw>/<split>/masks` as `<id>_brain`, `<id>_lesion` or as
    tools name them, where id is the scan's name with or without its contrast (`_T1w`). Only abnormal scans have lesion
    masks.
    `pattern` finds the subject in each path; without it names are read (`subjects.identify`).
    """
    if not raw.is_dir():
        raise DataError(f"{raw}: no such folder; give --raw the folder that holds the scans")
    places = [(split, label) for split in SPLITS for label in LABELS if (raw / split / label).is_dir()]
    in_tree = bool(places) and layout in (None, TREE)
    series = {one.folder / one.target.name: one for one in dicom.series if not one.unfit} if dicom else {}
    if not in_tree:
        if layout == TREE:
            raise DataError(explain_no_scans(raw))
        found = _search_folder(raw, layout, modality, besides, pattern, series)
    else:
        parts = []
        for split in SPLITS:
            parts += _search_split(raw, split, modality, besides, pattern, series)
        layouts = sorted({part.layout for part in parts if part.scans} - {"folder"})
        name = f"{TREE} of {', '.join(layouts)}" if layouts else TREE
        found = Search(name, *(_join(lists) for lists in list(zip(*parts, strict=True))[1:]))
    scans, same_names = _part_same_names(unify(found.scans))
    unfit = [(str(one), one.unfit) for one in dicom.series if one.unfit] if dicom else []
    refused = found.refused + same_names + (dicom.refused if dicom else [])
    return found._replace(scans=scans, left_out=found.left_out + unfit, refused=refused)


def explain_no_scans(raw: Path, left_out: list[tuple[str, str]] = ()) -> str:
    """Why nothing can be preprocessed; where all files show another contrast, the --modality to give."""
    others = sorted({name_contrast(path) for path, why in left_out if why.startswith("shows ")} & {*MODALITIES})
    if others:
        return f"{raw}: its scans show {' and '.join(others)}; give --modality {others[0]}"
    return (
        f"{raw}: holds no scans ({', '.join(ENDINGS)}, DICOM series) that fit its layout; put healthy scans into "
        f"{raw / 'train' / 'normal'}, or give --raw another folder"
    )


def list_volumes(folder: Path, besides: Path | None = None) -> list[Path]:
    """The image files under a folder in order of path; each folder once, though links may lead to it in circles."""
    return walk(folder, besides)[0]


def walk(
    folder: Path, besides: Path | None = None, is_wanted: Callable[[str], bool] | None = None
) -> tuple[list[Path], list[tuple[Path, str]], list[tuple[Path, str]]]:
    """(image files; special files with such names, with why; folders that cannot be read, with why).

    is_wanted  tells the files to list by their names, instead of image files
    """
    is_wanted = is_wanted or (lambda name: name.lower().endswith(ENDINGS))
    seen = {os.path.realpath(besides)} if besides else set()
    seen |= {EXAMPLE} - {os.path.realpath(folder)}  # it lies in the default --raw, and is nobody's data
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
        for path in (Path(place, name) for name in names if is_wanted(name) and name[0] != "."):
            if _is_special(path):
                passed_over.append((path, "not a regular file"))
            else:
                files.append(path)
    return sorted(files), sorted(passed_over), sorted(closed)


def _is_special(path: Path) -> bool:
    """Whether it is a fifo, a device or a socket, which may block for ever; a missing file is not."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def explain_ambiguous(scans: list[Scan], raw: Path) -> str:
    """Examples of the subjects chosen where names can be read in two ways and it matters; else ""."""
    ambiguous = find_ambiguous(scans)
    if not ambiguous:
        return ""
    examples = {}
    for scan in (scans[index] for index in ambiguous):
        reading = f" rather than {scan.otherwise}" if scan.otherwise else f" in {scan.branch}" if scan.branch else ""
        where = scan.path.relative_to(raw) if scan.path.is_relative_to(raw) else scan.path
        examples.setdefault(scan.subject, f"{where} is of {scan.subject}{reading}")
    return (
        f"{len(ambiguous)} names can be read in two ways; taken: {'; '.join(list(examples.values())[:3])}. If that is "
        "wrong, give the subjects with --subject-pattern REGEX, the subject in parentheses, or in a column `subject` "
        "of --clinical"
    )


def _search_folder(
    folder: Path,
    layout: str | None,
    modality: str,
    besides: Path | None,
    pattern: str | None,
    series: dict[Path, Series],
) -> Search:
    files, passed_over, closed = walk(folder, besides)
    files += [path for path in series if path.is_relative_to(folder)]
    paths = [path.relative_to(folder).as_posix() for path in files]
    rules = LAYOUTS[layout] if layout else recognise(paths, modality)
    if modality not in rules.modalities:
        raise DataError(f"{folder}: the layout {rules.name} has no {modality}; it has {', '.join(rules.modalities)}")
    if rules.name == "folder":
        found, left_out = arrange_folder(paths, modality, pattern, _read_channels(folder))
    else:
        found, left_out = arrange(rules, paths, modality, pattern)
    unknown = [str(folder / one.path) for one in found if one.identity is None]
    refused = [(path, f"{path}: --subject-pattern matches nothing in it; widen the pattern") for path in unknown]
    scans = [
        Scan(
            path=series[folder / one.path].target if folder / one.path in series else folder / one.path,
            name=spell(one.name),
            split="",
            label="",
            subject=spell(one.identity.subject),
            session=spell(one.identity.session),
            brain_mask=folder / one.brain_mask if one.brain_mask else None,
            lesion_mask=folder / one.lesion_mask if one.lesion_mask else None,
            axes=one.axes,
            distrusted=one.distrusted,
            otherwise=one.identity.otherwise,
            branch=one.identity.branch,
            series=series.get(folder / one.path),
        )
        for one in found
        if one.identity
    ]
    left_out = [(str(series.get(folder / path, folder / path)), why) for path, why in left_out]
    left_out += [(str(path), why) for path, why in passed_over]
    return Search(rules.name, scans, left_out, refused + [(str(path), why) for path, why in closed])


def _search_split(
    raw: Path, split: str, modality: str, besides: Path | None, pattern: str | None, series: dict[Path, Series]
) -> list[Search]:
    """What the split of a tree holds: of each label, and the masks beside that no scan has."""
    labels, masks = [label for label in LABELS if (raw / split / label).is_dir()], _index_masks(raw / split / "masks")
    parts = []
    for label in labels:
        part = _search_folder(raw / split / label, None, modality, besides, pattern, series)
        parts.append(part._replace(scans=[_place(scan, split, label, masks) for scan in part.scans]))
    return [*parts, Search("folder", [], _list_unused(masks, parts), [])]


def _read_channels(folder: Path) -> dict[int, str]:
    """Contrasts by nnU-Net's channel number, as the dataset.json of the folder says; {} where none does."""
    try:
        with open(folder / "dataset.json", encoding="utf-8") as file:
            record = json.loads(file.read(1_000_000))
        names = record.get("channel_names") or record["modality"]
        return {int(number): name_contrast(str(name)) or "another contrast" for number, name in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _index_masks(folder: Path) -> dict[tuple[str, str], Path]:
    """{(kind, whose): path} as `folders.read_mask_name` reads them; ("", name) of those that it cannot read."""
    masks = {}
    for path in list_volumes(folder):
        kind, whose = read_mask_name(name_scan(path))
        masks.setdefault((kind, whose or name_scan(path)), path)
    return masks


def _place(scan: Scan, split: str, label: str, masks: dict[tuple[str, str], Path]) -> Scan:
    """The scan with the split, label and masks that the tree gives it."""
    whose = CONTRAST.sub("", scan.name).lower()
    lesion = masks.get(("lesion", whose)) or scan.lesion_mask
    return replace(
        scan,
        split=split,
        label=label,
        brain_mask=masks.get(("brain mask", whose)) or scan.brain_mask,
        lesion_mask=lesion if label == "abnormal" else None,
    )


def _list_unused(masks: dict[tuple[str, str], Path], parts: list[Search]) -> list[tuple[str, str]]:
    """[(path, why)] of the masks that no scan has."""
    scans = [scan for part in parts for scan in part.scans]
    used = {mask for scan in scans for mask in (scan.brain_mask, scan.lesion_mask)}
    normal = {CONTRAST.sub("", scan.name).lower() for scan in scans if scan.label == "normal"}
    return [
        (str(path), "a lesion mask, but its scan is normal" if (kind, whose in normal) == ("lesion", True) else NO_SCAN)
        for (kind, whose), path in masks.items()
        if path not in used
    ]


def _join(lists):
    return [one for part in lists for one in part]


def _part_same_names(scans: list[Scan]) -> tuple[list[Scan], list[tuple[str, str]]]:
    """(the scans with unique names, [(path, why)] of those that share one)."""
    by_name = defaultdict(list)
    for scan in scans:
        by_name[scan.split, scan.label, scan.name].append(scan)
    alone = [same[0] for same in by_name.values() if len(same) == 1]
    refused = []
    for same in by_name.values():
        for scan, other in zip(same, same[1:] + same[:1], strict=True):
            if scan is not other:
                why = f"{scan.path}: {other.path} would have the same name, {scan.name}; rename one of them"
                refused.append((str(scan.path), why))
    return alone, refused
