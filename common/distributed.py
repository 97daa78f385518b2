"""One process or many: each function does the right thing in both, so that callers never branch.

torchrun starts the processes and tells each in its environment who it is. They exchange tensors on CUDA
devices by NCCL and everything else by gloo. Without torchrun nobody communicates, and nothing here costs time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(days=1)  # the other processes wait while the main one calibrates and writes


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_world_size() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_alone() -> bool:
    """Whether this process has joined no others: outside `join`, or not started by torchrun."""
    return not dist.is_initialized()


def is_main() -> bool:
    """Whether this is the process that writes files and talks to the user."""
    return rank() == 0


@contextlib.contextmanager
def join(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; yields this process's device.

    They wait for each other at the end of the block, because one that leaves early can abort another that still
    communicates with it.
    """
    if "RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield device
        dist.barrier()
    finally:
        dist.destroy_process_group()


def shard(total: int) -> range:
    """This process's share of `total` items in a row; the shares of all processes cover each item once."""
    return range(rank() * total // world_size(), (rank() + 1) * total // world_size())


def all_reduce(values: torch.Tensor) -> torch.Tensor:
    """The sum over the processes; no gradient goes through it."""
    if is_alone():
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return bool(flag) if is_alone() else bool(all_reduce(torch.tensor(float(flag))))


def broadcast(value):
    """The main process's value, for all."""
    if is_alone():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def share_gradients(model: nn.Module) -> nn.Module:
    """The model to train with: after backward each process has the mean of all processes' gradients.

    On CUDA devices batch norm takes its statistics over the slices of all processes (torch's SyncBatchNorm, which
    does not work on a CPU).
    """
    if is_alone():
        return model
    if next(model.parameters()).is_cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model)


def share_statistics(model: nn.Module) -> None:
    """Give all processes the main one's batch-norm statistics, which differ where each took them over its slices."""
    if not is_alone():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
