"""Training on several scanners: a folder of the store for each, whose subjects are told apart."""

import json
import shutil
from pathlib import Path

import pytest

import training.train as training
from common.cli import DataError
from models.checkpoint import load_model
from preprocessing.store import StoredScan, list_scans
from tests.conftest import TINY
from training.run import find_training_scans
from training.trainer import Trainer


def make_other(processed: Path, folder: Path) -> Path:
    """Another scanner's store: the same names of subjects, other scans by their hashes."""
    for split in ("train", "val", "test"):
        shutil.copytree(processed / split, folder / split)
    for number, scan in enumerate(list_scans(folder)):
        change(
            scan, content=f"{number:032x}", source="/other/a.nii", sources={"a.nii": f"{number + 100:032x}" + 32 * "0"}
        )
    return folder


def change(scan: StoredScan, **changes) -> None:
    (scan.folder / "scan.json").write_text(json.dumps(scan.record | changes))


@pytest.fixture
def other(processed, tmp_path) -> Path:
    return make_other(processed, tmp_path / "other")


def test_a_run_on_two_folders(processed, other, tmp_path):
    run = tmp_path / "run"
    assert training.main(["--data", str(processed), str(other), "--run", str(run), *TINY, "--steps", "2"]) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["data"] == f"{processed} {other}"
    assert config["flags"]["data"] == [str(processed), str(other)]
    for split, count in (("train", 3), ("val", 2)):
        names = {scan.subject for scan in list_scans(processed / split)}
        assert len(names) == count
        assert config[f"{split}_subjects"] == sorted(f"{data}/{name}" for data in (processed, other) for name in names)
    _, content = load_model(run / "model.pt")
    scans = [scan for data in (processed, other) for split in ("train", "val") for scan in list_scans(data / split)]
    assert content["seen"] == sorted(one for scan in scans for one in scan.hashes)
    assert len(content["calibration"]["scan_scores"]) == 4


def test_one_folder_is_recorded_as_ever(processed, run):
    config = json.loads((run / "config.json").read_text())
    assert config["data"] == str(processed)
    assert config["train_subjects"] == sorted(scan.subject for scan in list_scans(processed / "train"))


def test_the_slices_of_each_folder_are_counted(processed, other, tmp_path, monkeypatch):
    shutil.rmtree(next(list_scans(other / "train")).folder)
    counts = []
    monkeypatch.setattr(Trainer, "fit", lambda self: counts.append(self.train.slices_by_scanner))
    monkeypatch.setattr(Trainer, "finish", lambda self: self.best.update(step=0))
    flags = ["--data", str(processed), str(other), "--run", str(tmp_path / "run"), *TINY]
    assert training.main(flags) == 0
    expected = [sum(len(scan.indices) for scan in list_scans(data / "train")) for data in (processed, other)]
    assert counts == [tuple(expected)]
    assert expected[0] > expected[1]


def test_one_name_in_two_folders_is_two_subjects(processed, other):
    """Those who are trained on in one folder may validate in another."""
    shutil.move(other / "train/normal", other / "normal")
    shutil.move(other / "val/normal", other / "train/normal")
    shutil.move(other / "normal", other / "val/normal")
    train, validation = find_training_scans([processed, other], 0.1, 0)
    assert (len(train), len(validation)) == (5, 5)
    assert {scan.subject for scan in train} & {scan.subject for scan in validation}


@pytest.mark.parametrize("split", ["val", "test"])
def test_one_scan_in_two_folders_on_two_sides_is_refused(processed, other, split):
    scan, copy = next(list_scans(processed / "train")), next(list_scans(other / split / "normal"))
    change(copy, content=scan.record["content"])
    with pytest.raises(DataError, match="holds the same scan as") as error:
        find_training_scans([processed, other], 0.1, 0)
    assert str(copy.folder) in str(error.value)
    assert str(scan.folder) in str(error.value)


def test_folders_made_otherwise_are_refused(processed, other):
    for scan in list_scans(other):
        change(scan, keep=0.77)
    with pytest.raises(DataError, match=r"made with keep 0\.77"):
        find_training_scans([processed, other], 0.1, 0)
