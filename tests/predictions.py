"""Scans, predictions and models made by hand for the tests of evaluation: nothing here is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from evaluation.predictor import DETECTORS, Prediction, Predictor
from evaluation.regions import list_regions
from models.anomaly import reconstruct
from models.calibration import LEVELS, TEXTURE_BINS, Calibration
from models.checkpoint import build_model, load_model, save_checkpoint
from preprocessing.geometry import Geometry
from preprocessing.store import LoadedScan, check_same_settings, list_scans
from preprocessing.worker import FORMAT

SIZE, PIXEL_MM = 32, 4.0
SETTINGS = {"size": SIZE, "format": FORMAT, "skull_off": True, "keep": 0.7, "pixel_mm": PIXEL_MM}


def make_geometry(slices: int, first: int, size: int, spacing_mm: tuple, pixel_mm: float) -> Geometry:
    """A stack in the middle of a scan of (40, 40, 200) voxels in RAS."""
    affine = np.diag([*spacing_mm, 1.0]).tolist()
    return Geometry(
        shape=(40, 40, 200),
        affine=tuple(map(tuple, affine)),
        axes="RAS",
        spacing_mm=spacing_mm,
        centre=(19.5, 19.5),
        pixel_mm=pixel_mm,
        size=size,
        slices=tuple(range(first, first + slices)),
    )


def make_scan(stack: np.ndarray | None = None, spacing_mm=(4.0, 4.0, 3.0), **changes) -> LoadedScan:
    """A scan of 4 x 4 x 3 mm in memory; its slices are 20 and on."""
    stack = make_stack() if stack is None else stack
    geometry = make_geometry(len(stack), 20, SIZE, tuple(spacing_mm), PIXEL_MM)
    scan = LoadedScan("a_T1w", "abnormal", "a", "a_T1w.nii.gz", stack, None, geometry, (0, 1, 1), True, brain_ml=1300)
    return replace(scan, **changes)


def make_prediction(threshold: float = 4.0, slices: int = 10, lesion: bool = True, **changes) -> Prediction:
    """Slices 50 and on of a disc of 0.6; in the fifth and the sixth a lesion left of the middle and towards the nose.

    The lesion is 0.3 brighter than its reconstruction, and its anomaly is twice the threshold; elsewhere that is 1.
    """
    y, x = np.mgrid[:64, :64] - 31.5
    disc = np.repeat(np.where(x**2 + y**2 < 25**2, 0.6, 0)[None], slices, axis=0)
    mask = np.zeros(disc.shape, dtype=bool)
    mask[4:6, 40:46, 20:24] = True
    stack = np.where(mask, 0.9, disc).astype(np.float16)
    anomaly = np.where(disc > 0, np.where(mask, 2 * threshold, 1), np.nan).astype(np.float32)
    geometry = make_geometry(slices, 50, 64, (2.0, 2.0, 2.0), 2.0)
    scan = LoadedScan(
        "one", "abnormal", "s", "raw/one.nii.gz", stack, mask if lesion else None, geometry, (0, 1, 1), True
    )
    who = {"label": scan.label, "scan": scan.name, "subject": scan.subject}
    scores = {"p_value": 0.1, **dict.fromkeys(DETECTORS, 5.0)}
    prediction = Prediction(
        scan=scan,
        reconstruction=disc.astype(np.float32),
        maps={"score": anomaly},
        native_map=np.full((4, 5, 6), np.nan, np.float32),
        native_numbers=np.zeros((4, 5, 6), int),
        regions=[],
        slice_rows=[who | {"slice": 50 + i, "lesion_voxels": 0, **scores} for i in range(slices)],
        scan_row=who | {"lesion_known": lesion, "flagged": False, "age": None, "sex": None, **scores},
        threshold=threshold,
    )
    return replace(prediction, **changes)


def restore_map(made: Prediction, native_map: np.ndarray | None = None) -> Prediction:
    """That prediction with its map on the scan's own grid, or with another one there, and with the regions of it."""
    native = made.scan.geometry.restore(made.anomaly) if native_map is None else native_map
    regions, numbers = list_regions(native, made.affine, made.threshold, 0)
    return replace(made, native_map=native, native_numbers=numbers, regions=regions)


def mark(anomaly: np.ndarray, threshold: float) -> np.ndarray:
    """Where a map is marked, bool: what is connected at or above the threshold, down to an eighth of its highest."""
    parts, count = ndimage.label(np.nan_to_num(anomaly) >= threshold)
    marked = np.zeros(anomaly.shape, bool)
    for part in range(1, count + 1):
        marked |= (parts == part) & (anomaly >= 0.125 * anomaly[parts == part].max())
    return marked


def make_stack(seed: int = 0, slices: int = LEVELS) -> np.ndarray:
    """(slices, SIZE, SIZE) float16: a lopsided, structured brain within 0, whose axes and sides can be told apart."""
    z, y, x = np.meshgrid(np.linspace(-1, 1, slices), *[np.linspace(-1, 1, SIZE)] * 2, indexing="ij")
    inside = (x / 0.8) ** 2 + (y / 0.9) ** 2 + (0.7 * z) ** 2 < 1
    values = 0.5 + 0.25 * np.sin(5 * x + 3 * z + seed) * np.cos(7 * y + 2 * z) + 0.1 * z
    return np.where(inside, values, 0).astype(np.float16)


def make_calibration(deviation: float = 0.1, **changes) -> Calibration:
    """A calibration that expects more of negative residuals; healthy intensities are those of `make_stack`."""
    mean = torch.from_numpy(make_stack().astype(np.float32))
    calibration = Calibration(
        expected_residual=torch.tensor([0.1, 0.2]).reshape(2, 1, 1, 1).repeat(1, LEVELS, SIZE, SIZE),
        texture_edges=torch.linspace(0, 1, TEXTURE_BINS + 1)[1:-1].repeat(2, 1),
        texture_factor=torch.ones(2, TEXTURE_BINS, TEXTURE_BINS),
        intensity=torch.stack([mean, torch.full_like(mean, deviation)]),
        scan_scores=torch.linspace(1, 2, 39),
        slice_scores=torch.linspace(1, 2, 99),
        voxel_threshold=3.0,
        median_residuals=torch.full((39,), 1e3),  # no scan is a misfit
        region_masses=torch.linspace(0.0, 39.0, 39),
    )
    return replace(calibration, **changes)


def write_model(path: Path, calibration: Calibration | None = None, **changes) -> Path:
    """A model.pt with an untrained model; what is None is left out."""
    torch.manual_seed(0)
    config = {"model": "dae", "size": SIZE, "width": 8, "depth": 2}
    content = {
        "config": config,
        "weights": build_model(config).state_dict(),
        "slices": SETTINGS,
        "calibration": (calibration or make_calibration()).to_state(),
        "seen": [],
        "precision": "fp32",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, {key: value for key, value in (content | changes).items() if value is not None})
    return path


def make_predictor(
    folder: Path, calibration: Calibration | None = None, options: dict | None = None, **changes
) -> Predictor:
    """A predictor with an untrained model and a calibration made by hand."""
    path = write_model(folder / "model.pt", calibration, **changes)
    return Predictor.load(path, torch.device("cpu"), **{"batch_size": 4} | (options or {}))


def write_untrained_run(folder: Path, processed: Path) -> Path:
    """A run folder with an untrained model, calibrated on the validation scans of a slice store."""
    scans = list(list_scans(processed / "val"))
    settings = check_same_settings(scans)
    seen = [one for split in ("train", "val") for scan in list_scans(processed / split) for one in scan.hashes]
    model, _ = load_model(write_model(folder / "model.pt"))
    compared = []
    for scan in scans:
        stack, sampling_mm = torch.from_numpy(scan.read_stack()), scan.geometry.sampling_mm
        compared.append((stack, reconstruct(model, stack, sampling_mm[0]), sampling_mm))
    calibration = Calibration.fit(compared)
    low = replace(calibration, voxel_threshold=0.7 * calibration.voxel_threshold)  # such a model marks nothing else
    write_model(folder / "model.pt", low, slices=settings, seen=seen)
    return folder
