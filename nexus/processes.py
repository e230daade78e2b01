"""Work in several processes: an ordered pool, and workers that leave Ctrl-C to the parent and die with it."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from nexus.errors import NexusError

T = TypeVar("T")
Job = TypeVar("Job")


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def give_memory_back() -> None:
    """Return pages that are free inside the C library's heap to the system, where that is glibc; elsewhere nothing.

    Training allocates tensors of ever other sizes: after a thousand steps of the tiny system most of a heap of 5 GB is
    holes, which glibc keeps. Takes milliseconds.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def in_processes(work: Callable[[Job], T], jobs: Sequence[Job], processes: int, chunk: int) -> Iterator[T]:
    """work(job) for every job, in order, from `processes` spawned processes that each take `chunk` jobs at a time.

    At most a few chunks per process are under way, so a slow reader does not fill the memory. The processes use one
    compute thread each, leave Ctrl-C to the parent and die with it. The first failed job raises its error here.
    """
    if processes < 1:
        raise NexusError(f"the number of processes must be at least 1, got {processes}")
    if not jobs:
        return
    chunks = (jobs[start : start + chunk] for start in range(0, len(jobs), chunk))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, -(-len(jobs) // chunk)), context, worker_begins)
    try:
        waiting: deque[Future[list[T]]] = deque()
        for some in chunks:
            waiting.append(pool.submit(_all, work, some))
            if len(waiting) > 3 * processes:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died: the machine ran out of memory, or a script started processes "
            'outside `if __name__ == "__main__":`'
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _all(work: Callable[[Job], T], jobs: Sequence[Job]) -> list[T]:
    return [work(job) for job in jobs]


def worker_begins() -> None:
    """A worker's first act. The thread count is for libraries that are imported later, with the work itself."""
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a worker"
    parent.join()
    os._exit(1)
