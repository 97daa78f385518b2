"""The optimisers: Adam, or Muon for the weights of convolutions and dense layers and Adam for all other numbers.

With Muon the dae needs less than a fourth of the slices that it needs with Adam to the same validation loss
(docs/experiments.md, E43).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.optim import Adam, Optimizer

MOMENTUM = 0.9
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan et al.; they take a singular value to 0.7 to 1.2 in five rounds
ROUNDS = 5
ADAMS_LENGTH = 0.2  # root mean square of Adam's updates, in learning rates
OPTIMISERS = {"dae": "muon", "cae": "adam"}  # of each model, unless another is asked for


def make_optimisers(
    model: nn.Module, name: str, learning_rate: torch.Tensor, precision: torch.dtype
) -> list[Optimizer]:
    """What moves the numbers of a model, by name.

    adam  Adam moves all
    muon  Muon moves the weights of two or more dimensions, with products in this precision, and Adam all others

    learning_rate  a number on the model's device, which is read at each step
    """
    parameters = list(model.parameters())
    adam = partial(Adam, lr=learning_rate, fused=True, capturable=True)
    if name == "adam":
        return [adam(parameters)]
    weights = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    return [Muon(weights, learning_rate, precision), adam(others)]


class Muon(Optimizer):
    """Moves each weight along its momentum, made orthogonal: as far in each direction of the matrix as in any other.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. An update is as long as Adam's (Liu
    et al., "Muon is scalable for LLM training", 2025), so both share a learning rate. The weight of a convolution,
    (O, I, h, w), counts as a matrix (O, I h w).

    precision  of the matrix products
    """

    def __init__(self, weights: Iterable[nn.Parameter], learning_rate: torch.Tensor, precision: torch.dtype):
        super().__init__(weights, {"lr": learning_rate})
        self.precision = precision

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
                matrix = weight.grad.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov's
                length = group["lr"] * (ADAMS_LENGTH * math.sqrt(max(matrix.shape)))
                update = orthogonalise(matrix.to(self.precision)).to(weight.dtype)
                weight.addcmul_(update.view_as(weight), length, value=-1)


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix (m, n) with singular values of about 1 and the same singular vectors, by Newton-Schulz iteration.

    Those below some thousandths of the matrix's norm stay smaller.
    """
    a, b, c = COEFFICIENTS
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(ROUNDS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if len(matrix) <= matrix.shape[1] else wide.T
