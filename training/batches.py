"""Which slices a step sees, with which random numbers and at which learning rate.

Everything follows from the seed and the number of the step (an idea of EDM2: Karras et al., 2024). No random state is
kept, so a run that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

WARM_UP = 0.04  # share of the steps over which the learning rate rises


def pick_batch(step: int, batch_size: int, slices: Sequence[int], seed: int) -> np.ndarray:
    """(batch_size,) indices of the slices of this step; each pass through a scanner's slices has an order of its own.

    slices  how many each scanner has, one after the other; the scanners take turns, so each is drawn equally often
    """
    places = step * batch_size + np.arange(batch_size)
    first = np.concatenate([[0], np.cumsum(slices)])
    return np.array([_pick(int(place), slices, first, seed) for place in places])


def _pick(place: int, slices: Sequence[int], first: np.ndarray, seed: int) -> int:
    number, scanner = divmod(place, len(slices))
    count = slices[scanner]
    return int(first[scanner] + _shuffle(count, seed, number // count, scanner)[number % count])


@lru_cache(maxsize=64)
def _shuffle(slices: int, seed: int, number: int, scanner: int) -> np.ndarray:
    return np.random.default_rng([seed, number, scanner]).permutation(slices)


def mix_seed(*numbers: int) -> int:
    """A seed that depends on these numbers alone; zeros at their end change nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seed_generator(device: torch.device, *numbers: int) -> torch.Generator:
    """A generator on the device with `mix_seed` of these numbers."""
    return torch.Generator(device).manual_seed(mix_seed(*numbers))


def schedule_learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 4 % of the steps, then a straight line down to 0."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (steps - step) / max(1, steps - warm_up)


def count_epoch_steps(slices: int, batch_size: int, steps: int) -> int:
    """Steps of an epoch, which ends with a validation: a pass through the slices, within a 50th and a 5th of a run."""
    return min(max(math.ceil(slices / batch_size), math.ceil(steps / 50)), math.ceil(steps / 5))
