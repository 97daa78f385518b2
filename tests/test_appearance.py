"""Appearance: pose, shape, contrast, bias field, noise, blur and rim vary as strongly as they should, by moments."""

import numpy as np
import pytest
import torch
from scipy import ndimage

import training.corruption as corruption
from tests.test_corruption import seed
from training.corruption import FLOOR, loosen, make_smooth_noise, scan, vary_anatomy


def repeat(values, count):
    return torch.as_tensor(values, dtype=torch.float32).expand(count, 1, -1, -1)


def anatomy(values, count=2000, number=0):
    """(count, H, W) anatomies made of one slice (H, W)."""
    return vary_anatomy(repeat(values, count), seed(number))[:, 0]


def scanned(values, count=2000, number=0):
    """(count, H, W) scans of one slice (H, W), and their logarithms."""
    varied = scan(repeat(values, count).expand(-1, 2, -1, -1), seed(number))[:, 0]
    return varied, varied.clamp(min=1e-4).log()


@pytest.fixture
def flat(monkeypatch):
    """No smooth noise and no local warps: the pose alone moves tissue, and no region differs in contrast."""
    monkeypatch.setattr(corruption, "make_smooth_noise", lambda shape, *_: torch.zeros(shape[0], 1, *shape[2:]))
    monkeypatch.setattr(corruption, "warp_locally", lambda x, _: x)


def test_the_pose_varies_by_a_few_degrees_percent_and_pixels(flat):
    """Four bright spots are found again; the affine map from where they are to where they were has its parameters."""
    size = 64
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    spots = np.array([(y, x) for y in (-16, 16) for x in (-14, 14)])
    slice_ = 0.05 + sum(0.6 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 18) for y, x in spots)
    slice_ = slice_ + 0.3 * np.exp(-((rows - 4) ** 2 + (columns + 16) ** 2) / 8)  # on the left only
    varied = anatomy(slice_, 600).double()
    found = []
    for y, x in spots:
        window = varied * torch.from_numpy((np.sign(rows) == np.sign(y)) & (np.sign(columns) == np.sign(x)))
        window = window * torch.from_numpy(np.hypot(rows - y, columns - x) < 9)
        weights = (window / window.flatten(1).amax(1)[:, None, None] - 0.5).clamp(min=0)
        found.append(torch.stack([(weights * torch.from_numpy(v)).sum((1, 2)) for v in (rows, columns)], 1))
        found[-1] = found[-1] / weights.sum((1, 2))[:, None]
    found = torch.stack(found, 1).numpy()
    fits = np.stack([np.linalg.lstsq(np.c_[where, np.ones(4)], spots, rcond=None)[0] for where in found])
    scales = np.log(np.linalg.norm(fits[:, :2], axis=2))
    angles = np.arctan2(fits[:, 0, 1], fits[:, 0, 0])
    assert angles.std() == pytest.approx(0.07, rel=0.12)
    assert scales.std(0) == pytest.approx([0.05, 0.05], rel=0.12)
    assert fits[:, 2].std(0) == pytest.approx([0.02 * size / 2] * 2, rel=0.12)
    left, right = varied[:, 24:48, 10:24].mean((1, 2)), varied[:, 24:48, 40:54].mean((1, 2))
    assert (left > right).float().mean() == pytest.approx(0.5, abs=0.06), "half are mirrored"
    assert angles.mean() == pytest.approx(0, abs=0.01)
    assert scales.mean(0) == pytest.approx([0, 0], abs=0.01)


def test_the_warp_is_smooth_and_of_up_to_some_two_and_a_half_pixels(monkeypatch):
    """Of a ramp the values tell where a pixel comes from: with the same pose, warped and not."""
    size = 64
    ramp = repeat(np.linspace(0.2, 0.8, size)[:, None] * np.ones(size), 600)
    with monkeypatch.context() as patch:
        patch.setattr(corruption, "make_smooth_noise", lambda shape, *_: torch.zeros(shape[0], 1, *shape[2:]))
        posed = corruption.change_pose(ramp, seed(3))
    moved = (corruption.change_pose(ramp, seed(3)) - posed)[:, 0, 12:52, 12:52] * (size - 1) / 0.6
    noise = make_smooth_noise((4000, 1, size, size), (3, 5, 8), seed())[:, 0, 12:52, 12:52]
    expected = 2.5 / 3**0.5 * noise.square().mean().sqrt().item()
    assert moved.square().mean().sqrt() == pytest.approx(expected, rel=0.12)
    steps = moved.diff(dim=1).abs()
    assert steps.mean() < 0.2 * moved.abs().mean(), "neighbours move alike"
    assert moved.flatten(1).abs().amax(1).quantile(0.05) < 0.5, "some hardly at all"


def test_two_fifths_are_warped_locally_in_the_input_and_in_the_target(monkeypatch):
    seen = []

    def mark(x, _):
        seen.append(len(x))
        return torch.where(x > 0, 1.0, 0.0)

    monkeypatch.setattr(corruption, "warp_locally", mark)
    anatomy(np.full((32, 32), 0.3), 200)
    assert seen == [80]
    seen.clear()
    corruption.corrupt(repeat(np.full((32, 32), 0.3), 200), seed())
    assert seen == [], "what the model undoes is not moved tissue"


def test_contrast_is_a_power_that_keeps_black_and_white(flat, monkeypatch):
    """Of a checkerboard of 0.1 and 0.6, log out = power * log in, whatever the pose: log power ~ 0.35 N."""
    monkeypatch.setattr(corruption, "FLUID_BELOW", 1e-9)
    size, cell = 64, 16
    rows, columns = np.mgrid[:size, :size]
    board = (rows // cell + columns // cell) % 2
    varied = anatomy(np.where(board, 0.6, 0.1), 1000)
    middle = (np.abs(rows % cell - 7.5) < 3) & (np.abs(columns % cell - 7.5) < 3)
    middle &= (np.abs(rows - 31.5) < 30) & (np.abs(columns - 31.5) < 30)
    high, low = (varied[:, torch.from_numpy(middle & (board == value))].mean(1).log() for value in (1, 0))
    power = (high - low) / np.log(0.6 / 0.1)
    assert power.abs().log().std() == pytest.approx(0.35, rel=0.1)
    assert power.abs().log().mean() == pytest.approx(0, abs=0.05)
    gain = (high + low) / 2 - power.abs() * (np.log(0.6) + np.log(0.1)) / 2
    assert gain.abs().median() < 0.03, "white stays white"


def test_the_level_of_fluid_shifts_by_a_tenth_and_tissue_stays(flat, monkeypatch):
    values = np.full((32, 32), 0.15)
    values[16:] = 0.9
    changed = anatomy(values)
    monkeypatch.setattr(corruption, "FLUID_BELOW", 1e-9)
    still = anatomy(values)
    dark, bright = ((slice(None), slice(8, 11), slice(12, 20)), (slice(None), slice(21, 24), slice(12, 20)))
    assert torch.equal(changed[bright], still[bright])
    before, after = still[dark].mean((1, 2)), changed[dark].mean((1, 2))
    free = (after > 0.01) & (before < 0.4) & (before > 0.2)  # neither at the floor nor near tissue
    shift = (after - before)[free] / (1 - before[free] / 0.45)
    assert shift.std() == pytest.approx(0.1, rel=0.1)
    assert shift.mean() == pytest.approx(0, abs=0.02)


@pytest.fixture
def halves(monkeypatch):
    """A function: of the fields that vary by region, the n-th alone is 1 in the upper and -1 in the lower half."""

    def choose(number):
        calls = iter(range(3))

        def divide(shape, grids, _):
            noise = torch.zeros(shape[0], 1, *shape[2:])
            if grids == corruption.REGION_GRIDS and next(calls) == number:
                noise[:, :, : shape[2] // 2], noise[:, :, shape[2] // 2 :] = 1, -1
            return noise

        monkeypatch.setattr(corruption, "make_smooth_noise", divide)
        monkeypatch.setattr(corruption, "warp_locally", lambda x, _: x)

    return choose


def measure_halves(values, count=2000):
    """(count,) mean of the logarithm in the upper and in the lower half, of each of two values side by side."""
    slice_ = np.full((64, 64), values[0])
    slice_[:, 32:] = values[1]
    logs = anatomy(slice_, count).log()
    sides = [
        torch.stack([logs[:, rows, columns].mean((1, 2)) for columns in (slice(12, 20), slice(44, 52))]).sort(0).values
        for rows in (slice(12, 24), slice(40, 52))
    ]
    return torch.stack(sides)  # half, value, slice


@pytest.mark.parametrize(("number", "up_to"), [(0, 0.3), (2, 0.2)], ids=["power", "gain"])
def test_contrast_and_gain_differ_between_regions(halves, monkeypatch, number, up_to):
    """Log out = power * log in + gain. Strengths are uniform, so halves apart by two of them are up_to on average."""
    monkeypatch.setattr(corruption, "FLUID_BELOW", 1e-9)
    halves(number)
    (dark, bright), (dark_below, bright_below) = measure_halves((0.2, 0.5))
    power, power_below = bright - dark, bright_below - dark_below
    if number == 0:
        apart = power.log() - power_below.log()
    else:
        apart = bright - bright_below
        assert (power - power_below).abs().median() < 0.01, "a gain changes no contrast"
    assert apart.mean() == pytest.approx(up_to, rel=0.06)
    assert apart.min() > -0.02
    assert apart.max() == pytest.approx(2 * up_to, rel=0.06)


def test_the_level_of_fluid_differs_between_regions(halves, monkeypatch):
    """By strengths that are uniform up to 0.1, so halves apart by two of them are 0.1 on average, of black."""
    halves(1)
    (fluid, tissue), (fluid_below, tissue_below) = measure_halves((0.15, 0.9)).exp()
    assert (tissue - tissue_below).abs().max() < 1e-5
    monkeypatch.setattr(corruption, "FLUID_BELOW", 1e-9)
    halves(1)
    still = measure_halves((0.15, 0.9)).exp()[0, 0]  # the same slices with the level as it is
    free = (fluid_below > 0.01) & (fluid < 0.44) & (still < 0.3)  # neither at the floor nor near tissue
    apart = ((fluid - fluid_below) / (1 - still / 0.45))[free]
    assert apart.min() > -1e-3
    assert apart.mean() == pytest.approx(0.1, rel=0.15)
    assert apart.max() == pytest.approx(0.2, rel=0.06)


def test_regions_are_as_wide_as_cells_of_grids_of_6_and_8(monkeypatch):
    """Differences grow with the distance as those of such noise do."""
    monkeypatch.setattr(corruption, "FLUID_BELOW", 1e-9)
    logs = anatomy(np.full((64, 64), 0.5), 3000).log()
    noise = make_smooth_noise((6000, 1, 64, 64), (6, 8), seed(1))[:, 0]
    growth = []
    for values in (logs, noise):
        near, far = ((values[:, 32, 24] - values[:, 32, 24 + step]).square().mean() for step in (4, 16))
        growth.append((far / near).item())
    assert growth[0] == pytest.approx(growth[1], rel=0.15)


def test_the_bias_field_and_the_gain_by_their_moments():
    """Where the field's grids meet at a 10th of the slice, by the weights of their bilinear steps.

    Field: strength up to 0.45, E[s^2] = 0.45^2 / 3; between pixels 10 and 20 of 31 its variance is (2 + 2 * 18/81) / 3.
    """
    square = 0.45**2 / 3
    logs = scanned(np.full((31, 31), 0.35), 3000)[1]
    bend = (logs[:, 12:18, 11] - logs[:, 11:17, 11]).diff(dim=1).abs().amax(1)
    smooth = bend < 1e-3
    assert smooth.float().mean() == pytest.approx(0.4, abs=0.03), "noise on three fifths of the slices"
    difference = logs[smooth, 10, 10] - logs[smooth, 20, 20]
    assert difference.square().mean() == pytest.approx(square * (2 + 36 / 81) / 3, rel=0.1)
    here = logs[smooth, 10, 10] - np.log(0.35)
    assert here.square().mean() == pytest.approx(square * (1 + 50 / 81) / 3 + 0.1**2, rel=0.1)


def test_noise_is_up_to_four_hundredths():
    varied, _ = scanned(np.full((31, 31), 0.35), 2000)
    noise = (varied[:, 12:18, 12:18] - (varied[:, 11:17, 12:18] + varied[:, 13:19, 12:18]) / 2).std((1, 2)) / 1.5**0.5
    noisy = noise[noise > 5e-4]
    assert noisy.mean() == pytest.approx(0.02, rel=0.08)
    assert noisy.quantile(0.95) == pytest.approx(0.038, rel=0.15)


@pytest.mark.parametrize("vary", [lambda x: scan(x.expand(-1, 2, -1, -1), seed()), lambda x: vary_anatomy(x, seed())])
def test_half_of_the_slices_are_blurred_by_up_to_nine_tenths_of_a_3x3_mean(vary, flat, monkeypatch):
    """The mean leaves a third of stripes of 4 pixels, and nearly all of those of 16."""
    monkeypatch.setattr(corruption, "change_pose", lambda x, _: x)
    rows, columns = np.mgrid[:64, :64]
    stripes = np.where(rows < 32, np.cos(2 * np.pi * (columns + 0.5) / 4), np.cos(2 * np.pi * columns / 16))
    varied = vary(repeat(0.6 + 0.1 * stripes, 800))[:, 0]
    fine, coarse = varied[:, 8:26, 8:56], varied[:, 38:56, 8:56]
    fine, coarse = (part.mean(1) for part in (fine, coarse))  # noise cancels
    fine = fine - torch.nn.functional.avg_pool1d(fine[:, None], 5, 1, 2)[:, 0]
    coarse = coarse - torch.nn.functional.avg_pool1d(coarse[:, None], 17, 1, 8)[:, 0]
    ratio = fine[:, 8:-8].std(1) / coarse[:, 8:-8].std(1)
    kept = ratio / ratio.quantile(0.8)
    for quantile in (0.05, 0.15, 0.3):
        strength = 0.9 * (1 - 2 * quantile)
        assert kept.quantile(quantile) == pytest.approx(1 - 2 / 3 * strength, abs=0.09), quantile
    assert kept.quantile(0.45) > 0.8


def test_some_brains_lose_a_pixel_or_two_of_their_rim(monkeypatch):
    monkeypatch.setattr(corruption, "loosen", lambda x, _: x)
    """0.4 lose one and 0.15 of all another: bars of 2 pixels vanish in 1 - 0.6 * 0.85, of 4 pixels in 0.4 * 0.15."""
    slice_ = np.zeros((64, 64))
    slice_[24:40, 12:52] = slice_[8:10, 12:52] = slice_[52:56, 12:52] = 0.5
    varied = scanned(slice_, 1000)[0]
    thin, thick = ((part > 0).flatten(1).sum(1) for part in (varied[:, :18], varied[:, 46:]))
    assert (thin < 20).float().mean() == pytest.approx(1 - 0.6 * 0.85, abs=0.035)
    assert (thick < 20).float().mean() == pytest.approx(0.06, abs=0.025)


def test_the_rim_of_a_moved_brain_does_not_fade(flat):
    rows, columns = np.mgrid[:64, :64] - 31.5
    disc = np.where(np.hypot(rows, columns) < 24, 0.5, 0)
    fading = []
    for values in corruption.change_pose(repeat(disc, 200), seed())[:, 0].numpy():
        rim = (values > 0) & ~ndimage.binary_erosion(values > 0)
        fading.append(values[rim].min() / 0.5)
    assert min(fading) > 0.98


def test_three_of_ten_brains_keep_what_lies_around_them(monkeypatch):
    monkeypatch.setattr(corruption, "erode", lambda x, _: x)
    values = np.zeros((48, 48))
    values[16:32, 16:32] = 0.5
    wider = (scanned(values, 1000)[0] > 0).sum((1, 2)) > 16**2
    assert wider.float().mean() == pytest.approx(0.3, abs=0.01), "a few may happen to keep nothing"


def test_up_to_three_pixels_around_a_brain_are_kept_in_places():
    x = torch.zeros(400, 4, 48, 48)
    x[:, [1, 3], 16:32, 16:32] = x[:, 0, 18:30, 18:30] = x[:, 2, 14:34, 14:34] = 0.5
    loose = loosen(x, seed())
    assert (loose[x > 0] == 0.5).all(), "the brain stays"
    torch.testing.assert_close(loose[:, 1], loose[:, 3])
    away = [torch.from_numpy(ndimage.distance_transform_cdt(one[0] == 0)) for one in x.transpose(0, 1).numpy()]
    for channel, distance in enumerate(away):
        kept = (loose[:, channel] > 0).float()
        # the noise, of a standard deviation of 0.65, lies above -0.5, 0 and 0.5 in so much of a slice
        for pixels, share in ((1, 0.78), (2, 0.5), (3, 0.22), (4, 0)):
            assert kept[:, distance == pixels].mean() == pytest.approx(share, abs=0.04), (channel, pixels)
        assert not kept[:, distance > 3].any()


def test_what_lies_around_a_brain_is_of_any_brightness_and_dark_more_often():
    x = torch.zeros(600, 2, 48, 48)
    x[:, :, 16:32, 16:32] = 0.5
    loose = loosen(x, seed())
    around = [values[(values > 0) & (values != 0.5)] for values in loose]
    levels = np.array([float(values.median()) for values in around if len(values) > 100])
    assert np.quantile(levels, [0.25, 0.5, 0.75]) == pytest.approx([1 / 16, 1 / 4, 9 / 16], abs=0.06)
    spread = np.mean([float(values.var()) for values in around if len(values) > 100 and 0.3 < values.median() < 0.7])
    assert spread == pytest.approx(0.3**2 / 3 * 0.65**2, rel=0.4), "less, as a rim is a part of a slice"
    values = torch.cat(around)
    assert values.min() == pytest.approx(FLOOR)
    assert values.max() == 1
