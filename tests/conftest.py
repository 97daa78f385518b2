"""A tiny demo cohort, made and sliced once a session; every test that needs scans uses it."""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy.spatial.transform import Rotation

from preprocessing import simulated_cohort
from preprocessing.preprocess_oasis import main as preprocess
from preprocessing.simulated_cohort import CohortSettings, make_cohort

SIZE = 32


@pytest.fixture(scope="session")
def template_is_read_once():
    """To read and smooth the simulator's template takes longer than to make a tiny cohort of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulated_cohort, "load_template", functools.cache(simulated_cohort.load_template))
        yield


@pytest.fixture(scope="session")
def raw(template_is_read_once, tmp_path_factory) -> Path:
    """A raw folder of simulated scans at 4 mm: 3 training, 2 validation, 2 + 2 test."""
    folder = tmp_path_factory.mktemp("cohort") / "raw"
    make_cohort(folder, CohortSettings(3, 2, 2, 2, voxel_size_mm=4.0))
    return folder


@pytest.fixture(scope="session")
def processed(raw) -> Path:
    """Its slices, SIZE pixels a side."""
    folder = raw.with_name("processed")
    assert preprocess(["--raw", str(raw), "--processed", str(folder), "--size", str(SIZE), "--workers", "1"]) == 0
    return folder


@pytest.fixture(scope="session")
def run(processed) -> Path:
    """A short training of the default model."""
    from training.train import main as train

    folder = processed.with_name("run")
    assert train(["--data", str(processed), "--run", str(folder), *TINY]) == 0
    return folder


@pytest.fixture(scope="session")
def untrained(processed) -> Path:
    """A run folder with an untrained model, calibrated on the validation scans."""
    from tests.predictions import write_untrained_run

    return write_untrained_run(processed.with_name("untrained"), processed)


@pytest.fixture(scope="session")
def evaluation(untrained, processed) -> tuple[Path, list[str]]:
    """(the folder of an evaluation of that model on the test scans, the command that made it)."""
    from evaluation.evaluate import main as evaluate

    run, out = untrained, processed.with_name("evaluation")
    kinds = processed.with_name("lesions.csv")
    names = [path.name for path in sorted((processed / "test/abnormal").iterdir())]
    kinds.write_text("\n".join(["scan,kind", *(f"{name},kind {i}" for i, name in enumerate(names))]))
    command = ["--run", str(run), "--data", str(processed / "test"), "--out", str(out), "--maps", "--bids"]
    command += ["--panels", "2", "--smallest-ml", "0", "--lesions", str(kinds)]
    assert evaluate(command) == 0
    return out, command


TINY = ["--steps", "12", "--batch-size", "5", "--width", "8", "--depth", "3", "--device", "cpu", "--precision", "fp32"]


def make_head(shape=(40, 48, 44), spacing=(4.0, 4.0, 4.0), seed=0) -> nib.Nifti1Image:
    """A lopsided ellipsoid 'brain' in RAS with texture, 0 outside: every axis and side can be told apart.

    Another seed makes another scan: the same head with noise of its own.
    """
    grid = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    x, y, z = np.meshgrid(*grid, indexing="ij")
    inside = (x / 62) ** 2 + (y / 80) ** 2 + (z / 60) ** 2 < 1
    values = 500 + 2.0 * x + 1.0 * y + 1.5 * z
    values += 150 * np.exp(-((x - 25) ** 2 + (y - 30) ** 2 + (z - 10) ** 2) / 300)
    if seed:
        values += np.random.default_rng(seed).uniform(0, 5, shape)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [g[0] for g in grid]
    return nib.Nifti1Image(np.where(inside, values, 0).astype(np.float32), affine)


ALL_AXES = [
    "".join(sides) for order in itertools.permutations(("LR", "PA", "IS")) for sides in itertools.product(*order)
]


def store(image: nib.Nifti1Image, axes: str, path: Path, kind=nib.Nifti1Image, tilt_degrees: float = 0.0) -> Path:
    """Save the same image with its axes stored along `axes`, tilted about left-right in scanner space."""
    to = ornt_transform(nib.io_orientation(image.affine), axcodes2ornt(axes))
    tilt = np.eye(4)
    tilt[:3, :3] = Rotation.from_euler("x", tilt_degrees, degrees=True).as_matrix()
    affine = None if kind is nib.AnalyzeImage else tilt @ image.affine @ inv_ornt_aff(to, image.shape)
    stored = kind(apply_orientation(np.asarray(image.dataobj), to), affine)
    stored.header.set_zooms(np.array(image.header.get_zooms())[np.argsort(to[:, 0])])
    nib.save(stored, path)
    return path
