"""Killed at any moment, on a full disk, given hostile files or started twice: nothing is lost, a line says why."""

import contextlib
import csv
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import training.train as training
from common.cli import DataError
from common.files import hold_folder
from evaluation.evaluate import main as evaluate
from preprocessing.preprocess_oasis import main as preprocess
from tests.conftest import SIZE, TINY

SCRIPTS = {"preprocess": preprocess, "train": training.main, "evaluate": evaluate}
MAY_DIFFER = {".lock", "last.pt"}  # last.pt holds the speed of each epoch; model.pt may not differ


def call(script, folder, arguments):
    """What a child process does: one script, as if started in this folder."""
    os.chdir(folder)
    torch.set_num_threads(1)
    os._exit(SCRIPTS[script](arguments) or 0)


@pytest.fixture(scope="module")
def start():
    """start(script, folder, arguments) -> a process with all modules loaded, so that what is killed is work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def begin(*arguments):
        process = context.Process(target=call, args=arguments)
        process.start()
        return process

    return begin


def read_tree(folder):
    """{path: content} of what must be the same; without the speeds in the log and the project's own commit."""
    tree = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name in MAY_DIFFER or "tensorboard" in path.parts:
            continue
        content = path.read_bytes()
        if path.name == "log.csv":
            content = [row | {"slices_per_s": ""} for row in csv.DictReader(io.StringIO(content.decode()))]
        elif path.name == "config.json":
            content = json.loads(content) | {"commit": ""}
        tree[str(path.relative_to(folder))] = content
    return tree


def pipeline(raw, workers, panels):
    """(script, the folder it writes, its arguments), one after the other."""
    size = ["--size", str(SIZE), "--workers", str(workers)]
    return [
        ("preprocess", "processed", ["--raw", str(raw), "--processed", "processed", *size]),
        ("train", "run", ["--data", "processed", "--run", "run", *TINY, "--steps", "30", "--width", "16"]),
        (
            "evaluate",
            "evaluation",
            ["--data", "processed/test", "--run", "run", "--out", "evaluation", "--maps", "--panels", str(panels)],
        ),
    ]


def run_with_kills(start, raw, tmp_path, kills, workers, panels):
    """Run each script once undisturbed, then killed `kills` times at random moments; compare what they leave."""
    rng = np.random.default_rng(kills)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    undisturbed.mkdir()
    killed.mkdir()
    for script, output, arguments in pipeline(raw, workers, panels):
        began = time.monotonic()
        process = start(script, undisturbed, arguments)
        process.join()
        duration = time.monotonic() - began
        assert process.exitcode == 0
        wanted, left, orphans = read_tree(undisturbed / output), kills, []
        while True:
            process = start(script, killed, arguments)
            process.join(rng.uniform(0, 0.7 * duration) if left else None)  # mostly before its end
            if process.exitcode is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    orphans += psutil.Process(process.pid).children(recursive=True)
                process.kill()
                process.join()
                left -= process.exitcode == -signal.SIGKILL
                continue
            assert process.exitcode == 0
            idle = psutil.wait_procs(orphans, timeout=1)[1]  # workers at work end with their master
            found = read_tree(killed / output)
            assert sorted(found) == sorted(wanted)
            assert [path for path in wanted if found[path] != wanted[path]] == []
            for orphan in idle:
                with contextlib.suppress(psutil.NoSuchProcess):
                    orphan.kill()
            if not left:
                break
            shutil.rmtree(killed / output)  # it was done before its time: once more from the start


def test_killed_and_started_again_ends_with_the_same_bytes(start, raw, tmp_path):
    run_with_kills(start, raw, tmp_path, kills=1, workers=1, panels=0)


@pytest.mark.slow
def test_killed_at_sixty_random_points(start, raw, tmp_path):
    run_with_kills(start, raw, tmp_path, kills=20, workers=2, panels=1)


def test_the_second_in_a_folder_is_refused(processed, run, evaluation):
    with hold_folder(run, "--run"), pytest.raises(DataError, match="another process is using it"):
        training.main(["--data", str(processed), "--run", str(run), *TINY])
    out, command = evaluation
    with hold_folder(out, "--out"), pytest.raises(DataError, match="another process is using it"):
        evaluate(command)


def test_a_full_disk_is_one_line_and_keeps_what_was_saved(processed, run, tmp_path):
    command = ["--data", str(processed), "--run", str(tmp_path / "run"), *TINY]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, 50_000, 300_000):  # config.json, last.pt, model.pt: whichever comes to it first
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(DataError, match=r"cannot be written .* free some space") as error:
                training.main(command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(error.value)
    assert training.main(command) == 0
    assert (tmp_path / "run/model.pt").read_bytes() == (run / "model.pt").read_bytes()


def test_a_folder_that_cannot_be_written_is_one_line(processed, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        training.main(["--data", str(processed), "--run", str(tmp_path / "file/run"), *TINY])


class Evil:
    def __reduce__(self):
        return (open, ("evil-was-here", "w"))


def test_a_checkpoint_that_would_run_code_is_refused(processed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    for name, start in (
        ("last.pt", lambda: training.main(["--data", str(processed), "--run", str(run), *TINY])),
        ("model.pt", lambda: evaluate(["--run", str(run), "--data", str(processed / "test")])),
    ):
        torch.save({"config": Evil()}, run / name)
        with pytest.raises(DataError, match=name):
            start()
    assert not Path("evil-was-here").exists()
