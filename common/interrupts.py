"""Ctrl-C and SIGTERM while a script still imports its modules: one line and exit code 130, as later on."""

from __future__ import annotations

import os
import signal
from typing import NoReturn

STOPPED = "stopped; the same command goes on from what was saved"


def stop_in_one_line() -> None:
    """End the process at the first signal; nothing is open yet that could be left half-written.

    Only what imports nothing slow stands above the call. `cli.run_script` takes over.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(*_) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{STOPPED}\n".encode())
    os._exit(130)
