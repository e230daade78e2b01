"""The gradient of one step of a stage: micro-batches of this rank, weighted so that all ranks together descend on the
mean over all labels of the step, however these are spread over ranks, micro-batches and kinds of data."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nexus.errors import BadConfig, NexusError
from nexus.organs import ModelConfig
from nexus.train.modalities import Load, agree, complete, shares, total, weigh
from nexus.train.parallel import Ranks
from nexus.train.sharding import Place, summing
from nexus.types import Batch, SpeechBatch


@dataclass
class Steps:
    """What a stage learns from, step after step. `called` is the model as it is spread over ranks; `seen` counts what
    all ranks have learned from since this process began."""

    called: nn.Module
    config: ModelConfig
    stream: Iterator[Batch | SpeechBatch]
    accumulation: int
    place: Place
    ranks: Ranks
    parameters: dict[str, nn.Parameter]
    voice_alone: bool = False
    seen: Load = field(default_factory=Load)

    def gradients(self, step: int) -> dict[str, Tensor]:
        """Leave the gradient of a step in the parameters; returns its losses, means over all labels of all ranks.

        Raises NexusError, on every rank, for a loss that is not finite.
        """
        batches = [next(self.stream) for _ in range(self.accumulation)]
        if self.voice_alone and any(isinstance(batch, Batch) for batch in batches):
            raise BadConfig(
                "it trains the voice alone, expected prepared speech, found conversations; make it with nexus prepare "
                "MODEL DATA.jsonl --out DIR and set data.prepared=DIR"
            )
        loads = [weigh(batch) for batch in batches]
        together = agree(loads, self.ranks)
        for whole in together:
            _check_kinds(whole, self.ranks)
        for parameter in self.parameters.values():
            parameter.grad = None
        sums: dict[str, float] = {}
        for number, (batch, share) in enumerate(zip(batches, shares(loads, together), strict=True)):
            for name, loss in self._learn(batch, together[number], share, number == len(batches) - 1).items():
                sums[name] = sums.get(name, 0.0) + share * float(loss)
        means = dict(zip(sums, self.ranks.sum(list(sums.values())), strict=True))
        if not all(map(_is_finite, means.values())):
            raise NexusError(
                f"loss is {means['loss']} at step {step} (on this rank {sums['loss']}); lower optim.rate or look at "
                "the data of this step"
            )
        self.seen = total([self.seen, *together])
        return {name: torch.tensor(mean, dtype=torch.float64) for name, mean in means.items()}

    def _learn(self, batch: Batch | SpeechBatch, together: Load, share: float, last: bool) -> dict[str, Tensor]:
        """Losses of a micro-batch by name, behind its backward pass."""
        if self.ranks.world > 1 and isinstance(batch, Batch):
            batch = complete(batch, together, self.config)
        with summing(self.called, last):
            with self.place.products():
                losses: dict[str, Tensor] = self.called(batch)
            loss = losses["speech" if isinstance(batch, SpeechBatch) else "text"]
            if loss.requires_grad:  # what a stage trains may have no part in this batch: sound, where all is typed
                (loss * (share * self.ranks.world)).backward()  # gradients are averaged over ranks
        return {"loss": loss.detach(), **{name: value.detach() for name, value in losses.items()}}


def _check_kinds(together: Load, ranks: Ranks) -> None:
    if together.speech not in (0, ranks.world):
        raise BadConfig(
            f"{together.speech} of {ranks.world} ranks got prepared speech and the others conversations, expected one "
            "kind on all of them at a time; give a stage one kind of data"
        )


def _is_finite(number: float) -> bool:
    return abs(number) < float("inf")
