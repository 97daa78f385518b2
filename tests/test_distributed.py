"""Two processes do together what one does alone: sums, shares, gradients and batch-norm statistics."""

import multiprocessing
import os
import socket

import pytest
import torch
from torch import nn

from common import distributed

SLICES = torch.arange(10.0).view(5, 2) / 10


@pytest.fixture
def pretend(monkeypatch):
    def be(rank: int, size: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(size))

    return be


@pytest.mark.parametrize(("total", "size"), [(16, 1), (16, 2), (35, 2), (5, 3), (7, 4)])
def test_shards_make_up_the_whole(pretend, total, size):
    shards = []
    for rank in range(size):
        pretend(rank, size)
        shards.append(distributed.shard(total))
        assert distributed.is_main() == (rank == 0)
    assert [place for shard in shards for place in shard] == list(range(total))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_alone_nothing_is_sent(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (distributed.rank(), distributed.world_size(), distributed.local_world_size()) == (0, 1, 1)
    model, values = nn.Linear(2, 1), torch.ones(3)
    with distributed.join(torch.device("cpu")) as device:
        assert device.type == "cpu"
        assert distributed.share_gradients(model) is model
        assert distributed.all_reduce(values) is values
        assert distributed.broadcast("a") == "a"
        assert distributed.any_of(True)
        assert not distributed.any_of(False)


def find_gradient(slices: torch.Tensor) -> torch.Tensor:
    """Of the mean over all slices of a linear model's output, by this process's part of them."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    network = distributed.share_gradients(model)
    pixels = distributed.all_reduce(torch.tensor(float(len(slices))))
    loss = (network(slices) ** 2).sum() / pixels
    (loss * distributed.world_size()).backward()
    return model.weight.grad


def take_part(rank: int, size: int, port: int, answers) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with distributed.join(torch.device("cpu")):
        norm = nn.BatchNorm1d(2)
        norm.running_mean.fill_(rank + 1)
        distributed.share_statistics(norm)
        answers.put({
            "rank": rank,
            "alone": distributed.is_alone(),
            "sum": distributed.all_reduce(torch.tensor([1.0 + rank])).item(),
            "main": distributed.broadcast(["from", rank]),
            "any": [distributed.any_of(rank == size - 1), distributed.any_of(False)],
            "gradient": find_gradient(SLICES[distributed.shard(len(SLICES))]).tolist(),
            "statistics": norm.running_mean.tolist(),
        })  # fmt: skip


@pytest.mark.parametrize("size", [1, 2])
def test_processes_together(monkeypatch, size):
    """One that torchrun started does what several do, so that NCCL can be tried with one GPU."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    expected = find_gradient(SLICES)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    answers = context.Queue()
    processes = [context.Process(target=take_part, args=(rank, size, port, answers)) for rank in range(size)]
    for process in processes:
        process.start()
    told = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(answer["rank"] for answer in told) == list(range(size))
    for answer in told:
        assert not answer["alone"]
        assert answer["sum"] == (1 if size == 1 else 3)
        assert answer["main"] == ["from", 0]
        assert answer["any"] == [True, False]
        torch.testing.assert_close(torch.tensor(answer["gradient"]), expected)
        assert answer["statistics"] == [1, 1]
