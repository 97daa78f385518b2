"""Scans, predictions and models made by hand for the tests of evaluation: nothing here is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from evaluation.examiner import Examined, Examiner, OpenScan
from models.anomaly import calibrate, reconstruct
from models.checkpoint import build_model, load_model, save_checkpoint
from preprocessing.slices import check_same_settings, list_scans

SIZE, PIXEL_MM = 32, 4.0
LEVELS, BINS = 16, 12  # of a calibration
SETTINGS = {"size": SIZE, "format": 2, "skull_off": True, "keep": 0.7, "pixel_mm": PIXEL_MM}


def make_prediction(threshold: float = 4.0, slices: int = 10, lesion: bool = True) -> Examined:
    """Slices 50 and on of a disc of 0.6; in the fifth and the sixth a lesion left of the middle and towards the nose.

    The lesion is 0.3 brighter than its reconstruction, and its anomaly is twice the threshold; elsewhere that is 1.
    """
    y, x = np.mgrid[:64, :64] - 31.5
    disc = np.repeat(np.where(x**2 + y**2 < 25**2, 0.6, 0)[None], slices, axis=0)
    mask = np.zeros(disc.shape, dtype=bool)
    mask[4:6, 40:46, 20:24] = True
    stack = np.where(mask, 0.9, disc).astype(np.float16)
    anomaly = np.where(disc > 0, np.where(mask, 2 * threshold, 1), np.nan).astype(np.float32)
    record = {"slices": list(range(50, 50 + slices)), "spacing_mm": [2.0, 2.0, 2.0], "pixel_mm": 2.0}
    scan = OpenScan("one", "abnormal", stack, mask if lesion else None, record)
    return Examined(scan, disc.astype(np.float32), {"score": anomaly})


def make_calibration(stack: np.ndarray | None = None, deviation: float = 0.1, **changes) -> dict:
    """A calibration under which the anomaly map is the plain one; healthy intensities are those of `stack`."""
    stack = make_stack() if stack is None else stack
    places = np.rint(np.linspace(0, len(stack) - 1, LEVELS)).astype(int)
    mean = torch.from_numpy(stack[places].astype(np.float32))
    calibration = {
        "expected": torch.full((2, LEVELS, SIZE, SIZE), 0.1),
        "looks": torch.linspace(0, 1, BINS + 1)[1:-1].repeat(2, 1),
        "by_look": torch.ones(2, BINS, BINS),
        "intensity": torch.stack([mean, torch.full_like(mean, deviation)]),
        "scan_scores": torch.linspace(1, 2, 39),
        "slice_scores": torch.linspace(1, 2, 99),
        "threshold": torch.tensor(3.0),
    }
    return calibration | changes


def make_stack(seed: int = 0, slices: int = LEVELS) -> np.ndarray:
    """(slices, SIZE, SIZE) float16: a lopsided, structured brain within 0, whose axes and sides can be told apart."""
    z, y, x = np.meshgrid(np.linspace(-1, 1, slices), *[np.linspace(-1, 1, SIZE)] * 2, indexing="ij")
    inside = (x / 0.8) ** 2 + (y / 0.9) ** 2 + (0.7 * z) ** 2 < 1
    values = 0.5 + 0.25 * np.sin(5 * x + 3 * z + seed) * np.cos(7 * y + 2 * z) + 0.1 * z
    return np.where(inside, values, 0).astype(np.float16)


def make_scan(stack: np.ndarray | None = None, **record) -> OpenScan:
    """A scan of 4 x 4 x 3 mm in memory."""
    stack = make_stack() if stack is None else stack
    told = {
        "slices": list(range(20, 20 + len(stack))),
        "spacing_mm": [4.0, 4.0, 3.0],
        "pixel_mm": PIXEL_MM,
        "skull_off": True,
    }
    return OpenScan("a_T1w", "abnormal", stack, None, told | record)


def write_model(path: Path, calibration: dict | None = None, **changes) -> Path:
    """A model.pt with an untrained model."""
    torch.manual_seed(0)
    config = {"model": "dae", "size": SIZE, "width": 8, "depth": 2}
    content = {
        "config": config,
        "weights": build_model(config).state_dict(),
        "slices": SETTINGS,
        "calibration": calibration or make_calibration(),
        "seen": [],
        "precision": "fp32",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, {key: value for key, value in (content | changes).items() if value is not None})
    return path


def make_predictor(folder: Path, calibration: dict | None = None, **changes) -> Examiner:
    """A predictor with an untrained model and a calibration made by hand."""
    return Examiner(write_model(folder / "model.pt", calibration, **changes), torch.device("cpu"), 4)


def write_untrained_run(folder: Path, processed: Path) -> Path:
    """A run folder with an untrained model, calibrated on the validation scans of a slice store."""
    scans = list(list_scans(processed / "val"))
    settings = check_same_settings(scans)
    seen = sorted(scan.source_hash for split in ("train", "val") for scan in list_scans(processed / split))
    model, _ = load_model(write_model(folder / "model.pt"))
    compared = []
    for scan in scans:
        spacing_mm = scan.record["spacing_mm"][2], scan.record["pixel_mm"]
        stack = scan.read_stack()
        compared.append((stack, reconstruct(model, stack, spacing_mm[0]), spacing_mm))
    write_model(folder / "model.pt", calibrate(compared), slices=settings, seen=seen)
    return folder
