"""Reads and checks scan.json: every field must be possible for a scan."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np

from common.cli import DataError
from common.files import read_json
from preprocessing.geometry import Geometry
from preprocessing.images import MOST_VOXELS, SPACING_MM

MOST_SIZE = 4096  # pixels along each side of a slice
OLDEST = 130  # years
PIXEL_MM = (0.01, 100)
AXES = {  # every way to store three axes
    "".join(axes) for order in itertools.permutations(("LR", "PA", "IS")) for axes in itertools.product(*order)
}
CURE = "delete the folder, preprocess again"


def read_record(folder: Path) -> dict:
    """The checked content of a scan's scan.json. FileNotFoundError where there is none, DataError for a bad one."""
    path = folder / "scan.json"
    record = read_json(path, CURE)
    try:
        wrong = find_wrong(record)
    except KeyError as error:
        wrong = f"{error} is missing"
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        wrong = str(error)
    if wrong:
        raise DataError(f"{path}: is not a record of a scan ({' '.join(wrong.split())}); {CURE}")
    return record


def find_wrong_settings(record: dict) -> str:
    """Which of `store.SAME_SETTINGS` cannot be true, in words; "" where nothing is found."""
    wrong = {
        "size": not (type(record["size"]) is int and 1 <= record["size"] <= MOST_SIZE),
        "format": type(record["format"]) is not int,
        "skull_off": not isinstance(record["skull_off"], bool),
        "keep": not _lies_in(record["keep"], 1e-9, 1),
        "pixel_mm": not _lies_in(record["pixel_mm"], *PIXEL_MM),
    }
    return _name_first(wrong, record)


def find_wrong(record: dict) -> str:
    """What in a record cannot be true, in words; "" where nothing is found. Raises what broken types raise."""
    wrong = {
        "subject": not (isinstance(record["subject"], str) and record["subject"]),
        "source": not _names_a_source(record),
        "dicom": not isinstance(record.get("dicom", ""), str),
        "warnings": not _are_texts(record.get("warnings", [])),
        "content": not isinstance(record.get("content", ""), str),
        "session": not isinstance(record.get("session") or "", str),
        "age": record.get("age") is not None and not _lies_in(record["age"], 0, OLDEST),
        "sex": record.get("sex") not in (None, "F", "M"),
        "shape": not _is_shape(record["shape"]),
        "spacing_mm": not (_are_numbers(record["spacing_mm"], 3) and _lie_in(record["spacing_mm"], *SPACING_MM)),
        "affine": not _is_affine(record["affine"]),
        "straight": not _is_straight(record.get("straight")),
        "axes": not (isinstance(record["axes"], str) and record["axes"] in AXES),
        "centre": not _are_numbers(record["centre"], 2),
        "unscored_share": record.get("unscored_share") is not None and not _lies_in(record["unscored_share"], 0, 1),
        "unscored_lesions_ml": not _are_volumes(record.get("unscored_lesions_ml") or []),
        "slices": not (_are_counts(record["slices"]) and record["slices"]),
        "scale": not _are_numbers(record["scale"], 3),
    }
    found = find_wrong_settings(record) or _name_first(wrong, record)
    if found:
        return found
    slices, depth = record["slices"], Geometry.from_record(record).canonical_shape[2]
    if not all(low < high for low, high in zip([-1, *slices], [*slices, depth], strict=True)):
        return f"slices are not rising numbers below {depth}"
    lesion = record.get("lesion_voxels")
    if lesion is not None and not (_are_counts(lesion) and len(lesion) == len(slices)):
        return f"lesion_voxels are not {len(slices)} counts"
    return ""


def _name_first(wrong: dict[str, bool], record: dict) -> str:
    name = next((name for name, is_wrong in wrong.items() if is_wrong), "")
    return f"{name} is {str(record.get(name))[:60]}" if name else ""


def _names_a_source(record: dict) -> bool:
    """Whether `sources` has the hash of the file that `source` names."""
    source, sources = record["source"], record["sources"]
    return isinstance(source, str) and isinstance(sources, dict) and isinstance(sources.get(Path(source).name), str)


def _lies_in(value, low: float, high: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def _lie_in(values: list, low: float, high: float) -> bool:
    return all(low <= value <= high for value in values)


def _are_numbers(values, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    )


def _are_volumes(values) -> bool:
    return isinstance(values, list) and all(_lies_in(value, 0, MOST_VOXELS) for value in values)


def _are_texts(values) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _is_straight(grid) -> bool:
    """Whether it is a grid as `oblique.StraightGrid` has it, or none."""
    return grid is None or (isinstance(grid, dict) and _is_shape(grid["shape"]) and _is_affine(grid["affine"]))


def _are_counts(values) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= MOST_VOXELS for value in values)


def _is_shape(shape) -> bool:
    return _are_numbers(shape, 3) and all(type(n) is int and n > 0 for n in shape) and math.prod(shape) <= MOST_VOXELS


def _is_affine(affine) -> bool:
    if not (isinstance(affine, list) and len(affine) == 4 and all(_are_numbers(row, 4) for row in affine)):
        return False
    matrix = np.array(affine, dtype=float)
    return affine[3] == [0, 0, 0, 1] and abs(np.linalg.det(matrix[:3, :3])) > 1e-6
