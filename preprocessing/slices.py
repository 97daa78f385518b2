"""The slice store: the only place that knows how slices stand on disk.

    <processed>/<split>/<label>/<scan>/slice_087.npy   one axial slice, (size, size) float16 in [0, 1]
    <processed>/<split>/<label>/<scan>/scan.json       whose it is and how to go back to the scan's own grid
    <processed>/<split>/masks/<scan>/slice_087.npy     its lesion mask, uint8, where one is known

087 is the index along the inferior-superior axis of the scan in canonical RAS orientation. The first axis of a slice
runs posterior to anterior, the second left to right: draw it with `origin="lower"`. The background is exactly 0 and
every brain pixel above 0, so `slice > 0` is the brain.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from preprocessing.scans import LABELS, DataError

SAME_SETTINGS = ("size", "format", "skull_off", "keep", "pixel_mm")  # slices that differ in one of these do not mix


@dataclass(frozen=True)
class ScanSlices:
    """A scan's folder in the store."""

    folder: Path
    record: dict  # scan.json

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def label(self) -> str:
        return self.folder.parent.name

    @property
    def subject(self) -> str:
        return self.record["subject"]

    @property
    def indices(self) -> list[int]:
        """The kept slices' indices along the inferior-superior axis, rising."""
        return self.record["slices"]

    def read_stack(self) -> np.ndarray:
        """(n, size, size) float16 in [0, 1]."""
        return np.stack([read_slice(self.folder / name_slice(i), self.record["size"]) for i in self.indices])

    def read_middle(self) -> np.ndarray:
        """The middle one of the kept slices, (size, size)."""
        return read_slice(self.folder / name_slice(self.indices[len(self.indices) // 2]), self.record["size"])

    def read_lesion(self) -> np.ndarray | None:
        """(n, size, size) bool, or None where no lesion mask is known. A normal scan's is all False."""
        if self.label == "normal":
            return np.zeros((len(self.indices), self.record["size"], self.record["size"]), dtype=bool)
        folder = _mask_folder(self.folder)
        if not folder.is_dir():
            return None
        return np.stack([read_slice(folder / name_slice(i), self.record["size"]) for i in self.indices]) > 0


def name_slice(index: int) -> str:
    return f"slice_{index:03d}.npy"


def read_slice(path: Path, size: int) -> np.ndarray:
    """One slice (size, size). Raises DataError for a file that is missing, broken or of another size."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete its folder and preprocess again") from error
    if values.shape != (size, size):
        raise DataError(f"{path}: shape {values.shape} instead of {(size, size)}; delete its folder, preprocess again")
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
    """The scan in this folder, or None where it was not written to its end."""
    try:
        return ScanSlices(folder, json.loads((folder / "scan.json").read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder / 'scan.json'}: cannot be read ({error}); delete the folder, preprocess again"
        ) from error


def list_scans(root: Path) -> Iterator[ScanSlices]:
    """The finished scans under a folder of the store at any depth (a split, a label or the whole), in order of path."""
    for folder in sorted(path.parent for path in root.rglob("scan.json")):
        if folder.parent.name in LABELS and not folder.name.startswith("."):
            yield read_scan(folder)


def check_same_settings(scans: list[ScanSlices], like: dict | None = None) -> dict:
    """The settings that these scans' slices were made with, {setting: value}.

    DataError names the first scan made otherwise than the first one, or than `like`, what a model was trained on.
    """
    first = {setting: scans[0].record[setting] for setting in SAME_SETTINGS}
    wanted, whose = (like, "the model's training slices") if like else (first, str(scans[0].folder))
    for scan in scans:
        for setting, value in wanted.items():
            if scan.record[setting] != value:
                raise DataError(
                    f"{scan.folder}: made with {setting} {scan.record[setting]}, but {whose} with {value}; "
                    "preprocess all scans the same way"
                )
    return first


class SliceDataset(Dataset):
    """The slices of some scans as a torch Dataset, held in memory: 190 MB for 5,800 slices.

    An item is one slice, (1, size, size) float32 in [0, 1]; a list of indices gives a batch (B, 1, size, size) at once.
    """

    def __init__(self, scans: list[ScanSlices]):
        check_same_settings(scans)
        self.slices = torch.from_numpy(np.concatenate([scan.read_stack() for scan in scans]))
        self.scan_of_slice = np.repeat(np.arange(len(scans)), [len(scan.indices) for scan in scans])

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, index) -> torch.Tensor:
        return self.slices[index].float().unsqueeze(-3)


def _mask_folder(folder: Path) -> Path:
    return folder.parents[1] / "masks" / folder.name


def _write_folder(folder: Path, stack: np.ndarray, indices: list[int], record: dict | None) -> None:
    """Write beside and rename, so that a folder with this name is always a whole one."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        header = io.BytesIO()  # the same for all, where np.save would make it again for each
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(stack[0]))
        for index, values in zip(indices, stack, strict=True):
            (partial / name_slice(index)).write_bytes(header.getvalue() + values.tobytes())
        if record is not None:
            lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
            (partial / "scan.json").write_text(f"{{\n{lines}\n}}\n")
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(partial, folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
