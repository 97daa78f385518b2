"""Make a small cohort of simulated T1 brain scans, healthy and with lesions, from nilearn's MNI152 template.

Nothing is downloaded and no patient is involved. Every scan is a function of points in space: a point in the
scanner (mm, RAS+) goes through the head's pose and size, the push of a mass and a smooth invertible warp to
a point in the template, where the tissue maps are read. So each scan is interpolated once, straight onto its
own voxel grid.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import nibabel as nib
import numpy as np
from joblib import Parallel, delayed
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy import ndimage
from scipy.spatial.transform import Rotation
from tqdm import tqdm

DESCRIPTION = "simulated from the MNI152 template"
KINDS = ("dark", "bright", "grey_in_white", "mass")
ORIENTATIONS = ("RAS", "LAS", "LPS", "PSR", "ASL", "RSP", "LPI")
COARSE_MM = 4  # warps are smooth, so their fields live on a grid this coarse
LESION_MM = 2
LESION_BOX_MM = 40  # half the side of the box a lesion is drawn in


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


def load_template(voxel_size: float) -> Template:
    """Read the template from nilearn's wheel and smooth it just enough for voxels of voxel_size mm."""
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

    step = max(1, int(voxel_size // 2))

    def coarsen(volume):
        return ndimage.gaussian_filter(np.float32(volume), voxel_size / 4)[::step, ::step, ::step].copy()

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


def draw_lesion(
    template: Template, warp: np.ndarray, kind: str, volume_mm3: float, rng: np.random.Generator
) -> tuple[np.ndarray, float, np.ndarray]:
    """Draw an irregular blob inside the subject's brain.

    Returns its centre (3,) in mm, its radius in mm, and weights (x, y, z) from 0 to 1 with soft edges on a
    grid of LESION_MM around the centre.
    """

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
    return centre, radius, ndimage.gaussian_filter(np.float32(blob), 0.8)


def push_away(points: np.ndarray, centre: np.ndarray, radius: float, template: Template) -> np.ndarray:
    """Move points (3, n) in mm towards a mass at centre (3,), so that the tissue seen there is pushed out."""
    offset = points - centre[:, None]
    near = 0.55 * np.exp(-(offset**2).sum(axis=0) / (1.7 * radius) ** 2)
    depth = sample(template.depth, points, template.origin, COARSE_MM)
    return points - near * np.clip(depth / 15, 0, 1) * offset  # the skull does not give


def draw_grid(template: Template, voxel_size: float, rng: np.random.Generator) -> tuple[tuple[int, ...], np.ndarray]:
    """Draw the scan's voxel grid; returns its shape and its affine to mm, axes nearest to x, y, z in RAS+."""
    zooms = voxel_size * np.repeat(rng.choice([0.85, 0.95, 1.0, 1.1, 1.2]), 3)
    if rng.random() < 0.25:
        zooms[rng.integers(3)] *= 1.6
    tilt = rng.uniform(-8, 8, 3) if rng.random() < 0.25 else np.zeros(3)
    shape = np.ceil((1.05 * template.size + 26) / zooms).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix() * zooms
    affine[:3, 3] = template.centre + rng.uniform(-3, 3, 3) - affine[:3, :3] @ (shape - 1) / 2
    return tuple(shape), affine


def simulate_scan(
    template: Template, voxel_size: float, kind: str | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """Simulate one scan, with a lesion of that kind or none.

    Returns int16 intensities, a bool brain mask and a bool lesion mask (None for kind None), all (x, y, z)
    with axes nearest to RAS+, and their affine to mm.
    """
    shape, affine = draw_grid(template, voxel_size, rng)
    warp = draw_warp(template, rng)
    size = rng.uniform(0.86, 1.0) * rng.uniform(0.96, 1.04, 3)
    pose = Rotation.from_euler("xyz", rng.normal(0, 2, 3), degrees=True).as_matrix() / size
    centre = template.centre[:, None]
    voxels = np.indices(shape).reshape(3, -1)
    subject = pose @ (affine[:3, :3] @ voxels + affine[:3, 3:] - centre) + centre
    if kind:
        smallest, largest = {"grey_in_white": (5, 16), "mass": (10, 38)}.get(kind, (5, 38))  # ml
        volume_mm3 = 1000 * np.exp(rng.uniform(np.log(smallest), np.log(largest)))
        lesion = draw_lesion(template, warp, kind, volume_mm3 / size.prod(), rng)
    pushed = push_away(subject, *lesion[:2], template) if kind == "mass" else subject
    points = warp_points(pushed, warp, template)
    brain = sample(template.brain, points, template.origin, template.step) > 0.5
    subject, points = subject[:, brain], points[:, brain]

    grey, white, sulci, texture = (
        sample(volume, points, template.origin, template.step)
        for volume in (template.grey, template.white, template.sulci, template.texture)
    )
    grey *= 1 - rng.uniform(0, 0.75) * sulci  # atrophy: fluid takes the place of grey matter along the sulci
    tissue = np.stack([np.clip(1 - grey - white, 0, 1), grey, white]) ** rng.uniform(1.0, 1.6)
    levels = np.array([rng.uniform(0.2, 0.34), rng.uniform(0.64, 0.77), 1.0])
    image = levels @ (tissue / tissue.sum(axis=0)) + rng.uniform(0.8, 1.4) * texture

    lesion_mask = None
    if kind:
        corner = lesion[0] - LESION_BOX_MM
        weight = sample(lesion[2], subject, corner, LESION_MM)
        mottle = sample(draw_smooth_noise(rng, lesion[2].shape, 1.5), subject, corner, LESION_MM)
        level = {
            "dark": rng.uniform(0.18, 0.34),
            "bright": rng.uniform(1.4, 1.65),
            "grey_in_white": levels[1],
            "mass": levels[1] * rng.uniform(0.7, 0.85),
        }[kind]
        image += weight * (level * (1 + 0.05 * mottle) - image)
        lesion_mask = np.zeros(shape, bool)
        lesion_mask.flat[brain] = weight > 0.5

    fine = draw_smooth_noise(rng, template.depth.shape, 0.8)  # no two brains have the same texture
    image *= 1 + 0.012 * sample(fine, points, template.origin, COARSE_MM)
    bias = draw_smooth_noise(rng, template.depth.shape, 11)
    image *= np.exp(rng.uniform(0.02, 0.07) * sample(bias, subject, template.origin, COARSE_MM))
    noise = rng.uniform(0.012, 0.03) * rng.standard_normal((2, image.size))
    image = np.hypot(image + noise[0], noise[1])  # Rician, as in magnitude images

    scan = np.zeros(shape, np.int16)
    scan.flat[brain] = np.maximum(1, np.rint(image * 10 ** rng.uniform(2.3, 3.3)))
    return scan, brain.reshape(shape), lesion_mask, affine


def save_volume(path: Path, volume: np.ndarray, affine: np.ndarray, orientation: str) -> None:
    """Store a volume (x, y, z) nearest to RAS+ as NIfTI in that orientation, whole or not at all."""
    image = nib.Nifti1Image(volume, affine)
    image = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(orientation)))
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = DESCRIPTION
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".part-{path.name}")
    nib.save(image, unfinished)
    os.replace(unfinished, path)


def save_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; one that already says so is left alone."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        unfinished = path.with_name(f".part-{path.name}")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)


def make_scan(
    template: Template, folder: Path, label: str, subject: int, kind: str | None, voxel_size: float, seed: int
) -> None:
    """Make one subject's scan and masks in a split's folder."""
    # From the seed and the subject alone, so that neither workers nor a cut-off run change a scan.
    rng = np.random.default_rng([seed, subject])
    scan, brain, lesion, affine = simulate_scan(template, voxel_size, kind, rng)
    orientation = ORIENTATIONS[subject % len(ORIENTATIONS)]
    name = f"sim-{subject:03d}"
    save_volume(folder / "masks" / f"{name}_brain.nii.gz", brain.astype(np.uint8), affine, orientation)
    if lesion is not None:
        save_volume(folder / "masks" / f"{name}_lesion.nii.gz", lesion.astype(np.uint8), affine, orientation)
    # The scan comes last: where it stands, its masks do too.
    save_volume(folder / label / f"{name}_T1w.nii.gz", scan, affine, orientation)


def make_cohort(
    raw: Path,
    train: int = 24,
    val: int = 20,
    test_normal: int = 8,
    test_abnormal: int = 8,
    voxel_size: float = 2.0,
    seed: int = 0,
    workers: int = 1,
) -> tuple[int, int]:
    """Make the scans that the cohort in the folder raw lacks; returns how many were made and how many stood.

    voxel_size is in mm. Raises ValueError for a setting that cannot be and FileExistsError where raw holds
    scans of other settings or not made here.
    """
    raw = Path(raw)
    if min(train, val, test_normal, test_abnormal, seed) < 0 or not 0.8 <= voxel_size <= 8 or workers == 0:
        raise ValueError("give scans and a seed of 0 or more, voxels of 0.8 to 8 mm and workers other than 0")
    settings = {"train": train, "val": val, "test-normal": test_normal, "test-abnormal": test_abnormal}
    settings |= {"voxel-size": float(voxel_size), "seed": seed}
    record, made_with = raw / "cohort.json", json.dumps(settings, indent=2) + "\n"
    if record.exists() and record.read_text(encoding="utf-8") != made_with:
        raise FileExistsError(f"{raw} holds scans of other settings ({record}): delete it or change --raw")
    if not record.exists() and any(raw.rglob("*.nii*")):
        raise FileExistsError(f"{raw} holds scans that were not made here: give another folder with --raw")
    raw.mkdir(parents=True, exist_ok=True)
    save_text(record, made_with)  # before the scans, so that a cohort that was cut off can be gone on with
    flags = " ".join(f"--{name} {value}" for name, value in settings.items())
    save_text(
        raw / "README.txt",
        "These scans are simulated from the MNI152 template. They are not patients.\n"
        f"They were made with seed {seed} by\n\n    python preprocessing/demo_cohort.py {flags}\n\n"
        "masks/ holds each scan's brain and lesion; test/lesions.csv lists the lesions.\n",
    )

    groups = (("train", "normal", train), ("val", "normal", val), ("test", "normal", test_normal))
    places = [(split, label, None) for split, label, number in groups for _ in range(number)]
    places += [("test", "abnormal", KINDS[i % len(KINDS)]) for i in range(test_abnormal)]
    cohort = [(raw / split, label, i, kind) for i, (split, label, kind) in enumerate(places, start=1)]
    missing = [one for one in cohort if not (one[0] / one[1] / f"sim-{one[2]:03d}_T1w.nii.gz").exists()]
    if missing:
        template = load_template(voxel_size)
        jobs = (delayed(make_scan)(template, *one, voxel_size, seed) for one in missing)
        made = Parallel(n_jobs=workers, return_as="generator")(jobs)
        for _ in tqdm(made, total=len(missing), unit="scan", disable=None):
            pass

    rows = ["scan,kind,volume_ml"]
    for folder, _, subject, kind in cohort:
        if kind:
            mask = nib.load(folder / "masks" / f"sim-{subject:03d}_lesion.nii.gz")
            volume_ml = np.count_nonzero(mask.dataobj) * abs(np.linalg.det(mask.affine[:3, :3])) / 1000
            rows.append(f"sim-{subject:03d}_T1w,{kind},{volume_ml:.2f}")
    if len(rows) > 1:
        save_text(raw / "test" / "lesions.csv", "\n".join(rows) + "\n")
    return len(missing), len(cohort) - len(missing)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--raw", type=Path, default=Path("Dataset/demo"), help="folder the scans go to")
    parser.add_argument("--train", type=int, default=24, help="healthy scans to train on")
    parser.add_argument("--val", type=int, default=20, help="healthy scans to validate on")
    parser.add_argument("--test-normal", type=int, default=8, help="healthy scans to test on")
    parser.add_argument("--test-abnormal", type=int, default=8, help="scans with a lesion to test on")
    parser.add_argument("--voxel-size", type=float, default=2.0, help="mm; scans vary around it")
    parser.add_argument("--workers", type=int, default=-1, help="processes; -1 is one for each core")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same bytes")
    args = parser.parse_args(argv)
    try:
        made, stood = make_cohort(**vars(args))
    except (ValueError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {args.raw} cannot be used: {error}", file=sys.stderr)
        return 1
    print(f"made {made} scans; {stood} made earlier with the same settings were kept")
    print(f"scans are in {args.raw}; they are simulated from the MNI152 template and are not patients")
    return 0


if __name__ == "__main__":
    sys.exit(main())
