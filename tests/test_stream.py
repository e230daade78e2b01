"""Length buckets: every item is seen, the order follows from seed and step alone, similar lengths stand together."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nexus.data.stream import Buckets

LENGTHS = st.lists(st.floats(0.1, 30.0), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 12), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_shows_every_item_once_but_for_the_filling_of_the_last_pair(
    lengths: list[float], rows: int, seed: int, epoch: int
) -> None:
    buckets = Buckets(lengths, rows, seed)
    count = buckets.batches_per_epoch
    batches = [buckets.at(epoch * count + place) for place in range(count)]
    size = min(rows, len(lengths))
    assert all(len(batch) == len(set(batch)) == size for batch in batches)
    seen = sorted(index for batch in batches for index in batch)
    assert set(seen) == set(range(len(lengths)))
    assert count % 2 == 0 and len(seen) - len(lengths) == -len(lengths) % (2 * size)
    assert max(seen.count(index) for index in seen) <= 2


@given(LENGTHS, st.integers(1, 12), st.lists(st.integers(0, 300), min_size=1, max_size=20))
def test_a_batch_depends_on_seed_and_step_alone_and_not_on_what_was_asked_before(
    lengths: list[float], rows: int, steps: list[int]
) -> None:
    walked = Buckets(lengths, rows, 7)
    for step in steps:
        assert walked.at(step) == Buckets(lengths, rows, 7).at(step)


def test_epochs_and_seeds_have_different_orders() -> None:
    lengths = np.linspace(1, 9, 40).tolist()
    buckets = Buckets(lengths, 8, 0)
    first, second = ([buckets.at(epoch * 6 + place) for place in range(6)] for epoch in (0, 1))
    assert first != second and first != [Buckets(lengths, 8, 1).at(place) for place in range(6)]


def test_items_of_a_batch_have_similar_lengths() -> None:
    lengths = np.random.default_rng(0).uniform(1.0, 10.0, 400)
    buckets = Buckets(lengths.tolist(), 16, 3)
    ratios = [max(lengths[b]) / min(lengths[b]) for b in map(buckets.at, range(buckets.batches_per_epoch))]
    assert max(ratios) < 1.6  # at random it is about 6


def test_batches_do_not_come_in_the_order_of_their_lengths() -> None:
    buckets = Buckets(list(range(1, 801)), 10, 0)
    means = [float(np.mean(buckets.at(step))) for step in range(0, 80, 2)]
    rises = sum(a < b for a, b in pairwise(means))
    assert 10 < rises < 30


def test_two_steps_of_a_pair_take_about_as_long() -> None:
    lengths = np.random.default_rng(1).uniform(1.0, 10.0, 500)
    buckets = Buckets(lengths.tolist(), 16, 3)
    whole = range(0, buckets.batches_per_epoch, 2)
    ratios = sorted(max(lengths[buckets.at(step)]) / max(lengths[buckets.at(step + 1)]) for step in whole)
    assert ratios[1] > 0.6 and ratios[-2] < 1.6  # all but the pair that is filled up
    assert np.median(np.abs(np.log(ratios))) < 0.1
