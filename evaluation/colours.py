"""The colours of an anomaly map, one scale in panels, montages, the viewer and NIfTI headers.

The scale goes from LOWEST to HIGHEST times the calibrated threshold, a step of lightness each time the anomaly doubles,
so that what is just above the threshold and what is far above it can both be told apart. Below LOWEST nothing is laid
over the scan. The border of what is flagged is white, a known lesion's sky blue, what was not scored grey.
"""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap

# In three scans, 95 % of a painted lesion lay below 7, 16 and 19 times the threshold
LOWEST, HIGHEST = 0.5, 16.0  # times the threshold
DOUBLINGS = np.log2(HIGHEST / LOWEST)
# Rises in lightness, so it reads in grey and for the colour-blind; without the dark end, which hides the scan
ANOMALY_COLOURS = ListedColormap(matplotlib.colormaps["inferno"](np.linspace(0.3, 1, 256)), "inferno from 0.3")
STEEPNESS, OPAQUEST = 2.25, 0.85  # opacity gained from the scale's lowest to its highest; the most it reaches
RESIDUAL_COLOURS = matplotlib.colormaps["PuOr_r"].with_extremes(bad="0.5")
RESIDUAL_TOP = 0.3  # of full intensity
NOT_SCORED = 0.5  # grey
BORDER_COLOUR, LESION_COLOUR = "#FFFFFF", "#56B4E9"


def place_on_scale(anomaly: np.ndarray, threshold: float) -> np.ndarray:
    """Where on the colour scale an anomaly map of any shape lies: 0 at or below its lowest end and for NaN, to 1."""
    multiple = np.maximum(np.nan_to_num(anomaly) / threshold, LOWEST)
    return np.clip(np.log2(multiple / LOWEST) / DOUBLINGS, 0, 1)


def overlay(slice_: np.ndarray, anomaly: np.ndarray, threshold: float) -> np.ndarray:
    """The anomaly map laid over slices, both (..., H, W), as RGB (..., H, W, 3) in [0, 1]; strongest where highest."""
    share = place_on_scale(anomaly, threshold)
    grey = np.repeat(slice_.astype(np.float32)[..., None], 3, axis=-1)
    opacity = np.clip(STEEPNESS * share, 0, OPAQUEST)[..., None]
    mixed = grey * (1 - opacity) + ANOMALY_COLOURS(share)[..., :3] * opacity
    return np.where(np.isfinite(anomaly)[..., None], mixed, NOT_SCORED)


def list_ticks(threshold: float) -> list[float]:
    """The anomaly at the scale's ends and at each doubling between them."""
    return [threshold * LOWEST * 2**step for step in range(round(DOUBLINGS) + 1)]
