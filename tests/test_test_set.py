"""The folder of an evaluation: what makes it another one, and that nothing of an older one is left in it."""

import json
import os

import pytest

from common.cli import DataError
from evaluation.predictor import DETECTORS
from evaluation.test_set import clear_folder, hash_records, log_figures, read_kinds
from evaluation.words import explain_no_flag
from preprocessing.store import list_scans

OWN = [
    "error_maps/normal/a_T1w_slice_087.png", "montages/abnormal/b.png", "maps/normal/a_anomaly.nii.gz",
    "maps/normal/a_mask.nii.gz", "bids/dataset_description.json", "bids/sub-1/anat/sub-1_desc-anomaly_statmap.nii.gz",
    "bids/sub-1/ses-2/anat/sub-1_ses-2_run-1_desc-anomaly_mask.json", "dice.png", "curves_scans.png", "report.html",
]  # fmt: skip
OTHERS = [
    "mine.txt", "maps/normal/notes.txt", "maps/brain.nii.gz", "bids/participants.tsv", "montages/b.png", "photo.png",
    "other/maps/normal/a_anomaly.nii.gz",
]  # fmt: skip


def write_files(out, names):
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"")


def list_files(out):
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir())


@pytest.mark.parametrize("finished", [True, False])
def test_another_evaluation_leaves_nothing_of_the_old_one(finished, tmp_path):
    """Nor does one that was interrupted; what is not of an evaluation stays."""
    old = {"settings": {"panels": "1"}, "counts": {}}
    write_files(tmp_path, OWN + OTHERS)
    assert clear_folder(tmp_path, old["settings"]) is None
    assert list_files(tmp_path) == sorted([*OWN, *OTHERS, ".evaluation.json"])
    if finished:
        (tmp_path / "metrics.json").write_text(json.dumps(old))
        (tmp_path / ".evaluation.json").unlink()
        assert clear_folder(tmp_path, old["settings"]) == old
    else:
        assert clear_folder(tmp_path, old["settings"]) is None, "it goes on"
    assert set(OWN) < set(list_files(tmp_path))
    assert clear_folder(tmp_path, {"panels": "2"}) is None
    assert list_files(tmp_path) == sorted([*OTHERS, ".evaluation.json"])
    assert json.loads((tmp_path / ".evaluation.json").read_text()) == {"settings": {"panels": "2"}}
    assert not (tmp_path / "bids/sub-1").exists()
    assert (tmp_path / "montages/abnormal").is_dir()


def test_no_link_leads_what_is_deleted_or_written_outside(tmp_path):
    out, outside = tmp_path / "out", tmp_path / "outside"
    write_files(outside, ["normal/a_anomaly.nii.gz", "a_anomaly.nii.gz"])
    out.mkdir()
    (out / "maps").symlink_to(outside)
    (out / "metrics.json").write_text(json.dumps({"settings": {"panels": "1"}}))
    clear_folder(out, {"panels": "2"})
    assert list_files(outside) == ["a_anomaly.nii.gz", "normal/a_anomaly.nii.gz"]
    (out / "montages/normal").rmdir()
    (out / "montages/normal").symlink_to(outside)
    with pytest.raises(DataError, match=r"montages/normal: a link leads out of"):
        clear_folder(out, {"panels": "2"})


@pytest.mark.parametrize("content", ["{", "[]", '{"accuracy": 1}', "\0"])
def test_a_record_of_something_else_is_not_written_over(content, tmp_path):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(DataError, match=r"metrics\.json: .*; give another --out, or delete it"):
        clear_folder(tmp_path, {"panels": "2"})
    assert (tmp_path / "metrics.json").read_text() == content


def test_data_are_told_apart_by_their_records(processed):
    scans = list(list_scans(processed / "test"))
    assert hash_records(scans) == hash_records(list(list_scans(processed / "test")))
    assert len({hash_records(scans), hash_records(scans[:-1]), hash_records(scans[::-1])}) == 3


def test_kinds_of_lesions_are_read(tmp_path):
    path = tmp_path / "kinds.csv"
    path.write_text("\ufeffscan,volume,kind\na_T1w,3,infarct\nb,4,\n", encoding="utf-8")
    assert read_kinds(path) == {"a_T1w": "infarct", "b": ""}
    path.write_text("scan,what\na,b\n")
    with pytest.raises(DataError, match=r"kinds.csv: has no column 'kind'; name its columns scan and kind"):
        read_kinds(path)
    (tmp_path / "bad.csv").write_bytes(b"scan,kind\n\xff\xfe,\0\n")
    (tmp_path / "huge.csv").write_bytes(b"scan,kind\n")
    os.truncate(tmp_path / "huge.csv", (1 << 26) + 1)
    os.mkfifo(tmp_path / "fifo.csv")
    for missing in (tmp_path / "none.csv", tmp_path, *(tmp_path / f"{name}.csv" for name in ("bad", "huge", "fifo"))):
        with pytest.raises(DataError, match="cannot be read"):
            read_kinds(missing)


def test_why_no_scan_can_be_flagged():
    assert explain_no_flag(0.05, 19) is None
    words = explain_no_flag(0.05, 18)
    assert "no scan can be flagged at 0.05: that needs 19 normal validation scans, the model has 18" in words
    assert "0.053 or more" in words, "1 / 19, rounded up"
    assert explain_no_flag(0.053, 18) is None


@pytest.mark.parametrize("unlike", [0, 2])
def test_it_is_said_where_scans_do_not_fit_the_calibration(unlike, caplog):
    content = {"figures": {name: {} for name in DETECTORS}, "flagged": {}, "calibration": {"normal_scans": 39}}
    counts = {"normal": 2, "abnormal": 1, "unlike_calibration": unlike}
    log_figures(content | {"settings": {"false_positive_rate": 0.05}, "counts": counts})
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == bool(unlike)
    assert all("2 of 3 scans do not fit" in line and "training/calibrate.py" in line for line in warned)
