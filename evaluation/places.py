"""Where in a scan something lies: slices by mm and by the file's own index, regions by number on every slice."""

from __future__ import annotations

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt

from evaluation.predictor import Prediction
from preprocessing.geometry import Geometry

FILE_AXES = "ijk"  # as NIfTI calls the stored axes


def find_mm(geometry: Geometry, place: int) -> float:
    """Inferior-superior scanner mm (RAS+) of the middle of a kept slice; place: its position in the stack."""
    middle = (geometry.size - 1) / 2
    return float(nib.affines.apply_affine(geometry.stack_affine, (middle, middle, place))[2])


def find_file_slice(geometry: Geometry, index: int) -> tuple[str, int] | None:
    """(i, j or k; index from 0 along it) of a canonical slice in the file as stored; None for a resampled scan."""
    if geometry.straight:
        return None
    axes = axcodes2ornt(geometry.axes)
    stored = int(np.flatnonzero(axes[:, 0] == 2)[0])
    return FILE_AXES[stored], index if axes[stored, 1] > 0 else geometry.shape[stored] - 1 - index


def name_slice(geometry: Geometry, place: int) -> str:
    """`z 12 mm, k = 87`: a kept slice in scanner mm and by the file's own axis and index from 0."""
    found = find_file_slice(geometry, geometry.slices[place])
    words = f"{found[0]} = {found[1]}" if found else f"slice {geometry.slices[place]} after resampling"
    return f"z {format_mm(find_mm(geometry, place))} mm, {words}"


def format_mm(value: float) -> str:
    """Whole mm; never -0."""
    return str(round(value))


def describe_regions(prediction: Prediction) -> list[dict]:
    """The prediction's regions, each with what a reader asks next.

    number      from 1, the largest first, as on the pictures
    slice       canonical index of the slice in which it is highest
    file_axis, file_index  the same as `find_file_slice` says it
    on_lesion   whether it touches a known lesion; None where no lesion mask is known
    """
    numbers, geometry, lesion = prediction.region_numbers, prediction.scan.geometry, prediction.scan.lesion
    to_stack, described = np.linalg.inv(geometry.stack_affine), []
    for number, region in enumerate(prediction.regions, 1):
        within = numbers == number
        on_lesion = None if lesion is None else bool((within & lesion).any())
        place = nib.affines.apply_affine(to_stack, [region[f"peak_{axis}_mm"] for axis in "xyz"])[2]
        peak = int(np.clip(round(place), 0, len(geometry.slices) - 1))
        axis, index = find_file_slice(geometry, geometry.slices[peak]) or (None, None)
        more = {"number": number, "slice": geometry.slices[peak], "file_axis": axis, "file_index": index}
        more |= {"on_lesion": on_lesion}
        described.append(region | more)
    return described
