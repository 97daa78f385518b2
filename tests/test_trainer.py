"""One training step, validation, the best weights and what model.pt holds: against values worked by hand."""

import copy
import csv
import math

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from models.anomaly import reconstruct
from models.autoencoder import MODELS
from models.calibration import Calibration
from models.checkpoint import load_model
from preprocessing.store import check_same_settings, list_scans
from training.batches import pick_batch, schedule_learning_rate, seed_generator
from training.corruption import corrupt, make_pair
from training.dataset import SliceDataset
from training.optimiser import OPTIMISERS
from training.trainer import Trainer, sum_squares

CPU = torch.device("cpu")
NETWORKS = {
    "dae": {"model": "dae", "size": 32, "width": 8, "depth": 3},
    "cae": {"model": "cae", "size": 32, "width": 8, "latent": 4},
}


def make_trainer(processed, model="dae", run=None, **changes) -> Trainer:
    config = {"network": NETWORKS[model], "precision": "fp32", "seed": 0, "batch_size": 5, "steps": 15, "lr": 1e-3}
    config["optimiser"] = OPTIMISERS[model]
    offsets = MODELS[model].neighbour_offsets
    datasets = [SliceDataset(list(list_scans(processed / split)), True, CPU, offsets) for split in ("train", "val")]
    return Trainer(config | changes, *datasets, run, quiet=True)


def calibrate_by_hand(path, scans) -> dict:
    """The calibration of a run's model.pt on these scans, as it would be kept there."""
    model, _ = load_model(path)
    compared = []
    for scan in scans:
        stack, geometry = torch.from_numpy(scan.read_stack()).float(), scan.geometry
        reconstruction = reconstruct(model, stack, geometry.slice_spacing_mm)
        compared.append((stack, reconstruction, (geometry.slice_spacing_mm, geometry.pixel_mm)))
    return Calibration.fit(compared).to_state()


def mean_square_in_brain(output, target) -> float:
    return ((output - target)[target > 0] ** 2).double().mean().item()


def test_the_loss_is_summed_over_the_brain():
    target = torch.tensor([[0.0, 0.5], [1.0, 0.0]])[None, None]
    reconstruction = torch.tensor([[9.0, 0.2], [1.2, -3.0]])[None, None]
    squares, pixels = sum_squares(reconstruction, target)
    assert squares.item() == pytest.approx(0.09 + 0.04)
    assert pixels.item() == 2
    squares, pixels = sum_squares(reconstruction, torch.zeros_like(target))
    assert (squares / pixels).item() == 0


class NoteWaits(TorchFunctionMode):
    """Notes what would make a GPU's program wait until all before it is done: values or sizes that Python needs."""

    WAITS = ("item", "tolist", "numpy", "cpu", "nonzero", "__float__", "__int__", "__bool__", "__index__", "__array__")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function.__name__ in self.WAITS:
            self.found.append(function.__name__)
        return function(*arguments, **(options or {}))


def test_a_step_never_waits_for_the_device(processed):
    trainer = make_trainer(processed)
    pairs = trainer.read_pairs()
    next(pairs)  # tables that the corruption keeps are made once
    with NoteWaits() as waits:
        trainer.unread_losses.append(trainer.train_step(*next(pairs)))
        assert waits.found == []
        trainer.read_losses()
        assert waits.found == ["tolist"]


@pytest.mark.parametrize("model", ["dae", "cae"])
def test_a_step_by_hand(processed, model, monkeypatch):
    """The mean square in the brain of what the weights before the step make of this step's own corruption."""
    monkeypatch.setattr("training.trainer.LARGEST_GRADIENT", 1e9)
    trainer = make_trainer(processed, model, steps=1000, lr=2e-3, seed=5)
    trainer.step = 7
    before = copy.deepcopy(trainer.model).train()
    clean = trainer.train[pick_batch(7, 5, [len(trainer.train)], 5)]
    source, target = make_pair(clean, model == "dae", seed_generator(CPU, 5, 7))
    pair = next(trainer.read_pairs())
    assert torch.equal(pair[0], source)
    assert torch.equal(pair[1], target)
    loss = trainer.train_step(*pair)
    by_hand = ((before(source) - target)[target > 0] ** 2).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-4)
    by_hand.backward()
    for name, parameter in before.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name).grad, parameter.grad, rtol=1e-2, atol=1e-6)
    assert trainer.step == 8
    rate = schedule_learning_rate(7, 1000, 2e-3)
    assert rate == pytest.approx(2e-3 * 8 / 40)
    for new, old in zip(trainer.model.parameters(), before.parameters(), strict=True):
        moved = (new - old).abs()
        if new.ndim == 1 or model == "cae":
            assert moved.max().item() == pytest.approx(rate, rel=0.01), "Adam's first step is as long as the rate"
        else:
            length = moved.square().mean().sqrt().item() / rate
            assert 0.02 < length < 0.25, "Muon's is a fifth, and less for a gradient of few directions"


def test_gradients_of_steps_do_not_add_up(processed, monkeypatch):
    monkeypatch.setattr("training.trainer.LARGEST_GRADIENT", 1e9)  # a sum that is cut looks like a single gradient
    trainer = make_trainer(processed, "cae", lr=0.0)
    pair = next(trainer.read_pairs())
    norms = []
    for _ in range(2):
        trainer.train_step(*pair)
        norms.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(norms[0], norms[1])


@pytest.mark.parametrize(("length", "cut"), [(20.0, 0.1), (0.11, 0.1), (0.09, 0.09)])
def test_a_burst_of_the_gradient_is_cut_to_a_tenth(processed, length, cut):
    trainer = make_trainer(processed)
    parameters = list(trainer.model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    count = sum(parameter.numel() for parameter in parameters)
    for parameter in parameters:
        parameter.grad *= length / math.sqrt(count)
    trainer.update_weights()
    norm = torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()
    assert norm.item() == pytest.approx(cut, rel=1e-3)


def test_adam_is_as_pytorch_has_it(processed):
    _, adam = make_trainer(processed, lr=3e-4).optimisers
    group = adam.param_groups[0]
    assert group["lr"].item() == pytest.approx(3e-4)
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0)


def test_precision_is_that_of_the_configuration(processed):
    for precision, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        assert make_trainer(processed, precision=precision).optimisers[0].precision == kind
        seen = []

        def network(slices, seen=seen):
            product = slices.flatten(1) @ slices.flatten(1).T
            seen.append(product.dtype)
            return product

        assert (
            make_trainer(processed, precision=precision).forward(network, torch.rand(2, 3, 8, 8)).dtype == torch.float32
        )
        assert seen == [kind]


@pytest.mark.parametrize("model", ["dae", "cae"])
def test_validation_by_hand_and_the_same_each_time(processed, model):
    """Each slice counts the same, varied and corrupted by its place alone, in evaluation mode."""
    trainer = make_trainer(processed, model)
    network = copy.deepcopy(trainer.model).eval()
    total, count = 0.0, len(trainer.validation)
    with torch.inference_mode():
        for start in range(0, count, 5):
            clean = trainer.validation[start : min(start + 5, count)]
            source, target = make_pair(clean, model == "dae", seed_generator(CPU, 0, start))
            total += mean_square_in_brain(network(source), target) * len(clean)
    first = trainer.validate()
    assert first == pytest.approx(total / count, rel=1e-4)
    assert trainer.model.training, "training goes on after it"
    trainer.step = 11
    assert trainer.validate() == first
    other = make_trainer(processed, model, seed=3)
    other.model.load_state_dict(trainer.model.state_dict())
    assert other.validate() == first


def test_validation_takes_slices_evenly_and_reads_them_once(processed, monkeypatch):
    monkeypatch.setattr("training.trainer.VALIDATED", 7)
    trainer, read = make_trainer(processed, "cae"), []

    def read_batches(batches):
        for places in batches:
            read.append(list(places))
            yield trainer.validation[places]

    monkeypatch.setattr(trainer.validation, "read_batches", read_batches)
    assert trainer.validate() == trainer.validate()
    assert [len(places) for places in read] == [5, 2]
    last = len(trainer.validation) - 1
    assert last > 20
    assert [place for places in read for place in places] == [round(last * number / 6) for number in range(7)]


def train_with_losses(trainer, losses, monkeypatch):
    """Fit with a step that writes its number into a bias and has it as its loss, and these validation losses."""

    def step(*pair):
        trainer.step += 1
        trainer.model.to_slice[0].bias.data.fill_(trainer.step / 10)
        return torch.tensor(float(trainer.step))

    losses = iter(losses)
    monkeypatch.setattr(trainer, "train_step", step)
    monkeypatch.setattr(trainer, "validate", lambda: next(losses))
    trainer.run.mkdir()
    trainer.fit()
    (trainer.run / "log.csv").unlink()  # as if it was killed between last.pt and its log
    trainer.finish()


def test_the_best_weights_are_kept_and_calibrated_on_the_validation_scans(processed, tmp_path, monkeypatch):
    """Epochs of three steps, the last of two, with validation losses 3, 1, 2, 1, 5: step 6 has the best weights."""
    run = tmp_path / "run"
    trainer = make_trainer(processed, run=run, steps=14)
    train_with_losses(trainer, [3.0, 1.0, 2.0, 1.0, 5.0], monkeypatch)
    rows = list(csv.DictReader((run / "log.csv").open()))
    assert [float(row["val_loss"]) for row in rows] == [3, 1, 2, 1, 5]
    assert [float(row["train_loss"]) for row in rows] == [2, 5, 8, 11, 13.5], "means over the epoch's steps"
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5]
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12, 14]
    model, content = load_model(run / "model.pt")
    assert model.to_slice[0].bias.tolist() == pytest.approx([0.6] * 16)
    assert (content["step"], content["val_loss"]) == (6, 1.0)
    last = torch.load(run / "last.pt", weights_only=True)
    assert last["step"] == 14
    assert (last["best"]["step"], last["best"]["val_loss"]) == (6, 1.0), "a resumed run goes on with it"
    assert last["best"]["weights"]["to_slice.0.bias"].tolist() == pytest.approx([0.6] * 16)
    assert last["model"]["to_slice.0.bias"].tolist() == pytest.approx([1.4] * 16)
    scans = [list(list_scans(processed / split)) for split in ("val", "train")]
    expected = calibrate_by_hand(run / "model.pt", scans[0])
    assert content["calibration"].keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(content["calibration"][name], values, msg=name)
    assert content["seen"] == sorted(one for part in scans for scan in part for one in scan.hashes)
    assert len(content["seen"]) == 2 * 5, "by voxels and by file"
    assert content["slices"] == check_same_settings(scans[0])
    assert content["precision"] == "fp32"
    assert content["config"] == NETWORKS["dae"]


def test_what_a_run_shows_of_its_model(processed):
    trainer = make_trainer(processed)
    shown = trainer.show_reconstructions(4)
    places = np.linspace(0, len(trainer.validation) - 1, 4).astype(int)
    healthy = trainer.validation[places]
    blobs = corrupt(healthy, seed_generator(CPU, 0, 0))
    np.testing.assert_array_equal(shown["healthy slice"], healthy[:, 1])
    np.testing.assert_array_equal(shown["corrupted"], blobs[:, 1])
    with torch.inference_mode():
        drawn = copy.deepcopy(trainer.model).eval()(blobs)[:, 0]
    np.testing.assert_allclose(shown["reconstruction"], torch.where(healthy[:, 1] > 0, drawn, 0), atol=1e-5)
    assert shown["error x 4"].shape == (4, 32, 32)
    assert shown["error x 4"].min() >= 0
    assert trainer.model.training
