"""One scan <-> its axial stack in [0, 1].

Everything here works in canonical RAS order: axis 0 runs left to right, axis 1 posterior to anterior, axis 2 inferior
to superior. `read_volume` brings a file there, `cut_stack` makes the axial stack of it, and `restore_to_grid` takes a
map over the stack back to the file's own voxels. A slice's first axis runs posterior to anterior and its second left
to right, so `imshow(slice, origin="lower")` shows the nose up and the subject's right on the right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from scipy import ndimage, sparse

from preprocessing.images import read_image
from preprocessing.scans import DataError

STRIPPED_BRAIN_ML = 2200  # no brain is larger, no head smaller
SLICE_HOLDS_BRAIN_MM2 = 100  # a slice with less than 1 cm2 of brain does not count as one
MEDIAN = 0.62  # what half of the brain lies below
BRAIN_FLOOR = 1e-3  # the least value of a brain pixel, so that `slice > 0` is the brain
SLICE_THICKNESS_MM = 2.0  # thinner slices are averaged to this, so that 1 mm scans look like 2 mm ones


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


def read_volume(path: Path, axes: str | None = None, doubted: str | None = None, index: int | None = None) -> Volume:
    """Read a scan into canonical RAS order; the arguments are `read_image`'s. Raises DataError with the cure.

    Voxels that are not finite become 0 and are listed in `missing`.
    """
    image = read_image(path, axes, doubted, index)
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


def read_mask(path: Path, volume: Volume, axes: str | None = None, doubted: str | None = None) -> np.ndarray:
    """Read a mask of this volume as (X, Y, Z) bool in canonical order; DataError where it does not fit the scan."""
    mask = read_image(path, axes, doubted)
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
    """Find what to look at in a scan that has no brain mask: (mask (X, Y, Z) bool, whether the skull is off).

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


def keep_middle(holds: np.ndarray, keep: float) -> np.ndarray:
    """Indices of the middle `keep` (0 to 1] of the slices from the first to the last that holds something."""
    held = np.flatnonzero(holds)
    extent = held[-1] - held[0] + 1
    count = max(1, round(keep * extent))
    return held[0] + (extent - count) // 2 + np.arange(count)


def resampling_weights(
    n_in: int, spacing_in: float, centre_in: float, n_out: int, spacing_out: float, centre_out: float, width: float
) -> np.ndarray:
    """(n_out, n_in) weights of a 1-D linear resampling: a tent of half-width `width` (mm) about each output sample.

    Both axes run the same way and `centre_in` and `centre_out` (in samples) are one place in space. Rows sum to 1, but
    are 0 where the output lies outside the input.
    """
    place_in = (np.arange(n_in) - centre_in) * spacing_in
    place_out = (np.arange(n_out) - centre_out) * spacing_out
    weights = np.maximum(0, 1 - np.abs(place_out[:, None] - place_in[None, :]) / width)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
    inside = (place_out >= place_in[0] - spacing_in / 2) & (place_out <= place_in[-1] + spacing_in / 2)
    return (weights * inside[:, None]).astype(np.float32)


def scale_intensity(values: np.ndarray) -> tuple[float, float, float]:
    """The scanner values (low, high) that become 0 and 1, and the exponent that then brings the median to MEDIAN.

    From the brain's values, by robust percentiles; scanners differ by a contrast curve that the exponent takes away.
    """
    low, median, high = (float(value) for value in np.percentile(values, (0.5, 50, 99.5)))
    if not high > low:
        raise DataError("is constant inside the brain; convert it again from its source")
    return low, high, float(np.log(MEDIAN) / np.log(np.clip((median - low) / (high - low), 0.2, 0.95)))


def cut_stack(volume: Volume, brain: np.ndarray, skull_off: bool, keep: float, size: int, fov_mm: float):
    """Cut a scan into its axial stack.

    brain     (X, Y, Z) bool; skull_off: whether `brain` is the brain alone, so that slices are counted within it
    keep      the share of axial slices kept, the middle ones
    size      pixels along each side; fov_mm: their extent in mm, centred on the brain

    Returns (stack (n, size, size) float16 in [0, 1], 0 outside the brain and above 0 inside, record), where record is
    a dict of plain numbers: all that `restore_to_grid` and `cut_mask` need to find the same pixels again.
    """
    # Transposed, (Z, Y, X): as most files store it, so that axial slices lie together.
    planes, values = brain.T, volume.values.T
    area_mm2 = np.array([np.count_nonzero(plane) for plane in planes]) * volume.spacing_mm[0] * volume.spacing_mm[1]
    holds = area_mm2 >= SLICE_HOLDS_BRAIN_MM2
    if not holds.any():
        raise DataError("its brain mask is empty; make the mask again")
    indices = keep_middle(holds if skull_off else np.ones_like(holds), keep)
    seen = planes[indices].any(axis=0)
    in_plane = [np.flatnonzero(seen.any(axis=axis)) for axis in (0, 1)]
    if not all(len(i) for i in in_plane):
        raise DataError("no brain in the slices kept; check its orientation and its mask")
    if volume.missing is not None and (volume.missing & brain).any():
        raise DataError(f"{(volume.missing & brain).sum()} voxels of its brain are no finite number; convert it again")
    box = find_box(brain)
    # percentiles need no more of the voxels than every one at about 2 mm
    coarse = tuple(
        slice(b.start, b.stop, max(1, round(2 / s))) for b, s in zip(box, volume.spacing_mm[::-1], strict=True)
    )
    low, high, exponent = scale_intensity(values[coarse][planes[coarse]])
    record = {
        "shape": list(volume.shape),
        "affine": volume.affine.tolist(),
        "axes": volume.axes,
        "spacing_mm": list(volume.spacing_mm),
        "centre": [float(i[0] + i[-1]) / 2 for i in in_plane],
        "pixel_mm": fov_mm / size,
        "size": size,
        "slices": [int(i) for i in indices],
        "scale": [low, high, exponent],
        "skull_off": bool(skull_off),
    }
    stack = np.empty((len(indices), size, size), np.float16)
    box = (_used_slices(len(planes), record)[1], *box[1:])
    # Values are averaged over the brain alone, so that the rim does not fade into the background.
    both = _resample(_scale_planes(values[box], planes[box], low, high), box, record)
    for target, pair in zip(stack, both, strict=True):
        value, share = pair[:, 0], pair[:, 1]
        value = np.clip((value / np.maximum(share, 1e-6)) ** np.float32(exponent), BRAIN_FLOOR, 1)
        value[share <= 0.5] = 0
        target[:] = value
    return stack, record


def _scale_planes(values: np.ndarray, brain: np.ndarray, low: float, high: float) -> Iterator[np.ndarray]:
    """Each axial plane as (Y, 2, X) float32: its values with low to high brought to [0, 1], and its brain mask.

    One plane at a time, which stays in the processor's cache; the array is used again for the next.
    """
    plane = np.empty((values.shape[1], 2, values.shape[2]), np.float32)
    scaled, within = plane[:, 0], plane[:, 1]
    for value, mask in zip(values, brain, strict=True):
        np.subtract(value, low, out=scaled, dtype=np.float32, casting="same_kind")
        scaled /= np.float32(high - low)
        np.clip(scaled, 0, 1, out=scaled)
        within[:] = mask
        scaled *= within
        yield plane


def find_box(inside: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box around what is True in (X, Y, Z) bool, as slices along Z, Y and X; empty where nothing is."""
    flat = inside.any(axis=2)
    extents = [np.flatnonzero(line) for line in (inside.T.any(axis=(1, 2)), flat.any(axis=0), flat.any(axis=1))]
    return tuple(slice(int(e[0]), int(e[-1]) + 1) if len(e) else slice(0, 0) for e in extents)


def cut_mask(mask: np.ndarray, record: dict) -> np.ndarray:
    """The (n, size, size) uint8 stack of a lesion mask (X, Y, Z) over the pixels that `record` describes."""
    box = (_used_slices(mask.shape[2], record)[1], *find_box(mask)[1:])
    planes = (plane[:, None].astype(np.float32) for plane in mask.T[box])
    return np.stack([share[:, 0] > 0.5 for share in _resample(planes, box, record)]).astype(np.uint8)


def restore_to_grid(stack: np.ndarray, record: dict) -> np.ndarray:
    """Take a map over the stack, (n, size, size) with NaN outside the brain, to the scan's stored grid (I, J, K).

    Linear within the slice; NaN where nothing was scored: outside the brain, the field of view or the kept slices.
    """
    canonical_shape = _canonical_shape(record)
    scored = np.isfinite(stack)
    weights = [
        resampling_weights(
            record["size"],
            record["pixel_mm"],
            (record["size"] - 1) / 2,
            canonical_shape[axis],
            record["spacing_mm"][axis],
            record["centre"][axis],
            record["pixel_mm"],
        )
        for axis in (0, 1)
    ]
    share = _apply(scored.astype(np.float32), weights[1], weights[0])
    values = _apply(np.where(scored, stack, 0).astype(np.float32), weights[1], weights[0])
    canonical = np.full(canonical_shape, np.nan, dtype=np.float32)
    # Half a pixel is enough: a brain voxel at the rim takes the value of the brain pixels beside it.
    canonical[:, :, record["slices"]] = np.where(share > 0.05, values / np.maximum(share, 1e-6), np.nan).transpose(
        2, 1, 0
    )
    return apply_orientation(canonical, ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(record["axes"])))


def _canonical_shape(record: dict) -> list[int]:
    order = axcodes2ornt(record["axes"])[:, 0].astype(int)
    shape = [0, 0, 0]
    for stored_axis, canonical_axis in enumerate(order):
        shape[canonical_axis] = record["shape"][stored_axis]
    return shape


def _used_slices(depth: int, record: dict) -> tuple[np.ndarray, slice]:
    """(weights (n, depth) of the axial slices in each kept one, at least SLICE_THICKNESS_MM thick; those not all 0)."""
    spacing = record["spacing_mm"][2]
    across = resampling_weights(depth, spacing, 0, depth, spacing, 0, max(SLICE_THICKNESS_MM, spacing))
    across = across[record["slices"]]
    used = np.flatnonzero(across.any(axis=0))
    return across, slice(int(used[0]), int(used[-1]) + 1)


def _resample(planes: Iterable[np.ndarray], box: tuple[slice, slice, slice], record: dict) -> Iterator[np.ndarray]:
    """(Y, C, X) float32 planes of that box of the volume, 0 outside -> (size, C, size) of each kept slice, in order."""
    spacing, size, pixel = record["spacing_mm"], record["size"], record["pixel_mm"]
    shape = _canonical_shape(record)
    columns, rows = (
        resampling_weights(
            shape[axis],
            spacing[axis],
            record["centre"][axis],
            size,
            pixel,
            (size - 1) / 2,
            max(pixel, spacing[axis]),
        )[:, box[2 - axis]]
        for axis in (0, 1)
    )
    across = _used_slices(shape[2], record)[0][:, box[0]]
    # Few weights of a row are not 0, so sparse products are faster than dense ones, and one thread does them.
    rows, columns = sparse.csr_array(rows), sparse.csr_array(columns)

    def resample(plane):
        narrow = (rows @ plane.reshape(len(plane), -1)).reshape(-1, plane.shape[2])
        return (columns @ narrow.T).T.reshape(size, -1, size)

    resampled = map(resample, planes)
    seen, read = {}, 0  # the planes that this kept slice and those to come are made of; how many were read
    for weights in across:
        used = np.flatnonzero(weights)
        seen = {z: plane for z, plane in seen.items() if z >= used[0]}
        while read <= used[-1]:
            seen[read] = next(resampled)
            read += 1
        yield sum(weights[z] * seen[z] for z in used)


def _apply(planes: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Resample each plane: rows @ plane @ columns.T."""
    return np.matmul(np.matmul(rows, planes), columns.T)
