"""Turn brain scans into axial slices for training and evaluation.

Takes the OASIS discs as downloaded, several other data sets, or any folder of .nii, .nii.gz, .hdr/.img and .mgz files,
and writes slices: upright, cropped around the brain, in [0, 1], split by subject. A folder with train/, val/ and test/,
normal/ and abnormal/ in it says itself who goes where; otherwise a clinical table or --label says who is normal.
Scans that are done and unchanged are skipped, so the same command again goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import joblib
import nibabel
import numpy
import scipy
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm

from common.cli import list_flags, parse_flags, read_axes, silence
from common.files import hold_folder
from preprocessing.clinical import read_clinical
from preprocessing.cohort import label_scans, refuse_mixture, split_subjects
from preprocessing.layouts import LAYOUTS
from preprocessing.qc import draw_contact_sheet
from preprocessing.scans import (
    LABELS,
    MODALITIES,
    SPLITS,
    TREE,
    DataError,
    Search,
    explain_ambiguous,
    explain_no_scans,
    refuse_leaks,
    search,
)
from preprocessing.store import clear_leftovers, list_scans
from preprocessing.subjects import key_subject, parse_pattern
from preprocessing.worker import FORMAT, CutSettings, preprocess_scan


def plan(args: argparse.Namespace, stored: list) -> Search:
    """Find the scans and decide each one's label and split; nothing is read but the clinical table."""
    found = search(args.raw, args.layout, args.modality, args.processed, args.subject_pattern)
    if not found.scans:
        raise DataError(found.refused[0][1] if found.refused else explain_no_scans(args.raw, found.left_out))
    in_tree = found.layout.startswith(TREE)
    if in_tree and args.label:
        raise DataError(f"{args.raw}: its folders give the labels already; leave --label out")
    if not (in_tree or args.label or args.clinical):
        raise DataError(
            f"{args.raw}: nothing says which of its {len(found.scans)} scans are normal; give the clinical table with "
            "--clinical FILE, or say --label normal (split by subject) or --label abnormal (all for testing)"
        )
    clinical = read_clinical(args.clinical) if args.clinical else None
    scans, not_labelled = label_scans(found.scans, clinical, args.label, args.blank_cdr)
    if not in_tree:
        kept = {old.subject: old.folder.relative_to(args.processed).parts[0] for old in stored}
        scans = split_subjects(scans, args.split, args.seed, _read_splits(args) | kept)
    if args.axes:
        scans = [replace(scan, axes=args.axes, doubted=None) for scan in scans]
    scans.sort(key=lambda scan: (SPLITS.index(scan.split), LABELS.index(scan.label), scan.name))
    if not scans:
        raise DataError(f"{args.raw}: none of its {len(found.scans)} scans has a label; {not_labelled[0][1]}")
    # One name under both labels is two scans (before and after); under the other label alone it has been relabelled.
    planned = {(scan.split, scan.label, scan.name) for scan in scans}
    for old in stored:
        split, label = old.folder.relative_to(args.processed).parts[:2]
        other = LABELS[1 - LABELS.index(label)]
        if (split, label, old.name) not in planned and (split, other, old.name) in planned:
            raise DataError(f"{old.folder}: is {split}/{other} now; delete this folder and start again")
    refuse_leaks(
        [(scan.subject, scan.split, str(scan.path)) for scan in scans]
        + [(old.subject, old.folder.relative_to(args.processed).parts[0], str(old.folder)) for old in stored]
    )
    refuse_mixture("have a brain mask", ((scan.brain_mask is not None, scan.path) for scan in scans))
    return found._replace(scans=scans, left_out=found.left_out + not_labelled)


def describe(args: argparse.Namespace, found: Search, stored: list) -> None:
    """Print what was found and what will be done with it, file by file in a dry run."""
    about = LAYOUTS[found.layout].about if found.layout in LAYOUTS else found.layout
    sessions = len({(scan.subject, scan.session or scan.name) for scan in found.scans})
    subjects = len({scan.subject for scan in found.scans})
    print(f"{about}: {len(found.scans)} scans of {subjects} subjects in {sessions} sessions in {args.raw}")
    ambiguous = explain_ambiguous(found.scans, args.raw)
    if ambiguous:
        print(f"  {ambiguous}")
    for split, label in dict.fromkeys((scan.split, scan.label) for scan in found.scans):
        group = [scan for scan in found.scans if (scan.split, scan.label) == (split, label)]
        subjects, masks = len({scan.subject for scan in group}), sum(scan.brain_mask is not None for scan in group)
        print(f"  {split}/{label}: {len(group)} scans of {subjects} subjects, {masks} with a brain mask")
        for scan in group if args.dry_run else ():
            axes = f", axes {scan.axes} unless its header tells" if scan.axes else ""
            print(f"    {scan.name}: subject {scan.subject}, session {scan.session or '-'}{axes}, {scan.path}")
    kept = len({key_subject(old.subject) for old in stored} & {key_subject(scan.subject) for scan in found.scans})
    if kept:
        print(f"  {kept} subjects have slices in {args.processed} and keep their split")
    if found.left_out:
        print(f"  left out: {len(found.left_out)} files{'' if args.dry_run else ' (--dry-run lists them)'}")
        for path, why in found.left_out if args.dry_run else ():
            print(f"    {path}: {why}")


def preprocess(args: argparse.Namespace) -> int:
    """Bring all scans of a folder into the store; returns the exit code: 0, or 3 where scans were skipped."""
    stored = list(list_scans(args.processed))
    found = plan(args, stored)
    describe(args, found, stored)
    if args.dry_run:
        for _, why in found.refused:
            print(f"would skip {why}", file=sys.stderr)
        return 3 if found.refused else 0
    with hold_folder(args.processed, "--processed"):
        return write_slices(args, found)


def write_slices(args: argparse.Namespace, found: Search) -> int:
    """Bring the scans that were found into the store; returns the exit code."""
    clear_leftovers(args.processed)
    # First, so that a run that is cut off goes on with the same splits.
    cut_off = not _is_finished(args.processed)
    record = _begin_record(args, found)
    _write_record(args.processed, record)
    counts, skipped = Counter(skipped=len(found.refused)), list(found.refused)
    for _, why in skipped:
        print(f"skipped {why}", file=sys.stderr)
    settings = CutSettings(args.keep, args.size, args.fov_mm, args.volume)
    with _work_on(args.dask):
        results = Parallel(n_jobs=args.workers, return_as="generator")(
            delayed(preprocess_scan)(scan, args.processed, settings) for scan in found.scans
        )
        progress = tqdm(results, total=len(found.scans), desc="preprocessing", unit="scan", disable=args.quiet or None)
        for scan, (state, why) in zip(found.scans, progress, strict=True):
            counts[state] += 1
            if why:
                skipped.append((str(scan.path), why))
                tqdm.write(f"skipped {why}", file=sys.stderr)
    stored = list(list_scans(args.processed))
    record |= {
        "scans": dict(Counter("/".join(old.folder.relative_to(args.processed).parts[:2]) for old in stored)),
        "subjects": len({old.subject for old in stored}),
        "skipped": [{"file": path, "why": why} for path, why in skipped],
        "left_out": [{"file": path, "why": why} for path, why in found.left_out],
    }
    if stored and (counts["done"] or cut_off):
        try:
            draw_contact_sheet(stored, args.processed)
        except OSError as error:
            raise DataError(f"{args.processed / 'qc.png'}: cannot be written ({error}); free some space") from error
    _write_record(args.processed, record)  # again and last: with "scans" in it, it says that the rest is whole
    print(
        f"{counts['done']} done, {counts['unchanged']} unchanged, {counts['skipped']} skipped; "
        f"slices in {args.processed}"
    )
    if not counts["done"] + counts["unchanged"]:
        raise DataError(f"{args.raw}: not one of its {counts['skipped']} scans could be used; see the lines above")
    refuse_mixture("have their skull off", ((old.record.get("skull_off"), old.folder) for old in stored))
    return 3 if counts["skipped"] else 0


@contextlib.contextmanager
def _work_on(scheduler: str | None):
    """Make joblib work on the Dask cluster at that address; without one, on this machine."""
    if scheduler is None:
        yield
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise DataError("--dask needs Dask: pip install -r requirements-dask.txt") from error
    try:
        client = Client(scheduler, timeout=20)
    except (OSError, ValueError) as error:
        raise DataError(f"{scheduler}: no Dask scheduler answers there; start one with `dask scheduler`") from error
    try:
        with client, joblib.parallel_config(backend="dask"):
            yield
    except ImportError as error:
        raise DataError(
            f"{scheduler}: its workers lack {error.name}; start them in this repository's folder"
        ) from error
    except Exception as error:  # whatever breaks in a cluster, the cure is the same
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{scheduler}: the cluster failed ({reason}); start again, it goes on where it was") from error


def _begin_record(args: argparse.Namespace, found: Search) -> dict:
    """What is known of the set before its scans are done."""
    return {
        "layout": found.layout,
        "format": FORMAT,
        "flags": list_flags(args),
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (numpy, scipy, nibabel)},
        "splits": _read_splits(args) | {scan.subject: scan.split for scan in found.scans},
    }


def _read_old_record(processed: Path) -> dict | None:
    """`dataset.json` of an earlier run, None where there is none. What it says becomes folders, so it is checked."""
    path = processed / "dataset.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not set(record["splits"].values()) <= set(SPLITS):
            raise ValueError("a split that is none")
        record["flags"]["split"], record["flags"]["seed"]  # there or a KeyError
        return record
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it") from error


def _read_splits(args: argparse.Namespace) -> dict[str, str]:
    """The splits that an earlier run gave with the same shares and seed, whether its scans were done or not."""
    old = _read_old_record(args.processed)
    same = old and (old["flags"]["split"], old["flags"]["seed"]) == (args.split, args.seed)
    return old["splits"] if same else {}


def _is_finished(processed: Path) -> bool:
    """Whether the last run there came to its end."""
    return "scans" in (_read_old_record(processed) or {}) and (processed / "qc.png").exists()


def _write_record(processed: Path, record: dict) -> None:
    """Write `dataset.json`, whole or not at all: what made this set of slices."""
    path = processed / "dataset.json"
    try:
        processed.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(".dataset.json.partial")
        unfinished.write_text(json.dumps(record, indent=1), encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); give another --processed") from error


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=formatter)
    parser.add_argument("--raw", type=Path, default=Path("Dataset"), help="folder with the scans")
    parser.add_argument("--processed", type=Path, default=Path("Dataset/processed"), help="where the slices go")
    parser.add_argument("--layout", choices=[*LAYOUTS], help="how the folder stands on disk; left out: looked at")
    parser.add_argument("--modality", choices=MODALITIES, default="t1", help="contrast to take")
    parser.add_argument(
        "--subject-pattern",
        type=parse_pattern,
        metavar="REGEX",
        help="who is who: searched in each path below --raw, the subject in parentheses; left out: names are read",
    )
    parser.add_argument("--clinical", type=Path, help="clinical table (.csv, .tsv, .xlsx) that says who is normal")
    parser.add_argument("--blank-cdr", choices=LABELS, help="label where the table is blank; left out: not used")
    parser.add_argument("--label", choices=LABELS, help="label of all scans, where there is no table")
    parser.add_argument(
        "--split", type=float, nargs=3, metavar=tuple(SPLITS), default=[0.8, 0.1, 0.1], help="shares of normal subjects"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--axes", type=read_axes, help="where stored axes point to if no header tells, such as ASL")
    parser.add_argument("--volume", type=int, help="which volume of files with several, from 0")
    parser.add_argument("--keep", type=float, default=0.7, help="share of axial slices kept, the middle ones, (0, 1]")
    parser.add_argument("--size", type=int, default=128, help="pixels along each side of a slice")
    parser.add_argument("--fov-mm", type=float, help="side of a slice in mm; left out: 200 for brains, 256 for heads")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="scans in work at a time")
    parser.add_argument("--dask", metavar="tcp://HOST:PORT", help="work on the Dask cluster of this scheduler")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done, file by file")
    parser.add_argument("--quiet", action="store_true", help="no progress, nothing on standard output; errors remain")
    parser.add_argument("--json", action="store_true", help="print dataset.json on standard output and nothing else")
    args = parse_flags(parser, argv)
    if not 0 < args.keep <= 1:
        parser.error("--keep is a share of the slices: above 0, at most 1")
    if args.size < 16 or args.size % 16:
        parser.error("--size is a multiple of 16")
    if args.fov_mm is not None and args.fov_mm <= 0:
        parser.error("--fov-mm is above 0")
    if min(args.split) < 0 or abs(sum(args.split) - 1) > 1e-6:
        parser.error("--split is three shares that sum to 1")
    if args.workers < 1:
        parser.error("--workers is at least 1")
    if args.json and args.dry_run:
        parser.error("--json is about what was done, --dry-run does nothing; leave one out")
    if args.volume is not None and args.volume < 0:
        parser.error("--volume counts from 0")
    try:
        with silence(args.quiet or args.json):
            code = preprocess(args)
    except TerminatedWorkerError as error:
        raise DataError("a worker was killed, probably for want of memory; start again with fewer --workers") from error
    if args.json:
        print((args.processed / "dataset.json").read_text(encoding="utf-8"))
    return code


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may hold anything
    try:
        sys.exit(main())
    except (DataError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a long --dry-run has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
