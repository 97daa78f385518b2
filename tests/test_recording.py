"""A GPU repeats what it was given once: so each step must be the same operations, and on a GPU they give the same."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.test_trainer import make_trainer
from training.recording import WARM_UP, Recording


class NoteOperations(TorchFunctionMode):
    """Notes each operation with all numbers and words among its arguments, and the shapes of its tensors."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        self.found.append((function.__name__, describe(arguments), describe(list(options.items()))))
        return function(*arguments, **options)


def describe(value) -> object:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, tuple | list):
        return [describe(part) for part in value]
    return value if isinstance(value, str | int | float | None) else type(value)


@pytest.mark.parametrize("model", ["dae", "cae"])
def test_each_step_is_the_same_operations_with_the_same_numbers(processed, model):
    """The learning rate, the step's number and the slices change; a recording knows only what is in tensors."""
    trainer = make_trainer(processed, model, steps=1000)
    pairs, steps, clean = trainer.read_pairs(), [], trainer.train[:5]
    for _ in range(3):
        with NoteOperations() as operations:
            pair = trainer.draw_pair(clean)
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
