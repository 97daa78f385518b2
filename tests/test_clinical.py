"""Who is healthy, how old and which sex, from tables as they stand in public and as people write them."""

import dataclasses
import datetime
import logging
import struct
import zipfile
from pathlib import Path

import openpyxl
import pytest

from common.cli import DataError, log
from preprocessing import spreadsheet
from preprocessing.clinical import read_clinical
from preprocessing.scans import Scan

OASIS1 = """ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay
OAS1_0001_MR1,F,R,74,2,3,29,0,1344,0.743,1.306,N/A
OAS1_0002_MR1,M,R,55,4,1,29,0.5,1147,0.810,1.531,N/A
OAS1_0003_MR1,F,R,21,,,,,1500,0.85,1.1,N/A
"""
OASIS1_EXPECTED = [
    ("OAS1_0001", "MR1", "normal", 74, "F"),
    ("OAS1_0002", "MR1", "abnormal", 55, "M"),
    ("OAS1_0003", "MR1", None, 21, "F"),
    ("OAS1_0003", "MR2", None, None, None),
    ("OAS1_0004", "MR1", None, None, None),
]
OASIS2 = """Subject ID,MRI ID,Group,Visit,MR Delay,M/F,Hand,Age,EDUC,SES,MMSE,CDR,eTIV,nWBV,ASF
OAS2_0001,OAS2_0001_MR1,Converted,1,0,M,R,80,14,2,27,0,1987,0.696,0.883
OAS2_0001,OAS2_0001_MR2,Converted,2,457,M,R,81,14,2,30,0.5,2004,0.681,0.876
OAS2_0002,OAS2_0002_MR1,Nondemented,1,0,F,R,75,12,,23,0,1678,0.736,1.046
"""
OASIS2_EXPECTED = [
    ("OAS2_0001", "MR1", "normal", 80, "M"),
    ("OAS2_0001", "MR2", "abnormal", 81, "M"),
    ("OAS2_0002", "MR1", "normal", 75, "F"),
    ("OAS2_0002", "MR2", None, None, None),
]
OASIS3 = """OASISID,OASIS_session_label,days_to_visit,age at visit,CDRTOT
OAS30001,OAS30001_UDSb4_d0000,0,65.1,0
OAS30001,OAS30001_UDSb4_d0800,0800,67.3,0.5
OAS30002,OAS30002_UDSb4_d0000,0,70.0,0
OAS30003,OAS30003_UDSb4_d0100,100,71,
OAS30003,OAS30003_UDSb4_d0200,200,72,1
"""
BIDS = "participant_id\tage\tsex\tdiagnosis\nsub-01\t33\tF\tcontrol\nsub-02\t44\tM\tschizophrenia\n03\tn/a\tn/a\tn/a\n"
ADNI = """"Image Data ID","Subject","Group","Sex","Age","Visit","Modality","Description","Type","Acq Date","Format"
"I45117","002_S_0413","CN","F","76","bl","MRI","MPR","Processed","5/19/2006","NiFTI"
"I45118","002_S_0413","CN","F","77","m12","MRI","MPR","Processed","5/19/2007","NiFTI"
"I9","005_S_0223","MCI","M","78","sc","MRI","MPR","Processed","3/02/2006","NiFTI"
"""
ADNIMERGE = """RID,PTID,VISCODE,EXAMDATE,DX_bl,AGE,PTGENDER,Years_bl,DX
3,011_S_0003,bl,2005-09-12,CN,81.3,Male,0,CN
3,011_S_0003,m24,2007-09-12,CN,81.3,Male,2.0,Dementia
4,022_S_0004,bl,2005-11-08,LMCI,67.5,Female,0,MCI
5,022_S_0005,m06,2006-05-02,CN,67.5,Female,0.5,
"""
IXI = """IXI_ID,"SEX_ID (1=m, 2=f)",HEIGHT,WEIGHT,ETHNIC_ID,AGE,DATE_AVAILABLE,STUDY_DATE
2,2,164,58,1,35.80,1,2005-11-18
12,1,175,70,1,38.78,1,2005-10-20
105,0,0,0,0,,1,
"""

HEALTHY = (
    "control,Controls,CTRL,ctl,Healthy,Healthy Controls,healthy_control,HEALTHY-CONTROL,Healthy control (HC),HC,CN,NC,"
    "NL,con,CU,TD,TDC,typically developing,Typically-Developing,neurotypical,normal,Normal Cognition,"
    "cognitively normal,Cognitively_Unimpaired,unimpaired,unaffected,volunteer,Healthy Volunteers,none,None,"
    "no dementia,non-demented,Nondemented,not demented,No Cognitive Impairment,no tumor,Témoin"
)
ILL = (
    "AD,ad,Alzheimer's Disease,Alzheimer’s disease,MCI,EMCI,mild cognitive impairment,Dementia,demented,Converted,"
    "very mild dementia,Patient,PATIENTS,case,Cases,MS,multiple sclerosis,PD,Parkinson's disease,schizophrenia,SCHZ,"
    "bipolar,ADHD,Autism,stroke,glioblastoma,epilepsy,cognitively impaired"
)
UNKNOWN = (
    "A,xyz,1,2,0.5,TRUE,yes,HIV-,TBI-,CN+,SMC,not healthy,non-control,control?,unaffected sibling,dementia (ruled out)"
)


def make_scan(subject, session="", name=None, label=""):
    name = name or (f"{subject}_{session}" if session else subject)
    return Scan(Path(f"{name}.nii"), name, "", label, subject, session, None, None)


def write(tmp_path, content, name="table.csv"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_facts(clinical, scans):
    rows = [clinical.find(scan) for scan in scans]
    return [(row.label, row.age, row.sex) if row else (None, None, None) for row in rows]


def read_labels(clinical):
    return {rows[0].name: rows[0].label for rows in clinical.rows.values()}


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


def test_adnis_image_number_says_which_line_a_scan_is(tmp_path):
    clinical = read_clinical(write(tmp_path, ADNI))
    scan = make_scan("002_S_0413", name="ADNI_002_S_0413_MR_MPR__GradWarp_Br_20070806151213_S13894_I45118")
    assert clinical.find(scan).age == 77


def test_the_folder_of_the_visit_says_the_day_not_the_date_of_processing_in_the_name(tmp_path):
    clinical = read_clinical(write(tmp_path, ADNIMERGE))
    scan = make_scan("011_S_0003", "2007-09-30", name="ADNI_011_S_0003_MR_MPR_Br_20070930114123_S13894_I1")
    assert clinical.find(scan).label == "abnormal"
    folder = Path("ADNI/011_S_0003/MPR__GradWarp/2005-09-14_16_17_47.0/S13894")
    assert clinical.find(dataclasses.replace(scan, path=folder / scan.path)).label == "normal"


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


@pytest.mark.parametrize("word", HEALTHY.split(","))
def test_words_for_healthy_people(word, tmp_path):
    clinical = read_clinical(write(tmp_path, f"ID,Group\na,{word}\nb,patient\n"))
    assert read_labels(clinical) == {"a": "normal", "b": "abnormal"}


@pytest.mark.parametrize("word", ILL.split(","))
def test_words_for_patients(word, tmp_path):
    clinical = read_clinical(write(tmp_path, f"ID,Group\na,{word}\nb,control\n"))
    assert read_labels(clinical) == {"a": "abnormal", "b": "normal"}


@pytest.mark.parametrize("word", UNKNOWN.split(","))
def test_other_values_are_asked(word, tmp_path):
    with pytest.raises(DataError, match=r"--normal-values VALUE \.\.\. and --abnormal-values VALUE") as error:
        read_clinical(write(tmp_path, f"ID,Group\na,{word}\nb,control\nc,patient\n"))
    assert f"column Group has values of unknown meaning: {word} (1 line);" in str(error.value)


def test_values_that_are_not_known_are_listed_with_their_counts(tmp_path):
    text = "ID,Group\na,HC\nb,x y\nc,2\nd,x y\ne,x y\nf,\ng,AD\n"
    with pytest.raises(
        DataError, match=r"table\.csv: its column Group .*: x y \(3 lines\), 2 \(1 line\); map"
    ) as error:
        read_clinical(write(tmp_path, text))
    assert "\n" not in str(error.value)
    many = "ID,Group\n" + "".join(f"{n},free text {n}\n" for n in range(400))
    with pytest.raises(DataError, match=r"\(1 line\) and 370 more; map") as error:
        read_clinical(write(tmp_path, many))
    with pytest.raises(DataError, match=r"of unknown meaning: a b c x{33}… \(1 line\)"):
        read_clinical(write(tmp_path, 'ID,Group\n1,"a\nb\tc ' + "x" * 80 + '"\n'))


def test_the_user_says_what_values_mean(tmp_path):
    path = write(tmp_path, "ID,Group\na,HC\nb,X_y\nc,2\nd,1\n")
    clinical = read_clinical(path, normal_values=["x Y", "2.0"], abnormal_values=["1", "hc"])
    assert read_labels(clinical) == {"a": "abnormal", "b": "normal", "c": "normal", "d": "abnormal"}
    with pytest.raises(DataError, match=r"Group has no value ctlr; it has 1 \(1 line\), 2"):
        read_clinical(path, normal_values=["ctlr"])
    with pytest.raises(DataError, match="--normal-values and --abnormal-values both have 1;"):
        read_clinical(path, normal_values=["1"], abnormal_values=["1"])
    with pytest.raises(DataError, match="none of the columns CDR"):  # nothing for the values to stand in
        read_clinical(write(tmp_path, "ID,Age\na,7\n"), normal_values=["1"], needs_labels=False)
    cdr = write(tmp_path, "ID,CDR\na,0\nb,0.5\nc,9\n")
    assert read_labels(read_clinical(cdr, ["0,5"], ["9"])) == {"a": "normal", "b": "normal", "c": "abnormal"}


def test_zero_is_healthy_only_beside_patients(tmp_path):
    path = write(tmp_path, "ID,Group\na,0\nb,MS\nc,\n")
    assert read_labels(read_clinical(path)) == {"a": "normal", "b": "abnormal", "c": None}
    for others in ("1", "control", "", "MS\nc,control", "MS\nc,1"):
        with pytest.raises(DataError, match=r"0 \(1 line\)"):
            read_clinical(write(tmp_path, f"ID,Group\na,0\nb,{others}\n"))
    path = write(tmp_path, "ID,Group\na,0\nb,1\n")
    assert read_labels(read_clinical(path, abnormal_values=["1"])) == {"a": "normal", "b": "abnormal"}
    with pytest.raises(DataError, match=r"meaning: 0 \(1 line\);"):
        read_clinical(path, normal_values=["1"])
    assert read_labels(read_clinical(path, ["1"], ["0"])) == {"a": "abnormal", "b": "normal"}


def test_a_legend_in_the_header_explains_codes(tmp_path):
    path = write(tmp_path, 'ID,Group (1 = patient; 2 = control),"Sex (0: female, 1: male)"\na,1,0\nb,2,1\n')
    clinical = read_clinical(path)
    assert read_facts(clinical, [make_scan("a"), make_scan("b")]) == [("abnormal", None, "F"), ("normal", None, "M")]


@pytest.mark.parametrize("word", ["", " ", "n/a", "N/A", "NA", "nan", ".", "?", "-", "unknown", "Not Available", "-4"])
def test_words_for_nothing_are_blank(word, tmp_path):
    for column in ("CDR", "Group"):
        text = f"ID,{column},Age,Sex\na,{word},{word},{word}\nb,0,7,F\nc,{'AD' if column == 'Group' else 1},8,M\n"
        clinical = read_clinical(write(tmp_path, text))
        assert read_facts(clinical, [make_scan("a")]) == [(None, None, None)]
        assert read_labels(clinical) == {"a": None, "b": "normal", "c": "abnormal"}


@pytest.mark.parametrize("value", ["-1", "0.285", "4", "seven", "nan0", "1e9", "2024-05-01"])
def test_what_is_no_cdr_is_asked(value, tmp_path):
    with pytest.raises(DataError, match=r"\(a CDR is 0, 0\.5, 1, 2 or 3\): " + value):
        read_clinical(write(tmp_path, f"ID,CDR\na,0\nb,{value}\n"))


def test_a_group_counts_where_every_cdr_is_blank(tmp_path):
    clinical = read_clinical(write(tmp_path, "ID,CDR,Group\na,,HC\nb,N/A,AD\n"))
    assert read_labels(clinical) == {"a": "normal", "b": "abnormal"}
    clinical = read_clinical(write(tmp_path, "ID,CDR,Group\na,,HC\nb,1,AD\n"))
    assert read_labels(clinical) == {"a": None, "b": "abnormal"}


def test_every_group_is_printed_with_its_label(tmp_path):
    clinical = read_clinical(write(tmp_path, "ID,Group\na,HC\nb,Ctrl\nc,HC\nd,AD\ne,\nf,unknown\n"))
    assert clinical.describe() == [
        "table.csv: Group HC -> normal (2 lines)",
        "table.csv: Group Ctrl -> normal (1 line)",
        "table.csv: Group AD -> abnormal (1 line)",
        "table.csv: Group blank -> left out (1 line)",
        "table.csv: Group unknown -> left out (1 line)",
    ]
    assert clinical.describe(blank="normal")[3] == "table.csv: Group blank -> normal (1 line)"
    values = [f"v{n}" for n in range(60)]
    text = "ID,Group\n" + "".join(f"{value},{value}\n" for value in values)
    assert read_clinical(write(tmp_path, text), values).describe()[49:] == [
        f"table.csv: Group {sorted(values)[49]} -> normal (1 line)",
        "table.csv: 10 more values",
    ]


SEMICOLONS = OASIS1.replace(",", ";").replace(".", ",")
UMLAUT = OASIS1.replace("Hand", "Händigkeit")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("table.csv", SEMICOLONS),
        ("table.csv", SEMICOLONS.replace("\n", "\r\n")),
        ("table.csv", OASIS1.replace("\n", "\r")),
        ("table.csv", OASIS1.replace(",", "\t")),
        ("table.tsv", OASIS1),
        ("table.txt", OASIS1.replace(",", "|")),
        ("table.csv", "sep=;\n" + SEMICOLONS),
        ("table.csv", OASIS1.replace(",0.5,", ',"0,5",')),
        ("table.csv", UMLAUT.encode("latin-1")),
        ("table.csv", UMLAUT.encode("utf-8-sig")),
        ("table.csv", UMLAUT.encode("utf-16")),
        ("table.csv", UMLAUT.encode("utf-16-le")),
        ("table.csv", UMLAUT.encode("utf-16-be")),
        ("table.csv", b"\xfe\xff" + UMLAUT.encode("utf-16-be")),
        ("table.csv", UMLAUT.replace(",", "\t").encode("utf-32")),
        ("no header.csv", OASIS1.split("\n", 1)[1]),
        ("title.csv", "OASIS: cross-sectional, 2007\n\n" + OASIS1),
        ("trailing.csv", OASIS1.replace("\n", ",,\n")),
        ("index.csv", "".join(f"{n},{line}\n" for n, line in enumerate(OASIS1.splitlines())).replace("0,", ",", 1)),
        ("other names.csv", OASIS1.replace("ID,M/F", "MRI.ID,Gender").replace("OAS1_0001", "oas1-0001")),
        ("clinica.csv", OASIS1.replace("OAS1_0002_MR1", "sub-OASIS10002").replace("OAS1_0001_MR1", "OAS1_0001")),
        ("upper.csv", OASIS1.upper()),
        ("zeros.csv", OASIS1.replace("OAS1_0001_MR1", "OAS1_1_MR1")),
        ("neurite.csv", OASIS1.replace("OAS1_0", "OASIS_OAS1_0")),
        ("numbers.csv", OASIS1.replace("_MR1", "").replace("OAS1_000", "")),
    ],
)
def test_the_same_table_however_it_is_written(name, content, tmp_path):
    clinical = read_clinical(write(tmp_path, content, name))
    expected = [facts for facts in OASIS1_EXPECTED if facts[1] == "MR1"]
    scans = [make_scan(subject, session) for subject, session, *_ in expected]
    assert read_facts(clinical, scans) == [facts[2:] for facts in expected]


def test_oasis2_without_its_header_and_with_its_columns_in_another_order(tmp_path):
    scans = [make_scan(subject, session) for subject, session, *_ in OASIS2_EXPECTED]
    lines = [line.split(",") for line in OASIS2.splitlines()]
    for text in (OASIS2.split("\n", 1)[1], "\n".join(",".join(reversed(line)) for line in lines)):
        assert read_facts(read_clinical(write(tmp_path, text)), scans) == [facts[2:] for facts in OASIS2_EXPECTED]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read as a table .it is empty"),
        ("subject,colour\na,b\n", "needs one of the columns ID"),
        ("name,colour\na,b\n", "needs one of the columns ID.*its first line is name, colour; add a header line"),
        ("OAS1_0001_MR1,R,F,74,2,3,29,0,1344,0.743,1.306,N/A\n", "its first line is OAS1_0001_MR1, R, F, 74"),
        ("OAS1_0001_MR1,F,R,0,74\n", "its first line is OAS1_0001_MR1, F, R, 0, 74; add a header line"),
        ("ID,Age\nOAS1_0001_MR1,7\n", "none of the columns CDR"),
        ("ID,CDR\n", "but no lines"),
        ("ID,CDR\n,0\n", "no line has a name in ID"),
        ("ID,CDR,CDR\na,0,1\n", "two columns called CDR"),
        ("ID,CDR\na,0\nb,0,5\n", "line 3: has 3 cells, and the header 2.*separate it by semicolons"),
        ('ID,CDR\n"a,0\nb,1\n', "line 2: .*quotes are not closed"),
        (b"ID,CDR\na,\0\0\0\n", "is not text"),
        (b"\xff\xfea\0b", "cannot be read as a table.*save it as csv in UTF-8"),
        (b"PK\x03\x04 nothing", "cannot be read as a table.*save it as csv"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(2000), "cannot be read as a table.*save it as csv"),
        (b"<html><table><tr><td>ID</td></tr></table></html>", "one of the columns"),
    ],
)
def test_bad_tables_are_refused_in_one_line(content, words, tmp_path):
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=words) as error:
        read_clinical(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"b\.csv: no such file"):
        read_clinical(tmp_path / "b.csv")
    with pytest.raises(DataError, match="is not a file"):
        read_clinical(tmp_path)


def test_excel_with_titles_merged_headers_numbers_and_dates(tmp_path):
    book = openpyxl.Workbook()
    book.active.append(["read me first"])
    sheet = book.create_sheet("visits")
    sheet.append(["The cohort of 2006"])
    sheet.append(["Subject", "Demographics", None, "Clinical"])
    sheet.append([None, "Age", "Sex", "CDR", "Visit date"])
    sheet.merge_cells("A2:A3")
    sheet.merge_cells("B2:C2")
    sheet.append([7, 70.5, "F", 0, datetime.datetime(2006, 5, 19)])
    sheet.append([7, 73, "F", 0.5, datetime.datetime(2008, 11, 19)])
    sheet.append([8.0, 61, "M", 1, None, None, "came late"])
    hidden = book.create_sheet("old")
    hidden.append(["Subject", "Age", "Sex", "CDR", "Session", "Visit date", "MMSE"])
    hidden.append([7, 1, "M", 3, "x", None, 1])
    hidden.sheet_state = "hidden"
    book.save(tmp_path / "table.xlsx")
    clinical = read_clinical(tmp_path / "table.xlsx")
    scans = [make_scan("p07", "20060601"), make_scan("p07", "2008-12-01"), make_scan("p8"), make_scan("p9")]
    assert read_facts(clinical, scans) == [
        ("normal", 70.5, "F"),
        ("abnormal", 73, "F"),
        ("abnormal", 61, "M"),
        (None, None, None),
    ]
    assert [row.name for row in clinical.rows["8"]] == ["8"]
    csv = write(tmp_path, (tmp_path / "table.xlsx").read_bytes(), "table.csv")  # the content counts, not the ending
    assert read_clinical(csv).rows == clinical.rows


def test_old_excel_files_are_read(tmp_path):
    def record(kind, content):
        return struct.pack("<HH", kind, len(content)) + content

    cells = [["IXI_ID", "SEX_ID (1=m, 2=f)", "AGE"], [2, 2, 35.8], [12, 1, 38.78]]
    stream = record(0x0009, struct.pack("<HH", 2, 0x10))  # BIFF2, as Excel 2 wrote it and today's reads it
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            place = struct.pack("<HH3x", row, column)
            if isinstance(value, str):
                stream += record(0x0004, place + bytes([len(value)]) + value.encode())
            else:
                stream += record(0x0003, place + struct.pack("<d", value))
    clinical = read_clinical(write(tmp_path, stream + record(0x000A, b""), "IXI.xls"), needs_labels=False)
    assert read_facts(clinical, [make_scan("IXI002"), make_scan("IXI012")]) == [(None, 35.8, "F"), (None, 38.78, "M")]
    assert clinical.find(make_scan("IXI002")).name == "IXI002"


@pytest.mark.parametrize(
    ("limit", "value", "part", "words"),
    [
        ("MOST_BYTES", 100, b"<a/>", "MB"),
        ("MOST_UNPACKED_BYTES", 1e6, bytes(1_000_001), "1 MB unpacked"),
        ("MOST_MARKUP", 1000, b"<c/>" * 1001, "tags and attributes"),
        ("MOST_MARKUP", 1000, b"<c " + b'a="1" ' * 1001 + b"/>", "tags and attributes"),
        ("MOST_ROWS", 500_000, b"<c>" + b"x" * 600_000 + b"</c>", "one tag or cell"),
    ],
)
def test_a_spreadsheet_that_would_eat_the_memory_is_refused(limit, value, part, words, tmp_path, monkeypatch):
    monkeypatch.setattr(spreadsheet, limit, value)
    with zipfile.ZipFile(tmp_path / "table.xlsx", "w", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr("xl/worksheets/sheet1.xml", part)
    with pytest.raises(DataError, match=rf"too large for a clinical table.*{words}.*keep only the columns ID"):
        read_clinical(tmp_path / "table.xlsx")


def test_text_that_would_eat_the_memory_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path, "ID,CDR\n" + "a,0\n" * 100)
    assert read_clinical(path)
    for limit in ("MOST_BYTES", "MOST_ROWS", "MOST_CELLS"):
        with monkeypatch.context() as patch:
            patch.setattr(spreadsheet, limit, 99)
            with pytest.raises(DataError, match="too large for a clinical table"):
                read_clinical(path)


def test_a_cell_far_out_does_not_fill_the_sheet_with_nothing(tmp_path):
    book = openpyxl.Workbook()
    for place, value in {(1, 1): "ID", (1, 2): "CDR", (2, 1): "a", (2, 2): 0, (2, 16384): "x", (3000, 1): "b"}.items():
        book.active.cell(*place).value = value
    book.save(tmp_path / "table.xlsx")
    assert read_labels(read_clinical(tmp_path / "table.xlsx")) == {"a": "normal", "b": None}


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


def test_the_nearest_rating_within_a_year_counts(tmp_path):
    rows = ("1000,0", "1500,0.5", "1510,", "2600,1")
    text = "OASISID,days_to_visit,CDRTOT\n" + "\n".join(f"OAS30001,{row}" for row in rows)
    clinical = read_clinical(write(tmp_path, text))
    nearest = {"d0635": 1000, "d0634": None, "d1249": 1000, "d1251": 1500, "d1511": 1500, "d1865": 1500, "d1866": None}
    nearest["d1250"] = 1000  # of two as near the earlier one
    for session, day in nearest.items():
        row = clinical.find(make_scan("OAS30001", session))
        assert (row and row.day) == day, session
    alone = read_clinical(write(tmp_path, "OASISID,days_to_visit,CDRTOT\nOAS30001,10,\n"))
    assert alone.find(make_scan("OAS30001", "d0010")).label is None


def test_a_session_has_its_own_line_else_the_one_of_its_subject(tmp_path):
    text = "participant_id,session_id,diagnosis\nsub-1,ses-a,ad\nsub-1,,control\nsub-2,ses-a,control\n"
    clinical = read_clinical(write(tmp_path, text))
    assert clinical.find(make_scan("sub-1", "ses-a")).label == "abnormal"
    assert clinical.find(make_scan("sub-1", "ses-b")).label == "normal"
    assert clinical.find(make_scan("2", "A")).label == "normal", "with or without sub- and ses-, whatever the case"


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
