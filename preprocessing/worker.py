"""What a worker does with one scan, on this machine or on another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.cli import DataError, explain
from preprocessing.geometry import cut_stack
from preprocessing.identity import hash_file, hash_voxels
from preprocessing.scans import Scan, name_scan
from preprocessing.store import LoadedScan, StoredScan, change_record, read_scan, withdraw, write_scan
from preprocessing.volume import Volume, find_brain, read_mask, read_volume

FORMAT = 3  # of what is written; raise it when the same scan would give other slices
MOST_NAME_BYTES = 200  # a file system takes 255, and files that are made of a scan have longer names
FOV_MM = {True: 200.0, False: 256.0}  # side of a slice, by whether the skull is off


@dataclass(frozen=True)
class CutSettings:
    """How scans are cut.

    keep    share of the axial slices, the middle ones, (0, 1]
    size    pixels along each side of a slice
    fov_mm  side of a slice in mm; None: 200 for brains, 256 for heads
    volume  which volume of a file with several, from 0
    """

    keep: float
    size: int
    fov_mm: float | None = None
    volume: int | None = None


def preprocess_scan(scan: Scan, processed: Path, settings: CutSettings) -> tuple[str, str]:
    """Bring one scan from its file into the store. Returns ("done" | "unchanged" | "skipped", why it was skipped).

    Where its file can no longer be used, the slices that were made of it are taken out of the store.
    """
    folder = processed / scan.split / scan.label / scan.name
    if len(scan.name.encode()) > MOST_NAME_BYTES:
        return "skipped", f"{scan.path}: its name takes more than {MOST_NAME_BYTES} bytes; give it a shorter one"
    try:
        made_with = _describe(scan, settings)
        old = _find_old(folder, made_with)
        if old is None:
            loaded, lesion = _read(scan, settings)
    except MemoryError:
        return "skipped", f"{scan.path}: does not fit into memory; use fewer --workers"
    except OSError as error:
        why = f"{error.filename or scan.path}: cannot be read ({error.strerror}); copy it again"
        return "skipped", why + _withdraw(folder)
    except DataError as error:
        return "skipped", " ".join(str(error).split()) + _withdraw(folder)
    try:
        if old is None:
            record = {"scan": scan.name, "source": str(scan.path), "content": loaded.hashes[0]}
            record |= {} if lesion is None else {"lesion_voxels": list(loaded.lesion_voxels)}
            place = loaded.geometry.to_record() | {"scale": list(loaded.scale), "skull_off": loaded.skull_off}
            write_scan(folder, loaded.stack, lesion, record | made_with | place)
            return "done", ""
        if old.record["source"] != str(scan.path):  # the whole folder was moved
            change_record(folder, source=str(scan.path))
        return "unchanged", ""
    except OSError as error:
        return "skipped", f"{folder}: cannot be written ({explain(error)})"
    except DataError as error:
        return "skipped", " ".join(str(error).split())


def cut_scan(path: Path, brain_mask: Path | None, settings: CutSettings, axes: str | None = None) -> LoadedScan:
    """A scan straight from its file, cut as preprocessing cuts it. Raises DataError with the cure.

    axes  where the stored axes point to, for a file whose header does not say; a header that does is believed
    """
    try:
        loaded = _cut(path, brain_mask, settings)[0]
    except DataError:
        if axes is None:
            raise
        loaded = _cut(path, brain_mask, settings, axes)[0]
        loaded = replace(loaded, warnings=(f"its header does not give its orientation; {axes} is taken on trust",))
    return replace(loaded, hashes=(*loaded.hashes, hash_file(path)[:32]))


def _find_old(folder: Path, made_with: dict) -> StoredScan | None:
    """The scan as it stands in the store, if it was made with the same of the same files."""
    try:
        old = read_scan(folder)
    except DataError:  # its record is bad, so it is made again
        return None
    same = old and "content" in old.record and all(old.record.get(key) == value for key, value in made_with.items())
    return old if same else None


def _withdraw(folder: Path) -> str:
    """Take what was made of a file that is no good any more out of the store; returns words for the message."""
    if not (folder / "scan.json").exists():
        return ""
    try:
        return f"; its old slices are no longer used, they lie in {withdraw(folder)}"
    except OSError as error:
        return f"; its old slices in {folder} cannot be moved away ({error.strerror}), delete them"


def _read(scan: Scan, settings: CutSettings) -> tuple[LoadedScan, np.ndarray | None]:
    """(the scan, cut; its lesion mask (n, size, size) or None)."""
    loaded, volume = _cut(scan.path, scan.brain_mask, settings, scan.axes, scan.distrusted)
    if not scan.lesion_mask:
        return loaded, None
    mask = read_mask(scan.lesion_mask, volume, scan.axes, scan.distrusted)
    counts = mask.sum(axis=(0, 1))[list(loaded.geometry.slices)].tolist()  # on the scan's own grid
    return replace(loaded, lesion_voxels=tuple(counts)), loaded.geometry.cut_mask(mask)


def _cut(
    path: Path, brain_mask: Path | None, settings: CutSettings, axes: str | None = None, distrusted: str | None = None
) -> tuple[LoadedScan, Volume]:
    volume = read_volume(path, axes, distrusted, settings.volume)
    brain, skull_off = (read_mask(brain_mask, volume, axes, distrusted), True) if brain_mask else find_brain(volume)
    if not brain.any():
        raise DataError(f"{path}: is the same everywhere, no brain is seen; convert it again from its source")
    fov_mm = settings.fov_mm or FOV_MM[skull_off]
    try:
        stack, geometry, scale = cut_stack(volume, brain, skull_off, settings.keep, settings.size, fov_mm)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    name = name_scan(path)
    brain_ml = float(np.count_nonzero(brain) * np.prod(volume.spacing_mm) / 1000)
    hashes = (hash_voxels(volume.values, volume.spacing_mm),)
    loaded = LoadedScan(name, "", name, str(path), stack, None, geometry, scale, skull_off, brain_ml=brain_ml)
    return replace(loaded, hashes=hashes), volume


def _describe(scan: Scan, settings: CutSettings) -> dict:
    """All that decides what is stored of a scan: where it is unchanged, so is the result."""
    sources = {}
    for path in (scan.path, scan.brain_mask, scan.lesion_mask):
        if path:  # a mask may be called as its scan is, in another folder
            sources[str(path) if path.name in sources else path.name] = hash_file(path)
    return {
        "format": FORMAT,
        "sources": sources,
        "subject": scan.subject,
        "session": scan.session,
        "age": scan.age,
        "sex": scan.sex,
        "keep": settings.keep,
        "fov_mm": settings.fov_mm,
        "size": settings.size,
        "volume": settings.volume,
        "axes_rule": [scan.axes, scan.distrusted],
    }
