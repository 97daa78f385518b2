"""Evaluations side by side: of the same data, each by its run's name."""

import json

import pytest

from common.cli import DataError
from evaluation.compare import main as compare
from tests.test_table import make_metrics


def write_evaluation(folder, run: str, first: float, data: str = "abc"):
    folder.mkdir(parents=True)
    content = make_metrics(first) | {"run": f"runs/{run}", "settings": {"data": data}}
    (folder / "metrics.json").write_text(json.dumps(content))
    return str(folder)


def test_models_stand_side_by_side(tmp_path, capsys):
    folders = [write_evaluation(tmp_path / name, name, first) for name, first in (("one_a", 0.2), ("two", 0.4))]
    assert compare(folders) == 0
    table = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in table.splitlines()[5:9]] == [
        "one_a, anomaly map",
        "one_a, plain MSE",
        "two, anomaly map",
        "two, plain MSE",
    ]
    assert "| 0.400 (0.300–0.500) |" in table
    assert compare([*folders, "--latex"]) == 0
    assert r"one\_a, anomaly map & 0.200" in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, capsys):
    folders = [write_evaluation(tmp_path / name, "dae", first) for name, first in (("one", 0.2), ("two", 0.4))]
    assert compare(folders) == 0
    table = capsys.readouterr().out
    assert [
        f"| {folder}, anomaly map | {value} " in table
        for folder, value in zip(folders, ("0.200", "0.400"), strict=True)
    ] == [
        True,
        True,
    ]


def test_evaluations_of_different_data_are_not_compared(tmp_path):
    folders = [write_evaluation(tmp_path / data, data, 0.2, data) for data in ("a", "b")]
    with pytest.raises(DataError, match="of different data"):
        compare(folders)


def test_an_unfinished_evaluation_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"metrics.json: no finished evaluation"):
        compare([str(tmp_path)])
