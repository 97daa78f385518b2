"""Detection figures, each with an interval over subjects. Thin over scikit-learn; voxels are counted in histograms.

Intervals are 95 % percentile bootstrap intervals over subjects: a resample weighs every subject by how often it was
drawn, so the slices and voxels of one subject stay together. Resamples work on counts (..., 2, thresholds): how much
outside (0) and within (1) lesions has which score, thresholds falling.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

BIN_BITS = 15  # a bin holds the scores that share all but the last 15 bits: at most 0.4 % wide
RESAMPLES = 2000


def auroc(labels, scores, subjects) -> dict:
    """Area under the ROC curve of (n,) labels (True = abnormal) and scores: {"value", "low", "high"}."""
    return {"value": float(roc_auc_score(labels, scores))} | _interval(
        counted_auroc, tabulate(labels, scores, subjects)
    )


def average_precision(labels, scores, subjects) -> dict:
    """Area under the precision-recall curve, as a step function: {"value", "low", "high"}."""
    table = tabulate(labels, scores, subjects)
    return {"value": float(average_precision_score(labels, scores))} | _interval(counted_average_precision, table)


def tabulate(labels, scores, subjects) -> np.ndarray:
    """(subjects, 2, thresholds) counts by subject, label and score; subjects sorted by name, scores falling."""
    names, whose = np.unique(np.asarray(subjects), return_inverse=True)
    values, place = np.unique(-np.asarray(scores, dtype=float), return_inverse=True)
    table = np.zeros((len(names), 2, len(values)))
    np.add.at(table, (whose, np.asarray(labels, dtype=int), place), 1)
    return table


def draw_weights(subjects: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """(resamples, subjects) how often each subject is drawn in each resample."""
    return np.random.default_rng(seed).multinomial(subjects, np.full(subjects, 1 / subjects), resamples).astype(float)


class VoxelCounts:
    """How many voxels of each subject have which score, within lesions and outside: all that voxel figures need.

    Memory grows with the number of subjects, not of voxels; a score is known to 0.4 %.
    """

    def __init__(self):
        self.counts: dict[str, dict[int, np.ndarray]] = {}

    def add(self, subject: str, scores: np.ndarray, lesion: np.ndarray) -> None:
        """Count voxels: scores (n,) at or above 0, lesion (n,) bool."""
        bins = np.maximum(scores, 0).astype(np.float32).view(np.int32) >> BIN_BITS
        found, place = np.unique(bins, return_inverse=True)
        counts = np.stack([np.bincount(place, w, len(found)) for w in (~lesion, lesion)], axis=1)
        mine = self.counts.setdefault(subject, {})
        for key, count in zip(found.tolist(), counts, strict=True):
            mine[key] = mine.get(key, 0) + count

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """(thresholds (bins,) falling, counts (subjects, 2, bins))."""
        bins = sorted({key for mine in self.counts.values() for key in mine}, reverse=True)
        column = {key: i for i, key in enumerate(bins)}
        table = np.zeros((len(self.counts), 2, len(bins)))
        for row, mine in zip(table, self.counts.values(), strict=True):
            row[:, [column[key] for key in mine]] = np.array(list(mine.values())).T
        return (np.array(bins, dtype=np.int32) << BIN_BITS).view(np.float32), table

    def figures(self, threshold: float | None = None) -> dict:
        """Voxel AP, best Dice (over thresholds, so an upper bound), its threshold, and the prevalence of lesions.

        With a threshold chosen beforehand, also `dice` at that threshold.
        """
        thresholds, table = self.table()
        pooled = table.sum(axis=0)
        figures = {
            "voxel_ap": {"value": float(counted_average_precision(pooled))}
            | _interval(counted_average_precision, table),
            "best_dice": {"value": float(best_dice(pooled))} | _interval(best_dice, table),
            "best_dice_threshold": float(thresholds[counted_dice(pooled).argmax()]),
            "prevalence": float(pooled[1].sum() / pooled.sum()),
        }
        if threshold is not None:
            last = max(0, int((thresholds >= threshold).sum()) - 1)
            figures["dice"] = {"value": float(counted_dice(pooled)[last])}
            figures["dice"] |= _interval(lambda counts: counted_dice(counts)[..., last], table)
        return figures

    def quantile(self, share: float) -> float:
        """The score that this share of all voxels does not exceed."""
        thresholds, table = self.table()
        above = np.cumsum(table.sum(axis=(0, 1)))
        return float(thresholds[np.searchsorted(above, (1 - share) * above[-1])])


def counted_auroc(counts: np.ndarray) -> np.ndarray:
    """(...,) the share of (abnormal, normal) pairs that stand the right way round, ties half; (..., 2, thresholds)."""
    normal, abnormal = counts[..., 0, :], counts[..., 1, :]
    above = np.cumsum(abnormal, axis=-1) - abnormal / 2
    with np.errstate(invalid="ignore"):
        return (normal * above).sum(axis=-1) / (normal.sum(axis=-1) * abnormal.sum(axis=-1))


def counted_average_precision(counts: np.ndarray) -> np.ndarray:
    """(...,) average precision of counts (..., 2, thresholds)."""
    outside, within = np.moveaxis(np.cumsum(counts, axis=-1), -2, 0)
    precision = within / np.maximum(within + outside, 1e-9)
    with np.errstate(invalid="ignore"):
        return (precision * counts[..., 1, :]).sum(axis=-1) / within[..., -1]


def counted_dice(counts: np.ndarray) -> np.ndarray:
    """(..., thresholds) Dice = 2 TP / (flagged + lesion) with everything at or above each threshold flagged."""
    outside, within = np.moveaxis(np.cumsum(counts, axis=-1), -2, 0)
    return 2 * within / np.maximum(within + outside + within[..., -1:], 1e-9)


def best_dice(counts: np.ndarray) -> np.ndarray:
    """(...,) the highest Dice over all thresholds: an upper bound, for it chooses with the labels in sight."""
    return counted_dice(counts).max(axis=-1)


def _interval(counted: Callable, table: np.ndarray) -> dict:
    """{"low", "high"} of a figure over resampled subjects; resamples without one of the labels are left out."""
    weights = draw_weights(len(table))
    flat = table.reshape(len(table), -1)
    values = [counted((part @ flat).reshape(-1, *table.shape[1:])) for part in np.array_split(weights, 40)]
    values = np.concatenate(values)
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, (2.5, 97.5)) if len(values) else (np.nan, np.nan)
    return {"low": float(low), "high": float(high)}
