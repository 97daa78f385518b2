"""Predict one scan of a test set: what each worker runs, on this machine or another."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from common.cli import DataError, explain
from common.device import find_device, keep_freed_memory
from common.files import write_atomically
from evaluation.nifti import write_bids_maps, write_maps
from evaluation.panels import draw_scan
from evaluation.predictor import Predictor
from evaluation.results import ScanResult
from evaluation.viewer import count_bytes, pack_scan
from preprocessing.store import StoredScan

DONE = ".scans"  # folder, in that of the evaluation, of what is kept of each scan until all are predicted


@dataclass(frozen=True)
class PredictSettings:
    """How scans are predicted, and what is left of each.

    model, model_hash  the path of model.pt and its SHA-256
    device             "auto", "cpu" or "cuda", as --device takes it
    options            of `Predictor.load`, as pairs
    out                folder of the evaluation
    maps, bids         whether NIfTI maps are written, plain and as a BIDS derivative of the scans below this folder
    panels             slices drawn of each scan: "worst", "all" or how many
    """

    model: Path
    model_hash: str
    device: str
    options: tuple[tuple[str, float], ...]
    out: Path
    maps: bool
    bids: Path | None
    panels: str


def predict_scan(stored: StoredScan, bids_name: str, settings: PredictSettings) -> str:
    """Predict one scan and leave its maps and pictures, and last what `find_result` finds.

    Returns why it was skipped, "" where it was not.
    """
    out = settings.out
    try:
        prediction = _load_predictor(settings).predict(stored.load())
        if settings.maps:
            write_maps(out / "maps" / stored.label / stored.name, prediction)
        if settings.bids:
            write_bids_maps(out / "bids", bids_name, prediction, settings.bids)
        draw_scan(out, prediction, settings.panels)
        result, viewer = find_result(out, stored)
        write_atomically(viewer, json.dumps(packed := pack_scan(prediction)).encode())
        ScanResult.of(prediction, count_bytes(packed)).save(result)
    except DataError as error:
        return str(error)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return f"{stored.folder}: {explain(error)}"
    return ""


def find_result(out: Path, stored: StoredScan) -> tuple[Path, Path]:
    """The files with what is kept of a scan: its `ScanResult`, and its packed viewer."""
    folder = out / DONE / stored.label
    return folder / f"{stored.name}.json", folder / f"{stored.name}.viewer"


@lru_cache(maxsize=1)
def _load_predictor(settings: PredictSettings) -> Predictor:
    keep_freed_memory()
    return Predictor.load(settings.model, find_device(settings.device), **dict(settings.options))
