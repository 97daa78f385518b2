"""Train an autoencoder on the slices of healthy scans.

Reads `<data>/train/normal` and `<data>/val/normal` of each --data as preprocess_oasis.py wrote them; without the
latter, some subjects of train are set aside. Writes a run folder: the model, its log, curves and reconstructions. The
same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.interrupts import stop_in_one_line

if __name__ == "__main__":
    stop_in_one_line()  # while the rest is imported

from common.cli import SEED, Parser, add_device_flag, bounded, parse_flags, run_script, set_up_logging

DEFAULTS = {"dae": {"width": 64, "steps": 12000}, "cae": {"width": 32, "steps": 1500}}  # see docs/experiments.md
FROM_A_MODEL = {"steps": 2000, "lr": 6e-4}  # what it knows is to stay
EXAMPLE = "example:\n  python training/train.py --data Dataset/processed --run runs/dae"


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=EXAMPLE)
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[Path("Dataset/processed")], metavar="FOLDER",
        help="slices of preprocess_oasis.py; a folder for each scanner, which are drawn from equally often",
    )  # fmt: skip
    parser.add_argument("--run", type=Path, default=Path("runs/dae"), help="folder of this run")
    parser.add_argument(
        "--init", type=Path, metavar="RUN", help="start from the model of this run, such as models/pretrained, with "
        "its network; --model, --width, --depth and --latent then do nothing"
    )  # fmt: skip
    parser.add_argument("--model", choices=DEFAULTS, default="dae", help="which autoencoder")
    count = bounded(int, least=1)
    parser.add_argument("--width", type=count, help="channels of the first level; left out: 64 for dae, 32 for cae")
    parser.add_argument("--depth", type=bounded(int, least=1, most=6), default=3, help="levels of the dae")
    parser.add_argument("--latent", type=count, default=64, help="numbers in the bottleneck of the cae")
    parser.add_argument(
        "--steps", type=count, help="optimiser steps, which the learning rate follows; left out: 12000 for dae, "
        "1500 for cae, 2000 with --init"
    )  # fmt: skip
    parser.add_argument("--batch-size", type=count, default=32, help="slices a step")
    parser.add_argument(
        "--optimiser", choices=("muon", "adam"), help="what moves the weights; left out: muon for dae, adam for cae"
    )
    parser.add_argument(
        "--lr", type=bounded(above=0), help="peak learning rate; left out: 0.002, or 0.0006 with --init"
    )
    share = bounded(above=0, below=1)
    parser.add_argument(
        "--val-fraction", type=share, default=0.1, help="share of subjects set aside where there is no val/normal"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="seed of weights, batches and corruption")
    add_device_flag(parser)
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where it is measured faster"
    )
    parser.add_argument(
        "--in-memory",
        action=argparse.BooleanOptionalAction,
        help="hold the slices in memory, or read them from disk; left out: in memory where they fit",
    )
    parser.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="give the same bytes each time on a GPU too, somewhat slower; on a CPU this is always so",
    )
    parser.add_argument("--quiet", action="store_true", help="print only warnings and errors")
    return parser


def configure(args: argparse.Namespace, device: str) -> dict:
    """Everything that decides a run's result; subjects, slice size, optimiser and precision are settled once known."""
    defaults = DEFAULTS[args.model] | (FROM_A_MODEL if args.init else {"lr": 2e-3})
    width, steps, lr = (getattr(args, name) or defaults[name] for name in ("width", "steps", "lr"))
    network = {"model": args.model, "width": width}
    network |= {"depth": args.depth} if args.model == "dae" else {"latent": args.latent}
    return {
        "data": " ".join(map(str, args.data)), "network": network, "steps": steps, "batch_size": args.batch_size,
        "optimiser": args.optimiser, "lr": lr, "init": args.init and str(args.init), "val_fraction": args.val_fraction,
        "seed": args.seed, "device": device, "precision": args.precision, "deterministic": args.deterministic,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parse_flags(parser, argv)
    from common.device import choose_device  # torch takes seconds to load, which --help should not
    from training.run import train

    device = choose_device(parser, args.device)
    set_up_logging(args.quiet)
    train(configure(args, device.type), args, device)
    return 0


if __name__ == "__main__":
    run_script(main)
