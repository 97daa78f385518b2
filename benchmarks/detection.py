"""Measure detection at home and on other scanners, with the calibration a model has and with one of the scanner itself.

Takes training runs and a folder of sets, each `<set>/{val,test}/{normal,abnormal}` of slices as preprocess_oasis.py
wrote them. Sets with val/normal are measured on these with painted lesions ("dev", to choose by: benchmarks/lesions.py)
and, with --test, on their test scans; sets of abnormal test scans alone (real lesions) are measured as they are.
"own" is the run's calibration; "anew" is one on the set's validation scans: on dev, each half of the subjects is
calibrated on the other half. Prints a table and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from tqdm import tqdm

from benchmarks.lesions import paint_lesion
from common.cli import DataError, HelpFormatter, bounded, run_script
from evaluation.metrics import VoxelCounts, rate
from evaluation.predictor import Prediction, Predictor
from evaluation.results import LESION_VOXELS
from models.anomaly import reconstruct
from models.calibration import Calibration
from preprocessing.store import LoadedScan, list_scans
from preprocessing.subjects import key_subject

FIGURES = ("voxel_ap", "scan_ap", "best_dice", "dice", "slice_auroc", "scan_auroc")
RATES = (0.05, 0.1)  # false-positive rates asked for
EXAMPLE = "example:\n  python benchmarks/detection.py runs/dae --sets Dataset/benchmark"


@dataclass(frozen=True)
class Part:
    """Scans to measure, and the healthy scans to calibrate on where they are measured "anew" (empty: never)."""

    scans: list[LoadedScan]
    healthy: list[LoadedScan]


def read_sets(folder: Path, copies: int, test: bool) -> Iterator[tuple[str, list[Part]]]:
    """(name, parts) of each set in the folder: "ixi dev" in two halves of its subjects, "ixi test" in one."""
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        healthy = [scan.load() for scan in list_scans(place / "val" / "normal")]
        tested = [scan.load() for scan in list_scans(place / "test")] if test or not healthy else []
        if healthy:
            yield f"{place.name} dev", halve(healthy, copies)
        if tested:
            yield f"{place.name} test", [Part(tested, healthy)]


def halve(healthy: list[LoadedScan], copies: int) -> list[Part]:
    """Two parts, all scans of a subject in one: each half with its painted copies, and the other to calibrate on."""
    subjects = sorted({key_subject(scan.subject) for scan in healthy})
    second = set(subjects[1::2])
    halves, painted = ([], []), ([], [])
    for number, scan in enumerate(healthy):
        side = key_subject(scan.subject) in second
        halves[side].append(scan)
        painted[side].extend([scan, *paint(scan, number, copies)])
    return [Part(painted[side], halves[1 - side]) for side in (0, 1)]


def paint(scan: LoadedScan, number: int, copies: int) -> list[LoadedScan]:
    """So many copies of a healthy scan with a lesion each, the same ones each time."""
    return [paint_lesion(scan, np.random.default_rng([number, copy]))[0] for copy in range(copies)]


def calibrate(predictor: Predictor, scans: list[LoadedScan]) -> Predictor:
    """The predictor with a calibration on these healthy scans."""
    compared = []
    for scan in scans:
        stack, sampling_mm = torch.from_numpy(scan.stack).float(), scan.geometry.sampling_mm
        reconstruction = reconstruct(predictor.model, stack, sampling_mm[0], precision=predictor.precision)
        compared.append((stack.to(reconstruction.device), reconstruction, sampling_mm))
    return replace(predictor, calibration=Calibration.fit(compared))


class Tally:
    """Counts of predictions, pooled over parts that may each have a calibration of their own."""

    def __init__(self):
        self.voxels, self.scan_aps, self.slices, self.scans, self.p_values = VoxelCounts(), [], [], [], []
        self.flagged = np.zeros(3)  # voxels at or above the threshold: within lesions, in all; lesion voxels

    def add(self, prediction: Prediction) -> None:
        scan, anomaly = prediction.scan, prediction.anomaly
        inside = np.isfinite(anomaly)
        lesion = np.zeros(inside.shape, bool) if scan.lesion is None else scan.lesion
        self.voxels.add(scan.subject, anomaly[inside], lesion[inside])
        above = anomaly[inside] >= prediction.threshold
        self.flagged += ((above & lesion[inside]).sum(), above.sum(), lesion[inside].sum())
        abnormal = scan.label == "abnormal"
        if abnormal and lesion[inside].any():
            self.scan_aps.append(average_precision_score(lesion[inside], anomaly[inside]))
        self.scans.append((abnormal, prediction.scan_row["score"]))
        if not abnormal:
            self.p_values.append(prediction.scan_row["p_value"])
        for row in prediction.slice_rows:
            holds = abnormal and row["lesion_voxels"] >= LESION_VOXELS
            if holds or not abnormal:
                self.slices.append((holds, row["score"]))

    def measure(self) -> dict[str, float]:
        """All FIGURES that can be taken."""
        figures = {}
        if self.voxels.hold_lesions():
            voxels = self.voxels.figures()
            figures = {name: voxels[name]["value"] for name in ("voxel_ap", "best_dice")}
            figures["scan_ap"] = float(np.mean(self.scan_aps))
            figures["dice"] = float(2 * self.flagged[0] / (self.flagged[1] + self.flagged[2]))
        for level, rows in (("slice", self.slices), ("scan", self.scans)):
            labels, scores = zip(*rows, strict=True)
            if any(labels) and not all(labels):
                figures[f"{level}_auroc"] = float(roc_auc_score(labels, scores))
        return figures

    def count_false_positives(self, asked: float) -> dict | None:
        """How many normal scans were flagged at this rate, with the exact 95 % interval."""
        return rate([p_value <= asked for p_value in self.p_values]) if self.p_values else None


def predict(predictor: Predictor, parts: Iterable[Part], anew: bool) -> Tally:
    tally = Tally()
    for part in parts:
        used = calibrate(predictor, part.healthy) if anew else predictor
        for scan in tqdm(part.scans, unit="scan", leave=False, disable=None):
            tally.add(used.predict(scan, baselines=False))
    return tally


def measure_run(run: Path, sets: list[tuple[str, list[Part]]], device: torch.device) -> dict:
    """Print a row for each set and calibration; {"set, calibration": figures}."""
    predictor, table = Predictor.load(run / "model.pt", device), {}
    for name, parts in sets:
        for calibration in ("own", "anew") if all(part.healthy for part in parts) else ("own",):
            tally = predict(predictor, parts, calibration == "anew")
            figures = tally.measure()
            cells = "".join(f"{figures[key]:>12.3f}" if key in figures else f"{'':12}" for key in FIGURES)
            for asked in RATES:
                count = tally.count_false_positives(asked)
                figures[f"false_positives_{asked:g}"] = count
                cells += (
                    f"  {count['flagged']}/{count['scans']} ({count['low']:.2f}-{count['high']:.2f})" if count else ""
                )
            table[f"{name}, {calibration}"] = figures
            print(f"{run.name:24}{name:16}{calibration:6}{cells}", flush=True)
    return table


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=EXAMPLE, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of train.py")
    parser.add_argument("--sets", type=Path, required=True, help="folder of sets, slices of preprocess_oasis.py")
    parser.add_argument(
        "--copies", type=bounded(int, least=1), default=2, help="painted lesions of each validation scan, one a copy"
    )
    parser.add_argument("--test", action="store_true", help="the test scans as well; look at them when all is chosen")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if not args.sets.is_dir():
        raise DataError(f"{args.sets}: no such folder; give --sets the folder that holds the sets")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sets = list(read_sets(args.sets, args.copies, args.test))
    heads = "".join(f"{figure.replace('_', ' '):>12}" for figure in FIGURES)
    print(f"{'':46}{heads}  false positives at {' and '.join(map(str, RATES))}")
    print(json.dumps({str(run): measure_run(run, sets, device) for run in args.runs}))
    return 0


if __name__ == "__main__":
    run_script(main)
