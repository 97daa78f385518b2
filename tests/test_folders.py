"""In folders without a layout, names say which file is a scan, of which contrast, and which files are its masks."""

import json

import pytest

from common.cli import DataError
from preprocessing.folders import arrange_folder
from preprocessing.layouts import LAYOUTS, arrange, name_contrast, prefer
from preprocessing.scans import explain_ambiguous, explain_no_scans, search


def take(paths, modality="t1", channels=None):
    """{scan's path: (its name, subject, brain mask, lesion mask)}; checks that every file is accounted for once."""
    found, left_out = arrange_folder(paths, modality, channels=channels)
    used = [mask for one in found for mask in (one.brain_mask, one.lesion_mask) if mask]
    assert sorted([one.path for one in found] + [path for path, _ in left_out] + used) == sorted(paths)
    return {one.path: (one.name, one.identity.subject, one.brain_mask, one.lesion_mask) for one in found}


@pytest.mark.parametrize(
    ("files", "scan", "mask"),
    [
        (["p0.nii.gz", "p0_bet.nii.gz", "p0_bet_mask.nii.gz"], "p0.nii.gz", "p0_bet_mask.nii.gz"),  # HD-BET
        (["p0_bet.nii.gz", "p0_bet_mask.nii.gz"], "p0_bet.nii.gz", "p0_bet_mask.nii.gz"),
        (["p0_bet.nii.gz", "p0_bet_bet.nii.gz"], "p0_bet.nii.gz", "p0_bet_bet.nii.gz"),
        (
            ["p0_T1w.nii", "p0_T1w_synthstrip.nii", "p0_T1w_synthstrip_mask.nii"],
            "p0_T1w.nii",
            "p0_T1w_synthstrip_mask.nii",
        ),
        (["p0_T1w.nii", "p0_stripped.nii", "p0_brain.nii"], "p0_T1w.nii", "p0_brain.nii"),  # SynthStrip's -o and -m
        (["p0_stripped.nii", "p0_brain.nii"], "p0_stripped.nii", "p0_brain.nii"),
        (["p0.nii", "p0_brain.nii", "p0_brain_mask.nii"], "p0.nii", "p0_brain_mask.nii"),  # BET
        (["p0.nii", "p0_brain.nii"], "p0.nii", None),
        (["p0_brain.nii"], "p0_brain.nii", None),
        (
            ["p0_BrainExtractionBrain.nii", "p0_BrainExtractionMask.nii"],
            "p0_BrainExtractionBrain.nii",
            "p0_BrainExtractionMask.nii",
        ),
        (["p0.nii", "p0BrainExtractionBrain.nii", "p0BrainExtractionMask.nii"], "p0.nii", "p0BrainExtractionMask.nii"),
        (["p0_T1w.nii", "p0_T1w_deepbet.nii", "p0_T1w_deepbet_mask.nii"], "p0_T1w.nii", "p0_T1w_deepbet_mask.nii"),
        (["head/p0.nii", "stripped/p0.nii", "brain_masks/p0.nii"], "head/p0.nii", "brain_masks/p0.nii"),
        (["anna/T1.nii", "anna/T1_brain.nii", "anna/brain_mask.nii"], "anna/T1.nii", "anna/brain_mask.nii"),
        (["anna/T1.nii", "anna/mask.nii"], "anna/T1.nii", "anna/mask.nii"),
        (
            ["p0_T1.nii", "rp0_T1.nii", "wmp0_T1.nii", "mwc1p0_T1.nii", "c1p0_T1.nii", "p0_T1_mask.nii"],
            "p0_T1.nii",
            "p0_T1_mask.nii",
        ),
        (["anna/T1_stripped.nii", "anna/T1_brain.nii"], "anna/T1_stripped.nii", "anna/T1_brain.nii"),
        (["masks.nii"], "masks.nii", None),
        (["a/masks_T1w.nii"], "a/masks_T1w.nii", None),
    ],
)
def test_what_skull_strippers_leave_is_one_scan_and_its_mask(files, scan, mask):
    """Of one person alone and among others."""
    ((path, (_, _, brain_mask, lesion_mask)),) = take(files).items()
    assert (path, brain_mask, lesion_mask) == (scan, mask, None)
    if "p0" in scan:
        both = take([file.replace("p0", f"p{i}") for i in range(12) for file in files])
        assert len({subject for _, subject, _, _ in both.values()}) == len(both) == 12
        for i in range(12):
            expected = mask and mask.replace("p0", f"p{i}")
            assert both[scan.replace("p0", f"p{i}")][2] == expected


FLAT = [f"p{i}_{contrast}.nii.gz" for i in range(3) for contrast in ("T1", "T2", "FLAIR", "T1ce", "seg")]


@pytest.mark.parametrize(("modality", "contrast"), [("t1", "T1"), ("t2", "T2"), ("flair", "FLAIR"), ("t1ce", "T1ce")])
def test_modality_is_obeyed_whatever_the_folder(modality, contrast):
    found = take(FLAT, modality)
    assert list(found) == [f"p{i}_{contrast}.nii.gz" for i in range(3)]
    assert {path: lesion for path, (_, _, _, lesion) in found.items()} == {
        f"p{i}_{contrast}.nii.gz": f"p{i}_seg.nii.gz" for i in range(3)
    }
    folders = [f"patient{i}/{name}/{name}.nii" for i in range(2) for name in ("T1", "T2", "FLAIR", "T1ce")]
    assert [*take(folders, modality)] == [f"patient{i}/{contrast}/{contrast}.nii" for i in range(2)]
    folders = [f"{name}/p{i}.nii" for i in range(2) for name in ("T1", "T2", "FLAIR", "T1ce")]
    assert [*take(folders, modality)] == [f"{contrast}/p{i}.nii" for i in range(2)]


def test_where_no_name_tells_a_contrast_all_are_taken():
    for modality in ("t1", "flair"):
        assert len(take(["p1.nii", "p2.nii"], modality)) == 2
    assert [*take(["p1_FLAIR.nii", "p2.nii"], "flair")] == ["p1_FLAIR.nii"]
    assert [*take(["p1_T1.nii", "p2.nii", "p3_dwi.nii"])] == ["p1_T1.nii", "p2.nii"]


def test_nnunet():
    paths = [f"imagesTr/BRATS_{i:03d}_000{channel}.nii.gz" for i in (1, 2) for channel in range(4)]
    paths += [f"labelsTr/BRATS_{i:03d}.nii.gz" for i in (1, 2)]
    assert take(paths, "t1", {0: "flair", 1: "t1", 2: "t1ce", 3: "t2"}) == {
        f"imagesTr/BRATS_{i:03d}_0001.nii.gz": (
            f"BRATS_{i:03d}_0001", f"BRATS_{i:03d}", None, f"labelsTr/BRATS_{i:03d}.nii.gz"
        )
        for i in (1, 2)
    }  # fmt: skip
    assert [*take(paths)] == [f"imagesTr/BRATS_{i:03d}_0000.nii.gz" for i in (1, 2)]


def test_channels_are_read_from_dataset_json(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    for channel in range(2):
        (tmp_path / f"imagesTr/case_001_000{channel}.nii.gz").touch()
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "FLAIR", "1": "T1w"}}))
    assert [scan.path.name for scan in search(tmp_path).scans] == ["case_001_0001.nii.gz"]
    assert [scan.path.name for scan in search(tmp_path, modality="flair").scans] == ["case_001_0000.nii.gz"]
    for broken in ("", "[]", '{"modality": 3}', '{"channel_names": {"x": "T1"}}'):
        (tmp_path / "dataset.json").write_text(broken)
        assert [scan.path.name for scan in search(tmp_path).scans] == ["case_001_0000.nii.gz"]


def test_names_tell_people_of_one_file_name_apart():
    paths = [
        "anna/scan1.nii",
        "anna/scan2.nii",
        "bert/scan1.nii",
        "S1/bl/T1.nii",
        "S1/y1/T1.nii",
        "p2/series_3/scan.nii",
    ]
    assert sorted(name for name, *_ in take(paths).values()) == [
        "S1_bl", "S1_y1", "anna_scan1", "anna_scan2", "bert_scan1", "p2_series_3",
    ]  # fmt: skip
    assert [name for name, *_ in take(["Utrecht/1/T1.nii", "Singapore/1/T1.nii"]).values()] == [
        "Singapore_1_T1", "Utrecht_1_T1",
    ]  # fmt: skip


def test_freesurfer_gives_one_volume_a_session():
    files = [
        f"p1_m{m}/mri/{name}.mgz" for m in (0, 12) for name in ("orig", "T1", "norm", "aseg", "wm", "brain", "filled")
    ]
    files += ["p1_m0/mri/orig/001.mgz", "p1_m0/mri/transforms/x.mgz"]
    assert [(path, who) for path, (_, who, _, _) in take(files).items()] == [
        ("p1_m0/mri/norm.mgz", "p1"),
        ("p1_m12/mri/norm.mgz", "p1"),
    ]
    assert [*take([file for file in files if "norm" not in file])] == ["p1_m0/mri/T1.mgz", "p1_m12/mri/T1.mgz"]


def test_localizers_are_no_scans_where_others_are():
    assert [*take(["p1_localizer.nii", "p1_T1.nii", "p2_T1.nii"])] == ["p1_T1.nii", "p2_T1.nii"]
    assert [*take(["p1_localizer.nii"])] == ["p1_localizer.nii"]


def test_a_mask_of_nobody_knows_what_is_left_out():
    found, left_out = arrange_folder(["images/p1.nii", "masks/p1.nii"], "t1")
    assert [one.path for one in found] == ["images/p1.nii"]
    assert left_out == [("masks/p1.nii", "a mask of unknown kind; rename it to p1_brain_mask or p1_lesion_mask")]


@pytest.mark.parametrize(
    ("path", "contrast"),
    [
        ("p1_T1w.nii", "t1"),
        ("p1_FLAIR.nii", "flair"),
        ("P1_T1_FLAIR.nii", "flair"),
        ("p1_T2_FLAIR.nii", "flair"),
        ("BraTS-GLI-00005-100-t1c.nii", "t1ce"),
        ("sub-1_ce-gadolinium_T1w.nii", "t1ce"),
        ("p1-t2f.nii", "flair"),
        ("p1_mprage.nii", "t1"),
        ("p1_dwi.nii", "another contrast"),
        ("flair/p1.nii", "flair"),
        ("flair/p1_T1.nii", "t1"),
        ("p1.nii", ""),
        ("T1000.nii", ""),
    ],
)
def test_contrasts(path, contrast):
    assert name_contrast(path) == contrast


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("sub-1_run-2_T1w.nii", "sub-1_run-10_T1w.nii"),
        ("sub-1_T1w.nii", "sub-1_rec-norm_T1w.nii"),
        ("sub-1_acq-MPRAGE_T1w.nii", "sub-1_acq-FLASH_T1w.nii"),
        ("sub-loc_run-1_T1w.nii", "sub-loc_acq-localizer_T1w.nii"),
        ("sub-1_part-mag_T1w.nii", "sub-1_part-phase_T1w.nii"),
        ("sub-1_run-1_T1w.nii", "sub-1_acq-scout_T1w.nii"),
        ("p2.nii", "p10.nii"),
    ],
)
def test_the_better_volume_comes_first(first, second):
    assert prefer(first) < prefer(second)
    if first.startswith("sub-"):
        who = first.split("_")[0]
        paths = [f"{who}/anat/{name}" for name in (second, first)]
        found, left_out = arrange(LAYOUTS["bids"], paths, "t1")
        assert [one.path for one in found] == [paths[1]]
        assert left_out == [(paths[0], f"its session is read from {paths[1]}")]


def test_sourcedata_and_a_second_data_set(tmp_path):
    paths = ["sub-1/anat/sub-1_T1w.nii", "sourcedata/sub-1/anat/sub-1_T1w.nii", "sourcedata/sub-2/anat/sub-2_T1w.nii"]
    found, _ = arrange(LAYOUTS["bids"], paths, "t1")
    assert [one.path for one in found] == paths[:1]
    # two people of two sets: both are meant, so both are refused by name
    for place in ("ds1", "ds2"):
        (tmp_path / place / "sub-1/anat").mkdir(parents=True)
        (tmp_path / place / "sub-1/anat/sub-1_T1w.nii").touch()
    assert len(search(tmp_path).refused) == 2


def test_messages_tell_what_was_taken_and_the_cure(tmp_path):
    for name in ("p1_1_T1.nii", "p1_2_T1.nii", "P01_m12.nii", "p2_FLAIR.nii"):
        (tmp_path / name).touch()
    found = search(tmp_path)
    assert [(scan.name, scan.subject) for scan in found.scans] == [
        ("P01_m12", "p1"),
        ("p1_1_T1", "p1"),
        ("p1_2_T1", "p1"),
    ]
    assert "p1_1_T1.nii is of p1 rather than p1_1" in explain_ambiguous(found.scans, tmp_path)
    assert "--subject-pattern" in explain_ambiguous(found.scans, tmp_path)
    told = search(tmp_path, pattern=r"(p\d_\d)_")
    assert [scan.subject for scan in told.scans] == ["p1_1", "p1_2"]
    assert [path for path, _ in told.refused] == [str(tmp_path / "P01_m12.nii")]
    assert not explain_ambiguous(told.scans, tmp_path)
    (tmp_path / "flair").mkdir()
    (tmp_path / "p2_FLAIR.nii").rename(tmp_path / "flair/p2_FLAIR.nii")
    found = search(tmp_path / "flair")
    assert not found.scans
    assert explain_no_scans(tmp_path, found.left_out) == f"{tmp_path}: its scans show flair; give --modality flair"


def test_no_folder_is_one_line(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        search(tmp_path / "nowhere")
