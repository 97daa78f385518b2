"""Measure training and evaluation against the plain loop (plain.py), and where the time of a step goes.

Same networks, corruption and slices, each loop in a process of its own; their rounds alternate, and each figure is the
median. `dae` is also measured against the plain loop with a small U-Net, for its architecture was chosen for speed too.
Run it on an idle machine. Prints tables and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.interrupts import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()  # while the rest is imported

import numpy as np
import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain import MODELS, PlainTraining, choose_pair, map_one_by_one
from common.cli import Parser, bounded, run_script
from common.device import PRECISIONS, choose_precision, keep_freed_memory
from models.anomaly import compute_residual, map_anomalies, reconstruct
from models.calibration import Calibration
from models.checkpoint import build_model
from preprocessing.geometry import Geometry
from preprocessing.store import StoredScan, list_scans, write_scan
from training.dataset import SliceDataset
from training.optimiser import OPTIMISERS
from training.recording import WARM_UP, Recording
from training.trainer import READ_LOSSES_EVERY, Trainer, sum_squares

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PIXEL_MM, SLICE_MM = 200 / 128, 2.0
TITLES = {"hobby": "full-resolution CAE", "dae": "dae", "cae": "cae"}
EXAMPLE = "example:\n  python benchmarks/speed.py --models dae --rounds 3"


class OurTraining(Trainer):
    """The project's own training, step by step."""

    def __init__(self, name: str, precision: str, scans: list[StoredScan], batch_size: int, in_memory: bool = True):
        config = {"network": {"model": name, "size": scans[0].size}, "precision": precision, "seed": 0, "lr": 1e-3}
        config["optimiser"] = OPTIMISERS.get(name, "adam")  # the CAE of notebooks has none of its own
        config |= {"batch_size": batch_size, "steps": 10**6}
        offsets = MODELS[name].neighbour_offsets
        datasets = [SliceDataset(part, in_memory, DEVICE, offsets) for part in (scans, scans[:1])]
        super().__init__(config, *datasets, Path())
        self.name, self.pairs = name, self.read_pairs()

    def make_pair(self, clean: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return choose_pair(self.name, clean, generator)

    def take_steps(self, steps: int) -> None:
        for _ in range(steps):
            self.unread_losses.append(self.train_step(*next(self.pairs)))
            if self.step % READ_LOSSES_EVERY == 0:
                self.read_losses()
        self.read_losses()

    def measure_loss(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        squares, pixels = sum_squares(self.forward(self.network, source), target)
        return squares / pixels

    def differentiate(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = self.measure_loss(source, target)
        self.model.zero_grad()
        loss.backward()
        return loss.detach()

    def profile(self, rounds: int, steps: int) -> dict[str, float]:
        """Seconds a step by what they go to, one after the other (a GPU does the corruption beside the rest)."""
        pair = next(self.pairs)
        works = {"forward": self.measure_loss, "backward": self.differentiate, "optimiser": self.move_weights}
        works = {name: partial(Recording(work), *pair) for name, work in works.items()}

        def repeat(work: Callable) -> None:
            for _ in range(steps):
                work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        works = {"corruption": partial(next, self.pairs)} | works
        seconds = alternate(rounds, **{name: partial(repeat, work) for name, work in works.items()})
        seconds["optimiser"] -= seconds["backward"]
        seconds["backward"] -= seconds["forward"]
        return {name: value / steps for name, value in seconds.items()}

    def count_flops(self) -> float:
        """Of the network in a step, forward and backward, without Muon; 2 for a multiplication and addition."""
        with FlopCounterMode(display=False) as counter:
            self.differentiate(*next(self.pairs))
        return counter.get_total_flops()


class Elsewhere:
    """Runs functions in another process, which shares no settings with this one."""

    def __init__(self):
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def __call__(self, function: Callable, *arguments) -> Callable[[], object]:
        return lambda: self.pool.submit(function, *arguments).result()


_kept = {}  # in such a process, its state between calls


def train_plainly(steps: int, name: str, folder: Path, batch_size: int) -> None:
    if name not in _kept:
        _kept[name] = PlainTraining(name, list(list_scans(folder)), batch_size)
    _kept[name].run(steps)


def train_ours(steps: int, precision: str, folder: Path, batch_size: int, in_memory: bool) -> None:
    if not _kept:
        keep_freed_memory()
        _kept["ours"] = OurTraining("dae", precision, list(list_scans(folder)), batch_size, in_memory)
    _kept["ours"].take_steps(steps)


def evaluate_plainly(scan: StoredScan, calibration: Calibration) -> None:
    if "dae" not in _kept:
        _kept["dae"] = build_model({"model": "dae", "size": scan.size}).to(DEVICE).eval()
    map_one_by_one(_kept["dae"], "dae", scan, calibration)


def alternate(rounds: int, **works: Callable) -> dict[str, float]:
    """{name: median seconds}; the functions alternate, so that disturbances hit all; the first round warms up."""
    seconds = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in seconds.items()}


def measure_matrices(precision: torch.dtype) -> float:
    """GFLOP/s of a matrix product, the best of several."""
    side = 8192 if DEVICE.type == "cuda" else 2048
    a, b = (torch.rand(side, side, device=DEVICE).to(precision) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * side**3 / min(timer.blocked_autorange(min_run_time=0.5).times) / 1e9


def make_store(folder: Path, scans: int, slices: int, size: int) -> list[StoredScan]:
    """Textured discs in the store's format."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    affine = tuple(map(tuple, np.diag([PIXEL_MM, PIXEL_MM, SLICE_MM, 1.0]).tolist()))
    geometry = Geometry(
        shape=(size, size, slices), affine=affine, axes="RAS", spacing_mm=(PIXEL_MM, PIXEL_MM, SLICE_MM),
        centre=((size - 1) / 2,) * 2, pixel_mm=PIXEL_MM, size=size, slices=tuple(range(slices)),
    )  # fmt: skip
    for number in range(scans):
        values = 0.5 + 0.2 * np.sin(rows / 5) * np.cos(columns / 6) + 0.05 * rng.normal(size=(slices, size, size))
        stack = np.where(np.hypot(rows, columns) < 0.4 * size, values.clip(0.01, 1), 0).astype(np.float16)
        source = f"{number}_T1w.nii"
        record = {"subject": str(number), "source": source, "sources": {source: f"{number:064d}"}}
        record |= {"format": 4, "keep": 1.0, "skull_off": True, "scale": [0, 1, 1]} | geometry.to_record()
        write_scan(folder / "train" / "normal" / f"{number}_T1w", stack, None, record)
    return list(list_scans(folder))


def show(what: str, slices: int, plain: float, ours: float) -> float:
    """Print slices a second of both, from their seconds; returns how many times as fast ours is."""
    print(f"{what:46}{slices / plain:10.1f}{slices / ours:10.1f}{plain / ours:8.2f}", flush=True)
    return plain / ours


def compare_training(args: argparse.Namespace, precision: str, folder: Path, scans: list[StoredScan]) -> dict:
    """Print slices a second of training; returns the ratios."""
    slices, elsewhere, figures = args.steps * args.batch_size, Elsewhere(), {}
    for name in args.models:
        ours = {kind: OurTraining(name, kind, scans, args.batch_size) for kind in dict.fromkeys((precision, "fp32"))}
        works = {kind: lambda work=work: work.take_steps(args.steps) for kind, work in ours.items()}
        works["plain"] = elsewhere(train_plainly, args.steps, name, folder, args.batch_size)
        if name == "dae":
            works["unet"] = elsewhere(train_plainly, args.steps, "unet", folder, args.batch_size)
        seconds = alternate(args.rounds, **works)
        for kind in ours:
            what = f"training, {TITLES[name]}, {kind}"
            figures[f"train_{name}_{kind}"] = show(what, slices, seconds["plain"], seconds[kind])
            if name == "dae":
                what = f"… against a small U-Net, {kind}"
                figures[f"train_dae_against_unet_{kind}"] = show(what, slices, seconds["unet"], seconds[kind])
    memory, disk = (  # in processes of their own: the reading threads of one would slow the other too
        Elsewhere()(train_ours, args.steps, precision, folder, args.batch_size, in_memory)
        for in_memory in (True, False)
    )
    seconds = alternate(args.rounds, memory=memory, disk=disk)
    figures["from_disk"] = show("training, dae, from disk, against in memory", slices, *seconds.values())
    return figures


def compare_evaluation(args: argparse.Namespace, precision: str, scan: StoredScan) -> dict:
    """Print slices a second of evaluation; returns their ratio, and the share of the map in our time."""
    model = build_model({"model": "dae", "size": args.size}).eval().to(DEVICE, memory_format=torch.channels_last)
    stack, sampling_mm = torch.from_numpy(scan.read_stack()).float().to(DEVICE), scan.geometry.sampling_mm

    def draw() -> torch.Tensor:
        return reconstruct(model, stack, sampling_mm[0], precision=PRECISIONS[precision])

    def make_map(drawn: torch.Tensor) -> torch.Tensor:
        divided = calibration.divide(compute_residual(stack, drawn, sampling_mm), stack > 0)
        return map_anomalies(divided, stack, drawn, sampling_mm, calibration.voxel_threshold).cpu()

    drawn = draw()
    calibration = Calibration.fit([(stack, other, sampling_mm) for other in (drawn, 2 * stack - drawn)])
    on_cpu = calibration.to("cpu")
    seconds = alternate(
        args.rounds,
        plain=Elsewhere()(evaluate_plainly, scan, on_cpu),
        ours=lambda: make_map(draw()),
        map=lambda: make_map(drawn),
    )
    ratio = show("evaluation of a scan, dae, slices to map", len(stack), seconds["plain"], seconds["ours"])
    return {"evaluate": ratio, "map_of_evaluation": seconds["map"] / seconds["ours"]}


def profile_step(args: argparse.Namespace, precision: str, scans: list[StoredScan], matrices: float) -> dict:
    """Print where the time of a step of dae goes; `matrices` is the GFLOP/s of a matrix product."""
    training = OurTraining("dae", precision, scans, args.batch_size)
    flops = training.count_flops()
    parts = training.profile(args.rounds, max(args.steps, WARM_UP + 1))  # the first round records
    total, network = sum(parts.values()), parts["forward"] + parts["backward"]
    rate = flops / total / 1e9
    print(f"\n{'a step of dae goes to':46}{'ms':>10}{'share':>8}")
    for name, seconds in parts.items():
        print(f"{name:46}{1000 * seconds:10.2f}{seconds / total:8.1%}")
    print(
        f"{flops / 1e9:.1f} GFLOP of the network a step at {rate:.0f} GFLOP/s: {rate / matrices:.0%} of the matrix "
        f"rate; within forward and backward, {network / total:.0%} of a step, {flops / network / 1e9 / matrices:.0%}. "
        "The rest of these is batch norm, activations and moving memory."
    )
    figures = {"matrix_share": rate / matrices, "gflops_step": rate}
    return figures | {f"step_{name}_ms": 1000 * seconds for name, seconds in parts.items()}


def compare(args: argparse.Namespace, folder: Path) -> dict:
    """Print the tables; returns the figures for the JSON line."""
    precision, why = choose_precision(DEVICE) if args.precision == "auto" else (args.precision, "as asked for")
    matrices = {name: measure_matrices(dtype) for name, dtype in PRECISIONS.items()}
    print(f"{precision} on {DEVICE.type}, {torch.get_num_threads()} threads: {why}")
    print(f"matrix products: {matrices['bf16']:.0f} GFLOP/s in bf16, {matrices['fp32']:.0f} in fp32\n")
    keep_freed_memory()
    scans = make_store(folder, args.scans, args.slices, args.size)
    print(f"{'slices/s':46}{'plain':>10}{'ours':>10}{'ratio':>8}")
    figures = {"precision": precision, "threads": torch.get_num_threads()}
    figures |= compare_training(args, precision, folder, scans)
    figures |= compare_evaluation(args, precision, scans[0])
    print(f"of our evaluation, making the map takes {figures['map_of_evaluation']:.0%}")
    figures |= profile_step(args, precision, scans, matrices[precision])
    return figures | {f"{kind}_matrices": value for kind, value in matrices.items()}


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=EXAMPLE)
    count = bounded(int, least=1)
    parser.add_argument("--rounds", type=count, default=5, help="of each loop, in turn; the median counts")
    parser.add_argument("--steps", type=count, default=6, help="optimiser steps a round")
    parser.add_argument("--batch-size", type=count, default=32, help="slices a step")
    parser.add_argument(
        "--size", type=bounded(int, least=16, multiple_of=16), default=128, help="pixels along each side of a slice"
    )
    parser.add_argument("--scans", type=count, default=6, help="simulated scans to train on")
    parser.add_argument("--slices", type=count, default=64, help="slices of each scan")
    parser.add_argument("--models", nargs="+", choices=TITLES, default=list(TITLES), help="networks to train")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help="auto: as train.py chooses")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        figures = compare(args, Path(temporary))
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in figures.items()}))
    return 0


if __name__ == "__main__":
    run_script(main)
