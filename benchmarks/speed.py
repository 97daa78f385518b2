"""Measure training and evaluation against the loop that such projects usually have, and where a step's time goes.

The plain loop: fp32, contiguous layout, one np.load a slice in a DataLoader without workers, the loss read after every
step; evaluation one slice at a time, its map made with SciPy's filters. Same networks, corruption and slices, each in a
process of its own; the rounds of both alternate and each figure is the median. `dae` is also set against the
plain loop with the small U-Net that such projects usually train, for its architecture was chosen for speed too. Run it
on an idle machine.
Prints tables and one JSON line last.

With --growth, how listing, starting a training and a second preprocessing grow with the number of scans instead.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle
from pathlib import Path
from statistics import median

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.interrupts import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()  # while the rest is imported

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from preprocessing.slices import ScanSlices, list_scans, name_slice, write_scan
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from common.device import keep_freed_memory
from models.anomaly import calibrate, map_anomalies, reconstruct
from models.autoencoder import MODELS, convolution_block, take_middle
from models.checkpoint import build_model
from tests.reference import map_plainly
from training.trainer import LOOK_EVERY, Trainer, choose_precision, make_pair, seed_generator, sum_squares

PROJECT = Path(__file__).resolve().parents[1]
SPACING_MM = (2.0, 200 / 128)  # between slices, between pixels
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class HobbyAutoencoder(nn.Module):
    """The full-resolution convolutional autoencoder of many a notebook, trained with input = target."""

    corrupted = False

    @staticmethod
    def find_neighbours(spacing_mm: float) -> tuple[int, ...]:
        return (0,)

    def __init__(self, size: int = 128):
        super().__init__()
        encoder, decoder = [], []
        for i, o in ((1, 32), (32, 64), (64, 128)):
            encoder += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        for i, o in ((128, 64), (64, 32)):
            decoder += [nn.ConvTranspose2d(i, o, 2, stride=2), nn.ReLU(), nn.Conv2d(o, o, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*encoder, *decoder, nn.ConvTranspose2d(32, 1, 2, stride=2), nn.Sigmoid())

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        return self.layers(slices)


class SmallUNet(nn.Module):
    """The small denoising U-Net of such projects: cells of 2x2 pixels, skips joined, one slice at a time."""

    corrupted = True

    def __init__(self, size: int = 128):
        super().__init__()
        self.stem, widths = nn.PixelUnshuffle(2), (32, 64, 128, 256)
        self.down = nn.ModuleList(double_convolution(i, o) for i, o in zip((4, *widths[:-1]), widths, strict=True))
        self.up = nn.ModuleList(
            double_convolution(i + o, o) for i, o in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.to_slice = nn.Sequential(nn.Conv2d(widths[0], 4, 3, padding=1), nn.PixelShuffle(2))

    @staticmethod
    def find_neighbours(spacing_mm: float) -> tuple[int, ...]:
        return (0,)

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        x, kept = self.stem(slices), []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            kept.append(x)
        kept.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2), kept.pop()], 1))
        return self.to_slice(x)


def double_convolution(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(convolution_block(channels_in, channels_out), convolution_block(channels_out, channels_out))


MODELS |= {"hobby": HobbyAutoencoder, "unet": SmallUNet}
TITLES = {"hobby": "full-resolution CAE", "dae": "dae", "cae": "cae"}


def spoil(name: str, clean: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(input, target), as the model of that name is trained; the hobby model sees its slices as they are."""
    return (clean, clean) if name == "hobby" else make_pair(clean, MODELS[name].corrupted, generator)


class OurTraining(Trainer):
    """The project's own training, step by step."""

    def __init__(self, name: str, precision: str, scans: list[ScanSlices], batch_size: int, in_memory: bool = True):
        network = {"model": name, "size": scans[0].size}
        config = {"network": network, "precision": precision, "seed": 0, "batch_size": batch_size, "steps": 10**6}
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(config | {"lr": 1e-3, "compile": False}, scans, scans[:1], device, in_memory)
        self.name, self.batches = name, self.read_batches()

    def spoil(self, clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().spoil(clean) if self.name != "hobby" else (clean, clean)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.losses.append(self.train_step(next(self.batches)))
            if self.step % LOOK_EVERY == 0:
                self.look_at_losses(Path())
        self.look_at_losses(Path())

    def profile(self, steps: int) -> dict[str, float]:
        """Seconds a step by what they go to: `train_step` taken apart."""
        seconds = dict.fromkeys(("loading", "corruption", "forward", "backward", "optimiser", "logging"), 0.0)

        def timed(what: str, work: Callable):
            began = time.perf_counter()
            result = work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[what] += (time.perf_counter() - began) / steps
            return result

        def forward(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            squares, pixels = sum_squares(self.forward(self.network, source), target)
            return squares / pixels

        for _ in range(steps):
            clean = timed("loading", lambda: next(self.batches))
            source, target = timed("corruption", lambda clean=clean: self.spoil(clean))
            loss = timed("forward", lambda source=source, target=target: forward(source, target))
            timed("backward", lambda loss=loss: (self.optimiser.zero_grad(), loss.backward()))
            timed("optimiser", self.update_weights)
            self.step += 1
            self.losses.append(loss.detach())
            if self.step % LOOK_EVERY == 0:
                timed("logging", lambda: self.look_at_losses(Path()))
        return seconds

    def count_flops(self) -> float:
        """Of a whole step, 2 for a multiplication and addition."""
        source, target = self.spoil(next(self.batches))
        with FlopCounterMode(display=False) as counter:
            squares, pixels = sum_squares(self.forward(self.network, source), target)
            (squares / pixels).backward()
        return counter.get_total_flops()


class PlainDataset(Dataset):
    """A file a slice, read when it is asked for, each time with the neighbours that the model is shown."""

    def __init__(self, name: str, scans: list[ScanSlices]):
        neighbours = MODELS[name].find_neighbours(SPACING_MM[0])
        self.windows = []
        for scan in scans:
            paths = [scan.folder / name_slice(index) for index in scan.indices]
            for place in range(len(paths)):
                self.windows.append([paths[min(max(place + n, 0), len(paths) - 1)] for n in neighbours])

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.load(path).astype(np.float32) for path in self.windows[index]]))


class PlainTraining:
    """The loop that such projects usually have."""

    def __init__(self, name: str, scans: list[ScanSlices], batch_size: int):
        self.name, self.device = name, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        self.model = build_model({"model": name, "size": scans[0].size}).to(self.device)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        loader = DataLoader(PlainDataset(name, scans), batch_size, shuffle=True, drop_last=True)
        self.batches = (batch for epoch in cycle([loader]) for batch in epoch)
        self.step = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            clean = next(self.batches).to(self.device)
            source, target = spoil(self.name, clean, seed_generator(self.device, 0, self.step))
            self.optimiser.zero_grad()
            brain = (target > 0).float()
            loss = ((self.model(source) - target) ** 2 * brain).sum() / brain.sum()
            loss.backward()
            self.optimiser.step()
            loss.item()
            self.step += 1


def evaluate_plainly(name: str, scan: ScanSlices, calibration: dict) -> np.ndarray:
    """The anomaly map, the network run on one slice at a time, the map made with SciPy's filters."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _kept.setdefault(name, build_model({"model": name, "size": scan.size}).to(device).eval())
    stack, parts = [], []
    with torch.no_grad():
        for slices in DataLoader(PlainDataset(name, [scan])):
            output = model(slices.to(device)).cpu()
            middle = take_middle(slices)
            stack.append(middle[0, 0].numpy())
            parts.append(torch.where(middle > 0, output, 0)[0, 0].numpy())
    return map_plainly(np.stack(stack), np.stack(parts), SPACING_MM, calibration)


def evaluate_ours(model: nn.Module, scan: ScanSlices, calibration: dict, precision: str) -> np.ndarray:
    stack = scan.read_stack()
    device = next(model.parameters()).device
    return map_anomalies(
        stack, reconstruct(model, stack, SPACING_MM[0], device, 32, DTYPES[precision]), SPACING_MM, calibration
    )


class Elsewhere:
    """Runs works in another process, which has none of this one's settings."""

    def __init__(self):
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def __call__(self, function: Callable, *arguments) -> Callable[[], object]:
        return lambda: self.pool.submit(function, *arguments).result()


_kept = {}  # in such a process, what its works go on with


def train_plainly(steps: int, *arguments) -> None:
    if arguments not in _kept:
        _kept[arguments] = PlainTraining(arguments[0], list(list_scans(arguments[1])), arguments[2])
    _kept[arguments].run(steps)


def train_ours(steps: int, name: str, precision: str, folder: Path, batch_size: int, in_memory: bool) -> None:
    if not _kept:
        keep_freed_memory()
        _kept["ours"] = OurTraining(name, precision, list(list_scans(folder)), batch_size, in_memory)
    _kept["ours"].run(steps)


def alternate(rounds: int, **works: Callable) -> dict[str, float]:
    """{name: median seconds}: the works by turns, so that what disturbs one disturbs all; the first turn warms up."""
    seconds = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in seconds.items()}


def measure_matrices(precision: torch.dtype, side: int = 2048) -> float:
    """GFLOP/s of a matrix product, the best of several."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.rand(side, side, device=device).to(precision) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * side**3 / min(timer.blocked_autorange(min_run_time=0.5).times) / 1e9


def make_store(folder: Path, scans: int, slices: int, size: int) -> list[ScanSlices]:
    """Textured discs in the store's format."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    for number in range(scans):
        values = 0.5 + 0.2 * np.sin(rows / 5) * np.cos(columns / 6) + 0.05 * rng.normal(size=(slices, size, size))
        stack = np.where(np.hypot(rows, columns) < 0.4 * size, values.clip(0.01, 1), 0).astype(np.float16)
        record = {"subject": str(number), "slices": list(range(slices)), "size": size}
        record |= {"spacing_mm": [SPACING_MM[1], SPACING_MM[1], SPACING_MM[0]], "pixel_mm": SPACING_MM[1]}
        write_scan(folder / "train" / "normal" / f"{number}_T1w", stack, None, record)
    return list(list_scans(folder))


def compare(args: argparse.Namespace, folder: Path) -> dict:
    """Print the tables; returns the figures for the JSON line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, why = choose_precision(device)
    if args.precision != "auto":
        precision, why = args.precision, "as asked for"
    matrices = {name: measure_matrices(dtype) for name, dtype in DTYPES.items()}
    print(f"{precision} on {device.type}, {torch.get_num_threads()} threads: {why}")
    print(f"matrix products: {matrices['bf16']:.0f} GFLOP/s in bf16, {matrices['fp32']:.0f} in fp32\n")
    keep_freed_memory()
    elsewhere = Elsewhere()
    scans = make_store(folder, args.scans, args.slices, args.size)
    count = args.steps * args.batch_size
    figures = {"precision": precision, "threads": torch.get_num_threads()}
    print(f"{'slices/s':46}{'plain':>10}{'ours':>10}{'ratio':>8}")

    def show(what: str, key: str, plain: float, ours: float, work: int) -> None:
        figures[key] = plain / ours
        print(f"{what:46}{work / plain:10.1f}{work / ours:10.1f}{plain / ours:8.2f}", flush=True)

    for name in args.models:
        ours = {kind: OurTraining(name, kind, scans, args.batch_size) for kind in dict.fromkeys((precision, "fp32"))}
        works = {kind: lambda work=work: work.run(args.steps) for kind, work in ours.items()}
        works["plain"] = elsewhere(train_plainly, args.steps, name, folder, args.batch_size)
        if name == "dae":
            works["unet"] = elsewhere(train_plainly, args.steps, "unet", folder, args.batch_size)
        seconds = alternate(args.rounds, **works)
        for kind in ours:
            show(f"training, {TITLES[name]}, {kind}", f"train_{name}_{kind}", seconds["plain"], seconds[kind], count)
            if name == "dae":
                what, key = f"… against a usual small U-Net, {kind}", f"train_dae_against_unet_{kind}"
                show(what, key, seconds["unet"], seconds[kind], count)
    memory, disk = (  # in processes of their own: the reading threads of one would slow the other too
        Elsewhere()(train_ours, args.steps, "dae", precision, folder, args.batch_size, in_memory)
        for in_memory in (True, False)
    )
    seconds = alternate(args.rounds, memory=memory, disk=disk)
    show("training, dae, from disk, against in memory", "from_disk", *seconds.values(), count)

    ours = build_model({"model": "dae", "size": args.size}).eval().to(device, memory_format=torch.channels_last)
    stack = scans[0].read_stack()
    reconstruction = reconstruct(ours, stack, SPACING_MM[0], device)
    calibration = calibrate([(stack, drawn, SPACING_MM) for drawn in (reconstruction, 2 * stack - reconstruction)])
    seconds = alternate(
        args.rounds,
        plain=elsewhere(evaluate_plainly, "dae", scans[0], calibration),
        ours=lambda: evaluate_ours(ours, scans[0], calibration, precision),
        map=lambda: map_anomalies(stack, reconstruction, SPACING_MM, calibration),
    )
    show("evaluation of a scan, dae, slices to map", "evaluate", seconds["plain"], seconds["ours"], len(stack))
    figures["map_of_evaluation"] = seconds["map"] / seconds["ours"]

    training = OurTraining("dae", precision, scans, args.batch_size)
    flops = training.count_flops()
    training.profile(2)
    parts = training.profile(max(args.steps, LOOK_EVERY))
    total = sum(parts.values())
    network = parts["forward"] + parts["backward"]
    rate = flops / total / 1e9
    figures |= {"matrix_share": rate / matrices[precision], "gflops_step": rate}
    figures |= {f"{kind}_matrices": value for kind, value in matrices.items()}
    figures |= {f"step_{name}_ms": 1000 * seconds for name, seconds in parts.items()}
    print(f"\n{'a step of dae goes to':46}{'ms':>10}{'share':>8}")
    for name, seconds in parts.items():
        print(f"{name:46}{1000 * seconds:10.2f}{seconds / total:8.1%}")
    print(
        f"{flops / 1e9:.1f} GFLOP a step at {rate:.0f} GFLOP/s: {figures['matrix_share']:.0%} of the matrix rate; "
        f"within forward and backward {flops / network / 1e9 / matrices[precision]:.0%}"
    )
    print(
        f"What bounds the rest: forward and backward take {network / total:.0%} of a step, and what they do besides "
        f"convolving (batch norm, activations, moving memory) keeps them at that share; corruption, which is no matrix "
        f"work, takes {parts['corruption'] / total:.0%}; of an evaluation, making the map takes "
        f"{figures['map_of_evaluation']:.0%}, and no network can be faster than that."
    )
    return figures


def clone_scans(folder: Path, count: int) -> tuple[list[str], list[str]]:
    """So many tiny scans, raw and preprocessed, from one: the raw files are links, the slices copies.

    Returns the commands (without the interpreter) that preprocess them and that train on them.
    """
    raw, processed = folder / "raw", folder / "processed"
    raw.mkdir(parents=True)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (24, 28, 24)], indexing="ij"))
    values = np.where((grid**2).sum(0) < 0.8, 500 + 100 * grid[0] + 50 * grid[2], 0).astype(np.int16)
    first = raw / "sub-000000_T1w.nii"
    nib.save(nib.Nifti1Image(values, np.diag([6.0, 6.0, 6.0, 1])), first)
    command = ["preprocessing/preprocess_oasis.py", "--raw", raw, "--processed", processed, "--label", "normal"]
    command += ["--split", "1", "0", "0", "--size", "16", "--keep", "0.1", "--workers", "1"]
    subprocess.run([sys.executable, *command], cwd=PROJECT, check=True, capture_output=True)
    done = processed / "train" / "normal" / "sub-000000_T1w"
    text = (done / "scan.json").read_text()
    for number in range(1, count):
        name = f"sub-{number:06d}"
        if number % 50_000:  # a file can have 65,000 names on ext4
            os.link(first, raw / f"{name}_T1w.nii")
        else:
            first = Path(shutil.copy(first, raw / f"{name}_T1w.nii"))
        shutil.copytree(done, done.with_name(f"{name}_T1w"))
        done.with_name(f"{name}_T1w").joinpath("scan.json").write_text(text.replace("sub-000000", name))
    training = [
        "training/train.py",
        "--data",
        processed,
        "--run",
        folder / "run",
        "--steps",
        "1",
        "--precision",
        "fp32",
    ]
    return command, [*training, "--val-fraction", str(20 / count), "--width", "8", "--no-in-memory", "--device", "cpu"]


def measure_process(command: list) -> tuple[float, float]:
    """(seconds, peak MB) of a command of this project."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=PROJECT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))}: failed")
    return time.perf_counter() - began, usage.ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def measure_growth(counts: list[int], folder: Path) -> dict:
    print(f"{'':34}" + "".join(f"{count:>18,} scans" for count in counts))
    table = {}
    for count in counts:
        place = folder / str(count)
        preprocessing, training = clone_scans(place, count)
        listing = "import sys, preprocessing.slices as s; scans = list(s.list_scans(s.Path(sys.argv[1])))"
        for what, command in (
            ("listing", ["-c", listing, place / "processed"]),
            ("second preprocessing", preprocessing),
            ("training of one step", training),
        ):
            table.setdefault(what, []).append(measure_process(command))
        shutil.rmtree(place)
    for what, row in table.items():
        print(f"{what:34}" + "".join(f"{seconds:12.1f} s {mb:6.0f} MB" for seconds, mb in row))
    return {what: [[round(value, 1) for value in cell] for cell in row] for what, row in table.items()}


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=formatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each loop, by turns; the median counts")
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps a round")
    parser.add_argument("--batch-size", type=int, default=16, help="slices a step")
    parser.add_argument("--size", type=int, default=128, help="pixels along each side of a slice")
    parser.add_argument("--scans", type=int, default=6, help="simulated scans to train on")
    parser.add_argument("--slices", type=int, default=64, help="slices of each scan")
    parser.add_argument("--models", nargs="+", choices=TITLES, default=list(TITLES), help="networks to train")
    parser.add_argument("--precision", choices=("auto", *DTYPES), default="auto", help="auto: as train.py chooses")
    parser.add_argument("--growth", type=int, nargs="+", metavar="N", help="measure with so many tiny scans instead")
    args = parser.parse_args(argv)
    for name in ("rounds", "steps", "batch_size", "scans", "slices"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    if args.size < 16 or args.size % 16:
        parser.error("--size is a multiple of 16")
    if args.growth and min(args.growth) < 50:
        parser.error("--growth starts at 50 scans")
    with tempfile.TemporaryDirectory() as temporary:
        work = measure_growth(args.growth, Path(temporary)) if args.growth else compare(args, Path(temporary))
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in work.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
