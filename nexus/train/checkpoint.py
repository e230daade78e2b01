"""Checkpoints of a run: weights that train and the optimiser's state, by torch.distributed.checkpoint, whole or not at
all.

A checkpoint is written into a folder with another name, brought to the disk, and renamed. Its tensors lie in shards, so
a run may go on with another number of ranks; what belongs to the run (which step, which data) stands in `about.json`.
The files hold pickled metadata of torch's own: they are for the run that wrote them, not to be passed on.
"""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from nexus.errors import BadCheckpoint, NexusError
from nexus.train.parallel import Ranks

ABOUT = "about.json"
WEIGHT = "weight"


class Checkpoints:
    """The checkpoints of one stage in `folder`, of which the last `keep_last` stay."""

    def __init__(self, folder: Path, keep_last: int, ranks: Ranks) -> None:
        self._folder, self._keep_last, self._ranks = folder, keep_last, ranks

    def last(self) -> Path | None:
        """The newest whole checkpoint."""
        found = sorted(path for path in self._folder.glob("step-*") if (path / ABOUT).is_file())
        return found[-1] if found else None

    def save(
        self,
        step: int,
        parameters: dict[str, nn.Parameter],
        movers: Sequence[torch.optim.Optimizer],
        about: dict[str, Any],
    ) -> None:
        """Write one, then remove the oldest beyond `keep_last`; all ranks must call.

        Raises NexusError on every rank when one of them cannot write; older checkpoints are then as they were.
        """
        final = self._folder / f"step-{step:08d}"
        part = self._folder / f"{final.name}.part"
        failed = self._everywhere(lambda: _empty(part) if self._ranks.rank == 0 else None)
        if failed is None:
            try:
                with _alone_or_together(self._ranks) as alone:
                    save(_tensors(parameters, movers), storage_writer=FileSystemWriter(part), no_dist=alone)
            except (CheckpointException, OSError, RuntimeError) as error:
                failed = _reason(error)
            failed = self._worst(failed)
        if failed is None:
            failed = self._everywhere(lambda: _settle(part, final, about) if self._ranks.rank == 0 else None)
        if failed is not None:
            if self._ranks.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
            raise NexusError(f"checkpoint {final} cannot be written: {failed}; make room for it")
        if self._ranks.rank == 0:
            for old in sorted(self._folder.glob("step-*[0-9]"))[: -self._keep_last]:
                shutil.rmtree(old)

    def _everywhere(self, work: Any) -> str | None:
        """Why `work` failed on any rank, or None."""
        try:
            work()
            return self._worst(None)
        except OSError as error:
            return self._worst(_reason(error))

    def _worst(self, failed: str | None) -> str | None:
        (failures,) = self._ranks.sum([float(failed is not None)])
        return failed or (f"{failures:.0f} other ranks failed" if failures else None)


def read_about(checkpoint: Path) -> dict[str, Any]:
    """What stands beside a checkpoint. Raises BadCheckpoint."""
    try:
        about: dict[str, Any] = json.loads((checkpoint / ABOUT).read_text(encoding="utf-8"))
        return about
    except (OSError, ValueError) as error:
        raise BadCheckpoint(
            f"{checkpoint}: damaged ({error}); remove this folder to go on from the one before"
        ) from None


def restore(
    checkpoint: Path, parameters: dict[str, nn.Parameter], movers: Sequence[torch.optim.Optimizer], ranks: Ranks
) -> None:
    """Put a checkpoint's numbers into parameters and optimisers as they lie now, which may be in other shards.

    Raises BadCheckpoint for one that is damaged or of other parameters.
    """
    reader = FileSystemReader(checkpoint)
    try:
        saved = reader.read_metadata().state_dict_metadata
        wanted = {f"{WEIGHT}/{name}" for name in parameters}
        given = {key for key in saved if key.startswith(f"{WEIGHT}/")}
        if wanted != given:
            differ = sorted(wanted ^ given)
            raise BadCheckpoint(
                f"{checkpoint}: holds other parameters than this stage trains ({len(differ)} differ, first "
                f"{differ[0].removeprefix(WEIGHT + '/')}); give another --out"
            )
        state: dict[str, Tensor] = {}
        for key, entry in saved.items():
            assert isinstance(entry, TensorStorageMetadata), key
            kind, _, name = key.partition("/")
            parameter = parameters[name].detach()
            if kind == WEIGHT:
                state[key] = parameter
            elif entry.size == parameter.shape:
                state[key] = torch.zeros_like(parameter, dtype=entry.properties.dtype)
            else:  # the number of steps
                state[key] = torch.zeros(entry.size, dtype=entry.properties.dtype, device=parameter.device)
        with _alone_or_together(ranks) as alone:
            load(state, storage_reader=reader, no_dist=alone)
    except (CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
        raise BadCheckpoint(
            f"{checkpoint}: damaged ({_reason(error)}); remove this folder to go on from the one before"
        ) from None
    places: dict[Any, str] = {parameter: name for name, parameter in parameters.items()}
    for mover in movers:
        for moved in (parameter for group in mover.param_groups for parameter in group["params"]):
            name = places[moved]
            held = {key: tensor for key, tensor in state.items() if key.partition("/")[2] == name}
            mover.state[moved] = {key.partition("/")[0]: t for key, t in held.items() if not _is_weight(key)}


@contextlib.contextmanager
def _alone_or_together(ranks: Ranks) -> Iterator[bool]:
    """Whether there is one process, in which case the library need not warn of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield ranks.world == 1


def _is_weight(key: str) -> bool:
    return key.startswith(f"{WEIGHT}/")


def _tensors(parameters: dict[str, nn.Parameter], movers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """What makes up the state, by flat names: `weight/<parameter>`, `<optimiser's name for it>/<parameter>`."""
    names: dict[Any, str] = {parameter: name for name, parameter in parameters.items()}
    state: dict[str, Any] = {f"{WEIGHT}/{name}": parameter.detach() for name, parameter in parameters.items()}
    for mover in movers:
        for parameter, held in mover.state.items():
            state |= {f"{kind}/{names[parameter]}": tensor for kind, tensor in held.items()}
    return state


def _empty(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _settle(part: Path, final: Path, about: dict[str, Any]) -> None:
    """Everything to the disk, then the name that counts."""
    with open(part / ABOUT, "w", encoding="utf-8") as file:
        json.dump(about, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _to_disk(part)
    if final.exists():  # of a run that was continued from before it
        shutil.rmtree(final)
    os.replace(part, final)
    _to_disk(final.parent)


def _to_disk(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """The first cause in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        first = next(iter(error.failures.values()))
        error = first[0] if isinstance(first, tuple) else error
    text = str(error) or type(error).__name__
    return " ".join(text.split())[:200]
