"""A file of flags is as good as the flags, and what a script leaves can be given back to it."""

import argparse
import importlib
import json
import os
from pathlib import Path

import pytest

from common.cli import SEED, bounded, list_flags, parse_flags
from preprocessing.preprocess_oasis import main as preprocess


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("nowhere"))
    parser.add_argument("--learning-rate", type=float, default=1.0)
    parser.add_argument("--split", type=float, nargs=3, default=[1, 0, 0])
    parser.add_argument("--scan", type=Path, nargs="+", action="extend")
    parser.add_argument("--model", choices=("cae", "dae"), default="dae")
    parser.add_argument("--maps", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dry-run", action="store_true")
    return parser


def read(tmp_path, text, *arguments):
    (tmp_path / "run.yaml").write_text(text)
    return parse_flags(make_parser(), ["--config", str(tmp_path / "run.yaml"), *arguments])


def test_file_stands_for_flags_and_flags_win(tmp_path):
    lines = ("data: here", "learning-rate: 1e-3", "split: [0.5, 0.25, 0.25]", "maps: false", "dry_run: yes")
    text = "\n".join([*lines, "scan: [a.nii]", "model: cae"])
    args = read(tmp_path, text)
    assert (args.data, args.learning_rate, args.split) == (Path("here"), 1e-3, [0.5, 0.25, 0.25])
    assert (args.maps, args.dry_run, args.scan, args.model) == (False, True, [Path("a.nii")], "cae")
    args = read(tmp_path, text, "--learning-rate", "2", "--maps", "--scan", "b.nii", "c.nii", "--model=dae")
    assert (args.learning_rate, args.maps, args.model, args.data) == (2.0, True, "dae", Path("here"))
    assert args.scan == [Path("b.nii"), Path("c.nii")]
    assert read(tmp_path, "data: null").data == Path("nowhere")


def test_a_record_is_a_file_of_flags(tmp_path):
    args = parse_flags(make_parser(), ["--data", "here", "--split", "0.5", "0.5", "0", "--no-maps", "--scan", "a.nii"])
    record = {"flags": list_flags(args), "versions": {"torch": "2"}, "train_subjects": ["a", "b"]}
    again = vars(read(tmp_path, json.dumps(record)))
    assert again.pop("config")
    assert again == {key: value for key, value in vars(args).items() if key != "config"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sead: 3", "sead is not a flag; the flags are data, dry_run"),
        ("help: 3", "help is not a flag"),
        ("- data", "holds no flags"),
        ("a: [", "cannot be read as YAML or JSON"),
        ("model: unet", "invalid choice"),
    ],
)
def test_wrong_files_are_wrong_usage(text, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        read(tmp_path, text)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (bounded(above=0), {"1e-3": 1e-3, "2": 2.0}, ["0", "-1", "nan", "inf", "-inf", "1e999", "one", ""]),
        (bounded(least=0, below=1), {"0": 0.0, "0.99": 0.99}, ["1", "-1e-9", "nan"]),
        (bounded(int, least=1, most=6), {"1": 1, "6": 6}, ["0", "7", "2.0", "nan", "1e0"]),
        (bounded(int, least=16, multiple_of=16), {"16": 16, "48": 48}, ["0", "-16", "24", "8"]),
        (SEED, {"0": 0, "4294967295": 2**32 - 1}, ["-1", "4294967296", "1.5"]),
    ],
)
def test_a_number_out_of_range_is_no_flag(read, good, bad):
    for text, value in good.items():
        assert read(text) == value
        assert type(read(text)) is type(value)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text}: give a "):
            read(text)


def test_the_limits_of_a_number_are_said():
    with pytest.raises(argparse.ArgumentTypeError, match=r"^7: give a whole number at least 1, at most 6$"):
        bounded(int, least=1, most=6)("7")


WRONG = {
    "preprocessing.preprocess_oasis": ["--fov-mm nan", "--fov-mm 100000", "--keep nan", "--keep 0", "--size 24",
                                       "--seed -1", "--volume -1", "--split nan 0.5 0.5", "--workers 0"],
    "preprocessing.demo_cohort": ["--voxel-size nan", "--seed -1", "--train -1", "--seed 1.5"],
    "training.train": ["--lr nan", "--lr inf", "--seed -1", "--depth 8", "--depth 0", "--width 0", "--steps 0",
                       "--val-fraction nan", "--val-fraction 1", "--batch-size 0", "--latent -3"],
    "evaluation.evaluate": ["--false-positive-rate nan", "--false-alarms 1", "--smallest-ml nan", "--smallest-ml -1",
                            "--batch-size 0", "--volume -1"],
    "benchmarks.preprocessing": ["--scans 0", "--repeats nan"],
}  # fmt: skip


@pytest.mark.parametrize(("script", "flags"), [(script, flags) for script in WRONG for flags in WRONG[script]])
def test_numbers_that_cannot_be_meant_are_wrong_usage(script, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(flags.split())
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "error: argument" in line
    assert flags.split()[0] in line


def test_preprocessing_takes_its_record_back_and_talks_as_asked(processed, capsys):
    before = {path: path.stat().st_mtime_ns for path in processed.rglob("slice_*.npy")}
    config = ["--config", str(processed / "dataset.json"), "--workers", "1"]
    assert preprocess([*config, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scans"]["train/normal"] == 3
    assert preprocess([*config, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert before == {path: path.stat().st_mtime_ns for path in processed.rglob("slice_*.npy")}


@pytest.mark.parametrize(
    "text",
    [
        "split: {a: 1}",
        "split: [[1], 2, 3]",
        "a: &a [x, x]\nb: &b [*a, *a]\nsplit: [*b, *b, *b]",
        "data: 2020-01-01",
        "[" * 10_000,
        "- data",
        "\0",
    ],
)
def test_a_config_that_holds_no_flags_is_wrong_usage(text, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        read(tmp_path, text)
    assert stop.value.code == 2
    assert "run.yaml: " in capsys.readouterr().err.splitlines()[-1]


def test_a_config_that_is_no_file_or_a_huge_one_is_wrong_usage(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "huge").write_bytes(b"#" * (1 << 20) + b"#")
    for name in ("fifo", "huge", "."):
        with pytest.raises(SystemExit) as stop:
            parse_flags(make_parser(), ["--config", str(tmp_path / name)])
        assert stop.value.code == 2
        assert "not a file, or larger than 1 MB" in capsys.readouterr().err
