"""A cohort of simulated scans, healthy and with lesions, as a folder that preprocess_oasis.py reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from tqdm import tqdm

from common.cli import DataError
from common.files import replace_when_whole, write_atomically
from common.workers import run_in_workers
from preprocessing.simulator import KINDS, Template, load_template, simulate_scan

DESCRIPTION = "simulated from the MNI152 template"
ORIENTATIONS = ("RAS", "LAS", "LPS", "PSR", "ASL", "RSP", "LPI")


@dataclass(frozen=True)
class CohortSettings:
    """What decides a cohort to the byte: how many scans of each group, their voxels' size about which it varies."""

    train: int = 24
    val: int = 20
    test_normal: int = 8
    test_abnormal: int = 8
    voxel_size_mm: float = 2.0
    seed: int = 0

    def list_flags(self) -> dict[str, float]:
        """By the names of the command line's flags."""
        return {
            "train": self.train,
            "val": self.val,
            "test-normal": self.test_normal,
            "test-abnormal": self.test_abnormal,
            "voxel-size": float(self.voxel_size_mm),
            "seed": self.seed,
        }


class Place(NamedTuple):
    """One scan of a cohort: in `<folder>/<label>`, of a subject counted from 1, with a lesion of a kind or without."""

    folder: Path
    label: str
    subject: int
    kind: str | None

    @property
    def name(self) -> str:
        return f"sim-{self.subject:03d}"

    @property
    def scan_path(self) -> Path:
        return self.folder / self.label / f"{self.name}_T1w.nii.gz"

    def mask_path(self, what: str) -> Path:
        return self.folder / "masks" / f"{self.name}_{what}.nii.gz"


def save_volume(path: Path, volume: np.ndarray, affine: np.ndarray, orientation: str) -> None:
    """Store a volume (x, y, z) nearest to RAS+ as NIfTI in that orientation, whole or not at all."""
    image = nib.Nifti1Image(volume, affine)
    image = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(orientation)))
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = DESCRIPTION
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_when_whole(path) as partial:
        nib.save(image, partial)


def save_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; one that already holds it is left alone."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text.encode())


def make_scan(template: Template, place: Place, settings: CohortSettings) -> None:
    """Make one subject's scan and masks."""
    # From the seed and the subject alone, so that neither workers nor a cut-off run change a scan.
    rng = np.random.default_rng([settings.seed, place.subject])
    scan, brain, lesion, affine = simulate_scan(template, settings.voxel_size_mm, place.kind, rng)
    orientation = ORIENTATIONS[place.subject % len(ORIENTATIONS)]
    save_volume(place.mask_path("brain"), brain.astype(np.uint8), affine, orientation)
    if lesion is not None:
        save_volume(place.mask_path("lesion"), lesion.astype(np.uint8), affine, orientation)
    save_volume(place.scan_path, scan, affine, orientation)  # last: a scan that exists has its masks


def list_places(raw: Path, settings: CohortSettings) -> list[Place]:
    """The scans of a cohort, subjects counted through the groups, the kinds of lesion one after the other."""
    groups = (("train", settings.train), ("val", settings.val), ("test", settings.test_normal))
    places = [(raw / split, "normal", None) for split, number in groups for _ in range(number)]
    kinds = [list(KINDS)[i % len(KINDS)] for i in range(settings.test_abnormal)]
    places += [(raw / "test", "abnormal", kind) for kind in kinds]
    return [Place(folder, label, subject, kind) for subject, (folder, label, kind) in enumerate(places, start=1)]


def start_folder(raw: Path, settings: CohortSettings) -> None:
    """Leave a record of the settings before any scan, so that a cohort that was cut off can be gone on with.

    Raises DataError where the folder holds scans of other settings or not made here.
    """
    flags = settings.list_flags()
    record, made_with = raw / "cohort.json", json.dumps(flags, indent=2) + "\n"
    if record.exists() and record.read_text(encoding="utf-8") != made_with:
        raise DataError(f"{raw} holds scans of other settings ({record}); delete it or change --raw")
    if not record.exists() and any(raw.rglob("*.nii*")):
        raise DataError(f"{raw} holds scans that were not made here; give another folder with --raw")
    raw.mkdir(parents=True, exist_ok=True)
    save_text(record, made_with)
    command = " ".join(f"--{name} {value}" for name, value in flags.items())
    save_text(
        raw / "README.txt",
        "These scans are simulated from the MNI152 template. They are not patients.\n"
        f"They were made with seed {settings.seed} by\n\n    python preprocessing/demo_cohort.py {command}\n\n"
        "masks/ holds each scan's brain and lesion; test/lesions.csv lists the lesions.\n",
    )


def make_cohort(raw: Path, settings: CohortSettings, workers: int = 1) -> tuple[int, int]:
    """Make the scans that the cohort in the folder raw lacks; returns how many were made and how many were there.

    Raises DataError where raw holds scans of other settings or not made here.
    """
    start_folder(raw, settings)
    places = list_places(raw, settings)
    missing = [place for place in places if not place.scan_path.exists()]
    if missing:
        template = load_template(settings.voxel_size_mm)
        made = run_in_workers(make_scan, [(template, place, settings) for place in missing], workers)
        for _ in tqdm(made, total=len(missing), unit="scan", disable=None):
            pass
    rows = ["scan,kind,volume_ml"]
    for place in places:
        if place.kind:
            mask = nib.load(place.mask_path("lesion"))
            volume_ml = np.count_nonzero(mask.dataobj) * abs(np.linalg.det(mask.affine[:3, :3])) / 1000
            rows.append(f"{place.name}_T1w,{place.kind},{volume_ml:.2f}")
    if len(rows) > 1:
        save_text(raw / "test" / "lesions.csv", "\n".join(rows) + "\n")
    return len(missing), len(places) - len(missing)
