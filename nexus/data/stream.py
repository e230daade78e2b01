"""Which rows a training step sees: length buckets in a seeded order, a pure function of the step number; and how rows
are laid side by side and cut into batches within a budget, which `mixture` does for many sources.

Because nothing is remembered between steps, a run that continues at step n sees exactly what it would have seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

TOGETHER = 32  # rows without sound that stay side by side; fewer mix better and pad more


class Buckets:
    """Batches of `rows` items of similar length, two such batches at a time: two ranks of which each takes every other
    step wait little for each other. Within an epoch every item is seen once, except that the last two batches are
    filled up from the beginning of the epoch's order."""

    def __init__(self, lengths: Sequence[float] | Sequence[int], rows: int, seed: int) -> None:
        assert rows > 0 and len(lengths) > 0, (rows, len(lengths))
        self._lengths = np.asarray(lengths, dtype=np.float64)
        self._rows = min(rows, len(lengths))
        self._seed = seed
        self._epoch: tuple[int, np.ndarray] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Batches until every item has been seen."""
        return 2 * -(-len(self._lengths) // (2 * self._rows))

    def at(self, step: int) -> list[int]:
        """Indices of the items of batch `step`."""
        epoch, place = divmod(step, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return self._epoch[1][place].tolist()

    def _order(self, epoch: int) -> np.ndarray:
        """Batches [batches, rows] of one epoch: sorted by slightly disturbed length, then shuffled as pairs."""
        rng = np.random.default_rng([self._seed, epoch])
        disturbed = self._lengths * rng.uniform(0.93, 1.07, len(self._lengths))
        order = np.argsort(disturbed, kind="stable")
        short = -len(order) % (2 * self._rows)
        pairs = np.concatenate([order, order[:short]]).reshape(-1, 2, self._rows)
        return pairs[rng.permutation(len(pairs))].reshape(-1, self._rows)


@dataclass(frozen=True)
class Lengths:
    """How long rows are, one number per row: `tokens` language positions, `audio_seconds` of sound in all, `windows`
    how many windows the encoder takes it in, `longest_seconds` the longest of these. Sound is padded per window."""

    tokens: np.ndarray
    audio_seconds: np.ndarray
    windows: np.ndarray
    longest_seconds: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: np.ndarray) -> "Lengths":
        """Of some rows."""
        return Lengths(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence["Lengths"]) -> "Lengths":
        """Of the rows of all parts, one after the other."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass(frozen=True)
class Budget:
    """How much one batch may hold after padding: language positions, and seconds of sound."""

    tokens: int
    audio_seconds: float


def order_by_length(lengths: Lengths, strips: int, rng: np.random.Generator) -> np.ndarray:
    """Rows in an order in which neighbours are about equally long, in words and in sound.

    Rows are laid into `strips` of similar sound, and within one by their tokens, up in one strip and down in the next.
    A row without sound pads no sound wherever it stands: together with some of its own length it is laid into any
    strip, so that batches stay mixed.
    """
    place = np.empty(len(lengths))
    tokens = lengths.tokens * _disturbance(len(lengths), rng)
    silent, heard = np.flatnonzero(lengths.windows == 0), np.flatnonzero(lengths.windows)
    silent = silent[np.argsort(tokens[silent])]
    place[silent] = rng.random(-(-len(silent) // TOGETHER)).repeat(TOGETHER)[: len(silent)]
    ranks = np.argsort(np.argsort(lengths.longest_seconds[heard] * _disturbance(len(heard), rng)))
    place[heard] = (ranks + 0.5) / max(1, len(heard))
    strip = (place * strips).astype(np.int64)
    return np.lexsort((np.where(strip % 2, -tokens, tokens), strip))


def _disturbance(count: int, rng: np.random.Generator) -> np.ndarray:
    """A little: the same rows should not always meet, but every percent here is a percent of padding."""
    return rng.uniform(0.99, 1.01, count)


def cut(lengths: Lengths, budget: Budget) -> list[int]:
    """Where batches begin in rows of this order: each holds as many rows as the budget allows, padding counted.

    Every row must fit the budget alone.
    """
    starts = [0]
    rows, longest, windows, window_seconds = 0, 0, 0, 0.0
    columns = (lengths.tokens, lengths.windows, lengths.longest_seconds)
    for row, (tokens, more, seconds) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        rows, windows = rows + 1, windows + more
        longest, window_seconds = max(longest, tokens), max(window_seconds, seconds)
        if rows * longest > budget.tokens or windows * window_seconds > budget.audio_seconds:
            starts.append(row)
            rows, longest, windows, window_seconds = 1, tokens, more, seconds
    return starts
