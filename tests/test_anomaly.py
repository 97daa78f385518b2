"""Residual, anomaly map and scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm

from models.anomaly import compute_residual, score_mse, score_scan, score_slices, sharpen_map
from models.calibration import LEVELS, TEXTURE_BINS, Calibration
from tests.reference import compare_plainly, make_scan, map_plainly, map_scan

FAR_MM = 1000.0  # slices so far apart do not blur into each other


def make_calibration(expected=1.0, edges=None, factor=1.0, size=32) -> Calibration:
    """A calibration by hand; numbers stand for arrays full of them. Nothing of a map is as high as its threshold."""
    return Calibration(
        expected_residual=torch.tensor(np.full((2, LEVELS, size, size), 1.0) * expected).float(),
        texture_edges=torch.zeros(2, TEXTURE_BINS - 1) if edges is None else torch.tensor(edges).float(),
        texture_factor=torch.tensor(np.full((2, TEXTURE_BINS, TEXTURE_BINS), 1.0) * factor).float(),
        intensity=torch.zeros(2, LEVELS, size, size),
        scan_scores=torch.zeros(1),
        slice_scores=torch.zeros(1),
        voxel_threshold=np.inf,
        median_residuals=torch.zeros(1),
        region_masses=torch.zeros(1),
    )


def as_tensors(*arrays):
    return tuple(torch.from_numpy(np.array(array)) for array in arrays)


def find_residual(stack, drawn, sampling_mm):
    """(n, H, W) signed, as NumPy."""
    return compute_residual(*as_tensors(stack, np.float32(drawn)), sampling_mm).values.numpy()


def make_map(stack, drawn, sampling_mm, calibration):
    """(n, H, W) as NumPy."""
    return map_scan(*as_tensors(stack, drawn), sampling_mm, calibration).numpy()


def calibrate(seeds):
    return Calibration.fit([(*as_tensors(*make_scan(seed)[:2]), make_scan(seed)[2]) for seed in seeds])


def draw_patches(slices=3, size=0.05):
    """(residual (n, 32, 32), the middles of its four patches, the first and last positive, the others negative).

    It is 0 on more than half of the pixels, so that none of it is shading.
    """
    residual = np.zeros((slices, 32, 32), np.float32)
    for row, column, sign in ((3, 3, 1), (3, 19, -1), (19, 3, -1), (19, 19, 1)):
        residual[:, row : row + 7, column : column + 7] = sign * size
    return residual, ((6, 6, 22, 22), (6, 22, 6, 22))


def test_mse_by_hand():
    stack = np.zeros((4, 4, 4), np.float32)
    stack[:2, 1:3, 1:3] = 0.5
    stack[3, 1, 1] = 0.7  # one brain pixel, of which 0.2 are drawn
    reconstruction = stack.copy()
    reconstruction[3, 1, 1] = 0.2
    reconstruction[1, 1, 1] = 0.1  # one of four brain pixels is 0.4 off
    reconstruction[1:, 0, 0] = 9.0  # outside the brain: does not count
    np.testing.assert_allclose(score_mse(*as_tensors(stack, reconstruction)), [0, 0.16 / 4, 0, 0.25], atol=1e-7)


def test_smoothing_of_one_bright_pixel_by_hand():
    """A Gaussian of 2 mm between slices as within them."""
    stack = np.full((9, 48, 48), 0.5, np.float32)
    drawn = stack.copy()
    drawn[4, 20, 28] -= 0.3  # brighter than drawn: positive
    residual = find_residual(stack, drawn, (4.0, 1.0))
    assert residual.dtype == np.float32
    assert residual.sum() == pytest.approx(0.3, rel=1e-4)
    peak = residual[4, 20, 28]
    assert peak == residual.max()
    for place, millimetres in (((5, 20, 28), 4), ((4, 23, 28), 3), ((4, 20, 27), 1)):
        assert residual[place] / peak == pytest.approx(np.exp(-((millimetres / 2) ** 2) / 2), rel=1e-4), place


def test_the_rim_is_faded_in():
    """A pixel's residual counts by 2 x (the brain's share around it) - 1: 0 at a straight rim, 1 deep inside."""
    stack = np.full((2, 96, 64), 0.5, np.float32)
    stack[:, :, :20] = 0
    drawn = stack.copy()
    drawn[:, :32] -= 0.2  # in less than half of the brain, so that none of it is shading
    residual = find_residual(stack, drawn, (FAR_MM, 1.0))[0, 10]
    assert (residual[:20] == 0).all()
    inside = np.arange(44) + 0.5  # pixels from the rim
    np.testing.assert_allclose(residual[20:50], 0.2 * (2 * norm.cdf(inside / 2) - 1)[:30], atol=1e-3)


def test_a_lone_pixel_has_hardly_a_texture():
    """Means are over the brain; where it is less than a tenth of what lies around, as if it were a tenth."""
    stack = np.zeros((1, 48, 48), np.float32)
    stack[0, 24, 24] = 0.5
    residual, texture = compute_residual(*as_tensors(stack, stack), (FAR_MM, 1.0))
    share = 1 / (2 * np.pi * 2.0**2)  # the peak of a Gaussian of 2 pixels
    assert texture[0, 0, 24, 24].item() == pytest.approx(0.5 * share / 0.1, rel=1e-3)
    assert residual.abs().max() == 0


def test_waves_of_centimetres_are_shading_by_hand():
    """A Gaussian mean of 20 mm keeps exp(-2 (20 pi / wavelength)^2) of a wave, and that is taken off.

    All but a part in 51, for the weight of the brain there counts 0.02 more than it is.
    """
    for wavelength, left in ((100, 1 - np.exp(-0.08 * np.pi**2) / 1.02), (50, 1 - np.exp(-0.32 * np.pi**2) / 1.02)):
        stack = np.full((2, 32, 256), 0.5, np.float32)
        wave = 0.1 * np.cos(2 * np.pi * (np.arange(256) - 127.5) * 1.5625 / wavelength)
        residual = find_residual(stack, stack - wave, (FAR_MM, 1.5625))
        inner = np.s_[:, 10:22, 100:156]
        ratio = residual[inner].max() / (0.1 * np.exp(-2 * (2 * np.pi / wavelength) ** 2))  # less the 2 mm
        assert ratio == pytest.approx(left, rel=0.03), wavelength


def test_of_a_large_lesion_four_medians_are_shading():
    """Where a lesion of 0.5 is much wider than 20 mm and the median residual 0.02, 0.08 of it are taken off."""
    stack = np.full((2, 208, 208), 0.8, np.float32)
    rows, columns = np.indices((208, 208)) - 103.5
    lesion = np.hypot(rows, columns) < 60
    drawn = stack - np.where(lesion, 0.5, 0.02).astype(np.float32)
    residual = find_residual(stack, drawn, (FAR_MM, 1.0))
    assert residual[0, 104, 104] == pytest.approx(0.5 - 0.08 / 1.02, abs=0.003)
    assert residual[0, 4, 4] == pytest.approx(0.02 - 0.02 / 1.02, rel=0.05)


def test_shading_is_the_same_over_neighbouring_slices():
    """It goes on over 20 mm between slices too: what only one slice in ten shows stays."""
    stack = np.full((21, 32, 32), 0.5, np.float32)
    drawn = stack - 0.02 * (-1) ** np.arange(21, dtype=np.float32)[:, None, None]
    drawn[10] = 0.45
    weights = np.exp(-0.5 * ((np.arange(21) - 10) * 4 / 20) ** 2)
    expected = 0.05 - (weights / weights.sum() * (stack - drawn)[:, 0, 0]).sum() / 1.02
    residual = find_residual(stack, drawn, (4.0, 1000.0))  # σ of 1/2 slice blurs them a little
    near = np.exp(-2 * np.abs(np.arange(21) - 10.0) ** 2)
    blurred = (near / near.sum() * (stack - drawn)[:, 0, 0]).sum()
    assert residual[10, 16, 16] == pytest.approx(expected - 0.05 + blurred, abs=0.002)


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_residual_and_texture_are_those_of_plain_scipy(offset):
    stack, drawn, sampling_mm = make_scan(1, offset=offset)
    residual, texture = (part.numpy() for part in compute_residual(*as_tensors(stack, drawn), sampling_mm))
    plain, mean, deviation = compare_plainly(stack, drawn, sampling_mm)
    brain = stack > 0
    assert residual.dtype == texture.dtype == np.float32
    np.testing.assert_allclose(residual, plain, atol=0.02 * np.abs(plain[brain]).mean())
    np.testing.assert_allclose(texture[0][brain], mean[brain], atol=1e-4)
    np.testing.assert_allclose(texture[1][brain], deviation[brain], atol=1e-3)


def test_a_lesion_stands_out_of_its_shading():
    stack = np.full((24, 96, 96), 0.5, np.float32)
    lesion = np.zeros(stack.shape, bool)
    lesion[8:14, 44:52, 44:52] = True
    shading = 0.1 * np.linspace(-1, 1, 96, dtype=np.float32)
    residual = find_residual(stack + shading + 0.1 * lesion, stack, (2.0, 1.5))
    surroundings = np.s_[:, 30:40, 30:66]
    assert (
        np.abs(residual[surroundings]).mean() < 0.1 * np.abs(np.broadcast_to(shading, stack.shape)[surroundings]).mean()
    )
    assert residual[lesion].mean() > 0.06


def test_the_map_is_that_of_plain_scipy():
    calibration = calibrate((1, 2, 3))
    stack, drawn, sampling_mm = make_scan(4, offset=-0.3)
    mapped = make_map(stack, drawn, sampling_mm, calibration)
    plain = map_plainly(stack, drawn, sampling_mm, calibration)
    brain = stack > 0
    assert mapped.dtype == np.float32
    assert np.isnan(mapped[~brain]).all()
    error = np.abs(mapped - plain)[brain]  # a few pixels stand so near a limit that they fall into the next bin
    assert np.quantile(error, 0.98) < 0.01
    assert mapped[brain].min() == plain[brain].min() == 0, "no straight line goes below 0"


def test_the_map_is_in_units_of_its_median_whatever_the_contrast():
    stack, drawn, sampling_mm = make_scan(1, slices=24)
    brain = stack > 0
    calibration = replace(calibrate((2, 3)), voxel_threshold=np.inf)  # so weak a contrast has no core
    weak, strong = (
        make_map(*np.float32([brain * (0.5 + times * (stack - drawn)), brain * 0.5]), sampling_mm, calibration)
        for times in (1e-3, 3e-3)  # too little to be an edge
    )
    np.testing.assert_allclose(weak[brain], strong[brain], rtol=2e-3, atol=1e-3)
    assert np.median(weak[brain]) == pytest.approx(1, abs=0.02)


def map_patches(calibration, stack=0.5, slices=3, pixel_mm=6.0):
    """(n, 32, 32) map of the patches on a brain of these values, slices and pixels not blurring into each other."""
    residual, _ = draw_patches(slices)
    stack = np.zeros_like(residual) + np.float32(stack)
    return make_map(stack, stack - residual, (FAR_MM, pixel_mm), calibration)


def test_each_sign_is_divided_by_what_is_expected_of_it():
    mapped = map_patches(make_calibration(np.array([2.0, 6.0])[:, None, None, None]))
    positive, negative = mapped[1, 6, 6], mapped[1, 6, 22]
    assert positive / negative == pytest.approx(3, rel=1e-3)


def test_each_place_is_divided_by_what_is_expected_there():
    expected = np.ones((1, 1, 32, 32))
    expected[..., :16, :16], expected[..., :16, 16:], expected[..., 16:, :16] = 2, 4, 8
    values = map_patches(make_calibration(expected))[1][draw_patches()[1]]
    np.testing.assert_allclose(values[3] / values, [2, 4, 8, 1], rtol=1e-3)


def test_levels_run_from_the_lowest_to_the_highest_slice():
    """31 slices on 16 levels: each second one stands half between two of them."""
    assert LEVELS == 16
    mapped = map_patches(make_calibration(np.arange(1, 17)[None, :, None, None]), slices=31)
    np.testing.assert_allclose(mapped[0, 6, 22] / mapped[:, 6, 22], 1 + np.arange(31) / 2, rtol=1e-3)


def test_a_single_slice_is_at_the_lowest_level():
    expected = np.ones((1, LEVELS, 32, 32))
    expected[:, 1:] = np.nan  # would be seen, were it asked
    expected[:, 1] = 7
    expected[:, 0, :, 16:] = 5
    mapped = map_patches(make_calibration(expected), slices=1)
    assert mapped[0, 6, 6] / mapped[0, 6, 22] == pytest.approx(5, rel=1e-3)


def test_each_texture_is_divided_by_what_is_expected_of_it():
    """The mean chooses the row of the table, the deviation its column: around the patches' rims it is larger."""
    stack = np.full((3, 32, 32), 0.4, np.float32)
    stack[:, 16:] = 0.6
    edges = np.stack([np.linspace(0.3, 0.5, TEXTURE_BINS - 1), np.linspace(0.01, 0.9, TEXTURE_BINS - 1)])
    table = np.ones((2, TEXTURE_BINS, TEXTURE_BINS))
    # the patches' middles are drawn 0.35 and 0.45 in the dark half, 0.65 and 0.55 in the bright one
    table[0, 3, 0], table[1, 8, 0], table[1, 11, 0], table[0, 11, 0] = 2, 4, 8, 16
    edges[0] += 0.005
    values = map_patches(make_calibration(1.0, edges, table), stack)[1][draw_patches()[1]]
    np.testing.assert_allclose(values[0] / values, [1, 2, 4, 8], rtol=1e-3)


def test_what_deviates_has_a_texture_of_its_own():
    """A chequered reconstruction of 0.5 +- 0.1 deviates by 0.1; the mean stays."""
    chequered = 0.5 + 0.1 * (-1.0) ** np.indices((32, 32)).sum(0)
    stack = np.where(np.arange(32) < 16, chequered, 0.5)
    edges = np.stack([np.linspace(0.9, 1, TEXTURE_BINS - 1), np.linspace(0.05, 0.99, TEXTURE_BINS - 1)])
    table = np.ones((2, TEXTURE_BINS, TEXTURE_BINS))
    table[:, 0, 1] = 7
    values = map_patches(make_calibration(1.0, edges, table), stack, pixel_mm=3.0)[1][draw_patches()[1]]
    assert values[1] / values[0] == pytest.approx(7, rel=0.01)


def test_the_map_is_smoothed_by_3_mm_twice_where_there_is_no_edge():
    """Expected is 1 at a cell of 2x2 pixels of a patch and 10,000 elsewhere: the map shows both Gaussians."""
    expected = np.full((1, 1, 32, 32), 1e4)
    expected[..., 22:24, 6:8] = 1
    mapped = map_patches(make_calibration(expected), pixel_mm=0.5)[1]
    cells = np.arange(16)  # of 1 mm
    weights = np.exp(-0.5 * ((cells[:, None] - cells) / 3) ** 2)
    weights /= weights.sum(1, keepdims=True)
    along = np.convolve((weights @ weights)[:, 3], [0.125, 0.75, 0.125], "same")  # a cell's two pixels look beside it
    assert mapped[22:24, 16:18].mean() / mapped[22:24, 6:8].mean() == pytest.approx(along[8] / along[3], rel=0.01)


def test_the_map_fills_a_lesion_up_to_its_edges():
    """A part of a lesion is drawn as it is: it stands out with the rest, and what is brighter around both does not."""
    stack = np.full((3, 64, 64), 0.8, np.float32)
    stack[:, 24:40, 20:40] = 0.5
    drawn = stack.copy()
    drawn[:, 24:40, 20:36] = 0.8
    mapped = make_map(stack, drawn, (FAR_MM, 1.5), make_calibration(size=64))[1]
    assert mapped[32, 20] > 4 * mapped[32, 19]
    assert mapped[32, 39] > 8 * mapped[32, 40]


def sharpen(values, stack, drawn, threshold=5.0, pixel_mm=1e-3):
    """The sharpened map of a row of cells, 4x4 pixels each, that have one core, being so near; a number is for all."""
    cells = np.ones((1, 4, 4 * len(values)), np.float32)
    parts = as_tensors(*(cells * np.repeat(np.resize(part, len(values)), 4) for part in (values, stack, drawn)))
    parts = [part.float() for part in parts]
    sharpened = sharpen_map(*parts, (FAR_MM, pixel_mm), threshold)
    assert sharpened.dtype == torch.float32
    return sharpened[0, 1, 1::4].numpy()


def test_what_stands_out_counts_as_far_as_it_looks_like_its_core():
    """Which is weighted by the square of the map: here 0.3 twice as high as 0.6 and 0.7, where 0.7 is drawn."""
    values = sharpen([1, 100, 100, 50, 50, np.nan], [0.9, 0.3, 0.3, 0.6, 0.7, 0], 0.7, threshold=40)
    weights = np.array([1, 1, 0.25, 0.25]) / 2.5
    stack = np.array([0.3, 0.3, 0.6, 0.7])
    core, contrast = (weights * stack).sum(), (weights * (stack - 0.7) ** 2).sum()
    np.testing.assert_allclose(values[1:5], [100, 100, 50, 50] / (1 + (stack - core) ** 2 / contrast), rtol=1e-4)
    assert values[0] == 1
    assert np.isnan(values[5])


def test_what_differs_from_its_core_as_much_as_that_from_what_is_drawn_counts_half():
    values = sharpen([1000, 100], [0.3, 0.7], 0.7, threshold=45)
    assert values[1] == pytest.approx(45 + (100 / 2 - 45) ** 2 / (0.4 * 1e3 - 45), rel=0.02)
    assert sharpen([1000, 80], [0.3, 0.7], 0.7, threshold=45)[1] == pytest.approx(40, rel=0.02), "below the threshold"


def test_what_is_low_beside_its_core_is_bent_towards_the_threshold():
    """From 0.4 of the core on nothing changes; below, the square of the share of the way from the threshold is left."""
    values = sharpen([1000, 1000, 401, 200, 5, 4.9], 0.4, 0.8)
    core = (2 * 1e9 + 401**3 + 200**3 + 2 * 5**3) / (2 * 1e6 + 401**2 + 200**2 + 2 * 5**2)
    assert 0.4 * core < 401
    wanted = [1000, 1000, 401, 5 + 195**2 / (0.4 * core - 5), 5, 4.9]
    np.testing.assert_allclose(values, wanted, rtol=1e-4)
    weak = [12, 6, 5.1]  # 0.4 of it is below the threshold
    np.testing.assert_allclose(sharpen(weak, 0.4, 0.8), weak, rtol=1e-4)


def test_the_core_is_what_stands_out_within_10_mm():
    """90 mm away from a strong dark lesion a weak bright one has its own; what does not stand out is of no core."""
    values = np.full(61, 2.4, np.float32)  # just below half the threshold
    stack = np.full(61, 0.5, np.float32)
    values[5], values[35], stack[5], stack[35] = 1000, 10, 0.2, 0.8
    apart = sharpen(values, stack, 0.5, pixel_mm=0.75)
    np.testing.assert_allclose(apart[[5, 35]], [1000, 10], rtol=1e-3)
    near = sharpen(values, stack, 0.5, pixel_mm=0.25)
    seen = np.exp(-0.5 * 3**2) * 1e4  # the strong one's weight at the weak one, whose own is 1
    core, contrast = (0.2 * seen + 0.8) / (seen + 1), 0.3**2
    assert near[35] == pytest.approx(10 / (1 + (0.8 - core) ** 2 / contrast), rel=0.01)
    np.testing.assert_array_equal(np.delete(near, [5, 35]), np.delete(values, [5, 35]))
    assert np.isnan(sharpen([np.nan, np.nan], 0.0, 0.0)).all()


def test_a_planted_lesion_stands_out_of_its_surroundings():
    stack, drawn, sampling_mm = make_scan(1)
    calibration = calibrate((2, 3))
    lesion = np.zeros(stack.shape, bool)
    lesion[5:8, 12:19, 13:20] = True
    healthy = make_map(stack, drawn, sampling_mm, calibration)
    mapped = make_map(np.where(lesion, stack - 0.3, stack), drawn, sampling_mm, calibration)
    assert lesion[np.unravel_index(np.nanargmax(mapped), mapped.shape)]
    assert np.median(mapped[lesion]) > 4 * np.nanmedian(mapped[~lesion])
    assert score_scan(torch.from_numpy(mapped)) > 1.5 * score_scan(torch.from_numpy(healthy))
    scores = score_slices(torch.from_numpy(mapped))
    assert scores[5:8].min() > scores[[0, 1, 2, 10, 11]].max()


def test_an_empty_stack_has_no_anomaly():
    empty = np.zeros((2, 32, 32), np.float32)
    assert (find_residual(empty, empty, (2.0, 1.5)) == 0).all()
    mapped = make_map(empty, empty, (2.0, 1.5), make_calibration())
    assert np.isnan(mapped).all()
    assert score_scan(torch.from_numpy(mapped)) == 0
    assert (score_slices(torch.from_numpy(mapped)) == 0).all()


def test_a_perfect_reconstruction_has_no_anomaly():
    stack = make_scan(1)[0]
    mapped = make_map(stack, stack, (2.0, 1.5), make_calibration())
    assert (mapped[stack > 0] == 0).all()


def test_scores_by_hand():
    """Of a slice the mean of the worst 1 %, of a scan that of the worst 0.2 %; what is no brain does not count."""
    values = np.full((2, 25, 48), np.nan, np.float32)
    values[0].flat[100:1100] = np.random.default_rng(0).permutation(1000)
    values[1].flat[:500] = 2000 + np.arange(500)
    values = torch.from_numpy(values)
    np.testing.assert_allclose(score_slices(values), [np.mean(range(990, 1000)), 2000 + np.mean(range(495, 500))])
    assert score_scan(values) == pytest.approx(2000 + np.mean([497, 498, 499]))  # 3 of 1,500
    assert score_scan(values[:1]) == pytest.approx(998.5)  # 2 of 1,000
    assert score_scan(torch.arange(1250.0)) == 1248.5  # 2.5 are 2, as Python rounds


def test_at_least_one_pixel_scores():
    values = torch.full((1, 3, 3), torch.nan)
    values[0, 1] = torch.tensor([1.0, 7, 3])
    assert score_scan(values) == 7
    np.testing.assert_array_equal(score_slices(values), [7])
