"""Work that a GPU does again and again, recorded once and then started as a whole.

A step of training is over a thousand operations so small that to start each takes longer than to do it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # calls before the recording, in which libraries choose their algorithms


class Recording:
    """Calls `work`, which takes tensors and returns one or several; on a GPU as a CUDA graph from the fourth call on.

    From then on Python does not run `work` again. So the tensors have the same shapes each time, what else changes is
    in tensors that `work` reads, and nothing in it waits for the GPU.

    generator  what `work` draws from, if it draws; it may be seeded anew between calls
    """

    def __init__(self, work: Callable[..., Tensor | tuple[Tensor, ...]], generator: torch.Generator | None = None):
        self.work, self.generator = work, generator
        self.warm_up, self.graph = WARM_UP, None

    def __call__(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        if not values[0].is_cuda:
            return self.work(*values)
        if self.warm_up:
            self.warm_up -= 1
            return self._work_aside(*values)
        if self.graph is None:
            self._record(*values)
        for kept, new in zip(self.values, values, strict=True):
            kept.copy_(new)
        self.graph.replay()
        return self.result.clone() if isinstance(self.result, Tensor) else tuple(one.clone() for one in self.result)

    def _work_aside(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        """On a stream of its own, as CUDA graphs ask for before a recording."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = self.work(*values)
        current.wait_stream(stream)
        return result

    def _record(self, *values: Tensor) -> None:
        """Recording does not do the work."""
        self.values, self.graph = [one.clone() for one in values], torch.cuda.CUDAGraph()
        if self.generator:
            self.graph.register_generator_state(self.generator)
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads read slices
            self.result = self.work(*self.values)
