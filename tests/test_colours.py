"""One colour scale for an anomaly map, everywhere."""

import numpy as np
import pytest

from evaluation.colours import ANOMALY_COLOURS, HIGHEST, LOWEST, list_ticks, overlay, place_on_scale

GREY = 0.5


def test_each_doubling_is_a_step_of_the_scale():
    anomaly = np.array([np.nan, 0.0, 2.0, 4.0, 8.0, 16.0, 64.0, 1000.0])
    np.testing.assert_allclose(place_on_scale(anomaly, 4.0), [0, 0, 0, 0.2, 0.4, 0.6, 1, 1])
    assert list_ticks(4.0) == [2, 4, 8, 16, 32, 64] == [4 * LOWEST, 4, 8, 16, 32, 4 * HIGHEST]


def test_an_overlay_begins_at_half_the_threshold_and_is_the_stronger_the_higher_the_anomaly():
    slice_ = np.full((1, 6), 0.4)
    anomaly = np.array([[np.nan, 1.9, 2.0, 4.0, 8.0, 1000.0]])
    drawn = overlay(slice_, anomaly, 4.0)[0]
    np.testing.assert_allclose(drawn[0], GREY)
    np.testing.assert_allclose(drawn[1:3], 0.4, err_msg="up to half the threshold, the slice alone")
    for i, share, opacity in ((3, 0.2, 0.45), (4, 0.4, 0.85), (5, 1.0, 0.85)):
        wanted = 0.4 * (1 - opacity) + np.array(ANOMALY_COLOURS(share)[:3]) * opacity
        np.testing.assert_allclose(drawn[i], wanted, atol=1e-6)
    assert overlay(np.zeros((2, 3, 4)), np.zeros((2, 3, 4)), 1).shape == (2, 3, 4, 3)


def test_the_colours_rise_in_lightness_so_that_they_read_in_grey():
    lightness = ANOMALY_COLOURS(np.linspace(0, 1, 256))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > -1e-3).all()
    assert lightness[-1] > 0.9 > 0.2 > lightness[0]
    assert ANOMALY_COLOURS(0.2)[0] == pytest.approx(max(ANOMALY_COLOURS(0.2)[:3])), "red prevails at the threshold"
