"""Simulates T1 brain scans, healthy and with lesions, from nilearn's MNI152 template.

Every scan is a function of points in space: a point in the scanner (mm, RAS+) goes through the head's pose and size,
the push of a mass and a smooth invertible warp to a point in the template, where the tissue maps are read. So each scan
is interpolated once, straight onto its own voxel grid.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

KINDS = {"dark": (5, 38), "bright": (5, 38), "grey_in_white": (5, 16), "mass": (10, 38)}  # ml, smallest and largest
COARSE_MM = 4  # warps are smooth, so their fields live on a grid this coarse
LESION_MM = 2
LESION_BOX_MM = 40  # half the side of the box a lesion is drawn in


class Lesion(NamedTuple):
    """An irregular blob: `weights` (x, y, z) from 0 to 1 are its share of the tissue, on a grid of LESION_MM."""

    kind: str
    centre: np.ndarray  # mm
    radius: float  # mm, of a ball of its volume
    weights: np.ndarray


class Template(NamedTuple):
    """Maps of the template, float32, axes x, y, z in RAS+; all start at origin (mm)."""

    origin: np.ndarray
    centre: np.ndarray  # of the brain's bounding box, mm
    size: np.ndarray  # of the brain's bounding box, mm
    step: int  # mm between voxels of the maps that follow
    brain: np.ndarray
    grey: np.ndarray
    white: np.ndarray
    sulci: np.ndarray  # 0 to 1, high where grey matter borders on fluid
    texture: np.ndarray  # what the tissue maps leave unexplained of the T1 image, where white matter is 1
    depth: np.ndarray  # mm inside the brain's surface, on the coarse grid
    ventricles: np.ndarray  # smoothed, on the coarse grid


def load_template(voxel_size_mm: float) -> Template:
    """Read the template from nilearn's wheel and smooth it just enough for voxels of that size."""
    from nilearn import datasets  # here, because it is slow to import and the workers do without

    image = datasets.load_mni152_template(resolution=1)
    origin = image.affine[:3, 3]
    t1 = image.get_fdata(dtype=np.float32)
    grey = datasets.load_mni152_gm_template(resolution=1).get_fdata(dtype=np.float32)
    white = datasets.load_mni152_wm_template(resolution=1).get_fdata(dtype=np.float32)
    labels, _ = ndimage.label(datasets.load_mni152_brain_mask(resolution=1).get_fdata() > 0)
    brain = labels == np.bincount(labels[labels > 0]).argmax()  # leaves out islands below the frontal lobe

    fluid = np.clip(1 - grey - white, 0, 1) * brain
    maps = np.stack([fluid[brain], grey[brain], white[brain]], axis=1)
    levels = np.linalg.lstsq(maps, t1[brain], rcond=None)[0]
    texture = np.zeros_like(t1)
    texture[brain] = (t1[brain] - maps @ levels) / levels[2]
    sulci = np.clip(2.5 * ndimage.gaussian_filter(fluid, 2), 0, 1)

    depth = ndimage.distance_transform_edt(brain[::COARSE_MM, ::COARSE_MM, ::COARSE_MM]) * COARSE_MM
    x, y, z = np.ogrid[tuple(slice(start, start + n) for start, n in zip(origin, t1.shape, strict=True))]
    ventricles = fluid * ((np.abs(x) < 45) & (y > -65) & (y < 45) & (z > -18) & (z < 34))
    ventricles = ndimage.gaussian_filter(ventricles * (ndimage.gaussian_filter(fluid, 3) > 0.35), 6)

    step = max(1, int(voxel_size_mm // 2))

    def coarsen(volume):
        return ndimage.gaussian_filter(np.float32(volume), voxel_size_mm / 4)[::step, ::step, ::step].copy()

    box = ndimage.find_objects(np.int8(brain))[0]
    start, stop = np.transpose([(extent.start, extent.stop) for extent in box])
    maps = [coarsen(volume) for volume in (brain, grey, white, sulci, texture)]
    ventricles = ventricles[::COARSE_MM, ::COARSE_MM, ::COARSE_MM].copy()
    centre = origin + (start + stop - 1) / 2
    return Template(origin, centre, stop - start, step, *maps, np.float32(depth), ventricles)


def sample(
    volume: np.ndarray, points: np.ndarray, origin: np.ndarray, step: float, mode: str = "constant"
) -> np.ndarray:
    """Read a volume that starts at origin (mm), voxels of step mm, at points (3, n) in mm; returns (n,)."""
    index = (points - origin[:, None]) / step
    return ndimage.map_coordinates(volume, index, order=1, mode=mode, output=np.float32)


def draw_smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Draw Gaussian noise of that shape, smoothed with sigma voxels, with standard deviation 1."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap")
    return noise / noise.std()


def draw_warp(template: Template, rng: np.random.Generator) -> np.ndarray:
    """Draw a smooth invertible warp; returns displacements (3, x, y, z) in mm on the coarse grid.

    They lead from a point of the subject to the point of the template that is seen there.
    """
    shape = template.depth.shape
    large = np.stack([draw_smooth_noise(rng, shape, 5.5) for _ in range(3)])  # 22 mm: the shape of the head
    small = np.stack([draw_smooth_noise(rng, shape, 2.2) for _ in range(3)])  # 9 mm: the course of the folds
    velocity = 2.7 * large + 1.2 * small  # mm
    # Looking up points nearer to the ventricles than they are makes the ventricles larger.
    inward = np.stack(np.gradient(template.ventricles))
    velocity += rng.uniform(-1.5, 5.5) * inward / np.linalg.norm(inward, axis=0).max()
    grid = np.indices(shape, dtype=np.float32)
    displacement = velocity / 2**6 / COARSE_MM
    for _ in range(6):  # scaling and squaring: the flow of the velocity for unit time, so no folds
        moved = grid + displacement
        displacement = displacement + np.stack(
            [ndimage.map_coordinates(part, moved, order=1, mode="nearest") for part in displacement]
        )
    return displacement * COARSE_MM


def warp_points(points: np.ndarray, warp: np.ndarray, template: Template) -> np.ndarray:
    """Move points (3, n) of the subject in mm by the warp to points (3, n) of the template in mm."""
    return points + np.stack([sample(part, points, template.origin, COARSE_MM, "nearest") for part in warp])


def draw_lesion(template: Template, warp: np.ndarray, kind: str, volume_mm3: float, rng: np.random.Generator) -> Lesion:
    """Draw an irregular blob with soft edges inside the subject's brain."""

    def find_room(points):
        at = warp_points(points, warp, template)
        white = sample(template.white, at, template.origin, template.step)
        tissue = white + sample(template.grey, at, template.origin, template.step)
        depth = sample(template.depth, at, template.origin, COARSE_MM)
        return white > 0.85 if kind == "grey_in_white" else tissue > 0.7, depth, at[2]

    grid = np.indices(template.depth.shape).reshape(3, -1) * float(COARSE_MM) + template.origin[:, None]
    room, depth, z = find_room(grid)
    height = (z - template.centre[2]) / template.size[2]
    middle = (height > -0.1) & (height < 0.25)  # slice selection keeps the middle of the brain
    radius = (volume_mm3 * 0.75 / np.pi) ** (1 / 3)
    centres = rng.permutation(grid[:, room & middle & (depth > 8 + radius / 2)].T)

    cells = round(volume_mm3 / LESION_MM**3)
    side = 2 * LESION_BOX_MM // LESION_MM + 1
    box = (np.indices((side,) * 3) * float(LESION_MM) - LESION_BOX_MM).reshape(3, -1)
    stretch = rng.uniform(0.8, 1.25, (3, 1))
    ragged = 0.2 if kind == "mass" else 0.35
    level = ragged * draw_smooth_noise(rng, (side,) * 3, 3).ravel()
    level -= np.linalg.norm(box / stretch, axis=0) / radius
    for centre in centres:
        room, depth, _ = find_room(box + centre[:, None])
        lowest = np.sort(np.where(room & (depth > 4), level, -np.inf))[-cells]
        labels, _ = ndimage.label(((level > lowest) & room & (depth > 4)).reshape((side,) * 3))
        blob = labels == np.bincount(labels[labels > 0], minlength=2).argmax()
        if 0.6 * cells < blob.sum() <= cells:
            break
        cells = round(0.95 * cells)  # the brain is too narrow here: elsewhere, and a little smaller
    return Lesion(kind, centre, radius, ndimage.gaussian_filter(np.float32(blob), 0.8))


def push_away(points: np.ndarray, mass: Lesion, template: Template) -> np.ndarray:
    """Move points (3, n) in mm towards a mass, so that the tissue seen there is pushed out."""
    offset = points - mass.centre[:, None]
    near = 0.55 * np.exp(-(offset**2).sum(axis=0) / (1.7 * mass.radius) ** 2)
    depth = sample(template.depth, points, template.origin, COARSE_MM)
    return points - near * np.clip(depth / 15, 0, 1) * offset  # the skull does not give


def draw_grid(template: Template, voxel_size_mm: float, rng: np.random.Generator) -> tuple[tuple[int, ...], np.ndarray]:
    """Draw the scan's voxel grid; returns its shape and its affine to mm, axes nearest to x, y, z in RAS+."""
    zooms = voxel_size_mm * np.repeat(rng.choice([0.85, 0.95, 1.0, 1.1, 1.2]), 3)
    if rng.random() < 0.25:
        zooms[rng.integers(3)] *= 1.6
    tilt = rng.uniform(-8, 8, 3) if rng.random() < 0.25 else np.zeros(3)
    shape = np.ceil((1.05 * template.size + 26) / zooms).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix() * zooms
    affine[:3, 3] = template.centre + rng.uniform(-3, 3, 3) - affine[:3, :3] @ (shape - 1) / 2
    return tuple(shape), affine


def draw_tissue(template: Template, points: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """T1 intensities (n,) of the template at points (3, n) in mm, and of pure fluid, grey and white matter (3,)."""
    grey, white, sulci, texture = (
        sample(volume, points, template.origin, template.step)
        for volume in (template.grey, template.white, template.sulci, template.texture)
    )
    grey *= 1 - rng.uniform(0, 0.75) * sulci  # atrophy: fluid takes the place of grey matter along the sulci
    tissue = np.stack([np.clip(1 - grey - white, 0, 1), grey, white]) ** rng.uniform(1.0, 1.6)
    levels = np.array([rng.uniform(0.2, 0.34), rng.uniform(0.64, 0.77), 1.0])
    return levels @ (tissue / tissue.sum(axis=0)) + rng.uniform(0.8, 1.4) * texture, levels


def paint_lesion(
    image: np.ndarray, subject: np.ndarray, lesion: Lesion, levels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The image (n,) at the subject's points (3, n) in mm with the lesion in it, and its weight (n,) there."""
    corner = lesion.centre - LESION_BOX_MM
    weight = sample(lesion.weights, subject, corner, LESION_MM)
    mottle = sample(draw_smooth_noise(rng, lesion.weights.shape, 1.5), subject, corner, LESION_MM)
    level = {
        "dark": rng.uniform(0.18, 0.34),
        "bright": rng.uniform(1.4, 1.65),
        "grey_in_white": levels[1],
        "mass": levels[1] * rng.uniform(0.7, 0.85),
    }[lesion.kind]
    return image + weight * (level * (1 + 0.05 * mottle) - image), weight


def add_scanner(
    image: np.ndarray, subject: np.ndarray, points: np.ndarray, template: Template, rng: np.random.Generator
) -> np.ndarray:
    """The image (n,) with a texture of its own, the scanner's bias field and its noise."""
    fine = draw_smooth_noise(rng, template.depth.shape, 0.8)  # no two brains have the same texture
    image = image * (1 + 0.012 * sample(fine, points, template.origin, COARSE_MM))
    bias = draw_smooth_noise(rng, template.depth.shape, 11)
    image *= np.exp(rng.uniform(0.02, 0.07) * sample(bias, subject, template.origin, COARSE_MM))
    noise = rng.uniform(0.012, 0.03) * rng.standard_normal((2, image.size))
    return np.hypot(image + noise[0], noise[1])  # Rician, as in magnitude images


def simulate_scan(
    template: Template, voxel_size_mm: float, kind: str | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """Simulate one subject's scan.

    Returns the scan (int16), its bool brain mask, its bool lesion mask (None for kind None), all (x, y, z)
    with axes nearest to RAS+, and their affine to mm.
    """
    shape, affine = draw_grid(template, voxel_size_mm, rng)
    warp = draw_warp(template, rng)
    size = rng.uniform(0.86, 1.0) * rng.uniform(0.96, 1.04, 3)
    pose = Rotation.from_euler("xyz", rng.normal(0, 2, 3), degrees=True).as_matrix() / size
    centre = template.centre[:, None]
    voxels = np.indices(shape).reshape(3, -1)
    subject = pose @ (affine[:3, :3] @ voxels + affine[:3, 3:] - centre) + centre
    if kind:
        volume_mm3 = 1000 * np.exp(rng.uniform(*np.log(KINDS[kind])))
        lesion = draw_lesion(template, warp, kind, volume_mm3 / size.prod(), rng)
    pushed = push_away(subject, lesion, template) if kind == "mass" else subject
    points = warp_points(pushed, warp, template)
    brain = sample(template.brain, points, template.origin, template.step) > 0.5
    subject, points = subject[:, brain], points[:, brain]
    image, levels = draw_tissue(template, points, rng)
    lesion_mask = None
    if kind:
        image, weight = paint_lesion(image, subject, lesion, levels, rng)
        lesion_mask = np.zeros(shape, bool)
        lesion_mask.flat[brain] = weight > 0.5
    image = add_scanner(image, subject, points, template, rng)
    scan = np.zeros(shape, np.int16)
    scan.flat[brain] = np.maximum(1, np.rint(image * 10 ** rng.uniform(2.3, 3.3)))
    return scan, brain.reshape(shape), lesion_mask, affine
