"""The script brings folders of scans into the store: what it says, what it leaves, and how it goes on."""

import gzip
import json
import shutil
import zlib

import nibabel as nib
import numpy as np
import pytest

from common.cli import DataError
from common.files import hold_folder
from preprocessing.preprocess_oasis import main as preprocess
from preprocessing.preprocess_oasis import parse
from preprocessing.store import check_same_settings, list_scans
from tests.conftest import SIZE, make_head

SMALL = ["--size", str(SIZE), "--workers", "1"]
HEAD = make_head((15, 18, 16), (11.0, 11.0, 11.0))


def run(raw, out, *flags):
    return preprocess(["--raw", str(raw), "--processed", str(out), *SMALL, *flags])


def read_places(processed):
    return {scan.name: f"{scan.split}/{scan.label}" for scan in list_scans(processed)}


def read_record(processed):
    return json.loads((processed / "dataset.json").read_text())


def save(path, values=None):
    """Save these values, or a head that no other file has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        nib.save(make_head((15, 18, 16), (11.0, 11.0, 11.0), seed=zlib.crc32(str(path).encode())), path)
    else:
        nib.save(nib.Nifti1Image(np.asarray(values), HEAD.affine), path)
    return path


def save_lesion(tree, name="c_lesion.nii"):
    lesion = np.zeros(HEAD.shape, np.uint8)
    lesion[6:9, 8:11, 7:10] = 1
    return save(tree / "raw/test/masks" / name, lesion)


@pytest.fixture
def tree(tmp_path):
    """Three scans in a split/label tree."""
    for place in ("train/normal/a_T1w.nii", "val/normal/b_T1w.nii", "test/abnormal/c_T1w.nii"):
        save(tmp_path / "raw" / place)
    return tmp_path


# What it says and leaves.


def test_a_dry_run_lists_every_scan_and_writes_nothing(tree, capsys):
    save(tree / "raw/test/masks/c_brain.nii", (HEAD.get_fdata() > 0).astype(np.uint8))
    save_lesion(tree)
    for name in ("a", "b"):
        split = {"a": "train", "b": "val"}[name]
        save(tree / f"raw/{split}/masks/{name}_brain.nii", (HEAD.get_fdata() > 0).astype(np.uint8))
    save(tree / "raw/train/normal/a_T1w_dseg.nii")
    save(tree / "raw/val/normal/twice.nii")
    save(tree / "raw/val/normal/twice.nii.gz")
    assert run(tree / "raw", tree / "out", "--dry-run") == 3
    out, err = capsys.readouterr()
    raw = tree / "raw"
    assert out.splitlines() == [
        f"split/label tree: 3 scans of 3 subjects in 3 sessions in {raw}",
        "  train/normal: 1 scans of 1 subjects, 1 with a brain mask",
        f"    a_T1w: subject a, session -, {raw / 'train/normal/a_T1w.nii'}",
        "  val/normal: 1 scans of 1 subjects, 1 with a brain mask",
        f"    b_T1w: subject b, session -, {raw / 'val/normal/b_T1w.nii'}",
        "  test/abnormal: 1 scans of 1 subjects, 1 with a brain mask",
        f"    c_T1w: subject c, session -, {raw / 'test/abnormal/c_T1w.nii'}",
        "  left out: 1 files",
        f"    {raw / 'train/normal/a_T1w_dseg.nii'}: a label map, not a scan",
    ]
    assert [line.split(":")[0] for line in err.splitlines()] == [
        f"would skip {raw / 'val/normal' / name}" for name in ("twice.nii", "twice.nii.gz")
    ]
    assert not (tree / "out").exists()


def test_the_first_lines_say_who_is_who_and_a_pattern_says_it_otherwise(tmp_path, capsys):
    for name in ("p1_1", "p1_2", "P02_visit1", "p2_visit2"):
        save(tmp_path / f"raw/{name}_T1w.nii")
    assert run(tmp_path / "raw", tmp_path / "out", "--label", "normal", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert out.startswith("a folder of volumes: 4 scans of 2 subjects in 4 sessions in ")
    assert "    P02_visit1_T1w: subject P02, session visit1, " in out
    assert "    p2_visit2_T1w: subject P02, session visit2, " in out
    assert "2 names can be read in two ways; taken: p1_1_T1w.nii is of p1 rather than p1_1" in err
    pattern = ["--subject-pattern", r"(p\d(?:_\d)?)_", "--label", "normal", "--dry-run"]
    assert run(tmp_path / "raw", tmp_path / "out", *pattern) == 3
    out, err = capsys.readouterr()
    assert "3 scans of 3 subjects in 3 sessions" in out
    assert [line.split(":")[0] for line in err.splitlines()] == [f"would skip {tmp_path}/raw/P02_visit1_T1w.nii"]


def test_a_run_leaves_slices_a_record_and_a_contact_sheet(tree, capsys):
    assert run(tree / "raw", tree / "out") == 0
    assert f"3 done, 0 unchanged, 0 skipped; slices in {tree / 'out'}" in capsys.readouterr().out
    assert read_places(tree / "out") == {"a_T1w": "train/normal", "b_T1w": "val/normal", "c_T1w": "test/abnormal"}
    record = read_record(tree / "out")
    assert record["layout"] == "split/label tree"
    assert record["format"] == 3
    assert record["scans"] == {"test/abnormal": 1, "train/normal": 1, "val/normal": 1}
    assert record["splits"] == {"a": "train", "b": "val", "c": "test"}
    assert (record["subjects"], record["skipped"], record["left_out"]) == (3, [], [])
    assert (record["flags"]["keep"], record["flags"]["size"]) == (0.7, SIZE)
    assert record["versions"]["numpy"] == np.__version__
    assert (tree / "out/qc.png").stat().st_size > 10_000


def test_the_second_run_does_nothing_and_a_changed_scan_is_done_again(tree, capsys):
    run(tree / "raw", tree / "out")
    before = {path: path.stat().st_mtime_ns for path in (tree / "out").rglob("*.*") if path.suffix in (".npy", ".png")}
    assert run(tree / "raw", tree / "out") == 0
    assert "0 done, 3 unchanged, 0 skipped" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    save(tree / "raw/train/normal/a_T1w.nii", HEAD.get_fdata() * 2)
    assert run(tree / "raw", tree / "out") == 0
    assert "1 done, 2 unchanged" in capsys.readouterr().out
    (tree / "out/qc.png").unlink()  # a run that was cut off before it drew
    assert run(tree / "raw", tree / "out") == 0
    assert (tree / "out/qc.png").exists()


def test_bad_scans_are_named_and_the_others_are_done(tree, capsys):
    folder = tree / "raw/train/normal"
    (folder / "empty_T1w.nii.gz").write_bytes(b"")
    save(folder / "flat_T1w.nii", np.full(HEAD.shape, 7, np.int16))
    for name in ("twice.nii", "twice.nii.gz"):
        save(folder / name)
    assert run(tree / "raw", tree / "out") == 3
    out, err = capsys.readouterr()
    assert "3 done, 0 unchanged, 4 skipped" in out
    lines = [line for line in err.splitlines() if line.startswith("skipped")]
    names = ("twice.nii", "twice.nii.gz", "empty_T1w.nii.gz", "flat_T1w.nii")
    assert [line.split(":")[0] for line in lines] == [f"skipped {folder / name}" for name in names]
    assert all(";" in line for line in lines), "the cure comes after the semicolon"
    assert [entry["file"] for entry in read_record(tree / "out")["skipped"]] == [str(folder / name) for name in names]
    shutil.rmtree(tree / "raw/val")
    shutil.rmtree(tree / "raw/test")
    (folder / "a_T1w.nii").unlink()
    with pytest.raises(DataError, match="not one of its 4 scans could be used"):
        run(tree / "raw", tree / "out2")


def test_quiet_and_json_print_nothing_else(tree, capsys):
    save_lesion(tree)
    assert run(tree / "raw", tree / "out", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert run(tree / "raw", tree / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out) == read_record(tree / "out")


def test_two_workers_make_what_one_makes(raw, processed, tmp_path, capfd):
    command = [
        "--raw",
        str(raw),
        "--processed",
        str(tmp_path / "two"),
        "--size",
        str(SIZE),
        "--workers",
        "2",
        "--quiet",
    ]
    assert preprocess(command) == 0
    assert capfd.readouterr() == ("", "")
    for file in processed.rglob("*.npy"):
        assert (tmp_path / "two" / file.relative_to(processed)).read_bytes() == file.read_bytes()


def test_every_slice_is_float16_in_0_to_1_and_the_brain_above_0(processed):
    scans = list(list_scans(processed))
    assert len(scans) == 9
    for scan in scans:
        stack = scan.read_stack()
        assert (stack.dtype, stack.shape[1:]) == (np.float16, (SIZE, SIZE))
        assert stack.min() == 0
        assert 0.9 < stack.max() <= 1
        assert stack[stack > 0].min() >= np.float16(1e-3)
        assert np.median(stack[stack > 0]) == pytest.approx(0.62, abs=0.06)
        assert scan.record["axes"] == "".join(nib.aff2axcodes(nib.load(scan.record["source"]).affine))
        assert len(list(scan.folder.glob("slice_*.npy"))) == len(scan.indices)


def test_its_record_can_be_given_back_to_it(processed, capsys):
    before = {path: path.stat().st_mtime_ns for path in processed.rglob("slice_*.npy")}
    assert preprocess(["--config", str(processed / "dataset.json"), "--workers", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scans"]["train/normal"] == 3
    assert before == {path: path.stat().st_mtime_ns for path in before}


# Splits that stay.


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


def test_a_run_that_is_killed_leaves_its_splits_and_the_next_clears_up(tree, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("preprocessing.preprocess_oasis.preprocess_scan", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tree / "raw", tree / "out")
    assert read_record(tree / "out")["splits"] == {"a": "train", "b": "val", "c": "test"}
    assert "scans" not in read_record(tree / "out")
    (tree / "out/train/normal/.a_T1w.77.partial").mkdir(parents=True)
    assert run(tree / "raw", tree / "out") == 0
    assert not list((tree / "out").rglob("*.partial"))


def test_a_split_cannot_lead_out_of_the_store(discs):
    run(discs / "raw", discs / "in/out", "--label", "normal")
    record = read_record(discs / "in/out")
    for splits in (dict.fromkeys(record["splits"], "../outside"), ["train"], None):
        (discs / "in/out/dataset.json").write_text(json.dumps(record | {"splits": splits}))
        with pytest.raises(DataError, match=r"dataset\.json: cannot be read .*; delete it"):
            run(discs / "raw", discs / "in/out", "--label", "normal")
    assert not (discs / "in/outside").exists()


# Refusals.


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


def test_a_subject_in_the_store_on_the_other_side_is_refused(tree):
    run(tree / "raw", tree / "out")
    (tree / "raw/train/normal/a_T1w.nii").rename(tree / "raw/val/normal/a_T1w.nii")
    with pytest.raises(DataError, match="one split"):
        run(tree / "raw", tree / "out")


def test_one_name_under_both_labels_is_two_scans(tree, capsys):
    save(tree / "raw/test/normal/c_T1w.nii")
    assert run(tree / "raw", tree / "out") == 0
    assert run(tree / "raw", tree / "out") == 0
    assert "0 done, 4 unchanged" in capsys.readouterr().out
    (tree / "raw/test/normal/c_T1w.nii").unlink()
    with pytest.raises(DataError, match="normal/c_T1w: is test/abnormal now"):
        run(tree / "raw", tree / "out")


def test_heads_with_and_without_skull_are_refused_and_do_not_mix(tree):
    large = nib.Nifti1Image(HEAD.get_fdata(), HEAD.affine @ np.diag([1.4, 1.4, 1.4, 1]))  # 3.4 l: no brain
    nib.save(large, tree / "raw/train/normal/skull_T1w.nii")
    with pytest.raises(DataError, match=r"3 scans lack the skull and 1 do not.*skull_T1w$"):
        run(tree / "raw", tree / "out")
    with pytest.raises(DataError, match="skull_off"):
        check_same_settings(list(list_scans(tree / "out")))


def test_abnormal_scans_without_a_lesion_mask_and_masks_without_a_scan_are_named(tree, capsys):
    assert run(tree / "raw", tree / "out", "--quiet") == 0
    err = capsys.readouterr().err
    assert "1 abnormal scans have no lesion mask: c_T1w; " in err
    save_lesion(tree)
    for name in ("d_lesion.nii", "a_lesion.nii", "odd.nii"):
        save_lesion(tree, name)
    for dry in ([], ["--dry-run"]):
        assert run(tree / "raw", tree / "out", "--quiet", *dry) == 0
        err = capsys.readouterr().err
        assert "no lesion mask" not in err
        assert "3 masks belong to no scan, or to a normal one: a_lesion.nii, d_lesion.nii, odd.nii" in err


def test_what_was_not_plain_in_a_scan_is_said_with_its_name_each_time(tree, capsys):
    values = HEAD.get_fdata().copy()
    values[1, 1, 1] = 500  # apart from the brain
    for number, place in enumerate(("train/normal/a_T1w.nii", "val/normal/b_T1w.nii")):
        save(tree / "raw" / place, np.where(values > 0, values + 9 * number * (values % 7), 0))
    soft = np.zeros(HEAD.shape, np.float32)
    soft[6:9, 8:11, 7:10] = 100
    soft[9, 8:11, 7:10] = np.linspace(0.5, 60, 9).reshape(3, 3)
    save(tree / "raw/test/masks/c_lesion.nii", soft)
    for _ in range(2):
        assert run(tree / "raw", tree / "out", "--quiet") == 0
        err = capsys.readouterr().err.splitlines()
        assert "2 scans: pieces separate from the brain were dropped: a_T1w (1.33 ml), b_T1w (1.33 ml)" in err
        assert "1 scans: its lesion mask: soft, and cut at one half: c_T1w (0 to 100, cut at 50)" in err


def test_lesion_labels_are_picked(tree, capsys):
    labels = np.zeros(HEAD.shape, np.int16)
    labels[6:9, 8:11, 7:9], labels[6:9, 8:11, 9], labels[6:9, 8:11, 10] = 1, 2, 4
    save(tree / "raw/test/masks/c_lesion.nii", labels)

    def count(*flags):
        assert run(tree / "raw", tree / "out", "--keep", "1", *flags) == 0
        return sum(next(list_scans(tree / "out/test")).record["lesion_voxels"])

    assert count() == 36
    assert "its lesion mask: all its labels are taken: c_T1w (1, 2, 4)" in capsys.readouterr().err
    assert count("--lesion-labels", "1", "4") == 27
    assert "lesion mask" not in capsys.readouterr().err
    assert count("--lesion-labels", "2") == 9
    assert run(tree / "raw", tree / "out", "--lesion-labels", "7") == 3
    assert "c_lesion.nii: holds none of the labels 7; it has 1, 2, 4" in capsys.readouterr().err


def test_the_second_process_in_a_store_is_refused(tree):
    with hold_folder(tree / "out", "--processed"):
        with pytest.raises(DataError, match="another process is using it"):
            run(tree / "raw", tree / "out")
        assert run(tree / "raw", tree / "out", "--dry-run") == 0


def test_a_folder_that_cannot_be_written_is_one_line(tree):
    (tree / "file").write_text("")
    for out in (tree / "file", tree / "file/out"):
        with pytest.raises(DataError, match=r"cannot be written.*--processed"):
            run(tree / "raw", out)


# Flags.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--keep", "0"], "--keep"),
        (["--keep", "1.01"], "--keep"),
        (["--size", "24"], "--size"),
        (["--size", "0"], "--size"),
        (["--fov-mm", "0"], "--fov-mm"),
        (["--split", "0.5", "0.5", "0.1"], "--split"),
        (["--split", "1.5", "-0.5", "0"], "--split"),
        (["--workers", "0"], "--workers"),
        (["--volume", "-1"], "--volume"),
        (["--json", "--dry-run"], "--json"),
        (["--axes", "RAL"], "--axes"),
        (["--axes", "RASA"], "--axes"),
        (["--subject-pattern", "p[0-9]+"], "--subject-pattern"),
        (["--subject-pattern", "(p"], "--subject-pattern"),
        (["--lab", "normal"], "--lab"),
    ],
)
def test_wrong_usage_ends_with_2(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(flags)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_defaults_and_limits_of_flags():
    args = parse([])
    assert (args.keep, args.size, args.fov_mm, args.seed, args.modality) == (0.7, 128, None, 0, "t1")
    assert args.split == [0.8, 0.1, 0.1]
    args = parse(["--keep", "1", "--size", "16", "--fov-mm", "100", "--workers", "1", "--volume", "0", "--axes", "asl"])
    assert (args.keep, args.size, args.axes) == (1, 16, "ASL")


def test_flags_of_the_cut_reach_the_slices(tree):
    assert run(tree / "raw", tree / "out", "--keep", "0.5", "--fov-mm", "160", "--axes", "LPI", "--volume", "0") == 0
    for scan in list_scans(tree / "out"):
        record = scan.record
        assert (record["keep"], record["pixel_mm"], record["volume"]) == (0.5, 160 / SIZE, 0)
        assert record["axes_rule"] == ["LPI", None]


def dry_run(raw, capsys, *flags):
    """The lines of a dry run in which nothing needs to be read."""
    assert run(raw, raw / "none", "--dry-run", *flags) == 0
    return capsys.readouterr().out.splitlines()


def test_flags_of_the_plan_reach_the_plan(tmp_path, capsys):
    for subject in range(10):
        for contrast in ("T1", "T2"):
            (tmp_path / f"IXI00{subject}-Guys-0828-{contrast}.nii").touch()
    (tmp_path / "table.csv").write_text("ID,CDR\n" + "".join(f"IXI00{i},{'' if i else 0}\n" for i in range(10)))
    table = ("--clinical", str(tmp_path / "table.csv"))
    first = "{}: {} scans of {} subjects in {} sessions in " + str(tmp_path)
    plain = dry_run(tmp_path, capsys, "--label", "normal")
    assert plain[:2] == [first.format("IXI", 10, 10, 10), "  train/normal: 8 scans of 8 subjects, 0 with a brain mask"]
    assert dry_run(tmp_path, capsys, "--label", "normal", "--seed", "1") != plain
    assert "T2.nii" in dry_run(tmp_path, capsys, "--label", "normal", "--modality", "t2")[2]
    folder = dry_run(tmp_path, capsys, "--label", "normal", "--layout", "folder")
    assert folder[0] == first.format("a folder of volumes", 10, 10, 10), "T1 is asked for"
    assert dry_run(tmp_path, capsys, *table)[0] == first.format("IXI", 1, 1, 1)
    assert dry_run(tmp_path, capsys, *table, "--blank-cdr", "normal")[0] == first.format("IXI", 10, 10, 10)


# Scans that are gone or twice there.


def test_a_scan_that_was_withdrawn_is_said_and_out_of_use(tree, capsys):
    save_lesion(tree)
    gone = save(tree / "raw/train/normal/gone_T1w.nii")
    assert run(tree / "raw", tree / "out") == 0
    gone.unlink()
    capsys.readouterr()
    assert run(tree / "raw", tree / "out", "--dry-run") == 0
    assert (
        f"would withdraw {tree}/out/train/normal/gone_T1w: {gone} is no longer among the scans"
        in capsys.readouterr().err
    )
    assert "gone_T1w" in read_places(tree / "out")
    assert run(tree / "raw", tree / "out") == 0
    place = tree / "out/.withdrawn/train/normal/gone_T1w"
    assert capsys.readouterr().err.splitlines() == [
        f"{gone}: is no longer among the scans; its slices were moved to {place}"
    ]
    assert read_places(tree / "out") == {"a_T1w": "train/normal", "b_T1w": "val/normal", "c_T1w": "test/abnormal"}
    assert read_record(tree / "out")["scans"]["train/normal"] == 1
    assert (place / "scan.json").exists()
    assert run(tree / "raw", tree / "out") == 0
    assert capsys.readouterr().err == ""


def test_scans_of_another_folder_stay_in_use(tree):
    save(tree / "more/train/normal/d_T1w.nii")
    run(tree / "raw", tree / "out")
    run(tree / "more", tree / "out")
    assert set(read_places(tree / "out")) == {"a_T1w", "b_T1w", "c_T1w", "d_T1w"}


def test_a_copy_on_the_other_side_is_refused(tree):
    content = (tree / "raw/train/normal/a_T1w.nii").read_bytes()
    copy = tree / "raw/test/normal/other_T1w.nii.gz"
    copy.parent.mkdir()
    copy.write_bytes(gzip.compress(content))
    for _ in range(2):
        with pytest.raises(DataError, match="holds the same scan as") as error:
            run(tree / "raw", tree / "out")
        assert str(copy) in str(error.value)
        assert "raw/train/normal/a_T1w.nii" in str(error.value)
    copy.unlink()
    assert run(tree / "raw", tree / "out") == 0


def test_a_folder_that_is_not_the_stores_loses_nothing(tree):
    """The store in a folder with other things in it, a link among them that leads outside."""
    out = tree / "home"
    for name in (".venv.old", ".cache.partial", "train/.git.old", "masks"):
        (out / name).mkdir(parents=True)
        (out / name / "kept").touch()
    (out / "test").symlink_to(tree / "raw")
    assert run(tree / "raw", out) == 3
    assert len(list(out.rglob("kept"))) == 4
    assert not (tree / "raw/abnormal").exists()
    assert set(read_places(out)) == {"a_T1w", "b_T1w"}


def test_a_bad_record_takes_nothing_else_out(tree):
    run(tree / "raw", tree / "out")
    record = tree / "out/train/normal/a_T1w/scan.json"
    whole = record.read_bytes()
    record.write_text('{"shape": [5000, 5000, 5000]}')
    assert run(tree / "raw", tree / "out") == 0
    assert record.read_bytes() == whole
