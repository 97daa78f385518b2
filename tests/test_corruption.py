"""Corruption: each part happens as often and as strongly as it should, by moments worked by hand."""

import numpy as np
import pytest
import torch

import training.corruption as corruption
from training.corruption import (
    corrupt,
    draw_blob,
    infiltrate,
    make_pair,
    make_smooth_noise,
    paint_blob,
    scan,
    vary_anatomy,
    warp_locally,
)

VISIBLE = 1000.0  # a "blurred" slice so bright that what is blended from it shows the blob's own shape


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def make_slices(count=6, size=32, channels=1):
    """Textured discs: (count, channels, size, size) in [0, 1], 0 outside."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    disc = np.hypot(x, y) < size * 0.4
    values = 0.5 + 0.2 * np.sin(x / 3) * np.cos(y / 4) + 0.02 * rng.normal(size=(count, channels, size, size))
    return torch.from_numpy(np.where(disc, values, 0).astype(np.float32))


def one_place(count, channels, size, row, column):
    """Slices with a single spot of brain where warps and blobs can start, at this pixel (multiples of 4)."""
    x = torch.zeros(count, channels, size, size)
    x[:, channels // 2, row : row + 4, column : column + 4] = 1e-4
    return x


def paint(x, blurred, number=0):
    """Slices with a blob in each."""
    generator = seed(number)
    return paint_blob(x, draw_blob(x, generator), blurred, generator)


def paint_shapes(x, number=0):
    """(B, C, H, W) blobs as blended from `VISIBLE`, with their strength and sign; 0 where the kind of blob is other."""
    change = (paint(x, torch.full_like(x, VISIBLE), number) - x) / VISIBLE
    return torch.where(change.abs() > 0.005, change, 0)


def vary_between(place, other, size=32):
    """The variance of mottle / its strength between two pixels: grids of 6, 12 and 24, shares of mean square 1/3."""

    def stretch(cells, count):
        at = np.linspace(0, cells - 1, count)
        return np.stack([np.interp(at, np.arange(cells), row) for row in np.eye(cells)], 1)

    weights = [stretch(24, size) @ stretch(cells, 24) for cells in (6, 12, 24)]
    pairs = [np.outer(w[place[0]], w[place[1]]) - np.outer(w[other[0]], w[other[1]]) for w in weights]
    return sum((pair**2).sum() for pair in pairs) / 3


@pytest.mark.parametrize("change", [vary_anatomy, corrupt, scan])
def test_slices_stay_slices_and_a_seed_repeats(change):
    slices = make_slices(16, 64, channels=3)
    first, again, other = (change(slices, seed(number)) for number in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == slices.shape
    assert first.min() == 0
    assert 0.5 < first.max() <= 1
    bright = change(torch.where(slices > 0, 0.98, 0.0), seed(3))
    assert bright.max() == 1, "what would be brighter than white is white"
    dark = change(torch.where(slices > 0, 0.002, 0.0), seed(3))
    assert dark[dark > 0].min() == pytest.approx(1e-3), "no brain pixel becomes background"


def test_a_brain_stays_the_same_brain_under_corruption():
    slices = make_slices(64, 64)
    dark = torch.where(slices > 0, 0.002, 0.0)  # noise and blobs would take it below 0
    for x in (slices, dark):
        assert torch.equal(corrupt(x, seed()) > 0, x > 0)


def test_corrupt_paints_five_times(monkeypatch):
    calls, factors = [], {"paint_blob": 0.8, "infiltrate": 0.95}

    def replace(name):
        def change(x, *_):
            calls.append((name, len(x)))
            return x * factors[name]

        monkeypatch.setattr(corruption, name, change)

    for name in factors:
        replace(name)
    changed = corrupt(torch.ones(200, 1, 4, 4), seed())[:, 0, 0, 0]
    painted = [("paint_blob", 100), ("paint_blob", 100), ("paint_blob", 50), ("infiltrate", 100), ("infiltrate", 100)]
    assert calls == painted
    assert len(changed.unique()) == 12, "0 to 3 blobs and 0 to 2 gradual ones: each picks slices of its own"
    first, second = (corrupt(torch.ones(200, 1, 4, 4), seed(number))[:, 0, 0, 0] for number in (1, 2))
    assert not torch.equal(first, second)


def test_what_a_blob_blurs_to_is_the_mean_over_the_brain_within_five_pixels(monkeypatch):
    seen = []
    monkeypatch.setattr(corruption, "paint_blob", lambda x, blob, blurred, _: seen.append(blurred) or x)
    y, x = np.mgrid[:64, :64] - 31.5
    disc = torch.from_numpy(np.hypot(x, y) < 26)
    corrupt(torch.where(disc, 0.5, 0.0)[None, None].expand(4, 1, -1, -1), seed())
    torch.testing.assert_close(seen[0][:, :, disc], torch.full_like(seen[0][:, :, disc], 0.5), atol=0.01, rtol=0)
    step = torch.ones(64, 64)
    step[:, 32:] = 0.2
    corrupt(step[None, None].expand(4, 1, -1, -1), seed())
    row = seen[-1][0, 0, 32]
    np.testing.assert_allclose(row[[4, 22, 41, 60]], [1, 1, 0.2, 0.2], atol=1e-5)
    assert 0.4 < row[31:33].mean() < 0.8
    assert row[28] < 0.95
    assert row[35] > 0.25


def test_smooth_noise_by_its_moments():
    """Of variance 1; at a corner two grids meet, elsewhere neighbours lie on the grids' straight lines.

    With shares of mean square 1/2: cov(corner, j-th of 24) = max(0, 1 - 11j/23) / 2.
    """
    noise = make_smooth_noise((6000, 1, 24, 24), (12, 24), seed())[:, 0]
    edges = torch.cat(
        [n for e in (noise, noise.flip(1), noise.flip(2), noise.flip(1, 2)) for n in (e[:, 0], e[..., 0])]
    )
    corner = edges[:, 0]
    assert corner.mean() == pytest.approx(0, abs=0.03)
    assert corner.square().mean() == pytest.approx(1, rel=0.03)
    for j in range(1, 8):
        expected = max(0, 1 - 11 * j / 23) / 2
        assert (corner * edges[:, j]).mean() == pytest.approx(expected, abs=0.025), j
    fine = make_smooth_noise((20, 1, 47, 47), (12, 24), seed())[:, 0]
    between = (fine[:, :, :-2:2] + fine[:, :, 2::2]) / 2
    torch.testing.assert_close(fine[:, :, 1::2], between, msg="24 cells are the finest")


@pytest.mark.parametrize("corrupted", [True, False])
def test_a_pair_has_the_same_anatomy_and_the_same_scanner(corrupted):
    slices = make_slices(12, 64, channels=3)
    source, target = make_pair(slices, corrupted, seed(4))
    generator = seed(4)
    anatomy = vary_anatomy(slices, generator)
    changed = corrupt(anatomy, generator) if corrupted else anatomy
    both = scan(torch.cat([changed, anatomy[:, 1:2]], 1), generator)
    assert torch.equal(source, both[:, :3])
    assert torch.equal(target, both[:, 3:])
    assert torch.equal(source[:, 1:2] > 0, target > 0)
    assert torch.equal(source[:, 1:2], target) != corrupted


def test_what_is_not_corrupted_is_the_same_to_the_last_grain(monkeypatch):
    """Else the model would find what is corrupted by its missing noise, on its own scanner and no other."""
    left = torch.arange(64) < 32
    monkeypatch.setattr(corruption, "corrupt", lambda x, _: torch.where(left & (x > 0), 0.8 * x + 0.1, x))
    source, target = make_pair(make_slices(40, 64, channels=3), True, seed())
    change = (source[:, 1] - target[:, 0]).abs()
    assert change[..., 34:].max() == 0
    assert change[..., 16:30].flatten(1).amax(1).min() > 0
    inner = (source[:, 1] - target[:, 0])[:, 24:40, 18:26]
    rough = (inner.diff(dim=1).diff(dim=1)).abs().flatten(1).mean(1)
    grain = target[:, 0, 24:40, 18:26].diff(dim=1).diff(dim=1).abs().flatten(1).mean(1)
    assert (rough < 0.4 * grain).all(), "and what is corrupted has its noise too"


def test_infiltration_fades_out_and_goes_one_way():
    """A fifth of 0.2 to 1 of the way to a level from 0.1 to 1; down in four of five."""
    x = torch.rand(3000, 1, 8, 8, generator=seed(1))
    change = infiltrate(x, torch.ones_like(x), seed()) - x
    down, up = (change < -1e-6).flatten(1).any(1), (change > 1e-6).flatten(1).any(1)
    assert not (down & up).any()
    assert down[down | up].float().mean() == pytest.approx(0.8, abs=0.03)
    # what is changed moves toward one level: change = strength * (level - x)
    one = change[down & ((change < -1e-6).flatten(1).sum(1) > 20)]
    values = x[down & ((change < -1e-6).flatten(1).sum(1) > 20)]
    strengths = []
    for moved, value in zip(one.flatten(1), values.flatten(1), strict=True):
        strengths.append(-np.polyfit(value[moved < -1e-6], moved[moved < -1e-6], 1)[0])
    assert min(strengths) == pytest.approx(0.2, abs=0.01)
    assert max(strengths) == pytest.approx(1, abs=0.01)


def test_infiltration_has_no_sharp_edge():
    half = torch.zeros(200, 1, 32, 64)
    half[..., 32:] = 1
    change = infiltrate(torch.full((200, 1, 32, 64), 0.9), half, seed())[:, 0, 16] - 0.9
    share = (change / change[:, 60:61])[change[:, 60] < -0.1]
    np.testing.assert_allclose(share[:, [20, 32, 43]].mean(0), [0, 0.625, 1], atol=0.07)
    assert share.diff(dim=1).abs().max() < 0.3


def test_warps_start_in_the_brain_and_push_and_pull_by_up_to_ten_pixels():
    """Of two ramps the values tell where each pixel comes from; the place can be one pixel only."""
    row, column, size = 40, 24, 64
    x = one_place(600, 3, size, row, column)
    x[:, 0] = torch.linspace(0.2, 0.8, size)[:, None]
    x[:, 2] = torch.linspace(0.2, 0.8, size)
    warped = warp_locally(x, seed(5))
    down, along = ((warped - x)[:, channel] * (size - 1) / 0.6 for channel in (0, 2))
    assert down[:, row].abs().max() < 1e-3, "the place itself is where it was"
    assert along[:, :, column].abs().max() < 1e-3
    torch.testing.assert_close(down[:, row - 9, column], -down[:, row + 9, column], atol=1e-3, rtol=0)
    torch.testing.assert_close(along[:, row, column + 9], down[:, row + 9, column], atol=1e-3, rtol=0)
    # displacement = -pull d exp(-d^2 / 2 r^2): its ratio at 1 and 5 pixels gives r, then pull
    near, far = (down[:, row + d, column] for d in (1, 5))
    seen = far.abs() > 0.05
    radius = torch.sqrt(12 / torch.log(5 * near[seen] / far[seen]))
    pull = -near[seen] * torch.exp(1 / (2 * radius**2))
    assert pull.min() == pytest.approx(-0.6, abs=0.01)
    assert pull.max() == pytest.approx(0.9, abs=0.01)
    assert pull.mean() == pytest.approx(0.15, abs=0.04)
    assert radius.min() == pytest.approx(5, abs=0.2)
    assert radius.max() == pytest.approx(20, abs=0.5)
    assert radius.median() == pytest.approx(10, rel=0.06)
    assert 9.5 < torch.hypot(down, along).max() < 11


def test_a_warp_is_the_same_in_all_channels_and_leaves_no_holes():
    same = make_slices(16, 64).expand(-1, 3, -1, -1)
    warped = warp_locally(same, seed())
    assert (warped != same).flatten(1).any(1).all()
    torch.testing.assert_close(warped[:, 0], warped[:, 2])
    assert (warped[same > 0] > 0).all()


def test_the_four_kinds_of_blob_by_their_shares():
    """Grey takes the texture off (-), blur shows what is blurred (+); foreign tissue comes upside down."""
    x = torch.full((4000, 1, 32, 32), 1e-4)
    peak = paint_shapes(x).flatten(1)
    assert (peak.amax(1) > 0).float().mean() == pytest.approx(0.1, abs=0.015)
    assert (peak.amin(1) < 0).float().mean() == pytest.approx(0.45, abs=0.025)
    x = torch.full((4000, 1, 32, 32), 0.5)
    x[::2, :, :16] = 100  # in the upper half of every second slice
    change = paint(x, x)[1::2] - 0.5
    reached = (change.flatten(1).abs() > 0.01).any(1)
    foreign = change > 1
    assert not foreign[:, :, :16].any()
    assert foreign[:, :, 16:].flatten(1).any(1)[reached].float().mean() == pytest.approx(0.3 / 0.9, abs=0.035)


def test_what_is_blended_into_a_blob():
    """A large blob is 1 in its middle: there the change is strength (0.2 to 1) times what the kind of blob says."""
    x = one_place(6000, 3, 32, 16, 16)  # the middle channel is the slice, the first tells the kind
    blurred = x.clone()
    blurred[:, 0] = VISIBLE
    blurred[:, 2] = VISIBLE
    change = paint(x, blurred)
    shape = change[:, 0, 16] / VISIBLE
    large = shape[:, 28].abs() > 0.8 * shape[:, 16].abs()  # 12 pixels away it is still there
    shown, kind = change[large, 1, 16, 16], shape[large, 16]
    grey, blur = kind < -0.005, kind > 0.005
    assert shown[grey].mean() == pytest.approx(0.6 * 0.55, rel=0.1)
    assert -kind[grey].mean() == pytest.approx(0.6 * 0.5, rel=0.1), "texture kept: from none to all"
    mottle = (change[large, 1, 16, 16] - change[large, 1, 16, 21])[grey].square().mean()
    assert mottle == pytest.approx(0.4133 * 0.15**2 / 3 * vary_between((16, 16), (16, 21)), rel=0.25)
    assert kind[blur].min() == pytest.approx(0.2, abs=0.05)
    assert kind[blur].max() == pytest.approx(1, abs=0.05)
    assert kind[blur].mean() == pytest.approx(0.6, abs=0.07)


def test_large_blobs_hardly_change_in_brightness(monkeypatch):
    """By exp(-area / 273 pixels), and 0.15 of all blobs are such a change; with the same draws, others are the same."""
    x = torch.full((2000, 3, 64, 64), 0.5)
    changes, areas = [], (20, 600)
    for area in areas:
        blob = torch.zeros_like(x)
        blob[:, :, 20:40, 20 : 20 + area // 20] = 1
        monkeypatch.setattr(corruption, "make_smooth_noise", lambda shape, *_: torch.zeros(shape[0], 1, *shape[2:]))
        changes.append((paint_blob(x, blob, x, seed()) - x)[:, 1, 30, 20])
    changed = changes[0].abs() > 1e-3
    ratio = (changes[1] / changes[0])[changed]
    faded = (ratio - np.exp((areas[0] - areas[1]) / 273)).abs() < 0.01
    assert faded.float().mean() == pytest.approx(0.15 / 0.6, abs=0.03), "of what is neither blurred nor foreign"
    torch.testing.assert_close(ratio[~faded], torch.ones_like(ratio[~faded]))


def test_a_change_of_brightness_is_as_strong_upwards_as_downwards(monkeypatch):
    """Strength (mean square 0.4133) times N(0, 0.25) and a mottle; where other slices have no brain there is grey.

    Beside its one place of brain the slice is -0.3, so that what replaces it is brighter by 0.3 and more.
    """
    monkeypatch.setattr(corruption, "LARGE_AREA", 1e9)
    x = one_place(8000, 3, 32, 16, 16)
    x[:, 1][x[:, 1] == 0] = -0.3
    blurred = torch.full_like(x, VISIBLE)
    blurred[:, 1] = x[:, 1]
    rows = []
    for number in range(4):
        change = paint(x, blurred, number) - x
        other = (change[:, 0] / VISIBLE).flatten(1).abs().amax(1) < 0.001
        rows.append(change[other, 1, 16])
    row = torch.cat(rows)
    row = row[row[:, 28].abs() > 0.5 * row[:, 22].abs()]
    change, further = row[:, 22], row[:, 26]
    assert change[change < 0].square().mean() == pytest.approx(0.4133 * 0.0625, rel=0.2)
    assert (change > 0).float().mean() == pytest.approx((0.15 / 2 + 0.3) / 0.45, abs=0.05)
    mottle = (change - further)[change < 0].square().mean()
    assert mottle == pytest.approx(0.4133 * 0.15**2 / 3 * vary_between((16, 22), (16, 26)), rel=0.25)


def test_the_shape_of_a_blob():
    """Radius 1.5 to 24 pixels on a log scale, an oval (log ratio of its axes 0.6), a rim of 1 pixel, at its place."""
    x = one_place(4000, 1, 96, 48, 48)
    shapes = paint_shapes(x)[:, 0].abs()
    peaks = shapes.flatten(1).amax(1)
    shapes = shapes[peaks > 0.02] / peaks[peaks > 0.02, None, None]
    areas = {level: (shapes > level).flatten(1).sum(1) for level in (0.25, 0.5, 0.75)}
    radii = (areas[0.5] / np.pi).sqrt()
    expected = {0.5: 6.8, 0.75: 12, 0.9: 18.2, 0.98: 22.7}  # half a pixel more for small ones: a soft rim
    for quantile, radius in expected.items():
        assert radii.quantile(quantile) == pytest.approx(radius, rel=0.13), quantile
    offsets = torch.arange(96.0) - 48
    down, along = ((shapes > 0.5).sum(axis) / areas[0.5][:, None] for axis in (2, 1))
    assert (down @ offsets).mean() == pytest.approx(0, abs=0.2)
    assert (along @ offsets).mean() == pytest.approx(0, abs=0.2)
    ratio = ((down @ offsets**2) / (along @ offsets**2)).sqrt().log()[radii > 5]
    assert ratio.mean() == pytest.approx(0, abs=0.05)
    assert ratio.std() == pytest.approx(0.6, rel=0.1)
    rim = ((areas[0.25] - areas[0.75]) / (2 * np.pi * radii))[radii > 8]
    assert 2.3 < rim.median() < 3.2  # 2 ln 3 = 2.2 of a sigmoid over 1 pixel, at half the resolution and ragged


def test_a_blob_is_thinner_in_the_slices_4_mm_away():
    """An ellipsoid: 2.56 pixels away its square radius is less by 2.56^2, stretched (E exp(2 N(0, 0.3)) = 1.2)."""
    x = one_place(1600, 3, 64, 32, 32)
    shapes = paint_shapes(x, 1).abs()
    peaks = shapes[:, 1].flatten(1).amax(1)
    shapes = shapes[peaks > 0.02] / peaks[peaks > 0.02, None, None, None]
    squares = (shapes > 0.5).flatten(2).sum(2) / np.pi
    below, middle, above = squares[(squares[:, 1] > 64) & (squares[:, 1] < 225)].T
    assert (middle - (below + above) / 2).mean() == pytest.approx(2.56**2 * 1.2, rel=0.25)
    assert ((above - below).abs() / middle.sqrt()).mean() == pytest.approx(4 * 2.56 * 0.35 * 1.2, rel=0.2)
    assert (above > below).float().mean() == pytest.approx(0.5, abs=0.05)


def test_small_blobs_come_in_company_of_the_small_ones_of_up_to_five_other_slices():
    """The k-th slice before lends its blob with a chance of (6 - k) / 7 if that is small: log_16(8 / 1.5) = 0.6."""
    places = [(row, column) for row in range(8, 128, 20) for column in range(8, 128, 20)]
    count, found = len(places), []
    for number in range(25):
        x = torch.zeros(count, 1, 128, 128)
        for i, (row, column) in enumerate(np.random.default_rng(number).permutation(places)):
            x[i, 0, row : row + 4, column : column + 4] = 1e-4
        shapes = paint_shapes(x, number)[:, 0].abs()
        at = torch.stack([shapes[:, x[i, 0] > 0].amax(1) for i in range(count)], 1)  # of slice i at the place of j
        lent = torch.stack([at[torch.arange(count), torch.arange(count) - k] for k in range(30)], 1)
        alone = (lent[:, 0] > 0.05) & (lent[:, 6:].amax(1) < 0.002)  # not a large one that covers other places too
        found.append(lent[alone] > 0.3 * lent[alone, :1])
    shares = torch.cat(found).float().mean(0)
    expected = [0.604 * (6 - k) / 7 for k in range(1, 6)]
    np.testing.assert_allclose(shares[1:6], expected, atol=0.07)
    assert shares[6:].max() == 0


def test_blobs_start_in_the_brain():
    x = torch.zeros(300, 1, 64, 64)
    x[:, :, 8:24, 40:56] = 1e-4
    shapes = paint_shapes(x)[:, 0].abs()
    peaks = shapes.flatten(1).argmax(1)[shapes.flatten(1).amax(1) > 0.02]
    inside = (peaks // 64 >= 6) & (peaks // 64 < 26) & (peaks % 64 >= 38) & (peaks % 64 < 58)
    assert inside.float().mean() > 0.85
