"""One scan from its file to the store: what is written, what makes it unchanged, and why it is skipped."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import preprocessing.worker as worker
from common.cli import DataError
from preprocessing.images import read_image
from preprocessing.scans import Scan
from preprocessing.store import read_scan
from preprocessing.worker import CutSettings, cut_scan, list_unscored, preprocess_scan
from tests.conftest import make_head, store

SETTINGS = CutSettings(keep=0.7, size=32)
HEAD = make_head((20, 24, 22), (8.0, 8.0, 8.0))


def save(values, path):
    nib.save(nib.Nifti1Image(np.asarray(values), HEAD.affine), path)
    return path


def make_scan(folder):
    """A scan with a brain mask and a lesion of 4 x 4 x 3 voxels."""
    lesion = np.zeros(HEAD.shape, np.uint8)
    lesion[8:12, 8:12, 10:13] = 1
    nib.save(HEAD, folder / "a_T1w.nii")
    brain = save((HEAD.get_fdata() > 0).astype(np.uint8), folder / "a_brain.nii")
    lesion = save(lesion, folder / "a_lesion.nii")
    return Scan(folder / "a_T1w.nii", "a_T1w", "test", "abnormal", "a", "s1", brain, lesion, age=70.0, sex="F")


@pytest.fixture
def scan(tmp_path):
    return make_scan(tmp_path)


def run(scan, settings=SETTINGS):
    """(state, why) of a scan brought into the store beside it."""
    return preprocess_scan(scan, scan.path.parent / "out", settings)


def read(scan):
    return read_scan(scan.path.parent / "out" / scan.split / scan.label / scan.name)


def test_a_scan_becomes_slices_a_lesion_and_a_record(scan):
    assert run(scan) == ("done", "")
    stored = read(scan)
    record = stored.record
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (scan.path, scan.brain_mask, scan.lesion_mask)
    }
    assert record["sources"] == hashes
    assert stored.hashes == (record["content"], hashes["a_T1w.nii"][:32])
    known = {"scan": "a_T1w", "source": str(scan.path), "subject": "a", "session": "s1", "age": 70.0, "sex": "F"}
    made_with = {"format": 4, "keep": 0.7, "size": 32, "fov_mm": None, "volume": None, "axes_rule": [None, None]}
    place = {"shape": [20, 24, 22], "axes": "RAS", "pixel_mm": 6.25, "spacing_mm": [8, 8, 8], "skull_off": True}
    wanted = known | made_with | place
    assert {key: record[key] for key in wanted} == wanted
    assert len(record["scale"]) == 3
    inside = [3 * (10 <= z < 13) for z in stored.indices]
    assert record["lesion_voxels"] == [16 * (10 <= z < 13) for z in stored.indices], "on the scan's own grid"
    brain = nib.load(scan.brain_mask).get_fdata() > 0
    assert record["unscored_share"] == pytest.approx(1 - brain[:, :, stored.indices].sum() / brain.sum())
    assert 0.05 < record["unscored_share"] < 0.3
    assert record["unscored_lesions_ml"] == []
    assert (stored.read_lesion().sum(axis=(1, 2)) > 0).tolist() == [count > 0 for count in inside]


def test_lesions_wholly_outside_the_kept_slices_are_listed():
    lesion = np.zeros((10, 10, 12), bool)
    lesion[1:3, 1:3, 0:2] = True  # below, 8 voxels
    lesion[1, 1, 3] = True  # a voxel away from it: the same lesion, and outside
    lesion[6, 6, 3:6] = True  # reaches in
    lesion[8, 1, 11] = True  # above
    assert sorted(list_unscored(lesion, (5, 6, 7, 8), 0.5)) == [0.5, 4.5]
    assert list_unscored(lesion, tuple(range(12)), 0.5) == ()


def test_a_brain_is_200_mm_wide_and_a_head_256_unless_said_otherwise(scan, tmp_path):
    """A scan whose background is not constant is a head, with a brain mask or without."""
    noise = HEAD.get_fdata() + np.random.default_rng(0).uniform(1, 5, HEAD.shape)
    head = replace(scan, path=save(np.repeat(noise, 2, 0), tmp_path / "h.nii"), name="h", brain_mask=None)
    head = replace(head, lesion_mask=None)
    for one, settings, pixel_mm, skull_off in (
        (scan, SETTINGS, 200 / 32, True),
        (replace(scan, brain_mask=None), SETTINGS, 200 / 32, True),
        (head, SETTINGS, 256 / 32, False),
        (scan, replace(SETTINGS, fov_mm=160.0), 160 / 32, True),
        (head, replace(SETTINGS, fov_mm=160.0), 160 / 32, False),
    ):
        assert run(one, settings)[0] == "done"
        record = read(one).record
        assert (record["pixel_mm"], record["skull_off"]) == (pixel_mm, skull_off)


@pytest.mark.parametrize(
    "change",
    [
        {"subject": "b"},
        {"session": "s2"},
        {"age": 71.0},
        {"sex": "M"},
        {"axes": "LAS"},
        {"distrusted": "LPI"},
        {"brain_mask": None},
        {"lesion_mask": None},
    ],
)
def test_what_is_known_of_a_scan_has_changed(change, scan):
    run(scan)
    assert run(scan) == ("unchanged", "")
    assert run(replace(scan, **change)) == ("done", "")
    assert run(replace(scan, **change)) == ("unchanged", "")


@pytest.mark.parametrize("change", [{"keep": 0.6}, {"size": 48}, {"fov_mm": 200.0}, {"volume": 0}])
def test_the_settings_have_changed(change, scan):
    run(scan)
    assert run(scan, replace(SETTINGS, **change)) == ("done", "")


@pytest.mark.parametrize("which", ["path", "brain_mask", "lesion_mask"])
def test_a_file_has_changed(which, scan):
    run(scan)
    path = getattr(scan, which)
    content = path.read_bytes()
    path.touch()
    assert run(scan) == ("unchanged", ""), "the content counts, not the time"
    path.write_bytes(content[:150] + b"x" + content[151:])  # in the header's description
    assert run(scan)[0] == "done"


def test_slices_of_another_format_are_made_again(scan):
    run(scan)
    path = scan.path.parent / "out/test/abnormal/a_T1w/scan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    assert run(scan) == ("done", "")


def test_a_scan_is_skipped_in_one_line_that_names_the_file(scan, tmp_path, monkeypatch):
    flat = replace(scan, path=save(np.full(HEAD.shape, 7.0), tmp_path / "flat.nii"), brain_mask=None)
    in_brain = replace(scan, path=save(np.full(HEAD.shape, 7.0), tmp_path / "b.nii"))
    gone = replace(scan, path=tmp_path / "gone.nii")
    wrong_mask = replace(scan, lesion_mask=save(np.zeros(HEAD.shape, np.uint8), tmp_path / "m.nii"))
    for one, words in (
        (flat, "flat.nii: is constant"),
        (in_brain, "b.nii: is constant inside the brain"),
        (gone, "gone.nii: cannot be read (No such file or directory); copy it again"),
        (wrong_mask, "m.nii: is empty"),
    ):
        state, why = run(one)
        assert state == "skipped"
        assert words in why
        assert "\n" not in why
        assert read(one) is None

    def exhaust(*_):
        raise MemoryError

    monkeypatch.setattr("preprocessing.worker.read_volume", exhaust)
    assert run(scan) == ("skipped", f"{scan.path}: does not fit into memory; use fewer --workers")


def test_a_folder_that_cannot_be_written_is_one_line(scan):
    (scan.path.parent / "out").write_text("a file, where a folder should be")
    state, why = run(scan)
    assert state == "skipped"
    assert "cannot be written" in why or "cannot be read" in why


def test_a_single_scan_is_cut_as_the_store_cuts_it(scan):
    run(scan)
    loaded = cut_scan(scan.path, scan.brain_mask, SETTINGS)
    stored = read(scan).load()
    np.testing.assert_array_equal(loaded.stack, stored.stack)
    assert loaded.geometry == stored.geometry
    assert (loaded.scale, loaded.skull_off, loaded.source) == (stored.scale, True, str(scan.path))
    assert (loaded.name, loaded.label, loaded.subject, loaded.lesion, loaded.warnings) == (
        "a_T1w",
        "",
        "a_T1w",
        None,
        (),
    )
    assert loaded.brain_ml == pytest.approx((HEAD.get_fdata() > 0).sum() * 0.512)


def test_axes_are_taken_on_trust_only_where_the_header_is_silent(scan, tmp_path):
    assert cut_scan(scan.path, None, SETTINGS, axes="LPI").warnings == ()
    silent = store(
        nib.Nifti1Image(HEAD.get_fdata().astype(np.int16), HEAD.affine), "PSR", tmp_path / "s.img", nib.AnalyzeImage
    )
    with pytest.raises(DataError, match="--axes"):
        cut_scan(silent, None, SETTINGS)
    loaded = cut_scan(silent, None, SETTINGS, axes="PSR")
    assert loaded.warnings == ("its header does not give its orientation; PSR is assumed, as --axes says",)
    assert loaded.geometry.axes == "PSR"


def test_one_volume_of_several_is_cut(scan, tmp_path):
    values = HEAD.get_fdata()
    nib.save(nib.Nifti1Image(np.stack([values, values * 2], -1).astype(np.float32), HEAD.affine), tmp_path / "s.nii")
    series = replace(scan, path=tmp_path / "s.nii", name="s")
    assert run(series, replace(SETTINGS, volume=1)) == ("done", "")
    assert read(series).record["scale"][1] == pytest.approx(2 * cut_scan(scan.path, None, SETTINGS).scale[1], rel=0.01)
    assert read_image(series.path, index=1).values.max() == pytest.approx(2 * values.max(), rel=1e-6)


@pytest.mark.parametrize("factor", [1e40, 1e-50])
def test_values_that_float32_does_not_hold_skip_their_scan(factor, scan):
    save(HEAD.get_fdata() * factor, scan.path)
    state, why = run(scan)
    assert state == "skipped"
    assert why.startswith(f"{scan.path}: its values go up to ")
    assert read(scan) is None


def test_a_full_disk_leaves_the_other_scans_and_nothing_half_written(scan, monkeypatch):
    other = replace(scan, name="b_T1w")
    run(scan)
    write = Path.write_bytes

    def fill_up(path, content):
        if "slice_012" in path.name and "masks" not in str(path):
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    state, why = run(other)
    assert state == "skipped"
    assert "b_T1w: cannot be written (No space left on device; free some space and run the same command again)" in why
    out = scan.path.parent / "out/test"
    assert [path.name for path in (out / "abnormal").iterdir()] == ["a_T1w"]
    assert [path.name for path in (out / "masks").iterdir()] == ["a_T1w"]
    monkeypatch.undo()
    assert (run(scan)[0], run(other)[0]) == ("unchanged", "done")


def test_a_scan_that_was_damaged_is_said_and_out_of_use(scan):
    assert run(scan)[0] == "done"
    folder, whole = read(scan).folder, scan.path.read_bytes()
    scan.path.write_bytes(whole[:5000])
    state, why = run(scan)
    assert state == "skipped"
    assert f"{scan.path}: is truncated" in why
    place = folder.parents[2] / ".withdrawn/test/abnormal/a_T1w"
    assert why.endswith(f"; its old slices were moved to {place}")
    assert not folder.exists()
    assert (place / "scan.json").exists()
    assert run(scan)[1].endswith("copy it again"), "said once"
    scan.path.write_bytes(whole)
    assert run(scan)[0] == "done"
    scan.lesion_mask.unlink()
    state, why = run(scan)
    assert state == "skipped"
    assert f"{scan.lesion_mask}: cannot be read (No such file or directory)" in why
    assert not folder.exists()


def test_a_scan_that_cannot_be_written_or_held_stays_in_use(scan, monkeypatch):
    run(scan)
    before = read(scan).read_stack()
    for name, fail in (("write_scan", fail_for_want_of_space), ("cut_stack", fail_for_want_of_memory)):
        with monkeypatch.context() as patch:
            patch.setattr(worker, name, fail)
            assert run(scan, replace(SETTINGS, keep=0.5))[0] == "skipped"
    np.testing.assert_array_equal(read(scan).read_stack(), before)


def fail_for_want_of_memory(*_):
    raise MemoryError


def fail_for_want_of_space(*_):
    raise OSError(28, "No space left on device")


def test_a_bad_record_is_made_again(scan):
    run(scan)
    record = read(scan).record
    (read(scan).folder / "scan.json").write_text("{}")
    assert run(scan)[0] == "done"
    assert read(scan).record == record


def test_slices_of_an_older_version_learn_which_scan_they_are(scan):
    run(scan)
    stored = read(scan)
    record = stored.record
    old = {key: value for key, value in record.items() if key != "content"}
    (stored.folder / "scan.json").write_text(json.dumps(old))
    assert len(read(scan).hashes) == 1
    assert run(scan)[0] == "done"
    assert read(scan).record == record
    assert run(scan)[0] == "unchanged"


def test_a_folder_that_was_moved_is_unchanged_and_where_it_is_now(scan, tmp_path):
    run(scan)
    new = tmp_path / "moved"
    new.mkdir()
    for path in (scan.path, scan.brain_mask, scan.lesion_mask):
        path.rename(new / path.name)
    moved = replace(scan, path=new / "a_T1w.nii", brain_mask=new / "a_brain.nii", lesion_mask=new / "a_lesion.nii")
    assert preprocess_scan(moved, tmp_path / "out", SETTINGS) == ("unchanged", "")
    assert read(scan).record["source"] == str(new / "a_T1w.nii")


def test_a_name_too_long_for_what_is_made_of_it_is_named(scan):
    long = replace(scan, name="ä" * 101)
    state, why = run(long)
    assert (state, why) == ("skipped", f"{scan.path}: its name takes more than 200 bytes; give it a shorter one")
    assert run(replace(scan, name="ä" * 100))[0] == "done"


def test_a_scan_from_its_file_is_known_as_the_stored_one_is(scan):
    run(scan)
    assert cut_scan(scan.path, scan.brain_mask, SETTINGS).hashes == read(scan).hashes
