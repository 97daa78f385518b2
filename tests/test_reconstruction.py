"""A stack is reconstructed slice by slice from its neighbours, in the brain only, in any batches and precision."""

import numpy as np
import pytest
import torch

from models.anomaly import reconstruct
from models.checkpoint import build_model
from tests.reference import make_scan


class Window(torch.nn.Module):
    """Draws the slice below, the slice and the slice above as the digits of one number."""

    def __init__(self, step=1):
        super().__init__()
        self.step, self.batches = step, []
        self.weight = torch.nn.Parameter(torch.zeros(1))  # says what device the model is on

    def neighbour_offsets(self, slice_spacing_mm):
        return (-self.step, 0, self.step)

    def forward(self, slices):
        self.batches.append(len(slices))
        return 1000 * slices[:, :1] + 10 * slices[:, 1:2] + slices[:, 2:]


@pytest.mark.parametrize(
    ("step", "digits"),
    [
        (1, [1012, 1023, 2034, 3045, 4055]),
        (2, [1013, 1024, 1035, 2045, 3055]),
        (9, [1015, 1025, 1035, 1045, 1055]),
    ],
)
def test_the_end_slices_stand_for_those_beyond(step, digits):
    stack = np.ones((5, 4, 4), np.float16) * np.arange(1, 6)[:, None, None]
    model = Window(step)
    drawn = reconstruct(model, stack, 2.0, batch_size=2)
    assert drawn.dtype == torch.float32
    np.testing.assert_array_equal(drawn, np.ones((5, 4, 4)) * np.array(digits)[:, None, None])
    assert model.batches == [2, 2, 1]


def test_the_spacing_chooses_the_neighbours():
    asked = []
    model = Window()
    model.neighbour_offsets = lambda slice_spacing_mm: asked.append(slice_spacing_mm) or (-1, 0, 1)
    reconstruct(model, np.ones((3, 4, 4), np.float32), 2.5)
    assert asked == [2.5]


def test_nothing_is_drawn_outside_the_brain_of_the_slice_itself():
    stack = np.ones((3, 2, 2), np.float32)
    stack[1, 0, 0] = 0  # its neighbours are brain there
    assert reconstruct(Window(), stack, 2.0)[1].tolist() == [[0, 1011], [1011, 1011]]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_precision_is_that_of_the_networks_products(precision):
    seen = []

    class Scale(torch.nn.Conv2d):
        neighbour_offsets = staticmethod(lambda slice_spacing_mm: (0,))

        def forward(self, slices):
            output = super().forward(slices)
            seen.append(output.dtype)
            return output

    drawn = reconstruct(Scale(1, 1, 1), np.ones((2, 4, 4), np.float32), 2.0, precision=precision)
    assert seen == [precision]
    assert drawn.dtype == torch.float32


def test_any_batch_size_gives_the_same():
    torch.manual_seed(0)
    model = build_model({"model": "dae", "size": 32, "width": 8, "depth": 3}).eval()
    stack = make_scan(0, 7)[0]
    a, b = (reconstruct(model, stack, 2.0, batch_size=size) for size in (2, 7))
    np.testing.assert_allclose(a, b, atol=1e-5)
