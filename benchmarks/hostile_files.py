"""Mutated scans through preprocessing and --scan: does any end in a traceback, hang, store NaN or fill the memory?

Makes a small head in each format, and of each many files with flipped bits, cut ends, extreme header fields, pieces
missing or doubled. Prints a table and one JSON line last; the exit code is 1 where something went wrong.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.interrupts import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()  # while the rest is imported

import nibabel as nib
import numpy as np
from tqdm import tqdm

from common.cli import DataError, Parser, run_script
from preprocessing.store import list_scans

PROJECT = Path(__file__).resolve().parents[1]
BATCH = 50  # scans a command of --scan
KINDS = ("nii", "nii.gz", "repacked", "nii2", "mgz", "hdr", "img")  # repacked: mutated within a gzip that is whole
HEADERS = {"nii2": nib.Nifti2Header, "hdr": nib.AnalyzeHeader}
EXTREMES = (0, 1, -1, 2, 127, -128, 255, 32767, -32768, 65535, 2**31 - 1, -(2**31), 2**62, 1e-38, 1e38, np.inf, np.nan)
EXAMPLE = """example:
  python benchmarks/hostile_files.py --files 200"""


@dataclass
class Outcome:
    """What happened to the files in preprocessing or in --scan."""

    files: int = 0
    used: int = 0
    named: int = 0  # refused in a line that names them
    lost: int = 0  # neither
    tracebacks: int = 0
    hangs: int = 0
    not_finite: int = 0  # scans with NaN or infinity in what is stored or printed
    peak_mb: int = 0
    seconds: float = 0.0

    @property
    def faults(self) -> int:
        return self.lost + self.tracebacks + self.hangs + self.not_finite


def make_head(shape: tuple[int, int, int] = (24, 28, 26), spacing_mm: float = 7.0) -> tuple[np.ndarray, np.ndarray]:
    """(values (X, Y, Z) int16 of a textured ellipsoid in RAS, affine (4, 4))."""
    axes = [(np.arange(count) - (count - 1) / 2) * spacing_mm for count in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    inside = (x / 66) ** 2 + (y / 82) ** 2 + (z / 64) ** 2 < 1
    values = 500 + 2 * x + y + 1.5 * z + np.random.default_rng(0).uniform(0, 40, shape)
    affine = np.diag([spacing_mm] * 3 + [1.0])
    affine[:3, 3] = [axis[0] for axis in axes]
    return np.where(inside, values, 0).astype(np.int16), affine


def write_originals(folder: Path) -> dict[str, bytes]:
    """{kind or ending: the whole file} of the head."""
    values, affine = make_head()
    nib.save(nib.Nifti1Image(values, affine), folder / "a.nii")
    nib.save(nib.Nifti1Image(values, affine), folder / "a.nii.gz")
    nib.save(nib.Nifti2Image(values, affine), folder / "b.nii")
    nib.save(nib.MGHImage(values, affine), folder / "a.mgz")
    nib.save(nib.AnalyzeImage(values, None), folder / "a.img")
    content = {path.name.removeprefix("a."): path.read_bytes() for path in folder.iterdir()}
    return content | {"nii2": content.pop("b.nii"), "repacked": content["nii"]}


def mutate(content: bytes, kind: str, rng: random.Random) -> bytes:
    """One of the ways in which a file goes wrong."""
    way = rng.choice(("flip", "flip header", "cut", "field", "field", "piece", "noise"))
    if way == "field" and kind not in ("mgz", "nii.gz", "img"):
        return change_fields(content, HEADERS.get(kind, nib.Nifti1Header), rng)
    if way == "cut":
        return content[: rng.randrange(len(content))]
    if way == "noise":
        return rng.randbytes(rng.randrange(5000))
    if way == "piece":  # it goes missing or comes twice
        start = rng.randrange(len(content))
        end = start + rng.randrange(1, 5000)
        return content[:start] + content[start:end] * rng.choice((0, 2)) + content[end:]
    changed = bytearray(content)
    for _ in range(rng.randint(1, 100 if way == "flip" else 6)):
        changed[rng.randrange(min(len(content), 540) if way == "flip header" else len(content))] ^= 1 << rng.randrange(
            8
        )
    return bytes(changed)


def change_fields(content: bytes, kind: type, rng: random.Random) -> bytes:
    """Extreme numbers in one to three fields of the header."""
    header = np.frombuffer(content[: kind.template_dtype.itemsize], kind.template_dtype).copy()
    for name in rng.sample(header.dtype.names, rng.randint(1, 3)):
        if header.dtype[name].base.kind in "iuf":
            with np.errstate(all="ignore"):
                value = np.array(rng.choice(EXTREMES)).astype(header.dtype[name].base)
            place = header[name].reshape(-1)
            place[rng.randrange(len(place))] = value
    return header.tobytes() + content[header.nbytes :]


def write_mutated(folder: Path, count: int, seed: int) -> list[Path]:
    """Write so many mutated scans, the kinds in turn; returns the files that a command is given."""
    folder.mkdir(parents=True)
    rng, paths = random.Random(seed), []
    with tempfile.TemporaryDirectory() as place:
        originals = write_originals(Path(place))
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        content = mutate(originals[kind], kind, rng)
        ending = {"repacked": "nii.gz", "nii2": "nii", "hdr": "img"}.get(kind, kind)
        path = folder / f"{kind.replace('.', '-')}-{number:04d}.{ending}"
        if ending == "img":
            path.with_suffix(".hdr").write_bytes(content if kind == "hdr" else originals["hdr"])
            content = originals["img"] if kind == "hdr" else content
        path.write_bytes(gzip.compress(content, 1) if kind == "repacked" else content)
        paths.append(path)
    return paths


def run(script: str, arguments: list, limit_s: float | None, outcome: Outcome) -> tuple[str, str]:
    """Run a script of the project; (standard output, standard error). How it went is added to the outcome."""
    began = time.monotonic()
    command = [sys.executable, str(PROJECT / script), *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        outcome.hangs += 1
        print(f"hangs: {' '.join(command)[:2000]}", file=sys.stderr)
        return (error.stdout or b"").decode(errors="replace"), (error.stderr or b"").decode(errors="replace")
    finally:
        outcome.seconds += time.monotonic() - began
        outcome.peak_mb = max(outcome.peak_mb, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
    err = done.stderr.decode(errors="replace")
    outcome.tracebacks += err.count("Traceback")
    if "Traceback" in err or done.returncode not in (0, 1, 3):
        print(f"code {done.returncode}: {err[-2000:]}", file=sys.stderr)
        outcome.tracebacks += "Traceback" not in err
    return done.stdout.decode(errors="replace"), err


def preprocess_all(raw: Path, processed: Path, paths: list[Path], limit_s: float) -> Outcome:
    """All files in one folder through preprocessing."""
    outcome = Outcome(len(paths))
    flags = ["--raw", raw, "--processed", processed, "--size", 32, "--workers", 1, "--axes", "RAS", "--fov-mm", 200]
    _, err = run("preprocessing/preprocess_oasis.py", [*flags, "--quiet"], limit_s * len(paths), outcome)
    scans = {scan.name: scan for scan in list_scans(processed)}
    outcome.used = len(scans)
    outcome.named = sum(f"{path}" in err for path in paths if path.name.split(".")[0] not in scans)
    outcome.lost = len(paths) - outcome.used - outcome.named
    outcome.not_finite = sum(not np.isfinite(scan.read_stack()).all() for scan in scans.values())
    return outcome


def predict_all(run_folder: Path, out: Path, paths: list[Path], limit_s: float) -> Outcome:
    """All files through --scan, BATCH in each command."""
    outcome = Outcome(len(paths))
    for start in tqdm(range(0, len(paths), BATCH), desc="predicting", unit="batch", disable=None):
        batch = paths[start : start + BATCH]
        flags = ["--run", run_folder, "--out", out, "--device", "cpu", "--axes", "RAS", "--json", "--quiet"]
        said, err = run("evaluation/evaluate.py", [*flags, "--scan", *batch], limit_s * len(batch), outcome)
        try:
            found = json.loads(said)["scans"]
        except ValueError:
            found = []
        outcome.used += len(found)
        used = {one["file"] for one in found}
        outcome.named += sum(f"{path}" in err or f"{path.with_suffix('.hdr')}" in err for path in batch
                             if str(path) not in used)  # fmt: skip
        for one in found:
            anomaly = np.asarray(nib.load(one["files"]["map"]).dataobj)
            finite = np.isfinite([one["score"], one["p_value"]]).all() and not np.isinf(anomaly).any()
            outcome.not_finite += not (finite and np.isfinite(anomaly).any())
    outcome.lost = outcome.files - outcome.used - outcome.named
    return outcome


def train_tiny(folder: Path) -> Path:
    """A model trained for two steps on simulated scans; its scores mean nothing."""
    outcome = Outcome()
    sizes = ["--train", 2, "--val", 2, "--test-normal", 0, "--test-abnormal", 0, "--voxel-size", 6, "--workers", 1]
    run("preprocessing/demo_cohort.py", ["--raw", folder / "raw", *sizes], None, outcome)
    stores = ["--raw", folder / "raw", "--processed", folder / "slices", "--size", 32, "--workers", 1]
    run("preprocessing/preprocess_oasis.py", stores, None, outcome)
    network = ["--steps", 2, "--width", 8, "--batch-size", 4, "--device", "cpu", "--precision", "fp32"]
    _, err = run("training/train.py", ["--data", folder / "slices", "--run", folder / "run", *network], None, outcome)
    if not (folder / "run" / "model.pt").exists():
        raise DataError(f"{folder / 'run'}: no model was trained: {err[-500:]}")
    return folder / "run"


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=EXAMPLE)
    parser.add_argument("--files", type=int, default=1000, help="mutated files")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--limit-s", type=float, default=20.0, help="seconds a file, above which a command hangs")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        paths = write_mutated(folder / "hostile/train/normal", args.files, args.seed)
        # preprocessing first: the peak memory is that of all that has run so far
        outcomes = {"preprocessing": preprocess_all(folder / "hostile", folder / "processed", paths, args.limit_s)}
        outcomes["--scan"] = predict_all(train_tiny(folder / "tiny"), folder / "out", paths, args.limit_s)
    names = [field.name for field in fields(Outcome)]
    print(f"{'':14s}" + "".join(f"{name:>12s}" for name in names))
    for way, outcome in outcomes.items():
        print(f"{way:14s}" + "".join(f"{value:12.0f}" for value in asdict(outcome).values()))
    print(json.dumps({"seed": args.seed} | {way: asdict(outcome) for way, outcome in outcomes.items()}))
    return int(any(outcome.faults for outcome in outcomes.values()))


if __name__ == "__main__":
    run_script(main)
