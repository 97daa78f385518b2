"""What the page's viewer shows of a scan, packed into two pictures: viewer.js unpacks them in the browser.

A scan takes a few hundred kB. One picture is the scan in grey, with the small losses of WebP; the other is exact and
holds in its three channels the anomaly, the residual and the lesion. Both are mosaics of the stack's slices, cropped to
the brain, in rows of TILES, the nose up.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.colours import (
    ANOMALY_COLOURS,
    BORDER_COLOUR,
    HIGHEST,
    LESION_COLOUR,
    LOWEST,
    OPAQUEST,
    RESIDUAL_COLOURS,
    RESIDUAL_TOP,
    STEEPNESS,
)
from evaluation.panels import find_crop
from evaluation.pictures import EFFORT, make_url
from evaluation.places import describe_regions, name_slice
from evaluation.predictor import Prediction
from evaluation.regions import EXTENT

TILES = 10  # slices in a row of a mosaic
THINNEST_MM = 1.5  # slices nearer to each other are left out; a stack's are 2 mm thick, or more
QUALITY = 85  # of the scan, as WebP counts it
RESIDUAL_STEPS = 100  # codes of the residual in full intensity
CODES_PER_DOUBLING = 24  # of the anomaly: steps of 3 %
LEAST_DOUBLINGS = -3  # the anomaly of code 2, in doublings of the threshold; code 1 is all below, 0 was not scored
PAGE_BYTES = 60_000_000  # of all viewers in a page


def describe_palette() -> dict:
    """What viewer.js needs to draw with the colours of `colours`; LUTs as 256 times rrggbb."""
    luts = {}
    for name, colours in (("anomaly", ANOMALY_COLOURS), ("residual", RESIDUAL_COLOURS)):
        luts[name] = colours(np.linspace(0, 1, 256), bytes=True)[:, :3].tobytes().hex()
    scale = {"lowest": LOWEST, "highest": HIGHEST, "steepness": STEEPNESS, "opaquest": OPAQUEST}
    lines = {"border": BORDER_COLOUR, "lesion": LESION_COLOUR}
    codes = {"residual_top": RESIDUAL_TOP, "residual_steps": RESIDUAL_STEPS}
    codes |= {"codes_per_doubling": CODES_PER_DOUBLING, "least_doublings": LEAST_DOUBLINGS}
    codes |= {"extent_doublings": float(np.log2(EXTENT))}
    return {"luts": luts} | scale | lines | codes


def pack_scan(prediction: Prediction) -> dict:
    """The content of a viewer, plain values for JSON.

    shape    slices, rows (posterior to anterior), columns (left to right) of the volume
    affine   (3, 4) from (column, row, slice) to scanner mm
    slices   the name of each slice, in mm and by the file's own index
    regions  {"number", "voxel": column, row and slice where it is highest}
    start    where the viewer opens: the highest anomaly
    """
    scan, geometry = prediction.scan, prediction.scan.geometry
    brain = scan.stack > 0
    peak = np.unravel_index(np.nan_to_num(prediction.anomaly).argmax(), brain.shape)
    step = max(1, round(THINNEST_MM / geometry.slice_spacing_mm))
    first = peak[0] % step  # so that the worst place is among the slices kept
    rows, columns = find_crop(brain.any(axis=0))
    box = (slice(first, None, step), rows, columns)
    affine = geometry.stack_affine @ np.array(
        [[1, 0, 0, columns.start], [0, 1, 0, rows.start], [0, 0, step, first], [0, 0, 0, 1]]
    )
    to_voxel = np.linalg.inv(affine)
    stack, lesion = scan.stack[box].astype(np.float32), scan.lesion
    residual = np.where(brain[box], stack - prediction.reconstruction[box], 0)
    channels = [
        encode_anomaly(prediction.anomaly[box], prediction.threshold),
        np.clip(np.rint(residual * RESIDUAL_STEPS) + 128, 0, 255),
        np.zeros(stack.shape) if lesion is None else 255 * lesion[box],
    ]
    places = [
        (region["number"], to_voxel @ [*(region[f"peak_{axis}_mm"] for axis in "xyz"), 1])
        for region in describe_regions(prediction)
    ]
    return {
        "shape": list(stack.shape),
        "spacing_mm": [geometry.pixel_mm, geometry.pixel_mm, geometry.slice_spacing_mm * step],
        "affine": affine[:3].round(4).tolist(),
        "slices": [name_slice(geometry, place) for place in range(first, len(brain), step)],
        "threshold": prediction.threshold,
        "lesion": lesion is not None and bool(lesion.any()),
        "regions": [{"number": number, "voxel": voxel[:3].round(1).tolist()} for number, voxel in places],
        "start": [int(peak[2] - columns.start), int(peak[1] - rows.start), int((peak[0] - first) // step)],
        "tiles": TILES,
        "scan": encode_picture(lay_out(np.rint(255 * stack)), quality=QUALITY),
        "coded": encode_picture(np.stack([lay_out(channel) for channel in channels], axis=-1), lossless=True),
    }


def encode_anomaly(anomaly: np.ndarray, threshold: float) -> np.ndarray:
    """Codes 0 to 255 of an anomaly map of any shape: 0 for NaN, then rising with the anomaly's logarithm.

    What is at or above the threshold has a code of at least 2 - LEAST_DOUBLINGS * CODES_PER_DOUBLING, and nothing else.
    """
    doublings = np.log2(np.maximum(np.nan_to_num(anomaly), 1e-9) / threshold)
    border = 2 - LEAST_DOUBLINGS * CODES_PER_DOUBLING
    codes = np.floor(doublings * CODES_PER_DOUBLING) + border  # in this order: the threshold's doublings are 0 exactly
    return np.where(np.isfinite(anomaly), np.clip(codes, 1, 255), 0)


def lay_out(volume: np.ndarray) -> np.ndarray:
    """A mosaic (rows, columns) of the slices of (n, H, W), each upside down, so that the nose is up."""
    n, tall, wide = volume.shape
    padded = np.zeros((-(-n // TILES) * TILES, tall, wide), np.uint8)
    padded[:n] = volume[:, ::-1]
    return padded.reshape(-1, TILES, tall, wide).swapaxes(1, 2).reshape(-1, TILES * wide)


def encode_picture(pixels: np.ndarray, **options) -> str:
    """A picture (H, W) or (H, W, 3) uint8 as a data URL of WebP."""
    packed = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).convert("RGB").save(packed, "WEBP", method=EFFORT, **options)
    return make_url("image/webp", packed.getvalue())


def count_bytes(packed: dict) -> int:
    """About how much a page grows by this viewer."""
    return len(packed["scan"]) + len(packed["coded"])


class Viewers:
    """The packed scans of a page, as many as it holds; flagged scans stay before others, then high scores."""

    def __init__(self, most_bytes: int = PAGE_BYTES):
        self.most_bytes = most_bytes
        self._kept: dict[tuple[str, str], tuple[tuple[bool, float], int, Path]] = {}  # rank, bytes, file
        self._total = 0  # bytes of those; added up for each scan anew, 100,000 took more than ten minutes
        self._lowest = (False, -math.inf)  # rank of the last one that did not fit

    def add(self, row: dict, size: int, path: Path) -> None:
        """Add a scan by its row, packed in a JSON file of `count_bytes` size; files that do not fit are deleted."""
        rank = (row["flagged"], row["score"])
        if rank < self._lowest:
            path.unlink(missing_ok=True)
            return
        self._kept[row["label"], row["scan"]] = rank, size, path
        self._total += size
        while self._total > self.most_bytes and len(self._kept) > 1:
            key = min(self._kept, key=lambda key: self._kept[key][0])
            self._lowest, size, path = self._kept.pop(key)
            path.unlink(missing_ok=True)
            self._total -= size

    def read(self) -> dict[tuple[str, str], dict]:
        """{(label, scan): what `pack_scan` gave} of those that fit."""
        return {key: json.loads(path.read_text()) for key, (_, _, path) in self._kept.items()}
