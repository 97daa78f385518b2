"""The script: normal slices only, subjects apart, and an interrupted run ends with the bytes of an undisturbed one."""

import csv
import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch

import training.train as training
import training.trainer as trainer
from common.cli import DataError
from models.checkpoint import load_checkpoint, load_model, save_checkpoint
from preprocessing.store import list_scans
from preprocessing.subjects import key_subject
from tests.conftest import TINY
from tests.test_scripts import PROJECT, run_script
from training.run import find_training_scans
from training.trainer import Trainer


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

    def interrupt(trainer, *pair):
        if trainer.step == 6:
            signal.raise_signal(signal.SIGINT)  # in the middle of a step, which is ended first
        return train_step(trainer, *pair)

    monkeypatch.setattr(Trainer, "train_step", interrupt)
    with pytest.raises(SystemExit) as stop:
        training.main(command)
    assert stop.value.code == 130
    assert "stopped at step 7 of 12; run the same command again to resume" in capsys.readouterr().err
    assert not (tmp_path / "run/model.pt").exists()
    monkeypatch.setattr(Trainer, "train_step", train_step)
    assert training.main(command) == 0
    assert "resuming at step 7" in capsys.readouterr().out
    assert (tmp_path / "run/model.pt").read_bytes() == (run / "model.pt").read_bytes()
    for a, b in zip(*(csv.DictReader((r / "log.csv").open()) for r in (run, tmp_path / "run")), strict=True):
        assert a | {"slices_per_s": 0} == b | {"slices_per_s": 0}


def test_from_disk_equals_in_memory(processed, run, tmp_path):
    command = ["--data", str(processed), "--run", str(tmp_path / "run"), *TINY]
    assert training.main([*command, "--no-in-memory"]) == 0
    assert (tmp_path / "run/model.pt").read_bytes() == (run / "model.pt").read_bytes()


def test_a_resumed_run_keeps_its_precision(processed, tmp_path, monkeypatch, capsys):
    command = ["--data", str(processed), "--run", str(tmp_path / "run"), *TINY, "--precision", "auto"]
    for measured, line in (("bf16", "bf16 on cpu: it is"), ("fp32", "bf16 on cpu: as this run began")):
        monkeypatch.setattr("training.run.choose_precision", lambda device, measured=measured: (measured, "it is"))
        assert training.main(command) == 0
        assert capsys.readouterr().out.startswith(line)
        (tmp_path / "run/model.pt").unlink()
    assert json.loads((tmp_path / "run/config.json").read_text())["precision"] == "bf16"
    with pytest.raises(DataError, match="precision"):
        training.main([*command, "--precision", "fp32"])


def read_config(run) -> dict:
    return json.loads((run / "config.json").read_text())


def test_a_run_starts_from_another_model_and_knows_what_that_has_seen(processed, run, tmp_path, capsys):
    command = ["--data", str(processed), "--init", str(run), "--steps", "1", "--lr", "1e-9", "--model", "cae"]
    assert training.main([*command, "--run", str(tmp_path / "on")]) == 0
    assert "2 validation scans are known to the model of --init" in capsys.readouterr().err
    before, after = (load_checkpoint(folder / "model.pt") for folder in (run, tmp_path / "on"))
    assert after["config"] == before["config"]
    assert read_config(tmp_path / "on")["optimiser"] == "muon", "that of the model, a dae, not of --model"
    learned = [name for name, values in after["weights"].items() if "running" not in name and "num_batches" not in name]
    for name in learned:
        torch.testing.assert_close(after["weights"][name], before["weights"][name], rtol=1e-3, atol=1e-6)
    (tmp_path / "elsewhere").mkdir()
    save_checkpoint(tmp_path / "elsewhere/model.pt", before | {"seen": ["a scan of another folder"]})
    command[3] = str(tmp_path / "elsewhere")
    assert training.main([*command, "--run", str(tmp_path / "new")]) == 0
    assert "known to the model" not in capsys.readouterr().err
    seen = set(load_checkpoint(tmp_path / "new/model.pt")["seen"])
    assert seen == {"a scan of another folder", *before["seen"]}


@pytest.mark.parametrize(("flags", "optimiser"), [(["--model", "cae"], "adam"), (["--optimiser", "adam"], "adam")])
def test_the_plain_autoencoder_is_trained_by_adam_and_any_model_on_demand(flags, optimiser, processed, tmp_path):
    command = ["--data", str(processed), "--run", str(tmp_path / "run"), "--width", "8", "--steps", "1", *flags]
    assert training.main([*command, "--device", "cpu"]) == 0
    assert read_config(tmp_path / "run")["optimiser"] == optimiser
    assert len(load_checkpoint(tmp_path / "run/last.pt")["optimisers"]) == 1, "Muon would have Adam beside it"


def test_slices_of_another_size_than_the_model_of_init_are_one_line(processed, untrained, tmp_path):
    content = load_checkpoint(untrained / "model.pt")
    content["config"]["size"] = 48
    (tmp_path / "large").mkdir()
    save_checkpoint(tmp_path / "large/model.pt", content)
    with pytest.raises(DataError, match=r"large/model.pt: takes slices of 48 pixels and these have \d+; .* --size 48"):
        training.main(["--data", str(processed), "--run", str(tmp_path / "run"), "--init", str(tmp_path / "large")])


def test_two_processes_train_one_model(processed, tmp_path):
    """Their random numbers differ from those of one process, their batches do not: the losses are close."""
    flags = ["--data", str(processed), *TINY, "--batch-size", "35", "--steps", "5"]
    assert training.main([*flags, "--run", str(tmp_path / "one")]) == 0
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--"]
    result = run_script(*torchrun, PROJECT / "training/train.py", *flags, "--run", tmp_path / "two", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("model in") == 1
    rows = [list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("one", "two")]
    assert load_model(tmp_path / "two/model.pt")[1]["step"] > 0
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for name in ("train_loss", "val_loss"):  # over all five steps: of one step's random numbers a loss depends too much
        one, two = (np.mean([float(row[name]) for row in table]) for table in rows)
        assert two == pytest.approx(one, rel=0.15)


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


def test_abnormal_training_scans_are_refused(processed, tmp_path):
    shutil.copytree(processed, tmp_path / "data")
    scan = next((tmp_path / "data/test/abnormal").iterdir())
    shutil.move(scan, tmp_path / "data/train/abnormal" / scan.name)
    with pytest.raises(DataError, match="is abnormal, but among the training scans"):
        training.main(["--data", str(tmp_path / "data"), "--run", str(tmp_path / "run"), *TINY])
    assert not (tmp_path / "run").exists()


def test_split_by_subject(processed, tmp_path):
    shutil.copytree(processed / "train", tmp_path / "data/train")
    scans = list(list_scans(tmp_path / "data/train"))
    twin = tmp_path / "data/train/normal/twin_T1w"  # a second session of the first subject, spelled otherwise
    shutil.copytree(scans[0].folder, twin)
    record = scans[0].record | {"subject": scans[0].subject.upper().replace("-", "_0")}
    (twin / "scan.json").write_text(json.dumps(record))
    for seed in range(6):
        train, validation = find_training_scans([tmp_path / "data"], 0.4, seed)
        assert train
        assert validation
        assert len(train) + len(validation) == 4
        assert not {key_subject(s.subject) for s in train} & {key_subject(s.subject) for s in validation}
        assert ({twin} <= {s.folder for s in train}) == ({scans[0].folder} <= {s.folder for s in train})


@pytest.mark.parametrize(("fraction", "held_out"), [(0.1, 1), (0.34, 1), (0.5, 2), (0.95, 2)])
def test_the_share_set_aside_is_one_of_subjects(processed, tmp_path, fraction, held_out):
    shutil.copytree(processed / "train", tmp_path / "data/train")
    train, validation = find_training_scans([tmp_path / "data"], fraction, 0)
    assert (len(train), len(validation)) == (3 - held_out, held_out)
    chosen = {find_training_scans([tmp_path / "data"], fraction, seed)[1][0].subject for seed in range(6)}
    assert len(chosen) > 1, "the seed draws them"


def test_the_validation_scans_of_the_store_are_taken_whole(processed):
    train, validation = find_training_scans([processed], 0.9, 0)
    assert [scan.folder for scan in train] == sorted((processed / "train/normal").iterdir())
    assert [scan.folder for scan in validation] == sorted((processed / "val/normal").iterdir())


def test_one_subject_is_not_enough(processed, tmp_path):
    scan = next(list_scans(processed / "train"))
    for name in ("one", "two"):
        shutil.copytree(scan.folder, tmp_path / "data/train/normal" / name)
    with pytest.raises(DataError, match="only one subject"):
        find_training_scans([tmp_path / "data"], 0.4, 0)


@pytest.mark.parametrize("split", ["val/normal", "test/normal", "test/abnormal"])
def test_a_subject_on_two_sides_is_refused(processed, tmp_path, split):
    shutil.copytree(processed, tmp_path / "data")
    scan = next(list_scans(processed / "train"))
    shutil.copytree(scan.folder, tmp_path / "data" / split / "another_session")
    with pytest.raises(DataError, match=f"subject {scan.subject} is in"):
        training.main(["--data", str(tmp_path / "data"), "--run", str(tmp_path / "run"), *TINY])


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_copy_on_two_sides_is_refused_with_both_names(processed, tmp_path, split):
    """Under another subject and another file, its voxels alone tell."""
    shutil.copytree(processed, tmp_path / "data")
    scan = next(list_scans(tmp_path / "data/train"))
    copy = tmp_path / f"data/{split}/normal/copy"
    shutil.copytree(scan.folder, copy)
    changes = {"subject": "nobody", "source": "/else/copy.nii", "sources": {"copy.nii": "f" * 64}}
    (copy / "scan.json").write_text(json.dumps(scan.record | changes))
    with pytest.raises(DataError, match="holds the same scan as") as error:
        find_training_scans([tmp_path / "data"], 0.1, 0)
    assert str(copy) in str(error.value)
    assert str(scan.folder) in str(error.value)


def test_a_bad_record_takes_only_itself_out_of_training(processed, tmp_path, capsys):
    shutil.copytree(processed, tmp_path / "data")
    scans = list(list_scans(tmp_path / "data/train"))
    (scans[0].folder / "scan.json").write_text("{}")
    train, _ = find_training_scans([tmp_path / "data"], 0.1, 0)
    assert [scan.name for scan in train] == [scan.name for scan in scans[1:]]


@pytest.mark.parametrize("content", [{}, {"config": 3}, {"config": {}}])
def test_a_state_that_is_none_is_one_line(content, processed, tmp_path):
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run/last.pt", content)
    with pytest.raises(
        DataError, match=r"last\.pt: is not the state of a training run|was trained with other settings"
    ):
        training.main(["--data", str(processed), "--run", str(tmp_path / "run"), *TINY])


def test_a_state_without_its_parts_is_one_line(processed, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/model.pt").unlink()
    state = load_checkpoint(tmp_path / "run/last.pt")
    for key, value in (
        ("optimisers", []),
        ("optimisers", [{}, {}]),
        ("model", {"a": 1}),
        ("rows", None),
        ("best", None),
    ):
        broken = state | {key: value} if value is not None else {k: v for k, v in state.items() if k != key}
        save_checkpoint(tmp_path / "run/last.pt", broken)
        with pytest.raises(DataError, match=r"last\.pt: is not the state of a training run; delete it"):
            training.main(["--data", str(processed), "--run", str(tmp_path / "run"), *TINY])


def test_slices_made_otherwise_are_refused(processed, tmp_path):
    shutil.copytree(processed, tmp_path / "data")
    record = next(list_scans(tmp_path / "data/val")).folder / "scan.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"keep": 0.77}))
    with pytest.raises(DataError, match=r"made with keep 0\.77"):
        find_training_scans([tmp_path / "data"], 0.4, 0)


def take_config(monkeypatch, *flags) -> dict:
    """The configuration that these flags give."""
    seen = []
    monkeypatch.setattr("training.run.train", lambda config, *_: seen.append(config))
    assert training.main([*flags, "--device", "cpu"]) == 0
    return seen[0]


def test_defaults(monkeypatch):
    dae, cae = (take_config(monkeypatch, "--model", model) for model in ("dae", "cae"))
    assert dae["network"] == {"model": "dae", "width": 64, "depth": 3}
    assert cae["network"] == {"model": "cae", "width": 32, "latent": 64}
    assert (dae["steps"], cae["steps"]) == (12000, 1500)
    assert take_config(monkeypatch)["network"]["model"] == "dae"
    kept = {"batch_size": 32, "lr": 2e-3, "val_fraction": 0.1, "seed": 0, "precision": "auto", "deterministic": False}
    assert {name: dae[name] for name in kept} == kept
    on = take_config(monkeypatch, "--init", "runs/other")
    assert (on["init"], on["steps"], on["lr"]) == ("runs/other", 2000, 6e-4)
    given = take_config(monkeypatch, "--width", "8", "--steps", "7", "--lr", "0.5", "--depth", "2", "--seed", "4")
    assert given["network"] == {"model": "dae", "width": 8, "depth": 2}
    assert (given["steps"], given["lr"], given["seed"]) == (7, 0.5, 4)


@pytest.mark.parametrize(
    "flags", [["--steps", "0"], ["--lr", "-1"], ["--val-fraction", "0"], ["--val-fraction", "1"], ["--width", "0"]]
)
def test_flags_out_of_range_are_wrong_usage(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        training.main(flags)
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_no_slices_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"preprocess_oasis\.py first"):
        training.main(["--data", str(tmp_path), "--run", str(tmp_path / "run")])


def test_a_loss_that_is_no_number_names_its_step_and_keeps_the_last_good_state(processed, tmp_path, monkeypatch):
    command = ["--data", str(processed), "--run", str(tmp_path / "run"), *TINY, "--steps", "60"]  # rows at 12, 24, …
    train_step = Trainer.train_step

    def break_weights(self, *pair, steps=(29,)):
        if self.step in steps:
            next(self.model.parameters()).data.fill_(math.nan)
        return train_step(self, *pair)

    monkeypatch.setattr(Trainer, "train_step", break_weights)
    with pytest.raises(DataError, match=r"not a number at step 30; last\.pt holds step 24"):
        training.main(command)
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert state["step"] == 24
    assert all(values.isfinite().all() for values in state["model"].values())
    assert not (tmp_path / "run/model.pt").exists()
    monkeypatch.setattr(Trainer, "train_step", lambda self, *pair: break_weights(self, *pair, steps=(0,)))
    with pytest.raises(DataError, match="not a number at step 1; nothing was saved yet"):
        training.main([*command, "--run", str(tmp_path / "other")])


def test_a_long_epoch_is_saved_on_the_way(processed, tmp_path, monkeypatch):
    train_step = Trainer.train_step

    def die(self, *pair):
        if self.step == 22:
            raise RuntimeError("as if killed")
        return train_step(self, *pair)

    monkeypatch.setattr(Trainer, "train_step", die)
    monkeypatch.setattr(trainer, "SAVE_EVERY_S", 0)
    command = ["--data", str(processed), "--run", str(tmp_path / "run"), *TINY, "--steps", "125"]  # rows at 25, 50, …
    with pytest.raises(RuntimeError, match="as if killed"):
        training.main(command)
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 20


def test_weights_that_are_no_numbers_are_not_saved(processed, tmp_path, monkeypatch):
    command = ["--data", str(processed), "--run", str(tmp_path / "run"), *TINY]
    train_step = Trainer.train_step

    def break_weights(self, *pair):
        loss = train_step(self, *pair)
        if self.step == 2:
            next(self.model.parameters()).data.fill_(math.inf)
            signal.raise_signal(signal.SIGTERM)
        return loss

    monkeypatch.setattr(Trainer, "train_step", break_weights)
    with pytest.raises(DataError, match="weights are not numbers after step 2"):
        training.main(command)
    assert not (tmp_path / "run/last.pt").exists()
