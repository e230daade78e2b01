"""`nexus train`: the stages of a recipe in order, from a model folder to a model folder, in one process or in many.

A run leaves in its folder: `model/`, `run.json`, one `<stage>.steps.jsonl` per stage, events for displays, adapters,
and while it lasts `checkpoints/` and `stages/`. The same command goes on where a killed run stopped. What its numbers
depend on is written into every checkpoint: while it is the same, the steps that follow are those that would have
followed, bit for bit on a CPU.
"""

import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from nexus.errors import BadConfig, NexusError
from nexus.model.folder import read_config, weight_files
from nexus.model.omni import OmniModel
from nexus.progress import Progress
from nexus.recipe import Recipe, StageConfig, code_digest, fingerprint
from nexus.results import hold, write_json
from nexus.train.export import write_card
from nexus.train.loader import Batches
from nexus.train.parallel import Ranks
from nexus.train.sharding import Place, threads
from nexus.train.stage import trainable_names
from nexus.train.work import Guard, Work

Feed = Callable[[StageConfig, Ranks], Batches]  # what this rank learns from in a stage
VERSIONED = ("torch", "transformers", "tokenizers", "numpy")
# Of the engine's settings, those on which no number depends.
FREE = {"checkpoint_every_steps", "keep_last", "log", "parallel", "threads"}


@dataclass(frozen=True)
class _Run:
    """What all stages of a run share."""

    recipe: Recipe
    stages: tuple[StageConfig, ...]
    init: Path
    out: Path
    allow_inexact: bool
    progress: Progress
    ranks: Ranks

    def compare(self, there: dict[str, Any], now: dict[str, Any], where: Path) -> None:
        """Raises BadConfig naming what differs, unless the user allows it; then it is said aloud."""
        differs = [key for key in now if there.get(key) != now[key]]
        if not differs:
            return
        said = ", ".join(f"{key} (there {there.get(key)}, now {now[key]})" for key in differs)
        if not self.allow_inexact:
            raise BadConfig(
                f"{where} was begun with another {said}; give the same, another --out, or --allow-inexact for numbers "
                "other than those of an unbroken run"
            )
        self.progress.say(f"going on inexactly: {said}")

    def agreed(self, work: Callable[[], None]) -> None:
        """Work of the first rank alone, whose mistakes are raised on every rank."""
        error: NexusError | None = None
        if self.ranks.rank == 0:
            try:
                work()
            except NexusError as mistake:
                error = mistake
            except OSError as refused:
                error = NexusError(f"{self.out}: the machine refused: {refused}")
        said = self.ranks.hear(str(error) if error else "")
        if said:
            raise error or NexusError(said)


def train(
    recipe: Recipe,
    init: Path,
    out: Path,
    feed: Feed,
    *,
    stages: Sequence[str] | None = None,
    gate: Callable[[Ranks], Guard] | None = None,
    allow_inexact: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the recipe's stages (or those named) on the model folder `init`; returns what stands in `out`/run.json.

    Every process that torchrun starts calls this alike; one process alone needs no torchrun. `feed` gives each rank its
    batches of a stage, `gate` makes the guard once the folder is held. Raises BadConfig and BadCheckpoint for what does
    not fit, BadRecord and BadMedia for rows, Busy for a folder in use, NexusError where a step, a checkpoint or another
    process fails; what was whole stays so.
    """
    named = recipe.stages if stages is None else [recipe.stage(name) for name in stages]
    chosen = tuple(_paced(stage, recipe.engine.rate_factor) for stage in named)
    if not chosen:
        raise BadConfig(f"recipe {recipe.name} has no stages to train; give it some, or name another recipe")
    ranks = Ranks.launched()
    place = Place.choose(recipe.engine, ranks)
    torch.set_num_threads(threads(recipe.engine))
    shown = progress if progress is not None and ranks.rank == 0 else Progress(io.StringIO())
    run = _Run(recipe, chosen, init, out, allow_inexact, shown, ranks)
    with _held(run):
        run.agreed(lambda: _check(run))
        identity = json.loads(ranks.hear(json.dumps(_identity(run, place) if ranks.rank == 0 else None)))
        run.agreed(lambda: _begin_or_continue(run, identity))
        if not (out / "run.json").is_file():
            guard = None if gate is None else gate(ranks)
            source = init
            for stage in chosen:
                folder = out / "stages" / stage.name
                if not folder.is_dir():
                    batches = feed(stage, ranks)
                    known = {**identity, "data": batches.fingerprint}
                    _learn(run, Work(recipe, stage, source, out, batches, guard, ranks, place, known), folder)
                source = folder
            run.agreed(lambda: _finish(run, identity))
        ranks.leave()
    finished: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))
    return finished


def _paced(stage: StageConfig, factor: float) -> StageConfig:
    return stage.model_copy(update={"optim": stage.optim.model_copy(update={"rate": stage.optim.rate * factor})})


def _learn(run: _Run, work: Work, folder: Path) -> None:
    """One stage, from where it stands to its model folder, which appears whole."""
    work.prepare(run.compare)
    name = work.stage.name
    try:
        with run.progress.stage(name, work.pace.steps, done=work.step) as watch:
            work.train(watch)
    except KeyboardInterrupt:
        run.progress.say(f"{name}: stopped at step {work.step}; the same command goes on from the last checkpoint")
        raise
    part = folder.with_name(f"{name}.part")
    work.leave(part)

    def settle() -> None:
        write_json(part / "stage.json", work.record())
        os.replace(part, folder)
        shutil.rmtree(run.out / "checkpoints" / name, ignore_errors=True)

    run.agreed(settle)


def _check(run: _Run) -> None:
    """Refuse, before any step, what would fail behind hours."""
    config, _ = read_config(run.init)
    own, recipe = config.model_dump(mode="json"), run.recipe
    sections = [name for name, section in recipe.model.model_dump(mode="json").items() if own[name] != section]
    if sections:
        run.progress.say(f"sizes are those of {run.init}; recipe {recipe.name} has others for {', '.join(sections)}")
    with torch.device("meta"):
        model = OmniModel(config)
    for stage in run.stages:
        trainable_names(model, stage.trainable)
        if stage.steps is None and stage.epochs is None and not stage.seconds:
            raise BadConfig(
                f"recipe {recipe.name}: stage {stage.name} does not say how long it takes; --set "
                f"stages.{stage.name}.epochs=1, or steps, or seconds"
            )
        if stage.auxiliary:
            run.progress.say(f"{stage.name}: without the demo's auxiliary losses ({', '.join(stage.auxiliary)})")


def _identity(run: _Run, place: Place) -> dict[str, Any]:
    """What the numbers of a run depend on, by name, except its data."""
    engine = run.recipe.engine.model_dump(mode="json", exclude=FREE)
    return {
        "recipe": fingerprint([stage.model_dump(mode="json") for stage in run.stages]),
        "model": _digest(run.init),
        "code": code_digest(),
        "world": run.ranks.world,
        "threads": torch.get_num_threads(),
        "parallel": place.kind,
        "device": place.device.type,
        "torch": torch.__version__,
        **engine,
    }


def _digest(folder: Path) -> str:
    """Sixteen hex digits over a model folder's configuration and weights, wherever it lies."""
    digest = hashlib.sha256()
    for path in (folder / "config.json", folder / "tokenizer.json", *weight_files(folder)):
        if path.is_file():
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


@contextmanager
def _held(run: _Run) -> Iterator[None]:
    """Hold the result folder while the block runs, one run at a time; the first rank holds it for all.

    Raises Busy when another run holds it, BadConfig when it holds something else or cannot be written.
    """
    lock: TextIO | None = None

    def take() -> None:
        nonlocal lock
        lock = hold(run.out)

    try:
        run.agreed(take)
        yield
    finally:
        if lock is not None:
            lock.close()


def _begin_or_continue(run: _Run, identity: dict[str, Any]) -> None:
    path = run.out / "plan.json"
    if path.is_file():
        run.compare(json.loads(path.read_text(encoding="utf-8"))["identity"], identity, run.out)
    (run.out / "stages").mkdir(exist_ok=True)
    write_json(path, {"identity": identity, "recipe": run.recipe.model_dump(mode="json")})


def _finish(run: _Run, identity: dict[str, Any]) -> None:
    """`model/`, adapters, and `run.json`, which is written last."""
    out, records = run.out, {}
    for stage in run.stages:
        folder = out / "stages" / stage.name
        records[stage.name] = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        if (folder / "adapter").is_dir():
            shutil.copytree(folder / "adapter", out / "adapters" / stage.name, dirs_exist_ok=True)
    last, model = out / "stages" / run.stages[-1].name, out / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(last, model, ignore=shutil.ignore_patterns("adapter", "stage.json"), copy_function=_linked)
    write_card(model, run.recipe, run.init, records)
    write_json(
        out / "run.json",
        {
            "schema": 1,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "recipe": run.recipe.model_dump(mode="json"),
            "init": str(run.init),
            "identity": identity,
            "stages": records,
            "machine": {"platform": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()},
            "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
        },
    )
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    shutil.rmtree(out / "stages")


def _linked(source: str, target: str) -> str:
    """A second name for a file instead of a second copy of its gigabytes."""
    os.link(source, target)
    return target
