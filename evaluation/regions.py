"""Connected regions of an anomaly map on the scan's own grid, and where in the brain they lie."""

from __future__ import annotations

import nibabel as nib
import numpy as np
from scipy import ndimage

COMMON = 0.2  # what a larger share of healthy scans shows is not worth a look
EXTENT = 0.125  # of its highest anomaly, down to which a region is marked
MIDLINE_MM = 5.0  # a region whose centre is nearer to the middle of the brain is on neither side


def find_regions(anomaly: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """What is marked of a map of any shape, NaN where nothing was scored: (regions int, limits), both of its shape.

    A region is what is connected over faces at or above the threshold; its voxels have its number, from 1, others 0.
    A voxel is marked where the map is at or above its limit: the threshold, and in a region also EXTENT of the region's
    highest value. For the map's smoothing spreads a strong lesion over millimetres of healthy tissue; as PET draws
    tumours down to a share of their maximum (Erdi et al., Cancer 1997).
    """
    values = np.nan_to_num(anomaly)
    regions, count = ndimage.label(values >= threshold)
    within, peaks = regions > 0, np.zeros(count + 1)
    np.maximum.at(peaks, regions[within], values[within])
    limits = np.full(values.shape, threshold, np.float32)
    limits[within] = np.maximum(threshold, EXTENT * peaks)[regions[within]]
    return regions, limits


def list_regions(
    anomaly: np.ndarray, affine: np.ndarray, threshold: float, smallest_ml: float
) -> tuple[list[dict], np.ndarray]:
    """(the marked regions of a map, the largest first; their numbers (I, J, K) int, from 1 in this order, 0 in none).

    The map (I, J, K) is NaN where nothing was scored; affine (4, 4) to scanner mm. Each region with its volume (ml),
    its centre weighted by the anomaly in scanner mm (RAS+), the side of the subject's brain that it is on, its highest
    and mean anomaly, where it is highest, in mm, and its mass: volume times mean of all of it that is at or above the
    threshold, marked or not. Regions under smallest_ml are not listed; they have the numbers after the last one.
    """
    numbers = np.zeros(anomaly.shape, np.int32)
    flagged = anomaly >= threshold  # which NaN is not
    if not flagged.any():
        return [], numbers
    middle = nib.affines.apply_affine(affine, find_middle(np.isfinite(anomaly)))[0]
    box = ndimage.find_objects(flagged.view(np.uint8))[0]  # regions hardly fill a tenth of the grid
    values = np.nan_to_num(anomaly[box])
    connected, limits = find_regions(values, threshold)
    labels = np.where(values >= limits, connected, 0)
    every = np.arange(1, connected.max() + 1)
    voxels, masses = np.bincount(labels.ravel()), ndimage.sum_labels(values, connected, every)
    peaks, means = (measure(values, labels, every) for measure in (ndimage.maximum, ndimage.mean))
    centres, highest = (find(values, labels, every) for find in (ndimage.center_of_mass, ndimage.maximum_position))
    corner, voxel_ml = [side.start for side in box], abs(np.linalg.det(affine[:3, :3])) / 1000
    regions, order = [], np.zeros(len(voxels), np.int32)
    for number, label in enumerate(sorted(every, key=lambda label: -voxels[label]), 1):
        order[label] = number
        volume_ml = voxels[label] * voxel_ml
        if volume_ml < smallest_ml:
            continue
        x, y, z = (float(place) for place in nib.affines.apply_affine(affine, np.add(corner, centres[label - 1])))
        peak_mm = nib.affines.apply_affine(affine, np.add(corner, highest[label - 1]))
        regions.append(
            {
                "volume_ml": float(volume_ml),
                **{"x_mm": x, "y_mm": y, "z_mm": z},
                **{"peak": float(peaks[label - 1]), "mean": float(means[label - 1])},
                "mass": float(masses[label - 1] * voxel_ml),
                "side": name_side(x - middle),
                **{f"peak_{axis}_mm": float(place) for axis, place in zip("xyz", peak_mm, strict=True)},
            }
        )
    numbers[box] = order[labels]
    return regions, numbers


def find_middle(inside: np.ndarray) -> np.ndarray:
    """The mean place (3,) of what is True in (I, J, K), in voxels, without a list of them all."""
    counts = [np.count_nonzero(inside, axis=axes) for axes in ((1, 2), (0, 2), (0, 1))]
    return np.array([np.average(np.arange(len(count)), weights=count) for count in counts])


def name_side(x_mm: float) -> str:
    """left, right or middle, from a distance to the brain's middle that grows to the subject's right."""
    if abs(x_mm) < MIDLINE_MM:
        return "middle"
    return "right" if x_mm > 0 else "left"
