"""Score test slices by how badly the model reconstructs them, and draw where.

Reads `<data>/{normal,abnormal}` as preprocess_oasis.py wrote them and a run of train.py, and leaves an evaluation
folder: error_maps/*.png, scores.csv (slices), scans.csv, regions.csv, metrics.json, curves, NIfTI maps with --maps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from scipy.stats import binomtest
from tqdm import tqdm

from evaluation.metrics import VoxelCounts, auroc, average_precision
from evaluation.report import draw_curves, draw_error_map, draw_histograms, write_map
from models.anomaly import (
    count_needed,
    find_regions,
    give_p_values,
    map_anomalies,
    map_brightness,
    map_deviation,
    reconstruct,
    score_mse,
    score_scan,
    score_slices,
)
from models.artifacts import write_atomically, write_table
from models.checkpoint import CheckpointError, load_model
from preprocessing.scans import LABELS, DataError
from preprocessing.slices import ScanSlices, check_same_settings, list_scans
from preprocessing.volume import restore_to_grid

LESION_VOXELS = 10  # a slice with fewer lesion voxels on the scan's own grid does not count as abnormal
REGION_COLUMNS = ("label", "scan", "volume_ml", "x_mm", "y_mm", "z_mm", "peak", "mean")
DETECTORS = {
    "score": "anomaly map of the model",
    "mse": "plain reconstruction error",
    "bright": "intensity threshold, bright",
    "dark": "intensity threshold, dark",
    "deviation": "z-score of intensity",
}


@dataclass
class Examined:
    """A scan with all that was made of it; stacks are (n, H, W)."""

    scan: ScanSlices
    stack: np.ndarray
    lesion: np.ndarray | None
    reconstruction: np.ndarray
    maps: dict[str, np.ndarray]  # by detector, NaN outside the brain


class Examiner:
    """Takes a scan's slices to its maps, with one trained model."""

    def __init__(self, model_path: Path, device: torch.device, batch_size: int):
        self.model, content = load_model(model_path, device)
        self.model.to(memory_format=torch.channels_last)
        self.slices = content["slices"]
        self.calibration = content["calibration"]
        self.precision = torch.bfloat16 if content["precision"] == "bf16" else torch.float32
        self.device, self.batch_size = device, batch_size

    def examine(self, scan: ScanSlices) -> Examined:
        stack = scan.read_stack()
        spacing = (scan.record["spacing_mm"][2], scan.record["pixel_mm"])
        reconstruction = reconstruct(self.model, stack, spacing[0], self.device, self.batch_size, self.precision)
        brain = stack > 0
        brightness = map_brightness(stack)
        maps = {
            "score": map_anomalies(stack, reconstruction, spacing, self.calibration),
            "mse": np.where(brain, (stack.astype(np.float32) - reconstruction) ** 2, np.nan),
            "bright": brightness,
            "dark": 1 - brightness,
            "deviation": map_deviation(stack, spacing, self.calibration),
        }
        return Examined(scan, stack, scan.read_lesion(), reconstruction, maps)


def score_examined(examined: Examined, calibration: dict, false_alarms: float) -> tuple[list[dict], dict]:
    """(a row for each slice, a row for the scan); the scan is flagged where its p-value is at most `false_alarms`."""
    scan = examined.scan
    slice_scores = {name: score_slices(values) for name, values in examined.maps.items()}
    slice_scores["mse"] = score_mse(examined.stack, examined.reconstruction)
    who = {"label": scan.label, "scan": scan.name, "subject": scan.subject}
    lesion_voxels = scan.record.get("lesion_voxels") or [0] * len(scan.indices)
    p_values = give_p_values(slice_scores["score"], calibration["slice_scores"].numpy())
    rows = [
        who
        | {"slice": index, "lesion_voxels": lesion_voxels[i], "p_value": float(p_values[i])}
        | {name: float(slice_scores[name][i]) for name in DETECTORS}
        for i, index in enumerate(scan.indices)
    ]
    scan_scores = {name: score_scan(values) for name, values in examined.maps.items()}
    scan_scores["mse"] = float(slice_scores["mse"].mean())
    p_value = float(give_p_values(scan_scores["score"], calibration["scan_scores"].numpy()))
    row = who | {"lesion_known": examined.lesion is not None, "p_value": p_value, "flagged": p_value <= false_alarms}
    return rows, row | {name: scan_scores[name] for name in DETECTORS}


def pick_judged(slices: list[dict], scans: list[dict]) -> list[dict]:
    """The slices that slice figures are about: those that hold a lesion, and all slices of normal scans.

    Where no lesion masks are known, every slice of an abnormal scan counts as abnormal.
    """
    masks_known = all(row["lesion_known"] for row in scans)
    return [
        row for row in slices if row["label"] == "normal" or not masks_known or row["lesion_voxels"] >= LESION_VOXELS
    ]


def measure(judged: list[dict], scans: list[dict], voxels: dict[str, VoxelCounts], threshold: float) -> dict:
    """All figures by detector, from rows of slices and of scans and from counted voxels.

    threshold: the calibrated one of the anomaly map, for the Dice that needs no labels to choose it.
    """
    figures = {}
    for name in DETECTORS:
        figures[name] = {}
        for level, rows in (("slice", judged), ("scan", scans)):
            table = (
                [row["label"] == "abnormal" for row in rows],
                [row[name] for row in rows],
                [row["subject"] for row in rows],
            )
            if any(table[0]) and not all(table[0]):
                figures[name][f"{level}_auroc"] = auroc(*table)
                figures[name][f"{level}_ap"] = average_precision(*table)
        if all(row["lesion_known"] for row in scans) and any(table[0]):
            figures[name] |= voxels[name].figures(threshold if name == "score" else None)
    return figures


def choose_slices(rows: list[dict], count: int) -> list[tuple[str, dict]]:
    """The worst and the median slices of each label, no two of one scan: (name, row) pairs."""
    chosen = []
    for label in LABELS:
        best_of_scan = {}
        for row in sorted((row for row in rows if row["label"] == label), key=lambda row: row["score"]):
            best_of_scan[row["scan"]] = row
        worst = sorted(best_of_scan.values(), key=lambda row: -row["score"])
        ranked = sorted((row for row in rows if row["label"] == label), key=lambda row: row["score"])
        middle = ranked[max(0, len(ranked) // 2 - count // 2) :][:count]
        for kind, picked in (("worst", worst[:count]), ("median", middle)):
            chosen += [(f"{label}_{kind}_{rank}", row) for rank, row in enumerate(picked, 1)]
    return chosen


def evaluate(
    run: Path,
    data: Path,
    out: Path,
    maps: bool,
    panels: int,
    false_alarms: float,
    smallest_ml: float,
    batch_size: int,
    device: torch.device,
) -> int:
    """Evaluate one run on one set of scans; returns the exit code: 0, or 3 where scans were skipped."""
    scans = [scan for label in LABELS for scan in list_scans(data / label)]
    if not scans:
        raise DataError(f"{data}: no slices in normal/ or abnormal/; run preprocessing/preprocess_oasis.py first")
    examiner = Examiner(run / "model.pt", device, batch_size)
    check_same_settings(scans, examiner.slices)
    settings = {
        "model": hashlib.sha256((run / "model.pt").read_bytes()).hexdigest(),
        "data": hashlib.sha256(json.dumps([[s.label, s.name, s.record] for s in scans]).encode()).hexdigest(),
        "maps": maps,
        "panels": panels,
        "false_alarms": false_alarms,
        "smallest_ml": smallest_ml,
    }
    done = out / "metrics.json"
    if done.exists() and (content := json.loads(done.read_text()))["settings"] == settings:
        print(f"{out} holds this evaluation already; delete it to evaluate again")
        print_figures(content)
        return 0
    (out / "error_maps").mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)  # metrics.json is written last and says that the rest is whole
    threshold = float(examiner.calibration["threshold"])
    slice_rows, scan_rows, region_rows, skipped = [], [], [], 0
    voxels = {name: VoxelCounts() for name in DETECTORS}
    for scan in tqdm(scans, desc="evaluating", unit="scan", disable=None):
        try:
            examined = examiner.examine(scan)
        except DataError as error:
            tqdm.write(f"skipped {error}", file=sys.stderr)
            skipped += 1
            continue
        rows, row = score_examined(examined, examiner.calibration, false_alarms)
        slice_rows += rows
        scan_rows.append(row)
        if examined.lesion is not None:
            for name, values in examined.maps.items():
                brain = np.isfinite(values)
                voxels[name].add(scan.subject, values[brain], examined.lesion[brain])
        native, affine = restore_to_grid(examined.maps["score"], scan.record), np.array(scan.record["affine"])
        who = {"label": scan.label, "scan": scan.name}
        region_rows += [who | region for region in find_regions(native, affine, threshold, smallest_ml)]
        if maps:
            write_map(out / "maps" / scan.label / f"{scan.name}_anomaly.nii.gz", native, affine)
    if not scan_rows:
        raise DataError(f"{data}: not one of its {len(scans)} scans could be read; preprocess again")
    write_table(out / "scores.csv", slice_rows)
    write_table(out / "scans.csv", scan_rows)
    write_table(out / "regions.csv", region_rows, REGION_COLUMNS)
    judged = pick_judged(slice_rows, scan_rows)
    figures = measure(judged, scan_rows, voxels, threshold)
    draw_pictures(out, examiner, scans, slice_rows, voxels, panels)
    draw_figures(out, judged, scan_rows)
    counts = {label: sum(row["label"] == label for row in scan_rows) for label in LABELS}
    counts |= {"slices": len(slice_rows), "subjects": len({row["subject"] for row in scan_rows}), "skipped": skipped}
    content = {
        "settings": settings,
        "run": str(run),
        "data": str(data),
        "counts": counts,
        "calibration": {"normal_scans": len(examiner.calibration["scan_scores"]), "voxel_threshold": threshold},
        "flagged": count_flagged(scan_rows),
        "figures": figures,
    }
    write_atomically(done, json.dumps(content, indent=1).encode())
    print_figures(content)
    print(f"{len(scan_rows)} scans, {len(slice_rows)} slices; error maps in {out / 'error_maps'}, figures in {done}")
    return 3 if skipped else 0


def count_flagged(scans: list[dict]) -> dict:
    """{label: {"flagged", "scans", "low", "high"}}: how many scans were flagged, the rate with its 95 % interval."""
    counts = {}
    for label in LABELS:
        flags = [row["flagged"] for row in scans if row["label"] == label]
        if flags:
            interval = binomtest(sum(flags), len(flags)).proportion_ci(method="exact")
            counts[label] = {"flagged": sum(flags), "scans": len(flags), "low": interval.low, "high": interval.high}
    return counts


def draw_pictures(
    out: Path,
    examiner: Examiner,
    scans: list[ScanSlices],
    slice_rows: list[dict],
    voxels: dict[str, VoxelCounts],
    panels: int,
) -> None:
    """Error maps of the chosen slices, all in the same colours."""
    tops = {"mse": 0.1, "score": 1.0}
    if voxels["score"].counts:
        tops = {name: voxels[name].quantile(0.999) for name in tops}
    by_name = {(scan.label, scan.name): scan for scan in scans}
    for name, row in tqdm(choose_slices(slice_rows, panels), desc="drawing", unit="picture", disable=None):
        scan = by_name[row["label"], row["scan"]]
        examined = examiner.examine(scan)  # again: keeping every scan's maps would fill the memory
        i = scan.indices.index(row["slice"])
        draw_error_map(
            out / "error_maps" / f"{name}_{scan.name}_slice_{row['slice']:03d}.png",
            examined.stack[i].astype(np.float32),
            examined.reconstruction[i],
            examined.maps["score"][i],
            None if examined.lesion is None else examined.lesion[i],
            f"{scan.name} ({scan.label}), slice {row['slice']}: "
            f"score {row['score']:.1f}, p {row['p_value']:.3f}, MSE {row['mse']:.5f}",
            float(np.sqrt(tops["mse"])),
            tops["score"],
        )


def draw_figures(out: Path, judged: list[dict], scan_rows: list[dict]) -> None:
    """ROC and precision-recall curves and histograms of what the figures in metrics.json are about."""
    for level, rows in (("slices", judged), ("scans", scan_rows)):
        labels = np.array([row["label"] == "abnormal" for row in rows])
        if labels.any() and not labels.all():
            scores = {title: np.array([row[name] for row in rows]) for name, title in DETECTORS.items()}
            draw_curves(out / f"curves_{level}.png", labels, scores, level)
        columns = {"score": f"score of {level}", "mse": f"reconstruction MSE of {level}"}
        draw_histograms(out / f"histograms_{level}.png", rows, columns)


def print_figures(content: dict) -> None:
    """The table that a person reads: a line a detector, a column a figure with its interval; then who was flagged."""
    figures, asked = content["figures"], content["settings"]["false_alarms"]
    names = [n for n in ("voxel_ap", "best_dice", "dice", "slice_auroc", "scan_auroc") if n in figures["score"]]
    print(f"{'':30s}" + "".join(f"{name.replace('_', ' '):>22s}" for name in names))
    for detector, title in DETECTORS.items():
        cells = [figures[detector].get(name) for name in names]
        text = (f"{c['value']:.3f} ({c['low']:.3f}-{c['high']:.3f})" if c else "" for c in cells)
        print(f"{title:30s}" + "".join(f"{cell:>22s}" for cell in text))
    if "dice" in names:
        print("best dice is an upper bound, chosen with the labels in sight; dice is at the calibrated threshold")
    for label, count in content["flagged"].items():
        print(f"{count['flagged']} of {count['scans']} {label} scans flagged at a false-alarm rate of {asked:g}")
    known = content["calibration"]["normal_scans"]
    if count_needed(asked) > known:
        least = np.ceil(1000 / (known + 1)) / 1000
        print(
            f"no scan can be flagged at {asked:g}: that needs {count_needed(asked)} normal validation scans, the model "
            f"has {known}; ask for --false-alarms {least:g} or more, or validate on more scans"
        )


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=formatter)
    parser.add_argument("--run", type=Path, default=Path("runs/dae"), help="run folder of train.py")
    parser.add_argument("--data", type=Path, default=Path("Dataset/processed/test"), help="slices: normal/, abnormal/")
    parser.add_argument("--out", type=Path, help="evaluation folder; left out: evaluation/ in the run folder")
    parser.add_argument(
        "--maps",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="write each scan's anomaly map as NIfTI on its own grid",
    )
    parser.add_argument(
        "--panels", type=int, default=6, help="error maps drawn of the worst, and of the median, slices"
    )
    parser.add_argument("--false-alarms", type=float, default=0.05, help="share of normal scans that may be flagged")
    parser.add_argument("--smallest-ml", type=float, default=0.1, help="smallest region listed in regions.csv, ml")
    parser.add_argument("--batch-size", type=int, default=32, help="slices reconstructed at a time")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one"
    )
    args = parser.parse_args(argv)
    if not 0 < args.false_alarms < 1:
        parser.error("--false-alarms is a rate: above 0, below 1")
    if args.panels < 0 or args.batch_size < 1:
        parser.error("--panels is 0 or more, --batch-size 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; leave --device out")
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    return evaluate(
        args.run,
        args.data,
        args.out or args.run / "evaluation",
        args.maps,
        args.panels,
        args.false_alarms,
        args.smallest_ml,
        args.batch_size,
        device,
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (DataError, CheckpointError, OSError) as error:
        sys.exit(str(error))
