"""Recordings in real noise, for the question how much of it recognition bears: which noise, how loud, mixed how."""

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nexus.errors import BadRecord
from nexus.media import load_audio
from nexus.synth.noise import RATE_HZ, Clip, at_snr, excerpt, surroundings
from nexus.types import Audio, Part

LEVELS_DB = (20.0, 10.0, 5.0, 0.0)  # of the speech's power above the noise's
CLEAN = "clean"
NOISE_FOLDER = "noise"  # beside the recordings, unless a suite's `noise` names another
HELD_OUT_NOISE = "held-out clips, one and one stretch of it per recording at all levels"


@dataclass(frozen=True)
class Noise:
    """A clip around a recording, which stands `snr_db` above it; `seed` chooses the stretch."""

    path: Path
    snr_db: float
    seed: str

    def around(self, part: Part) -> Part:
        """Sound from a file, with the noise around it; any other part as it is. Raises BadMedia."""
        if not isinstance(part, Audio) or part.path is None:
            return part
        speech = load_audio(part.path, RATE_HZ).samples
        assert speech is not None
        noise = excerpt(Clip("", "", self.path).sound(), len(speech), random.Random(self.seed))
        return Audio(samples=at_snr(speech, noise, self.snr_db), rate_hz=RATE_HZ)


def levels(name: str, folder: Path) -> Iterator[tuple[str, Noise | None]]:
    """("clean", nothing), then ("20 dB", the noise) and so on, for the recording of this name: all its levels in one
    clip and one stretch of it, from those clips of a folder that training leaves alone (`Surroundings.split`).

    Raises BadRecord for a folder that holds no noise, or too little to keep some apart.
    """
    clips = _held_out(folder)
    clip = clips[random.Random(f"clip {name}").randrange(len(clips))]
    yield CLEAN, None
    for snr_db in LEVELS_DB:
        yield f"{snr_db:g} dB", Noise(clip.path, snr_db, f"stretch {name}")


@functools.lru_cache(maxsize=4)
def _held_out(folder: Path) -> tuple[Clip, ...]:
    found = surroundings(folder)
    _, held_out = found.split()
    if not held_out.noises:
        raise BadRecord(
            f"{folder}: holds {len(found.noises)} noise of each category, expected at least 2 of one, so that some "
            "can be kept for tests alone; add clips"
        )
    return held_out.noises
