"""Where an axial stack lies in its scan: cut the stack out of the volume, and restore a map to the scan's own grid.

Everything here works in canonical RAS order: axis 0 runs left to right, axis 1 posterior to anterior, axis 2 inferior
to superior. A slice's first axis runs posterior to anterior and its second left to right, so that
`imshow(slice, origin="lower")` shows the nose up and the subject's right on the right.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy import ndimage, sparse

from common.cli import DataError
from preprocessing.oblique import StraightGrid
from preprocessing.volume import Box, Volume, find_box

SLICE_HOLDS_BRAIN_MM2 = 100  # a slice with less than 1 cm2 of brain does not count as one
MEDIAN = 0.62  # of the brain, after the scaling
BRAIN_FLOOR = 1e-3  # the least value of a brain pixel, so that `slice > 0` is the brain
ONE = 0x3C00  # the bits of 1 in float16; those of what is negative, infinite or no number are larger
RIM_MM = 6.0  # depth at which brain masks of different tools differ no more
SLICE_THICKNESS_MM = 2.0  # thinner slices are averaged to this, so that 1 mm scans resemble 2 mm ones

Scale = tuple[float, float, float]  # (low, high, exponent) of `scale_intensity`


@dataclass(frozen=True)
class Geometry:
    """The place of a stack (n, size, size) in its scan. scan.json holds the same fields.

    shape       (I, J, K) of the file as stored
    affine      (4, 4) rows, from stored voxels to scanner mm
    axes        three letters, where the stored axes point to ("PSR")
    spacing_mm  voxel size along left-right, posterior-anterior, inferior-superior
    centre      the stack's centre in voxels, left-right and posterior-anterior
    pixel_mm    side of a pixel
    size        pixels along each side of a slice
    slices      the kept slices' indices along the inferior-superior axis, rising
    straight    the grid along the anatomical axes to which an oblique scan was resampled first; None: it was not
    """

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, float, float, float], ...]
    axes: str
    spacing_mm: tuple[float, float, float]
    centre: tuple[float, float]
    pixel_mm: float
    size: int
    slices: tuple[int, ...]
    straight: StraightGrid | None = None

    @classmethod
    def from_record(cls, record: dict) -> Geometry:
        """The geometry that a scan.json holds."""
        tuples = {name: tuple(record[name]) for name in ("shape", "spacing_mm", "centre", "slices")}
        affine, straight = _freeze(record["affine"]), record.get("straight")
        if straight:
            straight = StraightGrid(_freeze(straight["shape"]), _freeze(straight["affine"]))
        plain = {name: record[name] for name in ("axes", "pixel_mm", "size")}
        return cls(affine=affine, **tuples, **plain, straight=straight)

    def to_record(self) -> dict:
        """Its fields as plain lists and numbers; `straight` only where there is one."""
        record = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in record.items() if value is not None}

    @property
    def slice_spacing_mm(self) -> float:
        """Distance between two slices."""
        return self.spacing_mm[2]

    @property
    def sampling_mm(self) -> tuple[float, float]:
        """Distance between slices, between pixels."""
        return self.spacing_mm[2], self.pixel_mm

    @property
    def pixel_ml(self) -> float:
        """Volume of a pixel of the stack."""
        return self.spacing_mm[2] * self.pixel_mm**2 / 1000

    @property
    def canonical_shape(self) -> tuple[int, int, int]:
        """(X, Y, Z): of the grid that was cut, the file's in canonical order or the straight one."""
        if self.straight:
            return self.straight.shape
        shape = [0, 0, 0]
        for stored_axis, axis in enumerate(axcodes2ornt(self.axes)[:, 0].astype(int)):
            shape[axis] = self.shape[stored_axis]
        return tuple(shape)

    @property
    def stack_affine(self) -> np.ndarray:
        """(4, 4) affine to scanner mm of a stack that is turned to (right, anterior, superior) pixels."""
        if self.straight:
            canonical = np.array(self.straight.affine)
        else:
            to_stored = inv_ornt_aff(ornt_transform(axcodes2ornt(self.axes), axcodes2ornt("RAS")), self.shape)
            canonical = np.array(self.affine) @ to_stored
        steps = [self.pixel_mm / self.spacing_mm[axis] for axis in (0, 1)]
        corner = [self.centre[axis] - steps[axis] * (self.size - 1) / 2 for axis in (0, 1)]
        within = np.diag([*steps, 1.0, 1.0])
        within[:3, 3] = [*corner, self.slices[0]]
        return canonical @ within

    def cut(self, volume: Volume, brain: np.ndarray, scale: Scale) -> np.ndarray:
        """The stack (n, size, size) float16 in [0, 1] of a scan: 0 outside the brain (X, Y, Z) and above 0 inside."""
        low, high, exponent = scale
        # Transposed, (Z, Y, X): as most files store it, so that axial slices lie together.
        planes, values = brain.T, volume.values.T
        box = (self._weigh_slices()[1], *find_box(brain)[1:])
        stack = np.zeros((len(self.slices), self.size, self.size), np.float16)
        # Values are averaged over the brain alone, so that the rim does not fade into the background.
        pairs = self._resample(_scale_planes(values[box], planes[box], low, high), box)
        for target, pair in zip(stack, pairs, strict=True):
            value, share = pair[:, 0], pair[:, 1]
            inside = share > 0.5
            target[inside] = np.clip((value[inside] / share[inside]) ** np.float32(exponent), BRAIN_FLOOR, 1)
        return stack

    def cut_mask(self, mask: np.ndarray) -> np.ndarray:
        """The stack (n, size, size) uint8 of a lesion mask (X, Y, Z)."""
        box = (self._weigh_slices()[1], *find_box(mask)[1:])
        planes = (plane[:, None].astype(np.float32) for plane in mask.T[box])
        return np.stack([share[:, 0] > 0.5 for share in self._resample(planes, box)]).astype(np.uint8)

    def restore(self, stack: np.ndarray) -> np.ndarray:
        """Resample a map of the stack, (n, size, size) with NaN outside the brain, to the stored grid (I, J, K).

        Linear within the slice; NaN where nothing was scored: outside the brain, the field of view or the kept slices.
        """
        shape = self.canonical_shape
        scored = np.isfinite(stack)
        columns, rows = (
            resampling_weights(
                (self.size, self.pixel_mm, (self.size - 1) / 2),
                (shape[axis], self.spacing_mm[axis], self.centre[axis]),
                self.pixel_mm,
            )
            for axis in (0, 1)
        )
        # Sparse products, as in `_resample`: dense ones give other last digits with another number of threads.
        rows, columns = sparse.csr_array(rows), sparse.csr_array(columns)
        canonical = np.full(shape, np.nan, dtype=np.float32)
        for index, plane, known in zip(self.slices, stack, scored, strict=True):
            share, values = (
                (columns @ (rows @ part.astype(np.float32)).T).T for part in (known, np.where(known, plane, 0))
            )
            # A brain voxel at the rim takes the value of the brain pixels beside it, so a small share is enough.
            canonical[:, :, index] = np.where(share > 0.05, values / np.maximum(share, 1e-6), np.nan).T
        if self.straight:
            return self.straight.take_back(canonical, self.shape, np.array(self.affine))
        return self.store(canonical)

    def store(self, values: np.ndarray) -> np.ndarray:
        """An array (X, Y, Z) in canonical order in the file's own order, (I, J, K)."""
        return apply_orientation(values, ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(self.axes)))

    def _weigh_slices(self) -> tuple[np.ndarray, slice]:
        """(weights (n, Z) of the scan's slices in each kept one, which slices have weights that are not 0)."""
        axis = (self.canonical_shape[2], self.spacing_mm[2], 0)
        across = resampling_weights(axis, axis, max(SLICE_THICKNESS_MM, self.spacing_mm[2]))[list(self.slices)]
        used = np.flatnonzero(across.any(axis=0))
        return across, slice(int(used[0]), int(used[-1]) + 1)

    def _resample(self, planes: Iterable[np.ndarray], box: Box) -> Iterator[np.ndarray]:
        """(Y, C, X) float32 planes of that box of the volume, 0 outside -> (size, C, size) of each kept slice."""
        columns, rows = (
            resampling_weights(
                (self.canonical_shape[axis], self.spacing_mm[axis], self.centre[axis]),
                (self.size, self.pixel_mm, (self.size - 1) / 2),
                max(self.pixel_mm, self.spacing_mm[axis]),
            )[:, box[2 - axis]]
            for axis in (0, 1)
        )
        across = self._weigh_slices()[0][:, box[0]]
        # Few weights of a row are not 0, so sparse products are faster than dense ones, and one thread does them.
        rows, columns = sparse.csr_array(rows), sparse.csr_array(columns)

        def resample(plane):
            narrow = (rows @ plane.reshape(len(plane), -1)).reshape(-1, plane.shape[2])
            return (columns @ narrow.T).T.reshape(self.size, -1, self.size)

        resampled = map(resample, planes)
        seen, read = {}, 0  # the planes that this kept slice and those to come are made of; how many were read
        for weights in across:
            used = np.flatnonzero(weights)
            seen = {z: plane for z, plane in seen.items() if z >= used[0]}
            while read <= used[-1]:
                seen[read] = next(resampled)
                read += 1
            yield sum(weights[z] * seen[z] for z in used)


def cut_stack(
    volume: Volume, brain: np.ndarray, skull_off: bool, keep: float, size: int, fov_mm: float
) -> tuple[np.ndarray, Geometry, Scale]:
    """Cut a scan into its axial stack: (stack as `Geometry.cut` gives it, its geometry, its intensity scale).

    brain      (X, Y, Z) bool
    skull_off  whether `brain` is the brain alone, so that slices are counted within it
    keep       the share of axial slices kept, the middle ones
    size       pixels along each side; fov_mm: their extent in mm, centred on the brain

    Slices at the ends that turn out to hold nothing are left out. Raises DataError where the brain is empty, constant
    or not finite, and where a slice would be.
    """
    geometry = place_stack(volume, brain, skull_off, keep, size, fov_mm)
    if volume.missing is not None and (volume.missing & brain).any():
        raise DataError(f"{(volume.missing & brain).sum()} voxels of its brain are not finite; convert it again")
    scale = scale_intensity(sample_interior(volume, brain))
    stack = geometry.cut(volume, brain, scale)
    bits = stack.view(np.uint16)  # of float16 from 0 to 1, in the order of the numbers; faster than these
    if bits.max() > ONE:
        raise DataError("its slices would hold values outside 0 to 1; convert it again from its source")
    holds = np.flatnonzero(bits.any(axis=(1, 2)))
    if not len(holds):
        raise DataError("no brain in the slices kept; check its orientation and its mask")
    kept = slice(int(holds[0]), int(holds[-1]) + 1)
    if len(holds) < kept.stop - kept.start:
        raise DataError("a slice between others holds no brain; check the mask")
    return stack[kept], replace(geometry, slices=geometry.slices[kept]), scale


def place_stack(volume: Volume, brain: np.ndarray, skull_off: bool, keep: float, size: int, fov_mm: float) -> Geometry:
    """Where the stack of a scan lies; the arguments are those of `cut_stack`."""
    planes = brain.T
    area_mm2 = np.array([np.count_nonzero(plane) for plane in planes]) * volume.spacing_mm[0] * volume.spacing_mm[1]
    holds = area_mm2 >= SLICE_HOLDS_BRAIN_MM2
    if not holds.any():
        raise DataError("its brain mask is empty; make the mask again")
    indices = keep_middle(holds if skull_off else np.ones_like(holds), keep)
    seen = planes[indices].any(axis=0)
    in_plane = [np.flatnonzero(seen.any(axis=axis)) for axis in (0, 1)]
    if not all(len(i) for i in in_plane):
        raise DataError("no brain in the slices kept; check its orientation and its mask")
    return Geometry(
        shape=tuple(volume.shape),
        affine=tuple(tuple(row) for row in volume.affine.tolist()),
        axes=volume.axes,
        spacing_mm=volume.spacing_mm,
        centre=tuple(float(i[0] + i[-1]) / 2 for i in in_plane),
        pixel_mm=fov_mm / size,
        size=size,
        slices=tuple(int(i) for i in indices),
    )


def keep_middle(holds: np.ndarray, keep: float) -> np.ndarray:
    """Indices of the middle `keep` (0 to 1] of the slices from the first to the last that holds something."""
    held = np.flatnonzero(holds)
    extent = held[-1] - held[0] + 1
    count = max(1, round(keep * extent))
    return held[0] + (extent - count) // 2 + np.arange(count)


def sample_interior(volume: Volume, brain: np.ndarray) -> np.ndarray:
    """Values (n,) of a scan at least RIM_MM within its brain (X, Y, Z) bool, about one each 2 mm; of all if none is.

    What lies at the rim, air or fluid or none, depends on the tool that stripped the skull.
    """
    box = find_box(brain)
    steps = [max(1, round(2 / side)) for side in volume.spacing_mm[::-1]]
    coarse = tuple(slice(part.start, part.stop, step) for part, step in zip(box, steps, strict=True))
    inside, values = brain.T[coarse], volume.values.T[coarse]
    reach = [round(RIM_MM / (side * step)) for side, step in zip(volume.spacing_mm[::-1], steps, strict=True)]
    # of uint8 a minimum is faster than an erosion; beyond the box there is no brain
    interior = ndimage.minimum_filter(inside.view(np.uint8), [2 * r + 1 for r in reach], mode="constant") > 0
    return values[interior if interior.any() else inside]


def scale_intensity(values: np.ndarray) -> Scale:
    """The scanner values (low, high) that become 0 and 1, and the exponent that then brings the median to MEDIAN.

    From the values within the brain, by robust percentiles: the lowest are fluid of the ventricles. Scanners differ
    by a contrast curve that the exponent takes away.
    """
    low, median, high = (float(value) for value in np.percentile(values, (0.5, 50, 99.5)))
    if not high - low > 1e-6 * max(abs(low), abs(high)):  # float32 resolves no more
        raise DataError("is constant inside the brain; convert it again from its source")
    return low, high, float(np.log(MEDIAN) / np.log(np.clip((median - low) / (high - low), 0.2, 0.95)))


def resampling_weights(
    source: tuple[int, float, float], target: tuple[int, float, float], width_mm: float
) -> np.ndarray:
    """(target samples, source samples) weights of a 1-D linear resampling: a tent about each target sample.

    source, target  each (samples, spacing in mm, centre in samples); both run the same way and both centres are one
                    place in space
    width_mm        the tent's half-width

    Rows sum to 1, or are 0 where the target lies outside the source.
    """
    place_in, place_out = ((np.arange(count) - centre) * spacing for count, spacing, centre in (source, target))
    weights = np.maximum(0, 1 - np.abs(place_out[:, None] - place_in[None, :]) / width_mm)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
    inside = (place_out >= place_in[0] - source[1] / 2) & (place_out <= place_in[-1] + source[1] / 2)
    return (weights * inside[:, None]).astype(np.float32)


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


def _freeze(value):
    """Lists as tuples, at any depth."""
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value
