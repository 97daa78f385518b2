"""Scans that the model has seen are refused, and those unlike its training scans get a warning, each at its limit."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from common.cli import DataError
from evaluation.input_check import find_mismatches, refuse_seen
from models.baselines import map_deviation
from models.calibration import LEVELS
from preprocessing.store import list_scans
from preprocessing.worker import CutSettings, cut_scan
from tests.conftest import make_head
from tests.predictions import PIXEL_MM, SETTINGS, SIZE, make_calibration, make_predictor, make_scan, make_stack


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return make_predictor(tmp_path_factory.mktemp("model"))


def find_warnings(predictor, stack=None, **changes) -> list[str]:
    return find_mismatches(make_scan(stack, **changes), predictor)


def test_scans_that_the_model_has_seen_are_refused(processed, tmp_path):
    scans = [*list_scans(processed / "test"), *list_scans(processed / "train")]
    refuse_seen(scans, make_predictor(tmp_path))
    predictor = make_predictor(tmp_path, seen=[scans[1].hashes[0]])
    with pytest.raises(DataError, match="trained or calibrated on this scan; test it on") as error:
        refuse_seen(scans, predictor)
    assert str(error.value).startswith(str(scans[1].folder))
    predictor = make_predictor(tmp_path, seen=[scan.hashes[1] for scan in scans[2:5]])
    with pytest.raises(DataError, match="this scan, and on 2 others of these;"):
        refuse_seen(scans, predictor)


def test_thick_slices_may_be_thicker_than_two_pixels(tmp_path):
    predictor = make_predictor(tmp_path, slices=SETTINGS | {"pixel_mm": 1.5})
    assert find_warnings(predictor, spacing_mm=[1, 1, 3.5]) == []


@pytest.mark.parametrize("slices", [1, 2])
def test_a_stack_thinner_than_half_a_pixel_is_compared(slices, predictor):
    found = find_warnings(predictor, make_stack()[:slices], spacing_mm=[4, 4, 0.5])
    assert all("check its orientation" not in words for words in found)


def test_a_scan_like_the_training_scans_has_no_warning(predictor):
    assert find_warnings(predictor) == []


@pytest.mark.parametrize(("trained_off", "is_off"), [(True, False), (False, True)])
def test_the_skull_is_as_in_the_training_scans(trained_off, is_off, tmp_path):
    predictor = make_predictor(tmp_path, slices=SETTINGS | {"skull_off": trained_off})
    assert find_warnings(predictor, skull_off=trained_off) == []
    (warning,) = find_warnings(predictor, skull_off=is_off)
    states, cure = ("with skull and scalp", "without skull"), "strip it" if trained_off else "give the scan as it was"
    assert warning.startswith(f"it is {states[is_off]} and the model was trained on scans {states[trained_off]}")
    assert cure in warning


@pytest.mark.parametrize(
    ("spacing_mm", "coarse"),
    [([8, 8, 4], False), ([8.1, 4, 3], True), ([4, 8.1, 3], True), ([4, 4, 4.1], True), ([1, 1, 1], False)],
)
def test_voxels_are_not_coarser_than_what_was_tried(predictor, spacing_mm, coarse):
    (*warnings,) = find_warnings(predictor, spacing_mm=spacing_mm)
    assert [("are coarser than what the model was tried on" in one) for one in warnings] == [True] * coarse
    if coarse:
        assert " x ".join(f"{side:g}" for side in spacing_mm) in warnings[0]


@pytest.mark.parametrize(
    ("brain_ml", "off", "odd"),
    [(700, True, False), (699, True, True), (2200, True, False), (2201, True, True), (3000, False, False)],
)
def test_a_brain_mask_has_the_volume_of_an_adult_brain(brain_ml, off, odd, tmp_path):
    predictor = make_predictor(tmp_path, slices=SETTINGS | {"skull_off": off})
    warnings = find_warnings(predictor, brain_ml=brain_ml, skull_off=off)
    assert [f"brain mask has {brain_ml} ml, not the size of an adult brain" in one for one in warnings] == [True] * odd


def test_the_contrast_is_that_of_healthy_scans(tmp_path):
    # the median deviation falls as the healthy deviation grows
    stack = make_stack(seed=3)
    sampling_mm = (3.0, PIXEL_MM)
    median = float(map_deviation(torch.from_numpy(stack), sampling_mm, make_calibration()).nanmedian())
    for wanted, odd in ((0.69, False), (0.72, True)):
        predictor = make_predictor(tmp_path, make_calibration(deviation=0.1 * median / wanted))
        warnings = [one for one in find_warnings(predictor, stack) if "standard deviations" in one]
        assert [f"lies {wanted:.1f} standard deviations from" in one for one in warnings] == [True] * odd


@pytest.mark.parametrize(("axis", "words"), [(0, "upside down"), (1, "back to front"), (2, None)])
def test_a_flipped_brain_is_seen(axis, words, tmp_path):
    # flipped by the axis: (inferior-superior, posterior-anterior, left-right); sides look too much alike
    predictor = make_predictor(tmp_path, make_calibration(deviation=0.03))
    warnings = find_warnings(predictor, np.flip(make_stack(), axis))
    found = [one for one in warnings if "more like a healthy brain" in one]
    assert [f"brain {words} than as its header says" in one for one in found] == [True] * (words is not None)


@pytest.mark.parametrize(
    ("order", "flipped", "words"),
    [
        ((0, 1, 2), (), None),
        ((1, 0, 2), (), "with its posterior-anterior and left-right axes exchanged"),
        ((0, 2, 1), (), "with its inferior-superior and posterior-anterior axes exchanged"),
        ((2, 1, 0), (), "with its inferior-superior and left-right axes exchanged"),
        ((1, 2, 0), (), "with all its axes moved on by one"),
        ((2, 0, 1), (), "with all its axes moved on by two"),
        ((1, 0, 2), (2,), "with its posterior-anterior and left-right axes exchanged, upside down"),
        ((0, 1, 2), (1, 2), "upside down and back to front"),
    ],
)
def test_axes_in_another_order_than_the_header_says_are_seen(order, flipped, words, tmp_path):
    """The voxel sizes stay right. The model knows one healthy head, the same one."""
    head, path = make_head(), tmp_path / "a.nii"
    cut = CutSettings(SETTINGS["keep"], SIZE, SIZE * PIXEL_MM * 1.5)
    nib.save(head, path)
    known = cut_scan(path, None, cut).stack
    levels = known[np.linspace(0, len(known) - 1, LEVELS).round().astype(int)]
    mean = torch.from_numpy(levels).float()
    intensity = torch.stack([mean, torch.full_like(mean, 0.02)])
    slices = SETTINGS | {"pixel_mm": 1.5 * PIXEL_MM}
    predictor = make_predictor(tmp_path, replace(make_calibration(), intensity=intensity), slices=slices)
    values = np.flip(head.get_fdata().transpose(order), flipped)
    nib.save(nib.Nifti1Image(values, np.diag([4.0, 4.0, 4.0, 1.0])), path)
    found = [one for one in find_mismatches(cut_scan(path, None, cut), predictor) if "more like" in one]
    assert [f"brain {words} than as its header says" in one for one in found] == [True] * (words is not None)


def test_a_flip_counts_only_where_it_makes_the_brain_look_healthy(tmp_path):
    # a brain unlike healthy ones in any position has the contrast's warning alone
    predictor = make_predictor(tmp_path, make_calibration(deviation=0.001))
    warnings = find_warnings(predictor, np.roll(make_stack(seed=1), 2, axis=1))
    assert len(warnings) == 1
    assert "standard deviations from healthy" in warnings[0]
