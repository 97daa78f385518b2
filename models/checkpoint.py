"""Checkpoints: written whole or not at all, read without running code, and enough to build the model again."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import nn

from common.cli import DataError
from common.files import write_atomically
from models.autoencoder import MODELS


def save_checkpoint(path: Path, content: dict) -> None:
    """Save tensors, numbers, strings, lists and dicts; the same content gives the same bytes."""
    buffer = io.BytesIO()  # straight to a path, torch would write the path's name into the file
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> dict:
    """Read what `save_checkpoint` wrote. Raises DataError if it is missing, broken or would run code."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such checkpoint; train first, or give --run the folder that has it") from error
    except Exception as error:  # torch.load raises whatever its parts raise on a broken file
        raise DataError(f"{path}: cannot be read as a checkpoint of weights; train again") from error


def build_model(config: dict) -> nn.Module:
    """The model that a checkpoint's `config` describes: {"model": name, **the arguments of its class}."""
    arguments = dict(config)
    return MODELS[arguments.pop("model")](**arguments)


def load_model(path: Path, device: str | torch.device = "cpu") -> tuple[nn.Module, dict]:
    """(model in evaluation mode, the checkpoint's whole content) from a run's model.pt."""
    content = load_checkpoint(path, device)
    try:
        model = build_model(content["config"])
        model.load_state_dict(content["weights"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{path}: does not hold a model of this version; train again") from error
    if not all(values.isfinite().all() for values in model.state_dict().values()):
        raise DataError(f"{path}: holds weights that are not finite numbers; train again")
    return model.to(device).eval(), content
