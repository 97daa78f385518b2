"""The two networks: shapes, layers in their order, neighbours."""

import pytest
import torch
import torch.nn.functional as F

from models.autoencoder import MODELS, take_middle
from models.checkpoint import build_model

CONFIGS = [{"model": "cae", "size": 32, "width": 8, "latent": 6}, {"model": "dae", "size": 32, "width": 8, "depth": 3}]


def make_input(batch=2, channels=3, size=32):
    return torch.rand((batch, channels, size, size), generator=torch.Generator().manual_seed(0))


def fill(model):
    """The model with weights and statistics that differ all over, and its state as a dict."""
    generator = torch.Generator().manual_seed(1)
    state = model.state_dict()
    for name, values in state.items():
        if values.is_floating_point():
            scale = values[0].numel() ** -0.5 if values.ndim > 1 else 1
            values.copy_(torch.rand(values.shape, generator=generator) * scale + 0.2 * ("var" in name))
    return model.eval(), state


def block(x, state, name, stride=1):
    """3x3 convolution without bias, batch norm with kept statistics, SiLU, from a state dict."""
    x = F.conv2d(x, state[f"{name}.0.weight"], stride=stride, padding=1)
    kept = (state[f"{name}.1.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    x = F.batch_norm(x, *kept, eps=1e-5)
    return x * torch.sigmoid(x)


def test_middle():
    slices = torch.arange(5.0).view(1, 5, 1, 1)
    assert take_middle(slices).tolist() == [[[[2]]]]
    assert take_middle(slices[:, :3]).tolist() == [[[[1]]]]
    assert take_middle(slices[:, :1]).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["model"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_weight_learns(config, batch):
    torch.manual_seed(0)
    model = build_model(config).train()
    slices = make_input(batch, len(model.neighbour_offsets(2.0)))
    output = model(slices)
    assert output.shape == (batch, 1, 32, 32)
    ((output - take_middle(slices)) ** 2).mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert batch == 1 or parameter.grad.abs().sum() > 0, name


def test_the_denoising_unet_layer_by_layer():
    """Cells of 4x4 pixels; two blocks a level, means of 2x2 on the way down; what comes up is narrowed, drawn out and
    added to what was kept; the result is added to the slice in the middle."""
    model, state = fill(build_model(CONFIGS[1]))
    slices = make_input()
    kept = []
    x = F.pixel_unshuffle(slices, 4)
    for level in range(3):
        x = F.avg_pool2d(x, 2) if level else x
        x = block(block(x, state, f"down.{level}.0"), state, f"down.{level}.1")
        kept.append(x)
    for number in range(2):
        x = F.conv2d(x, state[f"narrow.{number}.weight"], state[f"narrow.{number}.bias"])
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3) + kept[1 - number]
        x = block(x, state, f"up.{number}")
    x = F.conv2d(x, state["to_slice.0.weight"], state["to_slice.0.bias"], padding=1)
    torch.testing.assert_close(model(slices), slices[:, 1:2] + F.pixel_shuffle(x, 4), rtol=1e-4, atol=1e-4)


def test_the_plain_autoencoder_layer_by_layer():
    """Four blocks of stride 2, a dense latent without activation, four times drawn out and a block, a convolution."""
    model, state = fill(build_model(CONFIGS[0]))
    slices = make_input(channels=1)
    x = slices
    for level in range(4):
        x = block(x, state, f"encoder.{level}", stride=2)
    latent = F.linear(x.flatten(1), state["to_latent.weight"], state["to_latent.bias"])
    assert latent.shape == (2, 6)
    x = F.linear(latent, state["from_latent.weight"], state["from_latent.bias"]).view(2, 64, 2, 2)
    for level in range(4):
        x = block(x.repeat_interleave(2, 2).repeat_interleave(2, 3), state, f"decoder.{2 * level + 1}")
    x = F.conv2d(x, state["to_slice.weight"], state["to_slice.bias"], padding=1)
    torch.testing.assert_close(model(slices), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [16, 80, 240])
@pytest.mark.parametrize("name", MODELS)
def test_slices_of_any_multiple_of_16_pixels(name, size):
    model = build_model({"model": name, "size": size, "width": 2}).eval()
    channels = len(model.neighbour_offsets(2.0))
    assert model(make_input(1, channels, size)).shape == (1, 1, size, size)


def test_defaults():
    """Models on disk name only what differs from these: they must stay."""
    cae, dae = (build_model({"model": name}).state_dict() for name in ("cae", "dae"))
    assert [cae[f"encoder.{level}.0.weight"].shape[:2] for level in range(4)] == [
        (32, 1),
        (64, 32),
        (128, 64),
        (256, 128),
    ]
    assert [cae[f"decoder.{n}.0.weight"].shape[:2] for n in (1, 3, 5, 7)] == [(128, 256), (64, 128), (32, 64), (32, 32)]
    assert cae["to_latent.weight"].shape == (64, 256 * 8 * 8)
    assert [dae[f"down.{level}.0.0.weight"].shape[:2] for level in range(3)] == [(64, 48), (128, 64), (256, 128)]
    assert [dae[f"narrow.{n}.weight"].shape[:2] for n in (0, 1)] == [(128, 256), (64, 128)]
    assert dae["to_slice.0.weight"].shape[:2] == (16, 64)
    assert (len(cae), len(dae)) == (54, 54)


def test_what_each_is_trained_on():
    assert not MODELS["cae"].corrupted
    assert MODELS["dae"].corrupted


def test_neighbours_lie_about_4_mm_away():
    steps = {0.5: 8, 1.0: 4, 1.5: 3, 2.0: 2, 3.0: 1, 4.0: 1, 6.0: 1, 9.0: 1}
    for slice_spacing_mm, step in steps.items():
        assert MODELS["dae"].neighbour_offsets(slice_spacing_mm) == (-step, 0, step)
        assert MODELS["cae"].neighbour_offsets(slice_spacing_mm) == (0,)
