"""Maps as NIfTI on the scan's own grid, alone or as a BIDS derivative, and where things lie in a brain."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy import ndimage

from common.files import write_atomically
from models.anomaly import find_regions

MIDLINE_MM = 5.0  # a region whose centre is nearer to the middle of the brain is on neither side
BIDS_VERSION = "1.10.0"


def write_maps(stem: Path, anomaly: np.ndarray, affine: np.ndarray, threshold: float) -> None:
    """Write `<stem>_anomaly.nii.gz` and `<stem>_mask.nii.gz`, the voxels at or above the threshold.

    anomaly (I, J, K) on the scan's grid, NaN where nothing was scored; affine (4, 4) of the scan.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    mask = (np.nan_to_num(anomaly, nan=-1) >= threshold).astype(np.uint8)
    write_nifti(Path(f"{stem}_anomaly.nii.gz"), anomaly, affine, "anomaly, times the usual residual", 2 * threshold)
    write_nifti(Path(f"{stem}_mask.nii.gz"), mask, affine, f"anomaly at or above {threshold:.3f}", 1)


def write_nifti(path: Path, values: np.ndarray, affine: np.ndarray, about: str, top: float) -> None:
    """Write values (I, J, K) as NIfTI, whole or not at all; viewers open it with colours from 0 to `top`."""
    image = nib.Nifti1Image(values, affine)
    # both, because viewers differ in which they read
    image.set_qform(affine, code="scanner")
    image.set_sform(affine, code="scanner")
    image.header["descrip"] = about
    image.header["cal_max"] = top
    image.header.set_xyzt_units("mm")
    partial = path.with_name(f".{path.name}")
    nib.save(image, partial)
    os.replace(partial, path)


def list_regions(anomaly: np.ndarray, affine: np.ndarray, threshold: float, smallest_ml: float) -> list[dict]:
    """`find_regions` of a map (I, J, K), each region with the side of the subject's brain that its centre is on."""
    scored = np.isfinite(anomaly)
    flagged = scored & (np.nan_to_num(anomaly) >= threshold)
    if not flagged.any():
        return []
    middle = nib.affines.apply_affine(affine, np.argwhere(scored).mean(axis=0))[0]
    box = ndimage.find_objects(flagged.astype(np.uint8))[0]  # regions hardly fill a tenth of the grid
    shift = nib.affines.from_matvec(np.eye(3), [side.start for side in box])
    regions = find_regions(anomaly[box], affine @ shift, threshold, smallest_ml)
    return [region | {"side": name_side(region["x_mm"] - middle)} for region in regions]


def name_side(x_mm: float) -> str:
    """left, right or middle, from a distance to the brain's middle that grows to the subject's right."""
    if abs(x_mm) < MIDLINE_MM:
        return "middle"
    return "right" if x_mm > 0 else "left"


def locate_stack(record: dict) -> np.ndarray:
    """The (4, 4) affine of a stack turned to (right, anterior, superior) voxels, into scanner mm."""
    ornt = axcodes2ornt(record["axes"])
    to_stored = inv_ornt_aff(ornt_transform(ornt, axcodes2ornt("RAS")), record["shape"])
    steps = [record["pixel_mm"] / record["spacing_mm"][axis] for axis in (0, 1)]
    corner = [record["centre"][axis] - steps[axis] * (record["size"] - 1) / 2 for axis in (0, 1)]
    within = np.diag([*steps, 1.0, 1.0])
    within[:3, 3] = [*corner, record["slices"][0]]
    return np.array(record["affine"]) @ to_stored @ within


def name_bids(scans: list[tuple[str, str | None]]) -> list[str]:
    """`sub-01/[ses-1/]anat/sub-01[_ses-1][_run-1]` for each (subject, session), no two alike: runs tell them apart."""
    stems = []
    for subject, session in scans:
        parts = [f"sub-{_keep_letters(subject)}"]
        if session:
            parts.append(f"ses-{_keep_letters(session)}")
        stems.append("/".join([*parts, "anat", "_".join(parts)]))
    of_session, seen, names = Counter(stems), Counter(), []
    for stem in stems:
        seen[stem] += 1
        names.append(f"{stem}_run-{seen[stem]}" if of_session[stem] > 1 else stem)
    return names


def write_bids_maps(
    folder: Path, name: str, anomaly: np.ndarray, affine: np.ndarray, threshold: float, about: dict
) -> None:
    """The two maps of a scan in a BIDS derivative, each with its JSON sidecar; `name` is of `name_bids`."""
    stem = folder / name
    stem.parent.mkdir(parents=True, exist_ok=True)
    mask = (np.nan_to_num(anomaly, nan=-1) >= threshold).astype(np.uint8)
    common = {"SpatialReference": "orig"} | about
    for ending, values, what, top, more in (
        ("desc-anomaly_statmap", anomaly, "Anomaly map; NaN where nothing was scored", 2 * threshold,
         {"Units": "times the scan's usual residual"}),
        ("desc-anomaly_mask", mask, "Voxels at or above the calibrated threshold", 1,
         {"Type": "Lesion", "Threshold": threshold}),
    ):  # fmt: skip
        path = Path(f"{stem}_{ending}.nii.gz")
        write_nifti(path, values, affine, what, top)
        sidecar = json.dumps({"Description": what} | more | common, indent=1)
        write_atomically(path.with_name(path.name.replace(".nii.gz", ".json")), sidecar.encode())


def write_bids_description(folder: Path, data: str, model: str) -> None:
    """dataset_description.json of a derivative made from the scans in `data` by the model with that hash."""
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "Name": "Anomaly maps of brain scans",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "brain-anomaly-autoencoder", "Description": f"model.pt with SHA-256 {model}"}],
        "SourceDatasets": [{"URL": data}],
    }
    write_atomically(folder / "dataset_description.json", json.dumps(description, indent=1).encode())


def _keep_letters(name: str) -> str:
    """A BIDS label: letters and digits alone."""
    return re.sub(r"^(sub|ses)-|[^0-9a-zA-Z]", "", name)
