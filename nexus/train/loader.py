"""Batches made ready ahead of the step that takes them, by processes that die with the one that trains.

Which rows a batch holds is a pure function of its number, so any number of processes gives the same batches, and a run
that goes on needs nothing but the number.
"""

import functools
import itertools
from collections.abc import Generator, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset

from nexus import media
from nexus.data.chat import ChatTokenizer, render
from nexus.data.collate import collate
from nexus.data.headers import frames_per_second, limits_for
from nexus.errors import BadConfig, NexusError
from nexus.organs import ModelConfig
from nexus.processes import worker_begins
from nexus.types import Batch, Sample, SpeechBatch, Turn

AHEAD = 2  # batches that each process prepares ahead


@runtime_checkable
class Batches(Protocol):
    """The micro-batches of one rank by number, from 0 without an end: conversations, or speech as it was prepared.

    `at` is a pure function and the object can be sent to other processes. `fingerprint` changes with what it gives;
    `batches_per_epoch` are this rank's until every row has been seen by some rank.
    """

    @property
    def fingerprint(self) -> str: ...

    @property
    def batches_per_epoch(self) -> int: ...

    def at(self, step: int) -> Sequence[Sample] | SpeechBatch: ...


class _Ready(Dataset[Any]):
    """Batches by number, ready for the model. A user's mistake is handed over as a value: raised in another process it
    would arrive inside a stack of lines."""

    def __init__(self, batches: Batches, tokenizer: Path, specs: ModelConfig) -> None:
        self._batches, self._path, self._specs = batches, tokenizer, specs

    @functools.cached_property
    def _tokenizer(self) -> ChatTokenizer:
        return ChatTokenizer.load(self._path)  # once in every process

    def __getitem__(self, number: int) -> Batch | SpeechBatch | NexusError:
        try:
            rows = self._batches.at(number)
            return rows if isinstance(rows, SpeechBatch) else batch_of(rows, self._tokenizer, self._specs)
        except NexusError as error:
            return type(error)(f"batch {number}: {error}")


def batch_of(rows: Sequence[Sample], tokenizer: ChatTokenizer, specs: ModelConfig) -> Batch:
    """Conversations as a padded batch; media that are files are read. Raises BadRecord and BadMedia naming the row."""
    rendered = []
    for row in rows:
        try:
            rendered.append(render([_loaded(turn, specs) for turn in row.turns], tokenizer, specs))
        except NexusError as error:
            raise type(error)(f"row {row.id}: {error}") from None
    return collate(rendered, tokenizer.pad, specs)


def _loaded(turn: Turn, specs: ModelConfig) -> Turn:
    """The turn with what the model sees and hears in memory. Sound of an answer is not read: the text carries its loss,
    and the voice learns from what was prepared."""
    if turn.role == "assistant":
        return turn
    limits, fps = limits_for(specs), frames_per_second(specs)
    return Turn(turn.role, tuple(media.load(part, limits, fps=fps) for part in turn.parts))


def ready(
    batches: Batches, tokenizer: Path, specs: ModelConfig, workers: int, first: int
) -> Generator[Batch | SpeechBatch, None, None]:
    """Batches `first`, first + 1, ... in order and without an end, prepared by `workers` processes (0: by this one).

    `tokenizer` is the file of the model folder.

    Raises NexusError for a row that cannot be read, and where a process has died.
    """
    if workers:
        _check_that_it_can_be_sent(batches)
    loader: DataLoader[Any] = DataLoader(
        _Ready(batches, tokenizer, specs),
        batch_size=None,
        sampler=itertools.count(first),
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=AHEAD if workers else None,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_begin if workers else None,
        generator=torch.Generator().manual_seed(0),  # it draws seeds for its processes: not from what training draws
    )
    try:
        for batch in loader:
            if isinstance(batch, NexusError):
                raise batch
            yield batch
    except RuntimeError as error:
        if died(error):
            raise NexusError(lost(error)) from None
        raise


def _check_that_it_can_be_sent(batches: Batches) -> None:
    try:
        ForkingPickler.dumps(batches)
    except Exception as error:  # whatever an object raises that is not made for it
        raise BadConfig(
            f"data.workers: these rows cannot be sent to other processes ({' '.join(str(error).split())[:120]}); set "
            "data.workers=0"
        ) from None


def died(error: BaseException) -> bool:
    """Whether an error says that a process of the loader has ended; it may be raised anywhere in this process."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def lost(error: BaseException) -> str:
    """The same in one line."""
    return (
        f"a process that prepares batches has died ({' '.join(str(error).split())[:120]}); the machine ran out of "
        "memory, or the process was ended; set data.workers lower or make room, then run the same command again"
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin(number: int) -> None:
    worker_begins()
