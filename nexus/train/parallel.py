"""Several processes that train one model, each on rows of its own: gradients are averaged, so weights stay equal.

On two cores two processes with one thread each do almost twice the work of one process with two threads: the products
of a small model are too short to be worth sharing.
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from nexus.errors import NexusError

PATIENCE = timedelta(seconds=300)  # how long a rank waits for another
LONG_PATIENCE = timedelta(days=2)  # and for files that the first one makes
DONE = "done"
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is. One process alone needs no group."""

    rank: int = 0
    world: int = 1
    store: Store | None = None

    @classmethod
    def join(cls, rank: int, world: int, meeting: Path) -> "Ranks":
        """Meet the other processes over a file that did not exist before; only the loopback device is used."""
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = FileStore(str(meeting), world)
        store.set_timeout(PATIENCE)
        dist.init_process_group("gloo", store=store, timeout=PATIENCE, rank=rank, world_size=world)
        return cls(rank, world, store)

    @classmethod
    def launched(cls) -> "Ranks":
        """The place that torchrun gave this process, or one process alone where it was not launched so.

        Tensors in a GPU's memory meet over NCCL, all others over gloo. Raises NexusError where the others do not come.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        if int(os.environ.get("LOCAL_WORLD_SIZE", world)) == world and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all on this host
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store, rank, world = next(rendezvous("env://"))
        store.set_timeout(PATIENCE)
        # A key of its own per launch: the launcher's store outlives a rank that is started again.
        store = PrefixStore(f"nexus {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, timeout=PATIENCE, rank=rank, world_size=world)
        return cls(rank, world, store)

    def leave(self) -> None:
        """The end of the group. Nobody hangs up before everybody has heard the last sum."""
        if self.store is not None:
            self.store.set(f"left {self.rank}", "")
            self.store.wait([f"left {rank}" for rank in range(self.world)])
            dist.destroy_process_group()

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over all ranks; no gradient counts as zero."""
        if self.world == 1:
            return
        members = list(parameters)
        flat = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in members])
        dist.all_reduce(flat)
        flat /= self.world
        for parameter, mean in zip(members, flat.split([p.numel() for p in members]), strict=True):
            parameter.grad = mean.view_as(parameter)

    def agree(self, number: int) -> int:
        """The number of rank 0, on every rank."""
        if self.world == 1:
            return number
        shared = torch.tensor([number])
        dist.broadcast(shared, 0)
        return int(shared)

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all ranks, number by number, in float64. Raises RuntimeError where a rank has gone."""
        if self.world == 1:
            return list(numbers)
        shared = torch.tensor(list(numbers), dtype=torch.float64)
        dist.all_reduce(shared)
        return shared.tolist()

    def hear(self, text: str) -> str:
        """The text of rank 0, on every rank."""
        if self.world == 1:
            return text
        told = [text]
        dist.broadcast_object_list(told, 0)
        return told[0]

    def first(self, name: str, work: Callable[[], T]) -> T:
        """Work whose files the first rank makes and the others find: they begin when it is done, however long that
        takes. What the first rank raises is raised on all. `name` is used once in a run."""
        if self.store is None:
            return work()
        key = f"first {name}"
        if self.rank == 0:
            said = DONE
            try:
                return work()
            except BaseException as error:
                said = str(error) or type(error).__name__
                raise
            finally:
                self.store.set(key, said)
        self.store.wait([key], LONG_PATIENCE)
        said = self.store.get(key).decode()
        if said != DONE:
            raise NexusError(said)
        return work()

    def share(self, rows: int) -> int:
        """This rank's part of the rows of a step."""
        return max(1, rows // self.world)

    def place(self, step: int) -> int:
        """The number under which this rank draws its rows of a step: no two ranks draw the same."""
        return step * self.world + self.rank


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may lie in shards on all ranks, in one piece on each: all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def here(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may lie in shards."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
