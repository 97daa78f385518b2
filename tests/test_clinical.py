"""Who is healthy, how old and which sex, from tables as they stand in public and as people write them."""

import logging

import pytest

from common.cli import DataError, log
from preprocessing.clinical import read_clinical
from tests.tables import (
    ADNI,
    ADNIMERGE,
    BIDS,
    IXI,
    OASIS1,
    OASIS1_EXPECTED,
    OASIS2,
    OASIS2_EXPECTED,
    OASIS3,
    make_scan,
    read_facts,
    read_labels,
    write,
)


@pytest.fixture
def warnings(caplog, monkeypatch):
    """The messages on standard error, as text."""
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.WARNING)
    return lambda: caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (OASIS1, OASIS1_EXPECTED),
        (OASIS2, OASIS2_EXPECTED),
        (
            OASIS3,
            [
                ("OAS30001", "d0300", "normal", 65.1, None),
                ("OAS30001", "d0757", "abnormal", 67.3, None),
                ("OAS30001", "ses-d0757", "abnormal", 67.3, None),
                ("OAS30002", "d0365", "normal", 70, None),
                ("OAS30002", "d0366", None, None, None),  # more than a year from any rating
                ("OAS30003", "d0101", "abnormal", 72, None),  # a blank rating says nothing, however near
            ],
        ),
        (
            BIDS,
            [
                ("sub-01", "ses-a", "normal", 33, "F"),
                ("sub-02", "", "abnormal", 44, "M"),
                ("sub-03", "", None, None, None),
            ],
        ),
        (
            ADNI,
            [
                ("002_S_0413", "m12", "normal", 77, "F"),
                ("002_S_0413", "2006-05-20", "normal", 76, "F"),
                ("002_S_0413", "2010-01-01", None, None, None),
                ("002_S_0413", "S13894", "normal", None, "F"),  # which visit it is nobody knows, but it is a woman
                ("sub-ADNI002S0413", "ses-M000", "normal", 76, "F"),
                ("005_S_0223", "", "abnormal", 78, "M"),
            ],
        ),
        (
            ADNIMERGE,
            [
                ("011_S_0003", "m24", "abnormal", 83.3, "M"),  # the diagnosis and age of the visit, not of the baseline
                ("011_S_0003", "2005-10-01", "normal", 81.3, "M"),
                ("011_S_0003", "", None, None, None),  # healthy or not: nothing says which visit it is
                ("022_S_0004", "", "abnormal", 67.5, "F"),
                ("022_S_0005", "m06", None, 68, "F"),
            ],
        ),
        (
            "RID,PTID,DX_bl,AGE,PTGENDER\n3,011_S_0003,CN,81.3,Male\n10,011_S_0010,AD,73.9,Female\n",
            [("011_S_0003", "m48", "normal", 81.3, "M"), ("011_S_0010", "", "abnormal", 73.9, "F")],
        ),
        (
            "RID,SITEID,VISCODE,DXCURREN\n4,1,bl,1\n4,1,m18,2\n1021,2,bl,3\n1022,2,bl,-4\n",
            [
                ("AIBL_4", "bl", "normal", None, None),
                ("AIBL_4", "m18", "abnormal", None, None),
                ("AIBL_4", "baseline_2010-02-01", "normal", None, None),
                ("AIBL_4", "2010-02-01", None, None, None),  # a day tells nothing where the table has only visits
                ("AIBL_1021", "2010-02-01", "abnormal", None, None),  # and need not, where they all say the same
                ("AIBL_1021", "2010", "abnormal", None, None),
                ("AIBL_1021", "m18", None, None, None),
                ("AIBL_1021", "", "abnormal", None, None),
                ("AIBL_1022", "", None, None, None),
            ],
        ),
        (
            "RID,VISCODE,CDGLOBAL\n4,bl,0\n5,bl,0.5\n",
            [("AIBL_4", "", "normal", None, None), ("5", "", "abnormal", None, None)],
        ),
        (
            "NACCID,SEX,NACCAGE,NACCUDSD\nNACC000011,2,70,1\nNACC000012,1,71,4\n",
            [("NACC000011", "", "normal", 70, "F"), ("NACC000012", "", "abnormal", 71, "M")],
        ),
        (
            "Subject,M/F,Age,Group\n188,F,76.6,AD\n189,M,65.3,HC\n",
            [("miriad_188", "", "abnormal", 76.6, "F"), ("miriad_189", "01", "normal", 65.3, "M")],
        ),
        (
            "SubjectID,Age,CDR,Diagnosis\nOAS1_0001,65,0,Non-demented\nOAS1_0002,75,0.5,Very Mild Dementia\n",
            [("OAS1_0001", "MR1", "normal", 65, None), ("OAS1_0002", "MR2", "abnormal", 75, None)],
        ),
    ],
)
def test_public_tables_are_read(text, expected, tmp_path):
    clinical = read_clinical(write(tmp_path, text))
    scans = [make_scan(subject, session) for subject, session, *_ in expected]
    assert read_facts(clinical, scans) == [facts[2:] for facts in expected]


def test_tables_without_a_diagnosis_give_ages_and_sexes(tmp_path):
    path = write(tmp_path, IXI)
    with pytest.raises(DataError, match=r"none of the columns CDR.*--label normal"):
        read_clinical(path)
    clinical = read_clinical(path, needs_labels=False)
    scans = [make_scan("IXI002", name="IXI002-Guys-0828-T1"), make_scan("IXI012"), make_scan("IXI105")]
    assert read_facts(clinical, scans) == [(None, 35.8, "F"), (None, 38.78, "M"), (None, None, None)]
    assert clinical.find(make_scan("IXI106")) is None
    assert clinical.describe() == ["table.csv: no column gives a diagnosis; only ages and sexes are used"]
    miriad = "Label,Subject,Age\nmiriad_188_1_MR_1,miriad_188,76.6\nmiriad_188_2_MR_1,miriad_188,77.1\n"
    clinical = read_clinical(write(tmp_path, miriad), needs_labels=False)
    assert [clinical.find(make_scan("miriad_188", visit)).age for visit in ("01", "02")] == [76.6, 77.1]


def test_two_labels_of_one_subject_are_named(tmp_path):
    text = "ID,Group\nsub-01,HC\nb,AD\nSUB_1,MCI\nb,dementia\nc,\nc,HC\n"
    with pytest.raises(
        DataError, match=r"sub-01 appears twice, as HC on line 2 and as MCI on line 4; correct them.*session"
    ):
        read_clinical(write(tmp_path, text))
    clinical = read_clinical(write(tmp_path, text.replace("MCI", "control")))
    assert [clinical.find(make_scan(subject)).label for subject in "bc"] == ["abnormal", "normal"]
    dates = read_clinical(write(tmp_path, "ID,date,Group\na,19.5.2006,HC\na,5/25/07,HC\n"))
    assert dates.find(make_scan("a", "d0100")).label == "normal"  # days of a study and dates are not compared
    assert dates.find(make_scan("a", "20070601")).day - dates.find(make_scan("a", "20060601")).day == 371
    visits = "ID,visit,Group\nsub-01,1,HC\nsub-01,2,AD\n"
    clinical = read_clinical(write(tmp_path, visits))
    assert [clinical.find(make_scan("sub-01", f"MR{n}")).label for n in (1, 2)] == ["normal", "abnormal"]
    assert clinical.find(make_scan("sub-01", "ses-03")) is None
    assert "has sub-01 but not its ses-03" in clinical.explain(make_scan("sub-01", "ses-03"))
    assert clinical.find(make_scan("sub-01")) is None
    assert "HC on line 2 and AD on line 3" in clinical.explain(make_scan("sub-01"))


def test_two_ages_of_one_subject_are_not_used(tmp_path, warnings):
    text = "IXI_ID,AGE,SEX\n2,35.8,F\n2,61,F\n3,20,M\n3,20,M\n"
    clinical = read_clinical(write(tmp_path, text), needs_labels=False)
    assert read_facts(clinical, [make_scan("IXI002"), make_scan("IXI003")]) == [(None, None, "F"), (None, 20, "M")]
    assert "different ages, of which none is used: 1 (IXI002)" in warnings()


def test_names_that_nobody_knows_are_explained_by_an_example(tmp_path):
    clinical = read_clinical(write(tmp_path, "ID,Group\nXY-17,HC\n3,HC\n"))
    assert clinical.find(make_scan("p3")).label == "normal"
    assert clinical.find(make_scan("p3_site2")) is None
    assert clinical.explain(make_scan("patient4")) == "not in table.csv, which has names such as XY-17"


@pytest.mark.parametrize(
    ("cell", "age"),
    [("35,8", 35.8), ("74", 74), ("074Y", 74), ("33 years", 33), ("89+", None), ("-4", None), ("1e3", None)],
)
def test_ages(cell, age, tmp_path):
    clinical = read_clinical(write(tmp_path, f"ID;Group;Age\na;HC;{cell}\n"))
    assert clinical.find(make_scan("a")).age == age


def test_ages_in_months_become_years(tmp_path):
    for header in ("Age (months)", "age_months"):
        assert read_clinical(write(tmp_path, f"ID,Group,{header}\na,HC,126\n")).find(make_scan("a")).age == 10.5


def test_only_words_and_documented_codes_give_the_sex(tmp_path, warnings):
    words = {"F": "F", "female": "F", "Woman": "F", "w": "F", "M": "M", "MALE": "M", "man": "M", "männlich": "M"}
    for word, sex in (words | {"Missing": None, "1": None, "2": None, "fish": None}).items():
        assert read_clinical(write(tmp_path, f"ID,Group,Sex\na,HC,{word}\n")).find(make_scan("a")).sex == sex
    assert "Sex has values that are neither F nor M and are not used: 2 (1 line)" in warnings()
    clinical = read_clinical(write(tmp_path, "OASISID,AgeatEntry,GENDER\nOAS30001,65,2\n"), needs_labels=False)
    assert read_facts(clinical, [make_scan("OAS30001", "d0129")]) == [(None, 65, "F")]


def test_empty_cells_filled_with_zero_are_suspected(tmp_path, warnings):
    read_clinical(write(tmp_path, OASIS1))
    read_clinical(write(tmp_path, "ID,Age,CDR\na,21,0\n"))
    assert not warnings()
    filled = OASIS1.replace("21,,,,,", "21,,,,0,") + "OAS1_0005_MR1,M,R,18,,,,0,1737,0.848,1.01,\n"
    read_clinical(write(tmp_path, filled + "OAS1_0006_MR1,M,R,81,,,,0,1737,0.848,1.01,\n"))
    assert "below 60 with CDR 0 and no MMSE: 2; probably they were not rated" in warnings()


def test_zeros_in_every_empty_cell_are_suspected_too(tmp_path, warnings):
    read_clinical(write(tmp_path, OASIS1.replace("21,,,,,", "21,0,0,0,0,")))
    assert "CDR 0 and no MMSE: 1;" in warnings()


def test_where_something_else_gives_the_labels_unknown_values_are_said_and_do_not_count(tmp_path, warnings):
    clinical = read_clinical(write(tmp_path, "ID,Group,Age\na,A1,33\nb,HC,34\n"), needs_labels=False)
    assert read_facts(clinical, [make_scan("a"), make_scan("b")]) == [(None, 33, None), ("normal", 34, None)]
    assert "not compared with the labels of the scans: A1 (1 line)" in warnings()


def test_lines_that_name_nobody_are_said(tmp_path, warnings):
    clinical = read_clinical(write(tmp_path, "ID,Visit,Group\na,1,HC\n,2,AD\nb,1,HC\n"))
    assert read_labels(clinical) == {"a": "normal", "b": "normal"}
    assert "without a name, which are not used: 1, the first is line 3" in warnings()


def test_a_column_says_whose_scan_a_file_is(tmp_path):
    text = "file,subject,diagnosis\nraw/a17_T1w.nii.gz,P1,HC\nb3_T1w.nii,P1,HC\nc5,P2,HC\n"
    clinical = read_clinical(write(tmp_path, text))
    scans = [make_scan("a17", name="a17_T1w"), make_scan("b3"), make_scan("c5"), make_scan("c5", "s2"), make_scan("d")]
    assert [scan.subject for scan in clinical.name_persons(scans)] == ["P1", "P1", "P2", "P2", "d"]
    clinical = read_clinical(write(tmp_path, "file,subject,diagnosis\np7_v1,P1,HC\np8_v1,P2,HC\np8_v2,P3,HC\n"))
    scans = [make_scan(subject, f"v{visit}") for subject in ("p7", "p8") for visit in (1, 2, 3)]
    # p7_v2 goes with p7_v1; p8_v3 may be P2 or P3.
    assert [scan.subject for scan in clinical.name_persons(scans)] == ["P1", "P1", "P1", "P2", "P3", "p8"]
    bids = read_clinical(write(tmp_path, "participant_id\tsubject\tgroup\nsub-01\tP1\tHC\nsub-02\tP1\tHC\n"))
    scans = [make_scan("sub-01", "ses-1"), make_scan("sub-02", "ses-1")]
    assert {scan.subject for scan in bids.name_persons(scans)} == {"P1"}
    same = read_clinical(write(tmp_path, OASIS2))
    scans = [make_scan("OAS2_0001", "MR1"), make_scan("OAS2_0001", "MR2")]
    assert same.name_persons(scans) == scans


def test_a_bare_number_that_may_be_two_subjects_is_refused(tmp_path):
    clinical = read_clinical(write(tmp_path, "ID,Group\n7,HC\n8,AD\n"))
    one = [make_scan("a07", "1"), make_scan("A7", "2"), make_scan("a8")]
    assert clinical.name_persons(one) == one
    with pytest.raises(DataError, match="its 7 may be a07 or b7; write the subjects there as in the scans' names"):
        clinical.name_persons([*one, make_scan("b7")])
