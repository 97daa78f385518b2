"""Ctrl-C and SIGTERM: how they end a script before `cli.run_script` handles them, and how workers ignore them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPED = "stopped; run the same command again to resume"


def stop_in_one_line() -> None:
    """End the process at the first signal; nothing is open yet that could be left half-written.

    For use while a script imports its modules; only fast imports come before the call.
    """
    for number in SIGNALS:
        signal.signal(number, _stop)


@contextlib.contextmanager
def shield_workers() -> Iterator[None]:
    """Block both signals in processes and threads that start within: a terminal sends Ctrl-C to all of them, and the
    main process ends them itself."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(*_) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{STOPPED}\n".encode())
    os._exit(130)
