"""Brain extraction: of heads without a mask, kept beside the slices; the example that ships is such a head."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, ornt_transform
from scipy.spatial.transform import Rotation

from common.cli import DataError
from evaluation.evaluate import main as evaluate
from preprocessing import strip, worker
from preprocessing.preprocess_oasis import main
from preprocessing.scans import search
from preprocessing.store import list_scans, read_scan
from preprocessing.volume import read_volume
from preprocessing.worker import CutSettings, cut_scan
from tests.predictions import SETTINGS, write_model
from tests.test_scripts import PROJECT

EXAMPLE = PROJECT / "Dataset/example/head_T1w.nii.gz"
AUTO = CutSettings(keep=0.7, size=64, strip="auto")


@pytest.fixture(scope="module")
def extracted():
    """The example's volume and the brain in it."""
    volume = read_volume(EXAMPLE)
    return volume, strip.extract_brain(EXAMPLE, volume)


def find_ball(volume):
    """(X, Y, Z) bool: a ball as large as a brain, in which a part at the left and one at the top are missing."""
    middle = (np.array(volume.values.shape) - 1) / 2
    places_mm = (np.moveaxis(np.indices(volume.values.shape), 0, -1) - middle) * volume.spacing_mm
    return (np.linalg.norm(places_mm, axis=-1) < 65) & (places_mm[..., 0] > -50) & (places_mm[..., 2] < 40)


@pytest.fixture
def quick(monkeypatch):
    """Instead of the network: `find_ball`. How often it was asked."""
    asked = []

    def extract(path, volume):
        asked.append(path)
        return find_ball(volume)

    monkeypatch.setattr(worker, "extract_brain", extract)
    return asked


@pytest.fixture
def head(tmp_path):
    """A head: a skin and a brain around 0, dark bone between, in noise; the stored axes are PSR."""
    return save(tmp_path / "raw/head_T1w.nii.gz", make_head())


def make_head():
    x, y, z = (np.indices((50, 50, 50)) - 24.5) * 4
    radius = np.sqrt(x**2 + y**2 + z**2)
    values = np.where(radius < 70, 600 + 2 * x, np.where(radius < 80, 20, np.where(radius < 92, 900, 0)))
    return np.abs(values + np.random.default_rng(0).normal(0, 12, values.shape))


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values.astype(np.float32), np.diag([4.0, 4, 4, 1]))
    nib.save(image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt("PSR"))), path)
    return path


def test_the_brain_of_the_example_is_found(extracted):
    volume, brain = extracted
    assert brain.dtype == bool
    assert brain.shape == volume.values.shape
    assert 1500 < brain.sum() * np.prod(volume.spacing_mm) / 1000 < 2000  # ml; with the fluid around it
    middle_mm = np.mean(np.argwhere(brain), axis=0) * volume.spacing_mm
    width_mm, length_mm, height_mm = (np.ptp(np.argwhere(brain), axis=0) + 1) * volume.spacing_mm
    assert 120 < width_mm < 160
    assert 155 < length_mm < 200
    assert 110 < height_mm < 160
    assert middle_mm[2] > volume.values.shape[2] * volume.spacing_mm[2] / 2, "a brain lies in the upper half of a head"


def test_a_volume_without_a_brain_is_one_line(extracted):
    volume, _ = extracted
    noise = replace(volume, values=np.random.default_rng(0).random((64, 64, 64), np.float32))
    with pytest.raises(DataError, match=r"noise\.nii: the brain extracted from it has \d+ ml, not the size of a brain"):
        strip.extract_brain("noise.nii", noise)


def test_heads_alone_are_stripped(head, quick, tmp_path):
    loaded = cut_scan(head, None, AUTO)
    assert loaded.skull_off
    assert loaded.brain_ml == pytest.approx(find_ball(read_volume(head)).sum() * 4**3 / 1000)
    assert quick == [head]
    assert not cut_scan(head, None, replace(AUTO, strip="never")).skull_off
    brain = np.where(make_head() > 300, make_head(), 0)
    brain[np.linalg.norm(np.indices(brain.shape).T - 24.5, axis=-1).T * 4 > 72] = 0
    stripped = save(tmp_path / "brain_T1w.nii.gz", brain)
    mask = save(tmp_path / "mask.nii.gz", brain > 0)
    for path, its_mask in ((stripped, None), (head, mask)):
        loaded = cut_scan(path, its_mask, AUTO)
        assert loaded.skull_off
        assert loaded.stripped is None
    assert quick == [head]
    assert cut_scan(head, mask, replace(AUTO, strip="always")).stripped
    assert quick == [head, head]


def test_the_mask_is_kept_on_the_scans_own_grid_and_the_head_around_it(head, quick, tmp_path):
    assert (
        main(["--raw", str(head.parent), "--processed", str(tmp_path / "p"), "--label", "normal", "--workers", "1"])
        == 0
    )
    (scan,) = list_scans(tmp_path / "p")
    assert scan.record["stripped"] is True
    own, mask = nib.load(head), nib.load(scan.folder / "brain.nii.gz")
    assert mask.shape == own.shape
    np.testing.assert_array_equal(mask.affine, own.affine)
    canonical = nib.as_closest_canonical(mask).get_fdata() > 0
    np.testing.assert_array_equal(canonical, find_ball(read_volume(head)))
    brain, around = scan.read_middle() > 0, scan.read_head()
    assert around.shape == brain.shape
    assert around[~brain].max() > 0.5, "the skin"
    np.testing.assert_allclose(around[brain].astype(float), scan.read_middle()[brain].astype(float), atol=0.15)


@pytest.mark.parametrize("skull_off", [True, False])
def test_a_model_of_heads_gets_heads(skull_off, head, quick, tmp_path):
    write_model(tmp_path / "run/model.pt", slices=SETTINGS | {"skull_off": skull_off})
    assert evaluate(["--run", str(tmp_path / "run"), "--scan", str(head), "--out", str(tmp_path / "out")]) == 0
    assert quick == [head] * skull_off
    assert (tmp_path / "out/head_T1w_brain.nii.gz").exists() == skull_off


def test_an_oblique_head_keeps_its_mask_and_its_skin(quick, tmp_path):
    turned = np.eye(4)
    turned[:3, :3] = Rotation.from_euler("x", 30, degrees=True).as_matrix() * 4
    path = tmp_path / "raw/oblique_T1w.nii.gz"
    path.parent.mkdir()
    nib.save(nib.Nifti1Image(make_head().astype(np.float32), turned), path)
    loaded = cut_scan(path, None, AUTO)
    assert loaded.geometry.straight
    np.testing.assert_array_equal(loaded.stripped.mask, find_ball(read_volume(path)))
    brain = loaded.stack[len(loaded.stack) // 2] > 0
    assert loaded.stripped.head[~brain].max() > 0.5, "the skin"


def test_a_scan_that_is_no_longer_stripped_loses_its_mask(head, quick, tmp_path):
    flags = ["--raw", str(head.parent), "--processed", str(tmp_path / "p"), "--label", "normal", "--workers", "1"]
    assert main(flags) == 0
    assert main([*flags, "--strip", "never"]) == 0
    (scan,) = list_scans(tmp_path / "p")
    assert not scan.record["skull_off"]
    assert sorted(path.name for path in scan.folder.iterdir() if not path.name.startswith("slice_")) == ["scan.json"]
    assert scan.read_head() is None


def test_a_brain_that_is_not_the_size_of_one_is_skipped_with_its_name(head, monkeypatch, tmp_path):
    class Blind:
        """A network that sees nothing."""

        def run_model(self, values):
            return np.zeros_like(values)

        def postprocess(self, inside):
            raise ValueError("attempt to get argmax of an empty sequence")

    monkeypatch.setattr(strip, "_load_network", Blind)
    (scan,) = search(head.parent).scans
    state, why = worker.preprocess_scan(replace(scan, split="train", label="normal"), tmp_path / "p", AUTO)
    assert state == "skipped"
    assert why.startswith(f"{head}: the brain extracted from it has 0 ml")
    assert not read_scan(tmp_path / "p/train/normal/head_T1w")
