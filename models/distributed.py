"""One process or many: each function does the right thing in both, so that callers never branch.

torchrun starts the processes and tells each in its environment who it is. They talk by NCCL about what is on CUDA
devices and by gloo about the rest. Alone, a process talks to nobody and nothing here costs anything.
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

PATIENCE = timedelta(days=1)  # the others wait for the first one while it calibrates and writes


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def count_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes files and speaks to the user."""
    return rank() == 0


@contextlib.contextmanager
def join(device: torch.device) -> Iterator[torch.device]:
    """Meet the processes that torchrun started with this one, if it did; gives the device that is this one's.

    They part at the end of the block: all at once if it ends well, for one that leaves early can abort another that
    still talks to it.
    """
    if count() == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield device
        dist.barrier()
    finally:
        dist.destroy_process_group()


def own_part(total: int) -> range:
    """Which of `total` things in a row are this process's; the parts of all make up the whole, none twice."""
    return range(rank() * total // count(), (rank() + 1) * total // count())


def add(values: torch.Tensor) -> torch.Tensor:
    """The sum over the processes; no gradient goes through it."""
    if count() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return bool(flag) if count() == 1 else bool(add(torch.tensor(float(flag))))


def agree(value):
    """The first process's value, for all."""
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather(value) -> list:
    """The values of all processes, in their order, in the first process; an empty list in the others."""
    if count() == 1:
        return [value]
    values = [None] * count() if is_first() else None
    dist.gather_object(value, values)
    return values or []


def share_statistics(model: nn.Module) -> nn.Module:
    """Make the model's batch norms take their statistics over the slices of all processes; before the optimiser."""
    if count() > 1:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.BatchNorm2d):
                model.set_submodule(name, _SharedBatchNorm2d.like(layer))
    return model


def share_gradients(model: nn.Module) -> nn.Module:
    """The model to train with: after backward each process has the mean of all processes' gradients."""
    if count() == 1:
        return model
    return DistributedDataParallel(model, forward_sync_buffers=False)


class _Sum(torch.autograd.Function):
    """The sum over the processes, through which gradients go: a slice has a share in what all make of the sum."""

    @staticmethod
    def forward(_, values: torch.Tensor) -> torch.Tensor:
        return add(values)

    @staticmethod
    def backward(_, gradient: torch.Tensor) -> torch.Tensor:
        return add(gradient)


class _SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the slices of all processes. (torch's own SyncBatchNorm does not work on a CPU.)"""

    @classmethod
    def like(cls, layer: nn.BatchNorm2d) -> _SharedBatchNorm2d:
        shared = cls(layer.num_features, layer.eps, layer.momentum)
        shared.load_state_dict(layer.state_dict())
        return shared.to(layer.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        values = x.float()
        number = values.new_full((1,), x.numel() / x.shape[1])
        sums = torch.cat([values.sum((0, 2, 3)), values.square().sum((0, 2, 3)), number])
        sums = _Sum.apply(sums)
        mean, square = (sums[:-1] / sums[-1]).view(2, -1)
        variance = square - mean**2
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * sums[-1] / (sums[-1] - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return (values * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(x.dtype)
