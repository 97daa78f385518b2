"""Is a scan one that the model may be asked about: unseen, and like those that it was trained on?"""

from __future__ import annotations

import numpy as np
import torch

from common.cli import DataError
from evaluation.predictor import Predictor
from models.baselines import map_deviation
from preprocessing.store import LoadedScan, StoredScan

THICKEST_MM = 4.0  # between slices; the default model was tried on no thicker ones (docs/experiments.md)
BRAIN_ML = (700, 2000)  # of an adult
# Median z-score of a brain's intensity: up to 0.5 in healthy scans that were validated or trained on, 1.0 or more in
# scans with dark for bright.
HIGHEST_DEVIATION = 0.7
FLIPS = {"upside down": 0, "back to front": 1}  # axes of a stack; left and right look too much alike


def is_seen(scan: StoredScan | LoadedScan, predictor: Predictor) -> bool:
    """Whether the model was trained or calibrated on this scan, whatever its file is called."""
    return not predictor.seen.isdisjoint(scan.hashes)


def refuse_seen(scans: list[StoredScan], predictor: Predictor) -> None:
    """DataError where the model was trained or calibrated on one of the scans: it looks more normal than a new one."""
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
        found.append(f"its brain mask of {scan.brain_ml:.0f} ml is no adult brain's; look at the mask")
    return found + _find_odd_intensities(scan, predictor)


def _find_odd_intensities(scan: LoadedScan, predictor: Predictor) -> list[str]:
    """Another contrast, or an orientation that the header does not have."""
    deviation, *flipped = (
        _measure_deviation(stack, scan.geometry.sampling_mm, predictor)
        for stack in (scan.stack, *(np.flip(scan.stack, axis) for axis in FLIPS.values()))
    )
    found = []
    if deviation > HIGHEST_DEVIATION:
        found.append(
            f"the intensity of its brain lies {deviation:.1f} standard deviations from healthy scans' there (median; "
            f"up to {HIGHEST_DEVIATION} is common); another contrast, sequence or position?"
        )
    return found + [
        f"it looks more like a healthy brain {words} than as its header says; check its orientation"
        for words, other in zip(FLIPS, flipped, strict=True)
        if other < min(deviation, HIGHEST_DEVIATION)
    ]


def _measure_deviation(stack: np.ndarray, sampling_mm: tuple[float, float], predictor: Predictor) -> float:
    """The median over a stack's brain of how many standard deviations its intensity is from healthy scans' there."""
    calibration = predictor.calibration
    values = torch.from_numpy(np.ascontiguousarray(stack)).to(calibration.intensity.device)
    return float(map_deviation(values, sampling_mm, calibration).nanmedian())
