"""Many sources as one stream of batches: weighted, within a budget, one share per rank, a function of the step alone.

An epoch of a mixture is the stretch in which the source that is through first is seen once; the others go on behind
the row where they stopped. Every source is seen whole before a row of it comes again. What fills no whole step of all
ranks is carried into the next epoch. Knows no files and no models: sources do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from nexus.data.stream import Budget, Lengths, cut, order_by_length
from nexus.errors import BadConfig, BadRecord
from nexus.recipe import fingerprint
from nexus.types import Sample

STRIPS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)  # of similar sound; the number that pads least is taken

ROWS_PER_STRIP = 8  # fewer are no strip


@runtime_checkable
class Source(Protocol):
    """Rows with a length each. `name` is how messages call it, `weight` its share of the rows that are drawn, relative
    to the other sources; `fingerprint` changes with its content. A row's media may still be files."""

    name: str
    weight: float

    @property
    def fingerprint(self) -> str: ...

    @property
    def lengths(self) -> Lengths: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Padding:
    """What the batches of one epoch hold on all ranks: `tokens` language positions and `audio_frames` of 10 ms, and
    both as padded; `carried` rows were left for the next epoch."""

    rows: int
    carried: int
    tokens: int
    padded_tokens: int
    audio_frames: int
    padded_audio_frames: int

    @property
    def token_share(self) -> float:
        """Share of language positions that are padding, 0..1."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    @property
    def audio_share(self) -> float:
        """Share of audio frames that are padding, 0..1."""
        return 1 - self.audio_frames / self.padded_audio_frames if self.padded_audio_frames else 0.0


@dataclass(frozen=True)
class _Epoch:
    """`rows` in the order in which they are seen; batch b is rows[bounds[b] : bounds[b + 1]]; `carried` are left."""

    number: int
    first_step: int
    rows: np.ndarray
    bounds: np.ndarray
    carried: np.ndarray

    def steps(self, world: int) -> int:
        return (len(self.bounds) - 1) // world


class Mixture:
    """Batches of `sources` for one of `world` ranks. Each rank gets the same number of batches per epoch, no row goes
    to two of them, and the batches of one step are about equally large, so that ranks wait little for each other.

    Raises BadConfig for no sources, an empty one or a weight that is not above 0, and BadRecord for a row that is
    larger than the budget alone: rows are never cut.
    """

    def __init__(self, sources: Sequence[Source], budget: Budget, seed: int, rank: int = 0, world: int = 1) -> None:
        assert 0 <= rank < world, (rank, world)
        _check(sources)
        self.sources, self.budget, self.seed, self.rank, self.world = tuple(sources), budget, seed, rank, world
        self._counts = np.array([len(source) for source in sources])
        self._offsets = np.concatenate([[0], np.cumsum(self._counts)])
        self._lengths = Lengths.joined([source.lengths for source in sources])
        assert len(self._lengths) == self._offsets[-1], "a source has more or fewer lengths than rows"
        self._check_rows()
        weights = np.array([source.weight for source in sources], dtype=np.float64)
        self._rows_per_epoch = weights * (self._counts / weights).min()
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._begins: list[tuple[int, np.ndarray]] = [(0, np.zeros(0, np.int64))]  # first step, rows carried in
        self._strips = self._best_strips()
        self._epoch = self._planned(0)

    @property
    def batches_per_epoch(self) -> int:
        """Steps of the first epoch; later ones may have a few more or less."""
        return self._find(0).steps(self.world)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over what decides on the rows of every step, except rank and world."""
        return fingerprint(
            [
                [[s.fingerprint, s.weight] for s in self.sources],
                self.budget.tokens,
                self.budget.audio_seconds,
                self.seed,
            ]
        )

    def at(self, step: int) -> list[Sample]:
        """The rows of this rank at a step: a function of sources, budget, seed, rank, world and step alone."""
        epoch = self._epoch_at(step)
        batch = (step - epoch.first_step) * self.world + self.rank
        return [self._row(int(row)) for row in epoch.rows[epoch.bounds[batch] : epoch.bounds[batch + 1]]]

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to."""
        return self._epoch_at(step).number

    def padding(self, epoch: int) -> Padding:
        """Real and padded sizes of all ranks' batches in an epoch."""
        plan = self._find(epoch)
        sizes = self._lengths[plan.rows]
        return Padding(len(plan.rows), len(plan.carried), *_sizes(sizes, plan.bounds))

    def _row(self, row: int) -> Sample:
        source = int(np.searchsorted(self._offsets, row, side="right")) - 1
        return self.sources[source][row - int(self._offsets[source])]

    def _epoch_at(self, step: int) -> _Epoch:
        assert step >= 0, step
        if step < self._epoch.first_step:
            number = max(n for n, (first, _) in enumerate(self._begins) if first <= step)
            self._epoch = self._planned(number)
        while step >= self._epoch.first_step + self._epoch.steps(self.world):
            self._epoch = self._planned(self._epoch.number + 1)
        return self._epoch

    def _find(self, number: int) -> _Epoch:
        if self._epoch.number == number:
            return self._epoch
        for before in range(len(self._begins) - 1, number):
            self._planned(before)
        return self._planned(number)

    def _planned(self, number: int) -> _Epoch:
        """Plan an epoch whose beginning is known, and note where the next one begins."""
        first_step, carried_in = self._begins[number]
        rows = np.concatenate([carried_in, *(self._drawn(s, number) for s in range(len(self.sources)))])
        rng = np.random.default_rng([self.seed, number, 1])
        order = order_by_length(self._lengths[rows], self._strips, rng)
        batches = self._batches(rows[order])
        whole = len(batches) // self.world * self.world
        steps = rng.permutation(whole // self.world)
        kept = [batches[step * self.world + rank] for step in steps for rank in range(self.world)]
        empty = [np.zeros(0, np.int64)]
        epoch = _Epoch(
            number,
            first_step,
            np.concatenate([*empty, *kept]),
            np.cumsum([0, *(len(batch) for batch in kept)]),
            np.concatenate([*empty, *batches[whole:]]),
        )
        if len(self._begins) == number + 1:
            self._begins.append((first_step + epoch.steps(self.world), epoch.carried))
        return epoch

    def _batches(self, rows: np.ndarray) -> list[np.ndarray]:
        """Rows cut into batches, the largest of which are halved until every rank has one in every step."""
        starts = cut(self._lengths[rows], self.budget)
        batches = np.split(rows, starts[1:])
        while len(batches) % self.world:
            largest = max(range(len(batches)), key=lambda b: len(batches[b]))
            if len(batches[largest]) < 2:
                break
            batches[largest : largest + 1] = np.array_split(batches[largest], 2)
        return batches

    def _drawn(self, source: int, epoch: int) -> np.ndarray:
        """What a source gives to an epoch: its rows in an order of their own, going on where they stopped."""
        first, end = (round(self._rows_per_epoch[source] * n) for n in (epoch, epoch + 1))
        count, at, pieces = int(self._counts[source]), first, [np.zeros(0, np.int64)]
        while at < end:
            turn, place = divmod(at, count)
            some = self._order(source, turn)[place : place + end - at]
            pieces.append(some + self._offsets[source])
            at += len(some)
        return np.concatenate(pieces)

    def _order(self, source: int, turn: int) -> np.ndarray:
        if self._orders.get(source, (-1, None))[0] != turn:
            order = np.random.default_rng([self.seed, turn, 0, source]).permutation(int(self._counts[source]))
            self._orders[source] = (turn, order)
        return self._orders[source][1]

    def _best_strips(self) -> int:
        """The number of strips with which the first epoch pads least, of words or of sound, whichever it pads more."""
        rows = np.concatenate([self._drawn(s, 0) for s in range(len(self.sources))])

        def cost(strips: int) -> float:
            lengths = self._lengths[rows]
            lengths = lengths[order_by_length(lengths, strips, np.random.default_rng([self.seed, 2]))]
            tokens, padded, frames, padded_frames = _sizes(lengths, np.array([*cut(lengths, self.budget), len(rows)]))
            return max(padded / max(1, tokens), padded_frames / max(1, frames))

        return min((strips for strips in STRIPS if strips == 1 or ROWS_PER_STRIP * strips <= len(rows)), key=cost)

    def _check_rows(self) -> None:
        sound = self._lengths.windows * self._lengths.longest_seconds
        for column, limit, what, key in (
            (self._lengths.tokens, self.budget.tokens, "language positions", "data.tokens_per_batch"),
            (sound, self.budget.audio_seconds, "s of sound in its windows", "data.audio_seconds_per_batch"),
        ):
            long = np.flatnonzero(column > limit)
            if len(long):
                source = int(np.searchsorted(self._offsets, long[0], side="right")) - 1
                index = int(long[0] - self._offsets[source])
                others = f"; {len(long) - 1} more rows are too long" if len(long) > 1 else ""
                raise BadRecord(
                    f"{self.sources[source].name}: row {index + 1} ({self.sources[source][index].id}) takes "
                    f"{column[long[0]]:g} {what}, the limit of a batch is {limit:g} ({key}); raise it or leave the row "
                    f"out{others}"
                )


def _check(sources: Sequence[Source]) -> None:
    if not sources:
        raise BadConfig("a mixture of no sources: expected at least one; name a file in data.train")
    for source in sources:
        if not len(source):
            raise BadConfig(f"{source.name}: holds no rows, expected at least one; leave it out or fill it")
        if not 0 < source.weight < np.inf:
            raise BadConfig(f"{source.name}: weight is {source.weight:g}, expected a number above 0; leave it out")


def _sizes(lengths: Lengths, bounds: np.ndarray) -> tuple[int, int, int, int]:
    """Language positions and as padded, audio frames and as padded, of rows in batches."""
    if len(bounds) < 2:
        return 0, 0, 0, 0
    rows, starts = np.diff(bounds), bounds[:-1]
    padded = int((rows * np.maximum.reduceat(lengths.tokens, starts)).sum())
    windows = np.add.reduceat(lengths.windows, starts)
    frames = round(100 * float(lengths.audio_seconds.sum()))
    padded_frames = float((windows * np.maximum.reduceat(lengths.longest_seconds, starts)).sum())
    return int(lengths.tokens.sum()), padded, frames, round(100 * padded_frames)
