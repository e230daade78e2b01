"""A stage's freeze policy as data: globs over full parameter names decide what trains."""

import hashlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from nexus.errors import BadConfig
from nexus.recipe import OptimConfig
from nexus.train.parallel import here


def trainable_names(model: nn.Module, globs: Sequence[str]) -> list[str]:
    """Names of the parameters a stage trains. Raises BadConfig for a glob that matches nothing."""
    names = [name for name, _ in model.named_parameters()]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            tops = sorted({".".join(name.split(".")[:2]) for name in names})
            raise BadConfig(f"trainable glob {glob!r} matches no parameter; there are {', '.join(tops)}")
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]


def freeze(model: nn.Module, globs: Sequence[str]) -> dict[str, nn.Parameter]:
    """Let gradients flow exactly into the parameters that the globs name; returns them."""
    chosen = set(trainable_names(model, globs))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
        parameter.grad = None
    return {name: parameter for name, parameter in model.named_parameters() if name in chosen}


def frozen_digest(model: nn.Module, globs: Sequence[str]) -> str:
    """Digest over every parameter a stage must not touch, bit for bit; of weights in shards, over this rank's part."""
    chosen = set(trainable_names(model, globs))
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name not in chosen:
            digest.update(name.encode())
            digest.update(here(parameter.detach()).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def optimizers(parameters: dict[str, nn.Parameter], optim: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices that `optim.muon` names. Every group keeps its full rate under "rate".

    A rate factor per glob of `optim.rates`; no weight decay on vectors (norms, biases).
    """
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        factor = next((f for glob, f in optim.rates.items() if fnmatchcase(name, glob)), 1.0)
        muon = parameter.ndim == 2 and any(fnmatchcase(name, glob) for glob in optim.muon)
        groups.setdefault((muon, factor, parameter.ndim > 1), []).append(parameter)
    split: dict[bool, list[dict[str, Any]]] = {}
    for (muon, factor, matrix), members in groups.items():
        rate, decay = optim.rate * factor, optim.weight_decay if matrix else 0.0
        split.setdefault(muon, []).append({"params": members, "lr": rate, "rate": rate, "weight_decay": decay})
    chosen: list[torch.optim.Optimizer] = []
    if False in split:
        chosen.append(torch.optim.AdamW(split[False], betas=optim.betas, fused=True))
    if True in split:
        chosen.append(torch.optim.Muon(split[True], adjust_lr_fn="match_rms_adamw"))
    return chosen
