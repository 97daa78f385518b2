"""A scan's maps, scores, p-values, flags and regions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.cli import DataError
from evaluation.predictor import Predictor
from evaluation.regions import list_regions
from models.anomaly import (
    compute_residual,
    find_median,
    reconstruct,
    score_mse,
    score_scan,
    score_slices,
)
from models.baselines import map_brightness, map_deviation
from models.checkpoint import load_checkpoint, load_model, save_checkpoint
from tests.predictions import (
    PIXEL_MM,
    SETTINGS,
    SIZE,
    make_calibration,
    make_geometry,
    make_prediction,
    make_predictor,
    make_scan,
    make_stack,
    write_model,
)
from tests.reference import map_scan

SAMPLING_MM = (3.0, PIXEL_MM)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return make_predictor(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prediction(predictor):
    return predictor.predict(make_scan(lesion_voxels=tuple(range(16)), subject="sub-1", age=61.5, sex="F"))


def test_maps_are_those_of_the_model_and_of_the_baselines(predictor, prediction, tmp_path):
    scan, found = prediction.scan, prediction
    model, _ = load_model(write_model(tmp_path / "model.pt"))
    calibration = make_calibration()
    stack = torch.from_numpy(scan.stack)
    reconstruction = torch.from_numpy(found.reconstruction)
    np.testing.assert_allclose(reconstruction, reconstruct(model, scan.stack, 3.0), atol=1e-5)
    wanted = {
        "score": map_scan(stack, reconstruction, SAMPLING_MM, calibration),
        "mse": torch.where(stack > 0, (stack.float() - reconstruction) ** 2, torch.nan),
        "bright": map_brightness(stack),
        "dark": 1 - map_brightness(stack),
        "deviation": map_deviation(stack, SAMPLING_MM, calibration),
    }
    assert list(found.maps) == list(wanted)
    for name, values in wanted.items():
        np.testing.assert_allclose(found.maps[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(np.isfinite(found.maps[name]), scan.stack > 0)
    assert found.anomaly is found.maps["score"]
    assert list(predictor.predict(scan, baselines=False).maps) == ["score", "mse"]


def test_a_model_of_half_precision_reconstructs_in_half_precision(prediction, tmp_path):
    half = make_predictor(tmp_path, precision="bf16").predict(make_scan()).reconstruction
    assert 1e-5 < np.abs(half - prediction.reconstruction).max() < 0.1


def test_rows_of_slices(prediction):
    rows, maps = prediction.slice_rows, prediction.maps
    stack, reconstruction = torch.from_numpy(prediction.scan.stack), torch.from_numpy(prediction.reconstruction)
    assert list(rows[0]) == ["label", "scan", "subject", "slice", "lesion_voxels", "p_value", *maps]
    assert [row["slice"] for row in rows] == list(range(20, 36))
    assert [row["lesion_voxels"] for row in rows] == list(range(16))
    assert {(row["label"], row["scan"], row["subject"]) for row in rows} == {("abnormal", "a_T1w", "sub-1")}
    for name in ("score", "bright", "dark", "deviation"):
        wanted = score_slices(torch.from_numpy(maps[name]))
        np.testing.assert_allclose([row[name] for row in rows], wanted, rtol=1e-5)
    np.testing.assert_allclose([row["mse"] for row in rows], score_mse(stack, reconstruction), rtol=1e-4)


def test_row_of_a_scan(prediction):
    row, maps = prediction.scan_row, prediction.maps
    known = ["label", "scan", "subject", "lesion_known", "p_value", "flagged"]
    assert list(row) == [*known, *maps, "age", "sex"]
    assert (row["label"], row["scan"], row["subject"]) == ("abnormal", "a_T1w", "sub-1")
    assert (row["age"], row["sex"], row["lesion_known"]) == (61.5, "F", False)
    for name in ("score", "bright", "dark", "deviation"):
        assert row[name] == pytest.approx(score_scan(torch.from_numpy(maps[name])), rel=1e-5)
    slices = [one["mse"] for one in prediction.slice_rows]
    assert row["mse"] == pytest.approx(np.mean(slices), rel=1e-5), "the mean over slices, not over the worst pixels"


def test_a_scan_without_lesion_masks_has_no_lesion_voxels(predictor):
    found = predictor.predict(make_scan(), baselines=False)
    assert {row["lesion_voxels"] for row in found.slice_rows} == {0}
    normal = predictor.predict(make_scan(lesion=np.zeros((16, SIZE, SIZE), bool)), baselines=False)
    assert normal.scan_row["lesion_known"] is True


def test_p_values_come_from_healthy_scans_and_healthy_slices(predictor, prediction, tmp_path):
    score = prediction.scan_row["score"]
    slice_score = prediction.slice_rows[7]["score"]
    # one healthy scan of 19 and two healthy slices of 39 score higher
    scan_scores = torch.tensor([0.0] * 18 + [score + 1])
    slice_scores = torch.tensor([0.0] * 37 + [slice_score + 0.01, 1e6])
    calibration = make_calibration(scan_scores=scan_scores, slice_scores=slice_scores)
    for rate, flagged in ((0.1, True), (0.0999, False)):
        predictor = make_predictor(tmp_path, calibration, {"false_positive_rate": rate})
        found = predictor.predict(make_scan(), baselines=False)
        assert found.scan_row["p_value"] == 2 / 20
        assert found.scan_row["flagged"] is flagged, "flagged where the p-value is at most the rate asked for"
        assert found.slice_rows[7]["p_value"] == 3 / 40


def test_a_prediction_lies_on_the_scans_own_grid(tmp_path):
    scan = make_scan()
    predictor = make_predictor(tmp_path, make_calibration(voxel_threshold=1.0625), {"smallest_ml": 0.5})
    found = predictor.predict(scan, baselines=False)
    np.testing.assert_array_equal(found.native_map, scan.geometry.restore(found.anomaly))
    np.testing.assert_array_equal(found.affine, np.diag([4, 4, 3, 1]))
    assert found.threshold == predictor.calibration.voxel_threshold == 1.0625
    listed, numbers = list_regions(found.native_map, found.affine, 1.0625, 0.5)
    np.testing.assert_array_equal(found.native_numbers, numbers)
    masses = [region.pop("mass") for region in listed]
    p_values = predictor.calibration.p_values_of_regions(masses)
    assert found.regions == [region | {"p_value": p} for region, p in zip(listed, p_values, strict=True)]
    assert found.regions, "nothing was tested"
    smaller = replace(predictor, smallest_ml=0.0).predict(scan, baselines=False).regions
    assert len(smaller) > len(found.regions)


def test_slices_are_ranked_the_worst_first():
    rows = [{"score": score} for score in (1.0, 3.0, 2.0, 3.0)]
    assert make_prediction(slice_rows=rows).rank_slices() == [1, 3, 2, 0]


def test_neighbours_lie_as_far_away_as_the_slices_are_thick(predictor):
    # the model is shown the slices about 4 mm away: another one each, where slices are 1 mm apart
    stack = make_stack()
    thin = replace(make_scan(), geometry=make_geometry(len(stack), 20, SIZE, (4.0, 4.0, 1.0), PIXEL_MM))
    reconstructions = [predictor.predict(scan, baselines=False).reconstruction for scan in (make_scan(), thin)]
    assert not np.allclose(*reconstructions)


def test_a_model_of_an_older_version_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"model.pt: was calibrated by an older version; delete it and run train.py"):
        make_predictor(tmp_path, seen=None)


def test_a_calibration_of_no_numbers_is_named_with_its_file(tmp_path):
    content = load_checkpoint(write_model(tmp_path / "model.pt"))
    content["calibration"]["threshold"] = torch.tensor(np.nan)
    save_checkpoint(tmp_path / "model.pt", content)
    with pytest.raises(DataError, match=r"model\.pt: the voxel threshold of its calibration"):
        Predictor.load(tmp_path / "model.pt", torch.device("cpu"))


def test_a_map_of_no_numbers_is_no_verdict(tmp_path):
    """Weights that are finite, but too large for their products to be."""
    predictor = make_predictor(tmp_path)
    with torch.no_grad():
        for values in predictor.model.parameters():
            values *= 1e30
    with pytest.raises(DataError, match=r"a_T1w\.nii\.gz: its anomaly map holds values that are not finite"):
        predictor.predict(make_scan(), baselines=False)


def test_a_predictor_knows_what_its_model_has_seen(tmp_path):
    predictor = make_predictor(tmp_path, seen=["abc", "def"])
    assert predictor.seen == {"abc", "def"}
    assert predictor.slices["size"] == SIZE
    assert (predictor.batch_size, predictor.false_positive_rate, predictor.smallest_ml) == (4, 0.05, 0.1)
    assert not predictor.model.training


GOOD = make_calibration().to_state()
BAD_MODELS = {
    "no calibration": {"calibration": None},
    "a calibration of nothing": {"calibration": {}},
    "a calibration of another size": {"calibration": GOOD | {"intensity": GOOD["intensity"][..., :16]}},
    "a calibration of another model": {
        "calibration": GOOD | {key: GOOD[key][..., :16, :16] for key in ("intensity", "expected")}
    },
    "no scores": {"calibration": GOOD | {"scan_scores": torch.zeros(0)}},
    "scores of no meaning": {"calibration": GOOD | {"scan_scores": torch.zeros(3, 3)}},
    "a threshold of words": {"calibration": GOOD | {"threshold": "high"}},
    "no slices": {"slices": None},
    "slices of no size": {"slices": SETTINGS | {"size": -1}},
    "slices of words": {"slices": "128"},
    "a precision of its own": {"precision": "fp4"},
    "seen by number": {"seen": 3},
}


@pytest.mark.parametrize("change", BAD_MODELS.values(), ids=BAD_MODELS.keys())
def test_a_model_that_cannot_be_one_is_one_line(change, tmp_path):
    path = write_model(tmp_path / "model.pt")
    content = {key: value for key, value in (load_checkpoint(path) | change).items() if value is not None}
    save_checkpoint(path, content)
    with pytest.raises(DataError, match=r"model\.pt: does not hold a model of this version .*; train again") as error:
        Predictor.load(path, torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_the_misfit_is_its_median_residual_against_the_calibrations(tmp_path):
    scan = make_scan(lesion=np.zeros(make_stack().shape, bool))
    plain = make_predictor(tmp_path / "a")
    reconstruction = reconstruct(plain.model, scan.stack, scan.geometry.slice_spacing_mm)
    stack = torch.from_numpy(scan.stack)
    residual = compute_residual(stack, reconstruction, scan.geometry.sampling_mm)
    median = find_median(plain.calibration.divide(residual, stack > 0)[stack > 0])
    assert plain.predict(scan).misfit is None, "its calibration has no medians"
    for share, misfit in ((1.01, None), (0.5, pytest.approx(2, rel=1e-4))):
        known = make_calibration(median_residuals=torch.tensor([share * median] * 3))
        assert make_predictor(tmp_path / "b", known).predict(scan, baselines=False).misfit == misfit
