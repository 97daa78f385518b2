"""Splits go by subject, meet their shares, and stay from run to run."""

import json
import random
import shutil

import nibabel as nib
import pytest

from common.cli import DataError
from preprocessing.cohort import split_subjects
from preprocessing.store import list_scans
from tests.conftest import make_head
from tests.test_cohort import make_scan
from tests.trees import read_places, read_record, run


def test_shares_are_of_normal_subjects_and_abnormal_ones_go_to_test(tmp_path):
    scans = [make_scan(tmp_path, f"n{i}", f"{k}", label="normal") for i in range(10) for k in (1, 2)]
    scans += [make_scan(tmp_path, "ill", "1", label="normal"), make_scan(tmp_path, "ill", "2", label="abnormal")]
    split = {scan.subject: scan.split for scan in split_subjects(scans, (0.8, 0.1, 0.1), 0, {})}
    assert split.pop("ill") == "test", "its normal scan too"
    assert sorted(split.values()) == ["test"] + 8 * ["train"] + ["val"]


def test_the_seed_decides_and_the_order_of_the_files_does_not(tmp_path):
    scans = [make_scan(tmp_path, f"n{i}", label="normal") for i in range(20)]
    one, same, other = (
        {scan.subject: scan.split for scan in split_subjects(order, (0.5, 0.25, 0.25), seed, {})}
        for order, seed in ((scans, 0), (scans[::-1], 0), (scans, 1))
    )
    assert one == same
    assert one != other


def test_new_subjects_fill_up_what_falls_short(tmp_path):
    """Of 10 subjects 4 stand in val already, so train gets all of the new ones that its share lacks."""
    scans = [make_scan(tmp_path, f"n{i}", label="normal") for i in range(10)]
    kept = {f"n{i}": "val" for i in range(4)}
    split = {scan.subject: scan.split for scan in split_subjects(scans, (0.5, 0.4, 0.1), 0, kept)}
    assert {subject: split[subject] for subject in kept} == kept
    assert sorted(split.values()) == ["test"] + 5 * ["train"] + 4 * ["val"]


def test_another_spelling_keeps_the_split(tmp_path):
    scans = [make_scan(tmp_path, name, label="normal") for name in ("sub-01", "sub-02", "sub-03")]
    kept = {"1": "val", "SUB-2": "test", "sub-003": "val"}
    split = {scan.subject: scan.split for scan in split_subjects(scans, (1, 0, 0), 0, kept)}
    assert split == {"sub-01": "val", "sub-02": "test", "sub-03": "val"}


def test_a_subject_with_an_abnormal_scan_cannot_have_been_trained_on(tmp_path):
    scans = [make_scan(tmp_path, "a", label="abnormal")]
    with pytest.raises(DataError, match="subject a has an abnormal scan and is in train from an earlier run"):
        split_subjects(scans, (0.8, 0.1, 0.1), 0, {"a": "train"})
    assert split_subjects(scans, (0.8, 0.1, 0.1), 0, {"a": "test"})[0].split == "test"


def test_no_random_cohort_has_a_subject_on_two_sides(tmp_path):
    """Random cohorts, grown twice: one split a subject, kept when scans come in, abnormal in test, shares met."""
    for seed in range(40):
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
            done = split_subjects(scans, fractions, seed, kept)
            assert [scan.session for scan in done] == [scan.session for scan in scans]
            splits = {}
            for scan in done:
                assert splits.setdefault(scan.subject, scan.split) == scan.split
            assert {subject: splits[subject] for subject in kept} == kept
            diseased = {scan.subject for scan in done if scan.label == "abnormal"}
            assert all(splits[subject] == "test" for subject in diseased)
            healthy = [splits[subject] for subject in splits if subject not in diseased]
            if not kept:
                for split, fraction in zip(("train", "val", "test"), fractions, strict=True):
                    assert abs(healthy.count(split) - fraction * len(healthy)) < 2
            kept = splits


@pytest.fixture
def discs(tmp_path):
    """Eight OASIS-2 sessions, two a subject, with a table."""
    rows = ["Subject ID,MRI ID,Group,Visit,M/F,Age,CDR"]
    for subject in range(1, 5):
        for visit in (1, 2):
            session = f"OAS2_000{subject}_MR{visit}"
            path = tmp_path / f"raw/OAS2_RAW_PART1/{session}/RAW/mpr-1.nifti.img"
            path.parent.mkdir(parents=True)
            head = make_head((15, 18, 16), (11.0, 11.0, 11.0), seed=2 * subject + visit)
            nib.save(nib.Nifti1Pair(head.get_fdata().astype("f4"), head.affine), path)
            cdr = 0.5 if subject == 1 and visit == 2 else 0
            rows.append(f"OAS2_000{subject},{session},x,{visit},F,{60 + visit},{cdr}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    return tmp_path


def test_from_discs_and_table_to_a_split_that_stays(discs, capsys):
    command = (discs / "raw", discs / "out", "--clinical", str(discs / "table.csv"), "--split", "0.34", "0.33", "0.33")
    assert run(*command, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "OASIS-2 raw parts: 8 scans of 4 subjects in 8 sessions" in text
    assert "OAS2_0001_MR2: subject OAS2_0001, session MR2, axes ASL unless its header gives them" in text
    assert "  table.csv: CDR 0 -> normal (7 lines)\n  table.csv: CDR 0.5 -> abnormal (1 line)\n" in text
    later = discs / "raw/OAS2_RAW_PART1/OAS2_0004_MR2"
    later.rename(discs / "later")
    assert run(*command) == 0
    first = read_places(discs / "out")
    assert (first["OAS2_0001_MR1"], first["OAS2_0001_MR2"]) == ("test/normal", "test/abnormal")
    assert len({place for name, place in first.items() if "0001" not in name}) == 3
    (discs / "later").rename(later)
    capsys.readouterr()
    assert run(*command, "--seed", "7") == 0
    assert f"4 subjects have slices in {discs / 'out'} and keep their split" in capsys.readouterr().out
    second = read_places(discs / "out")
    assert {name: second[name] for name in first} == first
    assert second["OAS2_0004_MR2"] == first["OAS2_0004_MR1"]
    scan = next(scan for scan in list_scans(discs / "out") if scan.name == "OAS2_0004_MR2")
    assert (scan.record["age"], scan.record["sex"]) == (62, "F")
    record = read_record(discs / "out")
    assert (record["layout"], record["flags"]["seed"]) == ("oasis2", 7)


def test_a_run_that_was_cut_off_goes_on_with_its_splits(discs):
    """What a killed run leaves: the splits, but no scan; other flags make new ones."""
    flags = ("--label", "normal", "--split", "0.5", "0.25", "0.25")
    run(discs / "raw", discs / "out", *flags)
    record = read_record(discs / "out")
    planned = dict.fromkeys(record["splits"], "val")
    for folder in ("train", "val", "test"):
        shutil.rmtree(discs / "out" / folder)
    (discs / "out/dataset.json").write_text(json.dumps(record | {"splits": planned}))
    for visit in (1, 2):
        shutil.rmtree(discs / f"raw/OAS2_RAW_PART1/OAS2_0003_MR{visit}")  # away for a while, and not forgotten
    run(discs / "raw", discs / "out", *flags)
    assert read_record(discs / "out")["splits"] == planned
    for folder in discs.glob("out/*/normal"):
        shutil.rmtree(folder)
    run(discs / "raw", discs / "out", *flags, "--seed", "1")
    assert read_record(discs / "out")["splits"] != planned


def test_a_split_cannot_lead_out_of_the_store(discs):
    run(discs / "raw", discs / "in/out", "--label", "normal")
    record = read_record(discs / "in/out")
    for splits in (dict.fromkeys(record["splits"], "../outside"), ["train"], None):
        (discs / "in/out/dataset.json").write_text(json.dumps(record | {"splits": splits}))
        with pytest.raises(DataError, match=r"dataset\.json: cannot be read .*; delete it"):
            run(discs / "raw", discs / "in/out", "--label", "normal")
    assert not (discs / "in/outside").exists()


def test_a_label_that_changed_is_refused(discs):
    assert run(discs / "raw", discs / "out", "--label", "normal", "--split", "0", "0", "1") == 0
    with pytest.raises(DataError, match="is test/abnormal now; delete this folder"):
        run(discs / "raw", discs / "out", "--clinical", str(discs / "table.csv"))


def test_values_of_the_table_are_mapped_by_flags_which_need_a_table(discs, capsys):
    (discs / "table.csv").write_text("ID,Group\n" + "".join(f"OAS2_000{n},{'AB'[n % 2]} x\n" for n in range(1, 5)))
    command = (discs / "raw", discs / "out", "--clinical", str(discs / "table.csv"), "--dry-run")
    with pytest.raises(DataError, match=r"A x \(2 lines\), B x \(2 lines\)"):
        run(*command)
    assert run(*command, "--normal-values", "A x", "--abnormal-values", "b_x") == 0
    assert "  test/abnormal: 4 scans of 2 subjects" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(discs / "raw", discs / "out", "--label", "normal", "--normal-values", "A")
    assert "need a table; give --clinical" in capsys.readouterr().err
