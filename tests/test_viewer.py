"""What the viewer of a page is given: the scan, its map, residual and lesion, as exact as they need to be."""

import base64
import io
import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from evaluation.colours import ANOMALY_COLOURS
from evaluation.viewer import (
    CODES_PER_DOUBLING,
    LEAST_DOUBLINGS,
    RESIDUAL_STEPS,
    Viewers,
    count_bytes,
    describe_palette,
    encode_anomaly,
    pack_scan,
)
from tests.predictions import make_prediction, restore_map

BORDER = 2 - LEAST_DOUBLINGS * CODES_PER_DOUBLING  # the code of the threshold


def unpack(packed: dict, name: str) -> np.ndarray:
    """(n, H, W, 3) of one of the two mosaics, as viewer.js reads them."""
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(packed[name].split(",")[1]))).convert("RGB"))
    depth, tall, wide = packed["shape"]
    tiles = (np.divmod(z, packed["tiles"]) for z in range(depth))
    return np.stack([picture[y * tall : (y + 1) * tall, x * wide : (x + 1) * wide][::-1] for y, x in tiles])


def find_voxel(packed: dict, mm) -> np.ndarray:
    """[column, row, slice] of a place in scanner mm."""
    return np.linalg.inv(np.vstack([packed["affine"], [0, 0, 0, 1]])) @ [*mm, 1]


def test_codes_tell_what_is_above_the_threshold_exactly_and_all_else_to_three_percent():
    anomaly = np.float32([np.nan, 0, 0.01, np.nextafter(np.float32(4), np.float32(0)), 4, 4.2, 8, 64, 1e9])
    codes = encode_anomaly(anomaly, 4.0)
    assert codes[[0, 1, 2]].tolist() == [0, 1, 1]
    assert codes[3] == BORDER - 1
    assert codes[[4, 6, 7, 8]].tolist() == [BORDER, BORDER + CODES_PER_DOUBLING, BORDER + 4 * CODES_PER_DOUBLING, 255]
    for threshold in np.random.default_rng(0).uniform(1, 20, 500):
        around = np.float32([threshold, np.nextafter(np.float32(threshold), np.float32(0))])
        np.testing.assert_array_equal(encode_anomaly(around, threshold) >= BORDER, around >= threshold)
    values = np.geomspace(0.6, 500, 1000)
    decoded = 4 * 2 ** ((encode_anomaly(values, 4.0) + 0.5 - 2) / CODES_PER_DOUBLING + LEAST_DOUBLINGS)
    np.testing.assert_allclose(decoded, values, rtol=0.03)


@pytest.mark.parametrize("spacing_mm", [2.0, 1.0])
def test_a_packed_scan_is_the_scan(spacing_mm):
    made = make_prediction(slices=24)
    geometry = replace(made.scan.geometry, spacing_mm=(2.0, 2.0, spacing_mm))
    made = replace(made, scan=replace(made.scan, geometry=geometry))
    made.anomaly[5, 43, 22] = 30.0
    packed = pack_scan(made)
    step = 2 if spacing_mm == 1 else 1
    assert packed["shape"] == [24 // step, 60, 60], "cropped to the disc with a margin, of thin slices every other one"
    assert packed["spacing_mm"] == [2.0, 2.0, 2.0]
    scan, coded = unpack(packed, "scan"), unpack(packed, "coded")
    kept = slice(5 % step, None, step), slice(2, 62), slice(2, 62)
    np.testing.assert_allclose(scan[..., 0] / 255, made.scan.stack[kept], atol=0.1)
    assert np.abs(scan[..., 0] / 255 - made.scan.stack[kept]).mean() < 0.01
    np.testing.assert_array_equal(coded[..., 0], encode_anomaly(made.anomaly[kept], 4.0))
    residual = made.scan.stack[kept].astype(float) - made.reconstruction[kept]
    np.testing.assert_allclose((coded[..., 1] - 128.0) / RESIDUAL_STEPS, residual, atol=0.51 / RESIDUAL_STEPS)
    np.testing.assert_array_equal(coded[..., 2] > 127, made.scan.lesion[kept])
    x, y, z = packed["start"]
    assert coded[z, y, x, 0] == coded[..., 0].max(), "it opens where the anomaly is highest"
    place = nib.affines.apply_affine(geometry.stack_affine, (22, 43, 5))
    np.testing.assert_allclose(find_voxel(packed, place)[:3], (x, y, z), atol=1e-3)
    assert packed["slices"][z].endswith("k = 55")
    assert len(packed["slices"]) == len(scan)


def test_regions_lie_where_they_are_highest():
    made = make_prediction()
    made.anomaly[4, 43, 22] = 30.0
    made = restore_map(made)
    (region,) = pack_scan(made)["regions"]
    assert region["number"] == 1
    np.testing.assert_allclose(region["voxel"], pack_scan(made)["start"], atol=1)


def test_a_scan_without_a_lesion_mask_has_none():
    packed = pack_scan(make_prediction(lesion=False))
    assert packed["lesion"] is False
    assert not unpack(packed, "coded")[..., 2].any()


def test_a_page_keeps_flagged_scans_and_then_those_of_the_highest_scores(tmp_path):
    packed = pack_scan(make_prediction(slices=2))
    one = count_bytes(packed)
    viewers = Viewers(most_bytes=3 * one)
    for name, score, flagged in (("a", 9, False), ("b", 1, True), ("c", 7, False), ("d", 5, False), ("e", 8, False)):
        path = tmp_path / name
        path.write_text(json.dumps(packed | {"name": name}))
        viewers.add({"label": "normal", "scan": name, "score": score, "flagged": flagged}, one, path)
    assert {key[1]: kept["name"] for key, kept in viewers.read().items()} == {name: name for name in "abe"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "e"], "what does not fit takes no room"


def test_the_palette_is_that_of_the_pictures():
    palette = describe_palette()
    assert {name: len(lut) for name, lut in palette["luts"].items()} == {"anomaly": 6 * 256, "residual": 6 * 256}
    first = "".join(f"{round(255 * part):02x}" for part in ANOMALY_COLOURS(0)[:3])
    assert palette["luts"]["anomaly"].startswith(first)
    assert (palette["lowest"], palette["highest"]) == (0.5, 16)
