"""Where a model's weights lie while they are trained: in one process, copied to each (DDP), or in shards (FSDP2)."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from nexus.errors import BadConfig
from nexus.model.omni import OmniModel
from nexus.processes import cores
from nexus.train.parallel import Ranks
from nexus.training import EngineConfig
from nexus.types import Batch

Kind = Literal["none", "ddp", "fsdp"]
# Units of FSDP: gathered when they run and freed behind it. What is in none of them belongs to the root.
LAYERS = ("language.backbone.layers", "hearing.encoder.layers", "vision.tower.layers", "voice.blocks")
# Qwen2.5-VL's blocks are run part by part (`model/vision.py`), so the parts are one unit instead of the block.
BLOCKS, PARTS = "vision.tower.blocks", ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp")
MAX_CPU_THREADS = 8


@dataclass(frozen=True)
class Place:
    """This process's device, and how the model is spread over the ranks."""

    kind: Kind
    device: torch.device
    dtype: torch.dtype  # of products

    @classmethod
    def choose(cls, engine: EngineConfig, ranks: Ranks) -> "Place":
        """What the recipe asks for on the machine that is there. Raises BadConfig where the two do not fit."""
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        kind: Kind = "none" if engine.parallel == "auto" else engine.parallel
        if engine.parallel == "auto" and ranks.world > 1:
            kind = "fsdp" if device.type == "cuda" else "ddp"
        if (kind == "none") != (ranks.world == 1):
            raise BadConfig(
                f"engine.parallel is {kind}, expected {'one process' if kind == 'none' else 'several processes'}, "
                f"found {ranks.world}; leave it auto, or start with torchrun --nproc_per_node N -m nexus train ..."
            )
        return cls(kind, device, torch.bfloat16 if engine.dtype == "bfloat16" else torch.float32)

    def products(self) -> AbstractContextManager[Any]:
        """Inside it products are made in `dtype`. FSDP sees to that itself."""
        if self.kind == "fsdp" or self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def threads(engine: EngineConfig) -> int:
    """Compute threads of this process: as the recipe says, or its part of the cores."""
    if engine.threads is not None:
        return engine.threads
    return max(1, min(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), MAX_CPU_THREADS))


def cast(model: nn.Module, place: Place) -> None:
    """Types of numbers, in place: what trains is float32 and so is everything when products are; otherwise frozen
    matrices stay as the folder holds them, which saves half of their memory."""
    for parameter in model.parameters():
        if parameter.requires_grad or parameter.ndim < 2 or place.dtype == torch.float32:
            parameter.data = parameter.data.float()


def spread(model: nn.Module, place: Place, ranks: Ranks) -> nn.Module:
    """The model on its device and spread over the ranks; what it returns is called, `model` keeps the parameters."""
    match place.kind:
        case "none":
            return model.to(place.device)
        case "ddp":
            # Which organs run differs from step to step, so each rank looks for the parameters that had no part.
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", FutureWarning
                )  # the newest torch has another name for broadcast_buffers
                return DistributedDataParallel(
                    model.to(place.device),
                    device_ids=[place.device] if place.device.type == "cuda" else None,
                    find_unused_parameters=True,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                )
        case "fsdp":
            _shard(model, place, ranks)
            return model


def _shard(model: nn.Module, place: Place, ranks: Ranks) -> None:
    mesh = init_device_mesh(place.device.type, (ranks.world,))
    # Inputs keep their types: rotary angles stay float32 where the layers want them so.
    policy = MixedPrecisionPolicy(place.dtype, torch.float32, cast_forward_inputs=False)
    modules = dict(model.named_modules())
    for name in LAYERS:
        for layer in modules[name].children() if name in modules else ():
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    for block in modules[BLOCKS].children() if BLOCKS in modules else ():
        fully_shard([block.get_submodule(part) for part in PARTS], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for buffer_name, buffer in list(model.named_buffers()):
        owner, _, last = buffer_name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer.to(place.device))


def compile_layers(model: nn.Module) -> None:
    """torch.compile for every layer by itself, in place: equal layers share what was compiled."""
    modules = dict(model.named_modules())
    for name in (*LAYERS, BLOCKS):
        for layer in modules[name].children() if name in modules else ():
            layer.compile()


@contextlib.contextmanager
def summing(called: nn.Module, last: bool) -> Iterator[None]:
    """One micro-batch of a step: copies exchange gradients behind the last one alone."""
    if isinstance(called, DistributedDataParallel) and not last:
        with called.no_sync():
            yield
    else:
        yield


@contextlib.contextmanager
def in_one_piece(model: OmniModel) -> Iterator[None]:
    """While the block runs, parts of the model may be called by themselves, by all ranks alike: the weights that belong
    to no layer are gathered."""
    if isinstance(model, FSDPModule):
        pair = torch.zeros(1, 2, dtype=torch.long)
        with torch.no_grad():
            model(Batch(pair, pair, pair == 0, ()))  # shards learn who is their root when the whole model first runs
        model.unshard()
        try:
            yield
        finally:
            model.reshard()
    else:
        yield
