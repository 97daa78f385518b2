"""Which scan a file holds, by its voxels: name, compression and header text do not count."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

SAMPLES = 64  # along each axis
SPACING_STEP_MM = 0.1


def hash_voxels(values: np.ndarray, spacing_mm: tuple[float, float, float]) -> str:
    """32 hexadecimal digits that two scans share where one is a copy of the other.

    values      (X, Y, Z) in canonical order, so that the order of storage makes no difference
    spacing_mm  voxel size along these axes

    What is hashed is the shape, the voxel size to 0.1 mm, and of voxels on a grid of at most 64^3 the rank of each
    value among the values that occur. So a copy with another data type, another scale factor or its
    floats rounded in the last digit is the same scan, and so is one whose origin was moved, as by tools that centre.
    """
    grid = np.ix_(*(_spread(count) for count in values.shape))
    with np.errstate(over="ignore"):
        samples = np.ascontiguousarray(values[grid]).astype(np.float32, copy=False) + np.float32(0)  # -0 is 0
    ranks = np.searchsorted(np.unique(samples), samples)  # a fifth of the time of unique's return_inverse
    # The steps begin beside the sizes that occur: one at the edge of two steps could fall to either side.
    steps = np.floor(np.array(spacing_mm) / SPACING_STEP_MM + 0.318).astype(int)
    hashed = hashlib.sha256(repr((values.shape, steps.tolist())).encode())
    hashed.update(ranks.astype("<i4").tobytes())
    return hashed.hexdigest()[:32]


def hash_file(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        if sys.version_info >= (3, 11):
            return hashlib.file_digest(file, "sha256").hexdigest()
        hashed = hashlib.sha256()
        while piece := file.read(1 << 20):
            hashed.update(piece)
        return hashed.hexdigest()


def _spread(count: int) -> np.ndarray:
    """The indices of at most SAMPLES voxels, evenly over an axis."""
    number = min(count, SAMPLES)
    return (np.arange(number) * count + count // 2) // number
