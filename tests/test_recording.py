"""A GPU repeats what it was given once: so each step must be the same operations, and on a GPU they give the same."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.test_trainer import make_trainer
from training.recording import WARM_UP, Recording


class NoteOperations(TorchDispatchMode):
    """Notes each operation with all that is no tensor among its arguments, and the shapes of those that are."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        leaves = [leaf for leaf in tree_leaves((arguments, options)) if not isinstance(leaf, torch.Generator)]
        leaves = [leaf.shape if isinstance(leaf, torch.Tensor) else str(leaf) for leaf in leaves]
        self.found.append((str(function), leaves))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("model", ["dae", "cae"])
def test_each_step_is_the_same_operations_with_the_same_numbers(processed, model):
    """The learning rate, the step's number and the slices change; a recording knows only what is in tensors."""
    trainer = make_trainer(processed, model, steps=1000)
    pairs, steps = trainer.read_pairs(), []
    for _ in range(3):
        with NoteOperations() as operations:
            pair = trainer.draw_pair(trainer.train[:5])
            trainer.learn(*pair)
        trainer.train_step(*next(pairs))
        steps.append(operations.found)
    assert len(steps[1]) > 100
    assert steps[1] == steps[2], "after the first step, in which optimisers make their state"


def test_a_cpu_does_the_work_each_time():
    calls = []
    double = Recording(lambda values: calls.append(1) or 2 * values)
    assert [double(torch.tensor(float(number))).item() for number in range(9)] == [2.0 * number for number in range(9)]
    assert len(calls) == 9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_from_a_recording():
    generator = torch.Generator("cuda")
    weights = torch.zeros(4, device="cuda")

    def walk(values):
        weights.add_(values * torch.rand(4, device="cuda", generator=generator))
        return weights.sum(), weights.max()

    recording, seen = Recording(walk, generator), []
    for work in (recording, walk):
        weights.zero_()
        seen.append([])
        for step in range(3 * WARM_UP):
            generator.manual_seed(step)
            seen[-1].append([value.item() for value in work(torch.full((4,), step + 1.0, device="cuda"))])
    assert seen[0] == seen[1]
    assert recording.graph
