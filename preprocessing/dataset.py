"""A folder of scans becomes a dataset of slices: plan, dry run, workers, contact sheet, record."""

from __future__ import annotations

import argparse
import json
import platform
from collections import Counter
from pathlib import Path

import nibabel
import numpy
import scipy
from tqdm import tqdm

from common.cli import DataError, explain, list_flags, log
from common.files import hold_folder, read_json, write_atomically
from common.workers import run_in_workers
from preprocessing.cohort import CohortRules, find_withdrawn, plan, refuse_copies, refuse_mixture
from preprocessing.dicom import CONVERTED, list_series
from preprocessing.layouts import LAYOUTS
from preprocessing.qc import draw_contact_sheet
from preprocessing.scans import SPLITS, Scan, Search, explain_ambiguous
from preprocessing.store import StoredScan, clear_leftovers, list_scans, withdraw
from preprocessing.subjects import key_subject
from preprocessing.worker import FORMAT, CutSettings, preprocess_scan

NAMES_LISTED = 12


def preprocess(args: argparse.Namespace) -> int:
    """Preprocess all scans of a folder; returns the exit code: 0, or 3 where scans were skipped."""
    stored = list(list_scans(args.processed, refused=[]))  # a scan with a bad record is made again
    rules = CohortRules(
        layout=args.layout,
        modality=args.modality,
        pattern=args.subject_pattern,
        clinical=args.clinical,
        normal_values=tuple(args.normal_values or ()),
        abnormal_values=tuple(args.abnormal_values or ()),
        label=args.label,
        blank=args.blank_cdr,
        fractions=tuple(args.split),
        seed=args.seed,
        axes=args.axes,
    )
    dicom = list_series(args.raw, args.processed / CONVERTED, args.processed)
    found = plan(args.raw, args.processed, rules, stored, _read_splits(args), dicom)
    withdrawn = find_withdrawn(args.raw, found.scans, stored)
    describe(args, found, stored)
    if args.dry_run:
        for old in withdrawn:
            log.warning("would withdraw %s: %s is no longer among the scans", old.folder, old.origin)
        for _, why in found.refused:
            log.warning("would skip %s", why)
        return 3 if found.refused else 0
    with hold_folder(args.processed, "--processed"):
        clear_leftovers(args.processed)
        for old in withdrawn:
            origin = old.origin
            log.warning("%s: is no longer among the scans; its slices were moved to %s", origin, withdraw(old.folder))
        code = write_slices(args, found)
        clear_leftovers(args.processed)  # of workers that outlived a killed run until now
        return code


def describe(args: argparse.Namespace, found: Search, stored: list[StoredScan]) -> None:
    """Log what was found, file by file in a dry run."""
    about = LAYOUTS[found.layout].about if found.layout in LAYOUTS else found.layout
    sessions = len({(scan.subject, scan.session or scan.name) for scan in found.scans})
    subjects = {scan.subject for scan in found.scans}
    log.info(f"{about}: {len(found.scans)} scans of {len(subjects)} subjects in {sessions} sessions in {args.raw}")
    ambiguous = explain_ambiguous(found.scans, args.raw)
    if ambiguous:
        log.warning("  %s", ambiguous)
    for split, label in dict.fromkeys((scan.split, scan.label) for scan in found.scans):
        group = [scan for scan in found.scans if (scan.split, scan.label) == (split, label)]
        masks = sum(scan.brain_mask is not None for scan in group)
        people = len({scan.subject for scan in group})
        log.info(f"  {split}/{label}: {len(group)} scans of {people} subjects, {masks} with a brain mask")
        for scan in group if args.dry_run else ():
            axes = f", axes {scan.axes} unless its header gives them" if scan.axes else ""
            whose = f"subject {scan.subject}, session {scan.session or '-'}"
            log.info(f"    {scan.name}: {whose}{axes}, {scan.series or scan.path}")
    for note in found.notes:
        log.info(f"  {note}")
    warn_of_masks(found)
    kept = len({key_subject(old.subject) for old in stored} & {key_subject(subject) for subject in subjects})
    if kept:
        log.info(f"  {kept} subjects have slices in {args.processed} and keep their split")
    if found.left_out:
        log.info(f"  left out: {len(found.left_out)} files{'' if args.dry_run else ' (--dry-run lists them)'}")
        for path, why in found.left_out if args.dry_run else ():
            log.info(f"    {path}: {why}")


def warn_of_masks(found: Search) -> None:
    """Warn of masks without a scan, and of abnormal scans without a lesion mask."""
    unused = [Path(path).name for path, why in found.left_out if why.startswith(("a mask", "a lesion mask"))]
    if unused:
        log.warning("  %d masks belong to no scan, or to a normal one: %s", len(unused), list_names(unused))
    bare = [scan.name for scan in found.scans if scan.label == "abnormal" and scan.lesion_mask is None]
    if bare:
        why = "they count for scan figures only, not for slices and voxels"
        log.warning("  %d abnormal scans have no lesion mask: %s; %s", len(bare), list_names(bare), why)


def warn_of_scans(stored: list[StoredScan]) -> None:
    """Repeat the warnings of the stored scans, each once with the names of its scans."""
    groups = {}
    for old in stored:
        for warning in old.record.get("warnings", ()):
            what, bracket, detail = warning.partition(" (")
            groups.setdefault(what, []).append(old.name + bracket + detail)
    for what, names in groups.items():
        log.warning("%d scans: %s: %s", len(names), what, list_names(names))


def list_names(names: list[str]) -> str:
    """The first NAMES_LISTED names and how many more there are, on one line."""
    return ", ".join(names[:NAMES_LISTED]) + (f" and {len(names) - NAMES_LISTED} more" * (len(names) > NAMES_LISTED))


def write_slices(args: argparse.Namespace, found: Search) -> int:
    """Write the slices of the scans that were found; returns the exit code."""
    was_cut_off = not _is_finished(args.processed)
    record = _begin_record(args, found)
    _write_record(args.processed, record)  # first, so that an interrupted run resumes with the same splits
    for _, why in found.refused:
        log.warning("skipped %s", why)
    results = list(zip(found.scans, _run_workers(args, found.scans), strict=True))
    counts = Counter(state for _, (state, _) in results)
    skipped = found.refused + [(str(scan.path), why) for scan, (state, why) in results if state == "skipped"]
    stored = list(list_scans(args.processed))
    record |= {
        "scans": dict(Counter(f"{old.split}/{old.label}" for old in stored)),
        "subjects": len({old.subject for old in stored}),
        "skipped": [{"file": path, "why": why} for path, why in skipped],
        "left_out": [{"file": path, "why": why} for path, why in found.left_out],
    }
    if stored and (counts["done"] or was_cut_off):
        try:
            draw_contact_sheet(stored, args.processed)
        except OSError as error:
            raise DataError(f"{args.processed / 'qc.png'}: cannot be written ({explain(error)})") from error
    warn_of_scans(stored)
    stripped = sum("stripped" in old.record for old in stored)
    if stripped:
        log.info("the brain was extracted from %d heads; check its outline in %s", stripped, args.processed / "qc.png")
    _write_record(args.processed, record)  # last: with "scans" in it, the rest is complete
    log.info(
        f"{counts['done']} done, {counts['unchanged']} unchanged, {len(skipped)} skipped; slices in {args.processed}"
    )
    if not counts["done"] + counts["unchanged"]:
        raise DataError(f"{args.raw}: not one of its {len(skipped)} scans could be used; see the lines above")
    refuse_copies((f"{old.split}/{old.label}", old) for old in stored)
    refuse_mixture("lack the skull", ((old.record.get("skull_off"), old.folder) for old in stored))
    return 3 if skipped else 0


def _run_workers(args: argparse.Namespace, scans: list[Scan]) -> list[tuple[str, str]]:
    """`preprocess_scan` of all scans, on this machine or on a cluster; what it returns, in the order of the scans."""
    labels = tuple(sorted(set(args.lesion_labels))) if args.lesion_labels else None
    settings = CutSettings(args.keep, args.size, args.fov_mm, args.volume, labels, args.strip)
    results = []
    calls = [(scan, args.processed, settings) for scan in scans]
    running = run_in_workers(preprocess_scan, calls, args.workers, args.dask)
    for state, why in tqdm(running, "preprocessing", len(scans), unit="scan", disable=args.quiet or None):
        if state == "skipped":
            log.warning("skipped %s", why)
        results.append((state, why))
    return results


def _begin_record(args: argparse.Namespace, found: Search) -> dict:
    """The part of dataset.json that is known before the scans are processed."""
    return {
        "layout": found.layout,
        "format": FORMAT,
        "flags": list_flags(args),
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (numpy, scipy, nibabel)},
        "splits": _read_splits(args) | {scan.subject: scan.split for scan in found.scans},
    }


def _read_old_record(processed: Path) -> dict | None:
    """`dataset.json` of an earlier run, None where there is none. Its splits become folders, so they are checked."""
    path = processed / "dataset.json"
    try:
        record = read_json(path, "delete it")
        if not set(record["splits"].values()) <= set(SPLITS):
            raise ValueError(f"its splits are not {', '.join(SPLITS)}")
        record["flags"]["split"], record["flags"]["seed"]  # KeyError where missing
        return record
    except FileNotFoundError:
        return None
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it") from error


def _read_splits(args: argparse.Namespace) -> dict[str, str]:
    """The splits of an earlier run with the same shares and seed, including scans that it did not reach."""
    old = _read_old_record(args.processed)
    same = old and (old["flags"]["split"], old["flags"]["seed"]) == (args.split, args.seed)
    return old["splits"] if same else {}


def _is_finished(processed: Path) -> bool:
    """Whether the last run into this folder finished."""
    return "scans" in (_read_old_record(processed) or {}) and (processed / "qc.png").exists()


def _write_record(processed: Path, record: dict) -> None:
    """Write `dataset.json`: what made this set of slices."""
    path = processed / "dataset.json"
    try:
        write_atomically(path, json.dumps(record, indent=1).encode())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({explain(error)})") from error
