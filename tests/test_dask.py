"""The same scans become the same slices on a Dask cluster."""

import numpy as np
import pytest

from common.cli import DataError
from preprocessing.preprocess_oasis import main as preprocess
from preprocessing.store import list_scans
from tests.conftest import SIZE

distributed = pytest.importorskip("distributed")


def test_a_cluster_gives_the_same_slices_and_goes_on(raw, processed, tmp_path, capsys):
    # Two workers: with one, joblib does the work where it is started.
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "local_directory": str(tmp_path)}
    with distributed.LocalCluster(**options) as cluster:
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
