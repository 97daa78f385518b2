"""What all scripts share: flags, flags from a file, messages, exit codes, and the one error of bad data.

`--config run.yaml` gives the same flags as the command line, which wins. The file is YAML or JSON and maps the
flags' names (`batch_size` or `batch-size`) to their values. The records that the scripts leave (config.json,
dataset.json, metrics.json) keep their flags under `flags`, so that a record is itself a valid --config.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import logging
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import yaml
from tqdm import tqdm

from common.interrupts import SIGNALS, STOPPED

PROJECT = Path(__file__).resolve().parents[1]
NOT_RECORDED = ("config", "quiet", "json", "workers", "dask", "dry_run")  # they do not affect what is written

MOST_CONFIG_BYTES = 1 << 20
CURES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EFBIG: "free some space or raise the limit of file sizes, and run the same command again",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.EACCES: "allow access to it or give another folder",
    errno.EPERM: "allow access to it or give another folder",
    errno.EROFS: "give another folder",
    errno.EIO: "check the disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}

log = logging.getLogger("brain-anomaly-autoencoder")


class DataError(ValueError):
    """Something is wrong with the user's data; the message is one line that names the file and the cure."""


class _Console(logging.Handler):
    """Messages go to standard output, warnings and errors to standard error, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        text = escape_controls(self.format(record))
        tqdm.write(text, file=sys.stderr if record.levelno >= logging.WARNING else sys.stdout)


def set_up_logging(quiet: bool) -> None:
    """Print what is logged; only warnings and errors where `quiet`, and in all processes but the main one."""
    log.handlers = [_Console()]
    log.propagate = False
    log.setLevel(logging.WARNING if quiet or not _is_main() else logging.INFO)


def escape_controls(text: str) -> str:
    """The text with control characters, which file names may hold, written as `\\x1b`."""
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)


def explain(error: OSError) -> str:
    """What went wrong and the cure, `No space left on device; free some space`, without the file's name."""
    return f"{error.strerror or error}; {CURES.get(error.errno, 'check the path')}"


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run a script's `main` and end with its exit code: 0 done, 1 bad data, 2 wrong usage, 3 some scans skipped.

    Bad data ends in one line on standard error; Ctrl-C and SIGTERM end in one line and the exit code 130.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may hold anything
    _handle_signals(signal.default_int_handler)
    try:
        try:
            code = main()
            sys.stdout.flush()
        finally:
            _handle_signals(signal.SIG_IGN)  # ignore a second Ctrl-C; little is left to do
    except BrokenPipeError:  # the reader of a long output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except DataError as error:
        code = _complain(str(error))
    except OSError as error:
        code = _complain(f"{error.filename or 'standard output'}: {explain(error)}")
    except MemoryError:
        code = _complain("not enough memory; close other programs, or use fewer --workers or a smaller --batch-size")
    except KeyboardInterrupt:
        _complain(STOPPED)
        code = 130
    sys.exit(code)


def parse_flags(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """What `parser.parse_args(argv)` gives, with --config: flags that `argv` does not give come from that file.

    A file that cannot be read or a name in it that is no flag ends the script as wrong usage does, with code 2.
    """
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML or JSON file of flags; those given here win")
    given = sys.argv[1:] if argv is None else argv
    path = parser.parse_args(given).config
    return parser.parse_args([*_read_flags(parser, path, given), *given] if path else given)


class Parser(argparse.ArgumentParser):
    """A parser of flags in full, whose usage errors are one line with the flag that was probably meant."""

    def __init__(self, **options):
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """End with `message` on one line of standard error and the exit code 2."""
        _, unknown, flag = message.partition("unrecognized arguments: --")
        known = self._option_string_actions if unknown else ()
        near = difflib.get_close_matches(f"--{re.split('[ =]', flag)[0]}", known, 1, 0.5)
        meant = f"; did you mean {near[0]}?" if near else ""
        self.exit(2, escape_controls(f"{self.prog}: error: {message}{meant} (--help lists the flags)") + "\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Names each default, but for flags that mean something of their own where left out; keeps an example's lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def bounded(
    kind: type = float,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
    multiple_of: int = 0,
) -> Callable[[str], float]:
    """The type of a flag that takes a finite number within these limits, whole where kind is int."""
    limits = (("above", above), ("at least", least), ("below", below), ("at most", most))
    words = [f"{word} {limit:.15g}" for word, limit in limits if math.isfinite(limit)]
    words += [f"a multiple of {multiple_of}"] if multiple_of else []
    wanted = f"{'a whole' if kind is int else 'a'} number {', '.join(words)}".rstrip()

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            within = above < value < below and least <= value <= most  # which nan and infinity are not
            if within and not (multiple_of and value % multiple_of):
                return value
        raise argparse.ArgumentTypeError(f"{text}: give {wanted}")

    return read


SEED = bounded(int, least=0, most=2**32 - 1)


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """Add --device auto, cpu or cuda."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one"
    )


def parse_axes(text: str) -> str:
    """Three letters, one of L and R, one of P and A, one of I and S: the type of --axes."""
    axes = text.upper()
    if len(axes) != 3 or not all(len(set(axes) & set(pair)) == 1 for pair in ("LR", "PA", "IS")):
        raise argparse.ArgumentTypeError(f"{text}: give where the three axes point, such as ASL or RAS")
    return axes


def check_run(parser: argparse.ArgumentParser, run: Path | None, data: Path) -> None:
    """Wrong usage where --run is a file, or --data was given in its place; None: the model that ships."""
    if run and run.is_file():
        parser.error(f"--run {run}: is a file; give the folder that it is in")
    if run and not (run / "model.pt").exists() and (data / "model.pt").exists():
        parser.error(f"--run {run} holds no model and --data {data} does; swap them")


def list_flags(args: argparse.Namespace) -> dict:
    """The flags that decide a result, {name: plain value}, as records keep them under `flags`."""
    flags = {name: value for name, value in vars(args).items() if name not in NOT_RECORDED}
    return {name: _make_plain(value) for name, value in flags.items()}


def read_commit() -> str:
    """This code's commit, with "-dirty" where files differ from it; "" outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _handle_signals(handler) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def _complain(message: str) -> int:
    """Print one line on standard error, from the main process alone; returns the exit code of bad data."""
    if _is_main():
        print(escape_controls(message), file=sys.stderr)
    return 1


def _is_main() -> bool:
    """Whether this is the process that talks to the user; as in common/distributed.py, without importing torch."""
    return os.environ.get("RANK", "0") == "0"


def _read_flags(parser: argparse.ArgumentParser, path: Path, given: list[str]) -> list[str]:
    """The file's flags as command-line arguments, without those that the command line gives already."""
    try:
        if not path.is_file() or path.stat().st_size > MOST_CONFIG_BYTES:
            raise ValueError("not a file, or larger than 1 MB")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        parser.error(f"{path}: cannot be read as YAML or JSON ({' '.join(str(error).split())})")
    flags = content.get("flags", content) if isinstance(content, dict) else None
    if not isinstance(flags, dict):
        parser.error(f"{path}: holds no flags; write lines such as `seed: 0`")
    known = {option[2:].replace("-", "_"): action for action in parser._actions for option in action.option_strings}
    arguments = []
    for name, value in flags.items():
        action = known.get(str(name).replace("-", "_"))
        if action is None or action.dest in ("help", "config"):
            flag_names = sorted({action.dest for action in known.values()} - {"help", "config"})
            parser.error(f"{path}: {name} is not a flag; the flags are {', '.join(flag_names)}")
        option = action.option_strings[0]
        there = any(word.split("=")[0] in action.option_strings for word in given)
        if value is None or there:
            continue
        if not all(isinstance(one, (str, int, float)) for one in (value if isinstance(value, list) else [value])):
            parser.error(f"{path}: {name} is neither a value nor a list of values")
        if isinstance(value, bool):
            arguments += [option] if value else action.option_strings[1:2]  # the second one is --no-…, where there is
        elif isinstance(value, list):
            arguments += [option, *map(str, value)]
        else:
            arguments.append(f"{option}={value}")
    return arguments


def _make_plain(value):
    if isinstance(value, list):
        return [_make_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
