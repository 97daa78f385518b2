"""The slice store: the only module that knows how slices are stored.

    <processed>/<split>/<label>/<scan>/slice_087.npy   one axial slice, (size, size) float16 in [0, 1]
    <processed>/<split>/<label>/<scan>/scan.json       whose it is and how to go back to the scan's own grid
    <processed>/<split>/<label>/<scan>/brain.nii.gz    its brain mask on its own grid, if the brain was extracted
    <processed>/<split>/<label>/<scan>/head.npy        then also the middle slice with the head around the brain
    <processed>/<split>/masks/<scan>/slice_087.npy     its lesion mask, uint8, where one is known

087 is the index along the inferior-superior axis of the scan in canonical RAS orientation. The first axis of a slice
runs posterior to anterior, the second left to right: draw it with `origin="lower"`. The background is exactly 0 and
every brain pixel above 0, so `slice > 0` is the brain.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cli import DataError, log
from common.files import make_folder, open_regular, replace_when_whole
from preprocessing.geometry import ONE, Geometry, Scale
from preprocessing.record import find_wrong_settings, read_record
from preprocessing.scans import LABELS, SPLITS
from preprocessing.strip import Extracted, save_brain_mask

SAME_SETTINGS = ("size", "format", "skull_off", "keep", "pixel_mm")  # slices that differ in one of these do not mix
WITHDRAWN = ".withdrawn"  # folder of a store for scans whose source is gone or changed
SCAN_FILES = re.compile(r"slice_\d{3,}\.npy|scan\.json|\.partial-scan\.json|brain\.nii\.gz|head\.npy")
LEFTOVER = re.compile(r"\..+\.\d+\.(?:partial|old)", re.DOTALL)  # of `_write_folder`
_SETTINGS: dict[tuple, tuple] = {}  # each combination once, however many scans share it


@dataclass(frozen=True)
class LoadedScan:
    """A scan in memory, from the store or straight from its file.

    label         of `scans.LABELS`; empty for a scan straight from its file
    stack         (n, size, size) float16 in [0, 1], the background exactly 0 and the brain above 0
    lesion        (n, size, size) bool, or None where no lesion mask is known
    scale         the scanner values that became 0 and 1, and the exponent (`geometry.scale_intensity`)
    skull_off     whether the stack shows the brain alone
    lesion_voxels of the scan's own grid, for each kept slice; None where no lesion mask is known
    unscored_share        of the brain's voxels, those outside the kept slices; None where it was not recorded
    unscored_lesions_ml   volumes of the lesions that lie wholly outside them; None where they are not known
    brain_ml      volume of the brain mask, where the scan comes from its file
    hashes        which scan it is, see `StoredScan`
    warnings      what to know before trusting the scan
    stripped      the brain that was extracted, where the scan comes from its file and showed a head
    """

    name: str
    label: str
    subject: str
    source: str
    stack: np.ndarray
    lesion: np.ndarray | None
    geometry: Geometry
    scale: Scale
    skull_off: bool
    lesion_voxels: tuple[int, ...] | None = None
    unscored_share: float | None = None
    unscored_lesions_ml: tuple[float, ...] | None = None
    session: str = ""
    age: float | None = None
    sex: str | None = None
    brain_ml: float | None = None
    hashes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    stripped: Extracted | None = None


@dataclass(frozen=True, slots=True)
class StoredScan:
    """A scan's folder in the store, and what an index of many thousand scans needs to know of each.

    Two scans are one where they share a hash: that of the voxels (`identity.hash_voxels`), which comes first, or that
    of the file, half of its SHA-256. Slices of older versions have the latter alone.
    """

    folder: Path
    subject: str
    indices: Sequence[int]  # the kept slices' indices along the inferior-superior axis, rising
    settings: tuple  # the values of SAME_SETTINGS
    hashes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def label(self) -> str:
        return self.folder.parent.name

    @property
    def split(self) -> str:
        return self.folder.parents[1].name

    @property
    def size(self) -> int:
        """Pixels along each side of a slice."""
        return self.settings[0]

    @property
    def record(self) -> dict:
        """All of scan.json, read anew each time: 100,000 of them would fill the memory."""
        return read_record(self.folder)

    @property
    def origin(self) -> str:
        """The scan's file, or the folder of its DICOM series."""
        record = self.record
        return record.get("dicom", record["source"])

    @property
    def geometry(self) -> Geometry:
        return Geometry.from_record(self.record)

    def load(self) -> LoadedScan:
        """The scan with its slices. Raises DataError where one is broken."""
        record = self.record
        lesions = {name: record.get(name) for name in ("lesion_voxels", "unscored_lesions_ml")}
        known = {name: None if values is None else tuple(values) for name, values in lesions.items()}
        return LoadedScan(
            name=self.name,
            label=self.label,
            subject=self.subject,
            source=record["source"],
            stack=self.read_stack(),
            lesion=self.read_lesion(),
            geometry=Geometry.from_record(record),
            hashes=self.hashes,
            scale=tuple(record["scale"]),
            skull_off=record["skull_off"],
            **known,
            unscored_share=record.get("unscored_share"),
            session=record.get("session") or "",
            age=record.get("age"),
            sex=record.get("sex"),
            warnings=tuple(record.get("warnings", ())),
        )

    def read_stack(self) -> np.ndarray:
        """(n, size, size) float16 in [0, 1]."""
        return np.stack([read_slice(self.folder / name_slice(i), self.size) for i in self.indices])

    def read_middle(self) -> np.ndarray:
        """The middle one of the kept slices, (size, size)."""
        return read_slice(self.folder / name_slice(self.indices[len(self.indices) // 2]), self.size)

    def read_head(self) -> np.ndarray | None:
        """The middle one of the kept slices with the head around the brain; None where no brain was extracted here."""
        path = self.folder / "head.npy"
        return read_slice(path, self.size) if path.exists() else None

    def read_lesion(self) -> np.ndarray | None:
        """(n, size, size) bool, or None where no lesion mask is known. A normal scan's is all False."""
        if self.label == "normal":
            return np.zeros((len(self.indices), self.size, self.size), dtype=bool)
        folder = _mask_folder(self.folder)
        if self.label != "abnormal" or not folder.is_dir():  # an unlabelled scan does not own the masks of its name
            return None
        return np.stack([read_slice(folder / name_slice(i), self.size) for i in self.indices]) > 0


def name_slice(index: int) -> str:
    return f"slice_{index:03d}.npy"


def read_slice(path: Path, size: int) -> np.ndarray:
    """One slice (size, size). Raises DataError for a file that is missing, broken or of another size."""
    try:
        with open_regular(path) as file:
            values = np.lib.format.read_array(file, allow_pickle=False)  # np.load would open archives too
    except (OSError, ValueError, EOFError, OverflowError, MemoryError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete its folder and preprocess again") from error
    if values.shape != (size, size) or values.dtype.kind not in "fu":
        raise DataError(
            f"{path}: {values.dtype} of shape {values.shape} instead of numbers of {(size, size)}; "
            "delete its folder, preprocess again"
        )
    within = (
        values.view(np.uint16).max() <= ONE if values.dtype == np.float16 else 0 <= values.min() <= values.max() <= 1
    )
    if not within:
        raise DataError(f"{path}: holds values outside 0 to 1; delete its folder and preprocess again")
    return values


def write_scan(
    folder: Path, stack: np.ndarray, lesion: np.ndarray | None, record: dict, stripped: Extracted | None = None
) -> None:
    """Write a scan's slices, its lesion mask (same shape, or None), its record and what was extracted, or nothing."""
    lesion_folder, processed = _mask_folder(folder), folder.parents[2]
    for parent in {folder.parent, lesion_folder.parent} if lesion is not None else {folder.parent}:
        make_folder(parent, processed)
    if lesion is not None:
        _write_folder(lesion_folder, lesion, record["slices"], None)
    elif folder.parent.name == "abnormal":
        _delete(lesion_folder)
    try:
        _write_folder(folder, stack, record["slices"], record, stripped)  # last: a scan with a scan.json is complete
    except OSError:
        if lesion is not None:
            _delete(lesion_folder)
        raise


def change_record(folder: Path, **changes) -> None:
    """Change fields of a scan's scan.json."""
    with replace_when_whole(folder / "scan.json") as partial:
        partial.write_text(_format_record(read_record(folder) | changes))


def read_scan(folder: Path) -> StoredScan | None:
    """The scan in this folder, or None where it was not written to its end. DataError where its record is bad."""
    try:
        record = read_record(folder)
    except FileNotFoundError:
        return None
    slices = record["slices"]
    run = range(slices[0], slices[-1] + 1)
    settings = tuple(record[setting] for setting in SAME_SETTINGS)
    settings = _SETTINGS.setdefault(settings, settings)
    hashes = (record.get("content"), record["sources"][Path(record["source"]).name][:32])
    slices = run if slices == list(run) else tuple(slices)
    return StoredScan(folder, record["subject"], slices, settings, tuple(filter(None, hashes)))


def list_scans(root: Path, refused: list[DataError] | None = None) -> Iterator[StoredScan]:
    """The finished scans under a folder of the store at any depth (a split, a label or the whole), in order of path.

    A scan with a bad record is left out: its error is added to `refused`, or logged where that is None.
    """
    for place, folders, _ in os.walk(root):
        is_label = Path(place).name in LABELS
        # A scan may be called `masks`; the folder of that name beside the labels holds lesion masks.
        folders[:] = sorted(name for name in folders if not name.startswith(".") and (is_label or name != "masks"))
        if not is_label:
            continue
        for name in folders:
            try:
                scan = read_scan(Path(place, name))
            except DataError as error:
                if refused is None:
                    log.warning("skipped %s", error)
                else:
                    refused.append(error)
                continue
            if scan:
                yield scan
        folders.clear()  # scan.json names the 100 slices of a scan, so they need not be listed


def withdraw(folder: Path) -> Path:
    """Move a scan to WITHDRAWN, so that nothing uses it any more; returns its new folder."""
    split, processed = folder.parents[1].name, folder.parents[2]
    target = processed / WITHDRAWN / split / folder.parent.name / folder.name
    number = 1
    while target.exists():
        number += 1
        target = target.with_name(f"{folder.name}.{number}")
    moves = [(folder, target)]
    if folder.parent.name == "abnormal":  # a normal scan of that name does not own the masks
        moves.append((_mask_folder(folder), _mask_folder(target)))
    for source, new in moves:
        if source.is_dir():
            make_folder(new.parent, processed)
            os.rename(source, new)
    return target


def check_settings(settings: dict) -> None:
    """ValueError where the settings that a model records of its training slices are impossible."""
    wrong = find_wrong_settings(settings)
    if wrong:
        raise ValueError(f"its slices' {wrong}")


def check_same_settings(scans: list[StoredScan], like: dict | None = None) -> dict:
    """The settings that these scans' slices were made with, {setting: value}.

    DataError names the first scan whose settings differ from the first one's, or from `like`, a model's.
    """
    first = dict(zip(SAME_SETTINGS, scans[0].settings, strict=True))
    wanted, whose = (like, "the model's training slices") if like else (first, str(scans[0].folder))
    values = tuple(wanted[setting] for setting in SAME_SETTINGS)
    for scan in scans:
        if scan.settings != values:
            setting, value, other = next(
                entry for entry in zip(SAME_SETTINGS, scan.settings, values, strict=True) if entry[1] != entry[2]
            )
            raise DataError(
                f"{scan.folder}: made with {setting} {value}, but {whose} with {other}; "
                "preprocess all scans the same way"
            )
    return first


def _mask_folder(folder: Path) -> Path:
    return folder.parents[1] / "masks" / folder.name


def _format_record(record: dict) -> str:
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    return f"{{\n{lines}\n}}\n"


def _write_folder(
    folder: Path, stack: np.ndarray, indices: list[int], record: dict | None, stripped: Extracted | None = None
) -> None:
    """Write a temporary folder and rename it, so that a folder with this name is always whole.

    Its name has the process's number: a worker whose parent was killed may still be writing the same scan.
    """
    partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("partial", "old"))
    try:
        _delete(partial)
        partial.mkdir()
        stack = np.ascontiguousarray(stack)
        header = io.BytesIO()  # the same for all, where np.save would make it again for each
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(stack[0]))
        for index, values in zip(indices, stack, strict=True):
            (partial / name_slice(index)).write_bytes(header.getvalue() + values.tobytes())
        if stripped:
            save_brain_mask(partial / "brain.nii.gz", stripped.mask, record["affine"])
            np.save(partial / "head.npy", stripped.head)
        if record is not None:
            (partial / "scan.json").write_text(_format_record(record))
        while True:
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, old)  # deleted later: if this is killed, no half-deleted scan has this name
            try:
                os.rename(partial, folder)
                _keep_foreign(old, folder)
                break
            except OSError:
                if not folder.exists():  # if it does, the other worker was faster
                    raise
            finally:
                _delete(old)
    except BaseException:
        _delete(partial)
        raise


def _keep_foreign(old: Path, folder: Path) -> None:
    """Move what a user put into a scan's folder to the new one."""
    for path in old.iterdir() if old.is_dir() and not old.is_symlink() else ():
        if not SCAN_FILES.fullmatch(path.name):
            os.rename(path, folder / path.name)


def _delete(folder: Path) -> None:
    """Delete the slices and the record in a folder of the store, and the folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        if folder.is_symlink():
            folder.unlink()
            return
        for path in folder.iterdir():
            if SCAN_FILES.fullmatch(path.name):
                path.unlink()
        folder.rmdir()


def clear_leftovers(processed: Path) -> None:
    """Delete the half-written folders of killed processes, and nothing else."""
    places = [processed / split / kind for split in SPLITS for kind in (*LABELS, "masks")]
    for path in [path for place in places for path in place.glob(".*") if LEFTOVER.fullmatch(path.name)]:
        with contextlib.suppress(FileNotFoundError):  # a worker that outlived its parent has completed it by now
            if path.suffix == ".partial":  # renamed, it can't be completed any more when half of it is gone
                path = path.rename(path.with_name(f"{path.name}.{os.getpid()}.old"))
            _delete(path)
