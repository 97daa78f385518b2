"""Takes a scan, from the slice store or straight from its file, to its anomaly map and scores with a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models.anomaly import (
    give_p_values,
    map_anomalies,
    map_brightness,
    map_deviation,
    reconstruct,
    score_mse,
    score_scan,
    score_slices,
)
from models.checkpoint import CheckpointError, load_model
from preprocessing.scans import DataError, name_scan
from preprocessing.slices import ScanSlices
from preprocessing.volume import cut_stack, find_brain, read_mask, read_volume

DETECTORS = {
    "score": "anomaly map of the model",
    "mse": "plain reconstruction error",
    "bright": "intensity threshold, bright",
    "dark": "intensity threshold, dark",
    "deviation": "z-score of intensity",
}
THICKEST_MM = 4.0  # between slices; what the default model was tried on (EXPERIMENTS.md)
BRAIN_ML = (700, 2000)  # of an adult
# median z-score of a brain's intensity: up to 0.5 in healthy scans that were validated or trained on, 1.0 or more in
# scans with dark for bright
USUAL_DEVIATION = 0.7
FLIPS = {"upside down": 0, "back to front": 1}  # axes of a stack; left and right look too much alike


@dataclass(frozen=True)
class OpenScan:
    """A scan in memory: its stack (n, H, W) in [0, 1], its lesion mask likewise, bool, or None, and its record."""

    name: str
    label: str  # normal, abnormal, or empty where nobody has said
    stack: np.ndarray
    lesion: np.ndarray | None
    record: dict  # as `cut_stack` gives it; from the store, scan.json

    @property
    def indices(self) -> list[int]:
        return self.record["slices"]

    @property
    def subject(self) -> str:
        return self.record.get("subject", self.name)

    @property
    def spacing_mm(self) -> tuple[float, float]:
        """Between slices, between pixels."""
        return self.record["spacing_mm"][2], self.record["pixel_mm"]

    @property
    def pixel_ml(self) -> float:
        return self.spacing_mm[0] * self.spacing_mm[1] ** 2 / 1000


@dataclass(frozen=True)
class Examined:
    """A scan with all that was made of it; stacks are (n, H, W), maps of all DETECTORS or of the model alone."""

    scan: OpenScan
    reconstruction: np.ndarray
    maps: dict[str, np.ndarray]  # by detector, NaN outside the brain


class Examiner:
    """One trained model with its calibration.

    slices       the settings that its training slices were made with
    seen         the hashes of the scans that it was trained on or calibrated with
    calibration  what healthy validation scans show (models/anomaly.py)
    threshold    the calibrated anomaly of a voxel, in times the usual residual
    """

    def __init__(self, model_path: Path, device: torch.device, batch_size: int):
        self.model, content = load_model(model_path, device)
        self.model.to(memory_format=torch.channels_last)
        self.slices = content["slices"]
        self.calibration = content["calibration"]
        if "seen" not in content:
            raise CheckpointError(
                f"{model_path}: was calibrated by an older version; delete it and run train.py again, which only "
                "calibrates where last.pt is whole"
            )
        self.seen = set(content["seen"])
        self.threshold = float(self.calibration["threshold"])
        self.precision = torch.bfloat16 if content["precision"] == "bf16" else torch.float32
        self.device, self.batch_size = device, batch_size

    def examine(self, scan: OpenScan, baselines: bool = True) -> Examined:
        """The scan's reconstruction and maps: of the model alone, or with those that it is measured against."""
        stack = scan.stack
        reconstruction = reconstruct(
            self.model, stack, scan.spacing_mm[0], self.device, self.batch_size, self.precision
        )
        maps = {
            "score": map_anomalies(stack, reconstruction, scan.spacing_mm, self.calibration),
            "mse": np.where(stack > 0, (stack.astype(np.float32) - reconstruction) ** 2, np.nan),
        }
        if baselines:
            brightness = map_brightness(stack)
            deviation = map_deviation(stack, scan.spacing_mm, self.calibration)
            maps |= {"bright": brightness, "dark": 1 - brightness, "deviation": deviation}
        return Examined(scan, reconstruction, maps)

    def score(self, examined: Examined, false_alarms: float) -> tuple[list[dict], dict]:
        """(a row for each slice, a row for the scan), flagged where its p-value is at most `false_alarms`."""
        scan, maps = examined.scan, examined.maps
        slice_scores = {name: score_slices(values) for name, values in maps.items()}
        slice_scores["mse"] = score_mse(scan.stack, examined.reconstruction)
        who = {"label": scan.label, "scan": scan.name, "subject": scan.subject}
        lesion_voxels = scan.record.get("lesion_voxels") or [0] * len(scan.indices)
        p_values = give_p_values(slice_scores["score"], self.calibration["slice_scores"].numpy())
        rows = [
            who
            | {"slice": index, "lesion_voxels": lesion_voxels[i], "p_value": float(p_values[i])}
            | {name: float(slice_scores[name][i]) for name in maps}
            for i, index in enumerate(scan.indices)
        ]
        scores = {name: score_scan(values) for name, values in maps.items()}
        scores["mse"] = float(slice_scores["mse"].mean())
        p_value = float(give_p_values(scores["score"], self.calibration["scan_scores"].numpy()))
        row = who | {"lesion_known": scan.lesion is not None, "p_value": p_value, "flagged": p_value <= false_alarms}
        return rows, row | scores

    def refuse_seen(self, scans: list[ScanSlices]) -> None:
        """DataError where one of the scans was trained on or calibrated with: it looks more usual than a new one."""
        known = [scan for scan in scans if scan.source_hash in self.seen]
        if known:
            others = f", and on {len(known) - 1} others of these" if known[1:] else ""
            raise DataError(
                f"{known[0].folder}: the model was trained or calibrated on this scan{others}; test it on scans that "
                "it has not seen"
            )

    def cut(self, path: Path, brain_mask: Path | None, axes: str | None, index: int | None) -> tuple[OpenScan, list]:
        """(the scan in this file, cut as the model's training slices were; what about it is unlike them, in words).

        axes: where the stored axes point to, for a header that does not tell; index: which volume of a file with
        several. Raises DataError with the cure.
        """
        doubts = []
        try:
            volume, axes = read_volume(path, index=index), None
        except DataError:
            if axes is None:
                raise
            volume = read_volume(path, axes, index=index)
            doubts.append(f"its header does not tell its orientation; {axes} is taken on trust")
        brain, skull_off = (read_mask(brain_mask, volume, axes), True) if brain_mask else find_brain(volume)
        if not brain.any():
            raise DataError(f"{path}: is the same everywhere, no brain is seen; convert it again from its source")
        size, pixel_mm = self.slices["size"], self.slices["pixel_mm"]
        try:
            stack, record = cut_stack(volume, brain, skull_off, self.slices["keep"], size, size * pixel_mm)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        scan = OpenScan(name_scan(path), "", stack, None, record | {"source": str(path)})
        return scan, doubts + self.doubt(scan, float(np.count_nonzero(brain) * np.prod(volume.spacing_mm) / 1000))

    def doubt(self, scan: OpenScan, brain_ml: float) -> list[str]:
        """What makes this scan unlike those that the model was trained on, a sentence each; empty: nothing seen."""
        doubts = []
        skull_off, spacing = scan.record["skull_off"], scan.record["spacing_mm"]
        if skull_off != self.slices["skull_off"]:
            states = {True: "without skull", False: "with skull and scalp"}
            cure = "strip it or give --brain-mask" if self.slices["skull_off"] else "give the scan as it was"
            doubts.append(
                f"it is {states[skull_off]} and the model was trained on scans {states[not skull_off]}; {cure}"
            )
        if max(spacing[:2]) > 2 * self.slices["pixel_mm"] or spacing[2] > THICKEST_MM:
            sizes = " x ".join(f"{side:g}" for side in spacing)
            doubts.append(f"its voxels of {sizes} mm are coarser than what the model was tried on")
        if skull_off and not BRAIN_ML[0] <= brain_ml <= BRAIN_ML[1]:
            doubts.append(f"its brain mask of {brain_ml:.0f} ml is no adult brain's; look at the mask")
        usual, *flipped = (
            measure_deviation(stack, scan.spacing_mm, self.calibration)
            for stack in (scan.stack, *(np.flip(scan.stack, axis) for axis in FLIPS.values()))
        )
        if usual > USUAL_DEVIATION:
            doubts.append(
                f"the intensity of its brain lies {usual:.1f} standard deviations from healthy scans' there (median; "
                f"up to {USUAL_DEVIATION} is usual); another contrast, sequence or position?"
            )
        doubts += [
            f"it looks more like a healthy brain {words} than as its header says; check its orientation"
            for words, deviation in zip(FLIPS, flipped, strict=True)
            if deviation < min(usual, USUAL_DEVIATION)
        ]
        return doubts


def measure_deviation(stack: np.ndarray, spacing_mm: tuple[float, float], calibration: dict) -> float:
    """The median over a stack's brain of how many standard deviations its intensity is from healthy scans' there."""
    return float(np.nanmedian(map_deviation(stack, spacing_mm, calibration)))


def open_scan(scan: ScanSlices) -> OpenScan:
    """A scan of the store with its slices read. Raises DataError where one is broken."""
    return OpenScan(scan.name, scan.label, scan.read_stack(), scan.read_lesion(), scan.record)
