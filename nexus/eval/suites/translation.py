"""BLEU of translations as the field reports it: sacrebleu on raw text, with its signature and an interval."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from sacrebleu.metrics.bleu import BLEU

from nexus.errors import BadRecord
from nexus.eval.scores import bootstrap

# Chinese writes no spaces: with 13a a whole sentence would be one word, right or wrong.
TOKENIZERS = {"zh": "zh", "en": "13a"}


def bleu(references: Sequence[str], hypotheses: Sequence[str], target: Literal["zh", "en"]) -> dict[str, object]:
    """Corpus BLEU 0..100 of translations into `target`, one reference each; the sentences are not normalised.

    Gives `bleu`, `n` sentences, `ci95` from resampling whole sentences (seeded) and sacrebleu's `signature`. Where no
    reference is as long as four tokens there is no BLEU: `bleu` and `ci95` are None. An empty hypothesis is legal and
    matches nothing. Raises BadRecord for no sentences at all, for lists of unequal lengths and for an empty reference.
    """
    if len(references) != len(hypotheses):
        raise BadRecord(
            f"BLEU needs a translation for each reference: {len(references)} references, {len(hypotheses)} "
            "translations; give both in the same order"
        )
    if not references:
        raise BadRecord("BLEU of 0 sentences is undefined, expected at least 1; choose test items with a translation")
    for index, reference in enumerate(references):
        if not reference.strip():
            raise BadRecord(f"reference {index} is empty, expected a sentence; repair or leave out this test item")
    metric = BLEU(tokenize=TOKENIZERS[target])
    metric.corpus_score(list(hypotheses[:1]), [list(references[:1])])  # its signature tells the number of references
    result = {"n": len(references), "signature": str(metric.get_signature())}
    counted = statistics(references, hypotheses, target)  # the one pass: all that follows is of its sums
    if counted[:, 9].max() < 4:
        # Even the references themselves would score 0.
        return {"bleu": None, **result, "ci95": None, "reason": "no reference is as long as the 4 tokens BLEU needs"}
    return {"bleu": bleu_of(counted.sum(0)), **result, "ci95": bootstrap(counted, bleu_of)}


def _at_most_100(score: float) -> float:
    """Without the last digits of the exponential of a sum of logarithms."""
    return min(score, 100.0)


def statistics(references: Sequence[str], hypotheses: Sequence[str], target: str) -> np.ndarray:
    """Matches of n-grams 1..4, their possible number 1..4, length and reference length of each sentence, [N, 10].

    Corpus BLEU is a function of their sums, so resampling needs no second counting.
    """
    # effective_order changes the score of a sentence, which is not used here, and spares a warning about it.
    metric = BLEU(tokenize=TOKENIZERS[target], effective_order=True)
    scores = (metric.sentence_score(h, [r]) for r, h in zip(references, hypotheses, strict=True))
    return np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores])


def bleu_of(sums: np.ndarray) -> float:
    """BLEU 0..100 of summed statistics [10]; at most 100 in spite of rounding."""
    row = [round(value) for value in sums.tolist()]
    return _at_most_100(float(BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score))
