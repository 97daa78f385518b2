"""Measure detection at home and on other scanners, with the calibration a model has and with one of the scanner itself.

Takes training runs and a folder of sets, each `<set>/{val,test}/{normal,abnormal}` of slices as preprocess_oasis.py
wrote them. Sets with val/normal are measured on these with painted lesions ("dev", to choose by: benchmarks/lesions.py)
and, with --test, on their test scans; sets of abnormal test scans alone (real lesions) are measured as they are.
"own" is the run's calibration, "anew" one on the set's validation scans, "adapted" that after --steps of training on
them, as training/calibrate.py does; on dev, each half of the subjects is taken for the other half. Prints a table and
one JSON line last. Where a set has a lesions.csv, as evaluate.py takes it, the figures by kind are in that line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.interrupts import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()  # while the rest is imported

import numpy as np
import torch
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score
from tqdm import tqdm

from benchmarks.gallery import Gallery
from benchmarks.lesions import VOLUME_ML, paint_lesion
from common.cli import DataError, Parser, bounded, run_script
from evaluation.metrics import (
    VOLUME_BINS,
    VoxelCounts,
    count_marked,
    count_voxels,
    dice,
    list_lesions,
    measure_detectability,
    name_volume,
    rate,
)
from evaluation.predictor import Prediction, Predictor
from evaluation.results import LESION_VOXELS
from evaluation.test_set import read_kinds
from models.checkpoint import load_checkpoint, save_checkpoint
from preprocessing.layouts import CONTRAST
from preprocessing.store import LoadedScan, StoredScan, list_scans
from training.adaptation import STEPS, adapt, halve

FIGURES = ("voxel_ap", "scan_ap", "best_dice", "dice", "slice_auroc", "scan_auroc")
RATES = (0.05, 0.1)  # false-positive rates asked for
EXAMPLE = "example:\n  python benchmarks/detection.py runs/dae --sets Dataset/benchmark"


@dataclass(frozen=True)
class Part:
    """Scans to measure, and the healthy scans to calibrate on where they are measured "anew" (empty: never)."""

    scans: list[LoadedScan]
    healthy: list[StoredScan]


def read_sets(folder: Path, copies: int, test: bool) -> Iterator[tuple[str, list[Part]]]:
    """(name, parts) of each set in the folder: "ixi dev" in two halves of its subjects, "ixi test" in one."""
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        healthy = list(list_scans(place / "val" / "normal"))
        tested = [scan.load() for scan in list_scans(place / "test")] if test or not healthy else []
        if healthy:
            yield f"{place.name} dev", pair_halves(healthy, copies)
        if tested:
            yield f"{place.name} test", [Part(tested, healthy)]


def shrink_brain(scan: LoadedScan) -> LoadedScan:
    """The scan as another tool would strip it: its brain a pixel smaller all round."""
    brain = ndimage.binary_erosion(scan.stack > 0, np.ones((1, 3, 3)))
    lesion = None if scan.lesion is None else scan.lesion & brain
    return replace(scan, stack=np.where(brain, scan.stack, 0), lesion=lesion)


def pair_halves(healthy: list[StoredScan], copies: int) -> list[Part]:
    """Two parts, all scans of a subject in one: each half with its painted copies, and the other to calibrate on."""
    halves, numbers = halve(healthy), {scan.folder: number for number, scan in enumerate(healthy)}
    parts = []
    for half, other in (halves, halves[::-1]):
        scans = []
        for stored in half:
            scans += [loaded := stored.load(), *paint(loaded, numbers[stored.folder], copies)]
        parts.append(Part(scans, other))
    return parts


def paint(scan: LoadedScan, number: int, copies: int) -> list[LoadedScan]:
    """So many copies of a healthy scan with a lesion each, the same ones each time."""
    return [paint_lesion(scan, np.random.default_rng([number, copy]))[0] for copy in range(copies)]


def adapt_predictor(run: Path, scans: list[StoredScan], steps: int, device: torch.device) -> Predictor:
    """The predictor of a run, adapted to these healthy scans (0 steps: not) and calibrated on them."""
    content = adapt(load_checkpoint(run / "model.pt"), scans, steps, device, quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "model.pt", content)
        return Predictor.load(Path(folder) / "model.pt", device)


class Tally:
    """Counts of predictions, pooled over parts that may each have a calibration of their own."""

    def __init__(self, kinds: dict[str, str]):
        self.kinds, self.lesions = kinds, []
        self.voxels, self.scan_aps, self.slices, self.scans, self.p_values = VoxelCounts(), [], [], [], []
        self.marked = []  # (what `count_marked` gives, subject) of each scan

    def add(self, prediction: Prediction) -> None:
        scan, anomaly = prediction.scan, prediction.anomaly
        inside = np.isfinite(anomaly)
        lesion = np.zeros(inside.shape, bool) if scan.lesion is None else scan.lesion
        self.voxels.add(scan.subject, count_voxels(anomaly[inside], lesion[inside]))
        self.marked.append((count_marked(prediction.marked, lesion & inside), scan.subject))
        abnormal = scan.label == "abnormal"
        if abnormal and lesion[inside].any():
            self.scan_aps.append(average_precision_score(lesion[inside], anomaly[inside]))
            painted = scan.name.rpartition("_")[2]
            kind = painted if painted in VOLUME_ML else self.kinds.get(CONTRAST.sub("", scan.name))
            who = {"label": scan.label, "scan": scan.name, "subject": scan.subject, "kind": kind}
            found = list_lesions(lesion, anomaly, prediction.marked, scan.geometry.sampling_mm)
            self.lesions += [who | one for one in found]
        self.scans.append((abnormal, prediction.scan_row["score"]))
        if not abnormal:
            self.p_values.append(prediction.scan_row["p_value"])
        for row in prediction.slice_rows:
            holds = abnormal and row["lesion_voxels"] >= LESION_VOXELS
            if holds or not abnormal:
                self.slices.append((holds, row["score"]))

    def measure(self) -> dict:
        """All FIGURES that can be taken, and recall and Dice of the lesions by kind and by volume."""
        figures = {}
        if self.voxels.hold_lesions():
            voxels = self.voxels.figures()
            figures = {name: voxels[name]["value"] for name in ("voxel_ap", "best_dice")}
            figures["scan_ap"] = float(np.mean(self.scan_aps))
            figures["dice"] = dice(*zip(*self.marked, strict=True))["value"]
            kinds = sorted({lesion["kind"] for lesion in self.lesions if lesion["kind"]})
            figures["by_kind"] = measure_detectability(self.lesions, lambda lesion: lesion["kind"], kinds)
            figures["by_volume"] = measure_detectability(self.lesions, name_volume, VOLUME_BINS)
        for level, rows in (("slice", self.slices), ("scan", self.scans)):
            labels, scores = zip(*rows, strict=True)
            if any(labels) and not all(labels):
                figures[f"{level}_auroc"] = float(roc_auc_score(labels, scores))
        return figures

    def count_false_positives(self, asked: float) -> dict | None:
        """How many normal scans were flagged at this rate, with the exact 95 % interval."""
        return rate([p_value <= asked for p_value in self.p_values]) if self.p_values else None


@dataclass(frozen=True)
class Benchmark:
    """What runs are measured on.

    sets     (name, parts) of each; kinds of lesions by set, {scan: kind}, where they are known
    steps    of training in "adapted"
    gallery  keeps what goes wrong; None: nothing is kept
    """

    sets: list[tuple[str, list[Part]]]
    kinds: dict[str, dict[str, str]]
    steps: int
    device: torch.device
    gallery: Gallery | None

    def measure(self, run: Path) -> dict[str, dict]:
        """Print a row for each set and calibration; {"set, calibration": figures}."""
        table = {}
        for name, parts in self.sets:
            whole = all(part.healthy for part in parts)
            for calibration in ("own", "anew", "adapted") if whole else ("own",):
                tally = self._predict(run, name, parts, calibration)
                figures = tally.measure()
                cells = "".join(f"{figures[key]:>12.3f}" if key in figures else f"{'':12}" for key in FIGURES)
                for asked in RATES:
                    count = figures[f"false_positives_{asked:g}"] = tally.count_false_positives(asked)
                    if count:
                        cells += f"  {count['flagged']}/{count['scans']} ({count['low']:.2f}-{count['high']:.2f})"
                table[f"{name}, {calibration}"] = figures
                print(f"{run.name:24}{name:24}{calibration:9}{cells}", flush=True)
        return table

    def _predict(self, run: Path, name: str, parts: list[Part], calibration: str) -> Tally:
        tally = Tally(self.kinds.get(name.split()[0], {}))
        for part in parts:
            if calibration == "own":
                used = Predictor.load(run / "model.pt", self.device)
            else:
                used = adapt_predictor(run, part.healthy, self.steps * (calibration == "adapted"), self.device)
            for scan in tqdm(part.scans, unit="scan", leave=False, disable=None):
                prediction = used.predict(scan, baselines=False)
                tally.add(prediction)
                if self.gallery:
                    self.gallery.add(f"{run.name} on {name}, {calibration}", prediction)
        return tally


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=EXAMPLE)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of train.py")
    parser.add_argument("--sets", type=Path, required=True, help="folder of sets, slices of preprocess_oasis.py")
    parser.add_argument(
        "--copies", type=bounded(int, least=1), default=2, help="painted lesions of each validation scan, one a copy"
    )
    parser.add_argument("--test", action="store_true", help="the test scans as well; look at them when all is chosen")
    parser.add_argument(
        "--shrunk", action="store_true", help="each set also with brains a pixel smaller, as another tool strips them"
    )
    parser.add_argument("--steps", type=bounded(int, least=0), default=STEPS, help="training steps of `adapted`")
    parser.add_argument("--pictures", type=Path, help="folder for a page with the ten worst false positives and misses")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if not args.sets.is_dir():
        raise DataError(f"{args.sets}: no such folder; give --sets the folder that holds the sets")
    kinds = {table.parent.name: read_kinds(table) for table in args.sets.glob("*/lesions.csv")}
    sets = list(read_sets(args.sets, args.copies, args.test))
    if args.shrunk:
        sets += [
            (f"{name} shrunk", [Part([shrink_brain(scan) for scan in part.scans], []) for part in parts])
            for name, parts in sets
        ]
    benchmark = Benchmark(
        sets=sets,
        kinds=kinds,
        steps=args.steps,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        gallery=Gallery() if args.pictures else None,
    )
    heads = "".join(f"{figure.replace('_', ' '):>12}" for figure in FIGURES)
    print(f"{'':57}{heads}  false positives at {' and '.join(map(str, RATES))}")
    figures = {str(run): benchmark.measure(run) for run in args.runs}
    if benchmark.gallery:
        benchmark.gallery.write(args.pictures)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    run_script(main)
