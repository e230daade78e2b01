"""The training loop: one function, top to bottom, for every stage. It knows neither data nor models."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nexus.errors import NexusError
from nexus.processes import give_memory_back
from nexus.recipe import OptimConfig
from nexus.train.parallel import Ranks, whole
from nexus.train.stage import optimizers

ALONE = Ranks()
HEAP_STEPS = 50  # holes in the heap are given back before a stage and after so many: never while its speed is measured
WARM_STEPS = 5  # of a stage, whose time says nothing
PROBE_STEPS = 25  # the speed of a stage is measured anew over so many
PROBE_SHARE = 0.2  # of its seconds, after which its steps are fixed: what runs beside it at first may be another load


@runtime_checkable
class Watch(Protocol):
    """What the loop tells a progress display."""

    total: int | None

    def advance(self, n: int = 1, **values: float) -> None: ...


@dataclass
class Pace:
    """How many steps a stage takes: given, or measured from a budget in seconds."""

    seconds: float
    min_steps: int
    steps: int | None = None

    def decide(self, taken: int, more: int, decay_from: float) -> int:
        """How many steps there will be, when `taken` were taken, all before the rate decays, and there is time for so
        many `more`."""
        at_least = math.ceil(taken / decay_from) if taken > PROBE_STEPS and decay_from > 0 else PROBE_STEPS + 1
        return max(self.min_steps, at_least, taken + more)


def rate_factor(step: int, steps: int | None, optim: OptimConfig) -> float:
    """Learning-rate factor: warm-up, constant, then linear to final_factor from decay_from of the steps.

    The steps on which a stage's speed is measured do not depend on the total: it is not known yet, and fixed such that
    none of them would have been of the decay.
    """
    if step < optim.warmup_steps or steps is None:
        return min(1.0, (step + 1) / max(1, optim.warmup_steps))
    begin = max(optim.warmup_steps, PROBE_STEPS, optim.decay_from * steps)
    if step < begin:
        return 1.0
    return 1.0 - (1.0 - optim.final_factor) * (step - begin) / max(1.0, steps - begin)


def fit(
    parameters: dict[str, nn.Parameter],
    optim: OptimConfig,
    losses: Callable[[int], dict[str, Tensor]],
    pace: Pace,
    watch: Watch,
    bf16: bool,
    planned: Callable[[int], None] = lambda steps: None,
    ranks: Ranks = ALONE,
) -> list[dict[str, int | float]]:
    """Train `parameters` on losses(step)["loss"]; returns one row of numbers per logged step.

    `losses` are of this rank's own rows; gradients are averaged over `ranks`.
    `planned` is told the number of steps as soon as it is fixed. Everything a step depends on must follow from its
    number, so that the same plan gives the same weights. Raises NexusError on a loss that is not finite.
    """
    curve: list[dict[str, int | float]] = []

    def gradients(step: int) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            numbers = losses(step)
        total = numbers["loss"]
        if not bool(torch.isfinite(total)):
            raise NexusError(
                f"loss is {float(total.detach())} at step {step}; lower optim.rate or look at the data of this step"
            )
        for parameter in parameters.values():
            parameter.grad = None
        total.backward()
        ranks.average(parameters.values())
        return numbers

    def note(done: Done) -> None:
        watch.advance(1, loss=float(done.numbers["loss"].detach()))
        if done.steps % 20 == 0 or done.steps == pace.steps:
            row = {name: float(value.detach()) for name, value in done.numbers.items()}
            curve.append({"step": done.steps, "seconds": done.seconds, "rate": optim.rate * done.factor, **row})

    def fixed(steps: int) -> None:
        if watch.total is None:
            watch.total = steps
            planned(steps)

    descend(parameters, optimizers(parameters, optim), optim, gradients, pace, note, fixed, ranks)
    return curve


@dataclass(frozen=True)
class Done:
    """A step that was taken: how many there are now, what `gradients` gave, the norm of the gradient before clipping,
    the factor on the rate, and seconds since the loop began."""

    steps: int
    numbers: dict[str, Tensor]
    norm: Tensor
    factor: float
    seconds: float


def descend(
    parameters: dict[str, nn.Parameter],
    movers: Sequence[torch.optim.Optimizer],
    optim: OptimConfig,
    gradients: Callable[[int], dict[str, Tensor]],
    pace: Pace,
    note: Callable[[Done], None],
    fixed: Callable[[int], None],
    ranks: Ranks = ALONE,
    first: int = 0,
) -> None:
    """Steps `first` .. pace.steps - 1: `gradients(step)` leaves the mean gradient of all ranks in the parameters, which
    are clipped and moved; `note` hears of every step, `fixed` of their number once it is known.

    Raises NexusError for a gradient that is not finite, before anything is moved.
    """
    begun = time.perf_counter()
    probe = first, begun  # a step, and when it began
    step = first
    while pace.steps is None or step < pace.steps:
        if (step - first) % HEAP_STEPS == 0:
            give_memory_back()
        if pace.steps is None and step == first + WARM_STEPS:
            probe = step, time.perf_counter()
        if pace.steps is None and step >= PROBE_STEPS and step > first and (step - first) % PROBE_STEPS == 0:
            now = time.perf_counter()
            speed, left = (step - probe[0]) / (now - probe[1]), pace.seconds - (now - begun)
            probe = step, now
            share = min(PROBE_SHARE, optim.decay_from / 2)  # known well before the rate decays
            measured = left <= (1 - share) * pace.seconds
            # The first rank's word counts: clocks differ, the steps at which all ask do not.
            steps = pace.decide(step, int(left * speed), optim.decay_from) if measured else 0
            pace.steps = ranks.agree(steps) or None
        if pace.steps is not None:
            fixed(pace.steps)
        factor = rate_factor(step, pace.steps, optim)
        for group in (group for mover in movers for group in mover.param_groups):
            group["lr"] = group["rate"] * factor
        numbers = gradients(step)
        norm = nn.utils.clip_grad_norm_(list(parameters.values()), optim.clip_norm)
        norm = whole(norm)
        if not bool(torch.isfinite(norm)):
            raise NexusError(
                f"the gradient has norm {float(norm)} at step {step}; lower optim.rate or look at the data of this step"
            )
        for mover in movers:
            mover.step()
        step += 1
        note(Done(step, numbers, norm, factor, time.perf_counter() - begun))


def bf16_is_faster() -> bool:
    """Whether a bfloat16 product beats float32 on this machine, by timing (processors without it are slower)."""
    a = torch.randn(768, 768)
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = a.to(dtype)
        x @ x
        begin = time.perf_counter()
        for _ in range(8):
            x @ x
        times[dtype] = time.perf_counter() - begin
    return times[torch.bfloat16] < 0.8 * times[torch.float32]
