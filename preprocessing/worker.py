"""What a worker does with one scan, on this machine or on another."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.cli import DataError
from preprocessing.geometry import cut_stack
from preprocessing.masks import drop_stray_pieces, read_mask
from preprocessing.oblique import MOST_TILT_DEGREES, StraightGrid, measure_tilt
from preprocessing.scans import Scan, name_scan
from preprocessing.store import LoadedScan, read_scan, write_scan
from preprocessing.volume import BRAIN_ML, Volume, find_brain, read_volume

FORMAT = 3  # of what is written; raise it when the same scan would give other slices
MASK_RULES = 2  # by which masks and brains are read; raise it when some scans would give other slices, but most not
MOST_LESION = 0.5  # of the brain
FOV_MM = {True: 200.0, False: 256.0}  # side of a slice, by whether the skull is off


@dataclass(frozen=True)
class CutSettings:
    """How scans are cut.

    keep    share of the axial slices, the middle ones, (0, 1]
    size    pixels along each side of a slice
    fov_mm  side of a slice in mm; None: 200 for brains, 256 for heads
    volume  which volume of a file with several, from 0
    lesion_labels  the labels of a lesion mask that are lesion; None: all
    """

    keep: float
    size: int
    fov_mm: float | None = None
    volume: int | None = None
    lesion_labels: tuple[int, ...] | None = None


def preprocess_scan(scan: Scan, processed: Path, settings: CutSettings) -> tuple[str, str]:
    """Bring one scan from its file into the store. Returns ("done" | "unchanged" | "skipped", why it was skipped)."""
    folder = processed / scan.split / scan.label / scan.name
    try:
        made_with = _describe(scan, settings)
        old = read_scan(folder)
        if old and all(old.record.get(key) == value for key, value in made_with.items()):
            return "unchanged", ""
        loaded, volume, brain = _cut(scan.path, scan.brain_mask, settings, scan.axes, scan.distrusted)
        if scan.brain_mask and not BRAIN_ML[0] <= loaded.brain_ml <= BRAIN_ML[1]:
            raise DataError(
                f"{scan.brain_mask}: of {loaded.brain_ml:.0f} ml, which no brain has ({BRAIN_ML[0]} to {BRAIN_ML[1]} "
                "ml); make the mask again or take it away"
            )
        record = {"scan": scan.name, "source": str(scan.path)}
        warnings, lesion = list(loaded.warnings), None
        if scan.lesion_mask:
            mask, how = _read_lesion(scan, volume, brain, settings)
            warnings += [f"its lesion mask: {how}"] if how else []
            if loaded.geometry.straight:
                mask = loaded.geometry.straight.bring_mask(volume, mask)
            lesion = loaded.geometry.cut_mask(mask)
            # on the scan's own grid
            record["lesion_voxels"] = mask.sum(axis=(0, 1))[list(loaded.geometry.slices)].tolist()
        if warnings:
            record["warnings"] = warnings
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
    taken = f"its header does not give its orientation; {axes} is taken on trust"
    return replace(loaded, warnings=(taken, *loaded.warnings))


def _cut(
    path: Path, brain_mask: Path | None, settings: CutSettings, axes: str | None = None, distrusted: str | None = None
) -> tuple[LoadedScan, Volume, np.ndarray]:
    """The scan cut, and its volume and brain (X, Y, Z) bool."""
    volume, warnings = read_volume(path, axes, distrusted, settings.volume), []
    if brain_mask:
        skull_off = True
        brain, how = read_mask(brain_mask, volume, axes, distrusted)
        warnings += [f"its brain mask: {how}"] if how else []
    else:
        brain, skull_off = find_brain(volume)
    if not brain.any():
        raise DataError(f"{path}: is the same everywhere, no brain is seen; convert it again from its source")
    brain, stray = drop_stray_pieces(brain)
    voxel_ml = float(np.prod(volume.spacing_mm) / 1000)
    if stray:
        warnings.append(f"pieces apart from the brain were dropped ({stray * voxel_ml:.2g} ml)")
    fov_mm, straight = settings.fov_mm or FOV_MM[skull_off], None
    cut_from = volume, brain
    if (tilt := measure_tilt(volume.affine)) > MOST_TILT_DEGREES:
        straight = StraightGrid.around(volume, brain)
        cut_from = straight.bring(volume, brain)
        warnings.append(f"its axes are oblique, so it was resampled to the anatomical ones ({tilt:.0f} degrees)")
    try:
        stack, geometry, scale = cut_stack(*cut_from, skull_off, settings.keep, settings.size, fov_mm)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    own = {"shape": volume.shape, "affine": tuple(map(tuple, volume.affine.tolist())), "axes": volume.axes}
    geometry = replace(geometry, **own, straight=straight)
    loaded = LoadedScan(
        name=name_scan(path),
        label="",
        subject=name_scan(path),
        source=str(path),
        stack=stack,
        lesion=None,
        geometry=geometry,
        scale=scale,
        skull_off=skull_off,
        brain_ml=np.count_nonzero(brain) * voxel_ml,
        warnings=tuple(warnings),
    )
    return loaded, volume, brain


def _read_lesion(scan: Scan, volume: Volume, brain: np.ndarray, settings: CutSettings) -> tuple[np.ndarray, str]:
    """What `read_mask` reads of the scan's lesion mask; DataError where it can be no lesion of this brain."""
    mask, how = read_mask(scan.lesion_mask, volume, scan.axes, scan.distrusted, settings.lesion_labels)
    within = np.count_nonzero(mask & brain)
    if not within:
        raise DataError(f"{scan.lesion_mask}: lies outside the brain; give the mask of this scan")
    if within > MOST_LESION * np.count_nonzero(brain):
        share = within / np.count_nonzero(brain)
        raise DataError(f"{scan.lesion_mask}: covers {share:.0%} of the brain, as no lesion does; make it again")
    return mask, how


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
        "mask_rules": MASK_RULES,
        "lesion_labels": list(settings.lesion_labels) if settings.lesion_labels and scan.lesion_mask else None,
    }


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if sys.version_info >= (3, 11)
            else hashlib.sha256(file.read()).hexdigest()
        )
