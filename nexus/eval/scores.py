"""Scores with what makes them honest: n, a 95 % interval, paired differences. Pure functions over lists."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from nexus.errors import BadRecord
from nexus.text import word_errors

RESAMPLES = 1000
SEED = 0  # of the bootstrap: the same items give the same interval


def accuracy(right: Sequence[bool]) -> dict[str, object]:
    """Share of right answers, `n` and the bootstrap interval `ci95`."""
    values = np.asarray(right, dtype=np.float64)
    return {"accuracy": float(values.mean()), "n": len(values), "ci95": rate_interval(values, np.ones(len(values)))}


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, object]:
    """Corpus word error rate, `n` utterances and the interval from resampling whole utterances.

    Without a single reference word there is no rate: `wer` and `ci95` are None.
    """
    pairs = [word_errors(r, h) for r, h in zip(references, hypotheses, strict=True)]
    errors, words = (np.asarray(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    if not words.sum():
        return {"wer": None, "n": len(pairs), "ci95": None, "reason": "the references hold no words"}
    return {"wer": float(errors.sum() / words.sum()), "n": len(pairs), "ci95": rate_interval(errors, words)}


def paired_drop(before: Sequence[bool], after: Sequence[bool]) -> dict[str, object]:
    """Fall of accuracy on the same items (positive: worse), with its paired interval."""
    difference = np.asarray(before, dtype=np.float64) - np.asarray(after, dtype=np.float64)
    return {"drop": float(difference.mean()), "ci95": rate_interval(difference, np.ones(len(difference)))}


def exact(references: Sequence[str], hypotheses: Sequence[str]) -> list[bool]:
    """Whether each whole answer is the right one, letter by letter."""
    return [r == h for r, h in zip(references, hypotheses, strict=True)]


def others(items: Sequence[str]) -> list[str]:
    """Every item replaced by another one, half the list away: what a score becomes with somebody else's input."""
    half = len(items) // 2
    return [*items[half:], *items[:half]]


def most_frequent(texts: Sequence[str]) -> str:
    """The most frequent text (the first in the alphabet of several): an answer that looks at no question."""
    counts = Counter(texts)
    return min(counts, key=lambda text: (-counts[text], text))


def bootstrap(columns: np.ndarray, statistic: Callable[[np.ndarray], float | None]) -> list[float] | None:
    """95 % interval of a statistic of column sums over resampled rows; columns [N, K].

    Draws without a value (no reference unit) are left out. Draw by draw: all at once they would take RESAMPLES times
    the memory of the test.
    """
    rng, num = np.random.default_rng(SEED), len(columns)
    draws = (np.bincount(rng.integers(0, num, num), minlength=num).astype(np.float64) for _ in range(RESAMPLES))
    values = [value for times in draws if (value := statistic(times @ columns)) is not None]
    return [float(x) for x in np.quantile(values, (0.025, 0.975))] if values else None


def rate(sums: np.ndarray) -> float | None:
    """Errors over units; None without a unit."""
    return float(sums[0] / sums[1]) if sums[1] else None


def rate_interval(above: np.ndarray, below: np.ndarray) -> list[float]:
    """95 % interval of sum(above) / sum(below) over resampled items, [N] each.

    Raises BadRecord where `below` is all 0.
    """
    interval = bootstrap(np.stack([above, below], axis=1), rate) if below.any() else None
    if interval is None:
        raise BadRecord(f"no interval: {len(below)} items hold nothing to divide by, expected at least 1; give more")
    return interval
