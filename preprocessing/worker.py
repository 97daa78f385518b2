"""Preprocess one scan: what each worker runs, on this machine or another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from common.cli import DataError, explain
from preprocessing.geometry import Geometry, Scale, cut_stack
from preprocessing.identity import hash_file, hash_voxels
from preprocessing.masks import drop_stray_pieces, read_mask
from preprocessing.oblique import MOST_TILT_DEGREES, StraightGrid, measure_tilt
from preprocessing.scans import Scan, name_scan
from preprocessing.store import LoadedScan, StoredScan, change_record, read_scan, withdraw, write_scan
from preprocessing.strip import Extracted, extract_brain
from preprocessing.volume import BRAIN_ML, Volume, find_brain, read_volume

FORMAT = 4  # version of the slices; raise it when a scan would give other slices
MASK_RULES = 2  # version of reading masks and finding brains; raise it when few scans would give other slices
MOST_LESION = 0.5  # of the brain
MOST_NAME_BYTES = 200  # file systems allow 255, and files made from a scan have longer names
SPECK_ML = 1.0  # no warning of smaller stray pieces
FOV_MM = {True: 200.0, False: 256.0}  # side of a slice, by whether the skull is off


@dataclass(frozen=True)
class CutSettings:
    """How scans are cut.

    keep    share of the axial slices, the middle ones, (0, 1]
    size    pixels along each side of a slice
    fov_mm  side of a slice in mm; None: 200 for brains, 256 for heads
    volume  which volume of a file with several, from 0
    lesion_labels  the labels of a lesion mask that are lesion; None: all
    strip   whose brains are extracted, one of `scans.STRIP`
    """

    keep: float
    size: int
    fov_mm: float | None = None
    volume: int | None = None
    lesion_labels: tuple[int, ...] | None = None
    strip: str = "never"


def preprocess_scan(scan: Scan, processed: Path, settings: CutSettings) -> tuple[str, str]:
    """Preprocess one scan into the store. Returns ("done" | "unchanged" | "skipped", why it was skipped).

    Where its file can no longer be used, its old slices are withdrawn from the store.
    """
    folder = processed / scan.split / scan.label / scan.name
    origin = {"source": str(scan.path)} | ({"dicom": str(scan.series.folder)} if scan.series else {})
    if len(scan.name.encode()) > MOST_NAME_BYTES:
        return "skipped", f"{scan.path}: its name takes more than {MOST_NAME_BYTES} bytes; give it a shorter one"
    try:
        if scan.series:
            scan.series.convert()
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
            record = {"scan": scan.name, **origin, "content": loaded.hashes[0]}
            record |= {"unscored_share": loaded.unscored_share}
            if lesion is not None:
                record |= {"lesion_voxels": list(loaded.lesion_voxels)}
                record |= {"unscored_lesions_ml": list(loaded.unscored_lesions_ml)}
            record |= {"warnings": list(loaded.warnings)} if loaded.warnings else {}
            record |= {"stripped": True} if loaded.stripped else {}
            place = loaded.geometry.to_record() | {"scale": list(loaded.scale), "skull_off": loaded.skull_off}
            write_scan(folder, loaded.stack, lesion, record | made_with | place, loaded.stripped)
            return "done", ""
        record = old.record
        if any(record.get(key) != value for key, value in origin.items()):  # the raw folder was moved
            change_record(folder, **origin)
        return "unchanged", ""
    except OSError as error:
        return "skipped", f"{folder}: cannot be written ({explain(error)})"
    except DataError as error:
        return "skipped", " ".join(str(error).split())


def cut_scan(path: Path, brain_mask: Path | None, settings: CutSettings, axes: str | None = None) -> LoadedScan:
    """A scan straight from its file, cut as preprocessing cuts it. Raises DataError with the cure.

    axes  where the stored axes point to, for a file whose header does not say; otherwise unused
    """
    try:
        loaded = _cut(path, _find_brain(path, brain_mask, settings), settings)
    except DataError:
        if axes is None:
            raise
        loaded = _cut(path, _find_brain(path, brain_mask, settings, axes), settings)
        taken = f"its header does not give its orientation; {axes} is assumed, as --axes says"
        loaded = replace(loaded, warnings=(taken, *loaded.warnings))
    return replace(loaded, hashes=(*loaded.hashes, hash_file(path)[:32]))


def _find_old(folder: Path, made_with: dict) -> StoredScan | None:
    """The scan in the store, if it was made from the same files with the same settings; else None."""
    try:
        old = read_scan(folder)
    except DataError:  # its record is bad, so it is made again
        return None
    record = old.record if old else {}  # read once: each time, it comes from the disk
    same = "content" in record and all(record.get(key) == value for key, value in made_with.items())
    return old if same else None


def _withdraw(folder: Path) -> str:
    """Withdraw the slices of a file that can no longer be used; returns words for the message."""
    if not (folder / "scan.json").exists():
        return ""
    try:
        return f"; its old slices were moved to {withdraw(folder)}"
    except OSError as error:
        return f"; its old slices in {folder} cannot be moved ({error.strerror}); delete them"


def _read(scan: Scan, settings: CutSettings) -> tuple[LoadedScan, np.ndarray | None]:
    """(the scan, cut; its lesion mask (n, size, size) or None)."""
    found = _find_brain(scan.path, scan.brain_mask, settings, scan.axes, scan.distrusted)
    if scan.brain_mask and not BRAIN_ML[0] <= found.brain_ml <= BRAIN_ML[1]:
        raise DataError(
            f"{scan.brain_mask}: has {found.brain_ml:.0f} ml, not the size of a brain ({BRAIN_ML[0]} to {BRAIN_ML[1]} "
            "ml); make the mask again or remove it"
        )
    loaded = _cut(scan.path, found, settings)
    if not scan.lesion_mask:
        return loaded, None
    mask, odd = _read_lesion(scan, found, settings)
    if loaded.geometry.straight:
        mask = loaded.geometry.straight.bring_mask(found.volume, mask)
    counts = mask.sum(axis=(0, 1))[list(loaded.geometry.slices)].tolist()  # on the scan's own grid
    unscored = list_unscored(mask, loaded.geometry.slices, float(np.prod(loaded.geometry.spacing_mm)) / 1000)
    known = {"lesion_voxels": tuple(counts), "unscored_lesions_ml": unscored}
    loaded = replace(loaded, **known, warnings=(*loaded.warnings, *odd))
    return loaded, loaded.geometry.cut_mask(mask)


def list_unscored(lesion: np.ndarray, slices: tuple[int, ...], voxel_ml: float) -> tuple[float, ...]:
    """The volumes (ml) of the lesions of a mask (X, Y, Z) bool none of whose voxels lies in these slices along Z.

    Parts with at most two voxels between them are one lesion, as where lesions are scored.
    """
    if not np.delete(lesion, slices, axis=2).any():
        return ()
    touching = np.ones((3, 3, 3))
    parts, _ = ndimage.label(ndimage.binary_dilation(lesion, touching), touching)
    parts[~lesion.astype(bool)] = 0
    voxels, inside = np.bincount(parts.ravel()), np.unique(parts[:, :, list(slices)])
    return tuple(float(voxels[part] * voxel_ml) for part in np.setdiff1d(np.unique(parts), [0, *inside]))


class _Brain(NamedTuple):
    """A volume, its brain (X, Y, Z) bool, whether it is skull-stripped, and here; warnings."""

    volume: Volume
    inside: np.ndarray
    skull_off: bool
    stripped: bool
    warnings: list[str]

    @property
    def brain_ml(self) -> float:
        return float(np.count_nonzero(self.inside) * np.prod(self.volume.spacing_mm) / 1000)


def _find_brain(
    path: Path, brain_mask: Path | None, settings: CutSettings, axes: str | None = None, distrusted: str | None = None
) -> _Brain:
    volume, warnings, stripped = read_volume(path, axes, distrusted, settings.volume), [], False
    values = volume.values
    low, high = values.min(), values.max()
    if low < high and np.count_nonzero(values == low) + np.count_nonzero(values == high) == values.size:
        raise DataError(f"{path}: holds two values only, as a mask does; give the scan here, its mask as the mask")
    if brain_mask and settings.strip != "always":
        skull_off = True
        inside, how = read_mask(brain_mask, volume, axes, distrusted)
        warnings += [f"its brain mask: {how}"] if how else []
    else:
        inside, skull_off = find_brain(volume)
    if not inside.any():
        raise DataError(f"{path}: is constant, so it shows no brain; convert it again from its source")
    if settings.strip == "always" or (settings.strip == "auto" and not skull_off):
        inside, skull_off, stripped = inside & extract_brain(path, volume), True, True
    inside, stray = drop_stray_pieces(inside)
    stray_ml = stray * np.prod(volume.spacing_mm) / 1000
    if stray_ml >= SPECK_ML:
        warnings.append(f"pieces separate from the brain were dropped ({stray_ml:.3g} ml)")
    return _Brain(volume, inside, skull_off, stripped, warnings)


def _cut(path: Path, found: _Brain, settings: CutSettings) -> LoadedScan:
    """The scan, cut; an oblique one is resampled to the anatomical axes first."""
    volume, warnings, straight = found.volume, list(found.warnings), None
    cut_from = volume, found.inside
    if (tilt := measure_tilt(volume.affine)) > MOST_TILT_DEGREES:
        straight = StraightGrid.around(volume, found.inside)
        cut_from = straight.bring(volume, found.inside)
        warnings.append(f"its axes are oblique, so it was resampled to the anatomical axes ({tilt:.0f} degrees)")
    fov_mm = settings.fov_mm or FOV_MM[found.skull_off]
    try:
        stack, geometry, scale = cut_stack(*cut_from, found.skull_off, settings.keep, settings.size, fov_mm)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    scored = np.count_nonzero(cut_from[1][:, :, list(geometry.slices)])
    own = {"shape": volume.shape, "affine": tuple(map(tuple, volume.affine.tolist())), "axes": volume.axes}
    geometry = replace(geometry, **own, straight=straight)
    return LoadedScan(
        name=name_scan(path),
        label="",
        subject=name_scan(path),
        source=str(path),
        stack=stack,
        lesion=None,
        geometry=geometry,
        scale=scale,
        skull_off=found.skull_off,
        brain_ml=found.brain_ml,
        unscored_share=1 - scored / np.count_nonzero(cut_from[1]) if found.skull_off else None,
        hashes=(hash_voxels(volume.values, volume.spacing_mm),),
        warnings=tuple(warnings),
        stripped=_keep_extracted(found, geometry, scale) if found.stripped else None,
    )


def _keep_extracted(found: _Brain, geometry: Geometry, scale: Scale) -> Extracted:
    """The extracted brain, and the middle slice of the head that it was cut from."""
    middle = replace(geometry, slices=geometry.slices[len(geometry.slices) // 2 :][:1])
    head = found.volume, np.ones(found.inside.shape, bool)
    if geometry.straight:
        head = geometry.straight.bring(*head)
    return Extracted(geometry.store(found.inside), middle.cut(*head, scale)[0])


def _read_lesion(scan: Scan, found: _Brain, settings: CutSettings) -> tuple[np.ndarray, list[str]]:
    """(the scan's lesion mask, warnings about it); DataError where it lies outside the brain."""
    mask, how = read_mask(scan.lesion_mask, found.volume, scan.axes, scan.distrusted, settings.lesion_labels)
    share = np.count_nonzero(mask & found.inside) / np.count_nonzero(found.inside)
    if not share:
        raise DataError(f"{scan.lesion_mask}: lies outside the brain; give the mask of this scan")
    warnings = [f"its lesion mask: {how}"] if how else []
    if share > MOST_LESION:
        warnings.append(f"its lesion mask covers most of the brain; check it ({share:.0%})")
    return mask, warnings


def _describe(scan: Scan, settings: CutSettings) -> dict:
    """Everything that decides a scan's slices: where it is unchanged, so are they."""
    sources = {}
    for path in (scan.path, scan.brain_mask, scan.lesion_mask):
        if path:  # a mask in another folder may have its scan's name
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
        "mask_rules": MASK_RULES,
        "strip": settings.strip,
        "lesion_labels": list(settings.lesion_labels) if settings.lesion_labels and scan.lesion_mask else None,
    }
