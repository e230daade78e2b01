"""The open points of the paper, decided by measurement: which language state a frame is given, and how state and codes
are averaged (section 3.1). Every variant trains the voice of a finished demo anew, with the same steps, rows and start
values, on the demo's own language states, and reads the held-out sentences aloud.

This takes about two minutes for each variant and seed. What was measured is kept, so a run that was stopped goes on.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nexus.bench.race import Say, Settings
from nexus.data.chat import task_turns
from nexus.data.prepared import Line, speech_batch
from nexus.demo import stages
from nexus.demo.demo import reopened
from nexus.demo.evaluate import MAX_SECONDS, MAX_TOKENS, Exam
from nexus.demo.lab import Lab
from nexus.eval.scores import word_error_rate
from nexus.model.omni import OmniModel
from nexus.recipe import StageConfig
from nexus.respond import OmniResponder, load
from nexus.train.loop import Pace, fit
from nexus.train.parallel import Ranks
from nexus.train.stage import freeze

VARIANTS: dict[str, Settings] = {
    "clock, mean9, post, state+embedding": {},
    "conditioning: hold": {"conditioning": "hold"},
    "conditioning: last": {"conditioning": "last"},
    "fusion: half": {"fusion": "half"},
    "states: pre": {"states": "pre"},
    "source: state": {"source": "state"},
    "spelling": {"spelling": True},
}
# Without `spelling`, which is ours and goes with the clock alone: first the paper's points, then what is added to them.
DEFAULTS = {
    "conditioning": "clock",
    "fusion": "mean9",
    "states": "post",
    "source": "state+embedding",
    "spelling": False,
}
HELD_OUT = 40  # every so many prepared lines one is left out of training, for the loss


@dataclass(frozen=True)
class Trial:
    """How much each variant learns."""

    steps: int
    rows: dict[str, int]
    seeds: Sequence[int]


FULL = Trial(600, {"tts": 7, "s2s": 3}, range(3))
TINY = Trial(2, {"tts": 2, "s2s": 1}, range(1))


class _Silent:
    total: int | None = None

    def advance(self, n: int = 1, **values: float) -> None:
        """Nothing: a line a variant is enough."""


def bench(trial: Trial, demo: Path, kept: Path, say: Say) -> dict[str, Any]:
    """Every variant and seed, and their means; `kept` is a file of finished rows."""
    home = reopened(demo)
    learned = load(demo / "model").model.state_dict()
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    done = {(row["variant"], row["seed"], row["steps"]) for row in rows}
    lines: dict[str, list[Line]] = {}
    for seed in trial.seeds:
        for name, changes in VARIANTS.items():
            if (name, seed, trial.steps) in done:
                continue
            row = {
                "variant": name,
                "seed": seed,
                "steps": trial.steps,
                **_try(home, learned, changes, trial, seed, lines),
            }
            rows.append(row)
            with kept.open("a") as file:
                file.write(json.dumps(row) + "\n")
            say(f"{name}, seed {seed}: word error rate {row['wer']:.3f}, held-out loss {row['held_out_loss']:.3f}")
    return {"trial": {"steps": trial.steps, "rows": trial.rows}, "rows": rows, "variants": _means(rows)}


def _try(
    home: Lab, learned: dict[str, Any], changes: Settings, trial: Trial, seed: int, lines: dict[str, list[Line]]
) -> dict[str, Any]:
    lab = _with_voice(home, {**DEFAULTS, **changes}, learned, seed)
    config = lab.recipe.stage("speak").model_copy(update={"mixture": trial.rows})
    assert lab.recipe.model.voice is not None
    states = lab.recipe.model.voice.states
    if states not in lines:
        lines[states] = stages.prepare_lines(lab, config, True, Ranks(), lambda n: None)
    begun = time.perf_counter()
    _learn(lab, config, [line for i, line in enumerate(lines[states]) if i % HELD_OUT], trial.steps, seed)
    spent = time.perf_counter() - begun
    exam, responder = Exam(lab, 1), OmniResponder(lab.model, lab.tokenizer)
    asks = [task_turns("tts", text=text)[:1] for text in exam.recited]
    replies = responder.answer_many(asks, True, MAX_TOKENS, MAX_SECONDS)
    score = word_error_rate(exam.recited, exam.transcribe(exam.sounds(replies))[0])
    return {
        "train_seconds": spent,
        "held_out_loss": _loss(lab, lines[states][::HELD_OUT]),
        "wer": score["wer"],
        "ci95": score["ci95"],
        "n": len(exam.recited),
    }


def _with_voice(home: Lab, changes: Settings, learned: dict[str, Any], seed: int) -> Lab:
    """The demo's trained model with an untrained voice of other settings."""
    assert home.recipe.model.voice is not None
    voice = home.recipe.model.voice.model_copy(update=changes)
    recipe = home.recipe.model_copy(update={"model": home.recipe.model.model_copy(update={"voice": voice})})
    torch.manual_seed(1000 + seed)
    model = OmniModel(recipe.model).eval()
    fresh = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("voice.")}
    model.load_state_dict({**{name: learned[name] for name in model.state_dict() if name not in fresh}, **fresh})
    return Lab(recipe, home.world, home.plan, home.waves, home.tokenizer, model)


def _learn(lab: Lab, config: StageConfig, lines: Sequence[Line], steps: int, seed: int) -> None:
    losses = stages.speak_losses(lab, config, lines)
    lab.model.train()
    first = seed * 100_000  # other rows for another seed
    fit(
        freeze(lab.model, config.trainable),
        config.optim,
        lambda step: losses(first + step),
        Pace(0.0, 0, steps),
        _Silent(),
        bf16=True,
    )
    lab.model.eval()


@torch.no_grad()
def _loss(lab: Lab, lines: Sequence[Line], rows: int = 16) -> float:
    """Mean loss of lines that were not trained on, each batch by its rows."""
    total = 0.0
    for start in range(0, len(lines), rows):
        some = lines[start : start + rows]
        with torch.autocast("cpu", torch.bfloat16):
            total += len(some) * float(lab.model(speech_batch(some))["speech"])
    return total / len(lines)


def _means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, lowest and highest of the seeds of every variant."""
    found = []
    for name in VARIANTS:
        some = [row for row in rows if row["variant"] == name]
        rates, losses = [row["wer"] for row in some], [row["held_out_loss"] for row in some]
        found.append(
            {
                "variant": name,
                "seeds": len(some),
                "wer": statistics.mean(rates),
                "wer_range": [min(rates), max(rates)],
                "held_out_loss": statistics.mean(losses),
                "loss_range": [min(losses), max(losses)],
            }
        )
    return found
