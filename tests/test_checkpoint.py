"""Checkpoints: whole or absent, read without running code, enough to build the model again."""

import os
import pickle
import zipfile

import pytest
import torch

from common.cli import DataError
from models.checkpoint import build_model, load_checkpoint, load_model, save_checkpoint

CONFIG = {"model": "dae", "size": 32, "width": 8, "depth": 2}


@pytest.fixture
def content():
    torch.manual_seed(0)
    return {"config": CONFIG, "weights": build_model(CONFIG).state_dict(), "rows": [{"loss": 0.5}]}


class Evil:
    def __reduce__(self):
        return (open, ("evil-was-here", "w"))


def test_a_model_comes_back(tmp_path, content):
    save_checkpoint(tmp_path / "model.pt", content)
    model, read = load_model(tmp_path / "model.pt")
    assert read["rows"] == [{"loss": 0.5}]
    assert read["config"] == CONFIG
    assert not model.training
    assert all(torch.equal(values, content["weights"][name]) for name, values in model.state_dict().items())


def test_the_same_content_gives_the_same_bytes(tmp_path, content):
    for name in ("a.pt", "other.pt"):
        save_checkpoint(tmp_path / name, content)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()


def test_a_checkpoint_comes_to_the_device_asked_for(tmp_path, content):
    save_checkpoint(tmp_path / "model.pt", content)
    assert load_checkpoint(tmp_path / "model.pt")["weights"]["to_slice.0.bias"].device.type == "cpu"
    elsewhere = load_checkpoint(tmp_path / "model.pt", "meta")["weights"]
    assert {values.device.type for values in elsewhere.values()} == {"meta"}


def test_building_leaves_the_config_as_it_is():
    config = dict(CONFIG)
    build_model(config)
    assert config == CONFIG


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.pt: no such checkpoint"):
        load_model(tmp_path / "none.pt")


@pytest.mark.parametrize("fault", ["cut", "pickle", "code", "empty"])
def test_what_is_no_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch, content, fault):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pt"
    save_checkpoint(path, content)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif fault == "pickle":
        path.write_bytes(pickle.dumps(Evil(), protocol=2))
    elif fault == "code":
        torch.save({"config": Evil()}, path)
    else:
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"bad\.pt: cannot be read"):
        load_model(path)
    assert not (tmp_path / "evil-was-here").exists()


OTHERS = {
    "other weights": {"config": CONFIG | {"depth": 3}},
    "unknown model": {"config": CONFIG | {"model": "gan"}},
    "unknown argument": {"config": CONFIG | {"colour": 1}},
    "no model": {"config": {}},
    "no weights": {"weights": {}},
    "huge": {"config": CONFIG | {"width": 10**9}},
    "wide": {"config": CONFIG | {"width": 1 << 14}},
    "deep": {"config": CONFIG | {"depth": 10**9}},
    "negative": {"config": CONFIG | {"width": -8}},
    "words": {"config": CONFIG | {"width": "8"}},
    "a list": {"config": [1, 2]},
    "weights that are none": {"weights": {"stem": 3}},
    "a list of weights": {"weights": [1]},
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS.keys())
def test_a_model_of_another_version_is_refused(tmp_path, content, change):
    save_checkpoint(tmp_path / "old.pt", content | change)
    with pytest.raises(DataError, match=r"old\.pt: does not hold a model"):
        load_model(tmp_path / "old.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["to_slice.0.weight", "down.0.0.1.running_var"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, content, name, value):
    content["weights"][name].view(-1)[0] = value
    save_checkpoint(tmp_path / "model.pt", content)
    with pytest.raises(DataError, match=r"model\.pt: holds weights that are not finite; train again"):
        load_model(tmp_path / "model.pt")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    before = path.read_bytes()

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, {"step": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_compressed_or_special_file_is_no_checkpoint(tmp_path, content):
    """What is compressed may hold a thousand times its size."""
    save_checkpoint(tmp_path / "a.pt", content)
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "b.pt", "w") as packed:
        for part in source.infolist():
            packed.writestr(part.filename, source.read(part), zipfile.ZIP_DEFLATED)
    os.mkfifo(tmp_path / "c.pt")
    torch.save([1, 2], tmp_path / "d.pt")
    for name in ("b.pt", "c.pt", "d.pt"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read as a checkpoint"):
            load_checkpoint(tmp_path / name)
