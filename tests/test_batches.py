"""Batches, the schedule and the seeds: all that decides which slices a step sees, and how far it goes."""

import numpy as np
import pytest
import torch

from training.batches import count_epoch_steps, pick_batch, schedule_learning_rate, seed_generator


def draw(*numbers) -> list[float]:
    return torch.rand(4, generator=seed_generator(torch.device("cpu"), *numbers)).tolist()


@pytest.mark.parametrize("count", [10, 7, 3])
def test_each_pass_visits_every_slice_once(count):
    seen = np.concatenate([pick_batch(step, 5, [count], seed=3) for step in range(14)])
    passes = [seen[start : start + count] for start in range(0, len(seen) - count + 1, count)]
    for places in passes:
        assert sorted(places) == list(range(count))
    assert len({tuple(places) for places in passes}) > 1, "each pass is shuffled anew"


def test_batches_follow_from_the_seed_and_the_step():
    first, again, other = (pick_batch(4, 8, [100], seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (np.diff(first) != 1).any()
    assert (pick_batch(0, 100, [100], 3)[: 4 * 8 + 8][-8:] == first).all(), "step 4 goes on where step 3 ended"


def test_scanners_take_turns_and_each_passes_through_its_own():
    places = np.concatenate([pick_batch(step, 5, [4, 12, 2], seed=3) for step in range(36)])
    scanner = np.searchsorted([4, 16], places, side="right")
    np.testing.assert_array_equal(scanner, np.arange(180) % 3)
    for number, (first, count) in enumerate([(0, 4), (4, 12), (16, 2)]):
        own = places[scanner == number]
        for start in range(0, len(own), count):
            assert sorted(own[start : start + count]) == list(range(first, first + count))
    orders = pick_batch(0, 40, [20, 20], seed=3)
    assert list(orders[::2]) != list(orders[1::2] - 20), "each scanner has an order of its own"


def test_one_scanner_is_drawn_from_as_ever():
    """A permutation for each pass, from NumPy's generator of the seed and the number of the pass."""
    orders = [np.random.default_rng([3, number]).permutation(7) for number in range(5)]
    places = np.concatenate([pick_batch(step, 5, [7], seed=3) for step in range(7)])
    np.testing.assert_array_equal(places, np.concatenate(orders))


def test_learning_rate_by_hand():
    rates = [schedule_learning_rate(step, 1000, 2e-3) / 2e-3 for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 40), "4 % of the steps to warm up"
    assert rates[19] == pytest.approx(0.5)
    assert rates[39] == rates[40] == pytest.approx(1)
    assert rates[40 + 320] == pytest.approx(2 / 3)
    assert rates[40 + 480] == pytest.approx(0.5)
    assert rates[999] == pytest.approx(1 / 960)
    assert schedule_learning_rate(1000, 1000, 1.0) == 0
    assert schedule_learning_rate(0, 1, 1.0) == 1


def test_each_seed_and_step_has_draws_of_its_own():
    assert draw(0, 1) == draw(0, 1)
    draws = [tuple(draw(*numbers)) for numbers in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 10), (0, 1, 2), (0, 1, 3))]
    assert len(set(draws)) == len(draws)


def test_an_epoch_is_a_pass_but_between_a_fiftieth_and_a_fifth_of_the_run():
    assert count_epoch_steps(slices=72, batch_size=5, steps=200) == 15
    assert count_epoch_steps(slices=72, batch_size=5, steps=5001) == 101
    assert count_epoch_steps(slices=72, batch_size=5, steps=11) == 3


def test_the_main_process_draws_what_a_single_one_does():
    assert draw(3, 7, 0) == draw(3, 7)
    assert draw(3, 7, 1) != draw(3, 7)
