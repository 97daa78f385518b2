"""What healthy scans show: expected residuals by place and texture, thresholds, p-values."""

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from common.cli import DataError
from models.anomaly import compute_residual, find_largest_mass, find_median, score_scan, score_slices
from models.calibration import STATE_KEYS, VERSION, Calibration, compute_p_values, count_needed_scans
from tests.reference import calibrate_plainly, make_scan, map_scan

FAR_MM = 1000.0  # slices so far apart do not blur into each other


def as_tensors(scan):
    return torch.from_numpy(scan[0]), torch.from_numpy(scan[1]), scan[2]


def fit(scans):
    return Calibration.fit([as_tensors(scan) for scan in scans])


def read(scans) -> dict[str, np.ndarray]:
    """The arrays of the calibration with these scans by their names."""
    return {name: np.asarray(values) for name, values in vars(fit(scans)).items()}


def make_map(scan, calibration):
    """(n, H, W) as NumPy, of a scan as a new one."""
    return map_scan(*as_tensors(scan), calibration).numpy()


def score(scan, calibration):
    return score_scan(map_scan(*as_tensors(scan), calibration))


@pytest.fixture(scope="module")
def compared():
    """(the calibration, that of plain NumPy) of three scans: one with a residual of its own at one place."""
    scans = [make_scan(1), make_scan(2, slices=10), make_scan(3, offset=0.5)]
    return read(scans), calibrate_plainly(scans)


@pytest.mark.parametrize(
    ("name", "shape", "rtol"),
    [
        ("expected_residual", (2, 16, 32, 32), 0.01),
        ("texture_edges", (2, 11), 2e-3),
        ("intensity", (2, 16, 32, 32), 1e-4),
        ("scan_scores", (3,), 0.01),
        ("region_masses", (3,), 0.02),
        ("slice_scores", (34,), 0.015),
        ("voxel_threshold", (), 0.005),
    ],
)
def test_calibration_is_that_of_plain_numpy(compared, name, shape, rtol):
    fast, plain = (calibration[name] for calibration in compared)
    assert fast.shape == shape
    np.testing.assert_allclose(fast, plain, rtol=rtol)


def test_texture_is_that_of_plain_numpy(compared):
    """Some pixels stand so near a limit that they fall into the next bin."""
    fast, plain = (calibration["texture_factor"] for calibration in compared)
    assert fast.shape == (2, 12, 12)
    assert np.quantile(np.abs(fast / plain - 1), 0.9) < 0.01


def test_each_scan_is_mapped_with_what_the_others_show():
    """A residual that one scan alone has, always at one place, is as abnormal as in a new scan."""
    healthy = [make_scan(seed) for seed in (1, 2, 3)]
    odd = make_scan(4, offset=0.5)
    as_new = score(odd, fit(healthy))
    as_known = score(odd, fit([*healthy, odd]))
    scores = read([*healthy, odd])["scan_scores"]
    assert as_known < 0.7 * as_new
    assert scores[-1] > 0.95 * as_new


def make_striped(seed: int, strength: float, column: int):
    """A brain that fills the slices, with one dark stripe, which is drawn badly: (stack, reconstruction, spacing)."""
    rng = np.random.default_rng(seed)
    dark = (np.arange(32) >= column) & (np.arange(32) < column + 5)
    drawn = np.broadcast_to(np.where(dark, 0.3, 0.7), (8, 32, 32)).astype(np.float32)
    error = rng.normal(size=drawn.shape) * np.where(dark, strength, 0.02)
    return (drawn + error).clip(0.01).astype(np.float32), drawn.copy(), (4.0, 3.0)


def test_each_scan_is_mapped_with_the_textures_of_the_others():
    """Dark tissue elsewhere in each scan, drawn badly in one alone: its place says nothing, its texture would."""
    healthy = [make_striped(seed, 0.02, column) for seed, column in enumerate((4, 14, 24))]
    odd = make_striped(9, 0.2, 19)
    known = fit([*healthy, odd])
    as_new = score(odd, replace(fit(healthy), voxel_threshold=known.voxel_threshold))
    assert score(odd, known) < 0.8 * as_new
    assert known.scan_scores[-1] == pytest.approx(as_new, rel=0.1)


def test_textures_that_are_drawn_badly_in_all_scans_count_less():
    scans = [make_striped(seed, 0.1, column) for seed, column in enumerate((2, 8, 14, 20, 26))]
    _, drawn, sampling_mm = make_striped(9, 0.02, 11)
    lesion = np.zeros(drawn.shape, bool)
    lesion[:, 14:17, 12:15] = lesion[:, 14:17, 21:24] = True
    anomaly = make_map(((drawn + 0.2 * lesion).astype(np.float32), drawn, sampling_mm), fit(scans))
    assert anomaly[4, 15, 22] > 2 * anomaly[4, 15, 13]


def test_places_that_are_drawn_badly_in_all_scans_count_less():
    scans = [make_scan(seed) for seed in (1, 2, 3)]  # twice as badly where x > 0
    drawn = np.where(scans[0][0] > 0, 0.6, 0).astype(np.float32)
    lesion = np.zeros(drawn.shape, bool)
    lesion[4:6, 14:17, 9:12] = lesion[4:6, 14:17, 20:23] = True
    anomaly = make_map(((drawn + 0.2 * lesion).astype(np.float32), drawn, scans[0][2]), fit(scans))
    assert anomaly[5, 15, 10] > 1.4 * anomaly[5, 15, 21]


def test_where_no_scan_has_brain_the_overall_mean_is_expected():
    """Worked by hand: of six slices' 16 x 16 pixels, 3 x 3 are 0.2 too bright in each, 2 x 3 0.1 too dark."""
    stack = np.zeros((6, 64, 64), np.float32)
    stack[:, :16, :16] = 0.5
    drawn = stack.copy()
    drawn[:, 1:4, 1:4] -= 0.2
    drawn[:, 8:10, 2:5] += 0.1
    sampling_mm = (FAR_MM, 100.0)  # nothing blurs: and as most residuals are 0, there is no shading
    expected = read([(stack, drawn, sampling_mm)] * 2)["expected_residual"]
    pixels = 15  # what has no residual at all does not count
    np.testing.assert_allclose(expected[0, :, -1, -1], np.sqrt(9 * 0.04 / pixels), rtol=1e-4)
    np.testing.assert_allclose(expected[1, :, -1, -1], np.sqrt(6 * 0.01 / pixels), rtol=1e-4)


def test_the_overall_mean_counts_for_half_a_scan():
    """Two scans that err by +0.2 everywhere at one level and not at the others, seen far from that level's edge."""
    stack = np.full((16, 24, 24), 0.5, np.float32)
    drawn = stack.copy()
    drawn[3] -= 0.2
    expected = read([(stack, drawn, (FAR_MM, 1000.0))] * 2)["expected_residual"]
    near = np.exp(-0.5 * np.arange(-4, 5) ** 2.0)
    near /= near.sum()  # a Gaussian of one level; only what differs from 0 is counted
    for level in range(8):
        weight = 2 * near[level - 3 + 4]
        assert expected[0, level, 12, 12] == pytest.approx(
            np.sqrt((weight * 0.04 + 0.5 * 0.04) / (weight + 0.5)), rel=1e-3
        )
        assert expected[1, level, 12, 12] == 0


def test_one_validation_scan_is_mapped_with_itself():
    scan = make_scan(1)
    calibration = fit([scan])
    anomaly = map_scan(*as_tensors(scan), calibration)
    assert calibration.normal_scans == 1
    assert calibration.scan_scores.tolist() == pytest.approx([score_scan(anomaly)])
    np.testing.assert_allclose(calibration.slice_scores, score_slices(anomaly).sort().values, rtol=1e-5)
    brain = scan[0] > 0
    smoothed = make_map(scan, replace(calibration, voxel_threshold=np.inf))
    flagged = (smoothed > calibration.voxel_threshold)[brain].mean()
    assert flagged == pytest.approx(0.002, abs=1 / brain.sum())


def test_scores_are_sorted():
    scans = [make_scan(seed, offset=offset) for seed, offset in ((1, 0.5), (2, 0.0), (3, 0.3))]
    for name in ("scan_scores", "slice_scores"):
        values = read(scans)[name]
        assert (np.diff(values) >= 0).all()
        assert values[0] < values[-1]


def test_every_brain_weighs_as_much_in_the_threshold():
    """However many pixels it has: the share of flagged pixels is the mean of the scans' shares."""
    large, small = make_scan(1, slices=24), make_scan(2, slices=6, offset=0.5)
    plain, fast = calibrate_plainly([large, small]), read([large, small])
    assert fast["voxel_threshold"] == pytest.approx(plain["voxel_threshold"], rel=0.01)


def test_intensity_by_hand():
    """Two scans of 0.4 and 0.6: inside, two scans' mean and half a scan's, which is the same, and their deviation."""
    stacks = [np.zeros((16, 48, 48), np.float32) for _ in range(2)]
    for stack, value in zip(stacks, (0.4, 0.6), strict=True):
        stack[:, :24, :24] = value
    intensity = read([(stack, stack, (2.0, 1.5)) for stack in stacks])["intensity"]
    np.testing.assert_allclose(intensity[0], 0.5, rtol=1e-5)
    np.testing.assert_allclose(intensity[1], 0.1, rtol=1e-3)


def test_intensity_varies_by_place_and_by_no_less_than_a_hundredth():
    stack = np.zeros((16, 48, 48), np.float32)
    stack[:, :24, :24] = np.linspace(0.4, 0.7, 16)[:, None, None]
    mean, deviation = read([(stack, stack, (2.0, 1.5))] * 2)["intensity"]
    np.testing.assert_allclose(mean[:, 12, 12], 0.8 * stack[:, 12, 12] + 0.2 * 0.55, atol=2e-3)  # 2 scans of 2 1/2
    same = np.where(stack > 0, np.float32(0.5), 0)
    assert read([(same, same, (2.0, 1.5))] * 2)["intensity"][1] == pytest.approx(0.01, rel=1e-4)
    assert (deviation[0, 12, 12] ** 2) == pytest.approx(
        0.8 * 0.16 + 0.2 * (stack[stack > 0] ** 2).mean() - mean[0, 12, 12] ** 2, abs=2e-3
    )


def make_calibration(scan_scores, slice_scores=(0.0,)):
    """A calibration of these scores alone."""
    nothing = torch.zeros(1)
    scores = (torch.tensor(values).float() for values in (scan_scores, slice_scores))
    return Calibration(nothing, nothing, nothing, nothing, *scores, 5.0, torch.ones(2), torch.ones(2))


def test_p_values_by_hand():
    """(1 + how many are as high) / 5, where equal ones are as high."""
    calibration = make_calibration([1.0, 2.0, 2.0, 5.0], [1.0, 3.0])
    scores = [0.5, 1, 1.5, 2, 3, 5, 9]
    expected = np.array([5, 5, 4, 4, 2, 2, 1]) / 5
    assert calibration.p_values_of_scans(scores).tolist() == pytest.approx(list(expected))
    assert calibration.p_values_of_scans(torch.tensor(scores)).tolist() == pytest.approx(list(expected))
    assert calibration.p_values_of_scans(3.0).item() == pytest.approx(0.4)
    assert calibration.p_values_of_slices([0, 2, 4]).tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    assert compute_p_values([3.0], torch.zeros(0)).tolist() == [1]


def test_a_rate_of_1_in_20_can_be_reached():
    """The p-value is 1/20 to the last digit: in float32 it would be above 0.05."""
    assert compute_p_values(20.0, torch.arange(19.0)).item() <= 0.05


@pytest.mark.parametrize(("rate", "score"), [(0.1, 9), (0.15, 9), (0.2, 8), (0.3, 7), (0.9, 1)])
def test_scores_above_the_flag_score_are_flagged(rate, score):
    """Of ten scans, nine healthy ones that score 1 to 9 and a new one above all, one in ten is as high."""
    calibration = make_calibration(list(range(1, 10)), [30])
    assert calibration.flag_score("scan", rate) == score
    above, at = calibration.p_values_of_scans([score + 0.5, score]).tolist()
    assert above <= rate < at


def test_no_score_is_flagged_at_a_rate_that_needs_more_scans():
    calibration = make_calibration(list(range(1, 10)), [30])
    assert calibration.flag_score("scan", 0.09) is None
    assert calibration.flag_score("slice", 0.5) == 30
    assert calibration.flag_score("slice", 0.49) is None


@pytest.mark.parametrize(
    ("rate", "needed"), [(0.05, 19), (0.1, 9), (0.07, 14), (0.001, 999), (0.5, 1), (1.0, 0), (1 / 49, 48), (0.04, 24)]
)
def test_a_p_value_needs_so_many_healthy_scans(rate, needed):
    assert count_needed_scans(rate) == needed
    assert 1 / (needed + 1) <= rate + 1e-9, "the smallest p-value there is"
    assert needed == 0 or 1 / needed > rate, "and one scan less would not do"


def test_false_positives_come_at_the_asked_rate():
    rng = np.random.default_rng(0)
    for rate in (0.05, 0.2):
        flagged = [
            compute_p_values(rng.gamma(3), torch.from_numpy(np.sort(rng.gamma(3, size=39)))) <= rate
            for _ in range(2000)
        ]
        interval = binomtest(int(np.sum(flagged)), len(flagged)).proportion_ci(0.99)
        assert interval.low <= rate <= interval.high


def test_the_scans_are_not_changed():
    scans = [make_scan(1), make_scan(2)]
    before = [[part.copy() for part in scan[:2]] for scan in scans]
    fit(scans)
    for scan, copies in zip(scans, before, strict=True):
        np.testing.assert_array_equal(scan[0], copies[0])
        np.testing.assert_array_equal(scan[1], copies[1])


def test_model_pt_keeps_it_under_its_old_names():
    calibration = fit([make_scan(1), make_scan(2)])
    state = calibration.to_state()
    old = ["expected", "looks", "by_look", "intensity", "scan_scores", "slice_scores", "threshold"]
    assert list(state) == [*old, "median_residuals", "region_masses", "version"]
    for name, values in list(state.items())[:-1]:
        assert values.dtype == torch.float32, name
        assert torch.isfinite(values).all(), name
        assert values.untyped_storage().nbytes() == 4 * values.numel(), "no more is written than it holds"
    again = Calibration.from_state(state)
    assert isinstance(again.voxel_threshold, float)
    for name, values in vars(calibration).items():
        np.testing.assert_array_equal(np.float32(getattr(again, name)), np.float32(values))
    assert torch.equal(state["by_look"], calibration.texture_factor)
    assert torch.equal(state["looks"], calibration.texture_edges)


@pytest.mark.parametrize(("name", "key"), STATE_KEYS.items())
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_calibration_of_no_numbers_is_neither_written_nor_read(name, key, value):
    good = make_calibration([1.0, 2.0])
    values = torch.as_tensor(getattr(good, name)).clone()
    values.view(-1)[0] = value
    words = f"the {name.replace('_', ' ')} of its calibration is not finite"
    with pytest.raises(DataError, match=words):
        replace(good, **{name: values}).to_state()
    with pytest.raises(DataError, match=words):
        Calibration.from_state(good.to_state() | {key: values})


@pytest.mark.parametrize("version", [None, VERSION - 1, VERSION + 1])
def test_a_calibration_for_another_anomaly_map_is_refused(version):
    """Its scores and its threshold would be compared with those of a map that has others."""
    state = make_calibration([1.0]).to_state() | {"version": version}
    if version is None:
        del state["version"]  # as it was before there was one
    with pytest.raises(DataError, match=r"for another version of the anomaly map; calibrate it anew: .*calibrate\.py"):
        Calibration.from_state(state)


def test_nobody_changes_it():
    with pytest.raises(FrozenInstanceError):
        make_calibration([1.0]).voxel_threshold = 1.0


def test_it_moves_to_another_device():
    moved = fit([make_scan(1)]).to("meta")
    devices = {name: values.device.type for name, values in vars(moved).items() if name != "voxel_threshold"}
    assert set(devices.values()) == {"meta"}
    assert len(devices) == 8
    assert moved.voxel_threshold > 0


def test_the_median_residual_of_a_scan_is_over_what_is_expected():
    scans = [make_scan(seed) for seed in range(5)]
    calibration = fit(scans)
    assert calibration.median_residuals.shape == (5,)
    assert torch.equal(calibration.median_residuals, calibration.median_residuals.sort().values)
    stack, reconstruction, sampling_mm = as_tensors(make_scan(9))
    divided = calibration.divide(compute_residual(stack, reconstruction, sampling_mm), stack > 0)
    assert divided.isfinite().equal(stack > 0)
    normalised = calibration.normalise(compute_residual(stack, reconstruction, sampling_mm), stack > 0)
    median = find_median(divided[stack > 0])
    torch.testing.assert_close(normalised[stack > 0], divided[stack > 0] / median)
    assert calibration.median_residuals[0] * 0.8 < median < calibration.median_residuals[-1] * 1.2


def test_a_scan_fits_up_to_twice_as_far_from_the_median_as_the_highest_healthy_one():
    calibration = replace(fit([make_scan(1), make_scan(2)]), median_residuals=torch.tensor([0.8, 1.0, 1.5]))
    assert calibration.measure_misfit(2.2) is None
    assert calibration.measure_misfit(2.3) == pytest.approx(2.3)


def test_the_mass_of_a_region_is_its_sum_times_a_pixels_volume():
    anomaly = torch.ones(3, 8, 8)
    anomaly[0, 1:3, 1:4] = 5.0  # one region of two slices
    anomaly[1, 2, 3:6] = 4.0
    anomaly[2, 7, 7] = 30.0  # touches nothing
    anomaly[:, :, 0] = torch.nan
    anomaly[1, 3, 4] = 3.9
    assert find_largest_mass(anomaly, 4.0, (3.0, 2.0)) == pytest.approx((6 * 5 + 3 * 4) * 3 * 2 * 2 / 1000)
    assert find_largest_mass(anomaly, 31.0, (3.0, 2.0)) == 0


def test_a_region_is_compared_with_the_largest_of_each_healthy_scan():
    calibration = replace(make_calibration([1.0] * 4), region_masses=torch.tensor([0.0, 2.0, 3.0, 9.0]))
    assert calibration.p_values_of_regions([10.0, 9.0, 2.5, 0.1]) == [1 / 5, 2 / 5, 3 / 5, 4 / 5]
    assert calibration.p_values_of_regions([]) == []
