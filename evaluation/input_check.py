"""Checks a scan before its prediction: the model has not seen it, and it is like the training scans."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy import ndimage

from common.cli import DataError
from evaluation.predictor import Predictor
from models.baselines import map_deviation
from preprocessing.store import LoadedScan, StoredScan
from preprocessing.volume import BRAIN_ML, find_box

THICKEST_MM = 4.0  # between slices; the default model was tried on no thicker ones (docs/experiments.md)
# Median z-score of a brain's intensity: up to 0.5 in healthy scans that were validated or trained on, 1.0 or more in
# scans with dark for bright.
HIGHEST_DEVIATION = 0.7
CLEARLY = 0.95  # of its deviation as the header says: what another orientation has to be below
SLICES_COMPARED = 16  # of each orientation
AXES = ("inferior-superior", "posterior-anterior", "left-right")  # of a stack
ORDERS = {
    "": (0, 1, 2),
    f"with its {AXES[0]} and {AXES[1]} axes exchanged": (1, 0, 2),
    f"with its {AXES[0]} and {AXES[2]} axes exchanged": (2, 1, 0),
    f"with its {AXES[1]} and {AXES[2]} axes exchanged": (0, 2, 1),
    "with all its axes moved on by one": (1, 2, 0),
    "with all its axes moved on by two": (2, 0, 1),
}
# left and right are too similar
FLIPS = {"": (), "upside down": (0,), "back to front": (1,), "upside down and back to front": (0, 1)}


def is_seen(scan: StoredScan | LoadedScan, predictor: Predictor) -> bool:
    """Whether the model was trained or calibrated on this scan, whatever its file is called."""
    return not predictor.seen.isdisjoint(scan.hashes)


def refuse_seen(scans: list[StoredScan], predictor: Predictor) -> None:
    """DataError where the model was trained or calibrated on one of the scans: it would score lower than a new one."""
    seen = [scan for scan in scans if is_seen(scan, predictor)]
    if seen:
        others = f", and on {len(seen) - 1} others of these" if seen[1:] else ""
        raise DataError(
            f"{seen[0].folder}: the model was trained or calibrated on this scan{others}; test it on scans that "
            "it has not seen"
        )


def find_mismatches(scan: LoadedScan, predictor: Predictor) -> list[str]:
    """What makes this scan unlike those that the model was trained on, a sentence each; empty: nothing found."""
    skull_off, slices = scan.skull_off, predictor.slices
    found = []
    if skull_off != slices["skull_off"]:
        states = {True: "without skull", False: "with skull and scalp"}
        cure = "strip it or give --brain-mask" if slices["skull_off"] else "give the scan as it was"
        found.append(f"it is {states[skull_off]} and the model was trained on scans {states[not skull_off]}; {cure}")
    spacing = scan.geometry.spacing_mm
    if max(spacing[:2]) > 2 * slices["pixel_mm"] or spacing[2] > THICKEST_MM:
        sizes = " x ".join(f"{side:g}" for side in spacing)
        found.append(f"its voxels of {sizes} mm are coarser than what the model was tried on")
    if skull_off and scan.brain_ml is not None and not BRAIN_ML[0] <= scan.brain_ml <= BRAIN_ML[1]:
        found.append(f"its brain mask has {scan.brain_ml:.0f} ml, not the size of an adult brain; check the mask")
    return found + _find_odd_intensities(scan, predictor)


def explain_misfit(misfit: float) -> str:
    """What a Prediction's misfit means, and its cure."""
    return (
        f"most of its brain is reconstructed {misfit:.1f} times as badly as that of the scans it is compared with, so "
        "its p-value means little; calibrate the model on healthy scans of this scanner (training/calibrate.py)"
    )


def _find_odd_intensities(scan: LoadedScan, predictor: Predictor) -> list[str]:
    """Another contrast, or an orientation that the header does not have."""
    deviation = _measure_deviation(scan.stack, scan.geometry.sampling_mm, predictor)
    found = []
    if deviation > HIGHEST_DEVIATION:
        found.append(
            f"the intensity of its brain lies {deviation:.1f} standard deviations from healthy scans' there (median; "
            f"up to {HIGHEST_DEVIATION} is common); another contrast, sequence or position?"
        )
    deviations = {}
    for words, stack, sampling_mm in _list_orientations(scan, predictor.slices["keep"]):
        deviations[words] = _measure_deviation(stack, sampling_mm, predictor)
    best = min(deviations, key=deviations.get)
    if deviations[best] < min(CLEARLY * deviations[""], HIGHEST_DEVIATION):
        found.append(f"it looks more like a healthy brain {best} than as its header says; check its orientation")
    return found


def _list_orientations(scan: LoadedScan, keep: float) -> Iterator[tuple[str, np.ndarray, tuple[float, float]]]:
    """(words, stack, sampling_mm) of a few slices of the scan as its header says, and as if that were wrong.

    Its stack is cut out of itself anew, with cubic voxels; of another axis `keep` of the slices are kept, the middle
    ones.
    """
    size, (slice_mm, pixel_mm) = scan.geometry.size, scan.geometry.sampling_mm
    planes = max(1, round(len(scan.stack) * slice_mm / pixel_mm))  # a stack of a few thin slices is not lost
    brain = ndimage.zoom(scan.stack.astype(np.float32), (planes / len(scan.stack), 1, 1), order=1)
    brain = brain[find_box((brain > 0).T)]
    for order_words, order in ORDERS.items():
        turned = brain.transpose(order)
        count = len(turned) if order[0] == 0 else max(1, round(keep * len(turned)))
        step = -(-count // SLICES_COMPARED)
        turned = turned[(len(turned) - count) // 2 :][:count:step]
        stack = np.zeros((len(turned), size, size), np.float32)
        inside, part = zip(*(_centre(length, size) for length in turned.shape[1:]), strict=True)
        stack[:, inside[0], inside[1]] = turned[:, part[0], part[1]]
        for flip_words, axes in FLIPS.items():
            words = ", ".join(filter(None, (order_words, flip_words)))
            yield words, np.flip(stack, axes), (step * pixel_mm, pixel_mm)


def _centre(length: int, size: int) -> tuple[slice, slice]:
    """(where in `size` places, which of `length` ones): the middles of both fall together."""
    shared = min(length, size)
    return tuple(slice((whole - shared) // 2, (whole - shared) // 2 + shared) for whole in (size, length))


def _measure_deviation(stack: np.ndarray, sampling_mm: tuple[float, float], predictor: Predictor) -> float:
    """The median over a stack's brain of how many standard deviations its intensity is from healthy scans' there."""
    calibration = predictor.calibration
    values = torch.from_numpy(stack.copy()).to(calibration.intensity.device)  # flipped axes have negative strides
    return float(map_deviation(values, sampling_mm, calibration).nanmedian())
