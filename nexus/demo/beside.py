"""Two stand-ins at a time: a second process trains one track of stage 0 while this one trains the other.

Models of this size gain little from a second thread (1.4 times) and everything from a second process. What the second
process tells its progress display travels through a pipe to the display of the first.
"""

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from nexus.errors import NexusError
from nexus.processes import worker_begins
from nexus.progress import Progress

EVERY = 10  # steps between two messages of a stage


class _RelayedStage:
    """What the training loop sees of a stage whose display is in another process."""

    def __init__(self, total: int | None, channel: Connection) -> None:
        self.total, self._channel = total, channel
        self._waiting = 0
        self._values: dict[str, float] = {}

    def advance(self, n: int = 1, **values: float) -> None:
        self._waiting += n
        self._values = values
        if self._waiting >= EVERY:
            self.flush()

    def flush(self) -> None:
        """Tell what has not been told."""
        self._channel.send(("advance", self._waiting, self._values, self.total))
        self._waiting = 0


class RelayedProgress(Progress):
    """A Progress whose stages are shown by the process at the other end of the pipe."""

    def __init__(self, channel: Connection) -> None:
        super().__init__()
        self._channel = channel

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "steps", done: int = 0) -> Iterator[Any]:
        """As Progress.stage."""
        self._channel.send(("begin", name, total, unit))
        relayed = _RelayedStage(total, self._channel)
        yield relayed
        relayed.flush()
        self._channel.send(("end",))


@contextmanager
def beside(work: Callable[..., None], arguments: tuple[Any, ...], threads: int, progress: Progress) -> Iterator[None]:
    """Run work(progress, *arguments) in a second process with `threads` threads while the block runs.

    The end of the block waits for it; a NexusError there is raised here. `work` is a function of a module.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_begin, args=(there, threads, work, arguments), daemon=True)
    process.start()
    there.close()
    failures: list[str] = []
    listener = threading.Thread(target=_listen, args=(here, progress, failures), daemon=True)
    listener.start()
    try:
        yield
        process.join()
        listener.join()
    finally:
        if process.is_alive():
            process.kill()
            process.join()
    if failures:
        raise NexusError(failures[0])
    if process.exitcode:
        raise RuntimeError(f"the second training process ended with code {process.exitcode}")


def _begin(channel: Connection, threads: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    worker_begins()
    torch.set_num_threads(threads)
    try:
        work(RelayedProgress(channel), *arguments)
    except NexusError as error:
        channel.send(("failed", str(error)))


def _listen(channel: Connection, progress: Progress, failures: list[str]) -> None:
    """Show what the other process tells until it hangs up."""
    shown: Any = None
    stage: Any = None
    while True:
        try:
            message = channel.recv()
        except EOFError:
            break
        match message:
            case ("begin", name, total, unit):
                stage = progress.stage(name, total, unit)
                shown = stage.__enter__()
            case ("advance", count, values, total):
                shown.total = total
                shown.advance(count, **values)
            case ("end",):
                stage.__exit__(None, None, None)
                stage = None
            case ("failed", text):
                failures.append(text)
    if stage is not None:
        stage.__exit__(None, None, None)
