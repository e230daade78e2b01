"""Who does the work: processes of this machine, or Ray actors. Batches go in, and come out in the same order.

Every worker loads its models once and has one batch at a time. A worker that dies is replaced and its batch done again
by another; a batch that was lost twice is tried row by row, and a row that alone kills its worker twice is rejected.
No more than a few batches per worker are open, so neither a fast reader nor a slow writer fills the memory.
"""

import logging
import multiprocessing
import os
import socket
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal, Protocol

from nexus.errors import BadConfig, NexusError
from nexus.processes import worker_begins
from nexus.synth.pipeline import Outcome, Pipeline, Worked
from nexus.synth.records import Record

OPEN_PER_WORKER = 3  # batches that are not handed back yet; one that takes long holds up no more than these
DEATHS = 2  # of workers over one batch, and then over one row of it
REACHED_SECONDS = 10.0
STILLBORN = 3  # workers in a row that die before they have loaded their models

Event = Literal["ready", "dead"] | Worked


class Crew(Protocol):
    """Workers that can be hired, given one batch each, and waited for."""

    size: int

    def hire(self) -> int:
        """Start one more worker; it will be `ready`. Returns its number."""
        ...

    def give(self, worker: int, records: Sequence[Record]) -> None:
        """Let a ready worker begin. One that has died by then says so in `next_event`."""
        ...

    def next_event(self) -> tuple[int, Event]:
        """Wait for a worker that is ready, done or dead. Raises what a worker raised."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...


@dataclass
class _Task:
    """Some rows of a batch, from `start` on, and how many workers died over them."""

    batch: int
    start: int
    records: Sequence[Record]
    deaths: int = 0


@dataclass
class _Open:
    """A batch that is under way: outcomes per row as they come, None where there are none yet."""

    rows: list[list[Outcome] | None]
    step_seconds: dict[str, float] = field(default_factory=dict)


def in_order(crew: Crew, batches: Iterator[Sequence[Record]]) -> Iterator[Worked]:
    """What becomes of every batch, in the order of the batches. A batch may be empty.

    Raises what a worker raised, and RuntimeError where workers cannot even start.
    """
    return _Schedule(crew, batches).run()


class _Schedule:
    def __init__(self, crew: Crew, batches: Iterator[Sequence[Record]]) -> None:
        self._crew, self._batches = crew, enumerate(batches)
        self._open: dict[int, _Open] = {}
        self._to_do: deque[_Task] = deque()
        self._idle: deque[int] = deque()
        self._busy: dict[int, _Task] = {}
        self._stillborn = 0

    def run(self) -> Iterator[Worked]:
        for _ in range(self._crew.size):
            self._crew.hire()
        more = True
        while more or self._open:
            while more and len(self._open) < OPEN_PER_WORKER * self._crew.size:
                more = self._take()
            while self._to_do and self._idle:
                worker, task = self._idle.popleft(), self._to_do.popleft()
                self._busy[worker] = task
                self._crew.give(worker, task.records)
            first = next(iter(self._open), None)
            if first is not None and all(row is not None for row in self._open[first].rows):
                done = self._open.pop(first)
                yield Worked([row for row in done.rows if row is not None], done.step_seconds)
            elif self._open:
                self._happened(*self._crew.next_event())

    def _take(self) -> bool:
        number, records = next(self._batches, (-1, ()))
        if number < 0:
            return False
        self._open[number] = _Open([None] * len(records))
        if records:
            self._to_do.append(_Task(number, 0, records))
        return True

    def _happened(self, worker: int, event: Event) -> None:
        task = self._busy.pop(worker, None)
        match event:
            case "ready":
                self._stillborn = 0
                self._idle.append(worker)
            case "dead":
                if worker in self._idle:
                    self._idle.remove(worker)
                elif task is None:
                    self._stillborn += 1
                    if self._stillborn == STILLBORN:
                        raise RuntimeError(
                            f"{STILLBORN} workers in a row died while they loaded their models: the machine ran out of "
                            'memory, or a script started processes outside `if __name__ == "__main__":`'
                        )
                else:
                    self._lost(task)
                self._crew.hire()
            case Worked():
                assert task is not None
                self._idle.append(worker)
                self._keep(task, event)

    def _keep(self, task: _Task, worked: Worked) -> None:
        batch = self._open[task.batch]
        batch.rows[task.start : task.start + len(worked.rows)] = worked.rows
        for step, seconds in worked.step_seconds.items():
            batch.step_seconds[step] = batch.step_seconds.get(step, 0.0) + seconds

    def _lost(self, task: _Task) -> None:
        """The work of a dead worker goes to the front again, whole, then row by row."""
        if task.deaths + 1 < DEATHS:
            self._to_do.appendleft(_Task(task.batch, task.start, task.records, task.deaths + 1))
        elif len(task.records) > 1:
            single = [_Task(task.batch, task.start + i, [record]) for i, record in enumerate(task.records)]
            self._to_do.extendleft(reversed(single))
        else:
            outcome = Outcome(task.records[0].with_(sound=None), "worker", "worker_died", failed=True)
            self._keep(task, Worked([[outcome]], {}))


class LocalCrew:
    """Spawned processes of this machine, which leave Ctrl-C to the parent and die with it."""

    def __init__(self, pipeline: Pipeline, processes: int) -> None:
        if processes < 1:
            raise BadConfig(f"workers: expected at least 1, given {processes}")
        self.size, self._pipeline = processes, pipeline
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[int, tuple[BaseProcess, Connection]] = {}
        self._hired = 0

    def hire(self) -> int:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._pipeline), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self._hired += 1
        self._workers[self._hired] = (process, ours)
        return self._hired

    def give(self, worker: int, records: Sequence[Record]) -> None:
        try:
            self._workers[worker][1].send(list(records))
        except (BrokenPipeError, ConnectionResetError):
            return  # next_event finds the end of the pipe

    def next_event(self) -> tuple[int, Event]:
        by_connection = {connection: worker for worker, (_, connection) in self._workers.items()}
        ready = wait(list(by_connection))[0]
        assert isinstance(ready, Connection)
        worker = by_connection[ready]
        try:
            answer = ready.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of a message
            process, _ = self._workers.pop(worker)
            process.join()
            ready.close()
            return worker, "dead"
        if isinstance(answer, Exception):
            raise answer
        return worker, answer

    def close(self) -> None:
        for process, connection in self._workers.values():
            connection.close()
            process.terminate()
        for process, _ in self._workers.values():
            process.join()
        self._workers.clear()


def _serve(connection: Connection, pipeline: Pipeline) -> None:
    """The life of a local worker."""
    worker_begins()
    try:
        pipeline.setup()
        connection.send("ready")
        while True:
            connection.send(pipeline(connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has closed: nothing more to do
    except (NexusError, OSError, MemoryError) as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(f"a worker failed:\n{traceback.format_exc()}"))


class RayCrew:
    """Ray actors: in the cluster at `address`, or in one that is started here and stopped at the end."""

    def __init__(self, pipeline: Pipeline, actors: int, address: str | None = None) -> None:
        if actors < 1:
            raise BadConfig(f"workers: expected at least 1, given {actors}")
        try:
            import ray
        except ImportError:
            raise BadConfig(
                "executor ray: the package `ray` is not installed; pip install 'nexus-omni[ray]', or use local"
            ) from None
        if address is not None:
            _check_reachable(address)
        self.size, self._ray = actors, ray
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is contacted that nobody named
            here: dict[str, Any] = {"include_dashboard": False, "num_cpus": actors} if address is None else {}
            # What workers print would come to stdout, which is for results.
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **here)
        except (ConnectionError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise BadConfig(f"executor ray: no cluster at {address or 'local'}: {said}; start one or name it") from None
        self._actor: Any = ray.remote(num_cpus=1, max_restarts=0)(_Actor)
        self._pipeline = ray.put(pipeline)
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, int] = {}
        self._hired = 0

    def hire(self) -> int:
        self._hired += 1
        actor: Any = self._actor.remote(self._pipeline)
        self._actors[self._hired] = actor
        self._pending[actor.ready.remote()] = self._hired
        return self._hired

    def give(self, worker: int, records: Sequence[Record]) -> None:
        self._pending[self._actors[worker].work.remote(list(records))] = worker

    def next_event(self) -> tuple[int, Event]:
        (done,), _ = self._ray.wait(list(self._pending), num_returns=1)
        worker = self._pending.pop(done)
        try:
            event: Event = self._ray.get(done)
        except self._ray.exceptions.RayActorError:
            del self._actors[worker]
            return worker, "dead"
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, NexusError | OSError | MemoryError):
                raise error.cause from None
            raise
        return worker, event

    def close(self) -> None:
        self._ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise BadConfig(f"--address {address}: expected HOST:PORT of a Ray cluster, as `ray start --head` prints it")
    try:
        socket.create_connection((host.removeprefix("ray://"), int(port)), REACHED_SECONDS).close()
    except OSError as error:
        raise BadConfig(f"executor ray: no cluster at {address}: {error}; start one, or name another") from None


class _Actor:
    """A Ray worker."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def ready(self) -> str:
        """Load what the steps need. Here and not in the constructor, whose errors Ray reports as a death."""
        self._pipeline.setup()
        return "ready"

    def work(self, records: list[Record]) -> Worked:
        """One batch."""
        return self._pipeline(records)
