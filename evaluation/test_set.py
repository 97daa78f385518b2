"""Evaluates a model on a test set: every scan of the store to maps, pictures and rows; then figures and the report."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common.cli import DataError, log
from common.files import hold_folder, make_folder, open_regular, read_json, write_atomically, write_table
from common.workers import run_in_workers
from evaluation.figures import draw_figures
from evaluation.input_check import refuse_seen
from evaluation.nifti import name_bids, write_bids_description
from evaluation.origin import describe_origin
from evaluation.predictor import DETECTORS, Predictor
from evaluation.report import write_report
from evaluation.results import Results, ScanResult
from evaluation.table import COLUMNS, describe_counts, format_figure, format_latex, format_markdown
from evaluation.viewer import Viewers
from evaluation.words import explain_no_flag
from evaluation.worker import DONE, PredictSettings, find_result, predict_scan
from preprocessing.cohort import explain_no_slices, refuse_copies
from preprocessing.identity import hash_file
from preprocessing.scans import LABELS
from preprocessing.store import StoredScan, check_same_settings, list_scans

REGION_COLUMNS = (
    "label", "scan", "volume_ml", "x_mm", "y_mm", "z_mm", "side", "peak", "mean", "peak_x_mm", "peak_y_mm",
    "peak_z_mm", "number", "slice", "file_axis", "file_index", "on_lesion", "p_value",
)  # fmt: skip
LESION_COLUMNS = ("label", "scan", "subject", "kind", "lesion", "volume_ml", "covered", "found", "dice", "peak")
MOST_TABLE_BYTES = 1 << 26
OPTIONS = ("batch_size", "false_positive_rate", "smallest_ml")  # of a predictor, that a worker's must share
SCANS_A_WORKER = 8  # fewer are predicted sooner than another process has started
BEGUN = ".evaluation.json"  # the settings of an unfinished evaluation
CURE = "give another --out, or delete it if it belongs to an evaluation"
OWN = (  # files of an evaluation that the next one may not overwrite
    f"{DONE}/*/*.json", f"{DONE}/*/*.viewer", "error_maps/*/*_slice_*.png",
    "montages/*/*.png", "maps/*/*_anomaly.nii.gz", "maps/*/*_mask.nii.gz",
    "bids/dataset_description.json", "bids/README.md", "bids/.bidsignore",
    "bids/sub-*/**/*_desc-anomaly_*.nii.gz", "bids/sub-*/**/*_desc-anomaly_*.json",
    *(f"{name}.{kind}" for name in ("curves_*", "histograms_*", "scores_*", "dice", "detectability", "calibration",
      "age") for kind in ("pdf", "png")), "report.html",
)  # fmt: skip


@dataclass(frozen=True)
class TestSet:
    """What is evaluated and what it leaves.

    run, data, out  folders: of the training run, of the slices, of the evaluation
    maps, bids      whether NIfTI maps are written, plain and as a BIDS derivative
    panels          slices drawn of each scan: "worst", "all" or how many
    lesions         csv with the columns scan and kind; None: kinds are not known
    device          "auto", "cpu" or "cuda", of whoever predicts
    workers, dask   how many scans are predicted at a time here; or the address of a Dask cluster's scheduler
    quiet           no progress bars
    flags           the flags as metrics.json keeps them
    """

    run: Path
    data: Path
    out: Path
    maps: bool
    bids: bool
    panels: str
    lesions: Path | None
    device: str
    workers: int
    dask: str | None
    quiet: bool
    flags: dict


def evaluate(test_set: TestSet, predictor: Predictor) -> tuple[int, dict]:
    """(exit code: 0, or 3 where scans were skipped; what metrics.json says)."""
    scans, bad = find_scans(test_set, predictor)
    kinds = read_kinds(test_set.lesions) if test_set.lesions else {}
    with hold_folder(test_set.out, "--out"):
        return fill_folder(test_set, predictor, scans, kinds, bad)


def fill_folder(
    test_set: TestSet, predictor: Predictor, scans: list[StoredScan], kinds: dict[str, str], bad: int
) -> tuple[int, dict]:
    """Leave all that an evaluation leaves, metrics.json last; returns what `evaluate` does.

    bad  how many scans have been skipped already
    """
    settings = describe_settings(test_set, predictor, scans, kinds)
    if content := clear_folder(test_set.out, settings):
        log.info("%s holds this evaluation already; delete it to evaluate again", test_set.out)
        try:
            log_figures(content)
            return 3 if content["counts"]["skipped"] else 0, content
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{test_set.out / 'metrics.json'}: is not a record of an evaluation; {CURE}") from error
    results, viewers = Results(kinds), Viewers()
    skipped = bad + predict_scans(test_set, predictor, scans, settings["model"], results, viewers)
    content = {
        "settings": settings,
        "flags": test_set.flags,
        "run": str(test_set.run),
        "data": str(test_set.data),
        "origin": describe_origin(test_set.run),
        "counts": results.count() | {"skipped": skipped},
        "coverage": {"keep": predictor.slices["keep"]} | results.describe_coverage(),
        "calibration": {
            "normal_scans": predictor.calibration.normal_scans,
            "voxel_threshold": predictor.calibration.voxel_threshold,
        }
        | {
            f"{level}_score": predictor.calibration.flag_score(level, predictor.false_positive_rate)
            for level in ("scan", "slice")
        },
        "flagged": results.count_flagged(),
        "figures": results.measure(test_set.quiet),
        "detectability": results.measure_lesions(),
    }
    write_results(test_set, predictor, results, viewers, content)
    log_figures(content)
    log.info("%s; look at %s", describe_counts(content), test_set.out / "report.html")
    return 3 if skipped else 0, content


def find_scans(test_set: TestSet, predictor: Predictor) -> tuple[list[StoredScan], int]:
    """(the scans of the test set, how many have a bad record). DataError where the model must not score them."""
    data, bad = test_set.data, []
    scans = [scan for label in LABELS for scan in list_scans(data / label, bad)]
    for error in bad:
        log.warning("skipped %s", error)
    if not scans:
        raise DataError(explain_no_slices(data, LABELS))
    check_same_settings(scans, predictor.slices)
    refuse_seen(scans, predictor)
    refuse_copies((scan.label, scan) for scan in scans)
    return scans, len(bad)


def read_kinds(path: Path) -> dict[str, str]:
    """{scan: kind of its lesions} from a table with these two columns."""
    try:
        with open_regular(path) as file:
            content = file.read(MOST_TABLE_BYTES + 1)
        if len(content) > MOST_TABLE_BYTES:
            raise ValueError(f"more than {MOST_TABLE_BYTES >> 20} MB")
        rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        return {row["scan"]: row["kind"] or "" for row in rows}
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); give --lesions a table as csv") from error
    except KeyError as error:
        raise DataError(f"{path}: has no column {error}; name its columns scan and kind") from error


def describe_settings(test_set: TestSet, predictor: Predictor, scans: list[StoredScan], kinds: dict) -> dict:
    """Everything that decides the result: with the same settings, an evaluation is not repeated."""
    return {
        "model": hash_file(test_set.run / "model.pt"),
        "data": hash_records(scans),
        "kinds": hashlib.sha256(json.dumps(kinds).encode()).hexdigest() if kinds else None,
        "maps": test_set.maps,
        "bids": test_set.bids,
        "panels": test_set.panels,
        "false_positive_rate": predictor.false_positive_rate,
        "smallest_ml": predictor.smallest_ml,
    }


def hash_records(scans: list[StoredScan]) -> str:
    """Which scans these are and how they were cut, as a hash."""
    hashed = hashlib.sha256()
    for scan in scans:
        hashed.update(json.dumps([scan.label, scan.name, scan.record]).encode())
    return hashed.hexdigest()


def clear_folder(out: Path, settings: dict) -> dict | None:
    """metrics.json's content if the folder holds this evaluation; else None, with files of other evaluations deleted.

    The files of this evaluation, interrupted earlier, are kept.
    """
    done, begun = out / "metrics.json", out / BEGUN
    older = []
    for path in (done, begun):
        with contextlib.suppress(FileNotFoundError):
            content = read_json(path, CURE)
            if "settings" not in content:
                raise DataError(f"{path}: is not a record of an evaluation; {CURE}")
            if path == done and content["settings"] == settings:
                drop_results(out)
                return content
            older.append(content["settings"])
    if any(other != settings for other in older):
        done.unlink(missing_ok=True)  # first: it is written last, so with it the rest is whole
        delete_own(out)
    write_atomically(begun, json.dumps({"settings": settings}).encode())
    for folder in (DONE, "error_maps", "montages"):
        for label in LABELS:
            make_folder(out / folder / label, out)
    return None


def drop_results(out: Path) -> None:
    """Delete what was kept of each scan until the evaluation was whole."""
    shutil.rmtree(out / DONE, ignore_errors=True)
    (out / BEGUN).unlink(missing_ok=True)


def delete_own(out: Path) -> None:
    """Delete the files of an evaluation, and the folders that are empty then; no link is followed out of `out`."""
    top, folders = out.resolve(), set()
    for pattern in OWN:
        for path in out.glob(pattern):
            if path.parent.resolve().is_relative_to(top) and (path.is_file() or path.is_symlink()):
                path.unlink()
                folders |= {folder for folder in path.parents if folder.is_relative_to(out) and folder != out}
    for folder in sorted(folders, reverse=True):  # the deepest first
        with contextlib.suppress(OSError):
            folder.rmdir()


def predict_scans(
    test_set: TestSet,
    predictor: Predictor,
    scans: list[StoredScan],
    model_hash: str,
    results: Results,
    viewers: Viewers,
) -> int:
    """Predict the scans that are not yet, and add all to results and viewers; returns how many could not be read."""
    out, bids_names, raw = test_set.out, [""] * len(scans), None
    for label in LABELS if test_set.maps else ():
        make_folder(out / "maps" / label, out)
    if test_set.bids:
        make_folder(out / "bids", out)
        bids_names = name_bids([(scan.subject, scan.record.get("session")) for scan in scans])
        raw = Path(os.path.commonpath([Path(scan.record["source"]).absolute().parent for scan in scans]))
        write_bids_description(out / "bids", raw, model_hash)
    settings = PredictSettings(
        model=test_set.run / "model.pt",
        model_hash=model_hash,
        device=test_set.device,
        options=tuple((name, getattr(predictor, name)) for name in OPTIONS),
        out=out,
        maps=test_set.maps,
        bids=raw,
        panels=test_set.panels,
    )
    missing = [number for number, scan in enumerate(scans) if not find_result(out, scan)[0].exists()]
    if len(missing) < len(scans):
        log.info("%d of %d scans were predicted before", len(scans) - len(missing), len(scans))
    on_gpu = predictor.calibration.intensity.is_cuda
    workers = 1 if on_gpu else min(test_set.workers, 1 + len(missing) // SCANS_A_WORKER)
    calls = [(scans[number], bids_names[number], settings) for number in missing]
    running = run_in_workers(predict_scan, calls, workers, test_set.dask)
    skipped, predicted_now = 0, set(missing)
    for number, scan in enumerate(tqdm(scans, desc="evaluating", unit="scan", disable=test_set.quiet or None)):
        if number in predicted_now and (why := next(running)):
            log.warning("skipped %s", why)
            skipped += 1
            continue
        path, viewer = find_result(out, scan)
        result = ScanResult.read(path)
        results.add(result)
        viewers.add(result.scan, result.viewer_bytes, viewer)
    if not results.scans:
        raise DataError(f"{test_set.data}: not one of its {len(scans)} scans could be read; preprocess again")
    return skipped


def write_results(test_set: TestSet, predictor: Predictor, results: Results, viewers: Viewers, content: dict) -> None:
    """Write the tables, the figures and the report; metrics.json last."""
    out, name = test_set.out, test_set.run.name
    write_table(out / "scores.csv", results.slices)
    write_table(out / "scans.csv", results.scans)
    write_table(out / "regions.csv", results.regions, REGION_COLUMNS)
    write_table(out / "lesions.csv", results.lesions, LESION_COLUMNS)
    write_atomically(out / "table.md", f"{format_markdown({name: content})}\n".encode(errors="backslashreplace"))
    write_atomically(out / "table.tex", f"{format_latex({name: content})}\n".encode(errors="backslashreplace"))
    healthy = {"scan": predictor.calibration.scan_scores, "slice": predictor.calibration.slice_scores}
    healthy = {level: scores.cpu().numpy() for level, scores in healthy.items()}
    write_report(out, content, results, draw_figures(out, results, content, healthy), viewers.read())
    write_atomically(out / "metrics.json", json.dumps(content, indent=1).encode())
    drop_results(out)


def log_figures(content: dict) -> None:
    """Log a line a detector, a column a figure with its interval; then how many scans were flagged."""
    figures, rate = content["figures"], content["settings"]["false_positive_rate"]
    names = [name for name in COLUMNS if name in figures["score"]]
    log.info("%s", f"{'':30s}" + "".join(f"{name.replace('_', ' '):>22s}" for name in names))
    for detector, title in DETECTORS.items():
        text = (format_figure(figures[detector].get(name)).replace("–", "-") for name in names)
        log.info("%s", f"{title:30s}" + "".join(f"{cell:>22s}" for cell in text))
    if "dice" in names:
        log.info("best dice chooses its threshold by the test labels; dice is of what is marked, without them")
    for label in LABELS:
        if count := content["flagged"].get(label):
            share = f"{count['flagged']} of {count['scans']}"
            log.info("%s %s scans flagged at a false-positive rate of %g", share, label, rate)
    if reason := explain_no_flag(rate, content["calibration"]["normal_scans"]):
        log.info(reason)
    if unlike := content["counts"].get("unlike_calibration"):
        log.warning(
            "%d of %d scans do not fit the model's calibration, so their p-values mean little; calibrate it on healthy "
            "scans of this scanner (training/calibrate.py)",
            unlike, sum(content["counts"].get(label, 0) for label in LABELS)
        )  # fmt: skip
