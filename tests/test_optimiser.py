"""Muon against the singular value decomposition, and which numbers each optimiser moves."""

import pytest
import torch
from torch import nn

from models.checkpoint import build_model
from training.optimiser import Muon, make_optimisers, orthogonalise


def draw_matrix(rows, columns, falling) -> torch.Tensor:
    """A matrix whose singular values fall from 1 to 1 / falling."""
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
    return u * torch.logspace(0, -torch.log10(torch.tensor(float(falling))), min(rows, columns)) @ v


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_singular_values_become_about_one_and_their_vectors_stay(shape, scale):
    matrix = draw_matrix(*shape, falling=50)
    made = orthogonalise(matrix * scale)
    assert made.shape == shape
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    along = u.T @ made @ v.T
    torch.testing.assert_close(along, torch.diag(along.diagonal()), atol=1e-3, rtol=0)
    assert (along.diagonal() > 0).all()


def test_no_gradient_moves_nothing():
    assert orthogonalise(torch.zeros(3, 5)).abs().max() == 0


def test_bf16_is_nearly_fp32():
    matrix = draw_matrix(16, 64, falling=20)
    made = orthogonalise(matrix.bfloat16())
    assert made.dtype == torch.bfloat16
    assert (made.float() - orthogonalise(matrix)).norm() < 0.1 * orthogonalise(matrix).norm()


def test_steps_by_hand():
    """Momentum of 0.9 as a running mean, looked ahead by another tenth; then as long as 0.2 learning rates."""
    weight = nn.Parameter(torch.zeros(4, 3, 2, 2))
    optimiser = Muon([weight], torch.tensor(0.5), torch.float32)
    gradients = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    momentum, wanted = torch.zeros_like(weight), torch.zeros_like(weight)
    for gradient in gradients:
        weight.grad = gradient
        optimiser.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        ahead = (0.1 * gradient + 0.9 * momentum).reshape(4, 12)
        wanted = wanted - 0.5 * 0.2 * 12**0.5 * orthogonalise(ahead).view(4, 3, 2, 2)
    torch.testing.assert_close(weight.detach(), wanted)


@pytest.mark.parametrize("model", ["dae", "cae"])
def test_muon_moves_the_weights_and_adam_the_rest(model):
    network = build_model({"model": model, "size": 32, "width": 8})
    muon, adam = make_optimisers(network, "muon", torch.tensor(1e-3), torch.float32)
    by_muon, by_adam = ([id(p) for p in one.param_groups[0]["params"]] for one in (muon, adam))
    assert sorted(by_muon + by_adam) == sorted(map(id, network.parameters()))
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert set(by_muon) == {id(layer.weight) for layer in layers}


def test_adam_moves_all_where_asked_for():
    network = build_model({"model": "cae", "size": 32, "width": 8})
    (adam,) = make_optimisers(network, "adam", torch.tensor(1e-3), torch.float32)
    assert isinstance(adam, torch.optim.Adam)
    assert list(map(id, adam.param_groups[0]["params"])) == list(map(id, network.parameters()))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_products_are_taken_in_the_precision_asked_for(precision, monkeypatch):
    seen = []
    monkeypatch.setattr("training.optimiser.orthogonalise", lambda matrix: seen.append(matrix.dtype) or matrix)
    weight = nn.Parameter(torch.zeros(4, 3))
    weight.grad = torch.ones(4, 3)
    Muon([weight], torch.tensor(0.5), precision).step()
    assert seen == [precision]
    assert weight.dtype == torch.float32
