"""Turn brain scans into axial slices for training and evaluation.

Reads `<raw>/{train,val,test}/{normal,abnormal}/…` (.nii, .nii.gz, .hdr/.img), with brain and lesion masks in
`<raw>/<split>/masks/<id>_brain.nii.gz` and `<id>_lesion.nii.gz` where there are any, and writes the same tree as
slices: upright, cropped around the brain, in [0, 1]. Scans that are done and unchanged are skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections import Counter
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from joblib import Parallel, delayed
from tqdm import tqdm

from preprocessing.scans import DataError, Scan, find_scans, refuse_leaks
from preprocessing.slices import list_scans, read_scan, write_scan
from preprocessing.volume import cut_mask, cut_stack, find_brain, read_mask, read_volume

FORMAT = 2  # of what is written; raise it when the same scan would give other slices


def preprocess_scan(scan: Scan, processed: Path, keep: float, size: int, fov_mm: float | None) -> tuple[str, str]:
    """Bring one scan from its file into the store. Returns ("done" | "unchanged" | "skipped", why it was skipped)."""
    folder = processed / scan.split / scan.label / scan.name
    try:
        files = [path for path in (scan.path, scan.brain_mask, scan.lesion_mask) if path]
        settings = {
            "format": FORMAT,
            "sources": {path.name: _hash_file(path) for path in files},
            "keep": keep,
            "fov_mm": fov_mm,
            "size": size,
        }
        old = read_scan(folder)
        if old and all(old.record.get(key) == value for key, value in settings.items()):
            return "unchanged", ""
        volume = read_volume(scan.path)
        brain, skull_off = (read_mask(scan.brain_mask, volume), True) if scan.brain_mask else find_brain(volume)
        fov = fov_mm or (200.0 if skull_off else 256.0)
        try:
            stack, geometry = cut_stack(volume, brain, skull_off, keep, size, fov)
        except DataError as error:
            raise DataError(f"{scan.path}: {error}") from error
        record = {"scan": scan.name, "subject": scan.subject, "session": scan.session, "source": str(scan.path)}
        lesion = None
        if scan.lesion_mask:
            mask = read_mask(scan.lesion_mask, volume)
            lesion = cut_mask(mask, geometry)
            record["lesion_voxels"] = mask.sum(axis=(0, 1))[geometry["slices"]].tolist()  # on the scan's own grid
        write_scan(folder, stack, lesion, record | settings | geometry)
        return "done", ""
    except (DataError, OSError) as error:
        return "skipped", str(error)


def preprocess(raw: Path, processed: Path, keep: float, size: int, fov_mm: float | None, workers: int) -> int:
    """Bring all scans of a folder into the store; returns the exit code: 0, or 3 where scans were skipped."""
    scans = find_scans(raw)
    planned = [(scan.subject, scan.split, str(scan.path)) for scan in scans]
    stored = [
        (old.subject, old.folder.relative_to(processed).parts[0], str(old.folder)) for old in list_scans(processed)
    ]
    refuse_leaks(planned + stored)
    print(f"{len(scans)} scans of {len({scan.subject for scan in scans})} subjects in {raw}")
    for (split, label), count in Counter((scan.split, scan.label) for scan in scans).items():
        masks = sum(scan.brain_mask is not None for scan in scans if (scan.split, scan.label) == (split, label))
        print(f"  {split}/{label}: {count} scans, {masks} with a brain mask")
    results = Parallel(n_jobs=workers, return_as="generator")(
        delayed(preprocess_scan)(scan, processed, keep, size, fov_mm) for scan in scans
    )
    counts = Counter()
    for state, why in tqdm(results, total=len(scans), desc="preprocessing", unit="scan", disable=None):
        counts[state] += 1
        if why:
            tqdm.write(f"skipped {why}", file=sys.stderr)
    print(f"{counts['done']} done, {counts['unchanged']} unchanged, {counts['skipped']} skipped; slices in {processed}")
    if counts["skipped"] == len(scans):
        raise DataError(f"{raw}: not one of its {len(scans)} scans could be used; see the lines above")
    return 3 if counts["skipped"] else 0


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if sys.version_info >= (3, 11)
            else hashlib.sha256(file.read()).hexdigest()
        )


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=formatter)
    parser.add_argument("--raw", type=Path, default=Path("Dataset"), help="folder with train/, val/, test/")
    parser.add_argument("--processed", type=Path, default=Path("Dataset/processed"), help="where the slices go")
    parser.add_argument("--keep", type=float, default=0.7, help="share of axial slices kept, the middle ones, (0, 1]")
    parser.add_argument("--size", type=int, default=128, help="pixels along each side of a slice")
    parser.add_argument("--fov-mm", type=float, help="side of a slice in mm; left out: 200 for brains, 256 for heads")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="scans in work at a time")
    args = parser.parse_args(argv)
    if not 0 < args.keep <= 1:
        parser.error("--keep is a share of the slices: above 0, at most 1")
    if args.size < 16 or args.size % 16:
        parser.error("--size is a multiple of 16")
    if args.fov_mm is not None and args.fov_mm <= 0:
        parser.error("--fov-mm is above 0")
    return preprocess(args.raw, args.processed, args.keep, args.size, args.fov_mm, args.workers)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (DataError, OSError) as error:
        sys.exit(str(error))
