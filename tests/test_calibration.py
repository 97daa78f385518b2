"""What healthy scans show: expected residuals by place and texture, thresholds, p-values."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from models.anomaly import calibrate, count_needed, give_p_values, map_anomalies, score_scan, score_slices
from tests.reference import calibrate_plainly, make_scan

FAR_MM = 1000.0  # slices so far apart do not blur into each other


def read(calibration: dict) -> dict[str, np.ndarray]:
    """Its arrays by what they are."""
    names = {"limits": "looks", "by_texture": "by_look"}
    same = ("expected", "intensity", "scan_scores", "slice_scores", "threshold")
    return {name: calibration[key].numpy() for name, key in (names | {key: key for key in same}).items()}


@pytest.fixture(scope="module")
def compared():
    """(the calibration, that of plain NumPy) of three scans: one with a residual of its own at one place."""
    scans = [make_scan(1), make_scan(2, slices=10), make_scan(3, offset=0.4)]
    plain = calibrate_plainly(scans)
    return read(calibrate(scans)), plain | {"limits": plain["looks"], "by_texture": plain["by_look"]}


@pytest.mark.parametrize(
    ("name", "shape", "rtol"),
    [
        ("expected", (2, 16, 32, 32), 0.01),
        ("limits", (2, 11), 2e-3),
        ("intensity", (2, 16, 32, 32), 1e-4),
        ("scan_scores", (3,), 0.01),
        ("slice_scores", (34,), 0.015),
        ("threshold", (), 0.005),
    ],
)
def test_calibration_is_that_of_plain_numpy(compared, name, shape, rtol):
    fast, plain = (calibration[name] for calibration in compared)
    assert fast.shape == shape
    assert fast.dtype == np.float32
    np.testing.assert_allclose(fast, plain, rtol=rtol)


def test_texture_is_that_of_plain_numpy(compared):
    """Some pixels stand so near a limit that they fall into the next bin."""
    fast, plain = (calibration["by_texture"] for calibration in compared)
    assert fast.shape == (2, 12, 12)
    assert np.quantile(np.abs(fast / plain - 1), 0.9) < 0.01


def test_each_scan_is_mapped_with_what_the_others_show():
    """A residual that one scan alone has, always at one place, is as abnormal as in a new scan."""
    healthy = [make_scan(seed) for seed in (1, 2, 3)]
    odd = make_scan(4, offset=0.5)
    as_new = score_scan(map_anomalies(*odd, calibrate(healthy)))
    as_known = score_scan(map_anomalies(*odd, calibrate([*healthy, odd])))
    scores = read(calibrate([*healthy, odd]))["scan_scores"]
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
    as_new = score_scan(map_anomalies(*odd, calibrate(healthy)))
    as_known = score_scan(map_anomalies(*odd, calibrate([*healthy, odd])))
    assert as_known < 0.8 * as_new
    assert read(calibrate([*healthy, odd]))["scan_scores"][-1] == pytest.approx(as_new, rel=0.1)


def test_textures_that_are_drawn_badly_in_all_scans_count_less():
    scans = [make_striped(seed, 0.1, column) for seed, column in enumerate((2, 8, 14, 20, 26))]
    _, drawn, spacing_mm = make_striped(9, 0.02, 11)
    lesion = np.zeros(drawn.shape, bool)
    lesion[:, 14:17, 12:15] = lesion[:, 14:17, 21:24] = True
    anomaly = map_anomalies(drawn + 0.2 * lesion, drawn, spacing_mm, calibrate(scans))
    assert anomaly[4, 15, 22] > 2 * anomaly[4, 15, 13]


def test_places_that_are_drawn_badly_in_all_scans_count_less():
    scans = [make_scan(seed) for seed in (1, 2, 3)]  # twice as badly where x > 0
    drawn = np.where(scans[0][0] > 0, 0.6, 0).astype(np.float32)
    lesion = np.zeros(drawn.shape, bool)
    lesion[4:6, 14:17, 9:12] = lesion[4:6, 14:17, 20:23] = True
    anomaly = map_anomalies(drawn + 0.2 * lesion, drawn, scans[0][2], calibrate(scans))
    assert anomaly[5, 15, 10] > 1.4 * anomaly[5, 15, 21]


def test_where_no_scan_has_brain_the_overall_mean_is_expected():
    """Worked by hand: of six slices' 16 x 16 pixels, 3 x 3 are 0.2 too bright in each, 2 x 3 0.1 too dark."""
    stack = np.zeros((6, 64, 64), np.float32)
    stack[:, :16, :16] = 0.5
    drawn = stack.copy()
    drawn[:, 1:4, 1:4] -= 0.2
    drawn[:, 8:10, 2:5] += 0.1
    spacing_mm = (FAR_MM, 100.0)  # nothing blurs: and as most residuals are 0, there is no shading
    expected = read(calibrate([(stack, drawn, spacing_mm)] * 2))["expected"]
    pixels = 15  # what has no residual at all does not count
    np.testing.assert_allclose(expected[0, :, -1, -1], np.sqrt(9 * 0.04 / pixels), rtol=1e-4)
    np.testing.assert_allclose(expected[1, :, -1, -1], np.sqrt(6 * 0.01 / pixels), rtol=1e-4)


def test_the_overall_mean_counts_for_half_a_scan():
    """Two scans that err by +0.2 everywhere at one level and not at the others, seen far from that level's edge."""
    stack = np.full((16, 24, 24), 0.5, np.float32)
    drawn = stack.copy()
    drawn[3] -= 0.2
    expected = read(calibrate([(stack, drawn, (FAR_MM, 1000.0))] * 2))["expected"]
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
    calibration = calibrate([scan])
    anomaly = map_anomalies(*scan, calibration)
    values = read(calibration)
    assert values["scan_scores"] == pytest.approx([score_scan(anomaly)], rel=1e-5)
    np.testing.assert_allclose(values["slice_scores"], np.sort(score_slices(anomaly)), rtol=1e-5)
    flagged = (anomaly > values["threshold"])[scan[0] > 0].mean()
    assert flagged == pytest.approx(0.002, abs=1 / (scan[0] > 0).sum())


def test_scores_are_sorted():
    scans = [make_scan(seed, offset=offset) for seed, offset in ((1, 0.5), (2, 0.0), (3, 0.3))]
    for name in ("scan_scores", "slice_scores"):
        values = read(calibrate(scans))[name]
        assert (np.diff(values) >= 0).all()
        assert values[0] < values[-1]


def test_every_brain_weighs_as_much_in_the_threshold():
    """However many pixels it has: the share of flagged pixels is the mean of the scans' shares."""
    large, small = make_scan(1, slices=24), make_scan(2, slices=6, offset=0.5)
    plain, fast = calibrate_plainly([large, small]), read(calibrate([large, small]))
    assert fast["threshold"] == pytest.approx(plain["threshold"], rel=0.01)


def test_intensity_by_hand():
    """Two scans of 0.4 and 0.6: inside, two scans' mean and half a scan's, which is the same, and their deviation."""
    stacks = [np.zeros((16, 48, 48), np.float32) for _ in range(2)]
    for stack, value in zip(stacks, (0.4, 0.6), strict=True):
        stack[:, :24, :24] = value
    intensity = read(calibrate([(stack, stack, (2.0, 1.5)) for stack in stacks]))["intensity"]
    np.testing.assert_allclose(intensity[0], 0.5, rtol=1e-5)
    np.testing.assert_allclose(intensity[1], 0.1, rtol=1e-3)


def test_intensity_varies_by_place_and_by_no_less_than_a_hundredth():
    stack = np.zeros((16, 48, 48), np.float32)
    stack[:, :24, :24] = np.linspace(0.4, 0.7, 16)[:, None, None]
    mean, deviation = read(calibrate([(stack, stack, (2.0, 1.5))] * 2))["intensity"]
    np.testing.assert_allclose(mean[:, 12, 12], 0.8 * stack[:, 12, 12] + 0.2 * 0.55, atol=2e-3)  # 2 scans of 2 1/2
    same = np.where(stack > 0, np.float32(0.5), 0)
    assert read(calibrate([(same, same, (2.0, 1.5))] * 2))["intensity"][1] == pytest.approx(0.01, rel=1e-4)
    assert (deviation[0, 12, 12] ** 2) == pytest.approx(
        0.8 * 0.16 + 0.2 * (stack[stack > 0] ** 2).mean() - mean[0, 12, 12] ** 2, abs=2e-3
    )


def test_p_values_by_hand():
    """(1 + how many are as high) / 5, where equal ones are as high."""
    healthy = np.array([1.0, 2.0, 2.0, 5.0])
    scores = np.array([0.5, 1, 1.5, 2, 3, 5, 9])
    np.testing.assert_allclose(give_p_values(scores, healthy), np.array([5, 5, 4, 4, 2, 2, 1]) / 5)
    assert give_p_values(np.array([3.0]), np.array([])) == [1]


@pytest.mark.parametrize(
    ("rate", "needed"), [(0.05, 19), (0.1, 9), (0.07, 14), (0.001, 999), (0.5, 1), (1.0, 0), (1 / 49, 48), (0.04, 24)]
)
def test_a_p_value_needs_so_many_healthy_scans(rate, needed):
    assert count_needed(rate) == needed
    assert 1 / (needed + 1) <= rate + 1e-9, "the smallest p-value there is"
    assert needed == 0 or 1 / needed > rate, "and one scan less would not do"


def test_false_positives_come_at_the_asked_rate():
    rng = np.random.default_rng(0)
    for rate in (0.05, 0.2):
        flagged = [
            (give_p_values(rng.gamma(3, size=1), np.sort(rng.gamma(3, size=39))) <= rate)[0] for _ in range(2000)
        ]
        interval = binomtest(int(np.sum(flagged)), len(flagged)).proportion_ci(0.99)
        assert interval.low <= rate <= interval.high


def test_the_scans_are_not_changed():
    scans = [make_scan(1), make_scan(2)]
    before = [[part.copy() for part in scan[:2]] for scan in scans]
    calibrate(scans)
    for scan, copies in zip(scans, before, strict=True):
        np.testing.assert_array_equal(scan[0], copies[0])
        np.testing.assert_array_equal(scan[1], copies[1])


def test_all_is_finite_float32():
    for name, values in calibrate([make_scan(1), make_scan(2)]).items():
        assert values.dtype == torch.float32, name
        assert torch.isfinite(values).all(), name
