"""Score scans by how badly the model reconstructs them, and show where.

Of a test set, `<data>/{normal,abnormal}` as preprocess_oasis.py wrote it, leaves an evaluation folder: report.html,
scores.csv (slices), scans.csv, regions.csv, lesions.csv, metrics.json, a table, figures, panels and montages, and NIfTI
maps with --maps or --bids. With --scan FILE goes from a scan's file straight to its score, p-value, regions and maps.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import shutil
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm

from common import distributed
from common.cli import list_flags, parse_flags, read_axes, silence
from common.device import keep_freed_memory
from common.files import write_atomically, write_figure, write_table
from evaluation.examiner import DETECTORS, Examined, Examiner, OpenScan, open_scan
from evaluation.figures import (
    draw_ages,
    draw_calibration,
    draw_curves,
    draw_detectability,
    draw_dice,
    draw_histograms,
)
from evaluation.maps import list_regions, name_bids, write_bids_description, write_bids_maps, write_maps
from evaluation.metrics import (
    VOLUME_BINS,
    VoxelCounts,
    auroc,
    average_precision,
    list_lesions,
    measure_detectability,
    name_volume,
    rate,
)
from evaluation.panels import draw_montage, draw_panels
from evaluation.report import VIEWERS, make_viewer, write_report
from evaluation.table import COLUMNS, describe_counts, format_latex, format_markdown
from models.anomaly import count_needed
from models.checkpoint import CheckpointError
from preprocessing.layouts import CONTRAST, ENDINGS
from preprocessing.scans import LABELS, DataError, name_scan
from preprocessing.slices import ScanSlices, check_same_settings, hold_folder, list_scans
from preprocessing.volume import restore_to_grid

LESION_VOXELS = 10  # a slice with fewer lesion voxels on the scan's own grid does not count as abnormal
REGION_COLUMNS = ("label", "scan", "volume_ml", "x_mm", "y_mm", "z_mm", "side", "peak", "mean")
LESION_COLUMNS = ("label", "scan", "subject", "kind", "lesion", "volume_ml", "covered", "found", "dice", "peak")
AGE_EDGES = (30, 45, 60, 75)
AGE_GROUPS = ("under 30", "30 to 44", "45 to 59", "60 to 74", "75 and above")
SHOWN_APART_MM = 10  # between the slices of a picture of the most unusual ones


class Evaluation:
    """What is kept of the scans while they go by: rows and counts, never their voxels."""

    def __init__(self, kinds: dict[str, str]):
        self.kinds = kinds
        self.slices, self.scans, self.regions, self.lesions = [], [], [], []
        self.voxels = {name: VoxelCounts() for name in DETECTORS}

    def add(self, examined: Examined, rows: list[dict], row: dict, regions: list[dict], threshold: float) -> None:
        scan = examined.scan
        self.slices += rows
        self.scans.append(row | {"age": scan.record.get("age"), "sex": scan.record.get("sex")})
        self.regions += [{"label": scan.label, "scan": scan.name} | region for region in regions]
        if scan.lesion is None:
            return
        for name, values in examined.maps.items():
            brain = np.isfinite(values)
            self.voxels[name].add(scan.subject, values[brain], scan.lesion[brain])
        kind = self.kinds.get(scan.name) or self.kinds.get(CONTRAST.sub("", scan.name))
        who = {"label": scan.label, "scan": scan.name, "subject": scan.subject, "kind": kind}
        lesions = list_lesions(scan.lesion, examined.maps["score"], threshold, scan.spacing_mm)
        self.lesions += [who | lesion for lesion in lesions]

    def join(self, other: Evaluation) -> None:
        """Take over what the other has kept, which comes after this one's."""
        for name in ("slices", "scans", "regions", "lesions"):
            getattr(self, name).extend(getattr(other, name))
        for name, counts in other.voxels.items():
            self.voxels[name].join(counts)

    def judged(self) -> list[dict]:
        """The slices that slice figures are about: those that hold a lesion, and all slices of normal scans.

        Where no lesion masks are known, every slice of an abnormal scan counts as abnormal.
        """
        masks_known = all(row["lesion_known"] for row in self.scans)
        return [
            row
            for row in self.slices
            if row["label"] == "normal" or not masks_known or row["lesion_voxels"] >= LESION_VOXELS
        ]

    def count(self) -> dict:
        counts = {label: sum(row["label"] == label for row in self.scans) for label in LABELS}
        subjects = {row["subject"] for row in self.scans}
        return counts | {"slices": len(self.slices), "subjects": len(subjects), "lesions": len(self.lesions)}

    def measure(self, threshold: float, quiet: bool) -> dict:
        """All figures by detector, each with how much stands behind it.

        threshold: the calibrated one of the anomaly map, for the Dice that needs no labels to choose it.
        """
        figures = {}
        for name in tqdm(DETECTORS, desc="measuring", unit="detector", disable=quiet or None):
            figures[name] = {}
            for level, rows in (("slice", self.judged()), ("scan", self.scans)):
                table = [[row[key] for row in rows] for key in (name, "subject")]
                labels = [row["label"] == "abnormal" for row in rows]
                if any(labels) and not all(labels):
                    behind = {"subjects": len(set(table[1])), "scans": len({(r["label"], r["scan"]) for r in rows})}
                    behind |= {"slices": len(rows)} if level == "slice" else {}
                    figures[name][f"{level}_auroc"] = auroc(labels, *table) | behind
                    figures[name][f"{level}_ap"] = average_precision(labels, *table) | behind
            if self.voxels[name].hold_lesions() and all(row["lesion_known"] for row in self.scans):
                counts = self.count()
                behind = {key: counts[key] for key in ("subjects", "slices", "lesions")} | {"scans": len(self.scans)}
                voxels = self.voxels[name].figures(threshold if name == "score" else None)
                figures[name] |= {k: v | behind if isinstance(v, dict) else v for k, v in voxels.items()}
        return figures

    def measure_lesions(self) -> dict[str, list[dict]]:
        """Recall and Dice of lesions by volume and, where known, by kind."""
        kinds = sorted({row["kind"] for row in self.lesions if row["kind"]})
        by = {"volume": measure_detectability(self.lesions, name_volume, VOLUME_BINS)}
        by["kind"] = measure_detectability(self.lesions, lambda row: row["kind"], kinds)
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


def find_flag_score(healthy: np.ndarray, false_alarms: float) -> float | None:
    """The score (of a scan or slice) above which the p-value is at most `false_alarms`; None where none can be.

    healthy: (m,) sorted scores of the calibration.
    """
    allowed = int(np.floor(false_alarms * (len(healthy) + 1) + 1e-9)) - 1  # healthy scores that may be as high
    return float(healthy[len(healthy) - 1 - allowed]) if allowed >= 0 else None


def read_kinds(path: Path) -> dict[str, str]:
    """{scan: kind of its lesions} from a table with these two columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return {row["scan"]: row["kind"] for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give --lesions a table as csv") from error
    except KeyError as error:
        raise DataError(f"{path}: has no column {error}; name its columns scan and kind") from error


def evaluate(args: argparse.Namespace, device: torch.device) -> int:
    """Evaluate one run on one set of scans; returns the exit code: 0, or 3 where scans were skipped."""
    data, out = args.data, args.out or args.run / "evaluation"
    scans = [scan for label in LABELS for scan in list_scans(data / label)]
    if not scans:
        raise DataError(f"{data}: no slices in normal/ or abnormal/; run preprocessing/preprocess_oasis.py first")
    examiner = Examiner(args.run / "model.pt", device, args.batch_size)
    check_same_settings(scans, examiner.slices)
    examiner.refuse_seen(scans)
    kinds = read_kinds(args.lesions) if args.lesions else {}
    with hold_folder(out, "--out") if distributed.is_main() else contextlib.nullcontext():
        return fill_folder(out, examiner, scans, kinds, args)


def fill_folder(
    out: Path, examiner: Examiner, scans: list[ScanSlices], kinds: dict[str, str], args: argparse.Namespace
) -> int:
    """Examine the scans and leave all that an evaluation leaves, metrics.json last; returns the exit code.

    Several processes take the scans by turns, each writes the maps and pictures of its own; the first does the rest.
    """
    run, data = args.run, args.data
    settings = {
        "model": hashlib.sha256((run / "model.pt").read_bytes()).hexdigest(),
        "data": hash_records(scans),
        "kinds": hashlib.sha256(json.dumps(kinds).encode()).hexdigest() if kinds else None,
    }
    settings |= {key: getattr(args, key) for key in ("maps", "bids", "panels", "false_alarms", "smallest_ml")}
    done = out / "metrics.json"
    if content := distributed.broadcast(clear_folder(out, settings) if distributed.is_main() else None):
        print(f"{out} holds this evaluation already; delete it to evaluate again")
        print_figures(content)
        return 3 if content["counts"]["skipped"] else 0
    evaluation, skipped = Evaluation(kinds), 0
    if args.bids and distributed.is_main():
        write_bids_description(out / "bids", str(data), settings["model"])
    bids_names = name_bids([(scan.subject, scan.record.get("session")) for scan in scans] if args.bids else [])
    silent = args.quiet or None if distributed.is_main() else True
    with tqdm(total=len(scans), desc="evaluating", unit="scan", disable=silent) as bar:
        for first in range(0, len(scans), distributed.world_size()):
            own, found = first + distributed.rank(), None
            if own < len(scans):
                bids_name = bids_names[own] if args.bids else None
                try:
                    found = examine_stored(out, examiner, scans[own], kinds, bids_name, args)
                except DataError as error:
                    found = error
            for part in [found]:
                if isinstance(part, Evaluation):
                    evaluation.join(part)
                elif part:
                    tqdm.write(f"skipped {part}", file=sys.stderr)
                    skipped += 1
                bar.update(part is not None)
    if not distributed.is_main():
        return 0
    if not evaluation.scans:
        raise DataError(f"{data}: not one of its {len(scans)} scans could be read; preprocess again")
    write_table(out / "scores.csv", evaluation.slices)
    write_table(out / "scans.csv", evaluation.scans)
    write_table(out / "regions.csv", evaluation.regions, REGION_COLUMNS)
    write_table(out / "lesions.csv", evaluation.lesions, LESION_COLUMNS)
    content = {
        "settings": settings,
        "flags": list_flags(args),
        "run": str(run),
        "data": str(data),
        "counts": evaluation.count() | {"skipped": skipped},
        "calibration": {
            "normal_scans": len(examiner.calibration["scan_scores"]),
            "voxel_threshold": examiner.threshold,
            "scan_score": find_flag_score(examiner.calibration["scan_scores"].numpy(), args.false_alarms),
            "slice_score": find_flag_score(examiner.calibration["slice_scores"].numpy(), args.false_alarms),
        },
        "flagged": evaluation.count_flagged(),
        "figures": evaluation.measure(examiner.threshold, args.quiet),
        "detectability": evaluation.measure_lesions(),
    }
    write_atomically(out / "table.md", f"{format_markdown({run.name: content})}\n".encode())
    write_atomically(out / "table.tex", f"{format_latex({run.name: content})}\n".encode())
    pictures = draw_figures(out, evaluation, content)
    viewers = show_worst(examiner, scans, evaluation.scans, args.quiet)
    write_report(out, content, evaluation.scans, evaluation.slices, evaluation.regions, pictures, viewers)
    write_atomically(done, json.dumps(content, indent=1).encode())
    print_figures(content)
    print(f"{describe_counts(content)}; look at {out / 'report.html'}")
    return 3 if skipped else 0


def clear_folder(out: Path, settings: dict) -> dict | None:
    """Make the folder ready for an evaluation with these settings; or return what metrics.json says if it holds it."""
    done = out / "metrics.json"
    if done.exists() and (content := json.loads(done.read_text()))["settings"] == settings:
        return content
    if done.exists():  # of other settings or another model: none of its pictures and maps may stand among the new ones
        done.unlink()  # first: it is written last and says that the rest is whole
        for folder in ("error_maps", "montages", "maps", "bids"):
            shutil.rmtree(out / folder, ignore_errors=True)
    for folder in ("error_maps", "montages"):
        for label in LABELS:
            (out / folder / label).mkdir(parents=True, exist_ok=True)
    return None


def examine_stored(
    out: Path, examiner: Examiner, stored: ScanSlices, kinds: dict, bids_name: str | None, args: argparse.Namespace
) -> Evaluation:
    """Examine one scan of the store, write its maps and pictures, and return what is kept of it."""
    scan = open_scan(stored)
    examined = examiner.examine(scan)
    rows, row = examiner.score(examined, args.false_alarms)
    native, affine = restore_to_grid(examined.maps["score"], scan.record), np.array(scan.record["affine"])
    regions = list_regions(native, affine, examiner.threshold, args.smallest_ml)
    if args.maps:
        write_maps(out / "maps" / scan.label / scan.name, native, affine, examiner.threshold)
    if args.bids:
        about = {"Sources": [scan.record["source"]], "Label": scan.label}
        about |= {"Score": row["score"], "PValue": row["p_value"]}
        write_bids_maps(out / "bids", bids_name, native, affine, examiner.threshold, about)
    draw_scan(out, examined, rows, row, args.panels, examiner.threshold)
    kept = Evaluation(kinds)
    kept.add(examined, rows, row, regions, examiner.threshold)
    return kept


def hash_records(scans: list[ScanSlices]) -> str:
    """Which scans these are and how they were cut, as a hash."""
    hashed = hashlib.sha256()
    for scan in scans:
        hashed.update(json.dumps([scan.label, scan.name, scan.record]).encode())
    return hashed.hexdigest()


def draw_scan(out: Path, examined: Examined, rows: list[dict], row: dict, panels: str, threshold: float) -> None:
    """The montage of a scan and the panels asked for: its worst slice, its N worst or all."""
    scan = examined.scan
    title = f"{scan.name} ({scan.label})"
    scored = f"{title}: score {row['score']:.1f}, p {row['p_value']:.3f}"
    write_figure(out / "montages" / scan.label / f"{scan.name}.png", draw_montage(examined, scored, threshold))
    count = {"worst": 1, "all": len(rows)}.get(panels) or int(panels)
    for i in rank_slices(rows)[:count]:
        title_of_slice = (
            f"{title}, slice {rows[i]['slice']}: score {rows[i]['score']:.1f}, p {rows[i]['p_value']:.3f}, "
            f"MSE {rows[i]['mse']:.5f}"
        )
        path = out / "error_maps" / scan.label / f"{scan.name}_slice_{rows[i]['slice']:03d}.png"
        write_figure(path, draw_panels(examined, [i], title_of_slice, threshold))


def rank_slices(rows: list[dict]) -> list[int]:
    """The places of a scan's slices, the worst first."""
    return sorted(range(len(rows)), key=lambda i: -rows[i]["score"])


def draw_figures(out: Path, evaluation: Evaluation, content: dict) -> dict[str, str]:
    """The figures of what metrics.json says, as PNG; returns {file name: what it shows, in words}."""
    calibration, counts, flagged = content["calibration"], content["counts"], content["flagged"]
    asked, threshold = content["settings"]["false_alarms"], calibration["voxel_threshold"]
    pictures = {}
    for level, rows in (("slices", evaluation.judged()), ("scans", evaluation.scans)):
        labels = np.array([row["label"] == "abnormal" for row in rows])
        one = level.removesuffix("s")
        if labels.any() and not labels.all():
            scores = {title: np.array([row[name] for row in rows]) for name, title in DETECTORS.items()}
            measured = {
                title: tuple(content["figures"][name][f"{one}_{figure}"] for figure in ("auroc", "ap"))
                for name, title in DETECTORS.items()
            }
            write_figure(out / f"curves_{level}.png", draw_curves(labels, scores, measured, level))
            pictures[f"curves_{level}.png"] = f"ROC and precision-recall curves of {level}"
        columns = {"score": f"score of {level}", "mse": f"reconstruction MSE of {level}"}
        mark = calibration[f"{one}_score"]
        marks = {"score": (mark, f"above: p ≤ {asked:g}")} if mark is not None else {}
        write_figure(out / f"histograms_{level}.png", draw_histograms(rows, columns, marks))
        pictures[f"histograms_{level}.png"] = f"Histograms of the scores of {level} by label"
    if "dice" in content["figures"]["score"]:
        lesions = f"{counts['lesions']} lesions, {len(evaluation.scans)} scans, {counts['subjects']} subjects"
        curve, reached = evaluation.voxels["score"].dice_curve(), content["figures"]["score"]["dice"]["value"]
        write_figure(out / "dice.png", draw_dice(*curve, threshold, reached, lesions))
        pictures["dice.png"] = "Dice of the anomaly map against its threshold, the calibrated one marked"
    if content["detectability"]:
        write_figure(out / "detectability.png", draw_detectability(content["detectability"]))
        pictures["detectability.png"] = "Share of lesions found and their Dice by " + " and by ".join(
            content["detectability"]
        )
    normal = {
        level: np.array([row["p_value"] for row in rows if row["label"] == "normal"])
        for level, rows in (("scans", evaluation.scans), ("slices", evaluation.slices))
    }
    if len(normal["scans"]):
        write_figure(out / "calibration.png", draw_calibration(normal, asked))
        pictures["calibration.png"] = "How often normal scans have a small p-value, against what was promised"
    if "normal_by_age" in flagged:
        mark = calibration["scan_score"]
        rows = [row for row in evaluation.scans if row["label"] == "normal"]
        write_figure(out / "age.png", draw_ages(rows, None if mark is None else (mark, f"above: p ≤ {asked:g}")))
        pictures["age.png"] = "Scores of normal scans against age"
    return pictures


def show_worst(examiner: Examiner, scans: list[ScanSlices], rows: list[dict], quiet: bool) -> dict:
    """{(label, scan): page of an orthogonal viewer} of the few scans with the highest scores."""
    worst = sorted(rows, key=lambda row: -row["score"])[:VIEWERS]
    by_name = {(scan.label, scan.name): scan for scan in scans}
    viewers = {}
    for row in tqdm(worst, desc="viewers", unit="scan", disable=quiet or None):
        key = row["label"], row["scan"]
        # again: keeping every scan's maps would fill the memory
        viewers[key] = make_viewer(examiner.examine(open_scan(by_name[key]), baselines=False), examiner.threshold)
    return viewers


def print_figures(content: dict) -> None:
    """The table that a person reads: a line a detector, a column a figure with its interval; then who was flagged."""
    figures, asked = content["figures"], content["settings"]["false_alarms"]
    names = [name for name in COLUMNS if name in figures["score"]]
    print(f"{'':30s}" + "".join(f"{name.replace('_', ' '):>22s}" for name in names))
    for detector, title in DETECTORS.items():
        cells = [figures[detector].get(name) for name in names]
        text = (f"{c['value']:.3f} ({c['low']:.3f}-{c['high']:.3f})" if c else "" for c in cells)
        print(f"{title:30s}" + "".join(f"{cell:>22s}" for cell in text))
    if "dice" in names:
        print("best dice is an upper bound, chosen with the labels in sight; dice is at the calibrated threshold")
    for label in LABELS:
        if count := content["flagged"].get(label):
            print(f"{count['flagged']} of {count['scans']} {label} scans flagged at a false-alarm rate of {asked:g}")
    if reason := explain_no_flag(asked, content["calibration"]["normal_scans"]):
        print(reason)


def explain_no_flag(asked: float, known: int) -> str | None:
    """Why no scan can be flagged at this false-alarm rate with so many normal validation scans; None: it can."""
    if count_needed(asked) <= known:
        return None
    least = np.ceil(1000 / (known + 1)) / 1000
    return (
        f"no scan can be flagged at {asked:g}: that needs {count_needed(asked)} normal validation scans, the model "
        f"has {known}; ask for --false-alarms {least:g} or more, or validate on more scans"
    )


def examine_files(args: argparse.Namespace, device: torch.device) -> tuple[int, dict]:
    """Take scans from their files to a verdict; returns (exit code, all that was found, as plain values)."""
    out = args.out or args.run / "scans"
    examiner = Examiner(args.run / "model.pt", device, args.batch_size)
    out.mkdir(parents=True, exist_ok=True)
    found, skipped = [], []
    masks = args.brain_mask or [None] * len(args.scan)
    # where verdicts are printed as they come, they are the progress
    bar = tqdm(args.scan, desc="examining", unit="scan", disable=True if args.quiet or not args.json else None)
    for path, mask in zip(bar, masks, strict=True):
        try:
            found.append(examine_file(args, examiner, path, mask, out))
        except DataError as error:
            if len(args.scan) == 1:
                raise
            print(f"skipped {error}", file=sys.stderr)
            skipped.append({"file": str(path), "why": str(error)})
    if not found:
        raise DataError(f"{args.scan[0]}: not one of the {len(args.scan)} scans could be used; see the lines above")
    known = len(examiner.calibration["scan_scores"])
    content = {"run": str(args.run), "false_alarms": args.false_alarms, "normal_scans": known}
    return 3 if skipped else 0, content | {"scans": found, "skipped": skipped}


def examine_file(args: argparse.Namespace, examiner: Examiner, path: Path, mask: Path | None, out: Path) -> dict:
    """One scan's verdict, printed and returned; leaves its maps and a picture of its most unusual slices in `out`."""
    for file in (path, mask):
        if file and not file.is_file():
            raise DataError(f"{file}: no such file; give --scan and --brain-mask files that are there")
    scan, doubts = examiner.cut(path, mask, args.axes, args.volume)
    examined = examiner.examine(scan, baselines=False)
    rows, row = examiner.score(examined, args.false_alarms)
    native, affine = restore_to_grid(examined.maps["score"], scan.record), np.array(scan.record["affine"])
    regions = list_regions(native, affine, examiner.threshold, args.smallest_ml)
    write_maps(out / scan.name, native, affine, examiner.threshold)
    shown = choose_apart(rows, scan)
    title = f"{scan.name}: score {row['score']:.1f}, p {row['p_value']:.3f}; its most unusual slices"
    write_figure(out / f"{scan.name}.png", draw_panels(examined, shown, title, examiner.threshold))
    known = len(examiner.calibration["scan_scores"])
    reason = explain_no_flag(args.false_alarms, known)
    verdict = "no verdict" if reason else "unusual" if row["flagged"] else "not unusual"
    print(path)
    heard = sys.stderr if args.quiet or args.json else sys.stdout  # a warning is said even where the rest is silent
    for doubt in doubts:
        print(f"  unlike what the model was trained on: {doubt}", file=heard)
    print(
        f"  {verdict} at a false-alarm rate of {args.false_alarms:g}: score {row['score']:.2f}, "
        f"p = {row['p_value']:.3f} ({known} healthy validation scans)"
    )
    if reason:
        print(f"  {reason}")
    print(
        f"  {len(regions)} regions of at least {args.smallest_ml:g} ml, {examiner.threshold:.1f} times as usual or more"
    )
    for region in regions[:10]:
        place = ", ".join(f"{region[f'{axis}_mm']:.0f}" for axis in "xyz")
        print(f"    {region['volume_ml']:6.2f} ml, {region['side']:6s} ({place}) mm, peak {region['peak']:.1f}")
    if len(regions) > 10:
        print(f"    and {len(regions) - 10} smaller ones")
    files = {"map": f"{scan.name}_anomaly.nii.gz", "mask": f"{scan.name}_mask.nii.gz", "picture": f"{scan.name}.png"}
    print(f"  {', '.join(files.values())} in {out}")
    return {
        "file": str(path),
        "verdict": verdict,
        "score": row["score"],
        "p_value": row["p_value"],
        "threshold": examiner.threshold,
        "unlike_training": doubts,
        "regions": regions,
        "slices": [{"slice": rows[i]["slice"], "score": rows[i]["score"]} for i in shown],
        "files": {what: str(out / name) for what, name in files.items()},
    }


def choose_apart(rows: list[dict], scan: OpenScan, count: int = 4) -> list[int]:
    """The places of the most unusual slices, the worst first, with SHOWN_APART_MM between any two."""
    chosen = []
    for i in rank_slices(rows):
        if all(abs(i - other) * scan.spacing_mm[0] >= SHOWN_APART_MM for other in chosen):
            chosen.append(i)
    return chosen[:count]


def read_panels(text: str) -> str:
    """worst, all or a number, as argparse wants it."""
    if text not in ("worst", "all") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: say worst, all or how many of each scan")
    return text


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=formatter)
    parser.add_argument("--run", type=Path, default=Path("runs/dae"), help="run folder of train.py")
    parser.add_argument("--data", type=Path, default=Path("Dataset/processed/test"), help="slices: normal/, abnormal/")
    parser.add_argument(
        "--scan", type=Path, nargs="+", action="extend", metavar="FILE", help="scans to look at, instead of --data"
    )
    parser.add_argument(
        "--brain-mask", type=Path, nargs="+", action="extend", metavar="FILE", help="of each --scan, in their order"
    )
    parser.add_argument("--axes", type=read_axes, help="where a scan's axes point to if its header does not tell: ASL")
    parser.add_argument("--volume", type=int, help="which volume of a --scan with several, from 0")
    parser.add_argument("--out", type=Path, help="where to; left out: evaluation/, or scans/ for --scan, in the run")
    on_or_off = argparse.BooleanOptionalAction
    parser.add_argument("--maps", action=on_or_off, default=False, help="each scan's maps as NIfTI on its own grid")
    parser.add_argument("--bids", action=on_or_off, default=False, help="the maps as a BIDS derivative in bids/")
    parser.add_argument(
        "--panels", type=read_panels, default="worst", help="slices drawn of each scan: worst, all or how many"
    )
    parser.add_argument("--lesions", type=Path, help="csv with the columns scan and kind: detection by kind of lesion")
    parser.add_argument("--false-alarms", type=float, default=0.05, help="share of normal scans that may be flagged")
    parser.add_argument("--smallest-ml", type=float, default=0.1, help="smallest region listed, ml")
    parser.add_argument("--batch-size", type=int, default=32, help="slices reconstructed at a time")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, nothing on standard output; errors remain")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output, nothing else")
    args = parse_flags(parser, argv)
    if not 0 < args.false_alarms < 1:
        parser.error("--false-alarms is a rate: above 0, below 1")
    if args.batch_size < 1:
        parser.error("--batch-size is 1 or more")
    if args.brain_mask and len(args.brain_mask) != len(args.scan or ()):
        parser.error("--brain-mask takes one mask for each --scan")
    for path in args.scan or ():
        if not path.name.lower().endswith(ENDINGS):
            parser.error(f"{path}: is no scan by its name; --scan takes {', '.join(ENDINGS)}")
    if args.scan and len({name_scan(path) for path in args.scan}) < len(args.scan):
        parser.error("--scan: two files have the same name; give them one at a time, each with its own --out")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; leave --device out")
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    if args.scan and distributed.world_size() > 1:
        parser.error("--scan is for one process; run it without torchrun")
    keep_freed_memory()
    silent = args.quiet or args.json or not distributed.is_main()
    with distributed.join(device) as device, silence(silent):
        if args.scan:
            code, content = examine_files(args, device)
        else:
            code, content = evaluate(args, device), None
    if args.json and distributed.is_main():
        out = args.out or args.run / "evaluation"
        print(json.dumps(content, indent=1) if content else (out / "metrics.json").read_text())
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (DataError, CheckpointError, OSError) as error:
        sys.exit(str(error) if distributed.is_main() else 1)
