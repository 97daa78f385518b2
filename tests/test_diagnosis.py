"""Words, codes and ratings say who is healthy; what they leave open is asked."""

import pytest

from common.cli import DataError
from preprocessing.clinical import read_clinical
from tests.tables import make_scan, read_facts, read_labels, write

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
