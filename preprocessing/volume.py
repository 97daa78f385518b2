"""Reads a scan into canonical RAS order, and finds the brain or head in it where there is no mask.

Axis 0 runs left to right, axis 1 posterior to anterior, axis 2 inferior to superior.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import fill_voids
import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, io_orientation
from scipy import ndimage

from common.cli import DataError
from preprocessing.images import read_image

BRAIN_ML = (700, 2200)  # of an adult's or older child's brain; every adult head is larger
LARGEST_VALUE = 1e30  # beyond, and below its inverse, float32 has no room to calculate
RINGING = 0.3  # of the highest values: how far a spline's ringing goes beyond the background
FAINT = 0.02  # of the highest values: what a spline leaves in empty voxels
MOST_SAMPLES = 1 << 26  # of more voxels, a threshold is found from every second along each axis
COARSE_MM = 3.0  # voxels that are fine enough to see a skull
DARK = 0.1  # of Otsu's threshold: bone is, sulci are not
NOISE = 0.15  # share too dark for tissue of what is not background: up to 0.06 in brains, from 0.2 on in heads
SHELL = (0.08, 0.25)  # of the radius: depth under the surface at which the skull lies
DARK_SHELL = 0.003  # share in the median octant: up to 0.001 in 48 stripped brains, from 0.007 on in 49 of 50 heads

Box = tuple[slice, slice, slice]  # along Z, Y and X


@dataclass(frozen=True)
class Volume:
    """A scan in canonical RAS order.

    values      (X, Y, Z) of any real type, the scanner's arbitrary units
    affine      (4, 4) voxel to scanner mm, of the file as stored
    axes        three letters, where the file's stored axes point to ("PSR")
    shape       the file's stored shape, three numbers
    spacing_mm  voxel size along left-right, posterior-anterior, inferior-superior
    missing     (X, Y, Z) bool, voxels that are not a finite number in the file; None where all are
    """

    values: np.ndarray
    affine: np.ndarray
    axes: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    missing: np.ndarray | None = None


def read_volume(path: Path, axes: str | None = None, distrusted: str | None = None, index: int | None = None) -> Volume:
    """Read a scan into canonical RAS order; the arguments are `read_image`'s. Raises DataError with the cure.

    Voxels that are not finite become 0 and are listed in `missing`.
    """
    image = read_image(path, axes, distrusted, index)
    orientation = io_orientation(image.affine)
    values = apply_orientation(image.values, orientation)
    missing = None
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        if not finite.any():
            raise DataError(f"{path}: holds no finite value; convert it again from its source")
        largest = max(abs(float(values.max(where=finite, initial=0))), abs(float(values.min(where=finite, initial=0))))
        if largest and not 1 / LARGEST_VALUE <= largest <= LARGEST_VALUE:
            raise DataError(
                f"{path}: its values go up to {largest:g}, out of the range of intensities; convert it again"
            )
        if not finite.all():
            missing = ~finite
            values = np.where(finite, values, 0)
    canonical_spacing = np.empty(3)
    canonical_spacing[orientation[:, 0].astype(int)] = nib.affines.voxel_sizes(image.affine)
    return Volume(
        values=values,
        affine=image.affine,
        axes="".join(nib.orientations.ornt2axcodes(orientation)),
        shape=image.values.shape,
        spacing_mm=tuple(float(round(s, 5)) for s in canonical_spacing),
        missing=missing,
    )


def find_brain(volume: Volume) -> tuple[np.ndarray, bool]:
    """The brain or head in a scan that has no brain mask: (mask (X, Y, Z) bool, whether the skull is off).

    A skull-stripped scan has one constant outside, whatever its value, and what is left is no larger than a brain and
    has no dark shell. Otherwise the whole head is taken: what lies above half of Otsu's threshold over the lowest
    value, opened, closed and filled.
    """
    brain, box = _find_stripped_brain(volume)
    return (_find_head(volume.values.T, box).T, False) if brain is None else (brain.T, True)


def _find_stripped_brain(volume: Volume) -> tuple[np.ndarray | None, Box]:
    """(the brain (Z, Y, X) bool, or None where the skull is on; the box around what is no background)."""
    values, voxel_ml = volume.values.T, np.prod(volume.spacing_mm) / 1000  # (Z, Y, X): as most files store it
    inside, background = _leave_constants_out(values, voxel_ml)
    coarse = _thin_out(volume.spacing_mm[::-1])
    sample = values[coarse] - np.float64(background)
    lowest, highest = np.percentile(sample, 0.1), np.percentile(np.abs(sample), 99.5)
    on_floor = -lowest <= RINGING * highest
    if np.count_nonzero(inside) * voxel_ml >= BRAIN_ML[1] or (on_floor and lowest < 0):
        limit = max(-lowest if on_floor else 0, FAINT * highest)
        planes = zip(inside, values, strict=True)  # plane by plane: all of 512^3 as float32 would take a GB
        visible = np.stack([part & (np.abs(plane - np.float32(background)) > limit) for part, plane in planes])
        if np.count_nonzero(visible) * voxel_ml < BRAIN_ML[1]:
            inside = visible
    if np.count_nonzero(inside) * voxel_ml < BRAIN_ML[1]:
        brain = fill_voids.fill(inside)
        if not (on_floor and _has_skull(values, background, brain, volume.spacing_mm[::-1])):
            return brain, find_box(inside.T)
    return None, find_box(inside.T)


def _leave_constants_out(values: np.ndarray, voxel_ml: float) -> tuple[np.ndarray, float]:
    """(what differs from the background, the innermost background's value).

    The background is the median at the four sides. Where most of what surrounds the rest is another constant, that is
    background as well: a stripped scan that was z-scored and then padded with 0 has two.
    """
    background = np.median(_list_sides(values))
    inside = values != background
    while np.count_nonzero(inside) * voxel_ml >= BRAIN_ML[1]:
        box = find_box(inside.T)
        sides = _list_sides(values[box])
        inner = np.median(sides)
        left = inside[box] & (values[box] != inner)
        if (
            inner == background
            or np.count_nonzero(sides == inner) < sides.size / 2
            or np.count_nonzero(left) < left.size / 20
        ):
            break
        inside[box], background = left, inner
    return inside, background


def _list_sides(values: np.ndarray) -> np.ndarray:
    """The values of (Z, Y, X) at its left, right, front and back; above and below, heads are often cut off."""
    return np.concatenate([values[:, :, i].ravel() for i in (0, -1)] + [values[:, i].ravel() for i in (0, -1)])


def _thin_out(spacing_mm: tuple[float, float, float]) -> Box:
    """Slices of one voxel in about COARSE_MM, along the axes of these voxel sizes."""
    return tuple(slice(None, None, max(1, round(COARSE_MM / side))) for side in spacing_mm)


def _has_skull(values: np.ndarray, background: float, inside: np.ndarray, spacing_mm: tuple) -> bool:
    """Whether a scan (Z, Y, X) that is no larger than a brain is a small head.

    A head is surrounded by noise, and bone, nearly as dark as air, forms a shell under its surface on all sides.
    """
    from skimage.filters import threshold_otsu  # imported here: scans with a brain mask do not need it

    coarse = _thin_out(spacing_mm)
    inside = inside[coarse]
    box = find_box(inside.T)
    inside = inside[box]
    height = (values[coarse][box] - np.float32(background)) * inside
    if not inside.size or height.min() == height.max():
        return False
    threshold = threshold_otsu(height)
    empty, dark = (np.count_nonzero(inside & (height <= part * threshold)) for part in (0.5, DARK))
    if empty < NOISE * np.count_nonzero(inside) and dark < DARK_SHELL / 4 * np.count_nonzero(inside):
        return False  # too little is dark for noise or a shell
    height, inside = (np.pad(part, 3) for part in (height, inside))  # room for closing
    head = fill_voids.fill(ndimage.binary_closing(height > threshold / 2, iterations=2))
    if np.count_nonzero(head & inside) < (1 - NOISE) * np.count_nonzero(inside):
        return True
    spacing_mm = np.multiply(spacing_mm, [along.step for along in coarse])
    radius_mm = (3 * np.count_nonzero(head) * np.prod(spacing_mm) / (4 * np.pi)) ** (1 / 3)
    depth = ndimage.distance_transform_edt(head, sampling=spacing_mm) / radius_mm
    shell = np.argwhere((depth > SHELL[0]) & (depth <= SHELL[1]))
    octant = (shell > ndimage.center_of_mass(head)) @ (4, 2, 1)
    dark = height[tuple(shell.T)] <= DARK * threshold
    counts = np.bincount(octant, minlength=8)
    return bool(np.median(np.bincount(octant, dark, 8) / np.maximum(counts, 1)) > DARK_SHELL)


def _find_head(values: np.ndarray, box: Box) -> np.ndarray:
    """What lies above half of Otsu's threshold over the lowest value of (Z, Y, X), opened, closed and filled."""
    from skimage.filters import threshold_otsu

    floor, step = values[box].min(), slice(None, None, 1 if values.size <= MOST_SAMPLES else 2)
    outside = np.ones(values.shape, dtype=bool)
    outside[box] = False
    sample = np.where(outside[step, step, step], floor, values[step, step, step])  # padding is air, whatever its value
    # Otsu's threshold splits air from tissue too high where fat is very bright, hence the half.
    head = np.zeros_like(outside)
    head[box] = values[box] > floor + (threshold_otsu(sample) - floor) / 2
    del outside, sample
    plain = head.size > MOST_SAMPLES  # scipy keeps lists of voxels otherwise: faster, but they take a GB of 512^3
    head = ndimage.binary_opening(head, iterations=2, brute_force=plain)
    head = ndimage.binary_closing(head, iterations=3, brute_force=plain)
    return fill_voids.fill(head)


def find_box(inside: np.ndarray) -> Box:
    """The smallest box around what is True in (X, Y, Z) bool, as slices along Z, Y and X; empty where nothing is."""
    flat = inside.any(axis=2)
    extents = [np.flatnonzero(line) for line in (inside.T.any(axis=(1, 2)), flat.any(axis=0), flat.any(axis=1))]
    return tuple(slice(int(e[0]), int(e[-1]) + 1) if len(e) else slice(0, 0) for e in extents)
