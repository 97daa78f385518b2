"""Of the masks in a BIDS tree that of the lesion on the scan's grid is found, by any of its names."""

import pytest

from preprocessing.layouts import LAYOUTS, arrange

LESION_NAMES = (
    "{0}_label-lesion_mask", "{0}_desc-lesion_mask", "{0}_T1w_label-lesion_roi", "{0}_label-lesion_roi",
    "{0}_T1w_lesion-manual", "{0}_space-orig_label-lesion_mask", "{0}_space-T1w_label-lesion_dseg", "{0}_T1w_lesion",
    "{0}_lesion_mask", "{0}_dseg", "{0}_T1w_label-lesion_mask", "{0}_acq-x_label-lesion_mask", "{0}_lesion",
    "{0}_label-L_mask", "{0}_label-lesion_space-T1w_desc-manual_mask", "{0}_lesion_roi",
)  # fmt: skip
OTHER_NAMES = (
    "{0}_space-MNI152NLin2009cAsym_label-lesion_mask", "{0}_desc-brain_mask", "{0}_label-GM_probseg",
    "{0}_desc-aseg_dseg", "{0}_FLAIR_lesion", "{0}_T2w_label-lesion_mask",
)  # fmt: skip


@pytest.mark.parametrize("name", LESION_NAMES)
@pytest.mark.parametrize("stem", ["sub-01", "sub-01_ses-2"])
def test_lesion_masks_in_bids_go_by_many_names(name, stem):
    folder = stem.replace("_", "/") + "/anat"
    paths = [f"{folder}/{stem}_T1w.nii.gz", f"derivatives/manual/{folder}/{name.format(stem)}.nii.gz"]
    (scan,), left_out = arrange(LAYOUTS["bids"], paths, "t1")
    assert (scan.path, scan.lesion_mask) == tuple(paths)
    assert left_out == []


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_masks_in_bids_are_of_no_lesion_on_the_scans_grid(name):
    paths = ["sub-01/anat/sub-01_T1w.nii.gz", f"derivatives/manual/sub-01/anat/{name.format('sub-01')}.nii.gz"]
    (scan,), _ = arrange(LAYOUTS["bids"], paths, "t1")
    assert scan.lesion_mask is None


def test_a_pipelines_segmentation_of_tissues_is_no_lesion_mask():
    paths = ["sub-01/anat/sub-01_T1w.nii.gz", "derivatives/fmriprep/sub-01/anat/sub-01_dseg.nii.gz"]
    (scan,), left_out = arrange(LAYOUTS["bids"], paths, "t1")
    assert scan.lesion_mask is None
    assert left_out == [(paths[1], "a label map, not a scan")]


def test_an_acquisition_in_one_name_alone_parts_no_scan_from_its_mask():
    def find(scan, *masks):
        paths = [f"sub-01/anat/{scan}_T1w.nii", *(f"derivatives/m/sub-01/anat/{mask}_lesion.nii" for mask in masks)]
        mask = arrange(LAYOUTS["bids"], paths, "t1")[0][0].lesion_mask
        return mask and mask.rpartition("/")[2].removesuffix("_lesion.nii")

    assert find("sub-01_acq-a", "sub-01") == "sub-01"
    assert find("sub-01", "sub-01_acq-a") == "sub-01_acq-a"
    assert find("sub-01_acq-b_run-2", "sub-01", "sub-01_acq-b_run-2") == "sub-01_acq-b_run-2", "its own before others"
    assert find("sub-01_acq-b", "sub-01_acq-a") is None, "that of another acquisition"
