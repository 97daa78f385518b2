"""A scan's maps and scores, p-values and flags, and the warnings about scans unlike the training scans."""

import nibabel as nib
import numpy as np
import pytest
import torch

from evaluation.examiner import Examined, open_scan
from models.anomaly import map_anomalies, map_brightness, map_deviation, reconstruct, score_scan, score_slices
from models.checkpoint import load_model
from preprocessing.slices import list_scans, read_scan
from tests.conftest import make_head
from tests.predictions import (
    PIXEL_MM,
    SETTINGS,
    SIZE,
    make_calibration,
    make_predictor,
    make_scan,
    make_stack,
    write_model,
)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return make_predictor(tmp_path_factory.mktemp("model"))


def score_maps(predictor, maps: dict, false_alarms: float = 0.05, **record) -> tuple[list[dict], dict]:
    """(rows of slices, row of the scan) for maps made by hand; the reconstruction is 0.1 too dark everywhere."""
    stack = np.full((3, SIZE, SIZE), 0.5, np.float16)
    stack[2] = 0.8
    reconstruction = np.full(stack.shape, 0.4, np.float32)
    return predictor.score(Examined(make_scan(stack, **record), reconstruction, maps), false_alarms)


def find_warnings(predictor, stack=None, brain_ml: float = 1300, **record) -> list[str]:
    return predictor.doubt(make_scan(stack, **record), brain_ml)


def test_maps_are_those_of_the_model_and_of_the_baselines(predictor, tmp_path):
    scan = make_scan()
    found = predictor.examine(scan)
    model, content = load_model(write_model(tmp_path / "model.pt"))
    calibration = content["calibration"]
    np.testing.assert_allclose(found.reconstruction, reconstruct(model, scan.stack, 3.0), atol=1e-5)
    sampling_mm = (3.0, PIXEL_MM)
    brain, drawn = scan.stack > 0, found.reconstruction
    wanted = {
        "score": map_anomalies(scan.stack, drawn, sampling_mm, calibration),
        "mse": np.where(brain, (scan.stack.astype(np.float32) - drawn) ** 2, np.nan),
        "bright": map_brightness(scan.stack),
        "dark": 1 - map_brightness(scan.stack),
        "deviation": map_deviation(scan.stack, sampling_mm, calibration),
    }
    assert list(found.maps) == list(wanted)
    for name, values in wanted.items():
        np.testing.assert_allclose(found.maps[name], values, rtol=1e-5, err_msg=name)
        np.testing.assert_array_equal(np.isfinite(found.maps[name]), brain)
    assert list(predictor.examine(scan, baselines=False).maps) == ["score", "mse"]


def test_a_model_of_half_precision_reconstructs_in_half_precision(predictor, tmp_path):
    half = make_predictor(tmp_path, precision="bf16").examine(make_scan()).reconstruction
    whole = predictor.examine(make_scan()).reconstruction
    assert 1e-5 < np.abs(half - whole).max() < 0.1


def test_scores_of_slices_and_scan(predictor):
    rng = np.random.default_rng(0)
    maps = {name: rng.random((3, SIZE, SIZE)).astype(np.float32) for name in ("score", "mse", "bright")}
    rows, row = score_maps(predictor, maps, subject="sub-1", lesion_voxels=[0, 9, 12])
    assert [one["slice"] for one in rows] == [20, 21, 22]
    assert [one["lesion_voxels"] for one in rows] == [0, 9, 12]
    for name in ("score", "bright"):
        np.testing.assert_allclose([one[name] for one in rows], score_slices(maps[name]))
        assert row[name] == score_scan(maps[name])
    np.testing.assert_allclose([one["mse"] for one in rows], [0.01, 0.01, 0.16], rtol=2e-3)
    assert row["mse"] == pytest.approx(0.06, rel=2e-3), "the mean over slices, without the share of the worst"
    for one in (*rows, row):
        assert (one["label"], one["scan"], one["subject"]) == ("abnormal", "a_T1w", "sub-1")
    assert row["lesion_known"] is False
    rows, row = score_maps(predictor, maps)
    assert [one["lesion_voxels"] for one in rows] == [0, 0, 0]
    assert row["subject"] == "a_T1w", "without a known subject, the scan's name"


def test_p_values_come_from_healthy_scans_and_healthy_slices(tmp_path):
    # one healthy scan of 19 and two healthy slices of 39 score 5 or more
    changes = {
        "scan_scores": torch.tensor([1.0] * 18 + [6]),
        "slice_scores": torch.tensor([1.0] * 37 + [5, 7]),
    }
    predictor = make_predictor(tmp_path, make_calibration(**changes))
    maps = {name: np.full((3, SIZE, SIZE), 5, np.float32) for name in ("score", "mse")}
    maps["score"][1] = 0.5
    for rate, flagged in ((0.1, True), (0.0999, False)):
        rows, row = score_maps(predictor, maps, rate)
        assert row["p_value"] == 2 / 20
        assert row["flagged"] is flagged, "flagged where the p-value is at most the rate asked for"
        assert [one["p_value"] for one in rows] == [3 / 40, 1, 3 / 40]


def test_a_stored_scan_keeps_what_is_known_of_it(processed):
    for label in ("normal", "abnormal"):
        stored = next(iter(list_scans(processed / "test" / label)))
        scan = open_scan(stored)
        assert (scan.name, scan.label, scan.subject) == (stored.name, label, stored.subject)
        assert scan.indices == list(stored.indices)
        np.testing.assert_array_equal(scan.stack, stored.read_stack())
        np.testing.assert_array_equal(scan.lesion, stored.read_lesion())
        assert scan.spacing_mm == (stored.record["spacing_mm"][2], stored.record["pixel_mm"])


def test_scans_that_the_model_has_seen_are_refused(processed, tmp_path):
    scans = [*list_scans(processed / "test"), *list_scans(processed / "train")]
    make_predictor(tmp_path).refuse_seen(scans)
    predictor = make_predictor(tmp_path, seen=[scans[1].source_hash])
    with pytest.raises(ValueError, match="trained or calibrated on this scan; test it on") as error:
        predictor.refuse_seen(scans)
    assert str(error.value).startswith(str(scans[1].folder))
    predictor = make_predictor(tmp_path, seen=[scan.source_hash for scan in scans[2:5]])
    with pytest.raises(ValueError, match="this scan, and on 2 others of these;"):
        predictor.refuse_seen(scans)


def test_a_model_of_an_older_version_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model.pt: was calibrated by an older version; delete it and run train.py"):
        make_predictor(tmp_path, seen=None)


def cut_head(predictor, folder, image: nib.Nifti1Image | None = None, mask=None, axes=None, volume=None):
    nib.save(image or make_head(), folder / "head_T1w.nii.gz")
    if mask is not None:
        nib.save(mask, folder / "mask.nii.gz")
    return predictor.cut(folder / "head_T1w.nii.gz", folder / "mask.nii.gz" if mask else None, axes, volume)


def test_a_scan_is_cut_as_the_training_slices_were(predictor, tmp_path):
    scan, _ = cut_head(predictor, tmp_path)
    assert (scan.name, scan.label, scan.lesion) == ("head_T1w", "", None)
    assert scan.stack.shape[1:] == (SIZE, SIZE)
    assert scan.record["pixel_mm"] == PIXEL_MM
    held = np.flatnonzero((make_head().get_fdata() > 0).sum(axis=(0, 1)) * 16 >= 100)
    assert len(scan.indices) == round(SETTINGS["keep"] * (held[-1] - held[0] + 1))
    assert scan.record["source"].endswith("head_T1w.nii.gz")
    assert scan.record["skull_off"]


def test_a_brain_mask_and_a_volume_are_taken_as_given(predictor, tmp_path):
    head = make_head()
    values = head.get_fdata(dtype=np.float32)
    half = nib.Nifti1Image(
        np.where(np.arange(len(values))[:, None, None] < 20, values > 0, 0).astype(np.uint8), head.affine
    )
    scan, _ = cut_head(predictor, tmp_path, mask=half)
    whole, _ = cut_head(predictor, tmp_path)
    assert (scan.stack > 0).sum() < 0.6 * (whole.stack > 0).sum()
    series = nib.Nifti1Image(np.stack([values[::-1], values], axis=-1), head.affine)
    second, _ = cut_head(predictor, tmp_path, series, volume=1)
    np.testing.assert_array_equal(second.stack, whole.stack)


def test_an_orientation_that_the_header_does_not_tell_is_taken_on_trust(predictor, tmp_path):
    head = make_head()
    head.set_sform(None, code=0)
    head.set_qform(None, code=0)
    with pytest.raises(ValueError, match="say with --axes"):
        cut_head(predictor, tmp_path, head)
    _, warnings = cut_head(predictor, tmp_path, head, axes="RAS")
    assert warnings[0] == "its header does not tell its orientation; RAS is taken on trust"
    assert not any("trust" in one for one in cut_head(predictor, tmp_path, axes="RAS")[1]), "the header tells it"


def test_an_empty_scan_is_refused(predictor, tmp_path):
    with pytest.raises(ValueError, match=r"head_T1w.nii.gz: is the same everywhere"):
        cut_head(predictor, tmp_path, nib.Nifti1Image(np.ones((20, 20, 20), np.float32), np.eye(4)))


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
    [(700, True, False), (699, True, True), (2000, True, False), (2001, True, True), (3000, False, False)],
)
def test_a_brain_mask_has_the_volume_of_an_adult_brain(brain_ml, off, odd, tmp_path):
    predictor = make_predictor(tmp_path, slices=SETTINGS | {"skull_off": off})
    warnings = find_warnings(predictor, brain_ml=brain_ml, skull_off=off)
    assert [f"brain mask of {brain_ml} ml is no adult brain's" in one for one in warnings] == [True] * odd


def test_the_brain_volume_is_that_of_the_mask_in_ml(predictor, tmp_path):
    voxels = (make_head().get_fdata() > 0).sum()
    assert 700 < voxels * 0.064 < 2000
    coarse, fine = (
        nib.Nifti1Image(make_head().get_fdata(dtype=np.float32), np.diag([side, 4, 4, 1.0])) for side in (4, 1)
    )
    assert not any("ml is no adult" in one for one in cut_head(predictor, tmp_path, coarse)[1])
    (warning,) = [one for one in cut_head(predictor, tmp_path, fine)[1] if "ml is no adult" in one]
    assert f"mask of {voxels * 0.016:.0f} ml" in warning


def test_the_contrast_is_that_of_healthy_scans(tmp_path):
    # the median deviation falls as the healthy deviation grows
    stack = make_stack(seed=3)
    sampling_mm = (3.0, PIXEL_MM)
    median = float(np.nanmedian(map_deviation(stack, sampling_mm, make_calibration())))
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


def test_a_flip_counts_only_where_it_makes_the_brain_look_healthy(tmp_path):
    # a brain unlike healthy ones in any position has the contrast's warning alone
    predictor = make_predictor(tmp_path, make_calibration(deviation=0.001))
    warnings = find_warnings(predictor, np.roll(make_stack(seed=1), 2, axis=1))
    assert len(warnings) == 1
    assert "standard deviations from healthy" in warnings[0]


def test_the_sources_of_a_stored_scan_can_be_told(processed):
    scans = list(list_scans(processed))
    assert len({scan.source_hash for scan in scans}) == len(scans)
    assert read_scan(scans[0].folder).source_hash == scans[0].source_hash
