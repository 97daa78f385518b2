"""Corruption of training slices."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from training.corruption import _draw_blob, corrupt, vary_appearance, warp_locally


def make_slices(count=6, size=32, seed=0, channels=1):
    """Textured discs: (count, channels, size, size) in [0, 1], 0 outside."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    disc = np.hypot(x, y) < size * 0.4
    values = 0.5 + 0.2 * np.sin(x / 3) * np.cos(y / 4) + 0.02 * rng.normal(size=(count, channels, size, size))
    return torch.from_numpy(np.where(disc, values, 0).astype(np.float32))


@pytest.mark.parametrize("spoil", [vary_appearance, corrupt])
def test_corruption_keeps_the_conventions_and_repeats(spoil):
    slices = make_slices(16, 64, channels=3)
    first = spoil(slices, torch.Generator().manual_seed(1))
    again = spoil(slices, torch.Generator().manual_seed(1))
    other = spoil(slices, torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == slices.shape
    assert first.min() == 0
    assert first.max() <= 1
    assert torch.isfinite(first).all()
    if spoil is corrupt:
        assert torch.equal(first > 0, slices > 0), "the brain stays the brain"
        assert (first != slices).flatten(1).any(1).float().mean() > 0.5


def test_small_blobs_come_in_company():
    slices = make_slices(256, 128)
    blobs = _draw_blob(slices, torch.Generator().manual_seed(0))[:, 0].numpy() > 0.5
    counts, areas = [], []
    for blob in blobs:
        labels, count = ndimage.label(ndimage.binary_closing(blob, iterations=2))
        counts.append(count)
        areas.append(np.bincount(labels.ravel())[1:].max(initial=0))
    small = np.array(areas) < 64
    assert small.sum() > 40
    assert (np.array(counts)[small] > 1).mean() > 0.3


def test_what_happens_to_a_slice_happens_to_its_neighbours():
    same = make_slices(16, 64).expand(-1, 3, -1, -1)
    warped = warp_locally(same, torch.Generator().manual_seed(0))
    assert (warped != same).flatten(1).any(1).all()
    torch.testing.assert_close(warped[:, 0], warped[:, 2])
    spoilt = corrupt(same, torch.Generator().manual_seed(0))
    changed = (spoilt != same).flatten(2).any(2)
    assert changed[:, 1].sum() >= changed[:, 0].sum() > 8, "blobs go on through the slices"
    alike = torch.corrcoef(torch.stack([(spoilt - same)[:, 0].flatten(), (spoilt - same)[:, 1].flatten()]))[0, 1]
    assert 0.5 < alike < 0.999, "but are not the same in all"
