"""What a worker does with one scan, on this machine or on another."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from preprocessing.scans import DataError, Scan
from preprocessing.slices import read_scan, write_scan
from preprocessing.volume import cut_mask, cut_stack, find_brain, read_mask, read_volume

FORMAT = 3  # of what is written; raise it when the same scan would give other slices


def preprocess_scan(
    scan: Scan, processed: Path, keep: float, size: int, fov_mm: float | None, volume_index: int | None = None
) -> tuple[str, str]:
    """Bring one scan from its file into the store. Returns ("done" | "unchanged" | "skipped", why it was skipped)."""
    folder = processed / scan.split / scan.label / scan.name
    try:
        files = [path for path in (scan.path, scan.brain_mask, scan.lesion_mask) if path]
        settings = {
            "format": FORMAT,
            "sources": {path.name: _hash_file(path) for path in files},
            "subject": scan.subject,
            "session": scan.session,
            "age": scan.age,
            "sex": scan.sex,
            "keep": keep,
            "fov_mm": fov_mm,
            "size": size,
            "volume": volume_index,
            "axes_rule": [scan.axes, scan.doubted],
        }
        old = read_scan(folder)
        if old and all(old.record.get(key) == value for key, value in settings.items()):
            return "unchanged", ""
        volume = read_volume(scan.path, scan.axes, scan.doubted, volume_index)
        rule = (volume, scan.axes, scan.doubted)
        brain, skull_off = (read_mask(scan.brain_mask, *rule), True) if scan.brain_mask else find_brain(volume)
        if not brain.any():
            raise DataError(f"{scan.path}: is the same everywhere, no brain is seen; convert it again from its source")
        fov = fov_mm or (200.0 if skull_off else 256.0)
        try:
            stack, geometry = cut_stack(volume, brain, skull_off, keep, size, fov)
        except DataError as error:
            raise DataError(f"{scan.path}: {error}") from error
        record = {"scan": scan.name, "source": str(scan.path)}
        lesion = None
        if scan.lesion_mask:
            mask = read_mask(scan.lesion_mask, *rule)
            lesion = cut_mask(mask, geometry)
            record["lesion_voxels"] = mask.sum(axis=(0, 1))[geometry["slices"]].tolist()  # on the scan's own grid
        try:
            write_scan(folder, stack, lesion, record | settings | geometry)
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


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if sys.version_info >= (3, 11)
            else hashlib.sha256(file.read()).hexdigest()
        )
