"""Pictures of slices show what is there: which slice, which side, which sign, which colour."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import same_color

from evaluation.colours import overlay
from evaluation.panels import draw_montage, draw_panels, draw_scan, find_crop
from tests.predictions import make_prediction, restore_map

SKY_BLUE, WHITE, GREY = "#56B4E9", "#FFFFFF", 0.5
THRESHOLD = 4.0


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def find_pictures(figure: plt.Figure) -> list[plt.Axes]:
    """The axes with pictures, not the colour bars, in the order in which they were drawn."""
    return [axis for axis in figure.axes if axis.images]


def find_letters(axis: plt.Axes) -> dict[str, tuple[float, float]]:
    """Where on the drawn axis L and R stand, as shares of its width and height from the lower left."""
    to_shares = axis.transAxes.inverted()
    return {
        text.get_text(): tuple(to_shares.transform(text.get_transform().transform(text.get_position())))
        for text in axis.texts
        if text.get_text() in ("L", "R")
    }


def find_outlines(axis: plt.Axes, colour: str) -> list[np.ndarray]:
    """The points (n, 2) as x and y of the lines of this colour drawn on an axis."""
    return [
        np.concatenate([path.vertices for path in one.get_paths()])
        for one in axis.collections
        if same_color(one.get_edgecolor()[0], colour)
    ]


def draw_canvas(prediction, **changes) -> tuple[plt.Axes, np.ndarray]:
    """(the axis of a montage, its picture as it is seen, the first row on top)."""
    (axis,) = find_pictures(draw_montage(replace(prediction, **changes), "a title with $ and _"))
    assert axis.images[0].origin == "upper"
    return axis, np.asarray(axis.images[0].get_array())


def test_a_panel_shows_slice_reconstruction_residual_and_anomaly():
    prediction = make_prediction()
    axes = find_pictures(draw_panels(prediction, [4], "title"))
    assert [axis.get_title() for axis in axes] == ["slice", "reconstruction", "signed residual", "anomaly map"]
    shown = [axis.images[0].get_array() for axis in axes]
    np.testing.assert_allclose(shown[0], prediction.scan.stack[4])
    np.testing.assert_allclose(shown[1], prediction.reconstruction[4])
    np.testing.assert_allclose(shown[3], overlay(prediction.scan.stack[4], prediction.maps["score"][4], THRESHOLD))
    lefts = [axis.get_position().x0 for axis in axes]
    assert lefts == sorted(lefts)
    for axis in axes[:2]:
        assert axis.images[0].get_clim() == (0, 1)
        assert axis.images[0].cmap.name == "gray"


def test_panels_have_the_nose_up_and_the_subjects_left_on_the_left():
    figure = draw_panels(make_prediction(), [4], "title")
    for axis in find_pictures(figure):
        assert axis.images[0].origin == "lower"
        assert not axis.xaxis_inverted()
        assert not axis.yaxis_inverted()
        letters = find_letters(axis)
        assert letters["L"] == pytest.approx((0.04, 0.5))
        assert letters["R"] == pytest.approx((0.96, 0.5))
        assert not axis.axison


def test_letters_can_be_read_on_their_ground():
    axes = find_pictures(draw_panels(make_prediction(), [4], "title"))
    colours = [{text.get_color() for text in axis.texts} for axis in axes]
    assert colours == [{"white"}, {"white"}, {"black"}, {"black"}]  # the ground is black, and where not scored grey


def test_what_is_brighter_than_its_reconstruction_is_orange_what_is_darker_purple():
    prediction = make_prediction()
    prediction.reconstruction[4, 30, 30] = 0.9
    figure = draw_panels(prediction, [4], "title")
    picture = find_pictures(figure)[2].images[0]
    residual = picture.get_array()
    assert residual[42, 22] == pytest.approx(0.3, abs=1e-3)
    assert residual[30, 30] == pytest.approx(-0.3, abs=1e-3)
    assert residual[20, 30] == pytest.approx(0, abs=1e-3)
    assert picture.get_clim() == (-0.3, 0.3)
    brighter, darker, outside = picture.to_rgba(np.ma.masked_invalid([[0.2, -0.2, np.nan]]))[0, :, :3]
    assert brighter[0] > brighter[2] + 0.3, "orange"
    assert darker[2] > darker[0] + 0.1, "purple"
    np.testing.assert_allclose(outside, GREY)
    assert np.ma.getmaskarray(residual)[0, 0] or np.isnan(residual[0, 0])

    words = {text.get_text(): text.get_position() for text in figure.texts}
    bar = next(axis for axis in figure.axes if axis.get_ylabel() == "share of full intensity")
    assert words["brighter"][1] > bar.get_position().y1 > bar.get_position().y0 > words["darker"][1]
    np.testing.assert_allclose(bar.get_yticks(), [-0.3, -0.15, 0, 0.15, 0.3])
    assert bar.get_ylim()[0] < bar.get_ylim()[1]


def test_a_lesion_is_outlined_in_its_slice_alone():
    prediction = make_prediction()
    axes = find_pictures(draw_panels(prediction, [4], "title"))
    assert [len(find_outlines(axis, SKY_BLUE)) for axis in axes] == [1, 0, 1, 1], "the reconstruction is without"
    for axis in (axes[0], axes[2], axes[3]):
        (points,) = find_outlines(axis, SKY_BLUE)
        np.testing.assert_allclose(points.min(axis=0), [19.5, 39.5])
        np.testing.assert_allclose(points.max(axis=0), [23.5, 45.5])
    for i, lesion in ((3, True), (4, False)):
        axes = find_pictures(draw_panels(make_prediction(lesion=lesion), [i], "title"))
        assert not any(find_outlines(axis, SKY_BLUE) for axis in axes)


def test_the_border_is_drawn_where_the_map_crosses_the_threshold():
    prediction = make_prediction()
    for i, drawn in ((4, 1), (3, 0)):
        axes = find_pictures(draw_panels(prediction, [i], "title"))
        assert [len(find_outlines(axis, WHITE)) for axis in axes] == [0, 0, 0, drawn], "on the anomaly map alone"
    (points,) = find_outlines(find_pictures(draw_panels(prediction, [4], "title"))[3], WHITE)
    # from 1 outside to 8 within, 4 is crossed three sevenths of a pixel on
    np.testing.assert_allclose(points.min(axis=0), [19 + 3 / 7, 39 + 3 / 7], atol=1e-5)
    np.testing.assert_allclose(points.max(axis=0), [24 - 3 / 7, 46 - 3 / 7], atol=1e-5)


@pytest.mark.parametrize("draw", ["panels", "montage"])
def test_the_border_of_a_strong_region_is_drawn_at_a_share_of_its_peak(draw):
    made = make_prediction()
    made.anomaly[4, 42, 22] = 160.0  # its slice's others, of 8, are below 20; those of the next slice too
    if draw == "panels":
        axis = find_pictures(draw_panels(made, [4], "title"))[3]
    else:
        axis, _ = draw_canvas(made)
    (points,) = find_outlines(axis, WHITE)
    # from 8 to 160, 20 is crossed 3/38 of a pixel on
    assert np.ptp(points, axis=0) == pytest.approx([2 - 6 / 38] * 2, abs=1e-4)


def test_panels_have_a_row_a_slice_in_the_order_asked_for():
    prediction = make_prediction()
    prediction.scan.stack[7] *= 0.5
    one, two = (draw_panels(prediction, shown, "a $ title_") for shown in ([4], [7, 4]))
    assert two.get_figheight() > 1.7 * one.get_figheight()
    axes = find_pictures(two)
    assert len(axes) == 8
    assert axes[0].get_position().y0 > axes[4].get_position().y1, "the first asked for is on top"
    assert axes[0].images[0].get_array().max() == pytest.approx(0.3, abs=1e-3)
    assert axes[4].images[0].get_array().max() == pytest.approx(0.9, abs=1e-3)
    names = [[text.get_text() for text in axis.texts if "mm" in text.get_text()] for axis in axes]
    assert names == [["z 114 mm, k = 57"], [], [], [], ["z 108 mm, k = 54"], [], [], []]
    assert not any("mm" in text.get_text() for axis in one.axes for text in axis.texts), "the title says which"
    assert [axis.get_title() for axis in axes[4:]] == [""] * 4
    assert one.get_suptitle() == two.get_suptitle() == "a $ title_"
    (title,) = [text for text in one.texts if text.get_text() == "a $ title_"]
    assert not title.get_parse_math(), "a dollar sign begins no formula"


@pytest.mark.parametrize("draw", ["panels", "montage"])
def test_the_bar_of_anomalies_goes_from_half_to_sixteen_times_the_threshold_and_marks_it(draw):
    shown = [[4]] if draw == "panels" else []
    figure = {"panels": draw_panels, "montage": draw_montage}[draw](make_prediction(), *shown, "title")
    (bar,) = [axis for axis in figure.axes if axis.get_ylabel().startswith("anomaly")]
    assert bar.get_ylim() == pytest.approx((2, 64))
    np.testing.assert_allclose(bar.get_yticks(), [2, 4, 8, 16, 32, 64])
    assert [label.get_text() for label in bar.get_yticklabels()] == ["2", "4 ◂", "8", "16", "32", "64"]
    assert [set(line.get_ydata()) for line in bar.lines if len(line.get_ydata()) == 2] == [{THRESHOLD}]


@pytest.mark.parametrize("draw", ["panels", "montage"])
def test_nothing_in_a_picture_overlaps_or_lies_outside(draw):
    shown = [[4, 5]] if draw == "panels" else []
    figure = {"panels": draw_panels, "montage": draw_montage}[draw](make_prediction(), *shown, "title")
    boxes = [axis.get_position() for axis in figure.axes]
    for i, one in enumerate(boxes):
        assert min(one.x0, one.y0) >= 0
        assert max(one.x1, one.y1) <= 1
        assert not any(one.overlaps(other) for other in boxes[:i])
    for axis in find_pictures(figure):
        box, (rows, columns) = axis.get_position(), axis.images[0].get_array().shape[:2]
        shape = (box.height * figure.get_figheight()) / (box.width * figure.get_figwidth())
        assert shape == pytest.approx(rows / columns, rel=1e-3), "pixels are square and the picture fills its place"


def test_a_crop_leaves_five_pixels_around_the_brain():
    brain = np.zeros((40, 50), dtype=bool)
    brain[10:20, 3] = brain[12, 3:41] = True
    assert find_crop(brain) == (slice(5, 25), slice(0, 46))


def test_a_montage_shows_slices_from_the_lowest_to_the_highest_in_rows_of_eight():
    prediction = make_prediction()
    stack = prediction.scan.stack
    for i in range(10):
        stack[i][stack[i] > 0] = i / 10 + 0.05
    axis, canvas = draw_canvas(prediction)
    side = 50 + 2 * 5  # the disc with its margin
    assert canvas.shape == (2 * side, 8 * side, 3)
    for place in range(10):
        row, column = divmod(place, 8)
        centre = canvas[row * side + side // 2, column * side + side // 2]
        np.testing.assert_allclose(centre, place / 10 + 0.05, atol=1e-3)
    np.testing.assert_allclose(canvas[side:, 2 * side :], GREY)
    numbers = {int(t.get_text().split(", k ")[1]): t.get_position() for t in axis.texts if ", k " in t.get_text()}
    assert any(text.get_text() == "z 100, k 50" for text in axis.texts), "slices of 2 mm, from 0 mm on"
    assert sorted(numbers) == list(range(50, 60))
    for index, (x, y) in numbers.items():
        assert (int(y // side), int(x // side)) == divmod(index - 50, 8), "each in its tile"
        assert 0 < x % side < 0.1 * side
        assert 0 < y % side < 0.2 * side


def test_a_montage_has_the_nose_up_and_the_subjects_left_on_the_left():
    prediction = make_prediction()
    axis, canvas = draw_canvas(prediction)
    side = 60
    (blue,) = find_outlines(axis, SKY_BLUE)
    assert set(blue[:, 0] // side) == {4, 5}, "the lesion's slices"
    in_tile = blue[blue[:, 0] // side == 4] % side
    # the crop starts at pixel 2; the lesion lies in rows 40 to 45 from below, columns 20 to 23
    assert (in_tile[:, 1].min(), in_tile[:, 1].max()) == (side - 1 - (45.5 - 2), side - 1 - (39.5 - 2))
    assert (in_tile[:, 0].min(), in_tile[:, 0].max()) == (19.5 - 2, 23.5 - 2)
    (white,) = find_outlines(axis, WHITE)
    assert set(white[:, 0] // side) == {4, 5}, "the border of what is flagged lies around it"
    inside = canvas[side - 1 - (42 - 2), 4 * side + 22 - 2]
    np.testing.assert_allclose(inside, overlay(np.float32([[0.9]]), np.float32([[8]]), THRESHOLD)[0, 0], atol=1e-3)
    positions = {text.get_text(): text.get_position() for text in axis.texts}
    assert positions["L"] == pytest.approx((0.04 * side, side / 2))
    assert positions["R"] == pytest.approx((0.96 * side, side / 2))
    assert not axis.axison


def test_a_montage_without_a_known_lesion_has_no_outline():
    axis, _ = draw_canvas(make_prediction(lesion=False))
    assert not find_outlines(axis, SKY_BLUE)
    assert len(find_outlines(axis, WHITE)) == 1


def test_a_montage_shows_at_most_48_slices_spread_over_all():
    axis, canvas = draw_canvas(make_prediction(slices=100))
    shown = [int(text.get_text().split(", k ")[1]) - 50 for text in axis.texts if ", k " in text.get_text()]
    assert len(shown) == 48
    assert (shown[0], shown[-1]) == (0, 99)
    assert set(np.diff(shown)) == {2, 3}
    assert canvas.shape[:2] == (6 * 60, 8 * 60)


def test_a_montage_has_its_title():
    figure = draw_montage(make_prediction(), "a title with $ and _")
    assert [text.get_text() for text in figure.texts] == ["a title with $ and _"]
    assert not figure.texts[0].get_parse_math(), "a dollar sign begins no formula"


@pytest.mark.parametrize(
    ("panels", "wanted"), [("worst", [53]), ("0", []), ("3", [51, 53, 54]), ("all", list(range(50, 56)))]
)
def test_as_many_panels_as_asked_for(panels, wanted, tmp_path):
    made = make_prediction(slices=6)
    scores = [0, 7, 1, 9, 8, 3]
    rows = [row | {"score": float(score)} for row, score in zip(made.slice_rows, scores, strict=True)]
    for folder in ("montages", "error_maps"):
        (tmp_path / folder / "abnormal").mkdir(parents=True)
    draw_scan(tmp_path, replace(made, slice_rows=rows), panels)
    assert (tmp_path / "montages/abnormal/one.png").exists()
    found = sorted(path.name for path in (tmp_path / "error_maps/abnormal").iterdir())
    assert found == [f"one_slice_{index:03d}.png" for index in wanted]


def test_regions_have_their_numbers_beside_them():
    made = make_prediction()
    made.anomaly[7, 30:33, 30:33] = 9.0
    made = restore_map(made)
    for i, wanted in ((4, {"1": (24, 42.5)}), (7, {"2": (33, 31)}), (0, {})):
        axes = find_pictures(draw_panels(made, [i], "title"))
        found = [{t.get_text(): t.get_position() for t in axis.texts if t.get_text().isdecimal()} for axis in axes]
        assert found == [{}, {}, {}, wanted], "on the anomaly map, to the right of the region"
    axis, _ = draw_canvas(made)
    assert sorted(text.get_text() for text in axis.texts if text.get_text().isdecimal()) == ["1", "2"], "once each"
