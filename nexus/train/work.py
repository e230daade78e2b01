"""One stage of a run: its model, where it goes on, its steps, and what it leaves."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch.distributed as dist
from torch import nn

from nexus.errors import NexusError
from nexus.model.folder import load_model
from nexus.model.omni import OmniModel
from nexus.recipe import Recipe, StageConfig
from nexus.train.checkpoint import Checkpoints, read_about, restore
from nexus.train.export import export, export_adapter
from nexus.train.journal import Journal
from nexus.train.loader import Batches, died, lost, ready
from nexus.train.loop import Done, Pace, Watch, descend
from nexus.train.lora import adapt
from nexus.train.modalities import Load, padding_shares, total
from nexus.train.parallel import Ranks
from nexus.train.sharding import Place, cast, compile_layers, in_one_piece, spread
from nexus.train.stage import freeze, frozen_digest, optimizers, trainable_names
from nexus.train.step import Steps
from nexus.train.voice import PREFIX, VoiceAlone, load_voice

Model = OmniModel | VoiceAlone
LORA_SEED = 0


@runtime_checkable
class Guard(Protocol):
    """What may stop a stage that costs too much (`nexus.train.gate.Gate`)."""

    def begin(self, stage: StageConfig, model: OmniModel) -> None: ...

    def due(self, step: int) -> bool: ...

    def check(self, model: OmniModel, step: int) -> Any: ...


@dataclass
class Work:
    """A stage that learns from `batches` on this rank, from the model folder `source`. `books` is the run's folder,
    `identity` what the numbers depend on."""

    recipe: Recipe
    stage: StageConfig
    source: Path
    books: Path
    batches: Batches
    gate: Guard | None
    ranks: Ranks
    place: Place
    identity: dict[str, Any]
    step: int = 0  # steps taken
    seconds: float = 0.0  # of them, over all processes that took part one after the other
    seen: Load = field(default_factory=Load)
    # Made by `prepare`.
    model: Model = field(init=False)
    called: nn.Module = field(init=False)
    trained: list[str] = field(init=False)
    parameters: dict[str, nn.Parameter] = field(init=False)
    movers: list[Any] = field(init=False)
    pace: Pace = field(init=False)
    checkpoints: Checkpoints = field(init=False)

    def prepare(self, compare: Callable[[dict[str, Any], dict[str, Any], Path], None]) -> None:
        """Load the model, freeze what the stage freezes, spread it over the ranks, and go on from the last checkpoint,
        of which `compare` judges whether it is of this run."""
        engine, stage = self.recipe.engine, self.stage
        self.model = _load(stage, self.source, self.gate)
        if engine.lora is None:
            self.trained = trainable_names(self.model, stage.trainable)
        else:
            self.trained = adapt(self.model, stage.trainable, engine.lora, LORA_SEED)
        freeze(self.model, self.trained)
        cast(self.model, self.place)
        self.model.train()
        if stage.checkpointing and isinstance(self.model, OmniModel):
            self.model.checkpoint(True)
        if isinstance(self.model, OmniModel):
            self.model.pack(engine.packing)
        if engine.compile:
            compile_layers(self.model)
        self.called = spread(self.model, self.place, self.ranks)
        chosen = set(self.trained)
        self.parameters = {name: p for name, p in self.model.named_parameters() if name in chosen}
        self.movers = optimizers(self.parameters, stage.optim)
        self.pace = Pace(stage.seconds, stage.min_steps, _length(stage, self.batches, engine.accumulation))
        self.checkpoints = Checkpoints(self.books / "checkpoints" / stage.name, engine.keep_last, self.ranks)
        self._go_on(compare)

    def _go_on(self, compare: Callable[[dict[str, Any], dict[str, Any], Path], None]) -> None:
        last = self.checkpoints.last()
        if last is None:
            return
        about = read_about(last)
        compare(about["identity"], self.identity, last)
        restore(last, self.parameters, self.movers, self.ranks)
        self.step, self.seconds, self.seen = about["step"], about["seconds"], Load(**about["seen"])
        if self.pace.steps is None:  # measured by the process that wrote it
            self.pace.steps = about["steps"]

    def train(self, watch: Watch) -> None:
        """The steps that are left. Raises NexusError in one line that says what is kept."""
        frozen = frozen_digest(self.model, self.trained)
        if self.gate is not None:
            with self._measured() as model:
                self.gate.begin(self.stage, model)
        with self._said_with_what_is_kept():
            self._descend(watch)
        if frozen != frozen_digest(self.model, self.trained):
            raise NexusError(
                f"stage {self.stage.name} changed frozen parameters: a fault of this program, please report it"
            )
        if self.gate is not None:
            with self._measured() as model:
                self.gate.check(model, self.step)

    def _descend(self, watch: Watch) -> None:
        engine, config = self.recipe.engine, self.model.config
        first, tokenizer = self.step * engine.accumulation, self.source / "tokenizer.json"
        stream = ready(self.batches, tokenizer, config, self.recipe.data.workers, first)
        alone = isinstance(self.model, VoiceAlone)
        steps = Steps(self.called, config, stream, engine.accumulation, self.place, self.ranks, self.parameters, alone)
        earlier_seen, earlier_seconds = self.seen, self.seconds
        journal = Journal(self.books, self.stage.name, self.recipe, self.step) if self.ranks.rank == 0 else None

        def note(done: Done) -> None:
            self.step = done.steps
            self.seen, self.seconds = total([earlier_seen, steps.seen]), earlier_seconds + done.seconds
            numbers = {name: float(value) for name, value in done.numbers.items()}
            watch.advance(1, loss=numbers["loss"])
            if journal is not None:
                journal.write(self.step, {**numbers, **self._pace_numbers(done, steps.seen)})
            if self.step != self.pace.steps:
                self._pause()

        def fixed(number: int) -> None:
            watch.total = number

        try:
            descend(
                self.parameters,
                self.movers,
                self.stage.optim,
                steps.gradients,
                self.pace,
                note,
                fixed,
                self.ranks,
                self.step,
            )
        finally:
            stream.close()
            if journal is not None:
                journal.close()

    def _pause(self) -> None:
        """Between two steps: the gate, then a checkpoint, where they are due."""
        if self.gate is not None and self.gate.due(self.step):
            with self._measured() as model:
                self.gate.check(model, self.step)
        if self.step % self.recipe.engine.checkpoint_every_steps == 0:
            about = {
                "stage": self.stage.name,
                "step": self.step,
                "steps": self.pace.steps,
                "seconds": self.seconds,
                "seen": asdict(self.seen),
                "identity": self.identity,
            }
            self.checkpoints.save(self.step, self.parameters, self.movers, about)

    def _pace_numbers(self, done: Done, seen: Load) -> dict[str, float]:
        return {
            "norm": float(done.norm),
            "rate": self.stage.optim.rate * done.factor,
            "seconds": self.seconds,
            "rows": self.seen.rows,
            "tokens": self.seen.tokens,
            "audio_frames": self.seen.audio_frames,
            "tokens_per_second": seen.tokens / done.seconds,
            **padding_shares(seen),
        }

    @contextmanager
    def _measured(self) -> Iterator[OmniModel]:
        assert isinstance(self.model, OmniModel), "a gate measures whole models"
        with in_one_piece(self.model):
            yield self.model
        self.model.train()

    @contextmanager
    def _said_with_what_is_kept(self) -> Iterator[None]:
        """Failures while steps are taken, in one line that ends with the checkpoint from which the run goes on."""
        try:
            yield
        except NexusError as error:
            raise type(error)(f"stage {self.stage.name}: {error}; {self._kept()}") from None
        except RuntimeError as error:
            if died(error):
                said = lost(error)
            elif self.ranks.world > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
                said = (
                    f"rank {self.ranks.rank} has lost the others: one of them has ended, and its own message says why"
                )
            else:
                raise
            raise NexusError(f"stage {self.stage.name}, step {self.step}: {said}; {self._kept()}") from None

    def _kept(self) -> str:
        last = self.checkpoints.last()
        if last is None:
            return "no checkpoint was written yet: the same command begins the stage anew"
        return f"{last} is whole: the same command goes on from there"

    def record(self) -> dict[str, Any]:
        """What the stage was, for `run.json` and the model card."""
        return {
            "trainable": list(self.stage.trainable),
            "parameters": sum(parameter.numel() for parameter in self.parameters.values()),
            "steps": self.step,
            "epochs": self.step * self.recipe.engine.accumulation / self.batches.batches_per_epoch,
            "seconds": self.seconds,
            **asdict(self.seen),
            **padding_shares(self.seen),
            "data": self.batches.fingerprint,
            "identity": self.identity,
        }

    def leave(self, folder: Path) -> None:
        """Write the model folder; all ranks must call."""
        note = {"recipe": self.recipe.name, "stage": self.stage.name, **self.record()}
        export(folder, self.source, self.model, self.trained, note, self.ranks)
        if self.recipe.engine.lora is not None:
            export_adapter(folder / "adapter", self.model, self.recipe.engine.lora.alpha, self.source, self.ranks)


def _load(stage: StageConfig, source: Path, gate: Guard | None) -> Model:
    """The model; the voice alone where nothing else is trained or measured."""
    if gate is None and all(glob.startswith(PREFIX) for glob in stage.trainable):
        return load_voice(source)
    return load_model(source)


def _length(stage: StageConfig, batches: Batches, accumulation: int) -> int | None:
    """Steps of a stage, None where they follow from its seconds."""
    if stage.epochs is not None:
        return math.ceil(stage.epochs * batches.batches_per_epoch / accumulation)
    return stage.steps
