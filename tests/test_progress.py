"""The live lines of long commands and the memory watch."""

import io
import json
import math
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nexus.progress import MemoryWatch, Progress


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_pipe_gets_a_line_at_start_and_end_and_one_in_ten_seconds_between() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress(out, clock=clock) as progress, progress.stage("hearing", total=400) as stage:
        for _ in range(400):
            clock.now += 0.125
            stage.advance(1, loss=2.3)
    lines = out.getvalue().splitlines()
    assert lines[0] == "hearing: 0/400 steps"
    assert lines[1] == "hearing: 80/400 steps, loss 2.300, 8 steps/s, 0:10 elapsed, 0:40 left"
    assert [line.split()[1] for line in lines[1:-1]] == ["80/400", "160/400", "240/400", "320/400", "400/400"]
    assert lines[-1] == "hearing: done at 400/400 steps after 0:50, loss 2.300, 8 steps/s"


def test_a_pipe_starts_no_thread() -> None:
    before = threading.active_count()
    with Progress(io.StringIO()) as progress, progress.stage("codec", total=3) as stage:
        stage.advance()
        assert threading.active_count() == before


def test_an_exception_leaves_a_line_that_says_how_far_the_stage_came() -> None:
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(out) as progress, progress.stage("voice", total=9) as stage:
        stage.advance(4)
        raise KeyboardInterrupt
    assert "voice: stopped at 4/9 steps" in out.getvalue()
    assert "done" not in out.getvalue()


def test_the_total_may_come_later_and_the_time_left_with_it() -> None:
    clock = Clock()
    with Progress(io.StringIO(), clock=clock) as progress, progress.stage("synthesis", unit="rows") as stage:
        clock.now += 5
        stage.advance(50)
        assert stage.left_seconds is None
        assert str(stage) == "50 rows, 10 rows/s, 0:05 elapsed"
        stage.total = 200
        assert stage.left_seconds == pytest.approx(15)


def test_a_resumed_stage_does_not_count_earlier_work_in_its_rate() -> None:
    clock = Clock()
    with Progress(io.StringIO(), clock=clock) as progress, progress.stage("voice", total=1000, done=900) as stage:
        clock.now += 10
        stage.advance(10)
        assert stage.rate == pytest.approx(1.0)
        assert stage.left_seconds == pytest.approx(90)


def test_numbers_of_any_size_stay_readable() -> None:
    with Progress(io.StringIO()) as progress, progress.stage("x") as stage:
        stage.advance(0, loss=math.nan, lr=1.5e-4, zero=0.0, items=123456, big=2.5e9)
        assert "loss nan, lr 1.50e-04, zero 0.000, items 123456, big 2.50e+09" in str(stage)


def test_hours_are_written_as_hours() -> None:
    clock = Clock()
    with Progress(io.StringIO(), clock=clock) as progress, progress.stage("x") as stage:
        clock.now += 3723
        assert "1:02:03 elapsed" in str(stage)


LIVE = """
import sys, time
from nexus.progress import Progress
with Progress() as progress:
    progress.say("two stages [not markup]")
    with progress.stage("hearing", total=4, unit="steps") as stage:
        for _ in range(4):
            stage.advance(1, loss=2.5)
            time.sleep(0.3)
    print('{"json": true}')
"""


def test_a_terminal_shows_the_stage_live_and_leaves_stdout_alone(tmp_path: Path) -> None:
    screen, terminal = pty.openpty()
    result = tmp_path / "stdout"
    with result.open("wb") as stdout:
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
        subprocess.run([sys.executable, "-c", LIVE], stdout=stdout, stderr=terminal, check=True, env=environment)
    os.close(terminal)
    shown = b""
    while chunk := _read(screen):
        shown += chunk
    os.close(screen)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "two stages [not markup]" in text
    assert re.search(r"hearing .*[1-4]/4 steps, loss 2.500, .* steps/s, 0:0\d elapsed, 0:0\d left", text)
    assert "hearing: done at 4/4 steps" in text
    assert result.read_bytes() == b'{"json": true}\n'


def _read(screen: int) -> bytes:
    try:
        return os.read(screen, 65536)
    except OSError:  # Linux's way to say that the other end was closed
        return b""


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with Progress(out) as progress, progress.stage("codec", total=1) as stage:
        stage.advance()
    assert "codec: done at 1/1 steps" in out.getvalue()
    assert "\x1b" not in out.getvalue()


FAMILY = """
import json, os, sys, time
from nexus.progress import MemoryWatch
shared = bytearray(os.urandom(1)) * (96 << 20)
with MemoryWatch(interval_seconds=0.05) as alone:
    time.sleep(0.2)
reader, writer = os.pipe()
with MemoryWatch(interval_seconds=0.05) as both:
    if (child := os.fork()) == 0:
        own = bytearray(os.urandom(1)) * (64 << 20)
        os.write(writer, b"x")
        time.sleep(60)
    os.read(reader, 1)
    time.sleep(0.3)
    os.kill(child, 9)
    os.waitpid(child, 0)
with MemoryWatch(interval_seconds=0.05) as after:
    time.sleep(0.2)
print(json.dumps([watch.peak_gib * 1024 for watch in (alone, both, after)] + [both.measure]))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this kernel does not tell PSS")
def test_memory_adds_up_children_and_counts_shared_pages_once() -> None:
    done = subprocess.run([sys.executable, "-c", FAMILY], capture_output=True, text=True, check=True)
    alone_mib, both_mib, after_mib, measure = json.loads(done.stdout)
    assert alone_mib > 96
    assert 60 < both_mib - alone_mib < 90  # the child's own 64, not the 96 it shares
    assert after_mib < both_mib - 50
    assert measure == "sum of PSS over the process tree"


def test_without_proc_the_measure_says_that_it_is_another_one(tmp_path: Path) -> None:
    with MemoryWatch(interval_seconds=0.01, proc=tmp_path) as watch:
        time.sleep(0.05)
    assert watch.measure == "largest RSS of one process"
    assert 0.005 < watch.peak_gib < 64


def test_the_watching_thread_ends_with_the_block() -> None:
    with MemoryWatch(interval_seconds=0.01):
        assert any(thread.name == "memory-watch" for thread in threading.enumerate())
    assert not any(thread.name == "memory-watch" for thread in threading.enumerate())
