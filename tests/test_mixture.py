"""Mixtures: no row lost or seen twice, batches within the budget, every rank the same number, little padding."""

import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_film, tiny_picture, tiny_recipe, tiny_sound, tiny_tokenizer

from nexus.data.chat import render
from nexus.data.collate import collate
from nexus.data.headers import lengths_of, row_length
from nexus.data.mixture import Mixture
from nexus.data.stream import Budget, Lengths
from nexus.errors import BadConfig, BadRecord
from nexus.types import Sample, Text, Turn


class Rows:
    """Rows without content: what a mixture looks at is their lengths."""

    def __init__(self, name: str, lengths: Lengths, weight: float = 1.0) -> None:
        self.name, self.lengths, self.weight = name, lengths, weight
        self.fingerprint = f"{name} {len(lengths)}"

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"{self.name} {index}", "chat", ())


def lengths(tokens: Any, seconds: Any) -> Lengths:
    """One sound a row, none where its seconds are 0."""
    sound = np.round(np.asarray(seconds, dtype=np.float64), 2)
    return Lengths(np.asarray(tokens, dtype=np.int64), sound, (sound > 0).astype(np.int64), sound)


def demo_like(rows: int, seed: int = 0) -> list[Rows]:
    """Sources as long as the demo's rows: utterances of 0.8 to 4 s, pictures, films, typed talks, dialogues."""
    rng = np.random.default_rng(seed)
    heard, pictures, films, typed, dialogues = (rows * share // 100 for share in (50, 20, 5, 20, 5))

    def seconds(count: int) -> np.ndarray:
        return np.clip(rng.gamma(6, 0.3, count), 0.8, 4.0)

    asked, told = seconds(heard), seconds(dialogues)
    return [
        Rows("heard", lengths(22 + np.ceil(asked * 5) + rng.poisson(8, heard), asked), 0.5),
        Rows("pictures", lengths(29 + 4 * rng.integers(9, 16, pictures), np.zeros(pictures)), 0.2),
        Rows("films", lengths(70 + 9 * rng.integers(3, 9, films) + rng.integers(0, 30, films), np.zeros(films)), 0.05),
        Rows("typed", lengths(15 + rng.gamma(6, 10, typed), np.zeros(typed)), 0.2),
        Rows("dialogues", lengths(60 + np.ceil(told * 5) + rng.poisson(20, dialogues), told), 0.05),
    ]


ROWS = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 9)), min_size=1, max_size=40)
SOURCES = st.lists(st.tuples(ROWS, st.floats(0.1, 3.0)), min_size=1, max_size=3)


def made(drawn: list[tuple[list[tuple[int, float]], float]]) -> list[Rows]:
    return [Rows(chr(97 + n), lengths(*zip(*rows, strict=True)), weight) for n, (rows, weight) in enumerate(drawn)]


@settings(max_examples=40)
@given(SOURCES, st.integers(1, 5), st.integers(50, 400), st.floats(9, 60), st.integers(0, 3))
def test_no_row_of_a_source_is_lost_or_seen_twice_before_all_are_seen(
    drawn: list[tuple[list[tuple[int, float]], float]], world: int, tokens: int, seconds: float, seed: int
) -> None:
    sources, budget = made(drawn), Budget(tokens, seconds)
    mixtures = [Mixture(sources, budget, seed, rank, world) for rank in range(world)]
    seen: Counter[str] = Counter()
    step = 0
    while mixtures[0].epoch_of(step) < 3:
        for mixture in mixtures:
            batch = [row.id for row in mixture.at(step)]
            assert batch
            seen.update(batch)
        step += 1
    carried = mixtures[0].padding(2).carried
    assert carried < world
    for source in sources:
        times = [seen[f"{source.name} {n}"] for n in range(len(source))]
        assert sum(max(0, max(times) - 1 - count) for count in times) <= carried, times


@settings(max_examples=40)
@given(ROWS, st.integers(1, 5), st.integers(50, 400), st.floats(9, 60), st.integers(0, 3))
def test_an_epoch_of_one_source_shows_every_row_once_and_carries_the_rest(
    rows: list[tuple[int, float]], world: int, tokens: int, seconds: float, seed: int
) -> None:
    sources, budget = [Rows("a", lengths(*zip(*rows, strict=True)))], Budget(tokens, seconds)
    mixtures = [Mixture(sources, budget, seed, rank, world) for rank in range(world)]
    seen: Counter[str] = Counter()
    carried, step = 0, 0
    for epoch in range(4):
        before = carried
        padding = mixtures[0].padding(epoch)
        carried = padding.carried
        assert before + len(rows) == padding.rows + carried and carried < world
        while mixtures[0].epoch_of(step) == epoch:
            seen.update(row.id for mixture in mixtures for row in mixture.at(step))
            step += 1
        assert sum(seen.values()) == (epoch + 1) * len(rows) - carried
        assert {epoch + 1 - seen[f"a {n}"] for n in range(len(rows))} <= (
            {0, 1} if carried < len(rows) else {0, 1, 2, 3}
        )


@settings(max_examples=40)
@given(SOURCES, st.integers(1, 5), st.integers(50, 400), st.floats(9, 60))
def test_no_batch_passes_the_budget_with_its_padding(
    drawn: list[tuple[list[tuple[int, float]], float]], world: int, tokens: int, seconds: float
) -> None:
    sources = made(drawn)
    sizes = {
        f"{source.name} {n}": (int(source.lengths.tokens[n]), float(source.lengths.audio_seconds[n]))
        for source in sources
        for n in range(len(source))
    }
    for rank in range(world):
        mixture = Mixture(sources, Budget(tokens, seconds), 0, rank, world)
        for step in range(8):
            batch = [sizes[row.id] for row in mixture.at(step)]
            assert len(batch) * max(size[0] for size in batch) <= tokens
            sounds = [size[1] for size in batch if size[1]]
            assert len(sounds) * max(sounds, default=0.0) <= seconds


@settings(max_examples=15)
@given(SOURCES, st.integers(1, 3), st.lists(st.integers(0, 120), min_size=1, max_size=8))
def test_a_step_is_the_same_whatever_was_asked_before_and_in_another_process(
    drawn: list[tuple[list[tuple[int, float]], float]], world: int, steps: list[int]
) -> None:
    sources, budget = made(drawn), Budget(150, 30.0)
    walked = Mixture(sources, budget, 5, world - 1, world)
    sent = pickle.dumps(walked)
    for step in steps:
        fresh = pickle.loads(sent)
        assert [row.id for row in walked.at(step)] == [row.id for row in fresh.at(step)]


def test_weights_are_shares_of_the_rows() -> None:
    sources = [Rows("much", lengths([20] * 900, [0] * 900), 3.0), Rows("little", lengths([20] * 50, [0] * 50), 1.0)]
    mixture = Mixture(sources, Budget(200, 1.0), 0)
    seen = Counter(row.id.split()[0] for step in range(100) for row in mixture.at(step))
    assert seen["much"] / sum(seen.values()) == pytest.approx(0.75, abs=0.01)
    first = [row.id for step in range(mixture.batches_per_epoch) for row in mixture.at(step)]
    assert len(first) == len(set(first)) == 200  # the smaller source ends the epoch: 50 rows, a quarter of it


def test_orders_differ_between_epochs_and_seeds() -> None:
    def batches(seed: int) -> list[list[str]]:
        mixture = Mixture(demo_like(400), Budget(1500, 40.0), seed)
        return [[row.id for row in mixture.at(step)] for step in range(2 * mixture.batches_per_epoch)]

    first = batches(0)
    assert first != batches(1)
    assert first[: len(first) // 2] != first[len(first) // 2 :]


@pytest.mark.parametrize("world", [1, 2, 8])
def test_padding_of_words_and_of_sound_stays_below_five_percent_on_lengths_like_the_demos(world: int) -> None:
    mixture = Mixture(demo_like(5000), Budget(1500, 40.0), 0, 0, world)
    for epoch in range(3):
        padding = mixture.padding(epoch)
        assert padding.rows == 5000 and padding.carried == 0
        assert 0 < padding.token_share <= 0.05 and 0 < padding.audio_share <= 0.05, padding


def test_batches_mix_what_is_heard_with_what_is_not() -> None:
    mixture = Mixture(demo_like(5000), Budget(1500, 40.0), 0)
    kinds = [{row.id.split()[0] for row in mixture.at(step)} for step in range(mixture.batches_per_epoch)]
    assert sum(len(kind) > 1 for kind in kinds) > 0.5 * len(kinds)


def test_ranks_of_a_step_have_about_equally_much_to_do() -> None:
    sources = demo_like(4000)
    tokens = {f"{source.name} {n}": int(source.lengths.tokens[n]) for source in sources for n in range(len(source))}
    mixtures = [Mixture(sources, Budget(1500, 40.0), 0, rank, 2) for rank in range(2)]
    spread = []
    for step in range(mixtures[0].batches_per_epoch):
        longest = [max(tokens[row.id] for row in mixture.at(step)) for mixture in mixtures]
        spread.append(max(longest) / min(longest))
    assert np.mean(spread) < 1.15  # of batches that meet by chance about 1.5


def test_a_row_longer_than_the_budget_is_refused_by_name() -> None:
    sources = [Rows("talks.jsonl", lengths([10, 3001, 4000], [0, 0, 0]))]
    with pytest.raises(BadRecord) as caught:
        Mixture(sources, Budget(2048, 60.0), 0)
    for word in ("talks.jsonl: row 2", "3001", "2048", "data.tokens_per_batch", "1 more"):
        assert word in str(caught.value)
    with pytest.raises(BadRecord, match=r"row 1 .*takes 61\.5 s.*limit of a batch is 60 .*audio_seconds_per_batch"):
        Mixture([Rows("heard", lengths([10], [61.5]))], Budget(2048, 60.0), 0)


@pytest.mark.parametrize(("rows", "weight"), [([], 1.0), ([5], 0.0), ([5], float("nan")), ([5], float("inf"))])
def test_a_source_that_gives_nothing_is_refused(rows: list[int], weight: float) -> None:
    with pytest.raises(BadConfig, match="talks"):
        Mixture([Rows("talks", lengths(rows, [0] * len(rows)), weight)], Budget(100, 1.0), 0)
    with pytest.raises(BadConfig, match="no sources"):
        Mixture([], Budget(100, 1.0), 0)


def test_the_fingerprint_follows_the_data_and_not_the_rank() -> None:
    one = Mixture(demo_like(200), Budget(1500, 40.0), 0, 0, 2).fingerprint
    assert one == Mixture(demo_like(200), Budget(1500, 40.0), 0, 1, 2).fingerprint
    others = [
        (demo_like(220), Budget(1500, 40.0), 0),
        (demo_like(200), Budget(1501, 40.0), 0),
        (demo_like(200), Budget(1500, 40.0), 1),
    ]
    assert one not in {Mixture(*other).fingerprint for other in others}


def test_padding_is_counted_as_the_batches_have_it() -> None:
    """Against real batches: tokens by their mask, sound by its windows, two sounds in a row and films among them."""
    recipe, tokenizer = tiny_recipe(), tiny_tokenizer()
    samples = []
    for n in range(24):
        parts = [Text("what is " * (n % 7))]
        parts += [tiny_sound(0.3 + 0.37 * (n % 12), n)] if n % 3 else [tiny_picture(seed=n)]
        parts += [tiny_sound(4.7, n)] if n % 8 == 1 else []  # longer than a window
        parts += [tiny_film(2 + n % 3)] if n % 6 == 2 else []
        samples.append(Sample(str(n), "chat", (Turn("user", tuple(parts)), Turn("assistant", (Text("two"),)))))

    class Known(Rows):
        def __getitem__(self, index: int) -> Sample:
            return samples[index]

    known = Known("known", lengths_of(row_length(sample, tokenizer, recipe.model) for sample in samples))
    mixture = Mixture([known], Budget(300, 20.0), 0)
    counted = [0, 0, 0, 0]
    for step in range(mixture.batches_per_epoch):
        batch = collate([render(row, tokenizer, recipe.model) for row in mixture.at(step)], tokenizer.pad, recipe.model)
        counted[0] += int(batch.mask.sum())
        counted[1] += batch.mask.numel()
        if batch.sound is not None:
            counted[2] += int(batch.sound.lengths.sum())
            counted[3] += batch.sound.mel.shape[0] * batch.sound.mel.shape[2]
    padding = mixture.padding(0)
    assert counted == [padding.tokens, padding.padded_tokens, padding.audio_frames, padding.padded_audio_frames]
