"""The factory on Ray, a real one on this machine: the same results as in processes, also when an actor is killed."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from factory_steps import Speak, Trouble, run, texts
from test_synth_pipeline import Unloadable, entries_of, sentences

from nexus.errors import BadConfig
from nexus.synth.produce import Workers
from nexus.synth.records import Record, Rejected

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
TWO = Workers("ray", 2)


@pytest.fixture(autouse=True)
def actors_find_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent)]))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@dataclass
class WhoAmI:
    """Notes in `log` which process it runs in."""

    log: Path
    seconds: float = 0.05
    name: str = "who"
    fingerprint: str = "who"

    def setup(self) -> None:
        with self.log.open("a") as log:
            log.write(f"{os.getpid()}\n")

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        time.sleep(self.seconds)
        return list(records)


def test_one_of_two_actors_is_killed_and_nothing_is_lost_or_there_twice(tmp_path: Path) -> None:
    rows = sentences(120)
    out, pids, spoken = tmp_path / "out", tmp_path / "pids", tmp_path / "spoken"
    killer = subprocess.Popen([sys.executable, "-c", KILLER, str(pids), str(spoken)])
    run(texts(*rows), out, WhoAmI(pids), Speak(spoken), workers=TWO)
    assert killer.wait(60) == 0
    assert len(pids.read_text().split()) >= 2, "of two actors one was killed; another may have taken its place"
    entries = entries_of(out)
    assert [entry["text"] for entry in entries] == rows
    assert {entry["decision"] for entry in entries} == {"kept"}
    assert len(list((out / "audio").rglob("*.flac"))) == len({entry["id"] for entry in entries}) == 120


KILLER = """
import os, signal, sys, time
from pathlib import Path
pids, spoken = map(Path, sys.argv[1:])
while not spoken.exists() or len(spoken.read_text().split()) < 12:
    time.sleep(0.02)
os.kill(int(pids.read_text().split()[0]), signal.SIGKILL)
"""


def test_a_sample_that_kills_its_actor_is_rejected_alone(tmp_path: Path) -> None:
    run(texts("alpha", "die", "bravo"), tmp_path / "out", Trouble(), workers=TWO)
    decisions = {entry["text"]: entry.get("reason") for entry in entries_of(tmp_path / "out")}
    assert decisions == {"alpha": None, "die": "worker_died", "bravo": None}


def test_what_ends_a_run_in_processes_ends_it_on_ray(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no such model"):
        run(texts("alpha"), tmp_path / "out", Unloadable(), workers=TWO)
    with pytest.raises(OSError, match="No space left"):
        run(texts("full"), tmp_path / "more", Trouble(), workers=TWO)


def test_a_running_cluster_is_used_by_its_address_and_left_running(tmp_path: Path) -> None:
    context = ray.init(address="local", num_cpus=2, include_dashboard=False)
    address = context.address_info["address"]
    command = [sys.executable, str(Path(__file__).parent / "on_cluster.py"), str(tmp_path), address]
    try:
        subprocess.run(command, check=True, timeout=200)
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    assert [entry["text"] for entry in entries_of(tmp_path / "out")] == sentences(20)


def test_an_address_where_no_cluster_is_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"no cluster at 127.0.0.1:1: ") as caught:
        run(texts("alpha"), tmp_path / "out", Speak(), workers=Workers("ray", 1, "127.0.0.1:1"))
    assert "\n" not in str(caught.value)
