"""Maps lie on their scans, viewers open them as they should, BIDS names are valid."""

import gzip
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from evaluation.nifti import name_bids, name_owner, read_owner, write_bids_description, write_bids_maps, write_maps
from evaluation.predictor import Prediction
from tests.predictions import make_prediction, restore_map

AFFINE = np.array([[0, 0, 4.0, -30], [-2.0, 0, 0, 20], [0, 1.0, 0, -10], [0, 0, 0, 1]])  # voxels of 8 mm3


def make_map() -> np.ndarray:
    """(4, 5, 6) with values below, at and above 3, beside a peak of 60, and NaN."""
    anomaly = np.ones((4, 5, 6), dtype=np.float32)
    anomaly[0, 0, :3] = 2.999, 3.0, 7.5
    anomaly[1, 4, 3:5] = 60, 5.9
    anomaly[3] = np.nan
    return anomaly


def predict_map(affine: np.ndarray = AFFINE) -> Prediction:
    """A prediction with that map on a scan with this affine; the threshold is 3."""
    made = make_prediction(threshold=3.0)
    geometry = replace(made.scan.geometry, affine=tuple(map(tuple, affine.tolist())))
    return restore_map(replace(made, scan=replace(made.scan, geometry=geometry)), make_map())


def check_image(image: nib.Nifti1Image, scale: tuple[float, float], intent: str) -> None:
    np.testing.assert_allclose(image.get_qform(), AFFINE, atol=1e-6)
    np.testing.assert_allclose(image.get_sform(), AFFINE, atol=1e-6)
    assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 1), "scanner coordinates"
    assert image.header.get_xyzt_units()[0] == "mm"
    assert (float(image.header["cal_min"]), float(image.header["cal_max"])) == scale
    assert image.header.get_intent()[0] == intent


def test_a_map_and_its_mask_are_written_on_the_scans_grid(tmp_path):
    write_maps(tmp_path / "new" / "a_T1w", predict_map())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a_T1w_anomaly.nii.gz", "a_T1w_mask.nii.gz"]
    anomaly, mask = (nib.load(tmp_path / f"new/a_T1w_{what}.nii.gz") for what in ("anomaly", "mask"))
    check_image(anomaly, (1.5, 48.0), "estimate")
    check_image(mask, (0.0, 1.0), "label")
    assert anomaly.get_data_dtype() == np.float32
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(anomaly.get_fdata(), make_map())
    np.testing.assert_array_equal(np.argwhere(mask.get_fdata() == 1), [[0, 0, 1], [0, 0, 2], [1, 4, 3]])
    assert mask.get_fdata().sum() == 3
    assert bytes(anomaly.header["descrip"]).startswith(b"anomaly, times the scan's median")
    assert bytes(mask.header["descrip"]).startswith(b"marked, threshold 3.000")


@pytest.mark.parametrize(("shear", "says"), [(0.0, 1), (0.0005, 1), (0.05, 0), (-0.3, 0)])
def test_a_sheared_grid_has_no_qform_which_could_not_say_it(shear, says, tmp_path):
    affine = AFFINE.copy()
    affine[0, 1] += shear
    write_maps(tmp_path / "a", predict_map(affine))
    image = nib.load(tmp_path / "a_anomaly.nii.gz")
    assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (says, 1)
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)
    np.testing.assert_allclose(image.header.get_zooms(), nib.affines.voxel_sizes(affine), rtol=1e-5)


def test_bids_names_are_valid_and_unlike():
    names = name_bids([("sub-01", "ses-1"), ("sub-01", "ses-2"), ("a_b", ""), ("c", ""), ("a-b", None)])
    assert names == [
        "sub-01/ses-1/anat/sub-01_ses-1",
        "sub-01/ses-2/anat/sub-01_ses-2",
        "sub-ab/anat/sub-ab_run-1",
        "sub-c/anat/sub-c",
        "sub-ab/anat/sub-ab_run-2",
    ]


def test_a_bids_derivative_describes_itself(tmp_path):
    write_bids_description(tmp_path / "bids", tmp_path / "raw", "abc123")
    description = json.loads((tmp_path / "bids/dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["BIDSVersion"] == "1.10.0"
    assert description["Name"]
    assert "abc123" in description["GeneratedBy"][0]["Description"]
    assert description["GeneratedBy"][0]["Name"] == "brain-anomaly-autoencoder"
    uri = (tmp_path / "raw").as_uri()
    assert (description["SourceDatasets"], description["DatasetLinks"]) == ([{"URL": uri}], {"raw": uri})


@pytest.mark.skipif(not shutil.which("bids-validator-deno"), reason="no BIDS validator is installed")
def test_the_bids_validator_finds_no_error(tmp_path):
    write_bids_description(tmp_path, tmp_path, "abc123")
    for name in ("sub-a/anat/sub-a", "sub-b/ses-1/anat/sub-b_ses-1_run-2"):
        write_bids_maps(tmp_path, name, predict_map(), Path("raw"))
    found = subprocess.run(["bids-validator-deno", tmp_path, "--json"], capture_output=True, text=True, check=False)
    issues = json.loads(found.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []


def test_bids_maps_have_sidecars(tmp_path):
    write_bids_maps(tmp_path, "sub-a/anat/sub-a", predict_map(), Path("raw"))
    folder = tmp_path / "sub-a/anat"
    stems = ["sub-a_desc-anomaly_mask", "sub-a_desc-anomaly_statmap"]
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{stem}.{ending}" for stem in stems for ending in ("json", "nii.gz")
    ]
    images = [nib.load(folder / f"{stem}.nii.gz") for stem in stems]
    check_image(images[0], (0.0, 1.0), "label")
    check_image(images[1], (1.5, 48.0), "estimate")
    assert np.argwhere(images[0].get_fdata() > 0).tolist() == [[0, 0, 1], [0, 0, 2], [1, 4, 3]]
    np.testing.assert_array_equal(images[1].get_fdata(), make_map())
    mask, statmap = (json.loads((folder / f"{stem}.json").read_text()) for stem in stems)
    for sidecar in (mask, statmap):
        assert sidecar["SpatialReference"] == "orig"
        assert (sidecar["Sources"], sidecar["Label"]) == (["bids:raw:one.nii.gz"], "abnormal")
        assert (sidecar["Score"], sidecar["PValue"]) == (5.0, 0.1)
        assert sidecar["Description"]
    assert (mask["Type"], mask["Threshold"], mask["ShareOfPeak"]) == ("Lesion", 3.0, 0.125)
    assert statmap["Units"].startswith("times the scan's")


def test_a_map_says_whose_it_is(tmp_path):
    made = predict_map()
    scan = replace(made.scan, hashes=("0123456789abcdef" * 2, "f" * 32))
    write_maps(tmp_path / "a", replace(made, scan=scan))
    assert name_owner(scan) == "0123456789abcdef"
    for what in ("anomaly", "mask"):
        assert read_owner(tmp_path / f"a_{what}.nii.gz") == "0123456789abcdef"
    write_maps(tmp_path / "b", made)
    (tmp_path / "c_anomaly.nii.gz").write_bytes(b"no gzip")
    (tmp_path / "d_anomaly.nii.gz").write_bytes(gzip.compress(b"short"))
    (tmp_path / "e_anomaly.nii.gz").write_bytes((tmp_path / "a_anomaly.nii.gz").read_bytes()[:60])
    for name in "bcdef":
        assert read_owner(tmp_path / f"{name}_anomaly.nii.gz") == ""
