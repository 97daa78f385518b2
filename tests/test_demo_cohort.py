"""The demo's simulated cohort: what a reader of its files may rely on."""

import csv
import gzip
import hashlib
import shutil

import nibabel as nib
import numpy as np
import pytest
from nilearn.datasets import load_mni152_brain_mask
from scipy import ndimage

from common.cli import DataError
from preprocessing import simulated_cohort
from preprocessing.demo_cohort import main
from preprocessing.simulated_cohort import ORIENTATIONS, CohortSettings, make_cohort, save_volume
from preprocessing.simulator import KINDS

TINY = CohortSettings(train=3, val=1, test_normal=1, test_abnormal=4, voxel_size_mm=4.0)


@pytest.fixture(scope="module")
def cohort(template_is_read_once, tmp_path_factory):
    raw = tmp_path_factory.mktemp("demo")
    assert make_cohort(raw, TINY) == (9, 0)
    return raw


def find_scans(raw):
    return sorted(raw.glob("*/*/*_T1w.nii.gz"), key=lambda path: path.name)


def find_mask(scan, name):
    return scan.parents[1] / "masks" / scan.name.replace("T1w", name)


def read(path):
    return np.asarray(nib.load(path).dataobj)


def hash_files(raw):
    paths = (path for path in raw.rglob("*") if path.is_file())
    return {str(path.relative_to(raw)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_tree(cohort):
    scans = find_scans(cohort)
    assert [path.name for path in scans] == [f"sim-{i:03d}_T1w.nii.gz" for i in range(1, 10)]
    groups = [("train", "normal")] * 3 + [("val", "normal"), ("test", "normal")] + [("test", "abnormal")] * 4
    assert [(path.parents[1].name, path.parent.name) for path in scans] == groups
    assert len(list(cohort.rglob("*.nii.gz"))) == 9 + 9 + 4  # scans, brains, lesions; nothing half-written
    for path in scans:
        image = nib.load(path)
        assert image.get_data_dtype() == np.int16
        assert image.header["descrip"].item() == b"simulated from the MNI152 template"
        for name in ("brain", "lesion") if path.parent.name == "abnormal" else ("brain",):
            mask = nib.load(find_mask(path, name))
            assert mask.get_data_dtype() == np.uint8
            assert mask.shape == image.shape
            np.testing.assert_array_equal(mask.affine, image.affine)
    readme = (cohort / "README.txt").read_text()
    assert "simulated from the MNI152 template" in readme
    assert "--train 3 --val 1 --test-normal 1 --test-abnormal 4 --voxel-size 4.0 --seed 0" in readme


def test_same_seed_same_bytes_whatever_the_workers_and_the_other_scans(cohort, tmp_path):
    settings = CohortSettings(train=2, val=0, test_normal=0, test_abnormal=0, voxel_size_mm=4.0)
    make_cohort(tmp_path / "again", settings, workers=2)
    files, wanted = hash_files(tmp_path / "again"), hash_files(cohort)
    scans = [name for name in files if name.endswith(".nii.gz")]
    assert len(scans) == 4
    assert {name: files[name] for name in scans} == {name: wanted[name] for name in scans}


def test_gzip_holds_neither_time_nor_name(cohort):
    for path in cohort.rglob("*.nii.gz"):
        head = path.read_bytes()[:8]
        assert head[3] == 0, "a flag says that a file name follows"
        assert head[4:8] == bytes(4), "the time stamp is not 0"
        gzip.decompress(path.read_bytes())  # raises where the sum does not fit


def test_other_seed_other_brain(cohort, tmp_path):
    make_cohort(tmp_path, CohortSettings(1, 0, 0, 0, voxel_size_mm=4.0, seed=1))
    new, old = read(find_scans(tmp_path)[0]), read(find_scans(cohort)[0])
    assert new.shape != old.shape or (new != old).any()


def test_cut_off_cohort_is_gone_on_with(cohort, tmp_path):
    raw = tmp_path / "copy"
    shutil.copytree(cohort, raw)
    for path in find_scans(raw)[4:6]:
        path.unlink()
    (raw / "test" / "lesions.csv").unlink()
    assert make_cohort(raw, TINY) == (2, 7)
    assert hash_files(raw) == hash_files(cohort)


def test_second_call_does_no_work(cohort, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in cohort.rglob("*")}
    monkeypatch.setattr(simulated_cohort, "load_template", lambda _: pytest.fail("made again"))
    assert make_cohort(cohort, TINY) == (0, 9)
    assert {path: path.stat().st_mtime_ns for path in cohort.rglob("*")} == before


def test_orientations_and_voxel_sizes_differ(cohort):
    images = [nib.load(path) for path in find_scans(cohort)]
    assert len({nib.aff2axcodes(image.affine) for image in images}) == 7
    assert len({tuple(np.round(image.header.get_zooms(), 2)) for image in images}) > 3
    for image in images:
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-3)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_left_stays_left(tmp_path, orientation):
    """The template is the same left and right, so a scan would not show it: a single voxel does."""
    affine = np.array([[2.0, 0.1, 0, -9], [-0.1, 3, 0, 5], [0, 0, 4, 7], [0, 0, 0, 1]])  # slightly oblique
    volume = np.zeros((5, 6, 7), np.int16)
    volume[4, 1, 2] = 1
    save_volume(tmp_path / "a.nii.gz", volume, affine, orientation)
    image = nib.load(tmp_path / "a.nii.gz")
    assert "".join(nib.aff2axcodes(image.affine)) == orientation
    voxel = np.argwhere(np.asarray(image.dataobj))[0]
    place_mm = [2 * 4 + 0.1 * 1 - 9, -0.1 * 4 + 3 * 1 + 5, 4 * 2 + 7]
    np.testing.assert_allclose(nib.affines.apply_affine(image.affine, voxel), place_mm, atol=1e-4)


def test_brains_agree_in_space(cohort):
    """Where the affine says a voxel lies, the template has brain; less so with the head turned over."""
    template = load_mni152_brain_mask(resolution=2)
    inside = template.get_fdata() > 0
    to_template = np.linalg.inv(template.affine)

    def overlap(points):
        index = np.rint(nib.affines.apply_affine(to_template, points)).astype(int)
        index = np.clip(index, 0, np.array(inside.shape) - 1)
        return inside[tuple(index.T)].mean()

    for path in find_scans(cohort):
        canonical = nib.as_closest_canonical(nib.load(find_mask(path, "brain")))
        points = nib.affines.apply_affine(canonical.affine, np.argwhere(np.asarray(canonical.dataobj)))
        centroid = points.mean(axis=0)
        assert np.abs(centroid).max() < 30  # mm
        assert overlap(points) > 0.88
        for axis in (1, 2):
            flipped = points.copy()
            flipped[:, axis] = 2 * centroid[axis] - flipped[:, axis]
            assert overlap(flipped) < overlap(points) - 0.02


def test_background_is_zero_and_brain_is_not(cohort):
    for path in find_scans(cohort):
        scan, brain = read(path), read(find_mask(path, "brain"))
        np.testing.assert_array_equal(scan > 0, brain == 1)
        assert (scan >= 0).all()
        volume_ml = brain.sum() * abs(np.linalg.det(nib.load(path).affine[:3, :3])) / 1000
        assert 900 < volume_ml < 2100
        for axis in range(3):  # the whole head is in the picture
            assert not np.take(brain, [0, -1], axis).any()


def test_lesions_are_as_listed(cohort):
    with open(cohort / "test" / "lesions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == list(KINDS)
    assert [row["scan"] for row in rows] == [f"sim-{i:03d}_T1w" for i in range(6, 10)]
    for row in rows:
        path = cohort / "test" / "abnormal" / f"{row['scan']}.nii.gz"
        scan, brain = read(path), read(find_mask(path, "brain")) > 0
        lesion = read(find_mask(path, "lesion")) > 0
        assert (brain | ~lesion).all()
        zooms = nib.load(path).header.get_zooms()
        assert float(row["volume_ml"]) == pytest.approx(lesion.sum() * np.prod(zooms) / 1000, rel=0.1)
        assert 2.5 < float(row["volume_ml"]) < 45
        around = ndimage.binary_dilation(lesion, iterations=2) & brain & ~lesion
        contrast = np.median(scan[lesion]) / np.median(scan[around])
        if row["kind"] == "bright":
            assert contrast > 1.2
        elif row["kind"] == "dark":
            assert contrast < 0.75
        else:
            assert contrast < 1


def test_brains_differ(cohort):
    """Seen on one grid in space, no brain is a copy of another."""
    grid = np.indices((30, 36, 26)).reshape(3, -1).T * 4.0 - [60, 88, 40]
    seen = []
    for path in find_scans(cohort):
        index = nib.affines.apply_affine(np.linalg.inv(nib.load(path).affine), grid).T
        values = ndimage.map_coordinates(read(path).astype(float), index, order=1)
        seen.append(values)
    alike = np.corrcoef(seen)[np.triu_indices(len(seen), 1)]
    assert alike.max() < 0.93
    assert alike.min() > 0.4  # but brains they are


def test_other_settings_and_other_scans_are_refused_in_one_line(cohort, tmp_path):
    files = hash_files(cohort)
    with pytest.raises(DataError, match=rf"{cohort} holds scans of other settings") as error:
        main(["--raw", str(cohort), "--seed", "1"])
    assert "\n" not in str(error.value)
    assert hash_files(cohort) == files
    (tmp_path / "scan.nii").touch()  # someone's own
    with pytest.raises(DataError, match="not made here"):
        main(["--raw", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii"]


@pytest.mark.parametrize(
    "flags",
    [["--voxel-size", "0.79"], ["--voxel-size", "8.1"], ["--train", "-1"], ["--seed", "-1"], ["--workers", "0"]],
)
def test_wrong_usage_ends_with_2(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--raw", str(tmp_path / "new"), *flags])
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_command_line(cohort, capsys):
    flags = ["--train", "3", "--val", "1", "--test-normal", "1", "--test-abnormal", "4", "--voxel-size", "4"]
    assert main(["--raw", str(cohort), *flags]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("made 0 scans; 9 ")
    assert str(cohort) in out[-1]
    assert "simulated" in out[-1]


def test_the_cohort_of_the_readme():
    assert CohortSettings() == CohortSettings(24, 20, 8, 8, voxel_size_mm=2.0, seed=0)


# What seed 0 makes: brain in ml, the brain's median and 5th and 95th percentile over it, lesion in ml. Results in the
# documentation are of these scans, so they stay what they are, but for the last digits of a library.
SEED_0 = {
    "sim-001": (1993, 196, 0.5561, 1.327, 0),
    "sim-002": (1770, 268, 0.5, 1.384, 0),
    "sim-003": (1533, 297, 0.5219, 1.32, 0),
    "sim-004": (1210, 351, 0.4245, 1.396, 0),
    "sim-005": (1589, 1085, 0.5419, 1.393, 0),
    "sim-006": (1663, 562, 0.4911, 1.361, 21.2),
    "sim-007": (1534, 974, 0.5185, 1.394, 6.644),
    "sim-008": (1422, 604, 0.6093, 1.394, 10.65),
    "sim-009": (1734, 249, 0.6185, 1.402, 10.15),
}


def test_seed_0_stays_what_it_is(cohort):
    for path in find_scans(cohort):
        scan, brain = read(path), read(find_mask(path, "brain")) > 0
        voxel_ml = np.prod(nib.load(path).header.get_zooms()) / 1000
        low, median, high = np.percentile(scan[brain], (5, 50, 95))
        lesion = find_mask(path, "lesion")
        lesion_ml = np.count_nonzero(read(lesion)) * voxel_ml if lesion.exists() else 0
        measured = (np.count_nonzero(brain) * voxel_ml, median, low / median, high / median, lesion_ml)
        assert measured == pytest.approx(SEED_0[path.name[:7]], rel=0.01), path.name
