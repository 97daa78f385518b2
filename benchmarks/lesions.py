"""Paints lesions into the stacks of healthy scans, to choose by: shapes and levels of their own, not the training's.

A lesion is an ellipsoid at random, cut by smooth noise, its volume even over the logarithm: of 0.6 to 38 ml, darker
than grey matter, grey in any tissue, brighter than white matter, or grey with the tissue around it pushed away; or of
15 to 120 ml, as tumours are: tissue that is darkened with a gradual edge, and pushed, most around a dark core.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import ndimage

from preprocessing.store import LoadedScan

VOLUME_ML = dict.fromkeys(("dark", "grey", "bright", "mass"), (0.6, 38)) | {"tumour": (15, 120)}  # by kind
EDGE_MM = 0.8  # standard deviation of the Gaussian that softens a lesion's edge


def paint_lesion(scan: LoadedScan, rng: np.random.Generator) -> tuple[LoadedScan, str]:
    """(the healthy scan with a lesion, as an abnormal one; the lesion's kind)."""
    between, pixel = scan.geometry.sampling_mm
    spacing = np.array((between, pixel, pixel))
    values = scan.stack.astype(np.float32)
    depth = ndimage.distance_transform_edt(values > 0, sampling=spacing)
    kind = str(rng.choice(list(VOLUME_ML)))
    inside, radius, offset = _draw_shape(values, depth, spacing, VOLUME_ML[kind], rng)
    if kind in ("mass", "tumour"):
        values = _push_away(values, depth, offset, radius, spacing)
    if kind == "tumour":
        painted = _infiltrate(values, inside, offset, radius, spacing, rng)
    else:
        weight = ndimage.gaussian_filter(inside.astype(np.float32), EDGE_MM / spacing) * rng.uniform(0.5, 1)
        painted = values + weight * (_draw_tissue(values, kind, spacing, rng) - values)
    stack = np.where(scan.stack > 0, painted.clip(1e-3, 1), 0).astype(np.float16)
    lesion = inside & (scan.stack > 0)
    pixels = pixel**2 / np.prod(scan.geometry.spacing_mm[:2])  # of the scan's own grid in one of the stack
    voxels = tuple(round(float(count) * pixels) for count in lesion.sum(axis=(1, 2)))
    name = f"{scan.name}_{kind}"
    return replace(scan, name=name, label="abnormal", stack=stack, lesion=lesion, lesion_voxels=voxels), kind


def _draw_shape(
    values: np.ndarray, depth: np.ndarray, spacing: np.ndarray, range_ml: tuple[float, float], rng: np.random.Generator
) -> tuple[np.ndarray, float, np.ndarray]:
    """(lesion (n, H, W) bool, its radius in mm, mm from its centre (3, n, H, W))."""
    while True:
        volume_ml = np.exp(rng.uniform(*np.log(range_ml)))
        radius = (750 * volume_ml / np.pi) ** (1 / 3)
        candidates = np.argwhere((depth > 6) & (values > 0.35))
        centre = candidates[rng.integers(len(candidates))]
        steps = [(np.arange(n) - c) * s for n, c, s in zip(values.shape, centre, spacing, strict=True)]
        offset = np.stack(np.meshgrid(*steps, indexing="ij"))
        turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        stretch = np.exp(rng.normal(0, 0.25, (3, 1)))
        turned = turn @ offset.reshape(3, -1) / (stretch / np.prod(stretch) ** (1 / 3))
        ragged = _draw_noise(values.shape, 4 / spacing, rng) * rng.uniform(0.1, 0.35)
        distance = np.linalg.norm(turned, axis=0).reshape(values.shape) / radius - ragged
        labels, _ = ndimage.label((distance < 1) & (depth > 2))
        if labels[tuple(centre)]:
            inside = labels == labels[tuple(centre)]
            if inside.sum() * spacing.prod() / 1000 > volume_ml / 2:  # else the brain is too narrow here
                return inside, radius, offset


def _push_away(
    values: np.ndarray, depth: np.ndarray, offset: np.ndarray, radius: float, spacing: np.ndarray
) -> np.ndarray:
    """The stack with its tissue pushed outwards around a mass; the skull does not give."""
    push = 0.5 * np.exp(-(offset**2).sum(axis=0) / (1.7 * radius) ** 2) * np.clip(depth / 12, 0, 1)
    places = np.indices(values.shape) - push * offset / spacing[:, None, None, None]
    pushed = ndimage.map_coordinates(values, places, order=1, mode="nearest")
    return np.where((values > 0) & (pushed > 0.02), pushed, values)


def _infiltrate(
    values: np.ndarray, inside: np.ndarray, offset: np.ndarray, radius: float, spacing: np.ndarray, rng
) -> np.ndarray:
    """The stack with a tumour: what is brighter than grey matter there is darkened, with its texture, around a core."""
    fluid, grey = np.percentile(values[values > 0], (5, 45))
    texture = values - ndimage.gaussian_filter(values, 2 / spacing)
    mottle = 0.04 * _draw_noise(values.shape, 3 / spacing, rng)
    change = rng.uniform(0.7, 1.0) * grey + mottle + 0.4 * texture - values
    weight = ndimage.gaussian_filter(inside.astype(np.float32), rng.uniform(1, 3) / spacing) * rng.uniform(0.5, 1)
    values = values + weight * np.minimum(change, 0.05)
    if rng.random() > 0.7:
        return values
    distance = np.linalg.norm(offset, axis=0) / radius + 0.2 * _draw_noise(values.shape, 4 / spacing, rng)
    core = ndimage.gaussian_filter(((distance < rng.uniform(0.3, 0.7)) & inside).astype(np.float32), 1 / spacing)
    return values + core * (rng.uniform(min(fluid, 0.75 * grey), 0.75 * grey) + mottle - values)


def _draw_tissue(values: np.ndarray, kind: str, spacing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n, H, W) what a lesion of that kind is filled with: a level, mottled, with some of the texture it covers."""
    fluid, grey, white = np.percentile(values[values > 0], (5, 45, 85))
    low, high = {
        "dark": (min(fluid, 0.8 * grey), 0.8 * grey),
        "grey": (0.9 * grey, 1.1 * grey),
        "bright": (1.05 * white, 1.3 * white),
        "mass": (0.8 * grey, 1.1 * grey),
    }[kind]
    texture = values - ndimage.gaussian_filter(values, 2 / spacing)
    return rng.uniform(low, high) + 0.04 * _draw_noise(values.shape, 1.5 / spacing, rng) + 0.3 * texture


def _draw_noise(shape: tuple[int, ...], sigma: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = ndimage.gaussian_filter(rng.normal(size=shape), sigma)
    return noise / noise.std()
