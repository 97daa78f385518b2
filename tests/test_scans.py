"""The scans in a folder are found with their masks, and in a tree with their split and label."""

import os
import socket
from pathlib import Path

import pytest

from common.cli import DataError
from preprocessing import scans
from preprocessing.scans import TREE, explain_no_scans, list_volumes, name_scan, search, walk


def touch(*paths):
    """Empty files: to find scans none is opened."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_tree_gives_split_and_label_and_masks_beside_it(tmp_path):
    touch(
        tmp_path / "train/normal/a_T1w.nii.gz",
        tmp_path / "val/normal/b_T1w.nii",
        tmp_path / "test/normal/c_T1w.mgz",
        tmp_path / "test/abnormal/d_T1w.nii.gz",
        tmp_path / "test/abnormal/d2.img",
        tmp_path / "train/masks/a_brain.nii.gz",
        tmp_path / "test/masks/c_T1w_brain.nii.gz",
        tmp_path / "test/masks/c_lesion.nii.gz",
        tmp_path / "test/masks/d_lesion.nii",
        tmp_path / "test/masks/gone_lesion.nii",
        tmp_path / "test/masks/d_T1w_brain.nii.gz",
        tmp_path / "test/masks/d2_brain.nii",
        tmp_path / "elsewhere/e_T1w.nii",
    )
    found = search(tmp_path)
    assert found.layout == TREE
    rows = {
        scan.name: (scan.split, scan.label, *(mask and mask.name for mask in (scan.brain_mask, scan.lesion_mask)))
        for scan in found.scans
    }
    assert rows == {
        "a_T1w": ("train", "normal", "a_brain.nii.gz", None),
        "b_T1w": ("val", "normal", None, None),
        "c_T1w": ("test", "normal", "c_T1w_brain.nii.gz", None),  # a normal scan has no lesion
        "d_T1w": ("test", "abnormal", "d_T1w_brain.nii.gz", "d_lesion.nii"),
        "d2": ("test", "abnormal", "d2_brain.nii", None),
    }
    assert found.scans[0].path.relative_to(tmp_path).as_posix() == "train/normal/a_T1w.nii.gz"
    assert {scan.subject for scan in found.scans} == {"a", "b", "c", "d", "d2"}
    assert found.refused == []
    assert found.left_out == [
        (str(tmp_path / "test/masks/c_lesion.nii.gz"), "a lesion mask, but its scan is normal"),
        (str(tmp_path / "test/masks/gone_lesion.nii"), "a mask without a scan"),
    ]


def test_masks_in_a_tree_go_by_the_names_that_tools_give_them(tmp_path):
    brains = ("_brain_mask", "_T1w_brain", "_bet_mask", "_brainmask")
    lesions = ("_lesion_mask", "_T1w_lesion", "_label-lesion_roi", "_seg")
    for number, (brain, lesion) in enumerate(zip(brains, lesions, strict=True)):
        scan = tmp_path / f"test/abnormal/p{number}_T1w.nii"
        touch(scan, *(tmp_path / f"test/masks/p{number}{end}.nii" for end in (brain, lesion)))
    found = search(tmp_path)
    assert [(scan.brain_mask.stem, scan.lesion_mask.stem) for scan in found.scans] == [
        (f"p{number}{brain}", f"p{number}{lesion}")
        for number, (brain, lesion) in enumerate(zip(brains, lesions, strict=True))
    ]
    assert found.left_out == []


def test_masks_beside_a_scan_count_where_the_tree_has_none(tmp_path):
    names = ("a_T1w.nii", "a_mask.nii", "a_seg.nii", "b_T1w.nii", "b_mask.nii", "b_seg.nii")
    touch(*(tmp_path / "test/abnormal" / name for name in names))
    touch(tmp_path / "test/masks/b_brain.nii", tmp_path / "test/masks/b_lesion.nii")
    masks = {scan.name: (scan.brain_mask.name, scan.lesion_mask.name) for scan in search(tmp_path).scans}
    assert masks == {"a_T1w": ("a_mask.nii", "a_seg.nii"), "b_T1w": ("b_brain.nii", "b_lesion.nii")}


def test_the_layout_gives_axes(tmp_path):
    touch(tmp_path / "OASIS_OAS1_0001_MR1/norm.nii.gz")
    (scan,) = search(tmp_path).scans
    assert (scan.axes, scan.distrusted) == ("LIA", "RAS")


def test_masks_are_looked_for_in_their_own_split(tmp_path):
    touch(tmp_path / "train/normal/a_T1w.nii", tmp_path / "test/masks/a_brain.nii")
    assert search(tmp_path).scans[0].brain_mask is None


def test_a_data_set_may_lie_in_the_tree(tmp_path):
    touch(tmp_path / "train/normal/IXI002-Guys-0828-T1.nii.gz", tmp_path / "test/abnormal/x_T1w.nii")
    touch(tmp_path / "test/masks/x_lesion.nii")
    found = search(tmp_path)
    assert found.layout == "split/label tree of ixi"
    assert [(scan.split, scan.label, scan.subject) for scan in found.scans] == [
        ("train", "normal", "IXI002"),
        ("test", "abnormal", "x"),
    ]
    assert search(tmp_path, "folder").layout == "folder", "a layout asked for goes before the tree"


def test_without_a_tree_split_and_label_are_left_open(tmp_path):
    touch(tmp_path / "IXI002-Guys-0828-T1.nii.gz", tmp_path / "IXI002-Guys-0828-T2.nii.gz")
    found = search(tmp_path)
    assert found.layout == "ixi"
    assert [(scan.split, scan.label) for scan in found.scans] == [("", "")]
    assert found.left_out == [(str(tmp_path / "IXI002-Guys-0828-T2.nii.gz"), "no scan of the layout ixi")]
    with pytest.raises(DataError, match="no scans"):
        search(tmp_path, TREE)


def test_a_modality_that_the_layout_does_not_have_is_refused(tmp_path):
    touch(tmp_path / "IXI002-Guys-0828-T1.nii.gz", tmp_path / "IXI002-Guys-0828-T2.nii.gz")
    assert [scan.name for scan in search(tmp_path, "ixi", "t2").scans] == ["IXI002-Guys-0828-T2"]
    with pytest.raises(DataError, match="the layout ixi has no flair; it has t1, t2"):
        search(tmp_path, "ixi", "flair")


def test_scans_that_would_share_a_name_are_refused_and_name_each_other(tmp_path):
    touch(
        *(tmp_path / "train/normal" / folder / "x_T1w.nii" for folder in ("a", "b")), tmp_path / "val/normal/x_T1w.nii"
    )
    found = search(tmp_path)
    assert [(scan.split, scan.name) for scan in found.scans] == [("val", "x_T1w")], "another split is another folder"
    a, b = (str(tmp_path / "train/normal" / folder / "x_T1w.nii") for folder in ("a", "b"))
    assert found.refused == [
        (a, f"{a}: {b} would have the same name, x_T1w; rename one of them"),
        (b, f"{b}: {a} would have the same name, x_T1w; rename one of them"),
    ]


def test_image_files_are_listed_once_whatever_leads_to_them(tmp_path):
    touch(tmp_path / "real/b.nii", tmp_path / "real/a.NII.GZ", tmp_path / "real/.hidden.nii", tmp_path / "real/c.txt")
    touch(
        tmp_path / "real/.cache/d.nii", tmp_path / "real/store/e.nii", tmp_path / "real/f.hdr", tmp_path / "real/g.mgh"
    )
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/linked").symlink_to(tmp_path / "real")
    (tmp_path / "real/up").symlink_to(tmp_path / "raw")
    names = [path.name for path in list_volumes(tmp_path / "raw", besides=tmp_path / "real/store")]
    assert names == ["a.NII.GZ", "b.nii", "g.mgh"]
    assert list_volumes(tmp_path / "none") == []


def test_the_slice_store_inside_the_folder_is_left_alone(tmp_path):
    touch(tmp_path / "a.nii", tmp_path / "processed/train/normal/b.nii")
    assert [scan.name for scan in search(tmp_path, "folder", besides=tmp_path / "processed").scans] == ["a"]


def test_the_scans_to_try_are_nobodys_data(tmp_path, monkeypatch):
    assert len(list_volumes(Path(scans.EXAMPLE))) == 3, "two scans and a mask"
    monkeypatch.setattr(scans, "EXAMPLE", os.path.realpath(tmp_path / "Dataset/example"))
    touch(tmp_path / "Dataset/a_T1w.nii.gz", tmp_path / "Dataset/example/b_T1w.nii.gz")
    assert [path.name for path in list_volumes(tmp_path / "Dataset")] == ["a_T1w.nii.gz"]
    assert [path.name for path in list_volumes(tmp_path / "Dataset/example")] == ["b_T1w.nii.gz"]


def test_no_scans_is_one_line_with_the_cure(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder; give --raw"):
        search(tmp_path / "nowhere")
    assert search(tmp_path).scans == []
    assert f"put healthy scans into {tmp_path / 'train/normal'}" in explain_no_scans(tmp_path)


def test_a_scan_is_called_as_its_file(tmp_path):
    assert name_scan(tmp_path / "ID_T1w.nii.gz") == "ID_T1w"
    assert name_scan(tmp_path / "a.b.IMG") == "a.b"


def test_the_demo_cohort_is_found(raw):
    scans = search(raw).scans
    assert [(scan.split, scan.label) for scan in scans].count(("train", "normal")) == 3
    assert {scan.name for scan in scans if scan.lesion_mask} == {s.name for s in scans if s.label == "abnormal"}
    for scan in scans:
        assert scan.brain_mask.name.startswith(scan.name.removesuffix("_T1w"))


def test_fifos_devices_and_sockets_are_passed_over_and_said(tmp_path, monkeypatch):
    folder = tmp_path / "train/normal"
    touch(folder / "a.nii", tmp_path / "elsewhere.nii")
    os.mkfifo(folder / "fifo.nii")
    (folder / "device.nii.gz").symlink_to("/dev/zero")
    (folder / "link.nii").symlink_to(tmp_path / "elsewhere.nii")
    (folder / "lost.nii").symlink_to(tmp_path / "nowhere.nii")
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.img")
        found = search(tmp_path)
    assert [scan.name for scan in found.scans] == ["a", "link", "lost"], "a lost file is missed when it is read"
    special = [str(folder / name) for name in ("device.nii.gz", "fifo.nii", "socket.img")]
    assert found.left_out == [(path, "not a regular file") for path in special]


def test_a_folder_that_cannot_be_read_is_named_and_counts(tmp_path, monkeypatch):
    touch(tmp_path / "train/normal/a.nii", tmp_path / "train/normal/closed/b.nii", tmp_path / "val/normal/c.nii")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    closed = tmp_path / "train/normal/closed"
    why = f"{closed}: cannot be read (Permission denied), nor what is in it; allow access to it"
    found = search(tmp_path)
    assert [scan.name for scan in found.scans] == ["a", "c"]
    assert found.refused == [(str(closed), why)]
    assert walk(tmp_path / "train")[2] == [(closed, why)]


def test_names_that_are_no_utf_8_are_spelled(tmp_path):
    folder = os.fsencode(tmp_path / "val/normal")
    os.makedirs(folder)
    for name in (b"M\xfcller_T1w.nii", "Müller2_T1w.nii".encode()):
        with open(os.path.join(folder, name), "w"):
            pass
    scans = search(tmp_path).scans
    assert [(scan.name, scan.subject) for scan in scans] == [("Müller2_T1w", "Müller2"), ("M%FCller_T1w", "M%FCller")]
    assert all(scan.path.exists() for scan in scans)
    assert name_scan(scans[1].path) == "M%FCller_T1w"
