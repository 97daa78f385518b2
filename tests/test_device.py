"""The precision that is clearly faster, slices in memory where they fit, freed memory kept for the next step."""

import argparse
import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.benchmark import Timer

from common.device import (
    choose_device,
    choose_precision,
    find_precision,
    fits_in_memory,
    keep_freed_memory,
    measure_convolution,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(("rates", "precision"), [((300, 100), "bf16"), ((110, 100), "fp32"), ((50, 100), "fp32")])
def test_the_clearly_faster_precision_is_chosen(rates, precision, monkeypatch):
    by_type = dict(zip((torch.bfloat16, torch.float32), rates, strict=True))
    monkeypatch.setattr("common.device.measure_convolution", by_type.get)
    assert choose_precision(CPU)[0] == precision


@pytest.mark.parametrize(("has_units", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_is_asked_and_not_measured(has_units, precision, monkeypatch):
    """So small a convolution would measure how fast it is started."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_units)
    assert choose_precision(torch.device("cuda"))[0] == precision


def test_a_precision_is_measured_on_one_core_so_that_other_work_does_not_decide(monkeypatch):
    seen = []

    class Watched(Timer):
        def __init__(self, *arguments, num_threads, **options):
            super().__init__(*arguments, num_threads=num_threads, **options)
            seen.append(num_threads)

        def blocked_autorange(self, **options):
            self.timeit(1)
            return SimpleNamespace(times=[0.5, 0.25])

    monkeypatch.setattr("torch.utils.benchmark.Timer", Watched)
    flops = 3 * 2 * 16 * 32 * 32 * 64 * 64 * 9  # of a convolution forward, and twice that backward
    assert measure_convolution(torch.float32) == pytest.approx(flops / 0.25 / 1e9), "the best time counts"
    assert seen == [1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("supported", "found"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_model_in_bf16_is_read_in_fp32_where_bf16_is_only_imitated(device, supported, found, monkeypatch):
    answers = {"cpu": not supported, "cuda": not supported, device: supported}
    operators = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: answers["cpu"])
    monkeypatch.setattr(torch, "ops", SimpleNamespace(mkldnn=operators))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: answers["cuda"])
    assert find_precision("bf16", torch.device(device)) is found
    assert find_precision("fp32", torch.device(device)) is torch.float32


def test_slices_go_to_memory_only_where_they_take_half_of_it(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=8 * 128**2 * 2))
    assert fits_in_memory(4, 128, CPU)[0]
    assert not fits_in_memory(5, 128, CPU)[0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # both hold all of them
    assert fits_in_memory(2, 128, CPU)[0]
    assert not fits_in_memory(3, 128, CPU)[0]


def test_a_missing_gpu_is_wrong_usage(monkeypatch, capsys):
    parser = argparse.ArgumentParser()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(parser, "auto") == choose_device(parser, "cpu") == CPU
    with pytest.raises(SystemExit) as stop:
        choose_device(parser, "cuda")
    assert stop.value.code == 2
    assert "--device cuda" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(parser, "auto") == choose_device(parser, "cuda") == torch.device("cuda")
    assert choose_device(parser, "cpu") == CPU


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
