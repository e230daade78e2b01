"""Will it fit? Memory and work of each stage's step on N GPUs, before any GPU is bought.

Parameters, gradients and the optimiser's state are counted tensor by tensor; activations and floating-point operations
come from the real step, run on the meta device (`nexus.train.trace`). Memory is that of mixed precision under FSDP2
(`torch.distributed.fsdp.fully_shard`):

- trained parameters are kept in float32, frozen ones in their own type, cut along their first axis into N parts of
  which the first is the largest; so are gradients (float32) and the optimiser's state;
- each unit (a layer, or a module outside of layers that holds parameters) is gathered in the recipe's type while it
  works and the next one beside it; in the backward pass its whole gradients stand there until they are summed.

The sum of the peaks of these parts is an upper bound: not all of them come at the same moment.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from nexus.data.collate import sight, sound
from nexus.errors import BadConfig
from nexus.model.omni import OmniModel
from nexus.organs import ModelConfig
from nexus.recipe import OptimConfig, Recipe, StageConfig
from nexus.train.stage import freeze
from nexus.train.trace import Traced, trace
from nexus.types import IGNORE, LETTERS, Audio, Batch, Image, Script, Sight, Sound, Span, SpeechBatch, Video

GIB = 2**30
MAX_ROWS = 1024  # nobody asks for more rows of one GPU, and a step of many rows takes long to trace
Content = Literal["sound", "picture", "film", "speech"]
CONTENTS: dict[str, tuple[Content, ...]] = {
    "text": (),
    "picture": ("picture",),
    "film": ("film",),
    "avqa": ("picture", "sound"),
    **dict.fromkeys(("asr", "chat", "s2tt", "ser", "caption", "multiturn"), ("sound",)),
    **dict.fromkeys(("tts", "s2s"), ("speech",)),
}


@dataclass(frozen=True)
class Lengths:
    """What a row of each kind holds. Every conversation has prompt and answer; the answer alone carries loss. Speech
    is learned from prepared language states, so its row holds no prompt."""

    prompt_tokens: int = 64
    answer_tokens: int = 64
    sound_seconds: float = 10.0
    picture_side: int = 448  # pixels, before the vision tower's own resizing
    film_seconds: float = 8.0  # at the vision tower's frames per second
    speech_seconds: float = 10.0
    spoken_tokens: int = 35

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise BadConfig(f"assumed {name} is {value}, expected a number above 0")


def plan(recipe: Recipe, gpus: int, gpu_gib: float, lengths: Lengths | None = None) -> dict[str, Any]:
    """Memory per GPU in bytes, floating-point operations and the most rows that fit, for every stage of a recipe.

    `gpu_gib` is what PyTorch may use of a GPU (the driver keeps about 1 GiB for itself). Rows per GPU are the recipe's
    rows per step divided by `gpus`, at least one. Raises BadConfig for numbers that make no sense, a recipe without
    stages, and tasks without assumed lengths.
    """
    if gpus < 1:
        raise BadConfig(f"a plan for {gpus} GPUs: expected at least 1")
    if not (math.isfinite(gpu_gib) and gpu_gib > 0):
        raise BadConfig(f"a plan for GPUs of {gpu_gib:g} GiB: expected a number above 0, for example 80")
    if not recipe.stages:
        raise BadConfig(f"recipe {recipe.name} has no stages, so nothing is trained that could be planned; add stages")
    lengths = lengths or Lengths()
    model = meta_model(recipe)
    stages = [_plan_stage(model, recipe.dtype, stage, gpus, gpu_gib, lengths) for stage in recipe.stages]
    return {
        "gpus": gpus,
        "gpu_gib": float(gpu_gib),
        "dtype": recipe.dtype,
        "lengths": asdict(lengths),
        "stages": stages,
    }


def meta_model(recipe: Recipe) -> OmniModel:
    """The recipe's model without weights, in the types `nexus build` writes: a codec stays float32."""
    with torch.device("meta"):
        model = OmniModel(recipe.model)
    for name, parameter in model.named_parameters():
        if not name.startswith("codec."):
            parameter.data = parameter.data.to(getattr(torch, recipe.dtype))
    return model


def _plan_stage(
    model: OmniModel, dtype: str, stage: StageConfig, gpus: int, gpu_gib: float, lengths: Lengths
) -> dict[str, Any]:
    freeze(model, stage.trainable)
    rows_asked = max(1, sum(stage.mixture.values()) // gpus)

    @functools.cache
    def traced(rows: int, checkpointing: bool) -> Traced:
        try:
            return trace_step(model, share_rows(stage.mixture, rows), lengths, checkpointing)
        except BadConfig as error:
            raise BadConfig(f"stage {stage.name}: {error}") from None

    def total(rows: int, checkpointing: bool = stage.checkpointing, over: int = gpus) -> int:
        found = traced(rows, checkpointing)
        return (
            sum(kept_bytes(model, stage.optim, over).values())
            + gathered_bytes(model, found, over)
            + found.activation_bytes
        )

    budget = int(gpu_gib * GIB)
    found, needed = traced(rows_asked, stage.checkpointing), total(rows_asked)
    return {
        "name": stage.name,
        "rows_per_gpu": share_rows(stage.mixture, rows_asked),
        "checkpointing": stage.checkpointing,
        **kept_bytes(model, stage.optim, gpus),
        "gathered_bytes": gathered_bytes(model, found, gpus),
        "activation_bytes": found.activation_bytes,
        "total_bytes": needed,
        "free_bytes": budget - needed,
        "fits": needed <= budget,
        "max_rows_per_gpu": most_rows(total, budget, rows_asked),
        "flops_per_step": found.flops * gpus,
        "remedies": _remedies(total, stage.checkpointing, rows_asked, gpus, budget) if needed > budget else None,
    }


def _remedies(
    total: Callable[..., int], checkpointing: bool, rows: int, gpus: int, budget: int
) -> dict[str, int | bool | None]:
    """What would make a step fit that does not: checkpointing alone, and the fewest GPUs with as many rows on each
    (powers of two, up to 1024; None where not even those do)."""
    enough = (n for n in (2**k for k in range(11)) if n > gpus and total(rows, over=n) <= budget)
    return {
        "checkpointing": not checkpointing and total(rows, checkpointing=True) <= budget,
        "gpus": next(enough, None),
    }


def share_rows(mixture: Mapping[str, int], rows: int) -> dict[str, int]:
    """`rows` rows in the proportions of a mixture, by largest remainders; tasks without a row are left out."""
    whole = sum(mixture.values())
    exact = {task: count * rows / whole for task, count in mixture.items()}
    shared = {task: int(part) for task, part in exact.items()}
    by_remainder = sorted(exact, key=lambda task: shared[task] - exact[task])
    for task in by_remainder[: rows - sum(shared.values())]:
        shared[task] += 1
    return {task: count for task, count in shared.items() if count}


def most_rows(total: Callable[[int], int], budget: int, start: int) -> int:
    """The most rows with total(rows) <= budget, 0 if there is none, at most MAX_ROWS.

    `total` grows with rows, nearly in proportion: each try is where the line through the last two would end.
    """
    fits, over = 0, MAX_ROWS + 1
    tried: list[tuple[int, int]] = []
    guess = min(start, MAX_ROWS)
    while over - fits > 1:
        tried.append((guess, total(guess)))
        if tried[-1][1] <= budget:
            fits = guess
        else:
            over = guess
        guess *= 2
        if len(tried) > 1:
            (before, smaller), (rows, size) = tried[-2:]
            guess = math.floor(rows + (budget - size) * (rows - before) / (size - smaller))
        guess = min(max(guess, fits + 1), over - 1)
    return fits


def kept_bytes(model: nn.Module, optim: OptimConfig, gpus: int) -> dict[str, int]:
    """Bytes that the largest part of every tensor takes on a GPU all the time, by what it is."""
    sizes = {"parameter_bytes": 0, "gradient_bytes": 0, "optimizer_bytes": 0}
    for name, parameter in model.named_parameters():
        part = _part(parameter, gpus)
        if not parameter.requires_grad:
            sizes["parameter_bytes"] += part * parameter.element_size()
            continue
        sizes["parameter_bytes"] += 4 * part
        sizes["gradient_bytes"] += 4 * part
        muon = parameter.ndim == 2 and any(fnmatchcase(name, glob) for glob in optim.muon)
        sizes["optimizer_bytes"] += 4 * part if muon else 8 * part + 4  # one momentum; two moments and a step count
    for buffer in model.buffers():
        sizes["parameter_bytes"] += buffer.numel() * buffer.element_size()
    return sizes


def _part(parameter: Tensor, gpus: int) -> int:
    """Elements of the largest of `gpus` parts along the first axis."""
    if parameter.ndim == 0:
        return 1
    return -(-parameter.shape[0] // gpus) * math.prod(parameter.shape[1:])


def units_of(model: nn.Module) -> dict[str, nn.Module]:
    """What is gathered at a time: the members of outermost lists, and every other module that holds parameters."""

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if any(True for _ in module.parameters(recurse=False)):
            yield name, module
        for key, child in module.named_children():
            path = f"{name}.{key}" if name else key
            if isinstance(child, nn.ModuleList):
                yield from ((f"{path}.{number}", member) for number, member in enumerate(child))
            else:
                yield from walk(child, path)

    return dict(walk(model, ""))


def gathered_bytes(model: nn.Module, traced: Traced, gpus: int) -> int:
    """Bytes of whole parameters, and of whole gradients that wait to be summed, at the worst of two units in a row.

    One GPU holds everything anyway; it needs a second copy of what is trained where the work is not in float32.
    """
    if gpus == 1:
        narrow = [p for p in model.parameters() if p.requires_grad and p.element_size() < 4]
        return sum(p.numel() * p.element_size() for p in narrow)
    units = units_of(model)

    def weights(name: str) -> int:
        return sum(p.numel() * p.element_size() for p in units[name].parameters())

    def gradients(name: str) -> int:  # as they come, and a copy in float32 to be summed
        return sum(p.numel() * (p.element_size() + 4) for p in units[name].parameters() if p.requires_grad)

    order = [*traced.units, *traced.units[-1:]]
    pairs = itertools.pairwise(order)
    return max(
        (weights(a) + (weights(b) if a != b else 0) + max(gradients(a), gradients(b)) for a, b in pairs), default=0
    )


def trace_step(model: OmniModel, rows: Mapping[str, int], lengths: Lengths, checkpointing: bool) -> Traced:
    """One step of `rows` (task -> number) on a model on the meta device: conversations in one batch, speech in another;
    their losses are added."""
    batches = typical_batches(model.config, rows, lengths)
    model.checkpoint(checkpointing)

    def step() -> Tensor:
        losses = [model(batch) for batch in batches]
        loss = torch.stack([loss["speech" if "speech" in loss else "text"] for loss in losses]).sum()
        if not loss.requires_grad:
            given = ", ".join(f"{task} {count}" for task, count in rows.items())
            raise BadConfig(f"no trained parameter takes part in rows {given}; give the mixture tasks that need one")
        return loss

    return trace(model, step, units_of(model))


def typical_batches(config: ModelConfig, rows: Mapping[str, int], lengths: Lengths) -> list[Batch | SpeechBatch]:
    """Batches of the assumed lengths, zero everywhere. Features are one zero, expanded: they take no memory."""
    for task in rows:
        if task not in CONTENTS:
            raise BadConfig(f"task {task!r} has no assumed lengths to plan with; expected one of {', '.join(CONTENTS)}")
    kinds = [CONTENTS[task] for task, count in rows.items() for _ in range(count)]
    talks = [kind for kind in kinds if kind != ("speech",)]
    batches: list[Batch | SpeechBatch] = []
    if talks:
        batches.append(_conversations(config, talks, lengths))
    if len(talks) < len(kinds):
        batches.append(_speech(config, len(kinds) - len(talks), lengths))
    return batches


def _conversations(config: ModelConfig, rows: Sequence[tuple[Content, ...]], lengths: Lengths) -> Batch:
    media = {kind: _medium(config, kind, lengths) for kinds in rows for kind in kinds}
    spans: list[Span] = []
    items = {"audio": 0, "sight": 0}
    words = lengths.prompt_tokens + lengths.answer_tokens
    sizes = []
    for row, kinds in enumerate(rows):
        start = 2
        for kind in kinds:
            span = media[kind][0]
            sense = "audio" if span.kind == "audio" else "sight"
            spans.append(Span(span.kind, row, start, span.length, items[sense], span.grid))
            items[sense] += 1
            start += span.length
        sizes.append(words + start - 2)
    column, ends = torch.arange(max(sizes)), torch.tensor(sizes)[:, None]
    mask = column < ends
    labels = torch.full(mask.shape, IGNORE).masked_fill(mask & (column >= ends - lengths.answer_tokens), 0)
    return Batch(
        torch.zeros(mask.shape, dtype=torch.long),
        labels,
        mask,
        spans,
        _sounds([media[kind][1] for kinds in rows for kind in kinds]),
        _sights([media[kind][2] for kinds in rows for kind in kinds]),
    )


def _medium(config: ModelConfig, kind: Content, lengths: Lengths) -> tuple[Span, Sound | None, Sight | None]:
    """One item as the loader makes it, and the span it takes."""
    if kind == "sound":
        if config.hearing is None:
            raise BadConfig("the plan has rows with sound, but the recipe has no hearing; leave such tasks out")
        samples = round(lengths.sound_seconds * 16_000)
        heard = sound([Audio(samples=np.zeros(samples, np.float32), rate_hz=16_000)], config.hearing)
        return Span("audio", 0, 0, config.hearing.tokens_for(samples), 0), heard, None
    if config.vision is None:
        raise BadConfig(f"the plan has rows with a {kind}, but the recipe has no vision; leave such tasks out")
    frames = max(1, min(config.vision.max_frames, round(lengths.film_seconds * config.vision.frames_per_second)))
    shape = (frames if kind == "film" else 1, lengths.picture_side, lengths.picture_side, 3)
    pixels = np.zeros(shape, np.uint8)
    item = Image(pixels=pixels[0]) if kind == "picture" else Video(frames=pixels, fps=1.0)
    grid = config.vision.grid_for(*shape[:3])
    span = Span("image" if kind == "picture" else "video", 0, 0, config.vision.tokens_for(grid), 0, grid)
    return span, None, sight([item], config.vision)


def _sounds(items: list[Sound | None]) -> Sound | None:
    heard = [item for item in items if item is not None]
    if not heard:
        return None
    mel, windows = heard[0].mel, [count for item in heard for count in item.windows]
    return Sound(_zeros(sum(windows), *mel.shape[1:]), torch.cat([item.lengths for item in heard]), windows)


def _sights(items: list[Sight | None]) -> Sight | None:
    seen = [item for item in items if item is not None]
    if not seen:
        return None
    patches = sum(len(item.rows) for item in seen)
    return Sight(_zeros(patches, seen[0].rows.shape[1]), torch.cat([item.grids for item in seen]))


def _speech(config: ModelConfig, rows: int, lengths: Lengths) -> SpeechBatch:
    if config.voice is None or config.codec is None:
        raise BadConfig("the plan has rows of speech, but the recipe has no voice; leave tts and s2s out")
    frames = math.ceil(lengths.speech_seconds * config.codec.frame_rate_hz)
    states = _zeros(rows, lengths.spoken_tokens, config.language.width)
    letters = (torch.arange(LETTERS) < 4).long().expand(rows, lengths.spoken_tokens, -1)
    script = Script(states, states, letters, torch.full((rows,), lengths.spoken_tokens))
    codes = torch.zeros(rows, config.voice.books, frames, dtype=torch.long)
    return SpeechBatch(script, codes, torch.full((rows,), frames))


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(()).expand(shape)
