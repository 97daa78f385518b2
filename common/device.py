"""The device that torch works on, the precision it works in, and the memory it takes."""

from __future__ import annotations

import argparse
import ctypes
import sys

import psutil
import torch
from torch import nn

from common import distributed

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def choose_device(parser: argparse.ArgumentParser, asked: str) -> torch.device:
    """The device that --device asks for; wrong usage where it asks for a CUDA device and there is none."""
    if asked == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; leave --device out")
    return find_device(asked)


def find_device(asked: str) -> torch.device:
    """The device that --device means on this machine."""
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(device: torch.device) -> tuple[str, str]:
    """("bf16" or "fp32", why): bf16 where a GPU has units for it, or convolutions are clearly faster in it on a CPU."""
    if device.type == "cuda":
        return ("bf16", "this GPU has units for it") if has_bf16(device) else ("fp32", "this GPU has no units for bf16")
    rates = [measure_convolution(precision) for precision in (torch.bfloat16, torch.float32)]
    chosen = "bf16" if rates[0] > 1.2 * rates[1] else "fp32"
    return chosen, f"convolutions run at {rates[0]:.0f} GFLOP/s in bf16 and {rates[1]:.0f} in fp32 on one core"


def find_precision(name: str, device: torch.device) -> torch.dtype:
    """The precision of that name; float32 where the device can only imitate bf16, which is slow."""
    return PRECISIONS[name] if has_bf16(device) else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Whether a device has units or instructions for bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def measure_convolution(precision: torch.dtype) -> float:
    """GFLOP/s of a 3x3 convolution like the models', forward and backward, the best of several, on one core.

    Several wait for each other where something else uses one, and then all precisions are as slow.
    """
    from torch.utils.benchmark import Timer  # slow to import

    images, channels, size = 16, 64, 32
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False, dtype=precision)
    layer = layer.to(memory_format=torch.channels_last)
    values = torch.rand(images, channels, size, size, dtype=precision)
    values = values.to(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.rand_like(values, memory_format=torch.channels_last)

    def run() -> None:
        torch.autograd.grad(layer(values), (values, layer.weight), gradient)

    timer = Timer("run()", globals={"run": run}, num_threads=1)
    seconds = min(timer.blocked_autorange(min_run_time=0.2).times)
    return 3 * 2 * images * size**2 * channels**2 * 9 / seconds / 1e9


def fits_in_memory(slices: int, size: int, device: torch.device) -> tuple[bool, str]:
    """(whether so many float16 slices take at most half of the free memory, both in words)."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    free = free // (1 if device.type == "cuda" else distributed.local_world_size())
    need = slices * size**2 * 2
    return need <= free / 2, f"{need / 1e9:.2f} GB of slices, {free / 1e9:.1f} GB free"


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
