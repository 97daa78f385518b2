"""The script that takes a trained model to another scanner: a few steps on its scans, and a calibration on them."""

import shutil

import pytest
import torch

import training.adaptation as adaptation
import training.calibrate as script
from common.cli import DataError
from evaluation.predictor import Predictor
from models.anomaly import reconstruct
from models.calibration import Calibration, compare
from models.checkpoint import build_model, load_checkpoint, load_model, save_checkpoint
from preprocessing.store import list_scans
from tests.test_scripts import PROJECT, run_script
from training.batches import seed_generator
from training.corruption import make_pair
from training.dataset import SliceDataset
from training.trainer import sum_squares


@pytest.fixture(scope="module")
def run(untrained, tmp_path_factory):
    """The untrained model as one that has seen nothing but the training scans' first."""
    folder = tmp_path_factory.mktemp("calibrate") / "run"
    content = load_checkpoint(untrained / "model.pt")
    folder.mkdir()
    save_checkpoint(folder / "model.pt", content | {"seen": ["0" * 32]})
    return folder


def calibrate(run, data, out, *flags, steps=0) -> dict:
    """The content of the new model.pt."""
    command = ["--run", str(run), "--data", str(data), "--out", str(out), "--device", "cpu", *flags]
    command += ["--steps", str(steps)]
    assert script.main(command) == 0
    return load_checkpoint(out / "model.pt")


def fit_by_hand(run, scans, robust: bool) -> dict:
    model, _ = load_model(run / "model.pt")
    compared = []
    for scan in scans:
        stack, sampling_mm = torch.from_numpy(scan.read_stack()).float(), scan.geometry.sampling_mm
        compared.append((stack, reconstruct(model, stack, sampling_mm[0]), sampling_mm))
    return Calibration.fit(compared, robust=robust).to_state()


@pytest.mark.parametrize("unlabelled", [False, True])
def test_the_calibration_is_new_and_nothing_else(run, processed, tmp_path, unlabelled):
    flags = ["--unlabelled"] if unlabelled else []
    before, content = load_checkpoint(run / "model.pt"), calibrate(run, processed / "test", tmp_path / "new", *flags)
    scans = list(list_scans(processed / ("test" if unlabelled else "test/normal")))
    assert len(scans) == (4 if unlabelled else 2)
    for name, values in fit_by_hand(run, scans, robust=unlabelled).items():
        torch.testing.assert_close(content["calibration"][name], values, msg=name)
    assert content["seen"] == sorted(["0" * 32, *(one for scan in scans for one in scan.hashes)])
    for name, values in before["weights"].items():
        assert torch.equal(content["weights"][name], values), name
    same = before.keys() - {"weights", "calibration", "seen"}
    assert content.keys() == before.keys()
    assert {name: content[name] for name in same} == {name: before[name] for name in same}
    predictor = Predictor.load(tmp_path / "new/model.pt", torch.device("cpu"))
    assert predictor.calibration.normal_scans == len(scans)


def measure_loss(content, scans) -> float:
    model = build_model(content["config"]).eval()
    model.load_state_dict(content["weights"])
    clean = SliceDataset(scans, neighbour_offsets=model.neighbour_offsets)[:]
    source, target = make_pair(clean, model.corrupted, seed_generator(torch.device("cpu"), 9))
    with torch.inference_mode():
        squares, pixels = sum_squares(model(source), target)
    return float(squares / pixels)


def test_the_model_is_trained_on_these_scans_before_they_are_measured(run, processed, tmp_path, monkeypatch):
    monkeypatch.setattr(adaptation, "PEAK_LEARNING_RATE", 1e-2)  # the model knows nothing yet
    scans = list(list_scans(processed / "test/normal"))
    before = load_checkpoint(run / "model.pt")
    content = calibrate(run, processed / "test", tmp_path / "new", steps=40)
    assert measure_loss(content, scans) < 0.9 * measure_loss(before, scans)
    again = calibrate(run, processed / "test", tmp_path / "again", steps=40)
    assert all(torch.equal(values, again["weights"][name]) for name, values in content["weights"].items())


def test_no_scan_is_measured_by_a_model_that_was_trained_on_it(run, processed, monkeypatch):
    """Else the scans of the calibration would look more normal than new ones, which would be flagged too often."""
    monkeypatch.setattr(adaptation, "PEAK_LEARNING_RATE", 1e-2)
    cpu, content = torch.device("cpu"), load_checkpoint(run / "model.pt")
    scans = list(list_scans(processed / "train/normal"))[:4]
    alone, compared = {}, []
    for side in (0, 1):  # the subjects of the other side train
        alone[side] = adaptation.adapt(content, scans[1 - side :: 2], 10, cpu, quiet=True)["weights"]
        model = build_model(content["config"]).eval()
        model.load_state_dict(alone[side])
        compared += [
            compare(model, scan.read_stack(), scan.geometry.sampling_mm, 16, torch.float32) for scan in scans[side::2]
        ]
    adapted = adaptation.adapt(content, scans, 10, cpu, quiet=True)["calibration"]
    for name, values in Calibration.fit(compared).to_state().items():
        torch.testing.assert_close(adapted[name], values, rtol=2e-3, atol=1e-5, msg=name)


def test_what_it_prints(run, untrained, processed, tmp_path, capsys):
    calibrate(run, processed / "test", tmp_path / "a", "--unlabelled")
    printed = capsys.readouterr()
    assert "calibrated on 4 scans; model in" in printed.out
    assert "p-values compare a scan with this cohort" in printed.out
    assert "a false-positive rate of 0.05 needs 19 scans" in printed.out
    assert "4 scans are few to calibrate on; give 10 or more" in printed.err
    assert "known to the model" not in printed.err
    calibrate(untrained, processed / "val", tmp_path / "b", "--quiet")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "2 of these scans are known to the model" in printed.err


@pytest.mark.parametrize(
    ("flags", "words"), [([], "holds normal scans of 1 subjects"), (["--unlabelled"], "holds scans of 1 subjects")]
)
def test_one_subject_is_not_enough(run, processed, tmp_path, flags, words):
    first = next(list_scans(processed / "test/normal")).folder
    for visit in ("one", "two"):
        shutil.copytree(first, tmp_path / "data/val/normal" / visit)
    if not flags:
        shutil.copytree(processed / "test/abnormal", tmp_path / "data/test/abnormal")
    with pytest.raises(DataError, match=words):
        calibrate(run, tmp_path / "data", tmp_path / "new", *flags)
    assert not (tmp_path / "new").exists()


def test_a_training_run_is_not_overwritten(run, processed, tmp_path):
    with pytest.raises(DataError, match="holds a training run"):
        calibrate(run, processed / "val", run)
    (tmp_path / "last.pt").touch()
    with pytest.raises(DataError, match="holds a training run"):
        calibrate(run, processed / "val", tmp_path)


@pytest.mark.parametrize("key", ["slices", "seen", "precision"])
def test_a_model_of_another_version_is_refused(run, processed, tmp_path, key):
    content = load_checkpoint(run / "model.pt")
    del content[key]
    save_checkpoint(tmp_path / "model.pt", content)
    with pytest.raises(DataError, match=rf"does not hold a model of this version \({key}\)"):
        calibrate(tmp_path, processed / "val", tmp_path / "new")


def test_slices_made_otherwise_are_refused(run, processed, tmp_path):
    content = load_checkpoint(run / "model.pt")
    save_checkpoint(tmp_path / "model.pt", content | {"slices": content["slices"] | {"keep": 0.77}})
    with pytest.raises(DataError, match=r"but the model's training slices with 0\.77"):
        calibrate(tmp_path, processed / "val", tmp_path / "new")


def test_a_missing_folder_is_one_line(run, tmp_path):
    command = ["--run", run, "--data", "nowhere", "--out", tmp_path / "new"]
    result = run_script(PROJECT / "training/calibrate.py", *command, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "nowhere: no such folder; run preprocessing/preprocess_oasis.py first, or correct --data"
    ]


def test_without_flags_it_trains_three_times_as_measured(run, processed, tmp_path, monkeypatch):
    """300 steps of 32 slices at a peak of 6e-4, the figures of docs/experiments.md, E43; the help says so too."""
    configs, lengths = [], []

    class Noted(adaptation.Trainer):
        def __init__(self, config, *arguments, **options):
            configs.append(config)
            super().__init__(config, *arguments, **options)

    def note(steps, **_):
        lengths.append(steps)
        return range(0)

    monkeypatch.setattr(adaptation, "Trainer", Noted)
    monkeypatch.setattr(adaptation, "trange", note)
    command = ["--run", str(run), "--data", str(processed / "test"), "--out", str(tmp_path / "new"), "--device", "cpu"]
    assert script.main(command) == 0
    settings = {tuple(config[name] for name in ("steps", "batch_size", "lr", "optimiser")) for config in configs}
    assert settings == {(300, 32, 6e-4, "muon")}
    assert lengths == [300] * 3
    assert "left out: 300;" in " ".join(script.make_parser().format_help().split())


def test_a_plain_autoencoder_is_adapted_by_adam_as_it_was_trained(run, processed, monkeypatch):
    names = []

    class Noted(adaptation.Trainer):
        def __init__(self, config, *arguments, **options):
            names.append(config["optimiser"])
            super().__init__(config, *arguments, **options)

    monkeypatch.setattr(adaptation, "Trainer", Noted)
    network = {"model": "cae", "size": load_checkpoint(run / "model.pt")["config"]["size"], "width": 4, "latent": 4}
    content = load_checkpoint(run / "model.pt") | {"config": network, "weights": build_model(network).state_dict()}
    adaptation.adapt(content, list(list_scans(processed / "test")), 1, torch.device("cpu"), quiet=True)
    assert set(names) == {"adam"}
