"""Labels come from the clinical table, splits go by subject, and nobody is ever on two sides."""

import json
import random

import nibabel as nib
import numpy as np
import pytest

from preprocessing.clinical import read_clinical
from preprocessing.cohort import label_scans, split_subjects
from preprocessing.preprocess_oasis import main as preprocess
from preprocessing.scans import DataError, Scan
from preprocessing.slices import check_same_settings, list_scans
from tests.conftest import make_head

OASIS1 = """ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay
OAS1_0001_MR1,F,R,74,2,3,29,0,1344,0.743,1.306,N/A
OAS1_0002_MR1,M,R,55,4,1,29,0.5,1147,0.810,1.531,N/A
OAS1_0003_MR1,F,R,21,,,,,1500,0.85,1.1,N/A
"""
OASIS2 = """Subject ID,MRI ID,Group,Visit,MR Delay,M/F,Hand,Age,CDR
OAS2_0001,OAS2_0001_MR1,Converted,1,0,M,R,80,0
OAS2_0001,OAS2_0001_MR2,Converted,2,457,M,R,81,0.5
OAS2_0002,OAS2_0002_MR1,Nondemented,1,0,F,R,75,0
"""
OASIS3 = """OASISID,OASIS_session_label,days_to_visit,age at visit,CDRTOT
OAS30001,OAS30001_UDSb4_d0000,0,65.1,0
OAS30001,OAS30001_UDSb4_d0800,0800,67.3,0.5
OAS30002,OAS30002_UDSb4_d0000,0,70.0,0
"""
PARTICIPANTS = (
    "participant_id\tage\tsex\tdiagnosis\nsub-01\t33\tF\tcontrol\nsub-02\t44\tM\tschizophrenia\n03\tn/a\tn/a\tn/a\n"
)


def make_scan(tmp_path, subject, session="", split="", label=""):
    name = f"{subject}_{session}" if session else subject
    return Scan(tmp_path / f"{name}.nii", name, split, label, subject, session, None, None)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "oasis_cross-sectional.csv",
            OASIS1,
            [
                ("OAS1_0001", "MR1", "normal", 74, "F"),
                ("OAS1_0002", "MR1", "abnormal", 55, "M"),
                ("OAS1_0003", "MR1", None, 21, "F"),
                ("OAS1_0004", "MR1", None, None, None),
            ],
        ),
        (
            "longitudinal.csv",
            OASIS2,
            [
                ("OAS2_0001", "MR1", "normal", 80, "M"),
                ("OAS2_0001", "MR2", "abnormal", 81, "M"),
                ("OAS2_0002", "MR1", "normal", 75, "F"),
                ("OAS2_0002", "MR2", None, None, None),
            ],
        ),
        (
            "OASIS3_UDSb4_cdr.csv",
            OASIS3,
            [
                ("OAS30001", "d0300", "normal", 65.1, None),
                ("OAS30001", "d0757", "abnormal", 67.3, None),
                ("OAS30002", "d0365", "normal", 70, None),
                ("OAS30002", "d0366", None, None, None),  # more than a year from any rating
            ],
        ),
        (
            "participants.tsv",
            PARTICIPANTS,
            [
                ("sub-01", "ses-a", "normal", 33, "F"),
                ("sub-02", "", "abnormal", 44, "M"),
                ("sub-03", "", None, None, None),
            ],
        ),
    ],
)
def test_tables_are_understood(name, text, expected, tmp_path):
    (tmp_path / name).write_text(text)
    clinical = read_clinical(tmp_path / name)
    scans = [make_scan(tmp_path, subject, session) for subject, session, *_ in expected]
    labelled, left_out = label_scans(scans, clinical, None, None)
    assert [(s.subject, s.session, s.label, s.age, s.sex) for s in labelled] == [e for e in expected if e[2]]
    assert len(left_out) == sum(e[2] is None for e in expected)


def test_blank_is_not_zero_unless_asked(tmp_path):
    (tmp_path / "a.csv").write_text(OASIS1)
    clinical = read_clinical(tmp_path / "a.csv")
    scan = make_scan(tmp_path, "OAS1_0003", "MR1")
    assert label_scans([scan], clinical, None, None)[0] == []
    assert "blank" in label_scans([scan], clinical, None, None)[1][0][1]
    assert label_scans([scan], clinical, None, "normal")[0][0].label == "normal"
    absent = make_scan(tmp_path, "OAS1_0999", "MR1")  # is not in the table at all, which is not the same as blank
    assert label_scans([absent], clinical, None, "normal")[0] == []


def test_excel_is_the_same_as_csv(tmp_path):
    pytest.importorskip("openpyxl")
    import pandas as pd

    (tmp_path / "a.csv").write_text(OASIS1)
    pd.read_csv(tmp_path / "a.csv").to_excel(tmp_path / "a.xlsx", index=False)
    assert read_clinical(tmp_path / "a.xlsx").rows == read_clinical(tmp_path / "a.csv").rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("name,colour\na,b\n", "none of the columns"),
        ("ID,Age\nOAS1_0001_MR1,7\n", "none of the columns cdr"),
        ("ID,CDR\nOAS1_0001_MR1,seven\n", "line 2"),
        ("ID,CDR\nOAS1_0001_MR1,-1\n", "from 0 to 3"),
        ("ID,CDR\nOAS1_0001_MR1,0\nOAS1_0001_MR1,1\n", "twice"),
    ],
)
def test_bad_tables_are_told_in_one_line(text, words, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=words) as error:
        read_clinical(tmp_path / "a.csv")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="no such file"):
        read_clinical(tmp_path / "b.csv")
    (tmp_path / "c.xlsx").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_clinical(tmp_path / "c.xlsx")


def test_no_random_cohort_has_a_subject_on_two_sides(tmp_path):
    """Random cohorts, grown twice: one split a subject, kept when scans come in, abnormal in test, shares met."""
    for seed in range(200):
        rng = random.Random(seed)
        raw = [rng.random() for _ in range(3)]
        fractions = [value / sum(raw) for value in raw]
        ill = rng.random()
        scans, kept = [], {}
        for _ in range(3):
            for subject in rng.sample(range(200), rng.randint(1, 40)):
                known = [scan for scan in scans if scan.subject == str(subject)]
                abnormal = known[0].label == "abnormal" if known else rng.random() < ill
                for _ in range(rng.randint(1, 3)):
                    # A subject that is ill may have been well once; in one that is well, every scan is.
                    first = "abnormal" if abnormal else "normal"
                    label = first if not known else rng.choice([first, "normal"])
                    known.append(make_scan(tmp_path, str(subject), f"{len(scans)}", label=label))
                    scans.append(known[-1])
            rng.shuffle(scans)
            scans.sort(key=lambda scan: int(scan.session))
            done = split_subjects(scans, fractions, seed, kept)
            assert [scan.session for scan in done] == [scan.session for scan in scans]
            splits = {}
            for scan in done:
                assert splits.setdefault(scan.subject, scan.split) == scan.split
            for subject, split in kept.items():
                assert splits[subject] == split
            diseased = {scan.subject for scan in done if scan.label == "abnormal"}
            assert all(splits[subject] == "test" for subject in diseased)
            healthy = [splits[subject] for subject in splits if subject not in diseased]
            if not kept:
                for split, fraction in zip(("train", "val", "test"), fractions, strict=True):
                    assert abs(healthy.count(split) - fraction * len(healthy)) < 2
            again = split_subjects(sorted(scans, key=lambda scan: rng.random()), fractions, seed, kept)
            assert {scan.subject: scan.split for scan in again} == splits, "the order of the files decides nothing"
            kept = splits


def test_a_subject_that_fell_ill_after_training_is_refused(tmp_path):
    scans = [make_scan(tmp_path, "a", label="abnormal")]
    with pytest.raises(DataError, match="stands in train from an earlier run"):
        split_subjects(scans, (0.8, 0.1, 0.1), 0, {"a": "train"})


@pytest.fixture
def discs(tmp_path):
    """Eight OASIS-2 sessions, two a subject, with a table."""
    rows = ["Subject ID,MRI ID,Group,Visit,M/F,Age,CDR"]
    for subject in range(1, 5):
        for visit in (1, 2):
            session = f"OAS2_000{subject}_MR{visit}"
            path = tmp_path / f"raw/OAS2_RAW_PART1/{session}/RAW/mpr-1.nifti.img"
            path.parent.mkdir(parents=True)
            head = make_head((30, 36, 33), (5.5, 5.5, 5.5), seed=subject)
            nib.save(nib.Nifti1Pair(head.get_fdata().astype("f4"), head.affine), path)
            rows.append(
                f"OAS2_000{subject},{session},x,{visit},F,{60 + visit},{0.5 if subject == 1 and visit == 2 else 0}"
            )
    (tmp_path / "table.csv").write_text("\n".join(rows))
    return tmp_path


def read_places(processed):
    return {scan.name: "/".join(scan.folder.relative_to(processed).parts[:2]) for scan in list_scans(processed)}


def test_from_discs_and_table_to_a_split_that_stays(discs, capsys):
    command = ["--raw", str(discs / "raw"), "--processed", str(discs / "out"), "--clinical", str(discs / "table.csv")]
    command += ["--size", "32", "--workers", "1", "--split", "0.34", "0.33", "0.33"]
    assert preprocess([*command, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "8 scans of 4 subjects in 8 sessions" in text
    assert "OAS2_0001_MR2: subject OAS2_0001, session MR2" in text
    assert not (discs / "out").exists()

    later = discs / "raw/OAS2_RAW_PART1/OAS2_0004_MR2"
    later.rename(discs / "later")
    assert preprocess(command) == 0
    first = read_places(discs / "out")
    assert first["OAS2_0001_MR1"] == "test/normal"
    assert first["OAS2_0001_MR2"] == "test/abnormal"
    assert len({place for name, place in first.items() if "0001" not in name}) == 3
    (discs / "later").rename(later)
    assert preprocess([*command, "--seed", "7"]) == 0
    second = read_places(discs / "out")
    assert {name: second[name] for name in first} == first
    assert second["OAS2_0004_MR2"] == first["OAS2_0004_MR1"]
    scan = next(scan for scan in list_scans(discs / "out") if scan.name == "OAS2_0004_MR2")
    assert (scan.record["age"], scan.record["sex"]) == (62, "F")
    record = json.loads((discs / "out/dataset.json").read_text())
    assert record["layout"] == "oasis2"
    assert record["flags"]["seed"] == 7
    assert sum(record["scans"].values()) == 8
    assert (discs / "out/qc.png").stat().st_size > 10_000


def test_a_label_that_changed_is_refused(discs):
    command = ["--raw", str(discs / "raw"), "--processed", str(discs / "out"), "--size", "32", "--workers", "1"]
    assert preprocess([*command, "--label", "normal", "--split", "0", "0", "1"]) == 0
    with pytest.raises(DataError, match="is test/abnormal now; delete this folder"):
        preprocess([*command, "--clinical", str(discs / "table.csv")])


def test_a_tree_that_contradicts_the_table_is_refused(discs):
    (discs / "tree/train").mkdir(parents=True)
    (discs / "raw").rename(discs / "tree/train/normal")
    with pytest.raises(DataError, match="stands among the normal and is abnormal"):
        preprocess(
            ["--raw", str(discs / "tree"), "--processed", str(discs / "o"), "--clinical", str(discs / "table.csv")]
        )


def test_masks_for_some_and_none_for_others_are_refused(tmp_path):
    for name in ("a", "b", "c"):
        path = tmp_path / f"raw/train/normal/{name}_T1w.nii"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(make_head(), path)
    (tmp_path / "raw/train/masks").mkdir()
    nib.save(
        nib.Nifti1Image((make_head().get_fdata() > 0).astype("u1"), make_head().affine),
        tmp_path / "raw/train/masks/a_brain.nii",
    )
    with pytest.raises(DataError, match=r"1 scans have a brain mask and 2 do not.*a_T1w\.nii$"):
        preprocess(["--raw", str(tmp_path / "raw"), "--processed", str(tmp_path / "out")])


def test_heads_with_and_without_skull_are_refused_and_do_not_mix(tmp_path):
    folder = tmp_path / "raw/train/normal"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        nib.save(make_head(), folder / f"{name}_T1w.nii")
    box = np.zeros(make_head().shape, np.float32)
    box[1:-1, 1:-1, 1:-1] = np.random.default_rng(0).uniform(300, 600, np.subtract(box.shape, 2))  # 4 l: no brain
    nib.save(nib.Nifti1Image(box, make_head().affine), folder / "skull_T1w.nii")
    command = ["--raw", str(tmp_path / "raw"), "--processed", str(tmp_path / "out"), "--size", "32", "--workers", "1"]
    with pytest.raises(DataError, match=r"2 scans have their skull off and 1 do not.*skull_T1w$"):
        preprocess(command)
    with pytest.raises(DataError, match="skull_off"):
        check_same_settings(list(list_scans(tmp_path / "out")))
