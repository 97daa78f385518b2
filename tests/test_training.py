"""Training: normal slices only, subjects apart, and an interrupted run ends like an undisturbed one."""

import csv
import io
import json
import math
import shutil
import signal
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import training.train as training
import training.trainer as trainer
from models.checkpoint import load_model
from preprocessing.scans import DataError
from preprocessing.slices import SliceDataset, list_scans
from tests.conftest import TINY
from tests.test_scripts import PROJECT, run_script
from training.train import find_training_scans
from training.trainer import Trainer, choose_precision, pick_batch, pick_groups, schedule_learning_rate


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


def test_interrupted_equals_uninterrupted(processed, run, tmp_path, monkeypatch, capsys):
    command = ["--data", str(processed), "--run", str(tmp_path / "run"), *TINY]
    train_step = Trainer.train_step

    def interrupt(trainer, clean):
        if trainer.step == 6:
            signal.raise_signal(signal.SIGINT)  # in the middle of a step, which is ended first
        return train_step(trainer, clean)

    monkeypatch.setattr(Trainer, "train_step", interrupt)
    with pytest.raises(SystemExit) as stop:
        training.main(command)
    assert stop.value.code == 130
    assert "stopped at step 7 of 12; the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "run/model.pt").exists()
    monkeypatch.setattr(Trainer, "train_step", train_step)
    assert training.main(command) == 0
    assert "going on at step 7" in capsys.readouterr().out
    assert (tmp_path / "run/model.pt").read_bytes() == (run / "model.pt").read_bytes()
    for a, b in zip(*(csv.DictReader((r / "log.csv").open()) for r in (run, tmp_path / "run")), strict=True):
        assert a | {"slices_per_s": 0} == b | {"slices_per_s": 0}


def test_from_disk_equals_in_memory(processed, run, tmp_path):
    command = ["--data", str(processed), "--run", str(tmp_path / "run"), *TINY]
    assert training.main([*command, "--no-in-memory"]) == 0
    assert (tmp_path / "run/model.pt").read_bytes() == (run / "model.pt").read_bytes()


def test_slices_go_to_memory_only_where_they_fit(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=8 * 128**2 * 2))
    assert training.fits_in_memory(4, 128, torch.device("cpu"))[0]
    assert not training.fits_in_memory(5, 128, torch.device("cpu"))[0]


def test_what_is_read_ahead_is_bounded(processed):
    dataset = SliceDataset(list(list_scans(processed / "train")), in_memory=False)
    asked = []
    batches = dataset.in_order(([asked.append(i) or i] for i in range(40)), readers=3)
    for i in range(20):
        assert torch.equal(next(batches)[0], dataset[i])
        assert len(asked) - i <= 4
    batches.close()


def test_reading_ahead_starts_no_threads_of_arithmetic(processed):
    dataset = SliceDataset(list(list_scans(processed / "train")), in_memory=False)
    torch.ones(10**6).add(1)  # now the threads of this one are there
    before = psutil.Process().num_threads()
    places = np.arange(64) % len(dataset)
    for _ in dataset.in_order([places] * 8, readers=2):
        assert psutil.Process().num_threads() <= before + 2


def test_a_resumed_training_keeps_its_precision(processed, tmp_path, monkeypatch, capsys):
    command = ["--data", str(processed), "--run", str(tmp_path / "run"), *TINY, "--precision", "auto"]
    for measured, line in (("bf16", "bf16 on cpu: it is"), ("fp32", "bf16 on cpu: as this training began")):
        monkeypatch.setattr(training, "choose_precision", lambda device, measured=measured: (measured, "it is"))
        assert training.main(command) == 0
        assert capsys.readouterr().out.startswith(line)
        (tmp_path / "run/model.pt").unlink()
    assert json.loads((tmp_path / "run/config.json").read_text())["precision"] == "bf16"
    with pytest.raises(DataError, match="precision"):
        training.main([*command, "--precision", "fp32"])


@pytest.mark.parametrize(("rates", "precision"), [((300, 100), "bf16"), ((110, 100), "fp32"), ((50, 100), "fp32")])
def test_the_clearly_faster_precision_is_chosen(rates, precision, monkeypatch):
    by_type = dict(zip((torch.bfloat16, torch.float32), rates, strict=True))
    monkeypatch.setattr("common.device.measure_convolution", lambda device, kind: by_type[kind])
    assert choose_precision(torch.device("cpu"))[0] == precision


@pytest.mark.parametrize("batch_size", [1, 15, 16, 17, 64, 1000])
def test_every_place_in_a_batch_is_in_one_group(batch_size):
    groups = pick_groups(batch_size)
    assert np.concatenate(groups).tolist() == list(range(batch_size))
    assert len(groups) <= 8
    assert len({len(group) for group in groups[:-1]}) <= 1


def test_two_processes_train_as_one(processed, tmp_path):
    """Batch norm over both, each slice validated once, one model: all shows in the losses."""
    # groups of 16, 16 and 3: the processes cut one in two
    flags = ["--data", str(processed), *TINY, "--batch-size", "35", "--steps", "5"]
    assert training.main([*flags, "--run", str(tmp_path / "one")]) == 0
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--"]
    result = run_script(*torchrun, PROJECT / "training/train.py", *flags, "--run", tmp_path / "two", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("model in") == 1
    rows = [list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("one", "two")]
    assert load_model(tmp_path / "two/model.pt")[1]["step"] > 0
    for one, two in zip(*rows, strict=True):
        for column in ("train_loss", "val_loss"):
            assert float(two[column]) == pytest.approx(float(one[column]), rel=0.02)


def test_second_run_does_nothing_and_other_flags_are_refused(processed, run, capsys):
    before = (run / "model.pt").stat().st_mtime_ns
    assert training.main(["--data", str(processed), "--run", str(run), *TINY]) == 0
    assert "trained already" in capsys.readouterr().out
    assert (run / "model.pt").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="other settings"):
        training.main(["--data", str(processed), "--run", str(run), *TINY, "--seed", "3"])


def test_a_run_is_trained_again_by_its_own_config_in_silence(processed, run, tmp_path, capsys):
    again = tmp_path / "again"
    assert training.main(["--config", str(run / "config.json"), "--run", str(again), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert (again / "model.pt").read_bytes() == (run / "model.pt").read_bytes()


def test_tensorboard_shows_test_blobs_and_losses(run):
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert {"train_loss", "val_loss", "slices_per_s"} <= set(board.Tags()["scalars"])
    pictures = board.Images("reconstructions")
    assert len(pictures) == len(board.Scalars("val_loss"))
    values = plt.imread(io.BytesIO(pictures[-1].encoded_image_string))
    assert values.shape[0] == 4 * 32
    assert values.std() > 0.05, "blank"


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


def test_a_loss_that_is_no_number_names_its_step_and_keeps_the_last_good_state(processed, tmp_path, monkeypatch):
    command = ["--data", str(processed), "--run", str(tmp_path / "run"), *TINY, "--steps", "60"]  # rows at 12, 24, …
    train_step = Trainer.train_step

    def spoil(self, clean, steps=(29,)):
        if self.step in steps:
            next(self.model.parameters()).data.fill_(math.nan)
        return train_step(self, clean)

    monkeypatch.setattr(Trainer, "train_step", spoil)
    with pytest.raises(DataError, match=r"not a number at step 30; last\.pt holds step 24"):
        training.main(command)
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert state["step"] == 24
    assert all(values.isfinite().all() for values in state["model"].values())
    assert not (tmp_path / "run/model.pt").exists()
    monkeypatch.setattr(Trainer, "train_step", lambda self, clean: spoil(self, clean, steps=(0,)))
    with pytest.raises(DataError, match="not a number at step 1; nothing was saved yet"):
        training.main([*command, "--run", str(tmp_path / "other")])


def test_a_long_epoch_is_saved_on_the_way(processed, tmp_path, monkeypatch):
    train_step = Trainer.train_step

    def die(self, clean):
        if self.step == 22:
            raise RuntimeError("as if killed")
        return train_step(self, clean)

    monkeypatch.setattr(Trainer, "train_step", die)
    monkeypatch.setattr(trainer, "SAVE_EVERY_S", 0)
    command = ["--data", str(processed), "--run", str(tmp_path / "run"), *TINY, "--steps", "125"]  # rows at 25, 50, …
    with pytest.raises(RuntimeError, match="as if killed"):
        training.main(command)
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 20


def test_a_burst_of_the_gradient_is_cut(processed, tmp_path, monkeypatch):
    sum_squares, update_weights, norms = trainer.sum_squares, Trainer.update_weights, []

    def update_and_look(self):
        update_weights(self)
        norms.append(torch.stack([values.grad.norm() for values in self.model.parameters()]).norm().item())

    def burst(reconstruction, target):
        squares, pixels = sum_squares(reconstruction, target)
        return 1e6 * squares, pixels

    monkeypatch.setattr(Trainer, "update_weights", update_and_look)
    monkeypatch.setattr(trainer, "sum_squares", burst)
    assert training.main(["--data", str(processed), "--run", str(tmp_path / "run"), *TINY]) == 0
    assert max(norms) == pytest.approx(trainer.LARGEST_GRADIENT, rel=1e-3)


def test_weights_that_are_no_numbers_are_not_saved(processed, tmp_path, monkeypatch):
    command = ["--data", str(processed), "--run", str(tmp_path / "run"), *TINY]
    train_step = Trainer.train_step

    def spoil(self, clean):
        loss = train_step(self, clean)
        if self.step == 2:
            next(self.model.parameters()).data.fill_(math.inf)
            signal.raise_signal(signal.SIGTERM)
        return loss

    monkeypatch.setattr(Trainer, "train_step", spoil)
    with pytest.raises(DataError, match="weights are not numbers after step 2"):
        training.main(command)
    assert not (tmp_path / "run/last.pt").exists()
