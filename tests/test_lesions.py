"""Painted lesions to choose by: how large they are, where they lie, and that the rest of the scan stays as it was."""

import numpy as np
import pytest
from scipy import ndimage

from benchmarks.lesions import EDGE_MM, VOLUME_ML, paint_lesion
from tests.predictions import make_geometry, make_scan

SPACING_MM = np.array([3.0, 2.0, 2.0])


@pytest.fixture(scope="module")
def healthy():
    """An ellipsoid brain of 3 x 2 x 2 mm with some texture, of 1,300 ml."""
    z, y, x = (np.mgrid[:44, :96, :96] - np.array([22, 47.5, 47.5])[:, None, None, None]) * SPACING_MM[
        :, None, None, None
    ]
    brain = (x / 68) ** 2 + (y / 84) ** 2 + (z / 58) ** 2 < 1
    values = 0.6 + 0.1 * np.sin(x / 7) * np.cos(y / 9 + z / 8)
    stack = np.where(brain, values, 0).astype(np.float16)
    geometry = make_geometry(44, 20, 96, (1.0, 1.0, 3.0), 2.0)
    return make_scan(stack, label="normal", geometry=geometry)


@pytest.fixture(scope="module")
def painted(healthy):
    return [paint_lesion(healthy, np.random.default_rng(seed)) for seed in range(30)]


def test_all_kinds_are_painted_and_named(healthy, painted):
    assert {kind for _, kind in painted} == set(VOLUME_ML)
    for scan, kind in painted:
        assert (scan.name, scan.label, scan.subject) == (f"{healthy.name}_{kind}", "abnormal", healthy.subject)
    assert healthy.label == "normal"


def test_volumes_are_within_their_range(painted):
    volumes = [scan.lesion.sum() * SPACING_MM.prod() / 1000 for scan, _ in painted]
    for volume, (_, kind) in zip(volumes, painted, strict=True):
        assert VOLUME_ML[kind][0] / 2 < volume < 2 * VOLUME_ML[kind][1], kind
    assert max(volumes) > 20 * min(volumes)


def test_voxels_are_counted_on_the_grid_of_the_scan_itself(painted):
    """Its voxels are of 1 x 1 mm, the stack's pixels of 2 x 2."""
    for scan, _ in painted:
        assert scan.lesion_voxels == tuple(4 * scan.lesion.sum(axis=(1, 2)))


def test_a_lesion_lies_in_the_brain_and_the_brain_stays_its_shape(healthy, painted):
    deep = ndimage.distance_transform_edt(healthy.stack > 0, sampling=SPACING_MM) > 2
    for scan, _ in painted:
        assert not (scan.lesion & ~deep).any()
        assert ndimage.label(scan.lesion)[1] == 1
        assert scan.stack.dtype == np.float16
        np.testing.assert_array_equal(scan.stack > 0, healthy.stack > 0)
        assert scan.stack.max() <= 1


def test_it_is_healthy_outside_and_changed_within(healthy, painted):
    for scan, kind in painted:
        change = scan.stack.astype(float) - healthy.stack
        far = ndimage.distance_transform_edt(~scan.lesion, sampling=SPACING_MM) > 4 * EDGE_MM + 3
        if kind not in ("mass", "tumour"):  # which push what is around them
            assert np.abs(change[far]).max() == 0
        elif kind == "mass":
            assert np.abs(change[far]).max() > 0.01
        assert np.abs(change[scan.lesion]).mean() > 0.01
        if kind in ("dark", "bright", "tumour"):
            assert np.sign(change[scan.lesion].mean()) == (1 if kind == "bright" else -1)


def test_the_same_seed_paints_the_same(healthy, painted):
    again, kind = paint_lesion(healthy, np.random.default_rng(3))
    assert kind == painted[3][1]
    np.testing.assert_array_equal(again.stack, painted[3][0].stack)
    assert (again.stack != painted[4][0].stack).any()
