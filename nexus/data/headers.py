"""How long a row is, from the headers of its media: nothing is decoded but the first frame of a film.

A medium is stood in for by an array of its shape that takes no memory, and the row is rendered as for training: the
formulas of tokens and windows stay where they are. Lengths are exact where a header counts samples (wav, aiff, flac,
ogg) and for pictures; of other sound and of films they may be off by a position, since containers round durations.
Where a header says nothing of the duration, the file is decoded after all.
"""

import logging
import math
from array import array
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from av.stream import Disposition
from PIL import ExifTags

from nexus.data.chat import ChatTokenizer, render
from nexus.data.stream import Lengths
from nexus.errors import BadMedia
from nexus.media import HEAD_BYTES, load_audio
from nexus.organs import ModelConfig
from nexus.sight import PICTURES, QUIET, check_pixels, load_video, refuse_frames
from nexus.source import (
    MISSING_SECONDS,
    Limits,
    declared_seconds,
    decoded_frames,
    first_stream,
    open_container,
    open_source,
    refuse_long,
)
from nexus.types import Audio, Image, Part, Sample, Turn, Video

RATE_HZ, FRAME = 16_000, 160  # of what is heard; samples per mel frame, as in `nexus.mel`, which would load torch
DEFAULT_FPS = 2.0  # of films for a model without eyes, which will refuse them
COUNTED = (b"RIFF", b"RIFX", b"RF64", b"FORM", b"OggS", b"fLaC")  # sound whose header, or last page, counts samples
SIDEWAYS = (5, 6, 7, 8)  # orientations of EXIF that exchange height and width


class RowLength(NamedTuple):
    """One row of `Lengths`."""

    tokens: int
    audio_seconds: float
    windows: int
    longest_seconds: float


def limits_for(specs: ModelConfig) -> Limits:
    """What a model takes of sound and films, and the usual limits for the rest."""
    limits = Limits()
    if specs.hearing is not None:
        limits = replace(limits, max_audio_seconds=specs.hearing.max_seconds)
    if specs.vision is not None:
        limits = replace(limits, max_video_frames=specs.vision.max_frames)
    return limits


def frames_per_second(specs: ModelConfig) -> float:
    """At how many frames a second a model sees films."""
    return specs.vision.frames_per_second if specs.vision else DEFAULT_FPS


def row_length(sample: Sample, tokenizer: ChatTokenizer, specs: ModelConfig) -> RowLength:
    """The length of a row whose media are files or in memory.

    Raises BadMedia for a header that cannot be read or breaks a limit, BadRecord for what the model cannot take.
    """
    row = render(_outlined(sample, specs), tokenizer, specs)
    heard = [_windows(part, specs) for part in row.media if isinstance(part, Audio)]
    windows = [seconds for item in heard for seconds in item]
    longest = max(windows, default=0.0)
    if windows and specs.hearing is not None and specs.hearing.encoder.pad_to_window:
        longest = specs.hearing.encoder.window_seconds
    return RowLength(len(row.tokens), sum(windows), len(windows), longest)


def lengths_of(rows: Iterable[RowLength]) -> Lengths:
    """Rows' lengths as columns."""
    numbers = array("d", (number for row in rows for number in row))  # not a list: there may be millions
    table = np.frombuffer(numbers, np.float64).reshape(-1, len(RowLength._fields))
    tokens, seconds, windows, longest = table.T
    return Lengths(tokens.astype(np.int64), seconds, windows.astype(np.int64), longest)


def _outlined(sample: Sample, specs: ModelConfig) -> Sample:
    """The sample with empty arrays of the right shapes in place of what the model is shown. Raises BadMedia."""
    limits, fps = limits_for(specs), frames_per_second(specs)
    return _with_parts(sample, lambda part: _outline(part, limits, fps))


def _with_parts(sample: Sample, change: Callable[[Part], Part]) -> Sample:
    """The sample with what the model is shown changed; the sound of its answers is none of it."""
    turns = (
        Turn(turn.role, tuple(part if _is_said(turn, part) else change(part) for part in turn.parts))
        for turn in sample.turns
    )
    return replace(sample, turns=tuple(turns))


def _is_said(turn: Turn, part: Part) -> bool:
    return turn.role == "assistant" and isinstance(part, Audio)


def _windows(part: Audio, specs: ModelConfig) -> list[float]:
    assert specs.hearing is not None and part.samples is not None
    return [n // FRAME / 100 for n in specs.hearing.windows_for(len(part.samples))]


def _outline(part: Part, limits: Limits, fps: float) -> Part:
    match part:
        case Audio(samples=None, path=Path() as path):
            num_samples = _num_samples(path, limits)
            return replace(part, samples=np.broadcast_to(np.float32(0), num_samples), rate_hz=RATE_HZ)
        case Image(pixels=None, path=Path() as path):
            return replace(part, pixels=np.broadcast_to(np.uint8(0), (*_picture_size(path, limits), 3)))
        case Video(frames=None, path=Path() as path):
            return replace(part, frames=np.broadcast_to(np.uint8(0), (*_film_size(path, limits, fps), 3)), fps=fps)
    return part


def _num_samples(path: Path, limits: Limits) -> int:
    """Samples that a sound has at 16 kHz."""
    with open_source(path, "sound", limits) as (file, name):
        head = file.read(HEAD_BYTES)
        file.seek(0)
        if head[:4] in COUNTED:
            try:
                with soundfile.SoundFile(file.fileno(), closefd=False) as opened:
                    frames, rate_hz = opened.frames, opened.samplerate
            except (soundfile.LibsndfileError, RuntimeError):
                raise BadMedia(f"{name}: the header is damaged or names an unknown codec; convert it to wav") from None
            seconds: float | None = frames / rate_hz
        else:
            with open_container(file, name, "sound") as container:
                stream = first_stream(container.streams.audio, name, "sound", "give a recording")
                seconds = declared_seconds(container, stream, head)
            frames, rate_hz = round((seconds or 0.0) * RATE_HZ), RATE_HZ
    if seconds is None:
        samples = load_audio(path, RATE_HZ, limits).samples
        assert samples is not None
        return len(samples)
    if seconds > limits.max_audio_seconds:
        refuse_long(name, "sound", f"{seconds:.1f} s", limits.max_audio_seconds)
    if frames == 0:
        raise BadMedia(f"{name}: holds no samples; record it again")
    return round(frames * RATE_HZ / rate_hz)


def _picture_size(path: Path, limits: Limits) -> tuple[int, int]:
    """Height and width as the picture is shown."""
    with open_source(path, "a picture", limits) as (file, name):
        head = file.read(16)
        file.seek(0)
        logging.getLogger("PIL").addHandler(QUIET)
        for magic, reader in PICTURES:
            if head.startswith(magic) and (magic != b"RIFF" or head[8:12] == b"WEBP"):
                try:
                    picture = reader(file)
                    turned = picture.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
                except Exception:  # Pillow's readers raise nearly any type on damaged data
                    raise BadMedia(f"{name}: the picture's header is damaged; copy or export it again") from None
                check_pixels(name, picture.width, picture.height, limits)
                return (picture.width, picture.height) if turned else (picture.height, picture.width)
    raise BadMedia(f"{name}: is no PNG, JPEG, WebP, BMP, GIF or TIFF picture; convert it to PNG")


def _film_size(path: Path, limits: Limits, fps: float) -> tuple[int, int, int]:
    """Number, height and width of a film's frames at `fps`."""
    with open_source(path, "a film", limits) as (file, name), open_container(file, name, "film") as container:
        films = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        stream = first_stream(films, name, "film", "give it as audio, or give a video file")
        seconds = declared_seconds(container, stream, b"")
        check_pixels(name, stream.width, stream.height, limits)
        if seconds:
            if seconds > limits.max_video_seconds + MISSING_SECONDS:
                refuse_long(name, "film", f"{seconds:.1f} s", limits.max_video_seconds)
            frames = max(1, math.ceil(seconds * fps - 1e-6))
            if frames > limits.max_video_frames:
                refuse_frames(name, f"{seconds:.1f} s", fps, limits)
            first = next(decoded_frames(container, stream, name, "film"), None)
            if first is None:
                raise BadMedia(f"{name}: not one frame can be decoded; export it again")
            size = (first.width, first.height) if first.rotation % 180 else (first.height, first.width)
            return frames, *size
    film = load_video(path, limits, fps).frames
    assert film is not None
    return len(film), film.shape[1], film.shape[2]
