"""The regression gate: what a stage may cost. The same held-out items are measured before a stage and during or after
it; where a skill may have fallen by more than the recipe allows, training stops.

What is measured comes from outside as a callable: training knows no examination. A skill holds when the lower end of
the paired interval of its change is above what may be lost, so a few items alone never pass for proof.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from nexus.errors import BadConfig, NexusError
from nexus.model.omni import OmniModel
from nexus.recipe import StageConfig
from nexus.results import write_whole
from nexus.train.plan import CONTENTS
from nexus.train.stage import frozen_digest, trainable_names
from nexus.training import GateConfig

Scores = Mapping[
    str, Sequence[float]
]  # skill -> one score per held-out item, always of the same items; higher is better
Measure = Callable[[OmniModel], Scores]
SEED = 0  # of the bootstrap: the same scores give the same verdict
TOUCHED_BY = {  # what of a model each skill comes through besides the language model
    "vision": ("vision.*",),
    "hearing": ("hearing.*",),
    "speech": ("voice.*", "codec.*"),
    "text": (),
}
TAUGHT_BY = {"vision": ("picture", "film"), "hearing": ("sound",), "speech": ("speech",)}


class Regressed(NexusError):
    """A stage took more from a skill than the recipe allows, or changed what it freezes."""


@dataclass(frozen=True)
class Change:
    """How a skill has changed on the same items: means, their difference with its paired interval, what may be lost
    (None: measured, not gated)."""

    skill: str
    n: int
    before: float
    after: float
    change: float
    interval: tuple[float, float]
    max_drop: float | None

    @property
    def holds(self) -> bool:
        """Whether the loss is certainly no greater than allowed."""
        return self.max_drop is None or self.interval[0] >= -self.max_drop


def paired_change(
    skill: str, before: Sequence[float], after: Sequence[float], max_drop: float | None, config: GateConfig
) -> Change:
    """The change of a skill's mean from `before` to `after`, item by item.

    The interval is the bootstrap's over items (`resamples` draws); below its lower end lies 1 - `confidence`, above
    its upper end as much.
    """
    assert len(before) == len(after) > 0, (skill, len(before), len(after))
    differences = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    rng = np.random.default_rng(SEED)
    drawn = [differences[rng.integers(0, len(differences), len(differences))].mean() for _ in range(config.resamples)]
    low, high = np.quantile(drawn, (1 - config.confidence, config.confidence))
    return Change(
        skill,
        len(differences),
        float(np.mean(before)),
        float(np.mean(after)),
        float(differences.mean()),
        (float(low), float(high)),
        max_drop,
    )


class Gate:
    """One run's gate. `begin` before a stage's first step, `check` where `due` says so and after its last.

    What was measured before a stage is kept in `folder`, so that a resumed run compares with the beginning of the
    stage and not with where it was killed. Every rank measures the same items and keeps a book of its own, since the
    digest of weights in shards is that of its part.
    """

    def __init__(self, config: GateConfig, measure: Measure, folder: Path, fingerprint: str, rank: int = 0) -> None:
        self._config, self._measure, self._folder, self._rank = config, measure, folder, rank
        self._fingerprint = fingerprint  # of the held-out items
        self._stage: StageConfig | None = None
        self._book: dict[str, Any] = {}

    def begin(self, stage: StageConfig, model: OmniModel) -> None:
        """Measure before a stage, or find what was measured when it began.

        Raises BadConfig where the held-out items have none of a gated skill, or are others than at the beginning, and
        Regressed where a frozen part has changed since.
        """
        self._stage = stage
        path = self._path(stage)
        if path.is_file():
            self._book = json.loads(path.read_text(encoding="utf-8"))
            if self._book["held_out"] != self._fingerprint:
                raise BadConfig(
                    f"{path}: stage {stage.name} began with held-out items {self._book['held_out']}, now they are "
                    f"{self._fingerprint}; give the same file, or begin anew in another --out"
                )
            self._check_frozen(model)
            return
        scores = self._scores(model)
        absent = [skill for skill in self._config.max_drop if not scores.get(skill)]
        if absent:
            found = ", ".join(f"{skill} {len(items)}" for skill, items in scores.items() if items) or "nothing"
            raise BadConfig(
                f"gate.max_drop names {absent[0]}, but the held-out items measure {found}; add such rows, or leave "
                f"{absent[0]} out of gate.max_drop"
            )
        frozen = frozen_digest(model, stage.trainable)
        self._book = {"held_out": self._fingerprint, "frozen": frozen, "before": scores, "checks": []}
        self._keep()

    def due(self, step: int) -> bool:
        """Whether to check after `step` steps; the end of the stage always is."""
        every = self._config.every_steps
        return every is not None and step > 0 and step % every == 0

    def check(self, model: OmniModel, step: int) -> list[Change]:
        """Compare with the beginning of the stage. Raises Regressed naming skill, before, after, interval, what may be
        lost, the stage and the settings most likely at fault; what was found is in `folder` all the same."""
        assert self._stage is not None, "the gate has not begun"
        self._check_frozen(model)
        after = self._scores(model)
        changes = [
            paired_change(skill, before, after[skill], self._config.max_drop.get(skill), self._config)
            for skill, before in self._book["before"].items()
            if before
        ]
        self._book["checks"] = [kept for kept in self._book["checks"] if kept["step"] < step]
        self._book["checks"].append({"step": step, "changes": [asdict(change) for change in changes]})
        self._keep()
        lost = [change for change in changes if not change.holds]
        if lost:
            worst = min(lost, key=lambda change: change.interval[0] + (change.max_drop or 0.0))
            raise Regressed(_complaint(worst, self._stage, model, step, [c.skill for c in lost if c is not worst]))
        return changes

    def _scores(self, model: OmniModel) -> dict[str, list[float]]:
        training = model.training
        model.eval()
        try:
            scores = {skill: [float(score) for score in items] for skill, items in self._measure(model).items()}
        finally:
            model.train(training)
        wrong = [skill for skill, items in scores.items() if not np.isfinite(items).all()]
        if wrong:
            raise Regressed(
                f"the gate cannot measure {wrong[0]}: some item scores NaN or infinity, expected finite numbers; the "
                "model has diverged, lower optim.rate"
            )
        return scores

    def _check_frozen(self, model: OmniModel) -> None:
        assert self._stage is not None
        now = frozen_digest(model, self._stage.trainable)
        if now != self._book["frozen"]:
            trained = ", ".join(self._stage.trainable)
            raise Regressed(
                f"stage {self._stage.name} may train {trained} alone, but other parameters have changed: digest "
                f"{self._book['frozen'][:16]} before, {now[:16]} now; resume with the weights it began with"
            )

    def _path(self, stage: StageConfig) -> Path:
        return self._folder / (f"{stage.name}.json" if self._rank == 0 else f"{stage.name}.rank-{self._rank}.json")

    def _keep(self) -> None:
        assert self._stage is not None
        path = self._path(self._stage)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(self._book) + "\n")


def _complaint(worst: Change, stage: StageConfig, model: nn.Module, step: int, others: Sequence[str]) -> str:
    low, high = worst.interval
    assert worst.max_drop is not None
    said = (
        f"stage {stage.name}, step {step}: {worst.skill} went from {worst.before:.4g} to {worst.after:.4g} on "
        f"{worst.n} held-out items, a change of {worst.change:+.4g} (paired interval {low:+.4g} to {high:+.4g}); a "
        f"drop of {worst.max_drop:g} is allowed"
    )
    if others:
        said += f"; so did {', '.join(others)}"
    if worst.change >= -worst.max_drop:
        return f"{said}; so few items cannot tell: give the gate more (gate.n, a longer gate.held_out)"
    return f"{said}; most likely at fault: {'; '.join(suspects(worst.skill, stage, model))}"


def suspects(skill: str, stage: StageConfig, model: nn.Module) -> list[str]:
    """The settings of a stage that a fallen skill most likely comes from, the likeliest first.

    Tasks count for the skills of what their rows hold (`nexus.train.plan.CONTENTS`).
    """
    found = []
    taught = {content for task in stage.mixture for content in CONTENTS.get(task, ())}
    needs = TAUGHT_BY.get(skill, ())
    if skill == "text" and "text" not in stage.mixture:
        found.append("its mixture has no rows of plain text (stages.mixture, data.replay)")
    if needs and taught.isdisjoint(needs):
        found.append(f"its mixture has no rows with {' or '.join(needs)} (stages.mixture, data.replay)")
    trained = trainable_names(model, stage.trainable)
    globs = TOUCHED_BY.get(skill, ())
    touched = [name for name in trained if any(fnmatchcase(name, glob) for glob in globs)]
    if touched:
        parts = sorted({".".join(name.split(".")[:2]) for name in touched})
        found.append(f"it trains {', '.join(parts)} (stages.trainable)")
    if any(name.startswith("language.") for name in trained):
        found.append("it trains the language model (stages.trainable)")
    rates = ", ".join(f"{glob} x {factor:g}" for glob, factor in stage.optim.rates.items())
    found.append(f"optim.rate {stage.optim.rate:g}{f' ({rates})' if rates else ''} is too high")
    return found
