"""Reads a scan and its masks into canonical RAS order, and finds the brain where there is no mask.

Axis 0 runs left to right, axis 1 posterior to anterior, axis 2 inferior to superior.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, io_orientation
from scipy import ndimage

from common.cli import DataError
from preprocessing.images import read_image

STRIPPED_BRAIN_ML = 2200  # no brain is larger, no head smaller


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


def read_mask(path: Path, volume: Volume, axes: str | None = None, distrusted: str | None = None) -> np.ndarray:
    """Read a mask of this volume as (X, Y, Z) bool in canonical order; DataError where it does not fit the scan."""
    mask = read_image(path, axes, distrusted)
    if mask.values.shape != volume.shape or not np.allclose(mask.affine, volume.affine, atol=1e-2):
        raise DataError(
            f"{path}: shape {mask.values.shape} and affine do not fit its scan ({volume.shape}); "
            "resample it onto the scan"
        )
    inside = np.asfortranarray(apply_orientation(mask.values > 0, io_orientation(mask.affine)))
    if not inside.any():
        raise DataError(f"{path}: is empty; make the mask again or take it away")
    return inside


def find_brain(volume: Volume) -> tuple[np.ndarray, bool]:
    """The brain or head in a scan that has no brain mask: (mask (X, Y, Z) bool, whether the skull is off).

    A skull-stripped scan has one constant outside and what is left is no larger than a brain. Otherwise the whole
    head is taken: what lies above Otsu's threshold, closed and filled.
    """
    values = volume.values
    faces = np.concatenate([values[i].ravel() for i in (0, -1)] + [values[:, i].ravel() for i in (0, -1)])
    background = np.median(faces)
    voxel_ml = np.prod(volume.spacing_mm) / 1000
    inside = (values != background).T  # (Z, Y, X): as most files store it
    if np.count_nonzero(inside) * voxel_ml < STRIPPED_BRAIN_ML:
        return fill_holes(inside).T, True
    from skimage.filters import threshold_otsu  # imported here: only unstripped heads without a mask need it

    # Otsu's threshold splits air from tissue too high where fat is very bright, hence the half.
    planes = values.T
    inside = ndimage.binary_opening(planes > threshold_otsu(planes) / 2, iterations=2)
    inside = ndimage.binary_closing(inside, iterations=3)
    return fill_holes(inside).T, False


def fill_holes(inside: np.ndarray) -> np.ndarray:
    """Fill what cannot be reached from outside over faces, as `scipy.ndimage.binary_fill_holes` does, only faster."""
    box = find_box(inside.T)
    labels, _ = ndimage.label(~np.pad(inside[box], 1))
    filled = inside.copy()
    filled[box] = (labels != labels[0, 0, 0])[1:-1, 1:-1, 1:-1]
    return filled


def find_box(inside: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box around what is True in (X, Y, Z) bool, as slices along Z, Y and X; empty where nothing is."""
    flat = inside.any(axis=2)
    extents = [np.flatnonzero(line) for line in (inside.T.any(axis=(1, 2)), flat.any(axis=0), flat.any(axis=1))]
    return tuple(slice(int(e[0]), int(e[-1]) + 1) if len(e) else slice(0, 0) for e in extents)
