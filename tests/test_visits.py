"""Which line of a table a scan is: by the name of its session, by its day, or by the rating nearest to it."""

import dataclasses
from pathlib import Path

from preprocessing.clinical import read_clinical
from tests.tables import ADNI, ADNIMERGE, make_scan, write


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
