"""Maps as NIfTI on the scan's own grid, alone or as a BIDS derivative."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np

from common.files import make_folder, open_regular, replace_when_whole, write_atomically
from evaluation.colours import HIGHEST, LOWEST
from evaluation.predictor import Prediction
from evaluation.regions import EXTENT
from preprocessing.store import LoadedScan

BIDS_VERSION = "1.10.0"
BIDS_README = """# Anomaly maps of brain scans

`*_desc-anomaly_statmap.nii.gz` shows how unlike healthy tissue each voxel is, in times the scan's median; NaN was not
scored. `*_desc-anomaly_mask.nii.gz` holds the voxels that are marked: at or above the calibrated threshold and, in each
region, a share of its peak. Both lie on the scan's own grid. Not a medical device: nothing here is for diagnosis.
"""


def write_maps(stem: Path, prediction: Prediction) -> None:
    """Write `<stem>_anomaly.nii.gz` and `<stem>_mask.nii.gz`, the voxels that are marked."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_map(Path(f"{stem}_anomaly.nii.gz"), prediction, "anomaly, times the scan's median")
    write_map(Path(f"{stem}_mask.nii.gz"), prediction, f"marked, threshold {prediction.threshold:.3f}", mask=True)


def write_map(path: Path, prediction: Prediction, about: str, mask: bool = False) -> None:
    """Write a scan's map, or its mask, as NIfTI, whole or not at all; viewers open it with fitting colours.

    `db_name` in the header identifies the scan (`name_owner`).
    """
    image = nib.Nifti1Image(make_mask(prediction) if mask else prediction.native_map, prediction.affine)
    image.set_sform(prediction.affine, code="scanner")
    if is_sheared(prediction.affine):
        image.set_qform(None, code=0)  # it cannot hold shears
    else:
        image.set_qform(prediction.affine, code="scanner")  # both, because viewers differ in which they read
    image.header["descrip"] = about
    image.header["db_name"] = name_owner(prediction.scan)
    lowest, highest = (0, 1) if mask else (LOWEST * prediction.threshold, HIGHEST * prediction.threshold)
    image.header["cal_min"], image.header["cal_max"] = lowest, highest
    if mask:
        image.header.set_intent("label", name="marked")
    else:
        image.header.set_intent("estimate", name="anomaly")  # none of the statistics that NIfTI names
    image.header.set_xyzt_units("mm")
    with replace_when_whole(path) as partial:
        nib.save(image, partial)


def name_owner(scan: LoadedScan) -> str:
    """What identifies the scan of a map, short enough for `db_name`."""
    return scan.hashes[0][:16] if scan.hashes else ""


def read_owner(path: Path) -> str:
    """`name_owner` of the scan that a map file is of; "" for any other file."""
    try:
        with open_regular(path) as packed, gzip.open(packed) as file:
            header = nib.Nifti1Header(file.read(348), check=False)
        return header["db_name"].item().decode()
    except (
        OSError,
        EOFError,
        ValueError,
        zlib.error,
        nib.spatialimages.HeaderDataError,
        nib.wrapstruct.WrapStructError,
    ):
        return ""


def make_mask(prediction: Prediction) -> np.ndarray:
    """(I, J, K) uint8: the voxels of the native map that are marked."""
    return (prediction.native_numbers > 0).view(np.uint8)


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


def write_bids_maps(folder: Path, name: str, prediction: Prediction, raw: Path) -> None:
    """The two maps of a scan in a BIDS derivative, each with its JSON sidecar.

    name  of `name_bids`; raw: the folder that `write_bids_description` was given
    """
    stem, row = folder / name, prediction.scan_row
    make_folder(stem.parent, folder)
    source = Path(os.path.relpath(prediction.scan.source, raw)).as_posix()
    common = {"SpatialReference": "orig", "Sources": [f"bids:raw:{source}"], "Label": prediction.scan.label}
    common |= {"Score": row["score"], "PValue": row["p_value"]}
    for ending, is_mask, about, more in (
        ("desc-anomaly_statmap", False, "Anomaly map; NaN where nothing was scored",
         {"Units": "times the scan's median"}),
        ("desc-anomaly_mask", True, "Marked voxels: at or above the threshold and, in each region, a share of its peak",
         {"Type": "Lesion", "Threshold": prediction.threshold, "ShareOfPeak": EXTENT}),
    ):  # fmt: skip
        path = Path(f"{stem}_{ending}.nii.gz")
        write_map(path, prediction, about, is_mask)
        sidecar = json.dumps({"Description": about} | more | common, indent=1)
        write_atomically(path.with_name(path.name.replace(".nii.gz", ".json")), sidecar.encode())


def write_bids_description(folder: Path, raw: Path, model: str) -> None:
    """What a derivative says of itself: made from the scans in the folder `raw` by the model with that hash.

    BIDS has no suffix for maps of a single scan in anat/ yet, so .bidsignore names them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    uri = raw.absolute().as_uri()
    description = {
        "Name": "Anomaly maps of brain scans",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "brain-anomaly-autoencoder", "Description": f"model.pt with SHA-256 {model}"}],
        "Authors": ["brain-anomaly-autoencoder", "those of the source data"],
        "SourceDatasets": [{"URL": uri}],
        "DatasetLinks": {"raw": uri},
    }
    texts = {"dataset_description.json": json.dumps(description, indent=1), "README.md": BIDS_README}
    for name, text in (texts | {".bidsignore": "*_statmap.nii.gz\n*_statmap.json\n"}).items():
        write_atomically(folder / name, text.encode())


def _keep_letters(name: str) -> str:
    """A BIDS label: letters and digits alone."""
    return re.sub(r"^(sub|ses)-|[^0-9a-zA-Z]", "", name)
