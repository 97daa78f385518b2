"""Extracts the brain from a scan of a whole head."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import nibabel as nib
import numpy as np

from common.cli import DataError
from preprocessing.volume import BRAIN_ML, Volume

if TYPE_CHECKING:
    from deepbet import BrainExtraction

PROBABLE = 0.5  # a voxel with a higher probability is brain


class Extracted(NamedTuple):
    """A brain that was extracted from a head.

    mask    (I, J, K) bool on the scan's own grid
    head    (size, size) float16: the middle slice, not masked
    """

    mask: np.ndarray
    head: np.ndarray


def extract_brain(path: Path, volume: Volume) -> np.ndarray:
    """The brain (X, Y, Z) bool of a head, by deepbet (Fisch et al., 2024), in some seconds.

    path names the scan in a DataError: where nothing like a brain is found, or its volume is not that of a brain.
    """
    network = _load_network()
    try:
        probability = network.run_model(np.ascontiguousarray(volume.values, dtype=np.float32))
        inside = network.postprocess(probability > PROBABLE)
    except (AssertionError, ValueError):  # how it says that its mask is empty
        inside = np.zeros(volume.values.shape, bool)
    brain_ml = np.count_nonzero(inside) * np.prod(volume.spacing_mm) / 1000
    if not BRAIN_ML[0] <= brain_ml <= BRAIN_ML[1]:
        raise DataError(
            f"{path}: the brain extracted from it has {brain_ml:.0f} ml, not the size of a brain ({BRAIN_ML[0]} to "
            f"{BRAIN_ML[1]} ml); check the scan, or give it a brain mask"
        )
    return np.asfortranarray(inside, dtype=bool)


def save_brain_mask(path: Path, mask: np.ndarray, affine: Sequence[Sequence[float]]) -> None:
    """Save a mask (I, J, K) bool as NIfTI; affine (4, 4) to scanner mm."""
    image = nib.Nifti1Image(mask.astype(np.uint8), np.array(affine))
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


@lru_cache(maxsize=1)
def _load_network() -> BrainExtraction:
    """Once for each worker, on a GPU where there is one."""
    from deepbet import BrainExtraction  # imported here: it takes a second, and most scans come stripped

    return BrainExtraction()
