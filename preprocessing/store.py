"""The slice store: the only place that knows how slices stand on disk.

    <processed>/<split>/<label>/<scan>/slice_087.npy   one axial slice, (size, size) float16 in [0, 1]
    <processed>/<split>/<label>/<scan>/scan.json       whose it is and how to go back to the scan's own grid
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
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cli import DataError
from preprocessing.geometry import ONE, Geometry, Scale
from preprocessing.scans import LABELS

SAME_SETTINGS = ("size", "format", "skull_off", "keep", "pixel_mm")  # slices that differ in one of these do not mix
_SETTINGS: dict[tuple, tuple] = {}  # each combination once, whatever number of scans were made with it


@dataclass(frozen=True)
class LoadedScan:
    """A scan in memory, from the store or straight from its file.

    label         normal, abnormal, or empty where nobody has said
    stack         (n, size, size) float16 in [0, 1], the background exactly 0 and the brain above 0
    lesion        (n, size, size) bool, or None where no lesion mask is known
    scale         the scanner values that became 0 and 1, and the exponent (`geometry.scale_intensity`)
    skull_off     whether the stack shows the brain alone
    lesion_voxels of the scan's own grid, for each kept slice; None where no lesion mask is known
    brain_ml      volume of the brain mask, where the scan comes from its file
    warnings      what was not plain and what was made of it, in words
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
    session: str = ""
    age: float | None = None
    sex: str | None = None
    brain_ml: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredScan:
    """A scan's folder in the store, and what an index of many thousand scans needs to know of each."""

    folder: Path
    subject: str
    indices: Sequence[int]  # the kept slices' indices along the inferior-superior axis, rising
    settings: tuple  # the values of SAME_SETTINGS

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
        return _read_record(self.folder)

    @property
    def geometry(self) -> Geometry:
        return Geometry.from_record(self.record)

    @property
    def source_hash(self) -> str:
        """What tells the scan's own file from all others, whatever it is called: half of its SHA-256."""
        record = self.record
        return record["sources"][Path(record["source"]).name][:32]

    def load(self) -> LoadedScan:
        """The scan with its slices. Raises DataError where one is broken."""
        record = self.record
        lesion_voxels = record.get("lesion_voxels")
        return LoadedScan(
            name=self.name,
            label=self.label,
            subject=self.subject,
            source=record["source"],
            stack=self.read_stack(),
            lesion=self.read_lesion(),
            geometry=Geometry.from_record(record),
            scale=tuple(record["scale"]),
            skull_off=record["skull_off"],
            lesion_voxels=None if lesion_voxels is None else tuple(lesion_voxels),
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

    def read_lesion(self) -> np.ndarray | None:
        """(n, size, size) bool, or None where no lesion mask is known. A normal scan's is all False."""
        if self.label == "normal":
            return np.zeros((len(self.indices), self.size, self.size), dtype=bool)
        folder = _mask_folder(self.folder)
        if not folder.is_dir():
            return None
        return np.stack([read_slice(folder / name_slice(i), self.size) for i in self.indices]) > 0


def name_slice(index: int) -> str:
    return f"slice_{index:03d}.npy"


def read_slice(path: Path, size: int) -> np.ndarray:
    """One slice (size, size). Raises DataError for a file that is missing, broken or of another size."""
    try:
        with open(path, "rb") as file:
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
        raise DataError(f"{path}: holds values that do not lie from 0 to 1; delete its folder and preprocess again")
    return values


def write_scan(folder: Path, stack: np.ndarray, lesion: np.ndarray | None, record: dict) -> None:
    """Write a scan's slices, its lesion mask (same shape, or None) and its record: whole, or nothing."""
    lesion_folder = _mask_folder(folder)
    if lesion is not None:
        _write_folder(lesion_folder, lesion, record["slices"], None)
    elif folder.parent.name == "abnormal":
        shutil.rmtree(lesion_folder, ignore_errors=True)
    try:
        _write_folder(folder, stack, record["slices"], record)  # last: a scan whose scan.json stands is complete
    except OSError:
        if lesion is not None:
            shutil.rmtree(lesion_folder, ignore_errors=True)
        raise


def read_scan(folder: Path) -> StoredScan | None:
    """The scan in this folder, or None where it was not written to its end.

    What scan.json says is checked, so that nothing in it can lead to a file outside the folder.
    """
    try:
        record = _read_record(folder)
    except FileNotFoundError:
        return None
    slices = record.get("slices")
    if not (
        isinstance(record.get("subject"), str)
        and isinstance(slices, list)
        and slices
        and all(type(index) is int and index >= 0 for index in slices)
        and type(record.get("size")) is int
    ):
        raise DataError(
            f"{folder / 'scan.json'}: does not say subject, slices and size as it should; delete the folder, "
            "preprocess again"
        )
    run = range(slices[0], slices[-1] + 1)
    settings = tuple(record.get(setting) for setting in SAME_SETTINGS)
    try:
        settings = _SETTINGS.setdefault(settings, settings)
    except TypeError as error:
        raise DataError(f"{folder / 'scan.json'}: its settings are no values; delete it, preprocess again") from error
    return StoredScan(folder, record["subject"], run if slices == list(run) else tuple(slices), settings)


def list_scans(root: Path) -> Iterator[StoredScan]:
    """The finished scans under a folder of the store at any depth (a split, a label or the whole), in order of path."""
    for place, folders, _ in os.walk(root):
        is_label = Path(place).name in LABELS
        # A scan may be called `masks`; the folder of that name beside the labels holds lesion masks.
        folders[:] = sorted(name for name in folders if not name.startswith(".") and (is_label or name != "masks"))
        if is_label:
            yield from filter(None, (read_scan(Path(place, name)) for name in folders))
            folders.clear()  # what lies in a scan's folder is in its scan.json: 100 slices a scan need not be listed


def check_same_settings(scans: list[StoredScan], like: dict | None = None) -> dict:
    """The settings that these scans' slices were made with, {setting: value}.

    DataError names the first scan made otherwise than the first one, or than `like`, what a model was trained on.
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


def _read_record(folder: Path) -> dict:
    path = folder / "scan.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete the folder, preprocess again") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}: holds no record of a scan; delete the folder, preprocess again")
    return record


def _mask_folder(folder: Path) -> Path:
    return folder.parents[1] / "masks" / folder.name


def _write_folder(folder: Path, stack: np.ndarray, indices: list[int], record: dict | None) -> None:
    """Write beside and rename, so that a folder with this name is always a whole one.

    Beside means under a name of this process: a worker whose master was killed may still be at the same scan.
    """
    partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
        stack = np.ascontiguousarray(stack)
        header = io.BytesIO()  # the same for all, where np.save would make it again for each
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(stack[0]))
        for index, values in zip(indices, stack, strict=True):
            (partial / name_slice(index)).write_bytes(header.getvalue() + values.tobytes())
        if record is not None:
            lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
            (partial / "scan.json").write_text(f"{{\n{lines}\n}}\n")
        while True:
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, old)  # and deleted later: half a scan must not keep this name if this is killed
            try:
                os.rename(partial, folder)
                break
            except OSError:
                if not folder.exists():  # if it does, that other worker was quicker
                    raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def clear_leftovers(processed: Path) -> None:
    """Delete what processes that were killed left half-written."""
    for place, folders, _ in os.walk(processed):
        for name in [name for name in folders if name.startswith(".") and name.endswith((".partial", ".old"))]:
            shutil.rmtree(Path(place, name), ignore_errors=True)
        if Path(place).name in (*LABELS, "masks"):
            folders.clear()
