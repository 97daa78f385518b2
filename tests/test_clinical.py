"""The clinical table is understood: whose line is whose, who counts as normal, and what is wrong with a bad one."""

import pytest

from common.cli import DataError
from preprocessing.clinical import read_clinical
from preprocessing.scans import Scan

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
PARTICIPANTS = """participant_id\tage\tsex\tdiagnosis
sub-01\t33\tF\tcontrol
sub-02\t44\tM\tschizophrenia
03\tn/a\tn/a\tn/a
"""


def read(tmp_path, text, name="a.csv"):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    return read_clinical(tmp_path / name)


def find(clinical, subject, session=""):
    """The line about a scan, None where there is none."""
    return clinical.find(Scan(clinical.path, subject, "", "", subject, session, None, None))


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
                ("OAS1_0001", "MR2"),
                ("OAS1_0004", "MR1"),
            ],
        ),
        (
            "longitudinal.csv",
            OASIS2,
            [
                ("OAS2_0001", "MR1", "normal", 80, "M"),
                ("OAS2_0001", "MR2", "abnormal", 81, "M"),
                ("OAS2_0002", "MR1", "normal", 75, "F"),
                ("OAS2_0002", "MR2"),
            ],
        ),
        (
            "OASIS3_UDSb4_cdr.csv",
            OASIS3,
            [
                ("OAS30001", "d0300", "normal", 65.1, None),
                ("OAS30001", "d0757", "abnormal", 67.3, None),
                ("OAS30002", "d0365", "normal", 70, None),
                ("OAS30002", "d0366"),  # more than a year from any rating
            ],
        ),
        (
            "participants.tsv",
            PARTICIPANTS,
            [
                ("sub-01", "ses-a", "normal", 33, "F"),
                ("sub-02", "", "abnormal", 44, "M"),
                ("sub-03", "", None, None, None),
                ("sub-04", ""),
            ],
        ),
    ],
)
def test_public_tables_are_understood(name, text, expected, tmp_path):
    clinical = read(tmp_path, text, name)
    for subject, session, *wanted in expected:
        row = find(clinical, subject, session)
        assert ([row.label, row.age, row.sex] if row else []) == wanted, (subject, session)


def test_the_nearest_rating_within_a_year_counts(tmp_path):
    rows = ("1000,0", "1500,0.5", "1510,", "2600,1")
    clinical = read(tmp_path, "OASISID,days_to_visit,CDRTOT\n" + "\n".join(f"OAS30001,{row}" for row in rows))
    days = {row.day: row for row in clinical.rows["oas30001"]}
    nearest = {"d0635": 1000, "d0634": None, "d1249": 1000, "d1251": 1500, "d1511": 1500, "d1865": 1500, "d1866": None}
    for session, day in nearest.items():
        row = find(clinical, "OAS30001", session)
        assert row == days.get(day), "a blank rating does not count where there are others"
    assert find(clinical, "OAS30001", "d1250").day == 1000, "of two as near the earlier one"
    assert find(read(tmp_path, "OASISID,days_to_visit,CDRTOT\nOAS30001,10,"), "OAS30001", "d0010").label is None


def test_a_session_has_its_own_line_else_the_one_of_its_subject(tmp_path):
    text = "participant_id,session_id,diagnosis\nsub-1,ses-a,ad\nsub-1,,control\nsub-2,ses-a,control\n"
    clinical = read(tmp_path, text)
    assert find(clinical, "sub-1", "ses-a").label == "abnormal"
    assert find(clinical, "sub-1", "ses-b").label == "normal"
    assert find(clinical, "sub-2", "ses-b") is None
    assert find(clinical, "2", "A").label == "normal", "with or without sub- and ses-, whatever the case"


@pytest.mark.parametrize(
    ("cell", "label"), [("0", "normal"), ("0.0", "normal"), ("0.5", "abnormal"), ("3", "abnormal")]
)
def test_a_rating_above_0_is_abnormal(cell, label, tmp_path):
    assert find(read(tmp_path, f"ID,CDR\nOAS1_0001_MR1,{cell}\n"), "OAS1_0001", "MR1").label == label


@pytest.mark.parametrize("cell", ["", " ", ".", "?", "n/a"])
def test_a_blank_cell_is_no_label(cell, tmp_path):
    assert find(read(tmp_path, f"ID,CDR,Age\nOAS1_0001_MR1,{cell},7\n"), "OAS1_0001", "MR1").label is None


@pytest.mark.parametrize(
    "word",
    ["control", "Controls", "healthy", "Healthy Control", "HC", "CN", "NC", "con", "normal", "Nondemented"],
)
def test_groups_of_normal_subjects(word, tmp_path):
    clinical = read(tmp_path, f"id,group\na,{word}\nb,Demented\n")
    assert find(clinical, "a").label == "normal"
    assert find(clinical, "b").label == "abnormal"
    assert clinical.judged_by == "group"


def test_the_rating_goes_before_the_group(tmp_path):
    clinical = read(tmp_path, "ID,Group,CDR\nOAS1_0001_MR1,Demented,0\n")
    assert find(clinical, "OAS1_0001", "MR1").label == "normal"
    assert clinical.judged_by == "CDR"


@pytest.mark.parametrize(
    ("cells", "age", "sex"),
    [("89+,female", None, "F"), ("71.5,m", 71.5, "M"), (",", None, None), ("71,x", 71, None)],
)
def test_age_and_sex(cells, age, sex, tmp_path):
    row = find(read(tmp_path, f"ID,CDR,age,sex\nOAS1_0001_MR1,0,{cells}\n"), "OAS1_0001", "MR1")
    assert (row.age, row.sex) == (age, sex)


def test_a_line_without_a_name_is_left_out_and_one_that_stands_twice_may_agree(tmp_path):
    clinical = read(tmp_path, "ID,CDR\nOAS1_0001_MR1,0\n,1\nOAS1_0001_MR1,0\n")
    assert list(clinical.rows) == ["oas1_0001"]


def test_excel_is_the_same_as_csv(tmp_path):
    pytest.importorskip("openpyxl")
    import pandas as pd

    clinical = read(tmp_path, OASIS1)
    pd.read_csv(tmp_path / "a.csv").to_excel(tmp_path / "a.xlsx", index=False)
    assert read_clinical(tmp_path / "a.xlsx").rows == clinical.rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("name,colour\na,b\n", "none of the columns mri id"),
        ("ID,Age\nOAS1_0001_MR1,7\n", "none of the columns cdr"),
        ("ID,CDR\nOAS1_0001_MR1,seven\n", "line 2: "),
        ("ID,CDR\nOAS1_0001_MR1,0\nOAS1_0002_MR1,-1\n", "line 3: -1 is no clinical dementia rating"),
        ("ID,CDR\nOAS1_0001_MR1,3.5\n", "from 0 to 3"),
        ("ID,CDR\nOAS1_0001_MR1,0\nOAS1_0001_MR1,1\n", "twice"),
    ],
)
def test_a_bad_table_is_one_line(text, words, tmp_path):
    with pytest.raises(DataError, match=words) as error:
        read(tmp_path, text)
    assert "\n" not in str(error.value)


def test_a_missing_or_broken_file_is_one_line(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_clinical(tmp_path / "b.csv")
    (tmp_path / "c.xlsx").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_clinical(tmp_path / "c.xlsx")
