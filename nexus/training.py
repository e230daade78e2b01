"""The sections of a recipe that concern training on a user's data: which data, which engine, which gate.

Strict and frozen like every section, and readable without torch. The stages themselves stand in `nexus.recipe`.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nexus.organs import Count, Natural, Positive, Share, Strict

Skill = Literal["text", "vision", "hearing", "speech"]
MAX_DROP: dict[Skill, float] = {"text": 0.03, "vision": 0.03, "speech": 0.03}
Text = Annotated[str, Field(min_length=1)]


class SourceConfig(Strict):
    """One JSONL file among several: `weight` is its share of the rows drawn, `limit` the most rows taken of it,
    `stages` those that learn from it (none named: all)."""

    path: Text
    weight: Positive = 1.0
    limit: Count | None = None
    stages: tuple[str, ...] = ()


class DataConfig(Strict):
    """Which rows training sees, and how many of them lie in one batch of one rank."""

    train: Text | tuple[SourceConfig, ...] = ()  # a JSONL file, or several with weights
    held_out: Text | None = None  # a JSONL file that is measured and never learned
    root: Text | None = None  # a folder of recordings named {digit}_{speaker}_{index}.wav
    holdout: tuple[str, ...] = ()  # speakers left out of `root`
    noise: Text | None = None  # folder of real noises and rooms, to vary `root` with
    replay: Share = 0.0  # share of rows from the data the initial model was made of
    tokens_per_batch: Count = 4096  # language positions with padding, per rank and micro-batch
    audio_seconds_per_batch: Positive = 120.0
    workers: Natural = 0  # processes that prepare batches ahead; 0: the training process itself
    prepared: Text | None = None  # folder of `nexus prepare`, for stages that train the voice


class LoraConfig(Strict):
    """Low-rank adapters (Hu et al. 2021): of what a stage names as trainable, the linear layers in `targets` get
    adapters, `whole` is trained as it is, and the rest stays as it was.

    The adapters are merged into the model that is left, and are written beside it in PEFT's layout.
    """

    rank: Count = 16
    alpha: Positive = 32.0
    targets: tuple[str, ...] = ("language.backbone.layers.*",)  # globs over names of linear layers
    whole: tuple[str, ...] = ("hearing.*", "vision.*", "voice.*")  # globs over parameter names


class EngineConfig(Strict):
    """How training runs. None of it says what is learned, but much of it decides the last bits of the result."""

    # auto: fsdp on several GPUs, ddp in several processes without, none in one process
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    # of the products; weights that are trained, their gradients and the optimiser's state are float32
    dtype: Literal["float32", "bfloat16"] = "float32"
    rate_factor: Positive = 1.0  # on the rates of all stages: less where a trained model goes on
    accumulation: Count = 1  # micro-batches per rank and step
    compile: bool = False  # torch.compile of every layer
    packing: bool = True  # rows of a batch are laid end to end, so that no layer computes padding
    checkpoint_every_steps: Count = 500
    keep_last: Count = 2  # checkpoints
    lora: LoraConfig | None = None
    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    threads: Count | None = None  # per process; None: what the cores allow


class GateConfig(Strict):
    """What a stage may cost: a skill whose paired lower bound fell by more than `max_drop` stops the run."""

    held_out: Text | None = None  # a JSONL file; None: `data.held_out`
    n: Count = 200  # items measured, at most
    max_drop: dict[Skill, float] = Field(default_factory=lambda: dict(MAX_DROP))
    score: Literal["exact", "likelihood"] = "exact"  # of what is written: right or wrong, or nats per token
    every_steps: Count | None = None  # None: at the end of every stage
    resamples: Count = 1000  # of the bootstrap
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95

    @model_validator(mode="after")
    def _fits(self) -> "GateConfig":
        negative = {skill: drop for skill, drop in self.max_drop.items() if drop < 0}
        if negative:
            raise ValueError(f"max_drop must be 0 or more, given {negative}")
        return self
