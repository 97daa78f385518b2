"""Small raw folders, brought into a store by the script."""

import json
import zlib

import nibabel as nib
import numpy as np

from preprocessing.preprocess_oasis import main as preprocess
from preprocessing.store import list_scans
from tests.conftest import SIZE, make_head

SMALL = ["--size", str(SIZE), "--workers", "1"]
HEAD = make_head((15, 18, 16), (11.0, 11.0, 11.0))


def run(raw, out, *flags):
    return preprocess(["--raw", str(raw), "--processed", str(out), *SMALL, *flags])


def read_places(processed):
    return {scan.name: f"{scan.split}/{scan.label}" for scan in list_scans(processed)}


def read_record(processed):
    return json.loads((processed / "dataset.json").read_text())


def save(path, values=None):
    """Save these values, or a head that no other file has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        nib.save(make_head((15, 18, 16), (11.0, 11.0, 11.0), seed=zlib.crc32(str(path).encode())), path)
    else:
        nib.save(nib.Nifti1Image(np.asarray(values), HEAD.affine), path)
    return path


def save_lesion(tree, name="c_lesion.nii"):
    lesion = np.zeros(HEAD.shape, np.uint8)
    lesion[6:9, 8:11, 7:10] = 1
    return save(tree / "raw/test/masks" / name, lesion)


def make_tree(folder):
    """Three scans in a split/label tree."""
    for place in ("train/normal/a_T1w.nii", "val/normal/b_T1w.nii", "test/abnormal/c_T1w.nii"):
        save(folder / "raw" / place)
    return folder
