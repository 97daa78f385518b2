"""What an evaluation keeps of its scans, rows and counts and never voxels, and the figures that it computes of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cli import DataError
from common.files import write_atomically
from evaluation.input_check import explain_misfit
from evaluation.metrics import (
    SMALLEST_LESION_ML,
    VOLUME_BINS,
    VoxelCounts,
    auroc,
    average_precision,
    count_marked,
    count_voxels,
    dice,
    list_lesions,
    measure_detectability,
    name_volume,
    rate,
)
from evaluation.places import describe_regions, name_slice
from evaluation.predictor import DETECTORS, Prediction
from preprocessing.layouts import CONTRAST
from preprocessing.scans import DIAGNOSES, LABELS

LESION_VOXELS = 10  # a slice with fewer lesion voxels on the scan's own grid does not count as abnormal
AGE_EDGES = (30, 45, 60, 75)
AGE_GROUPS = ("under 30", "30 to 44", "45 to 59", "60 to 74", "75 and above")


@dataclass(frozen=True)
class ScanResult:
    """What is kept of a scan, plain values.

    scan, slices, regions  its rows of the tables
    lesions                a row for each known lesion, without its kind
    voxels                 {detector: what `count_voxels` gives}; None where its lesions are not known
    marked                 what `count_marked` gives; None likewise
    worst_slice            in mm and by the file's own index
    warnings               what its file and its misfit warn of
    misfit                 whether it does not fit the calibration
    unscored_share         of the brain's voxels, outside the scored slices; None where it is not recorded
    unscored_lesions_ml    the volumes of the lesions there; None where they are not recorded
    viewer_bytes           about how much a page grows by its viewer
    """

    scan: dict
    slices: list[dict]
    regions: list[dict]
    lesions: list[dict]
    voxels: dict[str, dict] | None
    marked: list[int] | None
    worst_slice: str
    warnings: list[str]
    misfit: bool
    unscored_share: float | None
    unscored_lesions_ml: list[float] | None
    viewer_bytes: int = 0

    @classmethod
    def of(cls, prediction: Prediction, viewer_bytes: int = 0) -> ScanResult:
        """That of a prediction; voxels are counted of the maps that it has."""
        scan, lesions, voxels, marked = prediction.scan, [], None, None
        if scan.lesion is not None:
            voxels = {}
            for name, values in prediction.maps.items():
                brain = np.isfinite(values)
                voxels[name] = count_voxels(values[brain], scan.lesion[brain])
            lesions = list_lesions(scan.lesion, prediction.anomaly, prediction.marked, scan.geometry.sampling_mm)
            marked = count_marked(prediction.marked, scan.lesion & np.isfinite(prediction.anomaly))
        who = {"label": scan.label, "scan": scan.name}
        unscored = scan.unscored_lesions_ml
        return cls(
            scan=prediction.scan_row,
            slices=prediction.slice_rows,
            regions=[who | region for region in describe_regions(prediction)],
            lesions=[who | {"subject": scan.subject, "kind": None} | lesion for lesion in lesions],
            voxels=voxels,
            marked=marked,
            worst_slice=name_slice(scan.geometry, prediction.rank_slices()[0]),
            warnings=[*scan.warnings, *([explain_misfit(prediction.misfit)] if prediction.misfit else [])],
            misfit=bool(prediction.misfit),
            unscored_share=scan.unscored_share,
            unscored_lesions_ml=None if unscored is None else list(unscored),
            viewer_bytes=viewer_bytes,
        )

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_atomically(path, json.dumps(vars(self)).encode())

    @classmethod
    def read(cls, path: Path) -> ScanResult:
        """What `save` wrote. DataError where it is of another version."""
        try:
            return cls(**json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: is not a result of this version; delete it and run the command again") from error


class Results:
    """The rows of slices, scans, regions and lesions, and the voxel counts of each detector.

    kinds  {scan: kind of its lesions}, with or without the scan's contrast (`_T1w`)
    """

    def __init__(self, kinds: dict[str, str]):
        self.kinds = kinds
        self.slices, self.scans, self.regions, self.lesions = [], [], [], []
        self.unscored_shares = []  # of the brains' voxels, of the scans where it is recorded
        self.unscored_lesions = []  # rows with volumes and kinds of lesions outside the scored slices
        self.unrecorded = 0  # scans with a lesion mask of which it is not recorded what lies outside
        self.warnings = {}  # by (label, scan), where there are any
        self.worst_slices = {}  # by (label, scan)
        self.misfits = 0  # scans that do not fit the calibration
        self.voxels = {name: VoxelCounts() for name in DETECTORS}
        self.marked = []  # (what `count_marked` gave, subject) of each scan whose lesions are known

    def add(self, result: ScanResult) -> None:
        row = result.scan
        key = row["label"], row["scan"]
        self.scans.append(row)
        self.slices += result.slices
        self.regions += result.regions
        self.worst_slices[key] = result.worst_slice
        self.misfits += result.misfit
        if result.warnings:
            self.warnings[key] = result.warnings
        if result.unscored_share is not None:
            self.unscored_shares.append(result.unscored_share)
        if result.voxels is None:
            return
        for name, counts in result.voxels.items():
            self.voxels[name].add(row["subject"], counts)
        self.marked.append((result.marked, row["subject"]))
        kind = self.kinds.get(row["scan"]) or self.kinds.get(CONTRAST.sub("", row["scan"]))
        self.lesions += [lesion | {"kind": kind} for lesion in result.lesions]
        holds = any(one["lesion_voxels"] for one in result.slices)
        self.unrecorded += result.unscored_lesions_ml is None and holds
        volumes = [volume for volume in result.unscored_lesions_ml or () if volume >= SMALLEST_LESION_ML]
        who = {"label": row["label"], "scan": row["scan"], "subject": row["subject"], "kind": kind}
        self.unscored_lesions += [who | {"volume_ml": volume} for volume in volumes]

    def list_counted_slices(self) -> list[dict]:
        """The slices that slice metrics are computed on: those with a lesion, and all slices of normal scans.

        Abnormal scans without a lesion mask are left out: which of their slices are abnormal is unknown.
        """
        return [
            row
            for row in self.list_known(self.slices)
            if row["label"] == "normal" or row["lesion_voxels"] >= LESION_VOXELS
        ]

    def list_labelled(self) -> list[dict]:
        """The scans that are known to be normal or abnormal."""
        return [row for row in self.scans if row["label"] in DIAGNOSES]

    def list_known(self, rows: list[dict]) -> list[dict]:
        """Those rows of slices or scans whose scan has a lesion mask, or is normal."""
        unknown = {(row["label"], row["scan"]) for row in self.scans if not row["lesion_known"]}
        return [row for row in rows if (row["label"], row["scan"]) not in unknown]

    def name_unknown(self) -> list[str]:
        """The abnormal scans whose lesions are not known."""
        return [row["scan"] for row in self.scans if row["label"] == "abnormal" and not row["lesion_known"]]

    def count(self) -> dict:
        """How many scans of each label, slices, subjects and lesions there are; `unlabelled` only where some are."""
        counts = {label: sum(row["label"] == label for row in self.scans) for label in LABELS}
        counts = {label: count for label, count in counts.items() if count or label in DIAGNOSES}
        subjects = {row["subject"] for row in self.scans}
        unknown = {"without_lesion_mask": len(self.name_unknown()), "unlike_calibration": self.misfits}
        return counts | {"slices": len(self.slices), "subjects": len(subjects), "lesions": len(self.lesions)} | unknown

    def measure(self, quiet: bool) -> dict[str, dict]:
        """All figures by detector, each with its sample sizes."""
        bar = tqdm(DETECTORS, desc="measuring", unit="detector", disable=quiet or None)
        return {name: self._measure_detector(name) for name in bar}

    def _measure_detector(self, name: str) -> dict:
        figures = {}
        for level, rows in (("slice", self.list_counted_slices()), ("scan", self.list_labelled())):
            scores, subjects = ([row[key] for row in rows] for key in (name, "subject"))
            labels = [row["label"] == "abnormal" for row in rows]
            if any(labels) and not all(labels):
                sizes = {"subjects": len(set(subjects)), "scans": len({(r["label"], r["scan"]) for r in rows})}
                sizes |= {"slices": len(rows)} if level == "slice" else {}
                figures[f"{level}_auroc"] = auroc(labels, scores, subjects) | sizes
                figures[f"{level}_ap"] = average_precision(labels, scores, subjects) | sizes
        if self.voxels[name].hold_lesions():
            known = self.list_known(self.scans)
            sizes = {"subjects": len({row["subject"] for row in known}), "slices": len(self.list_known(self.slices))}
            sizes |= {"lesions": len(self.lesions), "scans": len(known)}
            voxels = self.voxels[name].figures()
            if name == "score":
                voxels["dice"] = dice(*zip(*self.marked, strict=True))
            figures |= {key: value | sizes if isinstance(value, dict) else value for key, value in voxels.items()}
        return figures

    def describe_coverage(self) -> dict:
        """{"unscored_share", "scans", "lesions", "unrecorded"}: of the brain's voxels, the share outside the scored
        slices (mean; None where it is not recorded) of how many scans; how many lesions lie there; of how many scans
        with a lesion that is not recorded."""
        share = float(np.mean(self.unscored_shares)) if self.unscored_shares else None
        counts = {"lesions": len(self.unscored_lesions), "unrecorded": self.unrecorded}
        return {"unscored_share": share, "scans": len(self.unscored_shares)} | counts

    def measure_lesions(self) -> dict[str, list[dict]]:
        """Recall and Dice of lesions by volume and, where known, by kind."""
        lesions, unscored = self.lesions, self.unscored_lesions
        kinds = sorted({row["kind"] for row in [*lesions, *unscored] if row["kind"]})
        by = {"volume": measure_detectability(lesions, name_volume, VOLUME_BINS, unscored)}
        by["kind"] = measure_detectability(lesions, lambda row: row["kind"], kinds, unscored)
        return {what: groups for what, groups in by.items() if groups}

    def count_flagged(self) -> dict:
        """How many scans were flagged, by label, and of the normal ones by sex and age group."""
        flagged = {label: [row["flagged"] for row in self.scans if row["label"] == label] for label in LABELS}
        counts = {label: rate(flags) for label, flags in flagged.items() if flags}
        normal = [row for row in self.scans if row["label"] == "normal"]
        for what, name, groups in (("sex", name_sex, ("F", "M")), ("age", name_age, AGE_GROUPS)):
            by = {group: [row["flagged"] for row in normal if name(row) == group] for group in groups}
            if any(by.values()):
                counts[f"normal_by_{what}"] = {group: rate(flags) for group, flags in by.items() if flags}
        return counts


def name_sex(row: dict) -> str | None:
    return row["sex"]


def name_age(row: dict) -> str | None:
    return None if row["age"] is None else AGE_GROUPS[int(np.searchsorted(AGE_EDGES, row["age"], side="right"))]
