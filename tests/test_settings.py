"""A file of flags is as good as the flags, and what a script leaves can be given back to it."""

import argparse
import json
import os
from pathlib import Path

import pytest

from common.cli import list_flags, parse_flags
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
        ("sead: 3", "sead is no flag; there are data, dry_run"),
        ("help: 3", "help is no flag"),
        ("- data", "maps no flags to values"),
        ("a: [", "cannot be read as YAML or JSON"),
        ("model: unet", "invalid choice"),
    ],
)
def test_wrong_files_are_wrong_usage(text, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        read(tmp_path, text)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


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
        assert "no file, or one of more than 1 MB" in capsys.readouterr().err
