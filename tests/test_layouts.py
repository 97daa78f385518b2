"""Trees that stand as the public data sets do give the right scans, masks, sessions and orientation."""

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from preprocessing.layouts import CONTRAST, LABEL, LAYOUTS, arrange, name_subject, recognise, strip_ending
from preprocessing.preprocess_oasis import main as preprocess
from preprocessing.scans import search
from preprocessing.store import list_scans
from preprocessing.volume import read_volume
from tests.conftest import make_head

HEAD = make_head((30, 36, 33), (5.5, 5.5, 5.5))


def save(path, axes="RAS", how="nifti", labels=False):
    """Store the test brain (or a label map over it) at this path, its axes pointing where `axes` says.

    how  "nifti" with an honest header, "analyze", "silent" (codes 0) or "claims RAS"
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    to = ornt_transform(nib.io_orientation(HEAD.affine), axcodes2ornt(axes))
    values = apply_orientation(HEAD.get_fdata(), to).astype(np.int16)
    values = (values > (0 if "brain" in path.name else 600)).astype(np.int16) if labels else values
    affine = HEAD.affine @ inv_ornt_aff(to, HEAD.shape)
    if how == "analyze":
        image = nib.AnalyzeImage(values, None)
    elif how == "claims RAS":
        image = nib.Nifti1Image(values, np.diag([5.5, 5.5, 5.5, 1]))
    else:
        image = (nib.Nifti1Pair if path.name.endswith(".img") else nib.Nifti1Image)(values, affine)
        image.set_qform(affine, 1 if how == "nifti" else 0)
        image.set_sform(affine, 1 if how == "nifti" else 0)
    image.header.set_zooms((5.5, 5.5, 5.5))
    nib.save(image, path)


def make_oasis1(root):
    for nesting, session in (("disc1/", "OAS1_0001_MR1"), ("", "OAS1_0001_MR2"), ("disc2/", "OAS1_0002_MR1")):
        folder = root / f"{nesting}{session}"
        atlas = folder / "PROCESSED/MPRAGE/T88_111" / f"{session}_mpr_n4_anon_111_t88"
        save(atlas.with_name(atlas.name + "_masked_gfc.img"), "LAS", "analyze")
        save(atlas.with_name(atlas.name + "_gfc.img"), "LAS", "analyze")
        save(folder / "PROCESSED/MPRAGE/SUBJ_111" / f"{session}_mpr_n4_anon_sbj_111.img", "ASL", "analyze")
        save(folder / "FSL_SEG" / f"{session}_mpr_n4_anon_111_t88_masked_gfc_fseg.img", "LAS", "analyze", labels=True)
        for repeat in (1, 2):
            save(folder / "RAW" / f"{session}_mpr-{repeat}_anon.img", "ASL", "analyze")


def make_oasis2(root):
    for session in ("OAS2_0001_MR1", "OAS2_0001_MR2", "OAS2_0002_MR1"):
        for repeat in (1, 2):
            save(root / f"OAS2_RAW_PART1/{session}/RAW/mpr-{repeat}.nifti.img", "ASL", "silent")


def make_oasis3(root):
    save(root / "OAS30001_MR_d0757/anat1/NIFTI/sub-OAS30001_ses-d0757_run-01_T1w.nii.gz", "PIR")
    save(root / "OAS30001_MR_d0757/anat2/NIFTI/sub-OAS30001_ses-d0757_run-02_T1w.nii.gz", "PIR")
    save(root / "OAS30001_MR_d2430/anat1/sub-OAS30001_ses-d2430_T1w.nii.gz", "PIR")
    save(root / "OAS30001_MR_d2430/anat3/sub-OAS30001_ses-d2430_T2w.nii.gz", "PIR")
    save(root / "OAS30002_MR_d0001/anat1/sub-OAS30002_ses-d0001_T1w.nii.gz", "PIR")


def make_neurite(root):
    for session, how in (("OASIS_OAS1_0001_MR1", "claims RAS"), ("OASIS_OAS1_0002_MR1", "nifti")):
        for volume in ("norm", "aligned_norm", "orig", "aligned_orig"):
            save(root / session / f"{volume}.nii.gz", "LIA", how)
        for labels in ("seg4", "seg24", "aligned_seg35"):
            save(root / session / f"{labels}.nii.gz", "LIA", how, labels=True)


def make_bids(root):
    for subject in ("sub-01", "sub-02"):
        for session in ("ses-a", "ses-b"):
            stem = f"{subject}_{session}"
            save(root / subject / session / "anat" / f"{stem}_run-1_T1w.nii.gz", "LPI")
            save(root / subject / session / "anat" / f"{stem}_run-2_T1w.nii.gz", "LPI")
            save(root / subject / session / "anat" / f"{stem}_FLAIR.nii.gz", "LPI")
            derived = root / "derivatives/fmriprep" / subject / session / "anat"
            save(derived / f"{stem}_run-1_desc-brain_mask.nii.gz", "LPI", labels=True)
            save(derived / f"{stem}_run-1_space-MNI152NLin6Asym_desc-brain_mask.nii.gz", labels=True)
            save(derived / f"{stem}_run-1_desc-preproc_T1w.nii.gz", "LPI")
            save(derived / f"{stem}_run-1_T1w.nii.gz", "LPI")
            save(derived / f"{stem}_run-1_dseg.nii.gz", "LPI", labels=True)


def make_ixi(root):
    for subject in ("IXI105-HH-1471", "IXI002-Guys-0828"):
        save(root / f"{subject}-T1.nii.gz", "PSR")
        save(root / f"{subject}-T2.nii.gz", "PSR")


def make_brats(root):
    for name in ("BraTS20_Training_001", "BraTS20_Training_002"):
        for contrast in ("t1", "t1ce", "t2", "flair"):
            save(root / name / f"{name}_{contrast}.nii.gz", "LPS")
        save(root / name / f"{name}_seg.nii.gz", "LPS", labels=True)
    for name in ("BraTS-GLI-00005-100", "BraTS-GLI-00005-101"):
        for contrast in ("t1n", "t1c", "t2w", "t2f"):
            save(root / name / f"{name}-{contrast}.nii.gz", "LPS")
        save(root / name / f"{name}-seg.nii.gz", "LPS", labels=True)


def make_atlas2(root):
    for subject in ("sub-r001s001", "sub-r001s002"):
        stem = root / f"Training/R001/{subject}/ses-1/anat/{subject}_ses-1_space-MNI152NLin2009aSym"
        save(stem.with_name(stem.name + "_T1w.nii.gz"), "LAS")
        save(stem.with_name(stem.name + "_label-L_desc-T1lesion_mask.nii.gz"), "LAS", labels=True)


def make_folder(root):
    save(root / "Ann Ångström.nii", "PIL")
    save(root / "more/patient7_visit1_T1w.nii.gz")
    save(root / "more/patient7_visit2_T1w.nii.gz")
    save(root / "more/patient7_visit2_T1w_brain.nii.gz")
    save(root / "more/patient7_visit2_seg.nii.gz", labels=True)
    save(root / "more/patient7_visit1_T1w_dseg.nii.gz", labels=True)
    save(root / "more/aparc+aseg.nii", labels=True)
    save(root / "persons/bert/mri/T1.mgz", "LIA")
    save(root / "persons/bert/mri/aseg.mgz", "LIA", labels=True)
    save(root / "persons/ernie/mri/T1.mgz", "LIA")


# name, subject, session of every scan; the file of the first; how many files are left out; masks (brain, lesion)
EXPECTED = {
    "oasis1": (
        make_oasis1,
        [
            ("OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc", "OAS1_0001", "MR1"),
            ("OAS1_0001_MR2_mpr_n4_anon_111_t88_masked_gfc", "OAS1_0001", "MR2"),
            ("OAS1_0002_MR1_mpr_n4_anon_111_t88_masked_gfc", "OAS1_0002", "MR1"),
        ],
        15,
        (0, 0),
    ),
    "oasis2": (
        make_oasis2,
        [
            ("OAS2_0001_MR1", "OAS2_0001", "MR1"),
            ("OAS2_0001_MR2", "OAS2_0001", "MR2"),
            ("OAS2_0002_MR1", "OAS2_0002", "MR1"),
        ],
        3,
        (0, 0),
    ),
    "oasis3": (
        make_oasis3,
        [
            ("sub-OAS30001_ses-d0757_run-01_T1w", "OAS30001", "d0757"),
            ("sub-OAS30001_ses-d2430_T1w", "OAS30001", "d2430"),
            ("sub-OAS30002_ses-d0001_T1w", "OAS30002", "d0001"),
        ],
        2,
        (0, 0),
    ),
    "neurite-oasis": (
        make_neurite,
        [("OASIS_OAS1_0001_MR1", "OAS1_0001", "MR1"), ("OASIS_OAS1_0002_MR1", "OAS1_0002", "MR1")],
        12,
        (0, 0),
    ),
    "bids": (
        make_bids,
        [(f"sub-0{i}_ses-{s}_run-1_T1w", f"sub-0{i}", f"ses-{s}") for i in (1, 2) for s in "ab"],
        24,
        (4, 0),
    ),
    "ixi": (
        make_ixi,
        [("IXI002-Guys-0828-T1", "IXI002", ""), ("IXI105-HH-1471-T1", "IXI105", "")],
        2,
        (0, 0),
    ),
    "brats": (
        make_brats,
        [
            ("BraTS-GLI-00005-100-t1n", "BraTS-GLI-00005", "100"),
            ("BraTS-GLI-00005-101-t1n", "BraTS-GLI-00005", "101"),
            ("BraTS20_Training_001_t1", "BraTS20_Training_001", ""),
            ("BraTS20_Training_002_t1", "BraTS20_Training_002", ""),
        ],
        12,
        (0, 4),
    ),
    "atlas2": (
        make_atlas2,
        [(f"sub-r001s00{i}_ses-1_space-MNI152NLin2009aSym_T1w", f"sub-r001s00{i}", "ses-1") for i in (1, 2)],
        0,
        (0, 2),
    ),
    "folder": (
        make_folder,
        [
            ("Ann Ångström", "Ann Ångström", ""),
            ("bert", "bert", ""),
            ("ernie", "ernie", ""),
            ("patient7_visit1_T1w", "patient7", "visit1"),
            ("patient7_visit2_T1w", "patient7", "visit2"),
        ],
        4,
        (0, 1),
    ),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The slices of the brain that all trees hold, from a file that is beyond doubt."""
    folder = tmp_path_factory.mktemp("reference")
    save(folder / "train/normal/reference.nii")
    assert preprocess(["--raw", str(folder), "--processed", str(folder / "out"), "--size", "32", "--workers", "1"]) == 0
    return next(list_scans(folder / "out")).read_stack()


@pytest.mark.parametrize("layout", EXPECTED)
def test_layout_is_recognised_and_its_slices_are_upright(layout, reference, tmp_path, capsys):
    make, expected, left_out, masks = EXPECTED[layout]
    make(tmp_path / "raw")
    found = search(tmp_path / "raw")
    assert found.layout == layout
    assert sorted((scan.name, scan.subject, scan.session) for scan in found.scans) == expected
    assert len(found.left_out) == left_out
    assert not found.refused
    assert (
        sum(s.brain_mask is not None for s in found.scans),
        sum(s.lesion_mask is not None for s in found.scans),
    ) == masks
    for scan in found.scans:
        for mask in filter(None, (scan.brain_mask, scan.lesion_mask)):
            assert mask.name.startswith(scan.subject)

    options = ["--size", "32", "--workers", "1"]
    command = ["--raw", str(tmp_path / "raw"), "--processed", str(tmp_path / "out"), "--label", "abnormal", *options]
    assert preprocess(command) == 0
    assert LAYOUTS[layout].about in capsys.readouterr().out
    done = list(list_scans(tmp_path / "out"))
    assert len(done) == len(expected)
    for scan in done:
        np.testing.assert_array_equal(scan.read_stack(), reference)
        assert (scan.read_lesion() is not None) == (scan.name in {s.name for s in found.scans if s.lesion_mask})


def test_the_next_best_volume_is_taken_where_the_best_is_missing(tmp_path):
    make_oasis1(tmp_path)
    for wanted in ("_t88_gfc.img", "_sbj_111.img", "_mpr-1_anon.img"):
        best = search(tmp_path).scans[0].path
        for path in (best, best.with_suffix(".hdr")):
            path.unlink()
        scan = search(tmp_path).scans[0]
        assert scan.path.name.endswith(wanted)
        np.testing.assert_array_equal(read_volume(scan.path, scan.axes).values, HEAD.get_fdata().astype(np.int16))


def test_modality(tmp_path):
    make_brats(tmp_path)
    names = [scan.path.name for scan in search(tmp_path, modality="flair").scans]
    assert names == [
        "BraTS-GLI-00005-100-t2f.nii.gz", "BraTS-GLI-00005-101-t2f.nii.gz",
        "BraTS20_Training_001_flair.nii.gz", "BraTS20_Training_002_flair.nii.gz",
    ]  # fmt: skip


def test_layout_can_be_overridden(tmp_path):
    make_ixi(tmp_path)
    names = [scan.name for scan in search(tmp_path, "folder").scans]
    assert names == ["IXI002-Guys-0828-T1", "IXI105-HH-1471-T1"], "T1 is asked for"
    assert search(tmp_path, "oasis1").scans == []


def test_of_two_masks_that_of_the_brain_counts(tmp_path):
    for name in ("a.nii", "a_mask.nii", "a_brain_mask.nii"):
        (tmp_path / name).touch()
    found = search(tmp_path)
    assert found.scans[0].brain_mask.name == "a_brain_mask.nii"
    assert [path for path, _ in found.left_out] == [str(tmp_path / "a_mask.nii")]


def test_the_aligned_volume_without_skull_is_neurites_best(tmp_path):
    make_neurite(tmp_path)
    assert {scan.path.name for scan in search(tmp_path).scans} == {"aligned_norm.nii.gz"}


def test_derivatives_are_no_scans_even_alone(tmp_path):
    make_bids(tmp_path)
    derived = [path for path in tmp_path.rglob("*run-1_T1w.nii.gz") if "derivatives" in path.parts]
    paths = [path.relative_to(tmp_path).as_posix() for path in derived]
    assert len(paths) == 4
    assert arrange(LAYOUTS["bids"], paths, "t1")[0] == []


def test_recognise_needs_no_disk():
    assert recognise(["x/IXI002-Guys-0828-T1.nii.gz", "x/a.nii"], "t1").name == "ixi"
    assert recognise([], "t1").name == "folder"


@pytest.mark.parametrize(
    ("name", "subject", "session"),
    [
        ("OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc", "OAS1_0001", "MR1"),
        ("OAS1_0001_MR2_mpr_n4_anon_111_t88_masked_gfc", "OAS1_0001", "MR2"),
        ("sub-OAS30001_ses-d0757_run-01_T1w", "OAS30001", "d0757"),
        ("sub-07_ses-a_T1w", "sub-07", "ses-a"),
        ("IXI105-HH-1471_T1w", "IXI105", ""),
        ("patient_T1w", "patient", ""),
        ("patient7_visit2_FLAIR", "patient7", "visit2"),
        ("patient7-scan-3", "patient7", "scan-3"),
        ("visit2", "unnamed", "visit2"),
    ],
)
def test_subject_and_session_from_a_name(name, subject, session):
    assert name_subject(name) == (subject, session)


@pytest.mark.parametrize(
    "name",
    ["seg", "a_dseg", "a/aseg", "x_seg35", "m_brainmask", "brain_mask", "T1mask", "a-label", "lesion", "aparc+aseg",
     "ribbon", "x_probseg", "x_pve_1", "rois"],
)  # fmt: skip
def test_volumes_drawn_over_a_scan_are_told_by_their_name(name):
    assert LABEL.search(name)


@pytest.mark.parametrize("name", ["segment", "a_T1w", "masked_gfc", "brain", "unlabelled", "labels/a", "prose"])
def test_scans_are_not(name):
    assert not LABEL.search(name)


def test_names_without_ending_and_contrast():
    assert [strip_ending(f"x/a{ending}") for ending in (".nii.gz", ".nii", ".img", ".mgz", ".MGH")] == 5 * ["x/a"]
    contrasts = ("T1w", "T2w", "FLAIR", "PDw", "T1", "t2", "PD")
    assert [CONTRAST.sub("", f"a{sign}{contrast}") for contrast in contrasts for sign in "_-"] == 14 * ["a"]
    assert CONTRAST.sub("", "aT1") == "aT1"
