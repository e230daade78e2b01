"""Which rows a training step sees: length buckets in a seeded order, a pure function of the step number.

Because nothing is remembered between steps, a run that continues at step n sees exactly what it would have seen.
"""

from collections.abc import Sequence

import numpy as np


class Buckets:
    """Batches of `rows` items of similar length. Within an epoch every item is seen once, except that the last
    batch is filled up from the beginning of the epoch's order."""

    def __init__(self, lengths: Sequence[float] | Sequence[int], rows: int, seed: int) -> None:
        assert rows > 0 and len(lengths) > 0, (rows, len(lengths))
        self._lengths = np.asarray(lengths, dtype=np.float64)
        self._rows = min(rows, len(lengths))
        self._seed = seed
        self._epoch: tuple[int, np.ndarray] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Batches until every item has been seen."""
        return -(-len(self._lengths) // self._rows)

    def at(self, step: int) -> list[int]:
        """Indices of the items of batch `step`."""
        epoch, place = divmod(step, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return self._epoch[1][place].tolist()

    def _order(self, epoch: int) -> np.ndarray:
        """Batches [batches, rows] of one epoch: sorted by slightly disturbed length, then shuffled as batches."""
        rng = np.random.default_rng([self._seed, epoch])
        disturbed = self._lengths * rng.uniform(0.93, 1.07, len(self._lengths))
        order = np.argsort(disturbed, kind="stable")
        short = -len(order) % self._rows
        batches = np.concatenate([order, order[:short]]).reshape(-1, self._rows)
        return batches[rng.permutation(len(batches))]
