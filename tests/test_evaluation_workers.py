"""An evaluation shared out over workers, or interrupted and started again, leaves what one process leaves."""

import json

import pytest

import evaluation.test_set as test_set
from common.workers import run_in_workers
from evaluation.evaluate import main as evaluate
from evaluation.worker import DONE, predict_scan


@pytest.fixture
def again(evaluation, tmp_path):
    """again(*flags): the exit code of the same evaluation into another folder, tmp_path / "out"."""
    _, command = evaluation
    place = command.index("--out") + 1
    return lambda *flags: evaluate([*command[:place], str(tmp_path / "out"), *command[place + 1 :], *flags])


def read_files(out):
    """{path: content} of an evaluation; without the flags, which name its folder."""
    files = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file() and path.name != ".lock"):
        files[str(path.relative_to(out))] = path.read_bytes()
    files["metrics.json"] = {**json.loads(files["metrics.json"]), "flags": None}
    return files


def check_same(evaluation, out):
    wanted, found = read_files(evaluation[0]), read_files(out)
    assert sorted(found) == sorted(wanted)
    assert [path for path in wanted if found[path] != wanted[path]] == []


def test_two_workers_leave_the_same_bytes(evaluation, again, tmp_path, monkeypatch):
    asked = []

    def run(work, calls, workers, scheduler):
        asked.append((len(calls), workers, scheduler))
        return run_in_workers(work, calls, workers, scheduler)

    monkeypatch.setattr(test_set, "SCANS_A_WORKER", 1)
    monkeypatch.setattr(test_set, "run_in_workers", run)
    assert again("--workers", "2") == 0
    assert asked == [(4, 2, None)]
    check_same(evaluation, tmp_path / "out")


def test_what_was_predicted_before_is_not_predicted_again(evaluation, again, tmp_path, monkeypatch, capsys):
    predicted = []

    def predict(stored, *settings):
        if len(predicted) == 3:
            raise KeyboardInterrupt
        predicted.append(stored.name)
        return predict_scan(stored, *settings)

    monkeypatch.setattr(test_set, "predict_scan", predict)
    with pytest.raises(KeyboardInterrupt):
        again("--workers", "1")
    assert not (tmp_path / "out/metrics.json").exists()
    monkeypatch.setattr(test_set, "predict_scan", lambda stored, *settings: predicted.append(stored.name) or
                        predict_scan(stored, *settings))  # fmt: skip
    assert again("--workers", "1") == 0
    assert "3 of 4 scans were predicted before" in capsys.readouterr().out
    assert len(predicted) == len(set(predicted)) == 4
    assert not (tmp_path / "out" / DONE).exists()
    check_same(evaluation, tmp_path / "out")


def test_results_of_other_settings_are_not_taken(again, tmp_path, monkeypatch):
    predicted = []

    def predict(stored, *settings):
        predicted.append(stored.name)
        if len(predicted) == 3:
            raise KeyboardInterrupt
        return predict_scan(stored, *settings)

    monkeypatch.setattr(test_set, "predict_scan", predict)
    with pytest.raises(KeyboardInterrupt):
        again("--workers", "1")
    assert again("--workers", "1", "--panels", "1") == 0
    assert len(predicted) == 3 + 4
