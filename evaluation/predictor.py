"""Predicts a scan with a trained model: reconstruction, maps, scores, p-values, regions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import nn

from common.cli import DataError
from common.device import find_precision
from evaluation.regions import find_regions, list_regions
from models.anomaly import (
    compute_residual,
    find_median,
    map_anomalies,
    reconstruct,
    score_mse,
    score_scan,
    score_slices,
)
from models.baselines import map_brightness, map_deviation
from models.calibration import Calibration
from models.checkpoint import load_model
from preprocessing.store import LoadedScan, check_settings

DETECTORS = {
    "score": "anomaly map of the model",
    "mse": "plain reconstruction error",
    "bright": "intensity threshold, bright",
    "dark": "intensity threshold, dark",
    "deviation": "z-score of intensity",
}


@dataclass(frozen=True)
class Prediction:
    """A scan and its prediction; NumPy arrays.

    reconstruction  (n, H, W) float32, 0 outside the brain
    maps            {detector: (n, H, W) float32, NaN outside the brain}; all DETECTORS, or the model's alone
    native_map      (I, J, K) float32: the anomaly map on the scan's own grid, NaN where nothing was scored
    native_numbers  (I, J, K) int: the number, from 1, of the region in which a voxel of it is marked; 0: in none
    regions         the marked regions of the native map (`regions.list_regions`), the largest first, without those too
                    small to be listed; `p_value`: how often a healthy scan shows a region of such a mass
    slice_rows      a row for each slice, as scores.csv has them
    scan_row        the scan's row, as scans.csv has it
    threshold       the calibrated threshold of a voxel, in units of the scan's median
    misfit          how many times as large as in the calibration's scans the residual is in most of the brain, where
                    that is more than chance; else None
    """

    scan: LoadedScan
    reconstruction: np.ndarray
    maps: dict[str, np.ndarray]
    native_map: np.ndarray
    native_numbers: np.ndarray
    regions: list[dict]
    slice_rows: list[dict]
    scan_row: dict
    threshold: float
    misfit: float | None = None

    @property
    def anomaly(self) -> np.ndarray:
        """(n, H, W) the model's anomaly map."""
        return self.maps["score"]

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) of the native map, to scanner mm."""
        return np.array(self.scan.geometry.affine)

    @cached_property
    def limits(self) -> np.ndarray:
        """(n, H, W) the anomaly from which each pixel of the stack is marked (`regions.find_regions`)."""
        return find_regions(self.anomaly, self.threshold)[1]

    @cached_property
    def marked(self) -> np.ndarray:
        """(n, H, W) bool: which pixels of the stack are marked."""
        return np.nan_to_num(self.anomaly) >= self.limits

    @cached_property
    def region_numbers(self) -> np.ndarray:
        """(n, H, W) int: the number, from 1, of the listed region that each pixel of the stack lies in; 0: in none."""
        numbers = np.zeros(self.anomaly.shape, int)
        pixels = np.argwhere(self.marked)
        if len(pixels) and self.regions:
            to_native = np.linalg.inv(self.affine) @ self.scan.geometry.stack_affine
            voxels = np.rint(nib.affines.apply_affine(to_native, pixels[:, ::-1])).astype(int)
            inside = ((voxels >= 0) & (voxels < self.native_numbers.shape)).all(axis=1)
            numbers[tuple(pixels[inside].T)] = self.native_numbers[tuple(voxels[inside].T)]
            numbers[numbers > len(self.regions)] = 0  # too small to be listed
        return numbers

    def rank_slices(self) -> list[int]:
        """The places of the scan's slices in its stack, the highest score first."""
        return sorted(range(len(self.slice_rows)), key=lambda i: -self.slice_rows[i]["score"])


@dataclass(frozen=True)
class Predictor:
    """A trained model with its calibration, and the options of its predictions.

    slices               the settings that its training slices were made with
    seen                 the hashes of the scans that it was trained or calibrated on
    false_positive_rate  a scan is flagged where its p-value is at most this
    smallest_ml          smaller regions are not listed
    """

    model: nn.Module
    calibration: Calibration
    slices: dict
    seen: frozenset[str]
    precision: torch.dtype
    batch_size: int = 32
    false_positive_rate: float = 0.05
    smallest_ml: float = 0.1

    @classmethod
    def load(cls, model_path: Path, device: torch.device, **options) -> Predictor:
        """The predictor of a run's model.pt; options are its fields from `batch_size` on. DataError with the cure."""
        model, content = load_model(model_path, device)
        if "seen" not in content:
            raise DataError(
                f"{model_path}: was calibrated by an older version; delete it and run train.py again, which only "
                "calibrates where last.pt is whole"
            )
        try:
            check_settings(content["slices"])
            if content["calibration"]["intensity"].shape[-1] != content["slices"]["size"]:
                raise ValueError("its calibration is of slices of another size")
            return cls(
                model=model.to(memory_format=torch.channels_last),
                calibration=Calibration.from_state(content["calibration"]).to(device),
                slices=content["slices"],
                seen=frozenset(content["seen"]),
                precision=find_precision(content["precision"], device),
                **options,
            )
        except DataError as error:
            raise DataError(f"{model_path}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{model_path}: does not hold a model of this version ({reason}); train again") from error

    def predict(self, scan: LoadedScan, baselines: bool = True) -> Prediction:
        """The scan's maps, scores, p-values and regions: of the model alone, or with the baselines beside it.

        DataError where its map holds values that are not finite.
        """
        stack = torch.from_numpy(scan.stack).to(self.calibration.intensity.device)
        sampling_mm = scan.geometry.sampling_mm
        reconstruction = reconstruct(self.model, stack, sampling_mm[0], self.batch_size, self.precision)
        brain, threshold = stack > 0, self.calibration.voxel_threshold
        divided = self.calibration.divide(compute_residual(stack, reconstruction, sampling_mm), brain)
        maps = {
            "score": map_anomalies(divided, stack, reconstruction, sampling_mm, threshold),
            "mse": torch.where(brain, (stack.float() - reconstruction) ** 2, torch.nan),
        }
        if not maps["score"][brain].isfinite().all():
            raise DataError(
                f"{scan.source}: its anomaly map holds values that are not finite; try --device cpu, or train again"
            )
        if baselines:
            brightness = map_brightness(stack)
            deviation = map_deviation(stack, sampling_mm, self.calibration)
            maps |= {"bright": brightness, "dark": 1 - brightness, "deviation": deviation}
        slice_scores = {name: score_slices(values) for name, values in maps.items()}
        slice_scores["mse"] = score_mse(stack, reconstruction)
        scan_scores = {name: score_scan(values) for name, values in maps.items()}
        scan_scores["mse"] = float(slice_scores["mse"].mean())
        maps = {name: values.cpu().numpy() for name, values in maps.items()}
        native_map = scan.geometry.restore(maps["score"])
        affine = np.array(scan.geometry.affine)
        regions, native_numbers = list_regions(native_map, affine, threshold, self.smallest_ml)
        p_values = self.calibration.p_values_of_regions([one.pop("mass") for one in regions])
        return Prediction(
            scan=scan,
            reconstruction=reconstruction.cpu().numpy(),
            maps=maps,
            native_map=native_map,
            native_numbers=native_numbers,
            regions=[one | {"p_value": p_value} for one, p_value in zip(regions, p_values, strict=True)],
            slice_rows=self._list_slices(scan, slice_scores),
            scan_row=self._describe_scan(scan, scan_scores),
            threshold=threshold,
            misfit=self.calibration.measure_misfit(find_median(divided[brain])),
        )

    def _list_slices(self, scan: LoadedScan, scores: dict[str, torch.Tensor]) -> list[dict]:
        p_values = self.calibration.p_values_of_slices(scores["score"]).tolist()
        columns = {name: values.tolist() for name, values in scores.items()}
        lesion_voxels = scan.lesion_voxels or [0] * len(p_values)
        who = {"label": scan.label, "scan": scan.name, "subject": scan.subject}
        return [
            who
            | {"slice": index, "lesion_voxels": lesion_voxels[i], "p_value": p_values[i]}
            | {name: values[i] for name, values in columns.items()}
            for i, index in enumerate(scan.geometry.slices)
        ]

    def _describe_scan(self, scan: LoadedScan, scores: dict[str, float]) -> dict:
        p_value = float(self.calibration.p_values_of_scans(scores["score"]))
        who = {"label": scan.label, "scan": scan.name, "subject": scan.subject}
        flagged = p_value <= self.false_positive_rate
        known = {"lesion_known": scan.lesion is not None, "p_value": p_value, "flagged": flagged}
        return who | known | scores | {"age": scan.age, "sex": scan.sex}
