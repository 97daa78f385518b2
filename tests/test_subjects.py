"""Whose scan it is: every visit of a person is that person's, and two people are never one without a word."""

import argparse
import re

import pytest

from preprocessing.subjects import UNNAMED, Identity, find_ambiguous, identify, key_subject, parse_pattern, unify

# path, subject, session
PATHS = """
# public data sets as downloaded
OAS1_0001_MR1/mri/norm.mgz | OAS1_0001 | MR1
disc1/OAS1_0001_MR2/PROCESSED/MPRAGE/T88_111/OAS1_0001_MR2_mpr_n4_anon_111_t88_masked_gfc.img | OAS1_0001 | MR2
OAS2_RAW_PART1/OAS2_0001_MR2/RAW/mpr-1.nifti.img | OAS2_0001 | MR2
OASIS_OAS1_0001_MR1/aligned_norm.nii.gz | OAS1_0001 | MR1
OAS30001_MR_d0757/anat1/NIFTI/sub-OAS30001_ses-d0757_run-01_T1w.nii.gz | OAS30001 | d0757
OAS30001_Freesurfer53_d0129/mri/orig.mgz | OAS30001 | d0129
ADNI/002_S_0295/MP-RAGE/2006-04-18_08_20_30.0/I4/ADNI_002_S_0295_MR_MP-RAGE__br_raw_20060418193713091_1_S4_I4.nii \
| 002_S_0295 | 2006-04-18
002_S_0295_m12.nii | 002_S_0295 | m12
adni/002S0295_bl_T1.nii.gz | 002S0295 | bl
sub-ADNI002S0295/ses-M012/anat/sub-ADNI002S0295_ses-M012_T1w.nii.gz | sub-ADNI002S0295 | ses-M012
oas1_1_mr1.nii | oas1_1 | mr1
miriad/miriad_188_AD_M_01_MR_1.nii | miriad_188 | 01
miriad/188/miriad_188_HC_F_12_MR_2/miriad_188_HC_F_12_MR_2.nii | miriad_188 | 12
NACC123456_MRI_20120101.nii | NACC123456 | 2012-01-01
NACC01_20110101.nii.gz | NACC01 | 2011-01-01
NACC000123_20110101_T1/T1.nii.gz | NACC000123 | 2011-01-01
IXI105-HH-1471-T1.nii.gz | IXI105 |
AIBL/1/MPRAGE/2010-01-01/I123/AIBL_1_MR_MPRAGE_br_raw_20100101.nii | AIBL_1 | 2010-01-01
sub-AIBL1005/ses-M18/anat/sub-AIBL1005_ses-M18_T1w.nii.gz | sub-AIBL1005 | ses-M18
PPMI/3102/MPRAGE/PPMI_3102_MR_MPRAGE_br_raw_20110803.nii | PPMI_3102 | 2011-08-03
100307_T1.nii.gz | 100307 |
100307/T1w/T1w_acpc_dc_restore_brain.nii.gz | 100307 |
HCP/100307/unprocessed/3T/T1w_MPR1/100307_3T_T1w_MPR1.nii.gz | 100307 |
HCA6002236_V1_MR/T1w/T1w.nii.gz | HCA6002236 | V1
BraTS-GLI-00005-100/BraTS-GLI-00005-100-t1n.nii.gz | BraTS-GLI-00005 | 100
BraTS20_Training_001/BraTS20_Training_001_t1ce.nii.gz | BraTS20_Training_001 |
BraTS2021_00005/BraTS2021_00005_flair.nii.gz | BraTS2021_00005 |
HGG/Brats18_TCIA01_131_1/Brats18_TCIA01_131_1_t1.nii.gz | Brats18_TCIA01_131 | 1
imagesTr/BRATS_001_0000.nii.gz | BRATS_001 |
Training/R001/sub-r001s001/ses-1/anat/sub-r001s001_ses-1_space-MNI152NLin2009aSym_T1w.nii.gz | sub-r001s001 | ses-1
UPENN-GBM-00001_11_T1.nii.gz | UPENN-GBM-00001 | 11
TCGA-CS-4941_19960909_1.nii.gz | TCGA-CS-4941 | 1996-09-09
1234567_20252_2_0/T1/T1_brain.nii.gz | 1234567 | 2
Caltech_0051456/mprage.nii.gz | 0051456 |
OASIS-TRT-20-1/t1weighted.nii.gz | OASIS-TRT-20-1 |
training01/preprocessed/training01_02_flair_pp.nii | training01 | 02
KKI2009-01-MPRAGE.nii | KKI2009-01 |
IBSR_01/IBSR_01_ana_strip.nii.gz | IBSR_01 |
# FreeSurfer
freesurfer/p7_m12/mri/orig.mgz | p7 | m12
freesurfer/p7_m12.long.p7_base/mri/norm.mgz | p7 | m12
persons/bert/mri/T1.mgz | bert |
# visits, dates and runs in names
patient7_visit1_stripped.nii.gz | patient7 | visit1
patient7-Visit-02.nii.gz | patient7 | Visit-02
visit1_patient7.nii.gz | patient7 | visit1
p7_m12.nii.gz | p7 | m12
p7m12_T1.nii.gz | p7 | m12
p7_12months.nii.gz | p7 | 12months
p7visit1.nii.gz | p7 | visit1
S001_bl_T1.nii.gz | S001 | bl
S001V1.nii.gz | S001 | V1
S01T1w.nii.gz | S01 |
S01.native.mri.nii | S01 |
subjA_visit2.nii | subjA | visit2
patient_A_T1.nii | patient_A |
p7_s2_T1.nii.gz | p7 | s2
AB12_s2.nii.gz | AB12 | s2
patient7b_T1.nii.gz | patient7 | b
smith_john_FU2.nii | smith_john | FU2
smith_john_pre-op.nii | smith_john | pre-op
Ann Ångström.nii | Ann Ångström |
annaVisit2.nii | anna | Visit2
AB12_18.04.2006_brain_n4_reg_mni.nii.gz | AB12 | 18.04.2006
AB12_20-Jan-2010.nii.gz | AB12 | 20-Jan-2010
AB12_01Jan2010.nii.gz | AB12 | 01Jan2010
AB12_2010_01_31.nii.gz | AB12 | 2010-01-31
AB12_2010-01-31T12-30-00.nii.gz | AB12 | 2010-01-31
AB12_18042006.nii.gz | AB12 | 18042006
anna_20110101.nii.gz | anna | 2011-01-01
p7_110101_T1.nii.gz | p7 | 110101
p7_run-2.nii.gz | p7 |
anna_r2_T1.nii.gz | anna |
2011_p7.nii.gz | p7 | 2011
R01_T1.nii.gz | R01 |
M001_visit1.nii.gz | M001 | visit1
# visits, dates and contrasts as folders
S001/2010-01-01/T1.nii.gz | S001 | 2010-01-01
S001/20100101/T1.nii.gz | S001 | 2010-01-01
S001/y1/T1.nii.gz | S001 | y1
anna/2010/T1.nii.gz | anna | 2010
anna/baseline/brain.nii.gz | anna | baseline
visit1/p7_T1.nii.gz | p7 | visit1
2010-01-01/p7_T1.nii.gz | p7 | 2010-01-01
p7/s1/T1.nii.gz | p7 | s1
001/002/T1.nii.gz | 001 | 002
AB12/110101/T1.nii.gz | AB12 | 110101
anna/visit1/foo.nii.gz | anna | visit1
study/visit1/0012.nii.gz | 0012 | visit1
patient1/series_3/scan.nii.gz | patient1 |
patient2/FLAIR/FLAIR.nii.gz | patient2 |
patient3/preop/T1.nii.gz | patient3 | preop
Patient-001/week-000-1/T1.nii.gz | Patient-001 | week-000-1
P1/T1/P1_T1_FLAIR.nii.gz | P1 |
patient7/visit2/20110101_093000_t1_mprage_sag_5.nii.gz | patient7 | 2011-01-01
anna/20100101_123456t1mpragesagp2isos002a1001.nii.gz | anna | 2010-01-01
p7/visit1/IM_0001.nii.gz | p7 | visit1
# sites, below which people are numbered anew
siteA/001/T1.nii.gz | siteA_001 |
Center_01/Patient_02/T1.nii.gz | Center_01_Patient_02 |
Center_01_Patient_02_T1.nii.gz | Center_01_Patient_02 |
Amsterdam/GE3T/100/T1.nii.gz | GE3T_100 |
Utrecht/0/T1.nii.gz | 0 |
# outputs of programs
p0_bet_mask.nii.gz | p0 |
p0_BrainExtractionBrain.nii.gz | p0 |
p0_T1w_synthstrip_mask.nii.gz | p0 |
# nothing but what tells scans apart
scan_001.nii.gz | scan_001 |
data/scan_001.nii.gz | scan_001 |
anna/scan1.nii.gz | anna | scan1
masks.nii.gz | masks |
norm.mgz | norm |
visit1/T1.nii.gz | unnamed | visit1
"""
TABLE = [
    tuple(cell.strip() for cell in line.split("|"))
    for line in PATHS.replace("\\\n", "").splitlines()
    if line and not line.startswith("#")
]


@pytest.mark.parametrize(("path", "subject", "session"), TABLE)
def test_subject_and_session(path, subject, session):
    found = identify(path)
    assert (found.subject, found.session) == (subject, session)


PEOPLE = (
    *("patient7", "patient_07", "p7", "S001", "sub-01", "sub01", "subject_12", "control_3", "HC_012", "AD_004"),
    *("anna", "smith_john", "AB12", "0012345", "100307", "NACC01", "002_S_0295", "002S0295", "OAS1_0001", "OAS30001"),
    *("miriad_188", "IXI105", "BraTS2021_00005", "BraTS-GLI-00005", "Utrecht_050", "siteA_007", "TCGA-CS-4941"),
    *("a1b2c3d4", "case_00001", "A00028185", "CC110033", "sim-050", "Ann Ångström", "BraTS20_Training_001", "NC7"),
)
VISITS = (
    *(
        "visit1",
        "visit_2",
        "Visit-03",
        "V1",
        "v02",
        "ses-1",
        "session2",
        "bl",
        "baseline",
        "m06",
        "M12",
        "12m",
        "month6",
    ),
    *(
        "y1",
        "year2",
        "tp1",
        "timepoint_2",
        "fu",
        "fu1",
        "followup2",
        "follow-up",
        "preop",
        "post-op",
        "retest",
        "scan2",
    ),
    *("20110101", "2011-01-01", "2011_01_01", "2011.01.01", "01-02-2011", "20110101_093000", "1Jan2011", "2011-Jan-01"),
    *(
        "week4",
        "wk04",
        "d0757",
        "day10",
        "wave2",
        "time1",
        "mri2",
        "2nd_visit",
        "screening",
        "20110101T093000",
        "2011-03",
    ),
)
TAILS = (
    *("", "T1", "T1w", "t1_stripped", "brain", "bet", "T1w_brain", "n4", "n4_reg_mni", "norm", "run-2", "run_02_T1"),
    *(
        "mprage",
        "T1_MNI152_2mm",
        "skullstripped",
        "defaced",
        "synthstrip",
        "hd-bet",
        "warped",
        "1mm",
        "FLAIR",
        "resampled",
    ),
    *(
        "space-MNI152_T1w",
        "acq-mprage_T1w",
        "preproc",
        "BrainExtractionBrain",
        "aligned_norm",
        "ce-gad_T1w",
        "3T",
        "orig",
    ),
)


@pytest.mark.parametrize("person", PEOPLE)
def test_no_visit_state_case_or_folder_changes_the_person(person):
    key = key_subject(identify(f"{person}.nii.gz").subject)
    for number, visit in enumerate(VISITS):
        for tail in (TAILS[number % len(TAILS)], TAILS[(7 * number + 3) % len(TAILS)]):
            name, file = "_".join(filter(None, (person, visit, tail))), tail or "T1"
            for path in (
                f"{name}.nii.gz",
                f"{name.upper() if number % 2 else name.lower()}.mgz",
                f"{name.replace('_', '-')}.nii",
                f"{visit}/{person}_{file}.nii.gz",
                f"{person}/{visit}/{file}.nii.gz",
                f"{person}_{visit}/mri/{name}.nii.gz",
            ):
                found = identify(path)
                assert key_subject(found.subject) == key, (path, found)
                assert not found.ambiguous or key_subject(found.otherwise) != key, (path, found)


def test_people_stay_apart():
    """Distinct names are distinct people in every state and folder."""
    sets = (
        PEOPLE[1:3] + PEOPLE[10:16],
        [f"p{i}" for i in range(1, 40)],
        [f"patient_{i:02d}" for i in range(1, 40)],
        [f"{i:03d}" for i in range(1, 40)],
        [f"UCSF_{i:03d}" for i in range(1, 40)],
        [f"{group}_{i:02d}" for group in ("AD", "HC") for i in range(1, 20)],
        [f"sub-{i}" for i in range(1, 40)],
        [f"1{i:05d}" for i in range(100, 1300, 60)],
        [f"site{site}_{i:02d}" for site in "12" for i in range(1, 20)],
        [f"TCIA{i:02d}_{j}" for i in range(1, 4) for j in range(100, 120)],
        ["anna", "bert", "anna_smith", "bert_smith", "clara-jones"],
        [f"scan_{i:03d}" for i in range(1, 40)],
    )
    for people in sets:
        for form in ("{}.nii.gz", "{}_T1w.nii.gz", "{}_stripped.nii", "{}/T1.nii.gz", "{0}/{0}_T1.nii.gz"):
            found = [identify(form.format(person)) for person in people]
            keys = {key_subject(one.subject) for one in found}
            assert len(keys) == len(people), (form, people)
            assert not find_ambiguous(found), (form, people)


def test_case_padding_and_gaps_tell_nobody_apart():
    for spellings in (
        ("P01", "p1", "p_001", "P-1"),
        ("002_S_0295", "002S0295", "sub-ADNI002S0295", "ADNI_002_S_0295"),
        ("OAS1_0001", "oas1_0001", "OAS1_1", "sub-OASIS10001"),
        ("OAS30001", "sub-OAS30001"),
        ("sub-01", "01", "1"),
        ("AIBL_7", "sub-AIBL7"),
    ):
        assert len({key_subject(spelling) for spelling in spellings}) == 1, spellings
    assert len({key_subject(name) for name in ("p1_1", "p11", "p1", "q1", "p10", "p1_10")}) == 6


def test_unify_gives_one_spelling():
    found = unify([Identity("p01"), Identity("P1", "m12"), Identity("p01", "bl"), Identity("p2")])
    assert [one.subject for one in found] == ["p01", "p01", "p01", "p2"]
    assert [one.session for one in found] == ["", "m12", "bl", ""]


@pytest.mark.parametrize(
    ("paths", "told"),
    [
        (["p7_2.nii", "p7_3.nii"], [0, 1]),  # two scans of p7, or p7_2 and p7_3
        (["p7_2.nii", "p8_2.nii"], []),  # two people in either reading
        (["UCSF_2001.nii", "UCSF_2002.nii"], [0, 1]),  # years, or people
        (["anna_1.nii", "anna_2.nii", "bert_T1.nii"], [0, 1]),
        (["patient7a.nii", "patient7b.nii"], [0, 1]),
        (["Utrecht/01/T1.nii", "Singapore/01/T1.nii", "Utrecht/02/T1.nii"], [0, 1]),
        (["AD/01/T1.nii", "HC/01/T1.nii"], [0, 1]),
        (["siteA/01/T1.nii", "siteB/01/T1.nii"], [0, 1]),  # taken for two
        (["train/p1_m0.nii", "test/p1_m12.nii"], []),  # one and nobody else
        (["visit1/T1.nii", "visit2/T1.nii"], [0, 1]),  # one person without a name
        (["p7_visit1.nii", "p7_visit2.nii", "p8.nii"], []),
    ],
)
def test_two_ways_to_read_a_name_are_told_where_they_matter(paths, told):
    assert find_ambiguous([identify(path) for path in paths]) == told


def test_a_pattern_overrules():
    pattern = parse_pattern(r"(p\d+_\d+)")
    assert identify("x/p7_2_T1.nii.gz", pattern) == Identity("p7_2", "")
    assert identify("x/q7_2_T1.nii.gz", pattern) is None
    pattern = parse_pattern(r"(?P<session>[a-z]+)/(?P<subject>\w+)\.nii")
    assert identify("early/OAS1_0001.nii.gz", pattern) == Identity("OAS1_0001", "early")
    assert not identify("p7_2.nii", parse_pattern(r"(p\d)")).ambiguous
    for wrong, why in (("p7", "no group"), ("(p7", "not a regular expression")):
        with pytest.raises(argparse.ArgumentTypeError, match=why):
            parse_pattern(wrong)


def test_any_text_is_somebody():
    for path in (
        "",
        "/",
        ".nii",
        "_.nii",
        "a//b.nii",
        "日本/太郎_T1.nii.gz",
        "x" * 300,
        "---",
        "1.nii",
        "T1/T1/T1.nii",
    ):
        assert identify(path).subject
    assert identify("visit1/brain.nii").subject == UNNAMED
    assert key_subject("___")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", identify("p1_20101231.nii").session)
