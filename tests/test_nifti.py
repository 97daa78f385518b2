"""Maps lie on their scans, viewers open them as they should, regions are named by side, BIDS names are valid."""

import json

import nibabel as nib
import numpy as np
import pytest

from evaluation.maps import list_regions, locate_stack, name_bids, write_bids_description, write_bids_maps, write_maps
from preprocessing.volume import cut_stack, read_volume, restore_to_grid
from tests.conftest import make_head

AFFINE = np.array([[0, 0, 4.0, -30], [-2.0, 0, 0, 20], [0, 1.0, 0, -10], [0, 0, 0, 1]])  # voxels of 8 mm3


def make_map() -> np.ndarray:
    """(4, 5, 6) with values below, at and above 3, and NaN."""
    anomaly = np.ones((4, 5, 6), dtype=np.float32)
    anomaly[0, 0, :3] = 2.999, 3.0, 7.5
    anomaly[3] = np.nan
    return anomaly


def reorient(image: nib.Nifti1Image, axes: str) -> nib.Nifti1Image:
    ornt = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(axes)))
    return image.as_reoriented(ornt)


def check_image(image: nib.Nifti1Image, top: float) -> None:
    np.testing.assert_allclose(image.get_qform(), AFFINE, atol=1e-6)
    np.testing.assert_allclose(image.get_sform(), AFFINE, atol=1e-6)
    assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 1), "scanner coordinates"
    assert image.header.get_xyzt_units()[0] == "mm"
    assert float(image.header["cal_max"]) == top
    assert float(image.header["cal_min"]) == 0


def test_a_map_and_its_mask_are_written_on_the_scans_grid(tmp_path):
    write_maps(tmp_path / "new" / "a_T1w", make_map(), AFFINE, 3.0)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a_T1w_anomaly.nii.gz", "a_T1w_mask.nii.gz"]
    anomaly, mask = (nib.load(tmp_path / f"new/a_T1w_{what}.nii.gz") for what in ("anomaly", "mask"))
    check_image(anomaly, 6.0)
    check_image(mask, 1.0)
    assert anomaly.get_data_dtype() == np.float32
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(anomaly.get_fdata(), make_map())
    np.testing.assert_array_equal(np.argwhere(mask.get_fdata() == 1), [[0, 0, 1], [0, 0, 2]])
    assert mask.get_fdata().sum() == 2
    assert bytes(anomaly.header["descrip"]).startswith(b"anomaly, times")
    assert bytes(mask.header["descrip"]).startswith(b"anomaly at or above 3.000")


@pytest.mark.parametrize("axes", ["RAS", "LIP"])
def test_regions_know_their_side(axes):
    # voxels of 4 mm; the brain's middle is at x = 38 mm, the edge of what counts as the middle at 33 and 43 mm
    values = np.ones((20, 20, 20), dtype=np.float32)
    values[16:19, 2:5, 2:5], values[2:5, 8:11, 8:11], values[9:11, 3:5, 9:11] = 9, 9, 9
    image = reorient(nib.Nifti1Image(values, np.diag([4.0, 4.0, 4.0, 1.0])), axes)
    regions = list_regions(image.get_fdata(), image.affine, 5.0, 0.0)
    assert sorted((region["side"], round(region["x_mm"])) for region in regions) == [
        ("left", 12),
        ("middle", 38),
        ("right", 68),
    ]


def test_a_region_within_five_mm_of_the_middle_is_on_neither_side():
    values = np.full((41, 3, 9), np.nan, dtype=np.float32)
    values[5:36] = 1  # the middle of what was scored is at x = 20 mm, not that of the grid's other end
    values[36:41] = np.nan
    for y, x in ((0, 16), (2, 15), (4, 24), (6, 25)):
        values[x, 1, y] = 9
    regions = list_regions(values, np.eye(4), 5.0, 0.0)
    assert {region["x_mm"]: region["side"] for region in regions} == {
        16: "middle",
        15: "left",
        24: "middle",
        25: "right",
    }


def test_the_middle_is_that_of_the_scored_brain():
    values = np.full((60, 3, 3), np.nan, dtype=np.float32)
    values[:21] = 1
    values[20, 1, 1] = 9
    (region,) = list_regions(values, np.eye(4), 5.0, 0.0)
    assert (region["x_mm"], region["side"]) == (20, "right")


def test_regions_by_hand():
    anomaly = np.ones((12, 12, 12), dtype=np.float32)
    anomaly[0] = np.nan
    anomaly[2:4, 2, 2] = 5, 15  # 2 voxels
    anomaly[8:11, 8, 8] = 5  # 3 voxels at the threshold
    anomaly[11, 9, 8] = 5  # touches over an edge only: a region of its own
    large, small = list_regions(anomaly, AFFINE, 5.0, 0.0159)
    assert large["volume_ml"] == pytest.approx(0.024)
    assert small["volume_ml"] == pytest.approx(0.016)
    assert (small["peak"], small["mean"], large["peak"], large["mean"]) == (15, 10, 5, 5)
    centre = nib.affines.apply_affine(AFFINE, [2.75, 2, 2])  # weighed by the anomaly
    assert [small[f"{axis}_mm"] for axis in "xyz"] == pytest.approx(list(centre))
    centre = nib.affines.apply_affine(AFFINE, [9, 8, 8])
    assert [large[f"{axis}_mm"] for axis in "xyz"] == pytest.approx(list(centre))
    assert len(list_regions(anomaly, AFFINE, 5.0, 0.0)) == 3
    assert len(list_regions(anomaly, AFFINE, 5.0, 0.0161)) == 1
    assert list_regions(anomaly, AFFINE, 16.0, 0.0) == []


@pytest.mark.parametrize("axes", ["RAS", "PSR", "LPI"])
def test_a_stack_knows_where_it_lies(axes, tmp_path):
    nib.save(reorient(make_head(), axes), tmp_path / "head.nii.gz")
    volume = read_volume(tmp_path / "head.nii.gz")
    stack, record = cut_stack(volume, volume.values > 0, True, 0.7, 64, 200.0)
    affine = locate_stack(record)
    grid = np.indices(stack.shape[::-1]).reshape(3, -1)  # right, anterior, superior
    places = nib.affines.apply_affine(affine, grid.T).T.reshape(3, *stack.shape[::-1])
    for axis in range(3):
        there = places[axis].transpose(2, 1, 0)  # as the stack: (superior, anterior, right)
        native = restore_to_grid(np.where(stack > 0, there, np.nan), record)
        inside = np.argwhere(np.isfinite(native))
        wanted = nib.affines.apply_affine(volume.affine, inside)[:, axis]
        assert np.abs(np.median(native[tuple(inside.T)] - wanted)) < 0.05
        assert np.abs(native[tuple(inside.T)] - wanted).max() < 3, "the rim takes its neighbours' values"


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
    write_bids_description(tmp_path / "bids", "Dataset/test", "abc123")
    description = json.loads((tmp_path / "bids/dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["BIDSVersion"] == "1.10.0"
    assert description["Name"]
    assert "abc123" in description["GeneratedBy"][0]["Description"]
    assert description["GeneratedBy"][0]["Name"] == "brain-anomaly-autoencoder"
    assert description["SourceDatasets"] == [{"URL": "Dataset/test"}]


def test_bids_maps_have_sidecars(tmp_path):
    about = {"Sources": ["raw/a_T1w.nii.gz"], "Score": 4.5}
    write_bids_maps(tmp_path, "sub-a/anat/sub-a", make_map(), AFFINE, 3.0, about)
    folder = tmp_path / "sub-a/anat"
    stems = ["sub-a_desc-anomaly_mask", "sub-a_desc-anomaly_statmap"]
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{stem}.{ending}" for stem in stems for ending in ("json", "nii.gz")
    ]
    images = [nib.load(folder / f"{stem}.nii.gz") for stem in stems]
    check_image(images[0], 1.0)
    check_image(images[1], 6.0)
    assert np.argwhere(images[0].get_fdata() > 0).tolist() == [[0, 0, 1], [0, 0, 2]]
    np.testing.assert_array_equal(images[1].get_fdata(), make_map())
    mask, statmap = (json.loads((folder / f"{stem}.json").read_text()) for stem in stems)
    for sidecar in (mask, statmap):
        assert sidecar["SpatialReference"] == "orig"
        assert (sidecar["Sources"], sidecar["Score"]) == (["raw/a_T1w.nii.gz"], 4.5)
        assert sidecar["Description"]
    assert (mask["Type"], mask["Threshold"]) == ("Lesion", 3.0)
    assert statmap["Units"].startswith("times the scan's")
