"""The bookkeeping of a demo folder: what is planned, what is finished, how long it took.

A piece of work that is finished leaves its weights and a record and is never done again. The steps of a stage are
fixed once, in plan.json; with the same plan, thread count and waveforms a stage gives the same weights bit for bit.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nexus.errors import BadConfig
from nexus.model.folder import load_weights
from nexus.model.omni import OmniModel
from nexus.processes import cores
from nexus.progress import MemoryWatch, Progress
from nexus.recipe import Recipe, StageConfig, code_digest
from nexus.results import hold, write_json
from nexus.train.loop import ALONE, Pace, bf16_is_faster, fit
from nexus.train.parallel import Ranks
from nexus.train.stage import freeze, frozen_digest

MAX_THREADS = 8  # more do not help models of this size


@dataclass
class Run:
    """One demo folder. `begun` is when this process began (time.perf_counter)."""

    recipe: Recipe
    out: Path
    minutes: float
    progress: Progress
    begun: float
    plan: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    earlier: float = 0.0  # seconds of earlier processes, up to their last finished piece of work
    memory: MemoryWatch | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        return {"recipe": self.recipe.fingerprint(), "minutes": self.minutes, "code": code_digest()}

    @property
    def elapsed(self) -> float:
        """Seconds of all processes so far."""
        return self.earlier + time.perf_counter() - self.begun

    @property
    def peak_gib(self) -> float:
        """Most memory that any process tree of this run has taken so far."""
        return max(self.plan.get("peak_gib", 0.0), self.memory.peak_gib if self.memory else 0.0)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder: begin anew, or continue what was begun there.

        Raises Busy when another process holds it, BadConfig when it belongs to another run or is no demo folder.
        """
        with hold(self.out):
            self._begin_or_continue()
            yield

    def _begin_or_continue(self) -> None:
        path = self.out / "plan.json"
        (self.out / "state").mkdir(exist_ok=True)
        if path.is_file():
            self.plan = json.loads(path.read_text(encoding="utf-8"))
            mine, theirs = self.identity, self.plan["identity"]
            differs = [key for key in mine if mine[key] != theirs.get(key)]
            if differs:
                said = ", ".join(f"{key} (there {theirs.get(key)}, now {mine[key]})" for key in differs)
                raise BadConfig(f"{self.out} holds another run; different: {said}; give another --out or remove it")
            self.earlier = self.plan["elapsed"]
        else:
            threads = min(cores(), MAX_THREADS)
            torch.set_num_threads(threads)
            self.plan = {
                "identity": self.identity,
                "threads": threads,
                "bf16": bf16_is_faster(),
                "steps": {},
                "elapsed": 0.0,
            }
            write_json(path, self.plan)
        torch.set_num_threads(self.plan["threads"])

    def note(self, **changes: Any) -> None:
        """Change plan.json, which two processes of one run may do at a time; steps are merged."""
        with open(self.out / ".plan", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.plan = json.loads((self.out / "plan.json").read_text(encoding="utf-8"))
            self.plan["steps"].update(changes.pop("steps", {}))
            self.plan.update(changes)
            write_json(self.out / "plan.json", self.plan)

    def has(self, name: str) -> bool:
        """Whether a piece of work is finished."""
        return (self.out / "state" / f"{name}.json").is_file()

    @contextmanager
    def clocked(self, name: str) -> Iterator[None]:
        """Count the block's wall and processor time under `name`."""
        wall, cpu = time.perf_counter(), cpu_seconds()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - wall
        self.cpu_seconds += cpu_seconds() - cpu

    def once(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of a piece of work: made now, or read when it is finished."""
        path = self.out / "state" / f"{name}.json"
        if self.has(name):
            record = json.loads(path.read_text(encoding="utf-8"))
        else:
            wall, cpu = time.perf_counter(), cpu_seconds()
            record = work()
            record["seconds"], record["cpu_seconds"] = time.perf_counter() - wall, cpu_seconds() - cpu
            write_json(path, record)
            self.note(elapsed=self.elapsed, peak_gib=self.peak_gib)
        self.seconds[name] = record["seconds"]
        self.cpu_seconds += record["cpu_seconds"]
        return record

    def train(
        self,
        model: OmniModel,
        config: StageConfig,
        losses: Callable[[int], dict[str, Tensor]],
        head: nn.Module | None = None,
        ranks: Ranks = ALONE,
    ) -> dict[str, Any]:
        """One stage: trained now, or its weights loaded when finished. Frozen parameters are checked bit for bit.

        Of several ranks the first keeps the books; the others train along and leave nothing.
        """
        weights = self.out / "state" / f"{config.name}.safetensors"

        def work() -> dict[str, Any]:
            parameters = freeze(model, config.trainable)
            own = {f"head.{name}": p for name, p in head.named_parameters()} if head else {}
            frozen = frozen_digest(model, config.trainable)
            budget = config.seconds * self.minutes / self.recipe.minutes
            pace = Pace(budget, config.min_steps, self.plan["steps"].get(config.name))

            def planned(steps: int) -> None:
                if ranks.rank == 0:
                    self.note(steps={config.name: steps})

            model.train()
            model.pack(True)
            if config.checkpointing:
                model.checkpoint(True)
            with self.progress.stage(config.name) as watch:
                curve = fit(
                    {**parameters, **own},
                    config.optim,
                    lambda step: losses(ranks.place(step)),
                    pace,
                    watch,
                    self.plan["bf16"],
                    planned,
                    ranks,
                )
            if config.checkpointing:
                model.checkpoint(False)
            model.pack(False)
            model.eval()
            assert frozen == frozen_digest(model, config.trainable), f"stage {config.name} changed frozen parameters"
            if ranks.rank == 0:
                heads = {k: p.detach().contiguous() for k, p in own.items()}
                save_file(_chosen(model, config.trainable) | heads, weights)
            return {
                "steps": pace.steps,
                "trainable": list(config.trainable),
                "parameters": count(parameters),
                "head_parameters": count(own),
                "curve": curve,
            }

        finished = self.has(config.name)
        record = self.once(config.name, work) if ranks.rank == 0 or finished else work()
        if finished:
            saved = load_file(weights)
            learned = {k: v for k, v in saved.items() if not k.startswith("head.")}
            load_weights(model, {**model.state_dict(), **learned}, str(weights))
            if head is not None:
                head.load_state_dict({k.removeprefix("head."): v for k, v in saved.items() if k.startswith("head.")})
        return record


def _chosen(model: nn.Module, globs: Sequence[str]) -> dict[str, Tensor]:
    """Weights and buffers a stage has trained."""
    return {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if any(fnmatchcase(name, glob) for glob in globs)
    }


def count(parameters: dict[str, nn.Parameter]) -> int:
    """Numbers in parameters."""
    return sum(parameter.numel() for parameter in parameters.values())


def cpu_seconds() -> float:
    """Processor time of this process and its finished children."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
