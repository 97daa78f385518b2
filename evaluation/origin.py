"""Where an evaluation comes from: when it was made, with which code, and what the model was trained on."""

from __future__ import annotations

import contextlib
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

from common.cli import DataError, read_commit
from common.files import read_json

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "nibabel")


def describe_origin(run: Path) -> dict:
    """{"date", "commit", "versions", "training"}: what is not known is None.

    training  {"data", "train_subjects", "val_subjects", "steps"} as the run's config.json has them
    """
    return {
        "date": date.today().isoformat(),  # no time of day: the same evaluation gives the same bytes
        "commit": read_commit() or None,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "training": read_training(run / "config.json"),
    }


def read_training(path: Path) -> dict | None:
    """What a config.json says of its training set; None where there is no such file, as beside a copied model."""
    with contextlib.suppress(FileNotFoundError, DataError, KeyError, TypeError, AttributeError):
        config = read_json(path, "")
        data = config["flags"]["data"]
        return {
            "data": [str(folder) for folder in (data if isinstance(data, list) else [data])],
            "train_subjects": len(config["train_subjects"]),
            "val_subjects": len(config["val_subjects"]),
            "steps": int(config["steps"]),
        }
    return None
