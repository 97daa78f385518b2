"""The slices of many scans as a torch Dataset, in memory or read from disk ahead of need."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import Dataset

from preprocessing.store import StoredScan, check_same_settings, name_slice, read_slice

FindNeighbours = Callable[[float], tuple[int, ...]]


def see_no_neighbours(slice_spacing_mm: float) -> tuple[int, ...]:
    """The offsets of a model that sees only the slice itself."""
    return (0,)


class SliceDataset(Dataset):
    """The slices of some scans, one scan after the other.

    An item is one slice, (C, size, size) float32 in [0, 1], on the device; a list of indices gives a batch
    (B, C, size, size). Raises DataError if scans were preprocessed differently or a slice cannot be read.

    in_memory          hold all slices in the memory of the device (190 MB for 5,800 slices), or read them from disk
    neighbour_offsets  of a model: from the slice spacing in mm, which slices are the C channels, counted from the
                       item's own. At the ends of a stack the last slice replaces those beyond
    """

    def __init__(
        self,
        scans: list[StoredScan],
        in_memory: bool = True,
        device: torch.device | str = "cpu",
        neighbour_offsets: FindNeighbours = see_no_neighbours,
    ):
        check_same_settings(scans)
        self.scans, self.device = scans, torch.device(device)
        self.offsets = np.array([neighbour_offsets(scan.geometry.slice_spacing_mm) for scan in scans])  # (scans, C)
        self.ends = np.cumsum([len(scan.indices) for scan in scans])
        self.slices = self._read_all().to(self.device) if in_memory else None

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index) -> torch.Tensor:
        if isinstance(index, slice):
            index = range(*index.indices(len(self)))
        slices = self._gather(np.atleast_1d(index)).float()
        return slices if np.ndim(index) else slices[0]

    def read_batches(self, batches: Iterable, readers: int = 4) -> Iterator[torch.Tensor]:
        """The batches with these indices, in order; from disk, `readers` threads read that many batches ahead."""
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

    def _read_all(self) -> torch.Tensor:
        size = self.scans[0].size
        slices = torch.empty((len(self), size, size), dtype=torch.float16)
        for scan, end in zip(self.scans, self.ends, strict=True):
            slices[end - len(scan.indices) : end] = torch.from_numpy(scan.read_stack())
        return slices

    def _gather(self, indices: np.ndarray) -> torch.Tensor:
        """(B, C, size, size) float16 of these slices with their neighbours, on the device.

        No arithmetic in torch: in a reader's thread it would start threads of OpenMP there too, and with more threads
        than cores each waits for the others more slowly, for the rest of the run.
        """
        scans = np.searchsorted(self.ends, indices, side="right")
        starts = np.concatenate([[0], self.ends])[scans]
        windows = np.clip(indices[:, None] + self.offsets[scans], starts[:, None], self.ends[scans, None] - 1)
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
        """To the device, without waiting for what it is busy with."""
        return values.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else values
