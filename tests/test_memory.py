"""Freed memory is kept for the next step."""

import ctypes
import sys

from common.device import keep_freed_memory


class Library:
    """A C library whose mallopt notes what is asked, and refuses more than `limit`."""

    def __init__(self, limit):
        self.asked, self.limit = [], limit

    def mallopt(self, parameter, value):
        self.asked.append((parameter, value))
        return int(value <= self.limit)


def test_large_blocks_are_kept(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for limit, thresholds in ((1 << 40, [1 << 30]), (1 << 25, [1 << 30, 1 << 25])):
        library = Library(limit)
        monkeypatch.setattr(ctypes, "CDLL", lambda name, library=library: library)
        keep_freed_memory()
        assert library.asked == [*((-3, value) for value in thresholds), (-1, 2**31 - 1)]


def test_elsewhere_nothing_is_done(monkeypatch):
    library = Library(1 << 40)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(sys, "platform", "darwin")
    keep_freed_memory()
    assert library.asked == []


def test_another_c_library_is_no_error(monkeypatch):
    def fail(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", fail)
    keep_freed_memory()
