"""A whole reply at full size on a GPU, with random weights: first sound, real-time factor, decoder steps, memory.

Random weights take the same time as trained ones; what is said means nothing. Replies are given their length in
tokens, and the voice may not end before its last token.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nexus.bench.race import Say, Settings, agreement
from nexus.errors import BadConfig
from nexus.model.omni import OmniModel
from nexus.model.voice.decoder import Decoder
from nexus.recipe import Recipe
from nexus.types import LETTERS, Batch

SPELLED = 4  # letters of every token: with the clock at 1.3 it is held for 6 frames, 0.28 s


@dataclass(frozen=True)
class Heat:
    """What is run: a recipe, rows at a time, tokens of prompt and reply, decoder steps."""

    recipe: str
    dtype: torch.dtype
    rows: tuple[int, ...]
    prompt_tokens: int
    reply_tokens: int
    steps: int
    max_seconds: float  # of sound per row: a voice with random weights need not end by itself


FULL = Heat("nexus-7b", torch.bfloat16, (1, 8, 32), 300, 32, 256, 9.0)
TINY = Heat("nexus-tiny", torch.float32, (1, 2), 8, 3, 4, 1.0)


def check() -> None:
    """Raises BadConfig where there is no CUDA device."""
    if not torch.cuda.is_available():
        raise BadConfig("the benchmark gpu needs a CUDA device and this machine has none; run decoder and hearing here")


def bench(heat: Heat, device: torch.device, say: Say) -> dict[str, Any]:
    """Replies and decoder steps for every number of rows; the result as JSON."""
    say(f"gpu: {heat.recipe} with random weights on {device}")
    model = _model(heat, device)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    cases = []
    for rows in heat.rows:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        _reply(model, heat, rows)  # the first call pays for kernels being chosen
        case: Settings = {"case": f"batch {rows}", **_reply(model, heat, rows), **_steps(model, heat, rows)}
        if device.type == "cuda":
            case["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        cases.append(case)
        say(
            f"batch {rows}: first sound after {case['first_sound_seconds']:.3f} s, real-time factor "
            f"{case['real_time_factor']:.3f}, decoder step {case['step_seconds'] * 1e3:.2f} ms"
        )
    settings = {"recipe": heat.recipe, "dtype": str(heat.dtype), "prompt_tokens": heat.prompt_tokens}
    settings |= {"reply_tokens": heat.reply_tokens, "weights_gib": weights / 2**30}
    return {"settings": settings, "cases": cases, "passed": all(case["agreement"]["agrees"] for case in cases)}


def _model(heat: Heat, device: torch.device) -> OmniModel:
    config = Recipe.load(heat.recipe).model
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(heat.dtype)
    try:
        with torch.device(device):
            model = OmniModel(config)
    finally:
        torch.set_default_dtype(before)
    return model.to(device).eval()


@torch.inference_mode()
def _reply(model: OmniModel, heat: Heat, rows: int) -> Settings:
    """Seconds until the first samples of the first row, and the whole reply's seconds per second of its sound.

    All rows are asked and answered together; each token is spoken as soon as it is written.
    """
    codec, vocabulary = model.config.codec, model.config.language.vocab_size
    assert codec is not None
    tokens = torch.randint(vocabulary, (rows, heat.prompt_tokens))
    batch = Batch(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool), ())
    letters = (torch.arange(LETTERS) < SPELLED).long()[None]
    speaker, samples, first = model.speaker(rows, heat.max_seconds), [0] * rows, 0.0
    begin = time.perf_counter()

    def speak() -> None:
        nonlocal first
        while speaker.step():
            for row in range(rows):
                samples[row] += len(speaker.sound(row).cpu())
            if samples[0] and not first:
                first = time.perf_counter() - begin

    for written in model.write(batch, [vocabulary], heat.reply_tokens, vocabulary):  # no row ever stops
        embeds = model.language.embed(written.tokens)
        for row in range(rows):
            speaker.say(row, written.post[row : row + 1], embeds[row : row + 1], letters)
        speak()
    for row in range(rows):
        speaker.end(row)
    speak()
    for row in range(rows):
        samples[row] += len(speaker.rest(row))
    taken, heard = time.perf_counter() - begin, samples[0] / codec.rate_hz
    return {
        "first_sound_seconds": first,
        "seconds": taken,
        "sound_seconds": heard,
        "real_time_factor": taken / heard,
    }


@torch.inference_mode()
def _steps(model: OmniModel, heat: Heat, rows: int) -> Settings:
    """Seconds of one decoder step: launched kernel by kernel, and replayed from a CUDA graph."""
    assert model.voice is not None
    decoder = model.voice.speech().decoder
    x = torch.randn(rows, decoder.config.width, device=decoder.device).to(decoder.dtype)
    at = torch.zeros(rows, dtype=torch.long, device=decoder.device)
    everyone, plain, fixed = list(range(rows)), decoder.memory(rows, heat.steps), decoder.memory(rows, heat.steps)
    expected = decoder.scores(x, plain, everyone, [0] * rows).clone()
    again = _graphed(decoder, x, fixed, at) if decoder.device.type == "cuda" else None
    scores = again() if again else decoder.scores_anywhere(x, fixed, at)
    said: Settings = {"agreement": agreement(scores, expected, 0.02)}
    said["step_seconds"] = _per_step(
        lambda step: decoder.scores(x, plain, everyone, [step] * rows), heat.steps, decoder
    )
    if again:

        def replay(step: int) -> Tensor:
            at.fill_(step)
            return again()

        said["graph_step_seconds"] = _per_step(replay, heat.steps, decoder)
    return said


def _graphed(decoder: Decoder, x: Tensor, memory: Tensor, at: Tensor) -> Callable[[], Tensor]:
    """A step recorded once: its inputs are `x` and `at` in place, its cost that of a full memory."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            decoder.scores_anywhere(x, memory, at)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = decoder.scores_anywhere(x, memory, at)

    def replay() -> Tensor:
        graph.replay()
        return scores

    return replay


def _per_step(step: Callable[[int], object], steps: int, decoder: Decoder) -> float:
    def wait() -> None:
        if decoder.device.type == "cuda":
            torch.cuda.synchronize()

    step(0)
    wait()
    begin = time.perf_counter()
    for number in range(steps):
        step(number)
    wait()
    return (time.perf_counter() - begin) / steps
