"""A scan that lies oblique gives the slices of a straight one, and its map lies on its own grid."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from preprocessing.geometry import Geometry
from preprocessing.oblique import StraightGrid, measure_tilt
from preprocessing.scans import Scan
from preprocessing.store import read_scan
from preprocessing.volume import Volume, find_brain, read_volume
from preprocessing.worker import CutSettings, cut_scan, preprocess_scan

SETTINGS = CutSettings(keep=0.7, size=32)
PLACE_MM = np.array([25.0, 30.0, 10.0])


def show_head(x, y, z):
    """A lopsided brain of 1.2 l, in scanner mm, with a bright spot at PLACE_MM."""
    inside = (x / 62) ** 2 + (y / 80) ** 2 + (z / 60) ** 2 < 1
    spot = np.exp(-(((np.stack([x, y, z], -1) - PLACE_MM) ** 2).sum(-1)) / 200)
    return np.where(inside, 500 + 2.0 * x + y + 1.5 * z + 400 * spot, 0).astype(np.float32)


def save_head(path, turn=(0, 0, 0), axes="RAS", spacing_mm=(3.0, 3.0, 3.0)):
    """The head as a scanner samples it whose axes are turned by these degrees about x, y and z: (path, affine)."""
    shape = [int(190 / side) for side in spacing_mm]
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", turn, degrees=True).as_matrix() @ np.diag(spacing_mm)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    place = nib.affines.apply_affine(affine, np.stack(np.indices(shape), -1))
    image = nib.Nifti1Image(show_head(*np.moveaxis(place, -1, 0)), affine)
    ornt = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    nib.save(image.as_reoriented(ornt), path)
    return path


def make_affine(turn, spacing_mm=(1.0, 2.0, 3.0)):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("x", turn, degrees=True).as_matrix() @ np.diag(spacing_mm)
    return affine


@pytest.mark.parametrize("turn", [0, 10, 20, 30, 44])
def test_the_tilt_is_the_angle_between_axes(turn):
    assert measure_tilt(make_affine(turn)) == pytest.approx(turn, abs=1e-4)
    assert measure_tilt(make_affine(turn)[:, [2, 0, 1, 3]] @ np.diag([-1, 1, -1, 1])) == pytest.approx(turn, abs=1e-4)


def test_up_to_20_degrees_a_scan_is_cut_along_its_own_axes(tmp_path):
    for turn, oblique in ((19.9, False), (20.1, True)):
        loaded = cut_scan(save_head(tmp_path / "a.nii", (turn, 0, 0)), None, SETTINGS)
        assert (loaded.geometry.straight is not None) is oblique
        text = "its axes are oblique, so it was resampled to the anatomical axes (20 degrees)"
        assert loaded.warnings == ((text,) if oblique else ())
        assert ("straight" in loaded.geometry.to_record()) is oblique


@pytest.mark.parametrize("axes", ["RAS", "LPI", "SAR"])
@pytest.mark.parametrize("turn", [(32, 0, 0), (0, -28, 0), (15, 20, 25)])
def test_an_oblique_scan_gives_the_slices_of_a_straight_one(axes, turn, tmp_path):
    straight = cut_scan(save_head(tmp_path / "straight.nii"), None, SETTINGS)
    oblique = cut_scan(save_head(tmp_path / "oblique.nii", turn, axes), None, SETTINGS)
    assert oblique.brain_ml == pytest.approx(straight.brain_ml, rel=0.02)
    middles = []
    for scan in (straight, oblique):
        z_mm = nib.affines.apply_affine(scan.geometry.stack_affine, [[0, 0, i] for i in range(len(scan.stack))])[:, 2]
        middles.append(scan.stack[np.abs(z_mm - 9).argmin()].astype(float))
    a, b = middles
    both = (a > 0) & (b > 0)
    assert both.sum() > 0.93 * max((a > 0).sum(), (b > 0).sum())
    assert np.abs(a - b)[both].mean() < 0.02


@pytest.mark.parametrize("turn", [(32, 0, 0), (15, 20, 25)])
def test_the_map_of_an_oblique_scan_lies_on_its_own_grid(turn, tmp_path):
    path = save_head(tmp_path / "a.nii", turn, "LPI", (2.5, 3.0, 4.0))
    scan = cut_scan(path, None, replace(SETTINGS, size=128))
    places = np.stack(np.indices(scan.stack.transpose(2, 1, 0).shape), -1)
    x, y, z = np.moveaxis(nib.affines.apply_affine(scan.geometry.stack_affine, places), -1, 0)
    wanted = np.where(scan.stack.transpose(2, 1, 0) > 0, 100 + x + 2 * y + 3 * z, np.nan)
    back = scan.geometry.restore(wanted.transpose(2, 1, 0))
    stored = nib.load(path)
    assert back.shape == stored.shape == scan.geometry.shape
    np.testing.assert_array_equal(scan.geometry.affine, stored.affine)
    x, y, z = np.moveaxis(nib.affines.apply_affine(stored.affine, np.stack(np.indices(back.shape), -1)), -1, 0)
    known = np.isfinite(back)
    assert np.abs(back - (100 + x + 2 * y + 3 * z))[known].mean() < 4, "rims apart, what is linear stays so"
    brain = stored.get_fdata() > 0
    assert (known & brain).sum() > 0.96 * known.sum()
    assert 0.6 < known.sum() / brain.sum() < 0.95, "the middle 70 % of the slices, where brains are thick"


def test_an_oblique_scan_goes_to_the_store_and_back_with_its_lesion(tmp_path):
    path = save_head(tmp_path / "a.nii", (32, 0, 0), "LPI")
    image = nib.load(path)
    place = nib.affines.apply_affine(image.affine, np.stack(np.indices(image.shape), -1))
    ball = np.linalg.norm(place - PLACE_MM, axis=-1) < 12
    nib.save(nib.Nifti1Image(ball.astype(np.uint8), image.affine), tmp_path / "l.nii")
    scan = Scan(path, "a", "test", "abnormal", "a", "", None, tmp_path / "l.nii")
    assert preprocess_scan(scan, tmp_path / "out", SETTINGS) == ("done", "")
    loaded = read_scan(tmp_path / "out/test/abnormal/a").load()
    assert (
        loaded.geometry == cut_scan(path, None, SETTINGS).geometry == Geometry.from_record(loaded.geometry.to_record())
    )
    assert sum(loaded.lesion_voxels) == pytest.approx(ball.sum(), rel=0.05)
    at = np.argwhere(loaded.lesion.transpose(2, 1, 0)).mean(axis=0)
    np.testing.assert_allclose(nib.affines.apply_affine(loaded.geometry.stack_affine, at), PLACE_MM, atol=2)
    assert preprocess_scan(scan, tmp_path / "out", SETTINGS) == ("unchanged", "")


def test_values_of_the_background_do_not_reach_into_the_brain():
    """A brain of 7 in a background of 1000, turned: 7 all over."""
    values = np.full((20, 20, 20), 1000.0)
    inside = np.zeros(values.shape, bool)
    inside[5:15, 5:15, 5:15] = True
    values[inside] = 7
    volume = Volume(values, make_affine(30, (2.0, 2.0, 2.0)), "RAS", values.shape, (2.0, 2.0, 2.0))
    brought, brain = StraightGrid.around(volume, inside).bring(volume, inside)
    np.testing.assert_allclose(brought.values[brain], 7, rtol=1e-5)
    assert brain.sum() == pytest.approx(1000, rel=0.12), "its corners are cut"
    assert brought.missing is None


def test_voxels_that_are_no_number_stay_so(tmp_path):
    path = save_head(tmp_path / "a.nii", (32, 0, 0))
    image = nib.load(path)
    values = image.get_fdata(dtype=np.float32)
    values[31, 31, 31] = np.nan
    nib.save(nib.Nifti1Image(values, image.affine), tmp_path / "b.nii")
    volume = read_volume(tmp_path / "b.nii")
    inside, _ = find_brain(volume)
    assert 1 <= StraightGrid.around(volume, inside).bring(volume, inside)[0].missing.sum() <= 27
