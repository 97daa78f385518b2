"""Training: normal slices only, subjects apart, and an interrupted run ends like an undisturbed one."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch

import training.train as training
from models.checkpoint import load_model
from preprocessing.scans import DataError
from preprocessing.slices import list_scans
from tests.conftest import TINY
from training.train import find_training_scans, pick_batch, schedule_learning_rate


def test_a_run_is_complete(run):
    for name in ("config.json", "log.csv", "curves.png", "reconstructions.png", "last.pt", "model.pt"):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").glob("events*"))
    config = json.loads((run / "config.json").read_text())
    assert config["steps"] == 12
    assert not set(config["train_subjects"]) & set(config["val_subjects"])
    rows = list(csv.DictReader((run / "log.csv").open()))
    assert int(rows[-1]["step"]) == 12
    _, content = load_model(run / "model.pt")
    assert content["val_loss"] == min(row["val_loss"] for row in torch.load(run / "last.pt")["rows"])


def test_interrupted_equals_uninterrupted(processed, run, tmp_path, monkeypatch):
    command = ["--data", str(processed), "--run", str(tmp_path / "run"), *TINY]
    steps = training.Trainer.train_step

    def interrupt(trainer):
        if trainer.step == 7:
            raise KeyboardInterrupt
        return steps(trainer)

    monkeypatch.setattr(training.Trainer, "train_step", interrupt)
    with pytest.raises(SystemExit, match="step 7 of 12"):
        training.main(command)
    assert not (tmp_path / "run/model.pt").exists()
    monkeypatch.setattr(training.Trainer, "train_step", steps)
    assert training.main(command) == 0
    assert (tmp_path / "run/model.pt").read_bytes() == (run / "model.pt").read_bytes()


def test_second_run_does_nothing_and_other_flags_are_refused(processed, run, capsys):
    before = (run / "model.pt").stat().st_mtime_ns
    assert training.main(["--data", str(processed), "--run", str(run), *TINY]) == 0
    assert "trained already" in capsys.readouterr().out
    assert (run / "model.pt").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="other settings"):
        training.main(["--data", str(processed), "--run", str(run), *TINY, "--seed", "3"])


def test_loss_falls(processed, tmp_path):
    for model in ("cae", "dae"):
        command = ["--data", str(processed), "--run", str(tmp_path / model), "--model", model, *TINY, "--steps", "60"]
        assert training.main(command) == 0
        rows = list(csv.DictReader((tmp_path / model / "log.csv").open()))
        assert float(rows[-1]["train_loss"]) < 0.7 * float(rows[0]["train_loss"]), model


def test_abnormal_training_scans_are_refused(processed, tmp_path):
    shutil.copytree(processed, tmp_path / "data")
    scan = next((tmp_path / "data/test/abnormal").iterdir())
    shutil.move(scan, tmp_path / "data/train/abnormal" / scan.name)
    with pytest.raises(DataError, match="an abnormal scan among the training scans"):
        training.main(["--data", str(tmp_path / "data"), "--run", str(tmp_path / "run"), *TINY])
    assert not (tmp_path / "run").exists()


def test_split_by_subject(processed, tmp_path):
    shutil.copytree(processed / "train", tmp_path / "data/train")
    scans = list(list_scans(tmp_path / "data/train"))
    twin = tmp_path / "data/train/normal/twin_T1w"  # a second session of the first subject
    shutil.copytree(scans[0].folder, twin)
    for seed in range(6):
        train, validation = find_training_scans(tmp_path / "data", 0.4, seed)
        assert train
        assert validation
        assert len(train) + len(validation) == 4
        assert not {s.subject for s in train} & {s.subject for s in validation}


def test_no_slices_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"preprocess_oasis\.py first"):
        training.main(["--data", str(tmp_path), "--run", str(tmp_path / "run")])


def test_each_turn_visits_every_slice_once():
    seen = np.concatenate([pick_batch(step, 5, 10, seed=3) for step in range(4)])
    assert sorted(seen[:10]) == list(range(10))
    assert sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
    np.testing.assert_array_equal(pick_batch(3, 5, 10, seed=3), seen[15:])


def test_learning_rate_rises_then_falls_to_zero():
    rates = [schedule_learning_rate(step, 1000, 1e-3) for step in range(1000)]
    assert max(rates) == pytest.approx(1e-3)
    assert np.argmax(rates) == 39
    assert rates[0] < 1e-4
    assert rates[-1] < 1e-7
    assert (np.diff(rates[40:]) <= 0).all()


def test_a_loss_that_is_no_number_stops_the_training(processed, tmp_path, monkeypatch):
    monkeypatch.setattr(
        training.Trainer, "train_step", lambda trainer: setattr(trainer, "step", trainer.step + 1) or math.nan
    )
    with pytest.raises(DataError, match="no longer a number at step"):
        training.main(["--data", str(processed), "--run", str(tmp_path / "run"), *TINY])
    assert not (tmp_path / "run/model.pt").exists()
