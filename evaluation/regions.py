"""Connected regions of an anomaly map on the scan's own grid, and where in the brain they lie."""

from __future__ import annotations

import nibabel as nib
import numpy as np
from scipy import ndimage
from skimage.measure import regionprops

COMMON = 0.2  # what a larger share of healthy scans shows is not worth a look
MIDLINE_MM = 5.0  # a region whose centre is nearer to the middle of the brain is on neither side


def list_regions(anomaly: np.ndarray, affine: np.ndarray, threshold: float, smallest_ml: float) -> list[dict]:
    """Regions of a map (I, J, K), NaN where nothing was scored, at or above the threshold, the largest first.

    affine (4, 4) to scanner mm. Voxels are connected over faces. Each region with its volume (ml), its centre weighted
    by the anomaly in scanner mm (RAS+), the side of the subject's brain that it is on, its highest and mean anomaly,
    and where it is highest, in mm.
    """
    flagged = anomaly >= threshold  # which NaN is not
    if not flagged.any():
        return []
    middle = nib.affines.apply_affine(affine, find_middle(np.isfinite(anomaly)))[0]
    box = ndimage.find_objects(flagged.view(np.uint8))[0]  # regions hardly fill a tenth of the grid
    labels = label_regions(anomaly[box], threshold)
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    regions = []
    for region in regionprops(labels, np.nan_to_num(anomaly[box])):
        volume_ml = region.area * voxel_ml
        if volume_ml < smallest_ml:
            continue
        centre = np.array(region.centroid_weighted) + [side.start for side in box]
        x, y, z = (float(place) for place in nib.affines.apply_affine(affine, centre))
        highest = np.unravel_index(int(region.image_intensity.argmax()), region.image.shape)
        corner = [start + side.start for start, side in zip(region.bbox, box, strict=False)]
        peak_mm = nib.affines.apply_affine(affine, np.add(corner, highest))
        regions.append(
            {
                "volume_ml": float(volume_ml),
                **{"x_mm": x, "y_mm": y, "z_mm": z},
                **{"peak": float(region.intensity_max), "mean": float(region.intensity_mean)},
                "side": name_side(x - middle),
                **{f"peak_{axis}_mm": float(place) for axis, place in zip("xyz", peak_mm, strict=True)},
            }
        )
    return sorted(regions, key=lambda region: -region["volume_ml"])


def label_regions(anomaly: np.ndarray, threshold: float) -> np.ndarray:
    """(I, J, K) int: 1 in the largest region of a map at or above the threshold, 2 in the next, 0 in none."""
    labels, _ = ndimage.label(anomaly >= threshold)  # which NaN is not
    sizes = np.bincount(labels.ravel())
    sizes[0] = labels.size + 1  # what is in none stays 0
    return np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")[labels]


def find_middle(inside: np.ndarray) -> np.ndarray:
    """The mean place (3,) of what is True in (I, J, K), in voxels, without a list of them all."""
    counts = [np.count_nonzero(inside, axis=axes) for axes in ((1, 2), (0, 2), (0, 1))]
    return np.array([np.average(np.arange(len(count)), weights=count) for count in counts])


def name_side(x_mm: float) -> str:
    """left, right or middle, from a distance to the brain's middle that grows to the subject's right."""
    if abs(x_mm) < MIDLINE_MM:
        return "middle"
    return "right" if x_mm > 0 else "left"
