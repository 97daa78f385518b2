"""The script brings folders of scans into the store: what it says, what it leaves, and how it goes on."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from common.cli import DataError
from common.files import hold_folder
from preprocessing.preprocess_oasis import main as preprocess
from preprocessing.store import check_same_settings, list_scans
from preprocessing.worker import preprocess_scan
from tests.conftest import SIZE
from tests.trees import HEAD, make_tree, read_places, read_record, run, save, save_lesion


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path)


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
    assert record["format"] == 4
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
        assert np.median(stack[stack > 0]) == pytest.approx(0.55, abs=0.1)  # 0.62 in the interior; the rim is darker
        assert scan.record["axes"] == "".join(nib.aff2axcodes(nib.load(scan.record["source"]).affine))
        assert len(list(scan.folder.glob("slice_*.npy"))) == len(scan.indices)


def test_its_record_can_be_given_back_to_it(processed, capsys):
    before = {path: path.stat().st_mtime_ns for path in processed.rglob("slice_*.npy")}
    assert preprocess(["--config", str(processed / "dataset.json"), "--workers", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scans"]["train/normal"] == 3
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_run_that_is_killed_leaves_its_splits_and_the_next_clears_up(tree, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("preprocessing.dataset.preprocess_scan", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tree / "raw", tree / "out")
    assert read_record(tree / "out")["splits"] == {"a": "train", "b": "val", "c": "test"}
    assert "scans" not in read_record(tree / "out")
    (tree / "out/train/normal/.a_T1w.77.partial").mkdir(parents=True)

    def leave(scan, processed, settings):
        """A worker of the killed run leaves something only now."""
        (processed / "train/normal/.b_T1w.78.partial").mkdir(parents=True, exist_ok=True)
        return preprocess_scan(scan, processed, settings)

    monkeypatch.setattr("preprocessing.dataset.preprocess_scan", leave)
    assert run(tree / "raw", tree / "out") == 0
    assert not list((tree / "out").rglob("*.partial"))


# Refusals and warnings.


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
        run(tree / "raw", tree / "out", "--strip", "never")
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
