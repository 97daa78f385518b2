"""How listing, preprocessing again, training and evaluation grow with the number of scans.

The scans are tiny copies of one. Of an evaluation, what comes after the prediction of each scan is measured: tables,
figures and report. Prints a table of seconds and peak memory, and one JSON line last; --plot also draws them.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.interrupts import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()  # while the rest is imported

import nibabel as nib
import numpy as np

from common.cli import DataError, Parser, bounded, run_script

PROJECT = Path(__file__).resolve().parents[1]
LISTING = "import sys, preprocessing.store as s; scans = list(s.list_scans(s.Path(sys.argv[1])))"
EXAMPLE = "example:\n  python benchmarks/growth.py --scans 1000 5000 20000"


def clone_scans(folder: Path, count: int, slope: float = 100) -> list[str]:
    """Make `count` tiny scans, raw and preprocessed, from one: the raw files differ in a word of their header.

    Returns the command (without the interpreter) that preprocesses them. With another slope they are other scans.
    """
    raw, processed = folder / "raw", folder / "processed"
    raw.mkdir(parents=True)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (12, 14, 12)], indexing="ij"))
    values = np.where((grid**2).sum(0) < 0.8, 500 + slope * grid[0] + 50 * grid[2], 0).astype(np.int16)
    image = nib.Nifti1Image(values, np.diag([12.0, 12.0, 12.0, 1]))
    image.header["descrip"] = "sub-000000"
    content = image.to_bytes()
    (raw / "sub-000000_T1w.nii").write_bytes(content)
    command = ["preprocessing/preprocess_oasis.py", "--raw", raw, "--processed", processed, "--label", "normal"]
    command += ["--split", "1", "0", "0", "--size", "16", "--keep", "0.1", "--workers", "1"]
    subprocess.run([sys.executable, *command], cwd=PROJECT, check=True, capture_output=True)
    done = processed / "train" / "normal" / "sub-000000_T1w"
    text = (done / "scan.json").read_text()
    voxels, file = json.loads(text)["content"], hashlib.sha256(content).hexdigest()
    for number in range(1, count):
        name = f"sub-{number:06d}"
        renamed = content.replace(b"sub-000000", name.encode())
        (raw / f"{name}_T1w.nii").write_bytes(renamed)
        shutil.copytree(done, done.with_name(f"{name}_T1w"))
        own = hashlib.sha256(renamed).hexdigest()
        changed = text.replace("sub-000000", name).replace(file, own).replace(voxels, own[:32])  # else copies of one
        done.with_name(f"{name}_T1w").joinpath("scan.json").write_text(changed)
    return command


def train_one_step(folder: Path, count: int) -> list[str]:
    """The command (without the interpreter) that trains one step on the cloned scans; 20 of them validate."""
    flags = ["--steps", "1", "--width", "8", "--no-in-memory", "--device", "cpu", "--precision", "fp32"]
    flags += ["--data", folder / "processed", "--run", folder / "run", "--val-fraction", str(20 / count)]
    return ["training/train.py", *flags]


def predict_all(folder: Path, run: Path) -> list[str]:
    """The command (without the interpreter) that evaluates the cloned scans, each predicted already: copies of one.

    Runs in a process of its own: what a process has loaded counts as memory of those that it starts.
    """
    import torch

    from evaluation.predictor import Predictor
    from evaluation.test_set import TestSet, clear_folder, describe_settings, find_scans
    from evaluation.worker import PredictSettings, find_result, predict_scan

    out, data = folder / "evaluation", folder / "processed" / "train"
    predictor = Predictor.load(run / "model.pt", torch.device("cpu"))
    test_set = TestSet(run, data, out, False, False, "worst", None, "cpu", 1, None, True, {})
    scans, _ = find_scans(test_set, predictor)
    out.mkdir()
    clear_folder(out, settings := describe_settings(test_set, predictor, scans, {}))
    first, name = scans[0], scans[0].subject
    predict_scan(first, "", PredictSettings(run / "model.pt", settings["model"], "cpu", (), out, False, None, "worst"))
    texts = [path.read_text() for path in find_result(out, first)]
    for scan in scans[1:]:
        for path, text in zip(find_result(out, scan), texts, strict=True):
            path.write_text(text.replace(name, scan.subject))
    return ["evaluation/evaluate.py", "--run", run, "--data", data, "--out", out, "--device", "cpu"]


def measure_process(command: list) -> tuple[float, float]:
    """(seconds, peak MB) of a command of this project."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=PROJECT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise DataError(f"{' '.join(map(str, command))}: failed")
    return time.perf_counter() - began, usage.ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def measure_growth(counts: list[int], folder: Path) -> dict[str, list[tuple[float, float]]]:
    """{what: [(seconds, peak MB) for each count]}."""
    table = {}
    clone_scans(folder / "other", 50, slope=80)
    measure_process(train_one_step(folder / "other", 50))
    for count in counts:
        place = folder / str(count)
        preprocessing = clone_scans(place, count)
        table.setdefault("listing", []).append(measure_process(["-c", LISTING, place / "processed"]))
        table.setdefault("second preprocessing", []).append(measure_process(preprocessing))
        table.setdefault("training of one step", []).append(measure_process(train_one_step(place, count)))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            evaluating = apart.submit(predict_all, place, folder / "other" / "run").result()
        table.setdefault("evaluation, after the predictions", []).append(measure_process(evaluating))
        shutil.rmtree(place)
    return table


def draw(counts: list[int], table: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Seconds and peak memory against the number of scans, both on logarithmic scales."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for place, (axis, label) in enumerate(zip(axes, ("seconds", "peak memory, MB"), strict=True)):
        for what, row in table.items():
            axis.loglog(counts, [cell[place] for cell in row], "o-", label=what)
        axis.set(xlabel="scans", ylabel=label)
        axis.set_xticks(counts, labels=[f"{count:,}" for count in counts])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=EXAMPLE)
    parser.add_argument(
        "--scans", type=bounded(int, least=50), nargs="+", default=[1000, 5000], metavar="N", help="numbers of scans"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the figures into this file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        table = measure_growth(args.scans, Path(temporary))
    if args.plot:
        draw(args.scans, table, args.plot)
    print(f"{'':34}" + "".join(f"{count:>18,} scans" for count in args.scans))
    for what, row in table.items():
        print(f"{what:34}" + "".join(f"{seconds:12.1f} s {mb:6.0f} MB" for seconds, mb in row))
    print(json.dumps({what: [[round(value, 1) for value in cell] for cell in row] for what, row in table.items()}))
    return 0


if __name__ == "__main__":
    run_script(main)
