"""Takes a trained model to another scanner: a few steps of training on its scans, then a calibration on them."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import trange

from models.autoencoder import MODELS
from models.calibration import Calibration
from preprocessing.store import StoredScan
from training.dataset import SliceDataset
from training.trainer import Trainer

STEPS = 900
BATCH_SIZE = 16
PEAK_LEARNING_RATE = 3e-4  # a third of that of a training: what the model knows is to stay


def adapt(
    content: dict,
    scans: list[StoredScan],
    steps: int,
    device: torch.device,
    *,
    robust: bool = False,
    quiet: bool = False,
) -> dict:
    """The content of a model.pt with weights that were trained on these scans, and calibrated on them.

    steps   of the optimiser; with 0 the weights stay as they are
    robust  see `Calibration.fit`
    """
    config = {
        "network": content["config"], "precision": content["precision"],
        "steps": steps, "batch_size": BATCH_SIZE, "lr": PEAK_LEARNING_RATE, "seed": 0,
    }  # fmt: skip
    slices = SliceDataset(scans, True, device, MODELS[content["config"]["model"]].neighbour_offsets)
    trainer = Trainer(config, slices, slices, Path(), quiet)
    trainer.model.load_state_dict(content["weights"])
    trainer.model.train()
    batches = trainer.read_batches()
    for _ in trange(steps, desc="adapting", unit="step", disable=quiet or None):
        trainer.train_step(next(batches))
    trainer.model.eval()
    calibration = Calibration.fit(trainer.compare_validation(), robust)
    seen = {*content["seen"], *(one for scan in scans for one in scan.hashes)}
    new = {"weights": trainer.model.state_dict(), "calibration": calibration.to_state(), "seen": sorted(seen)}
    return content | new
