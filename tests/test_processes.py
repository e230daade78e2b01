"""What belongs to no process in particular: cores and memory. Pools of processes are tested where speech is made."""

import ctypes
import os
from pathlib import Path

import pytest

from nexus.processes import give_memory_back


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc keeps the holes of its heap")
def test_holes_in_the_heap_are_given_back() -> None:
    blocks = [b"x" * 100_000 for _ in range(2_000)]
    kept = blocks[::10]  # so that no large piece at the end of the heap is free
    blocks.clear()
    before = resident_bytes()
    give_memory_back()
    assert resident_bytes() < before - 100 * 2**20
    assert len(kept) == 200
