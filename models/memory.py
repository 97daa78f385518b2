"""How the process deals with memory that it has freed."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> None:
    """Keep what is freed for the next step, instead of giving it back to the system and asking for it again.

    glibc returns large blocks at once, and the system must fill each page with zeros when it hands them out anew: a
    quarter of the time of a network with large maps. Elsewhere than on glibc nothing is done. The process then stays
    as large as it once was.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    trim_threshold, mmap_threshold = -1, -3  # from malloc.h
    mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 1 << 25)  # old versions allow 32 MB at most
    mallopt(trim_threshold, (1 << 31) - 1)
