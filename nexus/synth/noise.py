"""Real noise and real rooms: a folder of recordings, and what is done with them to speech f32 [W].

Knows neither tasks nor models. Every draw is made by the random numbers it is given.
"""

import functools
import hashlib
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nexus.errors import BadMedia, BadRecord
from nexus.media import load_audio
from nexus.recipe import fingerprint

RATE_HZ = 16_000
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
HELD_OUT_SHARE = 0.4  # of a category's clips, at least one where there are two
ROOM_WORDS = ("rir", "rirs", "brir", "brirs")  # how published sets call room impulse responses
MAX_CLIPS_IN_MEMORY = 64


@dataclass(frozen=True)
class Clip:
    """A recording of noise or of a room's impulse response. `name` is its path below the folder, with `/`."""

    name: str
    category: str
    path: Path

    def sound(self) -> np.ndarray:
        """Sound f32 [W] at 16 kHz. Raises BadMedia for a file that cannot be decoded, or is silent."""
        return _sound(self.path)


@dataclass(frozen=True)
class Surroundings:
    """The clips of a folder: noises, and impulse responses of rooms."""

    noises: tuple[Clip, ...]
    rooms: tuple[Clip, ...]

    def fingerprint(self) -> str:
        """Sixteen hex digits over names and bytes of all clips, wherever the folder lies."""
        digests = {}
        for clip in (*self.noises, *self.rooms):
            with clip.path.open("rb") as file:
                digests[clip.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return fingerprint(digests)

    def split(self) -> tuple["Surroundings", "Surroundings"]:
        """(what training may hear, what is held out), by the hash of the clips' names: where a clip goes changes only
        when clips of its own category come or go. A category of one clip belongs to training."""
        pairs = [_split(self.noises), _split(self.rooms)]
        (noises, held_noises), (rooms, held_rooms) = pairs
        return Surroundings(noises, rooms), Surroundings(held_noises, held_rooms)


def surroundings(root: Path) -> Surroundings:
    """Noises and rooms of a folder: every wav, flac, ogg or mp3 in it or below it, by name.

    A clip is a room where its file name, or the folder it lies in, has the word "rir" (`rir1.wav`, `rirs/hall.wav`);
    else a noise. Its category is the folder below `root` it lies in, else its file name without number.
    Raises BadRecord for a folder without noise. Nothing is decoded here.
    """
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SOUNDS and path.is_file())
    clips = [_clip(path, root) for path in paths]
    rooms = tuple(clip for clip, is_room in clips if is_room)
    noises = tuple(clip for clip, is_room in clips if not is_room)
    if not noises:
        what = f"holds no noise ({len(rooms)} rooms)" if root.is_dir() else "is no folder"
        raise BadRecord(f"{root}: {what}, expected {', '.join(SOUNDS)} files in it or below it; name the folder")
    return Surroundings(noises, rooms)


def at_snr(speech: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Speech f32 [W] in noise f32 [N] whose power is `snr_db` below the speech's, both over the whole of the speech:
    f32 [W].

    Noise that is shorter than the speech begins anew; of longer noise the first W samples are taken (`excerpt` chooses
    others). Where the sum goes beyond full scale both are made softer together, so that the ratio stays. Silent
    speech stays as it is: it has no ratio to any noise. Raises BadMedia for silent noise.
    """
    heard = np.resize(noise, len(speech))
    speech_power, noise_power = _power(speech), _power(heard)
    if noise_power == 0:
        raise BadMedia("the noise is silent where it is to be mixed in; take another clip or another stretch of it")
    if speech_power == 0:
        return speech
    mixed = speech + heard * np.float32(math.sqrt(speech_power / noise_power / 10 ** (snr_db / 10)))
    return _within_full_scale(mixed)


def excerpt(noise: np.ndarray, length: int, rng: random.Random) -> np.ndarray:
    """A stretch f32 [length] of a noise, from a drawn place on where it is heard; it begins anew where it ends.

    Raises BadMedia for silent noise.
    """
    heard = np.flatnonzero(noise)
    if not len(heard):
        raise BadMedia("the noise is silent, so no stretch of it can be mixed in; take another clip")
    start = int(heard[rng.randrange(len(heard))])
    return noise.take(np.arange(start, start + length), mode="wrap")


def in_room(speech: np.ndarray, impulse: np.ndarray) -> np.ndarray:
    """Speech f32 [W] as it sounds in a room with this impulse response f32 [R]: f32 [W], its power kept.

    The direct sound (the response's peak) stays in its place, so that words begin where they began; reverberation
    beyond the end of the speech is not part of the result. Raises BadMedia for a silent impulse response.
    """
    if _power(impulse) == 0:
        raise BadMedia("the impulse response is silent, so nothing would be heard in this room; take another file")
    direct = int(np.abs(impulse).argmax())
    size = len(speech) + len(impulse) - 1
    size = 1 << (size - 1).bit_length()
    wet = np.fft.irfft(np.fft.rfft(speech, size) * np.fft.rfft(impulse, size), size)[direct : direct + len(speech)]
    power = _power(wet)
    if power == 0:
        return speech
    return _within_full_scale((wet * math.sqrt(_power(speech) / power)).astype(np.float32))


@functools.lru_cache(maxsize=MAX_CLIPS_IN_MEMORY)
def _sound(path: Path) -> np.ndarray:
    samples = load_audio(path, RATE_HZ).samples
    assert samples is not None
    if _power(samples) == 0:
        raise BadMedia(f"{path}: is silent, expected noise or an impulse response; remove it from the folder")
    samples.flags.writeable = False  # shared by everyone who asks for it
    return samples


def _clip(path: Path, root: Path) -> tuple[Clip, bool]:
    """The clip of a file, and whether it is a room."""
    relative = path.relative_to(root)
    folder = relative.parent.as_posix() if relative.parent != Path() else ""
    category = folder or re.sub(r"[^a-z]+$", "", relative.stem.lower()) or relative.stem
    words = re.split(r"[^a-z]+", f"{relative.parent.name} {relative.stem}".lower())
    return Clip(relative.as_posix(), category, path), not set(ROOM_WORDS).isdisjoint(words)


def _split(clips: Iterable[Clip]) -> tuple[tuple[Clip, ...], tuple[Clip, ...]]:
    by_category: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        by_category[clip.category].append(clip)
    held: set[Clip] = set()
    for members in by_category.values():
        ranked = sorted(members, key=lambda clip: hashlib.sha256(clip.name.encode()).digest())
        held.update(ranked[: max(1, int(HELD_OUT_SHARE * len(ranked)))] if len(ranked) > 1 else [])
    chosen = [clip for members in by_category.values() for clip in members]
    return tuple(clip for clip in chosen if clip not in held), tuple(clip for clip in chosen if clip in held)


def _power(wave: np.ndarray) -> float:
    """Mean square, f64: 0 for silence and for no samples."""
    return float(np.square(wave, dtype=np.float64).mean()) if len(wave) else 0.0


def _within_full_scale(wave: np.ndarray) -> np.ndarray:
    peak = float(np.abs(wave).max(initial=0.0))
    return wave / np.float32(peak) if peak > 1 else wave
