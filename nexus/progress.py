"""What a person sees of a long command: a live line per stage, and the memory it took.

Writes to stderr only, so that stdout stays free for `--json`. Knows neither models nor files.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

_GIB = 2**30


def _clock_text(seconds: float) -> str:
    """0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _value_text(value: float) -> str:
    """Three decimals where they say something, the exponent where they do not."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1e5 or value != value else f"{value:.2e}"


class Stage:
    """One running stage, made by `Progress.stage`. `total` may be set or changed at any time."""

    def __init__(self, name: str, total: int | None, unit: str, done: int, clock: Callable[[], float]) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self.values: dict[str, float] = {}
        self._clock, self._began, self._found = clock, clock(), done
        self._changed: Callable[[Stage], None] = lambda _: None

    def advance(self, n: int = 1, **values: float) -> None:
        """Count `n` more units; `values` (loss, lr, ...) are shown until the next ones of the same name."""
        assert n >= 0, f"stage {self.name!r} cannot go back by {-n}"
        self.done += n
        self.values.update(values)
        self._changed(self)

    @property
    def elapsed_seconds(self) -> float:
        """Wall time since the stage was entered."""
        return self._clock() - self._began

    @property
    def rate(self) -> float:
        """Units per second in this run: what an earlier, interrupted run had done does not count."""
        elapsed = self.elapsed_seconds
        return (self.done - self._found) / elapsed if elapsed > 0 else 0.0

    @property
    def left_seconds(self) -> float | None:
        """Time left at the rate so far; None while the total or the rate is unknown."""
        if self.total is None or self.rate <= 0:
            return None
        return max(0, self.total - self.done) / self.rate

    def __str__(self) -> str:
        left = self.left_seconds
        parts = [self._count(), *self._numbers(), f"{_clock_text(self.elapsed_seconds)} elapsed"]
        return ", ".join(parts if left is None else [*parts, f"{_clock_text(left)} left"])

    def summary(self, finished: bool) -> str:
        """The line that stays when the stage has ended."""
        how = "done" if finished else "stopped"
        return ", ".join([f"{how} at {self._count()} after {_clock_text(self.elapsed_seconds)}", *self._numbers()])

    def _count(self) -> str:
        return f"{self.done} {self.unit}" if self.total is None else f"{self.done}/{self.total} {self.unit}"

    def _numbers(self) -> list[str]:
        rate = [f"{self.rate:.3g} {self.unit}/s"] if self.rate > 0 else []
        return [f"{name} {_value_text(value)}" for name, value in self.values.items()] + rate


class Progress:
    """Shows the stages of a long command: live on a terminal, else a few plain lines.

        with Progress() as progress, progress.stage("hearing", total=400) as stage:
            stage.advance(1, loss=2.3)

    On anything but a terminal (a file, a pipe, TERM=dumb) a stage prints a line at its start and end and at most one
    every `interval_seconds` between, and no thread is started.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        interval_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._interval_seconds, self._clock = interval_seconds, clock
        self._running: list[Stage] = []
        self._live: Live | None = None
        self._spoke_at = 0.0

    def __enter__(self) -> Self:
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            self._live = self._start_live()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "steps", done: int = 0) -> Iterator[Stage]:
        """Show one stage while the block runs. `done` units were finished by an earlier run (resuming)."""
        stage = Stage(name, total, unit, done, self._clock)
        stage._changed = self._advanced
        self._running.append(stage)
        if self._live is None:
            self.say(f"{name}: {stage._count()}")
        finished = False
        try:
            yield stage
            finished = True
        finally:
            self._running.remove(stage)
            self.say(f"{name}: {stage.summary(finished)}")

    def say(self, text: str) -> None:
        """One line that stays, above the live ones."""
        self._spoke_at = self._clock()
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def _advanced(self, stage: Stage) -> None:
        if self._live is None and self._clock() - self._spoke_at >= self._interval_seconds:
            self.say(f"{stage.name}: {stage}")

    def _start_live(self) -> "Live":
        from rich.console import Console
        from rich.live import Live

        # Redirection would send stdout to stderr: wanted where both are the same screen, wrong for `--json > file`.
        same_screen = sys.stdout.isatty()
        live = Live(
            console=Console(file=self._stream, force_terminal=True),
            get_renderable=self._table,
            refresh_per_second=2,
            transient=True,
            redirect_stdout=same_screen,
            redirect_stderr=self._stream is sys.stderr,
        )
        live.start()
        return live

    def _table(self) -> "Table":
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        for stage in list(self._running):
            bar = ProgressBar(total=stage.total, completed=stage.done, width=16, pulse=stage.total is None)
            table.add_row(Text(stage.name), bar, Text(str(stage)))
        return table


class MemoryWatch:
    """Peak memory of this process and its descendants while the block runs, sampled by a thread.

    Counts PSS: a page shared by n processes counts 1/n in each, so that the sum is what the machine really holds.
    Where the kernel does not tell it (`proc` has no smaps_rollup), the largest resident size of one process is all
    there is; `measure` says which of the two `peak_gib` is.
    """

    def __init__(self, interval_seconds: float = 2.0, proc: Path = Path("/proc")) -> None:
        self._interval_seconds, self._proc = interval_seconds, proc
        self._has_pss = (proc / str(os.getpid()) / "smaps_rollup").exists()
        self._unreadable: set[int] = set()
        self._peak_bytes = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)

    def __enter__(self) -> Self:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._sample()
        self._stop.set()
        self._thread.join()

    @property
    def peak_gib(self) -> float:
        """The largest sample so far, in GiB."""
        return self._peak_bytes / _GIB

    @property
    def measure(self) -> str:
        """What `peak_gib` counts, in words for a report."""
        if not self._has_pss:
            return "largest RSS of one process"
        missing = f", without {len(self._unreadable)} that may not be read" if self._unreadable else ""
        return f"sum of PSS over the process tree{missing}"

    def _run(self) -> None:
        while not self._stop.wait(self._interval_seconds):
            self._sample()

    def _sample(self) -> None:
        with self._lock:
            now_bytes = self._tree_pss_bytes() if self._has_pss else _largest_rss_bytes()
            self._peak_bytes = max(self._peak_bytes, now_bytes)

    def _tree_pss_bytes(self) -> int:
        total_kib = 0
        for pid in _process_tree(self._proc, os.getpid()):
            try:
                rollup = (self._proc / str(pid) / "smaps_rollup").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended since it was listed: holds nothing any more
            except PermissionError:
                self._unreadable.add(pid)
                continue
            found = re.search(rb"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
            total_kib += int(found[1]) if found else 0  # a process that has ended but is not reaped has no pages
        return total_kib * 1024


def _process_tree(proc: Path, root: int) -> list[int]:
    """`root` and all its living descendants."""
    children: dict[int, list[int]] = {}
    for stat in proc.glob("[0-9]*/stat"):
        try:
            # The command's name stands in brackets and may itself hold brackets and blanks.
            parent = int(stat.read_bytes().rpartition(b")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    tree = [root]
    for pid in tree:
        tree.extend(children.get(pid, ()))
    return tree


def _largest_rss_bytes() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return largest * unit
