"""Which slices a step sees, with which random numbers and at which learning rate.

Everything follows from the seed and the number of the step (an idea of EDM2: Karras et al., 2024). No random state is
kept, so a run that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

WARM_UP = 0.04  # share of the steps over which the learning rate rises


def pick_batch(step: int, batch_size: int, slices: int, seed: int) -> np.ndarray:
    """(batch_size,) indices of the slices of this step; each pass through all slices has an order of its own."""
    places = step * batch_size + np.arange(batch_size)
    return np.array([_shuffle(slices, seed, int(place // slices))[place % slices] for place in places])


@lru_cache(maxsize=2)
def _shuffle(slices: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, number]).permutation(slices)


def seed_generator(device: torch.device, *numbers: int) -> torch.Generator:
    """A generator on the device whose stream depends on these numbers alone; zeros at their end change nothing."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> 1))


def schedule_learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 4 % of the steps, then half a cosine down to 0 (Loshchilov and Hutter, 2017)."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def count_epoch_steps(slices: int, batch_size: int, steps: int) -> int:
    """Steps of an epoch, which ends with a validation: a pass through the slices, within a 50th and a 5th of a run."""
    return min(max(math.ceil(slices / batch_size), math.ceil(steps / 50)), math.ceil(steps / 5))
