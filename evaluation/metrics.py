"""Detection figures, each with an interval over subjects. Thin over scikit-learn; voxels are counted in histograms.

A figure is {"value", "low", "high"}. Intervals are 95 % percentile bootstrap intervals over subjects: a resample weighs
every subject by how often it was drawn, so the slices, lesions and voxels of one subject stay together. Shares of
lesions and of scans have exact intervals, which do not shrink to nothing at 0 and 1.

Resamples work on counts (..., 2, thresholds): how much outside (0) and within (1) lesions has which score, thresholds
falling. A table of such counts, a row a subject, is sparse, so that 100,000 scans fit into memory: a row is
(2 * thresholds,), outside first.

A single scan needs no figures, so what takes long to import is imported where a figure is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage, sparse

BIN_BITS = 15  # a bin holds the scores that share all but the last 15 bits: at most 0.4 % wide
RESAMPLES = 2000
RESAMPLES_AT_ONCE = 50
MOST_STEPS = 10_000  # of the scores in an interval's resamples: more would be slow, and tell nothing more
FOUND_SHARE = 0.1  # of a lesion marked makes it found; less is had by chance in a large one
SMALLEST_LESION_ML = 0.05
VOLUME_EDGES_ML = (0.3, 1.0, 3.0, 10.0)
VOLUME_BINS = ["under 0.3 ml", "0.3–1 ml", "1–3 ml", "3–10 ml", "10 ml and more"]


def auroc(labels, scores, subjects) -> dict:
    """Area under the ROC curve of (n,) labels (True = abnormal) and scores: {"value", "low", "high"}."""
    from sklearn.metrics import roc_auc_score

    interval = _intervals({"": _pair(counted_auroc)}, tabulate(labels, scores, subjects))[""]
    return {"value": float(roc_auc_score(labels, scores))} | interval


def average_precision(labels, scores, subjects) -> dict:
    """Area under the precision-recall curve, as a step function: {"value", "low", "high"}."""
    from sklearn.metrics import average_precision_score

    interval = _intervals({"": _pair(counted_average_precision)}, tabulate(labels, scores, subjects))[""]
    return {"value": float(average_precision_score(labels, scores))} | interval


def mean(values, subjects) -> dict:
    """Mean of (n,) values, such as the share of lesions found: {"value", "low", "high"}."""
    names, whose = np.unique(np.asarray(subjects), return_inverse=True)
    values = np.asarray(values, dtype=float)
    table = np.stack([np.bincount(whose, values, len(names)), np.bincount(whose, minlength=len(names))], axis=1)
    interval = _intervals({"": lambda sums: sums[..., 0] / np.maximum(sums[..., 1], 1e-9)}, table)[""]
    return {"value": float(values.mean())} | interval


def dice(counts: Sequence[Sequence[int]], subjects) -> dict:
    """Dice over all voxels of scans, each with what `count_marked` gives: {"value", "low", "high"}."""
    names, whose = np.unique(np.asarray(subjects), return_inverse=True)
    table = np.zeros((len(names), 3))
    np.add.at(table, whose, np.asarray(counts, dtype=float))

    def pool(sums: np.ndarray) -> np.ndarray:
        both, marked, lesion = np.moveaxis(sums, -1, 0)
        return 2 * both / np.maximum(marked + lesion, 1e-9)

    return {"value": float(pool(table.sum(axis=0)))} | _intervals({"": pool}, table)[""]


def share(flags: list[bool]) -> dict:
    """How often something is True, with its exact (Clopper-Pearson) 95 % interval: {"value", "low", "high"}."""
    from scipy.stats import binomtest

    interval = binomtest(sum(flags), len(flags)).proportion_ci(method="exact")
    return {"value": sum(flags) / len(flags), "low": interval.low, "high": interval.high}


def rate(flags: list[bool]) -> dict:
    """How many scans are flagged, with the interval of `share`: {"flagged", "scans", "low", "high"}."""
    measured = share(flags)
    return {"flagged": sum(flags), "scans": len(flags), "low": measured["low"], "high": measured["high"]}


def tabulate(labels, scores, subjects) -> sparse.csr_array:
    """(subjects, 2 * thresholds) counts by subject, label and score; subjects sorted by name, scores falling.

    Of more than MOST_STEPS different scores those next to each other are counted as one.
    """
    names, whose = np.unique(np.asarray(subjects), return_inverse=True)
    values, place = np.unique(-np.asarray(scores, dtype=float), return_inverse=True)
    steps = min(len(values), MOST_STEPS)
    column = np.asarray(labels, dtype=int) * steps + place * steps // len(values)
    return sparse.csr_array((np.ones(len(whose)), (whose, column)), (len(names), 2 * steps))


def draw_weights(subjects: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """(resamples, subjects) how often each subject is drawn in each resample."""
    return generator.multinomial(subjects, np.full(subjects, 1 / subjects), resamples).astype(float)


def count_voxels(scores: np.ndarray, lesion: np.ndarray) -> dict[str, list[int]]:
    """{bin of scores: how many voxels have one, [outside, within] lesions}, of scores (n,) >= 0 and lesion (n,) bool.

    Bins are the keys of `VoxelCounts`, as text: it goes through JSON.
    """
    bins = np.maximum(scores, 0).astype(np.float32).view(np.int32) >> BIN_BITS
    most = bins.max(initial=0) + 1
    counts = np.stack([np.bincount(bins[lesion == within], minlength=most) for within in (False, True)], axis=1)
    found = np.flatnonzero(counts.any(axis=1))
    return dict(zip(map(str, found.tolist()), counts[found].tolist(), strict=True))


def count_marked(marked: np.ndarray, lesion: np.ndarray) -> list[int]:
    """[voxels both marked and in a lesion, marked, in a lesion], of two arrays of bool."""
    return [int((marked & lesion).sum()), int(marked.sum()), int(lesion.sum())]


class VoxelCounts:
    """How many voxels of each subject have which score, within lesions and outside: all that voxel figures need.

    Memory grows with the number of scans, not of voxels; a score is known to 0.4 %.
    """

    def __init__(self):
        self.rows: dict[str, int] = {}  # of the table, by subject
        self.scans: list[tuple[int, np.ndarray, np.ndarray]] = []  # (row, bins (n,), counts (n, 2)) of each

    def add(self, subject: str, counts: dict[str, list[int]]) -> None:
        """Add what `count_voxels` counted in a scan of this subject."""
        row = self.rows.setdefault(subject, len(self.rows))
        values = np.array(list(counts.values()), dtype=np.int32).reshape(-1, 2)
        self.scans.append((row, np.array([int(key) for key in counts], dtype=np.int32), values))

    def hold_lesions(self) -> bool:
        return any(counts[:, 1].any() for _, _, counts in self.scans)

    def table(self) -> tuple[np.ndarray, sparse.csr_array]:
        """(thresholds (bins,) falling, counts (subjects, 2 * bins))."""
        rows, bins, counts = zip(*self.scans, strict=True)
        row = np.repeat(rows, [len(one) for one in bins])
        found, column = np.unique(-np.concatenate(bins), return_inverse=True)
        outside, within = np.concatenate(counts).astype(float).T
        both = np.concatenate([outside, within]), (np.tile(row, 2), np.concatenate([column, column + len(found)]))
        return (-found << BIN_BITS).view(np.float32), sparse.csr_array(both, (len(self.rows), 2 * len(found)))

    def figures(self) -> dict:
        """Voxel AP, the Dice of the best threshold, that threshold, and the prevalence of lesions."""
        thresholds, table = self.table()
        pooled = table.sum(axis=0).reshape(2, -1)
        counted = {"voxel_ap": counted_average_precision, "best_dice": best_dice}
        intervals = _intervals({name: _pair(figure) for name, figure in counted.items()}, table)
        return {name: {"value": float(figure(pooled))} | intervals[name] for name, figure in counted.items()} | {
            "best_dice_threshold": float(thresholds[counted_dice(pooled).argmax()]),
            "prevalence": float(pooled[1].sum() / pooled.sum()),
        }

    def dice_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """(thresholds (bins,) falling, Dice (bins,) over all subjects at each)."""
        thresholds, table = self.table()
        return thresholds, counted_dice(table.sum(axis=0).reshape(2, -1))


def counted_auroc(counts: np.ndarray) -> np.ndarray:
    """(...,) the share of (abnormal, normal) pairs in the right order, ties half; (..., 2, thresholds)."""
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
    """(...,) the highest Dice over all thresholds: its threshold is chosen on the test labels."""
    return counted_dice(counts).max(axis=-1)


def list_lesions(
    lesion: np.ndarray, anomaly: np.ndarray, marked: np.ndarray, spacing_mm: tuple[float, float]
) -> list[dict]:
    """The lesions of a mask (n, H, W) bool, and how far what is marked of the anomaly map, both likewise, finds each.

    Parts with at most two pixels between them are one lesion; parts under SMALLEST_LESION_ML are left out. Of each its
    volume (ml); `covered`, the share of it that is marked; `found`, whether that is at least FOUND_SHARE; `dice`
    between it and the marked regions that touch it. spacing_mm: between slices, between pixels.
    """
    touching = np.ones((3, 3, 3))
    lesion = lesion & np.isfinite(anomaly)
    labels, count = ndimage.label(ndimage.binary_dilation(lesion, touching), touching)
    regions, _ = ndimage.label(marked)
    sizes = np.bincount(regions.ravel())
    pixel_ml = spacing_mm[0] * spacing_mm[1] ** 2 / 1000
    lesions = []
    for index in range(1, count + 1):
        within = lesion & (labels == index)
        size, hit = int(within.sum()), int((within & marked).sum())
        if size * pixel_ml < SMALLEST_LESION_ML:
            continue
        touched = np.setdiff1d(regions[within], [0])
        lesions.append(
            {
                "lesion": len(lesions) + 1,
                "volume_ml": size * pixel_ml,
                "covered": hit / size,
                "found": hit >= FOUND_SHARE * size,
                "dice": 2 * hit / (size + int(sizes[touched].sum())),
                "peak": float(anomaly[within].max()),
            }
        )
    return lesions


def measure_detectability(
    lesions: list[dict], by: Callable[[dict], str | None], groups: list[str], unscored: Sequence[dict] = ()
) -> list[dict]:
    """Recall and mean Dice of the lesions of each group that has any; None where none of them was scored.

    unscored  lesions outside the scored slices, counted as `not_scored` and in nothing else
    """
    measured = []
    for group in groups:
        rows = [row for row in lesions if by(row) == group]
        missed = sum(by(row) == group for row in unscored)
        if rows or missed:
            subjects = [row["subject"] for row in rows]
            sizes = {"subjects": len(set(subjects)), "lesions": len(rows), "not_scored": missed}
            sizes["scans"] = len({(row["label"], row["scan"]) for row in rows})
            figures = {
                "recall": share([row["found"] for row in rows]) if rows else None,
                "dice": mean([row["dice"] for row in rows], subjects) if rows else None,
            }
            measured.append({"group": group} | figures | sizes)
    return measured


def name_volume(row: dict) -> str:
    """The bin of VOLUME_EDGES_ML that a lesion's volume falls into."""
    return VOLUME_BINS[int(np.searchsorted(VOLUME_EDGES_ML, row["volume_ml"], side="right"))]


def _pair(figure: Callable) -> Callable:
    """A figure of counts (..., 2, thresholds), taken of rows of a table."""
    return lambda sums: figure(sums.reshape(len(sums), 2, -1))


def _intervals(counted: dict[str, Callable], table: np.ndarray | sparse.csr_array) -> dict[str, dict]:
    """{name: {"low", "high"}} of figures over resampled subjects; resamples where a figure is undefined are left out.

    The same resamples serve all figures of a table (subjects, n), so they are summed up once.
    """
    generator = np.random.default_rng(0)
    values = {name: [] for name in counted}
    for _ in range(0, RESAMPLES, RESAMPLES_AT_ONCE):
        summed = draw_weights(table.shape[0], RESAMPLES_AT_ONCE, generator) @ table
        for name, figure in counted.items():
            values[name].append(figure(summed))
    intervals = {}
    for name, parts in values.items():
        finite = np.concatenate(parts)
        finite = finite[np.isfinite(finite)]
        low, high = np.percentile(finite, (2.5, 97.5)) if len(finite) else (np.nan, np.nan)
        intervals[name] = {"low": float(low), "high": float(high)}
    return intervals
