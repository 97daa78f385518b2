"""Labels come from the tree, the flag or the table, and nobody is ever on two sides."""

from dataclasses import replace

import nibabel as nib
import pytest

from common.cli import DataError
from preprocessing.clinical import read_clinical
from preprocessing.cohort import CohortRules, label_scans, plan, refuse_leaks, refuse_mixture
from preprocessing.scans import Scan
from preprocessing.store import StoredScan
from tests.conftest import make_head

TABLE = """ID,M/F,Age,CDR
OAS1_0001_MR1,F,74,0
OAS1_0002_MR1,M,55,0.5
OAS1_0003_MR1,F,21,
"""


def make_scan(tmp_path, subject, session="", split="", label="", **known):
    name = f"{subject}_{session}" if session else subject
    scan = Scan(tmp_path / f"{name}.nii", name, split, label, subject, session, None, None)
    return replace(scan, **known)


def make_stored(tmp_path, subject, place):
    return StoredScan(tmp_path / "out" / place / subject, subject, range(1), ())


@pytest.fixture
def clinical(tmp_path):
    (tmp_path / "a.csv").write_text(TABLE)
    return read_clinical(tmp_path / "a.csv")


# Labels.


def test_the_table_gives_label_age_and_sex(tmp_path, clinical):
    scans = [make_scan(tmp_path, f"OAS1_000{i}", "MR1") for i in (1, 2, 3, 4)]
    labelled, left_out = label_scans(scans, clinical, None, None)
    assert [(s.subject, s.label, s.age, s.sex) for s in labelled] == [
        ("OAS1_0001", "normal", 74, "F"),
        ("OAS1_0002", "abnormal", 55, "M"),
    ]
    assert [path for path, _ in left_out] == [str(scan.path) for scan in scans[2:]]
    assert left_out[0][1] == "its CDR is blank in a.csv; --blank-cdr normal would take it as normal"
    assert left_out[1][1] == "not in a.csv, which has names such as OAS1_0001_MR1"


@pytest.mark.parametrize("blank", ["normal", "abnormal"])
def test_blank_is_a_label_only_where_asked_for_and_absent_never(blank, tmp_path, clinical):
    scans = [make_scan(tmp_path, f"OAS1_000{i}", "MR1") for i in (1, 2, 3, 4)]
    labelled, left_out = label_scans(scans, clinical, None, blank)
    assert [scan.label for scan in labelled] == ["normal", "abnormal", blank]
    assert len(left_out) == 1


def test_one_label_may_hold_for_all(tmp_path):
    scans = [make_scan(tmp_path, "a", lesion_mask=tmp_path / "m.nii"), make_scan(tmp_path, "b")]
    for label, masks in (("normal", [None, None]), ("abnormal", [tmp_path / "m.nii", None])):
        labelled, left_out = label_scans(scans, None, label, None)
        assert [scan.label for scan in labelled] == [label, label]
        assert [scan.lesion_mask for scan in labelled] == masks, "a normal scan has no lesion"
        assert left_out == []


def test_the_tree_goes_before_the_table_and_must_not_contradict_it(tmp_path, clinical):
    scan = make_scan(tmp_path, "OAS1_0003", "MR1", "train", "abnormal")
    ((labelled,), _) = label_scans([scan], clinical, None, None)
    assert (labelled.label, labelled.age) == ("abnormal", 21)
    assert label_scans([scan], None, "normal", None)[0][0].label == "abnormal"
    with pytest.raises(DataError, match=r"is in a folder of normal scans and is abnormal in .*a\.csv; move it"):
        label_scans([make_scan(tmp_path, "OAS1_0002", "MR1", "train", "normal")], clinical, None, None)


def test_the_year_around_a_scan_is_named_where_a_session_is_a_day(tmp_path, clinical):
    (tmp_path / "b.csv").write_text("OASISID,days_to_visit,CDRTOT\nOAS30001,466,0\n")
    clinical = read_clinical(tmp_path / "b.csv")
    _, ((_, why),) = label_scans([make_scan(tmp_path, "OAS30001", "d0100")], clinical, None, None)
    assert why == "not in b.csv within 365 days"


def test_one_label_for_all_must_not_contradict_the_table(tmp_path, clinical):
    scans = [make_scan(tmp_path, f"OAS1_000{i}", "MR1") for i in (1, 3, 4)]
    labelled, _ = label_scans(scans, clinical, "normal", None)
    assert [(scan.label, scan.age) for scan in labelled] == [("normal", 74), ("normal", 21), ("normal", None)]
    with pytest.raises(DataError, match=r"--label is abnormal and is normal in .*a\.csv; leave it out"):
        label_scans(scans, clinical, "abnormal", None)


# Refusals.


def test_a_subject_in_two_splits_is_a_leak(tmp_path):
    refuse_leaks([("a", "train", "x"), ("a", "train", "y"), ("b", "test", "z")])
    with pytest.raises(DataError, match=r"^y: subject a is in test and in train \(x\); all scans of a subject belong"):
        refuse_leaks([("a", "train", "x"), ("b", "test", "z"), ("a", "test", "y")])
    with pytest.raises(DataError, match=r"^y: subject P01 is in test and in train"):
        refuse_leaks([("p1", "train", "x"), ("P01", "test", "y")])
    refuse_leaks([("p1", "train", "x"), ("p10", "test", "y"), ("p1_1", "val", "z")])


def test_a_mixture_is_refused_with_the_list_of_the_fewer():
    refuse_mixture("have a mask", [])
    refuse_mixture("have a mask", [(True, "x"), (True, "y")])
    for side, words in ((True, "1 scans have a mask and 2 do not.*that do: b$"), (False, "2 .* and 1 .*do not: b$")):
        with pytest.raises(DataError, match=words):
            refuse_mixture("have a mask", [(not side, "a"), (side, "b"), (not side, "c")])


# The whole plan.


@pytest.fixture
def tree(tmp_path):
    """Two training scans and a test scan in a split/label tree; nothing is read of them, so they are empty."""
    for place in ("train/normal/z/a_T1w.nii", "train/normal/b_T1w.nii", "test/abnormal/c_T1w.nii"):
        (tmp_path / "raw" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / place).touch()
    return tmp_path


def plan_tree(tree, stored=(), splits=None, **rules):
    return plan(tree / "raw", tree / "out", CohortRules(**rules), list(stored), splits or {})


def test_a_tree_is_planned_in_order_of_split_label_and_name(tree):
    assert [(scan.split, scan.label, scan.name) for scan in plan_tree(tree).scans] == [
        ("train", "normal", "a_T1w"),
        ("train", "normal", "b_T1w"),
        ("test", "abnormal", "c_T1w"),
    ]
    assert {scan.axes for scan in plan_tree(tree).scans} == {None}
    assert {scan.axes for scan in plan_tree(tree, axes="LPI").scans} == {"LPI"}
    with pytest.raises(DataError, match="folders give the labels already; leave --label out"):
        plan_tree(tree, label="normal")


def test_a_plan_leaks_no_subject_in_the_folder_nor_from_the_store(tree):
    with pytest.raises(DataError, match="subject a is in test and in train"):
        plan_tree(tree, [make_stored(tree, "a", "test/normal")])
    plan_tree(tree, [make_stored(tree, "a", "train/normal")])
    (tree / "raw/test/abnormal/a_T1w.nii").touch()
    with pytest.raises(DataError, match="subject a is in test and in train"):
        plan_tree(tree)


def test_a_store_that_took_visits_for_people_keeps_their_split_or_is_refused(tmp_path):
    (tmp_path / "raw").mkdir()
    for name in ("p7_visit1", "p7_visit2", "p8_visit1", "p9_visit1"):
        (tmp_path / f"raw/{name}.nii").touch()
    stored = [replace(make_stored(tmp_path, "p7_visit1", "val/normal"), subject="p7_visit1")]
    found = plan_tree(tmp_path, stored, label="normal")
    assert {scan.split for scan in found.scans if scan.subject == "p7"} == {"val"}
    stored += [replace(make_stored(tmp_path, "p7_visit2", "train/normal"), subject="p7_visit2")]
    with pytest.raises(DataError, match=r"subject p7 is in train and in val"):
        plan_tree(tmp_path, stored, label="normal")


def test_a_scan_under_the_other_label_has_been_relabelled(tree):
    stored = make_stored(tree, "c_T1w", "test/normal")
    with pytest.raises(DataError, match=r"test/normal/c_T1w: is test/abnormal now; delete this folder"):
        plan_tree(tree, [stored])
    (tree / "raw/test/normal").mkdir()
    (tree / "raw/test/normal/c_T1w.nii").touch()
    plan_tree(tree, [replace(stored, subject="c")])  # before and after: two scans


def test_masks_for_some_and_none_for_others_are_refused(tree):
    (tree / "raw/train/masks").mkdir()
    nib.save(make_head(), tree / "raw/train/masks/a_brain.nii")
    with pytest.raises(DataError, match=r"1 scans have a brain mask and 2 do not.*that do: .*a_T1w\.nii$"):
        plan_tree(tree)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "raw").mkdir()
    for subject in range(1, 5):
        (tmp_path / f"raw/OAS1_000{subject}_MR1_mpr_n4_anon_111_t88_gfc.img").touch()
    (tmp_path / "a.csv").write_text(TABLE)
    return tmp_path


def test_without_a_tree_something_must_say_who_is_normal(folder):
    with pytest.raises(DataError, match=r"which of its 4 scans are normal.*--clinical.*--label normal.*--label abnorm"):
        plan_tree(folder)
    found = plan_tree(folder, clinical=folder / "a.csv")
    assert {scan.subject: (scan.split, scan.label) for scan in found.scans} == {
        "OAS1_0001": ("train", "normal"),
        "OAS1_0002": ("test", "abnormal"),
    }
    assert len(found.left_out) == 2
    assert {scan.axes for scan in found.scans} == {"LAS"}
    assert [scan.label for scan in plan_tree(folder, label="abnormal").scans] == 4 * ["abnormal"]
    unlabelled = plan_tree(folder, label="unlabelled").scans
    assert {(scan.label, scan.split, scan.lesion_mask) for scan in unlabelled} == {("unlabelled", "test", None)}
    assert len(plan_tree(folder, clinical=folder / "a.csv", blank="normal").scans) == 3
    assert plan_tree(folder, clinical=folder / "a.csv").notes == (
        "a.csv: CDR 0 -> normal (1 line)",
        "a.csv: CDR 0.5 -> abnormal (1 line)",
        "a.csv: CDR blank -> left out (1 line)",
    )
    (folder / "a.csv").write_text("ID,CDR\nOAS1_0009_MR1,0\n")
    with pytest.raises(DataError, match=r"none of its 4 scans has a label; not in a\.csv"):
        plan_tree(folder, clinical=folder / "a.csv")


def test_a_table_without_labels_gives_ages_where_the_label_is_given(folder):
    (folder / "a.csv").write_text("ID,Age,M/F\nOAS1_0001_MR1,74,F\n")
    with pytest.raises(DataError, match="none of the columns CDR"):
        plan_tree(folder, clinical=folder / "a.csv")
    found = plan_tree(folder, clinical=folder / "a.csv", label="normal")
    assert {scan.subject: (scan.age, scan.sex) for scan in found.scans} == {
        "OAS1_0001": (74, "F"),
        **dict.fromkeys(("OAS1_0002", "OAS1_0003", "OAS1_0004"), (None, None)),
    }


def test_values_that_are_mapped_give_labels(folder):
    (folder / "a.csv").write_text("ID,Group\nOAS1_0001_MR1,1\nOAS1_0002_MR1,2\n")
    with pytest.raises(DataError, match=r"1 \(1 line\), 2 \(1 line\); map them with --normal-values"):
        plan_tree(folder, clinical=folder / "a.csv")
    found = plan_tree(folder, clinical=folder / "a.csv", normal_values=("1",), abnormal_values=("2",))
    assert {scan.subject: scan.label for scan in found.scans} == {"OAS1_0001": "normal", "OAS1_0002": "abnormal"}


def test_the_persons_of_the_table_are_on_one_side(tree):
    (tree / "a.csv").write_text("file,subject,age\na_T1w.nii,P1,33\nc_T1w.nii,P1,33\n")
    with pytest.raises(DataError, match="subject P1 is in"):
        plan_tree(tree, clinical=tree / "a.csv")


def test_axes_that_are_given_go_before_those_of_the_layout(tmp_path):
    (tmp_path / "raw/OASIS_OAS1_0001_MR1").mkdir(parents=True)
    (tmp_path / "raw/OASIS_OAS1_0001_MR1/norm.nii.gz").touch()
    for axes, wanted in ((None, ("LIA", "RAS")), ("PSR", ("PSR", None))):
        (scan,) = plan_tree(tmp_path, label="normal", axes=axes).scans
        assert (scan.axes, scan.distrusted) == wanted


def test_splits_are_kept_from_an_earlier_plan_and_before_it_from_the_store(folder):
    earlier = {"OAS1_0001": "val", "OAS1_0002": "val"}
    stored = [make_stored(folder, "OAS1_0002", "test/normal")]
    scans = plan_tree(folder, stored, earlier, label="normal", fractions=(1, 0, 0)).scans
    assert [scan.split for scan in sorted(scans, key=lambda scan: scan.subject)] == ["val", "test", "train", "train"]


def test_no_scans_is_one_line(tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(DataError, match="no scans"):
        plan_tree(tmp_path)
    for name in ("x.nii", "x.nii.gz"):
        (tmp_path / "raw" / name).touch()
    with pytest.raises(DataError, match=r"raw/x\.nii: .*raw/x\.nii\.gz would have the same name, x") as error:
        plan_tree(tmp_path)
    assert "\n" not in str(error.value)


def test_the_defaults_are_those_of_the_readme():
    rules = CohortRules()
    assert (rules.modality, rules.fractions, rules.seed, rules.blank) == ("t1", (0.8, 0.1, 0.1), 0, None)
