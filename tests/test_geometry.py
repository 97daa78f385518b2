"""A volume is cut into its slices, value by value and place by place, and a map over them goes back."""

import json

import nibabel as nib
import numpy as np
import pytest

from common.cli import DataError
from preprocessing.geometry import Geometry, cut_stack, keep_middle, place_stack, resampling_weights
from preprocessing.volume import Volume, read_volume
from tests.conftest import make_head, store

RNG = np.random.default_rng(0)


def cut(values, brain, spacing_mm=(2.0, 2.0, 2.0), keep=1.0, size=16, pixel_mm=2.0, **options):
    """(stack, geometry, scale) of a volume in memory; slices are counted within the brain, or `skull_off` says not."""
    values = np.asarray(values, np.float32)
    volume = Volume(values, np.diag([*spacing_mm, 1.0]), "RAS", values.shape, spacing_mm, options.get("missing"))
    return cut_stack(volume, brain, options.get("skull_off", True), keep, size, size * pixel_mm)


def make_brain(shape, start, stop):
    brain = np.zeros(shape, bool)
    brain[tuple(slice(*ends) for ends in zip(start, stop, strict=True))] = True
    return brain


def scale(values, low, high, exponent):
    return np.clip((values - low) / (high - low), 0, 1) ** exponent


# Cutting, where voxels and pixels are the same: every value by hand.

SHAPE = (14, 12, 10)  # left-right, posterior-anterior, inferior-superior
BRAIN = make_brain(SHAPE, (2, 3, 1), (12, 11, 9))


def test_each_pixel_is_its_voxel_scaled():
    """Voxels and pixels of 2 mm, so that nothing is interpolated: 10 x 8 x 8 voxels lie in the middle of 16 x 16."""
    values = RNG.gamma(3, 50, SHAPE)
    values[0, 0, 0] = 1e6  # outside the brain nothing counts
    interior = values[5:9, 6:8, 4:6]  # 3 voxels of 2 mm within it
    low, high = np.percentile(interior, (0.5, 99.5))
    median = np.clip((np.median(interior) - low) / (high - low), 0.2, 0.95)
    wanted = np.maximum(scale(values, low, high, np.log(0.62) / np.log(median)), 1e-3)  # brain is never 0
    stack, geometry, _ = cut(values, BRAIN)
    assert stack.dtype == np.float16
    assert stack.shape == (8, 16, 16)
    assert list(geometry.slices) == list(range(1, 9)), "from inferior to superior"
    inside = np.zeros(stack.shape, bool)
    inside[:, 4:12, 3:13] = True  # first axis posterior to anterior, second left to right
    assert (stack[~inside] == 0).all()
    assert (stack > 0)[inside].all()
    assert stack.min() == 0
    assert stack.max() == 1
    np.testing.assert_allclose(stack[inside], wanted.transpose(2, 1, 0)[1:9, 3:11, 2:12].ravel(), atol=5e-4)
    assert stack[inside].min() == np.float16(1e-3)


def test_slices_lie_centred_on_the_brain_of_the_kept_slices():
    brain = BRAIN.copy()
    brain[0:12, 0:11, 1] = True  # a slice that is not kept
    values = RNG.gamma(3, 50, SHAPE)
    stack, geometry, _ = cut(values, brain, keep=0.75)
    assert list(geometry.slices) == [2, 3, 4, 5, 6, 7]
    rows, columns = (np.flatnonzero((stack[0] > 0).any(axis=axis)) for axis in (1, 0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (4, 11, 3, 12)


def test_a_slice_counts_from_1_cm2_of_brain_on():
    """25 pixels of 2 x 2 mm are 100 mm2; slices between are counted, whatever they hold."""
    brain = np.zeros(SHAPE, bool)
    for z, voxels in ((1, 24), (2, 25), (3, 40), (5, 40), (7, 25), (8, 24)):
        brain[2:12, 3:11, z].flat[:voxels] = True

    def list_slices(*spacing_mm):
        volume = Volume(np.zeros(SHAPE), np.eye(4), "RAS", SHAPE, spacing_mm)
        return list(place_stack(volume, brain, True, 1.0, 16, 32.0).slices)

    assert list_slices(2.0, 2.0, 2.0) == [2, 3, 4, 5, 6, 7]
    assert list_slices(2.0, 2.0, 5.0) == [2, 3, 4, 5, 6, 7], "mm2 within the slice"
    assert list_slices(1.99, 2.0, 2.0) == [3, 4, 5]
    assert list_slices(2.0, 1.99, 2.0) == [3, 4, 5]


def test_in_a_head_all_slices_count():
    values = RNG.gamma(3, 50, SHAPE)
    assert list(cut(values, BRAIN, keep=0.7, skull_off=False)[1].slices) == [1, 2, 3, 4, 5, 6, 7]
    assert list(cut(values, BRAIN, keep=0.7, skull_off=True)[1].slices) == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("first", "last", "keep", "kept"),
    [
        (10, 30, 0.7, (13, 27)),  # 14.7 of 21: 15 are kept, 3 left out on each side
        (0, 9, 0.7, (1, 7)),  # of an odd rest the larger half is above
        (0, 0, 0.7, (0, 0)),
        (3, 9, 0.01, (6, 6)),  # never none
        (3, 9, 1.0, (3, 9)),
    ],
)
def test_the_middle_of_the_slices_is_kept(first, last, keep, kept):
    holds = np.zeros(60, bool)
    holds[[first, last]] = True  # a gap does not end the brain
    assert keep_middle(holds, keep).tolist() == list(range(kept[0], kept[1] + 1))


def test_what_cannot_be_cut_is_refused():
    values = RNG.gamma(3, 50, SHAPE)
    with pytest.raises(DataError, match="mask is empty"):
        cut(values, make_brain(SHAPE, (2, 2, 2), (4, 4, 4)))
    low = make_brain(SHAPE, (2, 3, 0), (12, 11, 1))
    with pytest.raises(DataError, match="no brain in the slices kept"):
        cut(values, low, keep=0.5, skull_off=False)
    missing = make_brain(SHAPE, (2, 3, 1), (4, 4, 2))
    with pytest.raises(DataError, match="2 voxels of its brain are not finite"):
        cut(values, BRAIN, missing=missing)
    cut(values, BRAIN, missing=~BRAIN)


# Resampling.


def test_weights_are_a_tent_about_each_output():
    weights = resampling_weights((5, 1.0, 2.0), (1, 1.0, 0.0), 2.0)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, [[0, 0.25, 0.5, 0.25, 0]])
    np.testing.assert_allclose(
        resampling_weights((4, 2.0, 1.5), (1, 1.0, 0.25), 2.0), [[0, 5 / 8, 3 / 8, 0]], atol=1e-6
    )
    np.testing.assert_allclose(resampling_weights((6, 1.5, 2.5), (6, 1.5, 2.5), 1.5), np.eye(6), atol=1e-6)


def test_weights_sum_to_1_and_to_0_outside():
    """Two voxels of 2 mm reach from the first one's centre less 1 mm to the last one's and 1 mm."""
    for centre, row in ((-0.5, [1, 0]), (-0.51, [0, 0]), (1.5, [0, 1]), (1.51, [0, 0])):
        np.testing.assert_allclose(resampling_weights((2, 2.0, centre), (1, 1.0, 0.0), 2.0), [row])
    sums = resampling_weights((50, 1.3, 22.0), (30, 1.9, 15.0), 2.5).sum(axis=1)
    np.testing.assert_allclose(sums, 1, atol=1e-6)


def test_weights_keep_a_straight_line_and_its_direction():
    weights = resampling_weights((50, 2.0, 20.0), (20, 3.0, 9.5), 3.0)
    places, wanted = (np.arange(50) - 20.0) * 2.0, (np.arange(20) - 9.5) * 3.0
    np.testing.assert_allclose((weights @ places)[1:-1], wanted[1:-1], atol=0.3)


def cut_line(axis, spacing_mm, pixel_mm=2.0, size=16):
    """Cut a block whose values rise along one axis only: (a line of the stack there, values scaled, exponent)."""
    shape = (24, 24, 24)
    line = np.linspace(0, 1, 24) ** 2
    values = np.broadcast_to(line.reshape([-1 if i == axis else 1 for i in range(3)]), shape)
    stack, _, (low, high, exponent) = cut(values, np.ones(shape, bool), spacing_mm, size=size, pixel_mm=pixel_mm)
    middle = size // 2
    cuts = {0: stack[12, middle], 1: stack[12, :, middle], 2: stack[:, middle, middle]}
    return cuts[axis].astype(float), np.clip((line - low) / (high - low), 0, 1), exponent


@pytest.mark.parametrize(
    ("spacing", "weights"),
    [(1.0, (1 / 4, 1 / 2, 1 / 4)), (1.5, (1 / 6, 4 / 6, 1 / 6)), (2.0, (0, 1, 0)), (3.0, (0, 1, 0))],
)
def test_thin_slices_are_averaged_to_2_mm(spacing, weights):
    line, scaled, exponent = cut_line(2, (4.0, 4.0, spacing))
    wanted = np.convolve(scaled, weights, "valid") ** exponent
    np.testing.assert_allclose(line[1:-1], np.maximum(wanted, 1e-3), atol=1e-3)


@pytest.mark.parametrize("axis", [0, 1])
def test_small_voxels_are_averaged_and_large_ones_interpolated(axis):
    """Pixels of 2 mm lie halfway between voxels of 1 mm, a quarter of the way between voxels of 4 mm."""
    line, scaled, exponent = cut_line(axis, (1.0, 1.0, 4.0))
    tents = np.array([1, 3, 3, 1]) / 8
    wanted = [(tents @ scaled[i - 2 : i + 2]) ** exponent for i in range(5, 22, 2)]
    np.testing.assert_allclose(line[np.arange(4, 13)], np.maximum(wanted, 1e-3), atol=1e-3)
    line, scaled, exponent = cut_line(axis, (4.0, 4.0, 4.0))
    places = 11.5 + (np.arange(16) - 7.5) / 2
    wanted = np.interp(places, np.arange(24), scaled) ** exponent
    np.testing.assert_allclose(line, np.maximum(wanted, 1e-3), atol=1e-3)


# Pixels of 4 mm over voxels of 1 mm: 12, 14, 18 and 20 voxels fill 16/32, 23/32, 31/32 and all of the second one.
RIMS = [(14, 14, True), (18, 12, False), (12, 18, False), (20, 12, False), (12, 20, False)]


def make_rim(rows, columns):
    """With two beams across, so that its box holds more than brain."""
    brain = make_brain((36, 36, 12), (6, 6, 0), (6 + columns, 6 + rows, 12))
    brain[4 : 8 + columns, 5 + rows // 2 : 7 + rows // 2] = True
    brain[5 + columns // 2 : 7 + columns // 2, 4 : 8 + rows] = True
    return brain


@pytest.mark.parametrize(("rows", "columns", "is_brain"), RIMS)
def test_a_pixel_is_brain_where_more_than_half_of_it_is(rows, columns, is_brain):
    brain = make_rim(rows, columns)
    stack, _, intensity = cut(np.where(brain, np.arange(12.0), 50), brain, (1.0, 1.0, 2.0), pixel_mm=4.0)
    assert bool(stack[6, 6, 6] > 0) is is_brain
    levels = np.maximum(scale(np.arange(12.0), *intensity), 1e-3)
    for plane, level in zip(stack, levels, strict=True):
        np.testing.assert_allclose(plane[plane > 0], level, atol=1e-3)  # the rim is the mean of brain alone


# Masks.


def test_a_mask_is_cut_as_its_scan_is():
    _, geometry, _ = cut(RNG.gamma(3, 50, SHAPE), BRAIN)
    mask = RNG.random(SHAPE) > 0.7
    wanted = np.zeros((8, 16, 16))
    wanted[:, 1:13, 1:15] = mask.transpose(2, 1, 0)[1:9]  # outside the brain too
    lesion = geometry.cut_mask(mask)
    assert lesion.dtype == np.uint8
    np.testing.assert_array_equal(lesion, wanted)


@pytest.mark.parametrize(("rows", "columns", "is_lesion"), RIMS)
def test_a_pixel_is_lesion_where_more_than_half_of_it_is(rows, columns, is_lesion):
    brain = make_rim(rows, columns)
    _, geometry, _ = cut(np.where(brain, np.arange(12.0), 50), brain, (1.0, 1.0, 2.0), pixel_mm=4.0)
    assert bool(geometry.cut_mask(brain)[6, 6, 6]) is is_lesion


def test_a_thin_lesion_of_half_a_slice_is_none():
    """At 1 mm a slice is averaged over 2 mm, so a single plane is half of it, and two are three quarters."""
    shape = (14, 12, 20)
    _, geometry, _ = cut(RNG.gamma(3, 50, shape), np.ones(shape, bool), (2.0, 2.0, 1.0))
    mask = np.zeros(shape, bool)
    mask[:, :, 5] = mask[:, :, 9:11] = True
    assert np.flatnonzero(geometry.cut_mask(mask).any(axis=(1, 2))).tolist() == [9, 10]


# There and back.


def test_a_map_returns_to_its_voxels():
    _, geometry, _ = cut(RNG.gamma(3, 50, SHAPE), BRAIN, keep=0.75)
    anomaly_map = RNG.random((6, 16, 16)).astype(np.float32)
    anomaly_map[:, :6] = np.nan
    wanted = np.full(SHAPE, np.nan, np.float32)
    wanted[:, :, 2:8] = anomaly_map[:, 1:13, 1:15].transpose(2, 1, 0)
    back = geometry.restore(anomaly_map)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, wanted, rtol=1e-6)  # NaN where NaN is wanted


def test_a_map_is_linear_between_its_pixels():
    """Voxels of 1 mm over pixels of 2 mm: one and three quarters of the way."""
    shape = (24, 20, 6)
    _, geometry, _ = cut(RNG.gamma(3, 50, shape), np.ones(shape, bool), (1.0, 1.0, 4.0))
    rows, columns = np.meshgrid(np.arange(16.0), np.arange(16.0), indexing="ij")
    back = geometry.restore(np.broadcast_to(100 * rows + columns, (6, 16, 16)))
    places = [7.5 + (np.arange(n) - (n - 1) / 2) / 2 for n in shape[:2]]
    wanted = 100 * places[1][None, :] + places[0][:, None]
    for z in range(6):
        np.testing.assert_allclose(back[:, :, z], wanted, rtol=1e-5)


def test_slices_at_the_ends_that_hold_nothing_are_left_out():
    """Brain in slices 1 to 8, of which 1 and 8 hold 2 x 50 voxels: a stripe that no pixel of 16 mm is half full of."""
    brain = np.zeros((60, 60, 10), bool)
    brain[5:55, 5:55, 1:9] = True
    brain[:, :29, [1, 8]] = brain[:, 31:, [1, 8]] = False
    values = RNG.gamma(3, 50, brain.shape)
    stack, geometry, _ = cut(values, brain, pixel_mm=16.0)
    assert geometry.slices == (2, 3, 4, 5, 6, 7)
    assert len(stack) == 6
    assert (stack > 0).any(axis=(1, 2)).all()


def test_a_stack_with_a_hole_or_without_brain_is_refused():
    values, brain = RNG.gamma(3, 50, SHAPE), BRAIN.copy()
    with pytest.raises(DataError, match="no brain in the slices kept"):
        cut(values, brain, pixel_mm=1000.0)
    brain[:, :, 4:6] = False
    with pytest.raises(DataError, match="a slice between others holds no brain"):
        cut(values, brain)


def test_a_value_that_float32_cannot_tell_from_others_is_no_brain():
    values = 1e8 + RNG.gamma(3, 50, SHAPE) / 10
    with pytest.raises(DataError, match="is constant inside the brain"):
        cut_stack(Volume(values, np.eye(4), "RAS", SHAPE, (2.0, 2.0, 2.0)), BRAIN, True, 1.0, 16, 32.0)


def test_a_voxel_counts_where_5_percent_of_it_are_scored():
    """Voxels of 1 mm between pixels of 50 mm, of which one is scored: 2 percent more with each voxel."""
    shape = (49, 49, 6)
    volume = Volume(np.zeros(shape), np.eye(4), "RAS", shape, (1.0, 1.0, 4.0))
    geometry = place_stack(volume, np.ones(shape, bool), True, 1.0, 16, 800.0)
    anomaly_map = np.full((6, 16, 16), np.nan)
    anomaly_map[:, :, 8] = 3.0
    scored = geometry.restore(anomaly_map)[:, 24, 2]
    np.testing.assert_array_equal(np.isnan(scored), np.arange(49) < 2)  # 2 and 4 percent
    np.testing.assert_allclose(scored[2:], 3.0, rtol=1e-5)


def test_a_geometry_is_what_scan_json_says(tmp_path):
    volume = read_volume(store(make_head(), "PSR", tmp_path / "a.nii", tilt_degrees=7))
    _, geometry, _ = cut_stack(volume, volume.values > 0, True, 0.7, 32, 200.0)
    record = json.loads(json.dumps(geometry.to_record()))
    assert Geometry.from_record(record | {"subject": "what else stands there"}) == geometry
    assert list(record) == ["shape", "affine", "axes", "spacing_mm", "centre", "pixel_mm", "size", "slices"]
    assert record["shape"] == [48, 44, 40]
    assert record["pixel_mm"] == 200 / 32
    np.testing.assert_array_equal(record["affine"], nib.load(tmp_path / "a.nii").affine)


def test_steps_and_volumes_in_mm():
    _, geometry, _ = cut(RNG.gamma(3, 50, SHAPE), BRAIN, (2.0, 3.0, 5.0), pixel_mm=4.0)
    assert geometry.slice_spacing_mm == 5
    assert geometry.sampling_mm == (5, 4)
    assert geometry.pixel_ml == pytest.approx(0.08)
    assert geometry.canonical_shape == SHAPE


@pytest.mark.parametrize("axes", ["RAS", "PSR", "LIA", "IPL"])
def test_pixels_of_the_stack_have_their_place_in_the_scanner(axes, tmp_path):
    """Three voxels in a stack whose pixels are its voxels: in one place by the file's affine and by the stack's."""
    values = np.zeros((20, 20, 20), np.float32)
    values[3:17, 4:18, 2:18] = RNG.uniform(100, 200, (14, 14, 16))
    values[12:15, 8, 5] = 999
    image = nib.Nifti1Image(values, np.array([[8.0, 0, 0, -70], [0, 8, 0, 30], [0, 0, 8, -5], [0, 0, 0, 1]]))
    path = store(image, axes, tmp_path / "a.nii", tilt_degrees=15)
    volume = read_volume(path)
    _, geometry, _ = cut_stack(volume, values > 0, True, 0.9, 20, 160.0)
    stored = nib.load(path)
    places = [
        nib.affines.apply_affine(stored.affine, np.argwhere(stored.get_fdata() == 999)),
        nib.affines.apply_affine(
            geometry.stack_affine, np.argwhere(geometry.cut_mask(values == 999).transpose(2, 1, 0))
        ),
    ]
    for place in places:
        place[:] = place[np.lexsort(np.round(place, 2).T)]
    np.testing.assert_allclose(*places, atol=1e-3)
