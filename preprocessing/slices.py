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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from common.files import hold_folder as hold_folder
from preprocessing.scans import LABELS, DataError

SAME_SETTINGS = ("size", "format", "skull_off", "keep", "pixel_mm")  # slices that differ in one of these do not mix
_SETTINGS: dict[tuple, tuple] = {}  # each combination once, whatever number of scans were made with it


@dataclass(frozen=True, slots=True)
class ScanSlices:
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
    def size(self) -> int:
        """Pixels along each side of a slice."""
        return self.settings[0]

    @property
    def record(self) -> dict:
        """All of scan.json, read anew each time: 100,000 of them would fill the memory."""
        return _read_record(self.folder)

    @property
    def source_hash(self) -> str:
        """What tells the scan's own file from all others, whatever it is called: half of its SHA-256."""
        record = self.record
        return record["sources"][Path(record["source"]).name][:32]

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


def read_scan(folder: Path) -> ScanSlices | None:
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
    return ScanSlices(folder, record["subject"], run if slices == list(run) else tuple(slices), settings)


def list_scans(root: Path) -> Iterator[ScanSlices]:
    """The finished scans under a folder of the store at any depth (a split, a label or the whole), in order of path."""
    for place, folders, _ in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "masks")
        if Path(place).name in LABELS:
            yield from filter(None, (read_scan(Path(place, name)) for name in folders))
            folders.clear()  # what lies in a scan's folder is in its scan.json: 100 slices a scan need not be listed


def check_same_settings(scans: list[ScanSlices], like: dict | None = None) -> dict:
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


class SliceDataset(Dataset):
    """The slices of some scans as a torch Dataset, held in memory (190 MB for 5,800 slices) or read when asked for.

    An item is one slice, (C, size, size) float32 in [0, 1]; a list of indices gives a batch (B, C, size, size) at once.
    In memory means that of the device, and items are on the device.

    find_neighbours  given the spacing of a scan's slices in mm, which slices an item holds as its C channels, counted
                     from its own; at the ends of a stack the last one stands for those beyond. None: itself alone
    """

    def __init__(
        self,
        scans: list[ScanSlices],
        in_memory: bool = True,
        device: torch.device | str = "cpu",
        find_neighbours: Callable[[float], tuple[int, ...]] | None = None,
    ):
        check_same_settings(scans)
        neighbours = [find_neighbours(scan.record["spacing_mm"][2]) if find_neighbours else (0,) for scan in scans]
        self.neighbours = np.array(neighbours)  # (scans, C)
        self.scans, self.device = scans, torch.device(device)
        self.ends = np.cumsum([len(scan.indices) for scan in scans])
        self.slices = None
        if in_memory:
            slices = torch.empty((len(self), scans[0].size, scans[0].size), dtype=torch.float16)
            for scan, end in zip(scans, self.ends, strict=True):
                slices[end - len(scan.indices) : end] = torch.from_numpy(scan.read_stack())
            self.slices = slices.to(self.device)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index) -> torch.Tensor:
        if isinstance(index, slice):
            index = range(*index.indices(len(self)))
        slices = self._gather(np.atleast_1d(index)).float()
        return slices if np.ndim(index) else slices[0]

    def in_order(self, batches: Iterable, readers: int = 4) -> Iterator[torch.Tensor]:
        """The batches with these indices one after the other; from disk, `readers` threads are that many ahead."""
        if self.slices is not None:
            yield from map(self.__getitem__, batches)
            return
        with ThreadPoolExecutor(readers) as pool:
            waiting = deque()
            for indices in batches:
                waiting.append(pool.submit(self._gather, np.asarray(indices)))
                if len(waiting) > readers:
                    yield waiting.popleft().result().float()
            while waiting:
                yield waiting.popleft().result().float()

    def _gather(self, indices: np.ndarray) -> torch.Tensor:
        """(B, C, size, size) float16 of these slices with their neighbours, on the device.

        It makes no arithmetic in torch: in a reader's thread that would start threads of OpenMP there too, and with
        more of them than cores all wait for each other in a slower way, for the rest of the training.
        """
        scans = np.searchsorted(self.ends, indices, side="right")
        starts = np.concatenate([[0], self.ends])[scans]
        windows = np.clip(indices[:, None] + self.neighbours[scans], starts[:, None], self.ends[scans, None] - 1)
        if self.slices is not None:
            return self.slices[self._send(torch.from_numpy(windows))]
        read = np.stack([self._read(i) for i in windows.ravel()], dtype=np.float16, casting="same_kind")
        return self._send(torch.from_numpy(read)).unflatten(0, windows.shape)

    def _read(self, index: int) -> np.ndarray:
        number = int(np.searchsorted(self.ends, index, side="right"))
        scan = self.scans[number]
        place = int(index - self.ends[number])  # counted from the end of its scan
        return read_slice(scan.folder / name_slice(scan.indices[place]), scan.size)

    def _send(self, values: torch.Tensor) -> torch.Tensor:
        """To the device without waiting for what it is busy with."""
        return values.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else values


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
