"""Maps as NIfTI on the scan's own grid, alone or as a BIDS derivative."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np

from common.files import write_atomically
from evaluation.predictor import Prediction

BIDS_VERSION = "1.10.0"


def write_maps(stem: Path, prediction: Prediction) -> None:
    """Write `<stem>_anomaly.nii.gz` and `<stem>_mask.nii.gz`, the voxels at or above the threshold."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    threshold = prediction.threshold
    write_nifti(
        Path(f"{stem}_anomaly.nii.gz"),
        prediction.native_map,
        prediction.affine,
        "anomaly, times the scan's median",
        2 * threshold,
    )
    about = f"anomaly at or above {threshold:.3f}"
    write_nifti(Path(f"{stem}_mask.nii.gz"), make_mask(prediction), prediction.affine, about, 1)


def make_mask(prediction: Prediction) -> np.ndarray:
    """(I, J, K) uint8: the voxels of the native map at or above the threshold."""
    return (np.nan_to_num(prediction.native_map, nan=-1) >= prediction.threshold).astype(np.uint8)


def write_nifti(path: Path, values: np.ndarray, affine: np.ndarray, about: str, top: float) -> None:
    """Write values (I, J, K) as NIfTI, whole or not at all; viewers open it with colours from 0 to `top`."""
    image = nib.Nifti1Image(values, affine)
    image.set_sform(affine, code="scanner")
    if is_sheared(affine):
        image.set_qform(None, code=0)  # it cannot say shears, and would lead elsewhere
    else:
        image.set_qform(affine, code="scanner")  # both, because viewers differ in which they read
    image.header["descrip"] = about
    image.header["cal_max"] = top
    image.header.set_xyzt_units("mm")
    partial = path.with_name(f".{path.name}")
    nib.save(image, partial)
    os.replace(partial, path)


def is_sheared(affine: np.ndarray) -> bool:
    """Whether the axes of a grid with that affine (4, 4) do not stand at right angles."""
    axes = affine[:3, :3] / nib.affines.voxel_sizes(affine)
    return not np.allclose(axes.T @ axes, np.eye(3), atol=1e-3)


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


def write_bids_maps(folder: Path, name: str, prediction: Prediction) -> None:
    """The two maps of a scan in a BIDS derivative, each with its JSON sidecar; `name` is of `name_bids`."""
    stem, threshold, row = folder / name, prediction.threshold, prediction.scan_row
    stem.parent.mkdir(parents=True, exist_ok=True)
    common = {"SpatialReference": "orig", "Sources": [prediction.scan.source], "Label": prediction.scan.label}
    common |= {"Score": row["score"], "PValue": row["p_value"]}
    for ending, values, about, top, more in (
        ("desc-anomaly_statmap", prediction.native_map, "Anomaly map; NaN where nothing was scored", 2 * threshold,
         {"Units": "times the scan's median"}),
        ("desc-anomaly_mask", make_mask(prediction), "Voxels at or above the calibrated threshold", 1,
         {"Type": "Lesion", "Threshold": threshold}),
    ):  # fmt: skip
        path = Path(f"{stem}_{ending}.nii.gz")
        write_nifti(path, values, prediction.affine, about, top)
        sidecar = json.dumps({"Description": about} | more | common, indent=1)
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
