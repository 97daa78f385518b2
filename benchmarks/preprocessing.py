"""Speed of preprocessing against only reading and decompressing the same files, and its memory.

Run it on an idle machine. Without --raw it makes a demo cohort at 1 mm first. Prints a table and one JSON line last.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # one core a worker

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.interrupts import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()  # while the rest is imported

import nibabel as nib
import numpy as np
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor

from common.cli import DataError, Parser, bounded, run_script
from preprocessing.scans import TREE, Scan, explain_no_scans, search
from preprocessing.worker import CutSettings, preprocess_scan

SETTINGS = CutSettings(keep=0.7, size=128)
DEMO = Path(__file__).resolve().parents[1] / "preprocessing" / "demo_cohort.py"


def list_files(scans: list[Scan]) -> list[Path]:
    return [path for scan in scans for path in (scan.path, scan.brain_mask, scan.lesion_mask) if path]


def time_reading(scans: list[Scan]) -> float:
    """Seconds to read and decompress every file."""
    start = time.perf_counter()
    for path in list_files(scans):
        content = path.read_bytes()
        if path.name.endswith(".gz"):
            zlib.decompress(content, 31)
    return time.perf_counter() - start


def time_preprocessing(scans: list[Scan], folder: Path, parallel: Parallel) -> float:
    """Seconds to bring every scan into a new store."""
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    results = parallel(delayed(preprocess_scan)(scan, folder, SETTINGS) for scan in scans)
    seconds = time.perf_counter() - start
    for state, why in results:
        if state != "done":
            raise DataError(why)
    return seconds


def measure_memory(scan: Scan, folder: Path) -> float:
    """MB by which the peak memory of a new process grows over one scan, all modules loaded."""
    to_mb = 1 / 1024**2 if sys.platform == "darwin" else 1 / 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state, why = preprocess_scan(scan, folder, SETTINGS)
    if state != "done":
        raise DataError(why)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * to_mb


def measure(raw: Path, store: Path, number: int, repeats: int) -> dict[str, float]:
    """Scans a second of each way, the best of the repeats, and the memory of a worker."""
    scans = search(raw, TREE).scans[:number]
    if not scans:
        raise DataError(explain_no_scans(raw))
    sizes = {scan.path: np.prod(nib.load(scan.path).shape) for scan in scans}
    executor = get_reusable_executor(max_workers=1)
    worker_mb = executor.submit(measure_memory, max(scans, key=lambda scan: sizes[scan.path]), store).result()
    executor.shutdown()
    best = dict.fromkeys(("reading", "one worker", "two workers"), np.inf)
    with Parallel(n_jobs=1) as one, Parallel(n_jobs=2) as two:
        time_reading(scans)  # so that every round finds the files in memory
        time_preprocessing(scans[:2], store, two)  # so that no round waits for a worker to start
        for _ in range(repeats):
            best["reading"] = min(best["reading"], time_reading(scans))
            best["one worker"] = min(best["one worker"], time_preprocessing(scans, store, one))
            best["two workers"] = min(best["two workers"], time_preprocessing(scans, store, two))
    rates = {way: len(scans) / seconds for way, seconds in best.items()}
    return {
        "scans": len(scans),
        "reading_rate": rates["reading"],
        "one_worker_rate": rates["one worker"],
        "two_workers_rate": rates["two workers"],
        "of_reading": rates["one worker"] / rates["reading"],
        "two_to_one": rates["two workers"] / rates["one worker"],
        "worker_mb": worker_mb,
        "worker_volumes": worker_mb / (max(sizes.values()) * 4 / 1024**2),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line's flags, checked."""
    parser = Parser(description=__doc__)
    parser.add_argument("--raw", type=Path, help="folder with train/, val/, test/; left out: a demo cohort is made")
    parser.add_argument("--scans", type=bounded(int, least=1), default=8, help="how many of them")
    parser.add_argument(
        "--repeats", type=bounded(int, least=1), default=3, help="how often each is timed; the best counts"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse(argv)
    with tempfile.TemporaryDirectory() as temporary:
        raw, store = args.raw or Path(temporary, "raw"), Path(temporary, "processed")
        if args.raw is None:
            counts = ["--train", str(args.scans), "--val", "0", "--test-normal", "0", "--test-abnormal", "0"]
            subprocess.run([sys.executable, DEMO, "--raw", raw, *counts, "--voxel-size", "1"], check=True)
        figures = measure(raw, store, args.scans, args.repeats)
    for way in ("reading", "one worker", "two workers"):
        rate = figures[f"{way.replace(' ', '_')}_rate"]
        print(f"{way:12} {1000 / rate:8.1f} ms a scan {rate:8.1f} scans a second")
    print(f"{'memory':12} {figures['worker_mb']:8.1f} MB a worker {figures['worker_volumes']:8.2f} volumes in float32")
    print(json.dumps({key: round(float(value), 3) for key, value in figures.items()}))
    return 0


if __name__ == "__main__":
    run_script(main)
