"""Resamples oblique scans to the anatomical axes, and their maps back to the scan's own grid."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel.orientations import inv_ornt_aff, io_orientation
from scipy import ndimage

from preprocessing.volume import Box, Volume, find_box

MOST_TILT_DEGREES = 20  # of scans left as they are: heads tilt as much in straight scans
SLAB = 32  # planes
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
        """(the volume, `inside` (X, Y, Z) bool of it) on this grid; values are averaged over what is inside only."""
        box = _grow(find_box(inside))
        share = self._interpolate(volume, inside, box)
        values, brain = self._interpolate(volume, np.where(inside[box], volume.values[box], 0), box), share > 0.5
        values /= np.maximum(share, 1e-6, out=share)
        missing = volume.missing
        if missing is not None:
            missing = self._interpolate(volume, missing, box) > 0
        brought = Volume(values, np.array(self.affine), "RAS", self.shape, volume.spacing_mm, missing)
        return brought, np.asfortranarray(brain)

    def bring_mask(self, volume: Volume, mask: np.ndarray) -> np.ndarray:
        """A mask (X, Y, Z) bool of the volume on this grid."""
        return np.asfortranarray(self._interpolate(volume, mask, _grow(find_box(mask))) > 0.5)

    def take_back(self, values: np.ndarray, shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
        """A map (X, Y, Z) on this grid, NaN where unknown, resampled to a file's grid: (I, J, K) and affine."""
        to_grid = np.linalg.inv(np.array(self.affine)) @ affine
        known = np.isfinite(values)
        box = _grow(find_box(known))
        parts = [part.astype(np.float32) for part in (known[box], np.where(known[box], values[box], 0))]
        corner = to_grid[:3, 3] - [side.start for side in box]
        taken = np.empty(shape, dtype=np.float32)
        for start in range(0, shape[0], SLAB):  # some planes at a time: several of 512^3 would fill the memory
            slab = taken[start : start + SLAB]
            offset = corner + to_grid[:3, 0] * start
            share, sums = (
                ndimage.affine_transform(part, to_grid[:3, :3], offset, slab.shape, order=1) for part in parts
            )
            slab[:] = np.where(share > 0.5, sums / np.maximum(share, 1e-6), np.nan)
        return taken

    def _interpolate(self, volume: Volume, values: np.ndarray, box: Box) -> np.ndarray:
        """Values of the volume (X, Y, Z), or of that box of it alone, on this grid, float32; 0 outside the box."""
        to_volume = np.linalg.inv(find_canonical_affine(volume)) @ np.array(self.affine)
        part = values[box] if values.shape == volume.values.shape else values
        offset = to_volume[:3, 3] - [side.start for side in box]
        return ndimage.affine_transform(part.astype(np.float32), to_volume[:3, :3], offset, self.shape, order=1)


def _grow(box: Box) -> Box:
    """A box along X, Y and Z two voxels larger than one along Z, Y and X: as far as an interpolation looks."""
    return tuple(slice(max(0, side.start - 2), side.stop + 2) for side in box[::-1])


def measure_tilt(affine: np.ndarray) -> float:
    """Degrees between the anatomical axes and those of a grid with that affine (4, 4), the largest of three."""
    axes = affine[:3, :3] / nib.affines.voxel_sizes(affine)
    canonical = np.abs([axes[int(axis), i] for i, axis in enumerate(io_orientation(affine)[:, 0])])
    return float(np.degrees(np.arccos(np.clip(canonical.min(), 0, 1))))


def find_canonical_affine(volume: Volume) -> np.ndarray:
    """(4, 4) from the voxels of a volume in canonical order to scanner mm."""
    return volume.affine @ inv_ornt_aff(io_orientation(volume.affine), volume.shape)
