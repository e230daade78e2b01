"""Real processes for tests of training: batches that can be sent to them, and several that train together."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tiny import tiny_model, tiny_picture, tiny_recipe, tiny_sound, tiny_tokenizer

from nexus.model.folder import save_model
from nexus.recipe import Recipe
from nexus.types import Audio, Image, Part, Sample, Text, Turn

ROOT = Path(__file__).resolve().parent.parent
SAID = ("two", "red circle blue square", "five", "left", "seven right plus three", "how many please say what is")


def sample(number: int, kinds: str) -> Sample:
    """A question of words, with sound (`a`), a picture (`i`) or nothing more (`t`), and an answer of some words."""
    kind = kinds[number % len(kinds)]
    media: dict[str, tuple[Audio | Image, ...]] = {
        "a": (tiny_sound(0.3 + 0.1 * (number % 5), number),),
        "i": (tiny_picture(seed=number),),
        "t": (),
    }
    parts: tuple[Part, ...] = (*media[kind], Text("what is two"))
    turns = (Turn("user", parts), Turn("assistant", (Text(SAID[number % len(SAID)]),)))
    return Sample(f"row {number}", "qa", turns)


@dataclass(frozen=True)
class Rows:
    """Two rows a batch: those of rank `rank`, of whose kinds `kinds[rank]` tells; a function of the step alone."""

    kinds: tuple[str, ...]
    rank: int = 0
    world: int = 1
    fingerprint: str = "rows"
    batches_per_epoch: int = 10
    pause_seconds: float = 0.0  # so that a test can act in the midst of a run

    def at(self, step: int) -> list[Sample]:
        """The rows of a step; where one process stands for several ranks, those of all of them."""
        time.sleep(self.pause_seconds)
        ranks = range(len(self.kinds)) if self.world == 1 else [self.rank]
        return [sample(2 * (step * 7 + rank) + n, self.kinds[rank]) for rank in ranks for n in range(1 + rank)]


def recipe_for(*overrides: str) -> Recipe:
    """The narrow tiny recipe with one stage that trains everything that conversations reach, and no displays."""
    stage = (
        "stages=[{name: sft, trainable: ['hearing.*', 'vision.*', 'language.*'], mixture: {chat: 1}, seconds: 0.0,"
        " steps: 20, optim: {rate: 0.001, warmup_steps: 2}}]"
    )
    return tiny_recipe("engine.log=[]", "engine.threads=1", stage, *overrides)


def model_folder(folder: Path) -> Path:
    """A tiny random model with its tokenizer on the disk."""
    save_model(folder, tiny_model(), {"recipe": {"name": "made for a test"}})
    tiny_tokenizer().save(folder / "tokenizer.json")
    return folder


def free_port() -> int:
    """A port of the loopback device that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(code: str, arguments: Sequence[str] = (), world: int = 1) -> list[subprocess.Popen[str]]:
    """`world` processes that run `code` with the environment that torchrun would give them."""
    port, body = str(free_port()), textwrap.dedent(code)
    shared = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", body, *arguments],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def finish(processes: Sequence[subprocess.Popen[str]], seconds: float = 120.0) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of each; those that take longer are killed, and fail the test."""
    try:
        return [(done.returncode, *texts) for done in processes for texts in [done.communicate(timeout=seconds)]]
    finally:
        for process in processes:
            process.kill()
