"""The masks of a scan on its way to the store: what they decide, what is said of them, and when they skip it."""

import hashlib
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from tests.test_worker import HEAD, SETTINGS, make_scan, read, run, save


@pytest.fixture
def scan(tmp_path):
    return make_scan(tmp_path)


def test_a_brain_mask_decides_what_is_brain(scan):
    half = HEAD.get_fdata() > 0
    half[:7] = False
    save(half.astype(np.uint8), scan.brain_mask)
    run(replace(scan, lesion_mask=None))
    rows = np.flatnonzero((read(scan).read_stack() > 0).any(axis=(0, 1)))
    assert len(rows) == pytest.approx(half.any(axis=(1, 2)).sum() * 8 / 6.25, abs=1.5)


@pytest.mark.parametrize("which", ["brain_mask", "lesion_mask"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: nib.Nifti1Image(np.zeros(image.shape, "u1"), image.affine), "is empty"),
        (lambda image: nib.Nifti1Image(image.get_fdata()[1:].astype("u1"), image.affine), "do not fit"),
        (lambda image: nib.Nifti1Image(image.get_fdata().astype("u1"), image.affine + 0.5), "do not fit"),
    ],
)
def test_a_bad_mask_skips_its_scan(which, change, words, scan):
    path = getattr(scan, which)
    nib.save(change(nib.Nifti1Image.from_bytes(path.read_bytes())), path)
    state, why = run(scan)
    assert state == "skipped"
    assert why.startswith(f"{path}: ")
    assert words in why
    assert read(scan) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda brain: brain | True, "has 5407 ml, not the size of a brain (700 to 2200 ml)"),
        (lambda brain: ~brain, "not the size of a brain"),
        (lambda brain: brain & (np.indices(brain.shape)[0] < 10), "not the size of a brain"),
        (lambda brain: np.indices(brain.shape).max(0) < 4, "has 33 ml, not the size of a brain"),
    ],
)
def test_a_brain_mask_of_no_brains_volume_skips_its_scan(change, words, scan):
    save(change(HEAD.get_fdata() > 0).astype(np.uint8), scan.brain_mask)
    state, why = run(scan)
    assert state == "skipped"
    assert why.startswith(f"{scan.brain_mask}: ")
    assert words in why


def test_a_probability_mask_is_cut_at_one_half(scan):
    run(scan)
    wanted = read(scan).read_stack()
    soft = np.where(HEAD.get_fdata() > 0, 0.9, 0.2).astype(np.float32)
    soft[0, 0, 0] = 0.5
    save(soft, scan.brain_mask)
    assert run(scan) == ("done", "")
    np.testing.assert_array_equal(read(scan).read_stack(), wanted)


def test_stray_pieces_are_dropped_and_said(scan):
    run(scan)
    wanted = read(scan)
    assert "warnings" not in wanted.record
    mask = (HEAD.get_fdata() > 0).astype(np.uint8)
    mask[:2, :2, 9:12] = 1  # 12 voxels of 0.512 ml
    save(mask, scan.brain_mask)
    values = HEAD.get_fdata().copy()
    values[:2, :2, 9:12] = 500
    for one in (scan, replace(scan, path=save(values, scan.path.with_name("b.nii")), name="b", brain_mask=None)):
        assert run(one) == ("done", "")
        np.testing.assert_array_equal(read(one).read_stack(), wanted.read_stack())
        assert read(one).record["warnings"] == ["pieces separate from the brain were dropped (6.14 ml)"]
        assert read(one).load().warnings == tuple(read(one).record["warnings"])


def test_a_lesion_mask_lies_in_the_brain_and_is_not_most_of_it(scan):
    outside = np.zeros(HEAD.shape, np.uint8)
    outside[:2, :2, :2] = 1
    save(outside, scan.lesion_mask)
    assert run(scan) == ("skipped", f"{scan.lesion_mask}: lies outside the brain; give the mask of this scan")
    save((HEAD.get_fdata() > 0).astype(np.uint8), scan.lesion_mask)
    assert run(scan) == ("done", "")
    assert read(scan).record["warnings"] == ["its lesion mask covers most of the brain; check it (100%)"]


def test_the_labels_that_are_lesion_are_picked_and_counted_anew(scan):
    labels = np.zeros(HEAD.shape, np.int16)
    labels[8:12, 8:12, 10:12], labels[8:12, 8:12, 12] = 1, 4
    save(labels, scan.lesion_mask)
    for picked, voxels in ((None, 48), ((1,), 32), ((4,), 16), ((1, 4), 48)):
        settings = replace(SETTINGS, lesion_labels=picked)
        assert run(scan, settings) == ("done", "")
        assert run(scan, settings) == ("unchanged", "")
        assert sum(read(scan).record["lesion_voxels"]) == voxels


def test_a_mask_may_be_called_as_its_scan_is(scan, tmp_path):
    (tmp_path / "masks").mkdir()
    mask = scan.brain_mask.rename(tmp_path / "masks/a_T1w.nii")
    scan = replace(scan, brain_mask=mask)
    assert run(scan)[0] == "done"
    own = hashlib.sha256(scan.path.read_bytes()).hexdigest()
    assert read(scan).record["sources"]["a_T1w.nii"] == own
    assert read(scan).hashes[1] == own[:32]
    smaller = (HEAD.get_fdata() > 0).astype(np.uint8)
    smaller[HEAD.shape[0] // 2, HEAD.shape[1] // 2, HEAD.shape[2] // 2] = 0
    save(smaller, mask)
    assert run(scan)[0] == "done", "another mask"
