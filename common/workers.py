"""Work shared out over processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

from joblib import Parallel, delayed

from common.interrupts import shield_workers

WATCH_EVERY_S = 0.1


def run_in_workers(work: Callable, calls: Iterable[tuple], workers: int) -> Iterator:
    """What `work(*call)` returns for each of the calls, in their order; so many at a time, or a Dask cluster's.

    Workers of this machine end soon after this process, however it ends, and so write nothing beside the next one.
    """
    with shield_workers():
        return Parallel(n_jobs=workers, return_as="generator")(
            delayed(_work)(os.getpid(), work, call) for call in calls
        )


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
