"""Work shared out over the processes of this machine, or over the workers of a Dask cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import joblib
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError

from common.cli import DataError
from common.interrupts import shield_workers

WATCH_EVERY_S = 0.1


def run_in_workers(work: Callable, calls: Iterable[tuple], workers: int, scheduler: str | None = None) -> Iterator:
    """What `work(*call)` returns for each of the calls, in their order.

    So many are done at a time on this machine, or on the Dask cluster with a scheduler at this address. Workers of
    this machine end soon after this process, however it ends, and so write nothing beside the next one. DataError
    where a worker is killed or the cluster fails.
    """
    with _use_cluster(scheduler):
        with shield_workers():
            results = Parallel(n_jobs=workers, return_as="generator")(
                delayed(_work)(os.getpid(), work, call) for call in calls
            )
        try:
            yield from results
        except TerminatedWorkerError as error:
            raise DataError("a worker was killed, probably because memory ran out; use fewer --workers") from error


@contextlib.contextmanager
def _use_cluster(scheduler: str | None) -> Iterator[None]:
    """Let joblib use the Dask cluster at this address, or this machine where it is None."""
    if scheduler is None:
        yield
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise DataError("--dask needs Dask: pip install -r requirements-dask.txt") from error
    try:
        client = Client(scheduler, timeout=20)
    except (OSError, ValueError) as error:
        raise DataError(f"{scheduler}: no Dask scheduler answers there; start one with `dask scheduler`") from error
    try:
        with client, joblib.parallel_config(backend="dask"):
            yield
    except ImportError as error:
        raise DataError(
            f"{scheduler}: its workers lack {error.name}; start them in this repository's folder"
        ) from error
    except Exception as error:  # whatever fails in a cluster, the cure is the same
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{scheduler}: the cluster failed ({reason}); run the same command again to resume") from error


def _work(master: int, work: Callable, call: tuple):
    parent = multiprocessing.parent_process()
    if parent and parent.pid == master:  # neither the master itself nor a cluster's worker
        _end_with(master)
    return work(*call)


@lru_cache(maxsize=1)
def _end_with(master: int) -> None:
    """Let this process end when its parent has."""

    def watch():
        while os.getppid() == master:
            time.sleep(WATCH_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
