"""What a worker does with one scan, on this machine or on another."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.cli import DataError
from preprocessing.geometry import cut_stack
from preprocessing.scans import Scan, name_scan
from preprocessing.store import LoadedScan, read_scan, write_scan
from preprocessing.volume import Volume, find_brain, read_mask, read_volume

FORMAT = 3  # of what is written; raise it when the same scan would give other slices
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
    """Bring one scan from its file into the store. Returns ("done" | "unchanged" | "skipped", why it was skipped)."""
    folder = processed / scan.split / scan.label / scan.name
    try:
        made_with = _describe(scan, settings)
        old = read_scan(folder)
        if old and all(old.record.get(key) == value for key, value in made_with.items()):
            return "unchanged", ""
        loaded, volume = _cut(scan.path, scan.brain_mask, settings, scan.axes, scan.distrusted)
        record = {"scan": scan.name, "source": str(scan.path)}
        lesion = None
        if scan.lesion_mask:
            mask = read_mask(scan.lesion_mask, volume, scan.axes, scan.distrusted)
            lesion = loaded.geometry.cut_mask(mask)
            # on the scan's own grid
            record["lesion_voxels"] = mask.sum(axis=(0, 1))[list(loaded.geometry.slices)].tolist()
        geometry = loaded.geometry.to_record() | {"scale": list(loaded.scale), "skull_off": loaded.skull_off}
        try:
            write_scan(folder, loaded.stack, lesion, record | made_with | geometry)
        except OSError as error:
            raise DataError(
                f"{folder}: cannot be written ({error}); free some space or give another --processed"
            ) from error
        return "done", ""
    except MemoryError:
        return "skipped", f"{scan.path}: does not fit into memory; use fewer --workers"
    except OSError as error:
        return "skipped", f"{scan.path}: cannot be read ({error.strerror}); copy it again"
    except DataError as error:
        return "skipped", " ".join(str(error).split())


def cut_scan(path: Path, brain_mask: Path | None, settings: CutSettings, axes: str | None = None) -> LoadedScan:
    """A scan straight from its file, cut as preprocessing cuts it. Raises DataError with the cure.

    axes  where the stored axes point to, for a file whose header does not say; a header that does is believed
    """
    try:
        return _cut(path, brain_mask, settings)[0]
    except DataError:
        if axes is None:
            raise
    loaded = _cut(path, brain_mask, settings, axes)[0]
    return replace(loaded, warnings=(f"its header does not give its orientation; {axes} is taken on trust",))


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
    loaded = LoadedScan(name, "", name, str(path), stack, None, geometry, scale, skull_off, brain_ml=brain_ml)
    return loaded, volume


def _describe(scan: Scan, settings: CutSettings) -> dict:
    """All that decides what is stored of a scan: where it is unchanged, so is the result."""
    files = [path for path in (scan.path, scan.brain_mask, scan.lesion_mask) if path]
    return {
        "format": FORMAT,
        "sources": {path.name: _hash_file(path) for path in files},
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


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if sys.version_info >= (3, 11)
            else hashlib.sha256(file.read()).hexdigest()
        )
