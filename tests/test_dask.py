"""A Dask cluster makes the same slices and the same evaluation as one process."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from common.cli import DataError
from evaluation.evaluate import main as evaluate
from evaluation.worker import DONE
from preprocessing.preprocess_oasis import main as preprocess
from preprocessing.store import list_scans
from tests.conftest import SIZE

distributed = pytest.importorskip("distributed")
OPTIONS = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}


def test_a_cluster_gives_the_same_slices_and_goes_on(raw, processed, tmp_path, capsys):
    with distributed.LocalCluster(**OPTIONS, local_directory=str(tmp_path)) as cluster:
        command = ["--raw", str(raw), "--processed", str(tmp_path / "out"), "--size", str(SIZE)]
        command += ["--dask", cluster.scheduler_address]
        assert preprocess(command) == 0
        assert "9 done" in capsys.readouterr().out
        assert cluster.scheduler.transition_counter > 9, "the cluster did nothing"
        assert preprocess(command) == 0
        assert "0 done, 9 unchanged" in capsys.readouterr().out
    ours, theirs = list(list_scans(tmp_path / "out")), list(list_scans(processed))
    assert [scan.name for scan in ours] == [scan.name for scan in theirs]
    for scan, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(scan.read_stack(), other.read_stack())


def test_no_scheduler_is_one_line(raw, tmp_path):
    with pytest.raises(DataError, match="no Dask scheduler answers"):
        preprocess(["--raw", str(raw), "--processed", str(tmp_path / "out"), "--dask", "nowhere"])


def test_a_cluster_evaluates_to_the_same_bytes_though_a_worker_is_killed(evaluation, tmp_path):
    before, command = evaluation
    out = tmp_path / "out"
    place = command.index("--out") + 1
    with distributed.LocalCluster(**OPTIONS, local_directory=str(tmp_path / "dask")) as cluster:
        victim = cluster.workers[0].pid

        def kill_one():
            while not list((out / DONE).glob("*/*.json")):
                time.sleep(0.01)
            os.kill(victim, signal.SIGKILL)

        killer = threading.Thread(target=kill_one)
        killer.start()
        flags = ["--out", str(out), "--dask", cluster.scheduler_address]
        assert evaluate([*command[: place - 1], *command[place + 1 :], *flags]) == 0
        killer.join()
        assert cluster.scheduler.transition_counter > 4, "the cluster did nothing"
        assert cluster.workers[0].pid != victim, "it died, and another took its place"
    for name in ("scans.csv", "scores.csv", "regions.csv", "lesions.csv", "table.md", "report.html"):
        assert (out / name).read_bytes() == (before / name).read_bytes(), name
    assert len(list(out.glob("maps/*/*.nii.gz"))) == len(list(before.glob("maps/*/*.nii.gz"))) > 0
