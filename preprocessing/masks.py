"""Reads brain masks and lesion masks: hard or soft, of one label or several, and whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import fill_voids
import numpy as np
from nibabel.orientations import apply_orientation, io_orientation
from scipy import ndimage

from common.cli import DataError
from preprocessing.images import read_image
from preprocessing.volume import Volume, find_box

RINGING = 0.3  # of a mask's highest value: as far as a spline goes below 0
MOST_LABELS = 20  # whole numbers of so few values are labels; of more, where neighbours are alike
STRAY_SHARE = 0.1  # of the largest piece's volume: smaller pieces are not the brain


def read_mask(
    path: Path,
    volume: Volume,
    axes: str | None = None,
    distrusted: str | None = None,
    labels: Sequence[int] | None = None,
) -> tuple[np.ndarray, str]:
    """(mask of this volume (X, Y, Z) bool in canonical order, a note on how it was cut, or "").

    labels  those that are taken; None: all above 0

    Raises DataError with the cure where the mask does not fit the scan, is not a mask or is empty.
    """
    mask = read_image(path, axes, distrusted)
    if mask.values.shape != volume.shape or not np.allclose(mask.affine, volume.affine, atol=1e-2):
        raise DataError(
            f"{path}: shape {mask.values.shape} and affine do not fit its scan ({volume.shape}); "
            "resample it onto the scan"
        )
    try:
        inside, how = cut_mask(mask.values, labels)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if not inside.any():
        raise DataError(f"{path}: is empty; make the mask again or remove it")
    return np.asfortranarray(apply_orientation(inside, io_orientation(mask.affine))), how


def cut_mask(values: np.ndarray, labels: Sequence[int] | None = None) -> tuple[np.ndarray, str]:
    """(the values of a mask, of any shape and type, as bool; a note on how they were cut, or "").

    Labels are taken where they are above 0, or listed; probabilities above one half. Soft masks of another range, such
    as percentages or what a spline made of a mask, are cut at one half of it.
    """
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low < 0 and np.count_nonzero(values == low) + np.count_nonzero(values == high) == values.size:
        return values > low, ""
    if low < -RINGING * high:
        raise DataError(f"holds values from {low:g} to {high:g}, unlike a mask; make the mask again")
    if labels or not _is_soft(values, low, high):
        return _take_labels(values, labels)
    half = 0.5 if high <= 1.5 else high / 2  # a spline goes beyond 1
    how = "" if low >= 0 and high <= 1 else f"soft, and cut at one half ({low:.3g} to {high:.3g}, cut at {half:.3g})"
    return values > half, how


def _is_soft(values: np.ndarray, low: float, high: float) -> bool:
    """Whether values change from voxel to voxel, as probabilities do and labels do not."""
    if low >= 0 and ((high <= 1 and values.dtype.kind in "biu") or not ((values > 0) & (values < high)).any()):
        return False
    if values.dtype.kind == "f" and not (values == np.rint(values)).all():
        return True
    if low < 0:
        return True
    found = values[values > 0]
    if len(np.unique(found)) <= MOST_LABELS:
        return False
    between = (values[:-1] > 0) & (values[:-1] < high)
    return np.count_nonzero(between & (values[1:] == values[:-1])) < np.count_nonzero(between) / 2


def _take_labels(values: np.ndarray, labels: Sequence[int] | None) -> tuple[np.ndarray, str]:
    if not labels:
        several = values.max() > 1 and np.unique(values[values > 0])
        return values > 0, f"all its labels are taken ({_list(several)})" if np.size(several) > 1 else ""
    inside = np.isin(values, labels)
    if not inside.any():
        there = _list(np.unique(values[values > 0])) or "none"
        raise DataError(f"holds none of the labels {_list(labels)}; it has {there}")
    return inside, ""


def _list(labels: Sequence[float]) -> str:
    return ", ".join(f"{label:g}" for label in labels[:MOST_LABELS]) + ("" if len(labels) <= MOST_LABELS else " ...")


def drop_stray_pieces(inside: np.ndarray) -> tuple[np.ndarray, int]:
    """(a mask (X, Y, Z) bool without its stray pieces, the voxels that were dropped).

    A stray piece touches the main one at no face, edge or corner, lies in none of its cavities and has less than
    STRAY_SHARE of its volume: eyes, the neck, specks.
    """
    box = find_box(inside)
    planes = inside.T[box]
    if label_pieces(planes)[1] < 2:  # over faces alone is faster, and most masks are one piece so
        return inside, 0
    labels, count = label_pieces(planes, np.ones((3, 3, 3)))
    if count < 2:
        return inside, 0
    sizes = sum(np.bincount(plane.ravel(), minlength=count + 1) for plane in labels)
    sizes[0] = 0
    main = (sizes >= STRAY_SHARE * sizes.max())[labels]
    del labels  # large, as all here is of 512^3
    main = fill_voids.fill(main)
    kept = inside.copy()
    kept.T[box] &= main
    return kept, int(np.count_nonzero(inside) - np.count_nonzero(kept))


def label_pieces(mask: np.ndarray, structure: np.ndarray | None = None) -> tuple[np.ndarray, int]:
    """`scipy.ndimage.label`, with half the memory where there are no more pieces than 16 bits can count."""
    try:
        return ndimage.label(mask, structure, np.uint16)
    except RuntimeError:
        return ndimage.label(mask, structure)
