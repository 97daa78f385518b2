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


def list_names(text: str) -> list[str]:
    return [line.split("|")[1].strip() for line in text.splitlines() if ", anomaly map" in line]


def test_two_runs_of_one_name_and_one_run_twice_are_all_kept(tmp_path, capsys):
    """The name of a run, its path where names are shared, the evaluation's path where runs are."""
    one, two, three = (
        write_evaluation(tmp_path / name, run, 0.2 + number / 10)
        for number, (name, run) in enumerate({"one": "a/dae", "two": "b/dae", "three": "b/dae"}.items())
    )
    for folders, names in (
        ([one, two], ["runs/a/dae", "runs/b/dae"]),
        ([one, two, three], [one, two, three]),
        ([one, f"{one}/", one], ["dae"]),
    ):
        assert compare(folders) == 0
        assert list_names(capsys.readouterr().out) == [f"{name}, anomaly map" for name in names]


BAD = {
    "broken": "{",
    "of something else": '{"accuracy": 0.9}',
    "without figures": '{"settings": {"data": "abc"}, "run": "runs/x"}',
    "of words": '{"settings": {"data": "abc"}, "run": "runs/x", "figures": "good", "counts": {}}',
    "a list": "[]",
    "a run of no name": '{"settings": {"data": "abc"}, "run": 3, "figures": {}}',
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_a_bad_record_takes_only_itself_out(content, tmp_path, capsys):
    good, bad = write_evaluation(tmp_path / "good", "dae", 0.2), tmp_path / "bad"
    bad.mkdir()
    (bad / "metrics.json").write_text(content)
    with pytest.raises(DataError, match=r"bad/metrics\.json: .*; run evaluation/evaluate.py first") as error:
        compare([str(bad)])
    assert "\n" not in str(error.value)
    assert compare([str(bad), good]) == 3
    out, err = capsys.readouterr()
    assert list_names(out) == ["dae, anomaly map"]
    assert err.startswith(f"skipped {bad / 'metrics.json'}: ")
    with pytest.raises(DataError, match="none of the 2 evaluations can be read"):
        compare([str(bad), str(tmp_path / "nowhere")])
