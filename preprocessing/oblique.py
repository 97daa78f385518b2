"""Resamples oblique scans to the anatomical axes, and their maps back to the scan's own grid."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel.orientations import inv_ornt_aff, io_orientation
from scipy import ndimage

from preprocessing.volume import Volume, find_box

MOST_TILT_DEGREES = 20  # of scans left as they are: heads tilt as much in straight scans
MARGIN_MM = 5.0  # around what is resampled


@dataclass(frozen=True)
class StraightGrid:
    """A grid along the anatomical axes: shape (X, Y, Z), affine (4, 4) rows from its voxels to scanner mm."""

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, float, float, float], ...]

    @classmethod
    def around(cls, volume: Volume, inside: np.ndarray) -> StraightGrid:
        """The grid with a volume's voxel size that covers its `inside` (X, Y, Z) bool."""
        box = find_box(inside)[::-1]
        corners = itertools.product(*((side.start, side.stop - 1) for side in box))
        corners_mm = nib.affines.apply_affine(find_canonical_affine(volume), list(corners))
        low, high = corners_mm.min(axis=0) - MARGIN_MM, corners_mm.max(axis=0) + MARGIN_MM
        affine = np.diag([*volume.spacing_mm, 1.0])
        affine[:3, 3] = low
        shape = np.ceil((high - low) / volume.spacing_mm).astype(int) + 1
        return cls(tuple(shape.tolist()), tuple(tuple(row) for row in affine.tolist()))

    def bring(self, volume: Volume, inside: np.ndarray) -> tuple[Volume, np.ndarray]:
        """(the volume, its `inside` (X, Y, Z) bool) on this grid; values are averaged over what is inside only."""
        to_volume = np.linalg.inv(find_canonical_affine(volume)) @ np.array(self.affine)
        share = self._interpolate(inside, to_volume)
        values = self._interpolate(np.where(inside, volume.values, 0), to_volume) / np.maximum(share, 1e-6)
        missing = volume.missing
        if missing is not None:
            missing = self._interpolate(missing, to_volume) > 0
        brought = Volume(values, np.array(self.affine), "RAS", self.shape, volume.spacing_mm, missing)
        return brought, np.asfortranarray(share > 0.5)

    def bring_mask(self, volume: Volume, mask: np.ndarray) -> np.ndarray:
        """A mask (X, Y, Z) bool of the volume on this grid."""
        to_volume = np.linalg.inv(find_canonical_affine(volume)) @ np.array(self.affine)
        return np.asfortranarray(self._interpolate(mask, to_volume) > 0.5)

    def take_back(self, values: np.ndarray, shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
        """A map (X, Y, Z) on this grid, NaN where unknown, resampled to a file's grid: (I, J, K) and affine."""
        to_grid = np.linalg.inv(np.array(self.affine)) @ affine
        known = np.isfinite(values)
        share, sums = (
            ndimage.affine_transform(part.astype(np.float32), to_grid[:3, :3], to_grid[:3, 3], shape, order=1)
            for part in (known, np.where(known, values, 0))
        )
        return np.where(share > 0.5, sums / np.maximum(share, 1e-6), np.nan).astype(np.float32)

    def _interpolate(self, values: np.ndarray, to_volume: np.ndarray) -> np.ndarray:
        matrix, offset = to_volume[:3, :3], to_volume[:3, 3]
        return ndimage.affine_transform(values.astype(np.float32), matrix, offset, self.shape, order=1)


def measure_tilt(affine: np.ndarray) -> float:
    """Degrees between the anatomical axes and those of a grid with that affine (4, 4), the largest of three."""
    axes = affine[:3, :3] / nib.affines.voxel_sizes(affine)
    canonical = np.abs([axes[int(axis), i] for i, axis in enumerate(io_orientation(affine)[:, 0])])
    return float(np.degrees(np.arccos(np.clip(canonical.min(), 0, 1))))


def find_canonical_affine(volume: Volume) -> np.ndarray:
    """(4, 4) from the voxels of a volume in canonical order to scanner mm."""
    return volume.affine @ inv_ornt_aff(io_orientation(volume.affine), volume.shape)
