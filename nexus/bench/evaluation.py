"""What evaluation costs: answers in batches against one by one, scores with intervals against the bare libraries."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer
import sacrebleu

from nexus.bench.race import Say, race, ratio, side, threads, verdict
from nexus.demo.demo import reopened
from nexus.eval.responders import responder_of
from nexus.eval.scores import word_error_rate
from nexus.eval.suites.translation import bleu
from nexus.types import Sample, Turn


@dataclass(frozen=True)
class Load:
    """How much is asked and scored."""

    questions: int
    rows: int
    hypotheses: int
    repeats: int


FULL = Load(questions=160, rows=16, hypotheses=10_000, repeats=3)
TINY = Load(questions=4, rows=2, hypotheses=40, repeats=2)


def bench(load: Load, demo: Path, say: Say) -> dict[str, Any]:
    """Spoken questions of a finished demo to its model, and error rates and BLEU of made-up hypotheses; one thread."""
    with threads(1):
        cases = [_batches(load, demo), *_scores(load)]
    for case in cases:
        say(verdict(case))
    return {"cases": cases}


def _batches(load: Load, demo: Path) -> dict[str, Any]:
    waves = reopened(demo).waves["test_questions"]
    count = min(load.questions, len(waves))
    samples = [Sample(str(i), "", (Turn("user", (waves[i],)),)) for i in range(count)]
    samples.sort(key=lambda sample: sample.turns[0].parts[0].seconds)  # type: ignore[union-attr] # as `nexus eval` does
    one = responder_of(str(demo / "model"), rows=1)
    many = responder_of(str(demo / "model"), rows=load.rows)

    def together() -> None:
        for start in range(0, count, load.rows):
            many.answer(samples[start : start + load.rows], speak=False)

    def alone() -> None:
        for sample in samples:
            one.answer([sample], speak=False)

    return _case(f"{count} spoken questions, {load.rows} at a time", "one by one", together, alone, 3.0, load.repeats)


def _scores(load: Load) -> list[dict[str, Any]]:
    rng = random.Random(0)
    words = [f"word{n}" for n in range(400)]
    wanted = [" ".join(rng.choices(words, k=rng.randint(3, 15))) for _ in range(load.hypotheses)]
    given = [" ".join(rng.choice(words) if rng.random() < 0.15 else word for word in text.split()) for text in wanted]
    return [
        _case(
            f"word error rate of {load.hypotheses:,} with interval",
            "jiwer.wer",
            lambda: word_error_rate(wanted, given),
            lambda: jiwer.wer(wanted, given),
            0.5,
            load.repeats,
        ),
        _case(
            f"BLEU of {load.hypotheses:,} with interval",
            "sacrebleu.corpus_bleu",
            lambda: bleu(wanted, given, "en"),
            lambda: sacrebleu.corpus_bleu(given, [wanted]),
            0.5,
            load.repeats,
        ),
    ]


def _case(
    name: str, peer: str, ours: Callable[[], object], theirs: Callable[[], object], bar: float, repeats: int
) -> dict[str, Any]:
    taken = race({"ours": ours, "peer": theirs}, repeats)
    return {
        "case": f"{name} against {peer}",
        **ratio(taken["ours"], taken["peer"], bar),
        "ours": side({}, taken["ours"]),
        "peer": side({"what": peer}, taken["peer"]),
    }
