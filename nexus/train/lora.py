"""Low-rank adapters on linear layers: y = W x + scale B A x, A and B trained, W frozen (Hu et al. 2021).

A layer keeps its name and its weight's name, so checkpoints and frozen weights are found where they always are.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nexus.errors import BadConfig
from nexus.train.parallel import whole
from nexus.train.stage import trainable_names
from nexus.training import LoraConfig

A, B = "lora_a", "lora_b"


class LoraLinear(nn.Linear):
    """A linear layer with an adapter, which begins as nothing: B is zero."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.scale = base.weight, scale
        if base.bias is not None:
            self.bias = base.bias
        drawn = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(drawn, a=sqrt(5), generator=generator)  # as PEFT draws it
        self.lora_a = nn.Parameter(drawn.to(base.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, input: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        low = nn.functional.linear(input.to(self.lora_a.dtype), self.lora_a)
        y = super().forward(input)
        return y + self.scale * nn.functional.linear(low, self.lora_b).to(y.dtype)


def adapt(model: nn.Module, trainable: Sequence[str], config: LoraConfig, seed: int) -> list[str]:
    """Put adapters into the layers that a stage would train and `config.targets` names, in place; returns the names of
    all parameters that then train. Equal on every rank for one seed.

    Raises BadConfig where no layer is named by both.
    """
    named = set(trainable_names(model, trainable))
    generator = torch.Generator().manual_seed(seed)
    adapted = []
    for name, layer in list(model.named_modules()):
        inside = isinstance(layer, nn.Linear) and f"{name}.weight" in named
        if isinstance(layer, nn.Linear) and inside and any(fnmatchcase(name, glob) for glob in config.targets):
            parent, _, last = name.rpartition(".")
            scale = config.alpha / config.rank
            setattr(model.get_submodule(parent), last, LoraLinear(layer, config.rank, scale, generator))
            adapted.append(name)
    if not adapted and not any(fnmatchcase(name, glob) for name in named for glob in config.whole):
        raise BadConfig(
            f"engine.lora.targets {list(config.targets)} name no linear layer among what is trained, "
            f"{list(trainable)}; name layers of it, or leave engine.lora out"
        )
    within = {f"{name}.{end}" for name in adapted for end in ("weight", "bias")}
    kept = {name for name in named - within if any(fnmatchcase(name, glob) for glob in config.whole)}
    grown = {f"{name}.{end}" for name in adapted for end in (A, B)}
    return [name for name, _ in model.named_parameters() if name in kept | grown]


@torch.no_grad()
def merged(layer: LoraLinear) -> Float[Tensor, "O I"]:
    """The weight with the adapter in it, float32, in one piece; every rank must ask."""
    a, b = whole(layer.lora_a.detach()).float(), whole(layer.lora_b.detach()).float()
    return torch.addmm(whole(layer.weight.detach()).float(), b, a, alpha=layer.scale)


@torch.no_grad()
def pair(layer: LoraLinear) -> tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]:
    """A and B on the CPU, in one piece; every rank must ask."""
    return whole(layer.lora_a.detach()).cpu(), whole(layer.lora_b.detach()).cpu()
