"""Checkpoints: written whole or not at all, read without running code, and enough to build the model again."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import torch
from torch import nn

from common.cli import DataError
from common.files import open_regular, write_atomically
from models.autoencoder import MODELS

PRETRAINED = Path(__file__).resolve().parent / "pretrained"  # the run folder of the model that ships
LARGEST, DEEPEST = 1 << 14, 10  # numbers in a config, levels


def save_checkpoint(path: Path, content: dict) -> None:
    """Save tensors, numbers, strings, lists and dicts; the same content gives the same bytes."""
    buffer = io.BytesIO()  # given a path, torch would write its name into the file
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> dict:
    """Read what `save_checkpoint` wrote. Raises DataError if it is missing, broken or would run code."""
    try:
        with open_regular(path) as file:
            if zipfile.is_zipfile(file) and any(part.compress_type for part in zipfile.ZipFile(file).infolist()):
                raise ValueError("it is compressed, which torch never does and which may fill the memory")
            file.seek(0)
            content = torch.load(file, map_location=device, weights_only=True)
        if not isinstance(content, dict):
            raise ValueError("it holds no record")
        return content
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
        with torch.device("meta"):  # takes no memory: a config may ask for any size
            wanted = build_model(_check_config(content["config"])).state_dict()
        if {name: values.shape for name, values in wanted.items()} != {
            name: values.shape for name, values in content["weights"].items()
        }:
            raise ValueError("the weights are not those of the model")
        model = build_model(content["config"])
        model.load_state_dict(content["weights"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DataError(f"{path}: does not hold a model of this version; train again") from error
    if not all(values.isfinite().all() for values in model.state_dict().values()):
        raise DataError(f"{path}: holds weights that are not finite; train again")
    return model.to(device).eval(), content


def _check_config(config: dict) -> dict:
    """The config, if it describes a network; else ValueError."""
    numbers = [value for name, value in config.items() if name != "model"]
    if not all(type(number) is int and 0 < number <= LARGEST for number in numbers) or config.get("depth", 1) > DEEPEST:
        raise ValueError("the config does not describe a network")
    return config
