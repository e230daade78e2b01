"""Speech as it sounds elsewhere: in rooms, in noise, at another speed, over a telephone, under a second speaker.

A record is changed by draws from its id alone, so every try of a row gets its own surroundings and a run made again
gets the same ones. Everything drawn is written into `meta["augment"]`. The order is that of the world: the speaker
(speed), the room, the noise, the line (codec).
"""

import hashlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import av
import numpy as np
import soxr
from pydantic import Field, model_validator

from nexus.errors import BadConfig, BadMedia
from nexus.media import load_audio, resample
from nexus.organs import Positive, Strict
from nexus.recipe import fingerprint
from nexus.synth.noise import RATE_HZ, Clip, at_snr, in_room, surroundings
from nexus.synth.records import Record, Rejected, content_id
from nexus.types import Audio

Portion = Annotated[float, Field(ge=0, le=1)]
Line = Literal["telephone", "opus", "mp3"]

TELEPHONE_HZ = (300.0, 3400.0)
TELEPHONE_RATE_HZ = 8_000
MU = 255.0  # G.711
OPUS_RATE_HZ, MP3_RATE_HZ = 48_000, 16_000
BIT_RATES = {"libopus": 16_000, "libmp3lame": 32_000}  # a poor call, a poor download: higher rates are not heard
PAUSE_DB = -40.0  # below the loudest frame: pauses, which say nothing about how loud a speaker is
FRAME = 320  # samples; 20 ms at 16 kHz


class NoiseConfig(Strict):
    """One category of noise: how far speech stands above it (lowest, highest), how often it is drawn."""

    snr_db: tuple[float, float]
    weight: Positive = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> "NoiseConfig":
        if self.snr_db[0] > self.snr_db[1]:
            raise ValueError(f"snr_db is (lowest, highest), given {list(self.snr_db)}")
        return self


class AugmentConfig(Strict):
    """What may happen to a sample, and how often: shares are those of all samples, drawn independently.

    `folder` holds noises and rooms as `nexus.synth.noise.surroundings` reads them; categories of it that `noises`
    does not name are not used. `clips` keeps noises apart that a test is to be made with.
    """

    folder: str | None = None
    clips: Literal["all", "train", "held_out"] = "all"
    noises: dict[str, NoiseConfig] = Field(default_factory=dict)  # by category
    noise_share: Portion = 0.0
    room_share: Portion = 0.0
    speed: tuple[Positive, Positive] = (0.9, 1.1)  # factor; pitch moves with it, as with a tape
    speed_share: Portion = 0.0
    lines: dict[Line, Portion] = Field(default_factory=dict)  # codec -> share; they exclude each other
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> "AugmentConfig":
        if bool(self.noise_share) != bool(self.noises):
            raise ValueError(
                "noises (category: {snr_db: [low, high]}) go with a noise_share above 0; give both or none"
            )
        if (self.noise_share or self.room_share) and self.folder is None:
            raise ValueError("noise_share and room_share need `folder`, which holds noises and rooms; name it")
        if self.speed[0] > self.speed[1]:
            raise ValueError(f"speed is (slowest, fastest), given {list(self.speed)}")
        if sum(self.lines.values()) > 1 + 1e-9:
            raise ValueError(f"the shares of lines sum to {sum(self.lines.values()):g}, at most 1 is possible")
        return self


class Augment:
    """The step. Rejects `silent` speech, against which no noise can be measured, and `unreadable` sound."""

    name = "augment"

    def __init__(self, config: AugmentConfig, noises: dict[str, tuple[Clip, ...]], rooms: tuple[Clip, ...]) -> None:
        self._config, self._noises, self._rooms = config, noises, rooms
        clips = [*rooms, *(clip for members in noises.values() for clip in members)]
        content = {clip.name: _digest(clip) for clip in clips}
        self._fingerprint = fingerprint([config.model_dump(mode="json", exclude={"folder"}), content])

    @property
    def fingerprint(self) -> str:
        """Over every setting and the content of every noise and room; where they lie does not matter."""
        return self._fingerprint

    def setup(self) -> None:
        """Nothing to load: clips are read when they are first drawn."""

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        """Each record with its sound changed and `meta["augment"]`, in order."""
        return [self._augmented(record) for record in records]

    def _augmented(self, record: Record) -> Record | Rejected:
        assert record.sound is not None, f"record {record.id} reaches augment without sound"
        sound = record.sound
        if sound.samples is None:
            assert sound.path is not None
            try:
                sound = load_audio(sound.path)
            except BadMedia as error:
                return Rejected(record, "unreadable", {"error": str(error)})
        assert sound.samples is not None
        wave, rate_hz = sound.samples, sound.rate_hz
        if not np.any(wave):
            return Rejected(record, "silent", {"seconds": sound.seconds})
        rng = np.random.default_rng(int(content_id("augment", self._config.seed, record.id), 16))
        wave, speed = self._in_time(wave, rate_hz, rng)
        wave, room = self._in_room(wave, rate_hz, rng)
        wave, noise = self._in_noise(wave, rate_hz, rng)
        wave, line = self._on_line(wave, rate_hz, rng)
        peak = max(1.0, float(np.abs(wave).max()))  # turned down as a whole, never clipped
        made = Audio(samples=(wave / peak).astype(np.float32), rate_hz=rate_hz)
        return record.with_(sound=made).noted(augment={"speed": speed, "room": room, "noise": noise, "line": line})

    # Every draw is made whether or not it is used, so that a share moved in the recipe moves nothing else.
    def _in_time(self, wave: np.ndarray, rate_hz: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
        chosen, speed = rng.random() < self._config.speed_share, rng.uniform(*self._config.speed)
        return (at_speed(wave, rate_hz, speed), speed) if chosen else (wave, 1.0)

    def _in_room(self, wave: np.ndarray, rate_hz: int, rng: np.random.Generator) -> tuple[np.ndarray, str | None]:
        chosen, place = rng.random() < self._config.room_share, rng.random()
        if not chosen:
            return wave, None
        clip = self._rooms[int(place * len(self._rooms))]
        return in_room(wave, resample(clip.sound(), RATE_HZ, rate_hz)), clip.name

    def _in_noise(
        self, wave: np.ndarray, rate_hz: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, dict[str, Any] | None]:
        chosen, of_category, of_file, of_level, of_start = rng.random() < self._config.noise_share, *rng.random(4)
        if not chosen:
            return wave, None
        names = list(self._noises)
        weights = np.cumsum([self._config.noises[name].weight for name in names])
        category = names[int(np.searchsorted(weights, of_category * weights[-1], side="right"))]
        clip = self._noises[category][int(of_file * len(self._noises[category]))]
        low, high = self._config.noises[category].snr_db
        snr_db = low + of_level * (high - low)
        start = int(of_start * len(clip.sound()))
        length = math.ceil(len(wave) * RATE_HZ / rate_hz) + 1
        piece = clip.sound().take(np.arange(start, start + length), mode="wrap")
        about = {"file": clip.name, "category": category, "snr_db": snr_db, "start_seconds": start / RATE_HZ}
        return at_snr(wave, resample(piece, RATE_HZ, rate_hz)[: len(wave)], snr_db), about

    def _on_line(self, wave: np.ndarray, rate_hz: int, rng: np.random.Generator) -> tuple[np.ndarray, str | None]:
        place, passed = rng.random(), 0.0
        for line, share in self._config.lines.items():
            passed += share
            if place < passed:
                return over(wave, rate_hz, line), line
        return wave, None


def build(config: AugmentConfig) -> Augment:
    """The step of a recipe. Reads every noise and room that may be drawn, so that a bad one is found before the run.

    Raises BadRecord for a folder without noise, BadConfig for a category that it has not and for rooms where there
    are none, BadMedia for files that are no sound or are silent.
    """
    if config.folder is None:
        return Augment(config, {}, ())
    around = surroundings(Path(config.folder))
    match config.clips:
        case "train":
            around = around.split()[0]
        case "held_out":
            around = around.split()[1]
    noises = {name: tuple(clip for clip in around.noises if clip.category == name) for name in config.noises}
    for name, clips in noises.items():
        if not clips:
            there = ", ".join(sorted({clip.category for clip in around.noises})) or "none"
            raise BadConfig(
                f"augment.noises: {config.folder} has no {config.clips} clip of category {name!r}; has {there}"
            )
    if config.room_share and not around.rooms:
        raise BadConfig(f"augment.room_share: {config.folder} has no {config.clips} room (rir*.wav); add one or set 0")
    return Augment(config, noises, around.rooms if config.room_share else ())


def _digest(clip: Clip) -> str:
    """Of the file as it lies there; a clip that is no sound is refused."""
    clip.sound()
    with clip.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def at_speed(wave: np.ndarray, rate_hz: int, speed: float) -> np.ndarray:
    """f32 [W] played `speed` times as fast: f32 [W / speed], pitch moved with it (soxr)."""
    made: np.ndarray = soxr.resample(wave, rate_hz * speed, rate_hz, quality="HQ")
    return made


def overlapped(speech: np.ndarray, other: np.ndarray, gain_db: float, share: float) -> np.ndarray:
    """f32 [W]: a second speaker begins where the last `share` (0..1] of `speech` begins, `gain_db` above its level.

    Levels are those of the active parts, pauses left out. `other` f32 [V] at the same rate is cut where the speech
    ends and simply ends where it is shorter. The peak may pass 1. Raises BadMedia where one of them is silent.
    """
    assert 0 < share <= 1, f"share {share} is outside 0..1"
    start = len(speech) - round(share * len(speech))
    levels = active_rms(speech), active_rms(other)
    if not all(levels):
        raise BadMedia("two speakers overlap only where both speak: one sound is silent; give another")
    mixed = speech.astype(np.float32, copy=True)
    voice = other[: len(speech) - start]
    mixed[start : start + len(voice)] += voice * np.float32(levels[0] / levels[1] * 10 ** (gain_db / 20))
    return mixed


def active_rms(wave: np.ndarray) -> float:
    """Root mean square over the frames (20 ms at 16 kHz) within 40 dB of the loudest one; 0 for silence."""
    whole = len(wave) // FRAME * FRAME or len(wave)
    power = np.square(wave[:whole], dtype=np.float64).reshape(-1, min(FRAME, whole) or 1).mean(1)
    loud = power[power >= power.max(initial=0.0) * 10 ** (PAUSE_DB / 10)]
    return float(np.sqrt(loud.mean())) if len(loud) else 0.0


def over(wave: np.ndarray, rate_hz: int, line: Line) -> np.ndarray:
    """f32 [W] as it comes out of a line: `telephone` (8 kHz, 300-3400 Hz, 8-bit mu-law), `opus` at 16 or `mp3` at 32
    kbit/s. Same rate, same length, not delayed."""
    match line:
        case "telephone":
            made = _by_telephone(wave, rate_hz)
        case "opus":
            made = _by_file(wave, rate_hz, OPUS_RATE_HZ, "webm", "libopus")
        case "mp3":
            made = _by_file(wave, rate_hz, MP3_RATE_HZ, "mp3", "libmp3lame")
    return np.pad(made[: len(wave)], (0, max(0, len(wave) - len(made))))


def _by_telephone(wave: np.ndarray, rate_hz: int) -> np.ndarray:
    narrow = resample(wave, rate_hz, TELEPHONE_RATE_HZ)
    hz = np.fft.rfftfreq(len(narrow), 1 / TELEPHONE_RATE_HZ)
    low, high = TELEPHONE_HZ
    band = 1 / np.sqrt((1 + (low / np.maximum(hz, 1.0)) ** 8) * (1 + (hz / high) ** 32))
    narrow = np.fft.irfft(np.fft.rfft(narrow) * band, len(narrow))
    peak = max(1.0, float(np.abs(narrow).max(initial=0.0)))
    coded = np.sign(narrow) * np.log1p(MU * np.abs(narrow / peak)) / math.log1p(MU)
    coded = np.round(coded * 127) / 127
    heard = np.sign(coded) * np.expm1(np.abs(coded) * math.log1p(MU)) / MU * peak
    return resample(heard.astype(np.float32), TELEPHONE_RATE_HZ, rate_hz)


def _by_file(wave: np.ndarray, rate_hz: int, coding_hz: int, container: str, codec: str) -> np.ndarray:
    peak = np.float32(max(1.0, float(np.abs(wave).max(initial=0.0))))
    samples = resample(wave / peak, rate_hz, coding_hz)[None]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream: Any = file.add_stream(codec, rate=coding_hz)
        stream.layout, stream.bit_rate, stream.format = (
            "mono",
            BIT_RATES[codec],
            "flt" if codec == "libopus" else "fltp",
        )
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format=stream.format.name, layout="mono")
        frame.sample_rate, frame.pts = coding_hz, 0
        fifo = av.AudioFifo()
        fifo.write(frame)
        stream.codec_context.open()
        while piece := fifo.read(stream.codec_context.frame_size, partial=True):
            file.mux(stream.encode(piece))
        file.mux(stream.encode())
    decoded = load_audio(buffer.getvalue(), rate_hz).samples
    assert decoded is not None
    return decoded * peak
