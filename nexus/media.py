"""Every part of a turn, loaded (`load`); and sound: decoding, resampling, and the wav files we write.

Nothing is cut, clipped or replaced on loading: a file is understood whole or refused with `BadMedia`. Damage that a
codec conceals by design (a click in an mp3, a smeared block in a film) cannot be seen from here.
"""

import io
import math
import os
import secrets
import struct
import wave
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import soundfile
import soxr

from nexus.errors import BadMedia
from nexus.sight import check_pixels, load_image, load_video, refuse_frames
from nexus.source import (
    DEFAULT,
    MISSING_SECONDS,
    Limits,
    Source,
    declared_seconds,
    decoded_frames,
    first_stream,
    open_container,
    open_source,
    refuse_cut,
    refuse_damaged,
    refuse_long,
)
from nexus.types import Audio, Image, Part, Text, Video

NO_SAMPLES = np.zeros(0, np.float32)
PCM_BLOCK_VALUES = 2**18  # decoded at a time, over all channels: 1 MiB
MAX_CHUNKS = 10_000  # real files hold a handful; bounds the walk through a hostile one
HEAD_BYTES = 2**20  # searched for an mp3's frame count, which may stand behind a cover picture
STREAMED = 0xFFFFFFFF  # the length that programs writing wav into a pipe put into the header


@dataclass(frozen=True)
class _Sound:
    """An opened sound: `blocks` yields f32 [frames, channels]; `seconds` is what the file declares, if it does."""

    rate_hz: int
    channels: int
    seconds: float | None
    blocks: Iterator[np.ndarray]


def load_audio(source: Source, rate_hz: int = 16_000, limits: Limits = DEFAULT) -> Audio:
    """Decode a file (or its bytes) to mono f32 [W] at `rate_hz`: channels averaged, soxr HQ, integers scaled to ±1.

    wav, aiff and ogg are read by libsndfile (exact lengths), everything else (flac, mp3, m4a, webm) by FFmpeg.
    Floating-point sound beyond ±1 keeps its values (resampling may overshoot ±1 too); silence is legal. Decoding stops
    where the limits end, so memory is bounded by `max_audio_seconds` whatever the file claims.
    Raises BadMedia: missing, empty, damaged, cut off, not finite, too short, too long.
    """
    assert rate_hz > 0
    with open_source(source, "sound", limits) as (file, name):
        sound = open_sound(file, name)
        check_declared_sound(sound, name, limits)
        resampler, pieces, frames = StreamResampler(sound.rate_hz, rate_hz), [], 0
        for block in sound.blocks:
            frames += len(block)
            if frames > limits.max_audio_seconds * sound.rate_hz:
                refuse_long(name, "sound", f"more than {frames / sound.rate_hz:.1f} s", limits.max_audio_seconds)
            check_values(block, name, limits)
            pieces.append(resampler.push(block.mean(axis=1, dtype=np.float32)))
        pieces.append(resampler.finish())
    if sound.seconds is not None and frames / sound.rate_hz < sound.seconds - MISSING_SECONDS:
        refuse_cut(name, sound.seconds, frames / sound.rate_hz)
    _check_short(name, frames, sound.rate_hz, limits)
    path = None if isinstance(source, bytes) else Path(source)
    return Audio(path=path, samples=np.concatenate(pieces), rate_hz=rate_hz)


def open_sound(file: BinaryIO, name: str) -> _Sound:
    head = file.read(12)
    if head[:4] == b"OggS":
        _check_last_ogg_page(file, name)
    in_chunks = head[:4] in (b"RIFF", b"RIFX", b"RF64", b"FORM") and head[8:12] in (b"WAVE", b"AIFF", b"AIFC")
    if in_chunks:
        _check_chunks(file, head, name)
    file.seek(0)
    if in_chunks or head[:4] == b"OggS":
        return _open_with_libsndfile(file, name)
    return _open_with_ffmpeg(file, file.read(HEAD_BYTES), name)


def _open_with_libsndfile(file: BinaryIO, name: str) -> _Sound:
    # A descriptor, not the file object: soundfile would take headerless sound for granted from a name ending in .raw.
    target = file if isinstance(file, io.BytesIO) else file.fileno()
    try:
        opened = soundfile.SoundFile(target, closefd=False)
    except (soundfile.LibsndfileError, RuntimeError):
        raise BadMedia(f"{name}: the header is damaged or names an unknown codec; convert it to 16-bit wav") from None

    def blocks() -> Iterator[np.ndarray]:
        frames = 0
        with opened:
            while True:
                try:
                    block = opened.read(max(1, PCM_BLOCK_VALUES // opened.channels), dtype="float32", always_2d=True)
                except (soundfile.LibsndfileError, RuntimeError):
                    refuse_damaged(name, "sound", frames / opened.samplerate)
                if not len(block):
                    break
                frames += len(block)
                yield block
        if frames < opened.frames:
            refuse_cut(name, declared, frames / opened.samplerate)

    declared = opened.frames / opened.samplerate
    return _Sound(opened.samplerate, opened.channels, declared, blocks())


def _open_with_ffmpeg(file: BinaryIO, head: bytes, name: str) -> _Sound:
    container = open_container(file, name, "sound")
    stream = first_stream(container.streams.audio, name, "sound", "give a recording")

    def blocks() -> Iterator[np.ndarray]:
        with container:
            floats = av.AudioResampler(format="flt")  # interleaved: PyAV reads planes of 8 channels out of bounds
            for frame in decoded_frames(container, stream, name, "sound"):
                try:
                    for block in floats.resample(frame):
                        yield block.to_ndarray().reshape(-1, block.layout.nb_channels)
                except (av.FFmpegError, ValueError):
                    raise BadMedia(f"{name}: rate or channels change within the sound; convert it to wav") from None

    return _Sound(stream.rate, stream.channels, declared_seconds(container, stream, head), blocks())


def check_declared_sound(sound: _Sound, name: str, limits: Limits) -> None:
    if not limits.min_rate_hz <= sound.rate_hz <= limits.max_rate_hz:
        expected = f"{limits.min_rate_hz:,} to {limits.max_rate_hz:,} (min_rate_hz, max_rate_hz)"
        raise BadMedia(f"{name}: {sound.rate_hz:,} samples per second, expected {expected}; export it again")
    if not 1 <= sound.channels <= limits.max_channels:
        raise BadMedia(f"{name}: {sound.channels} channels, limit {limits.max_channels} (max_channels); mix it down")
    if sound.seconds is not None and sound.seconds > limits.max_audio_seconds + MISSING_SECONDS:
        refuse_long(name, "sound", f"{sound.seconds:.1f} s", limits.max_audio_seconds)


def check_values(samples: np.ndarray, name: str, limits: Limits) -> None:
    peak = float(np.abs(samples).max(initial=0.0))
    if not math.isfinite(peak):
        raise BadMedia(f"{name}: holds samples that are not finite numbers (NaN or infinity); export it again")
    if peak > limits.max_audio_peak:
        limit = f"full scale is 1, the limit {limits.max_audio_peak:g} (max_audio_peak)"
        raise BadMedia(f"{name}: peaks at {peak:.6g}, {limit}; integers stored as floats must be divided first")


def _check_short(name: str, frames: int, rate_hz: int, limits: Limits) -> None:
    if frames == 0:
        raise BadMedia(f"{name}: holds no samples; record it again")
    if frames < limits.min_audio_seconds * rate_hz - 1e-6:
        needed = f"at least {1000 * limits.min_audio_seconds:g} ms are needed (min_audio_seconds)"
        raise BadMedia(f"{name}: {1000 * frames / rate_hz:.3g} ms of sound, {needed}; give a longer recording")


def _check_chunks(file: BinaryIO, head: bytes, name: str) -> None:
    """Compare what a wav or aiff header promises with the file: libsndfile silently reads what is there."""
    order = "<" if head[:4] in (b"RIFF", b"RF64") else ">"
    size = file.seek(0, os.SEEK_END)
    form_bytes = struct.unpack(order + "I", head[4:8])[0]
    end = size if form_bytes == STREAMED else min(size, 8 + form_bytes)  # what follows the form is not ours to judge
    at, tag, length, long_bytes = 12, b"", 0, STREAMED
    for _ in range(MAX_CHUNKS):
        file.seek(at)
        header = file.read(32)
        if len(header) < 8:
            return  # no sound at all, which libsndfile reports
        tag, length = struct.unpack(order + "4sI", header[:8])
        if tag in (b"data", b"SSND"):
            break
        if tag == b"ds64" and len(header) == 32:
            long_bytes = struct.unpack("<Q", header[16:24])[0]
        at += 8 + length + length % 2
    length = long_bytes if length == STREAMED else length
    if length == STREAMED:
        return
    held = size - at - 8
    if length > held:
        raise BadMedia(f"{name}: cut off, the header promises {length:,} bytes, the file holds {held:,}; copy it again")
    file.seek(at + 8 + length)
    following = file.read(5).replace(b"\0", b" ").decode("latin1")  # zeros pad some files; some forget the pad byte
    names_chunk = any(tag.isascii() and tag.isprintable() for tag in (following[:4], following[1:]))
    if end - at - 8 - length >= 8 and not names_chunk:
        raise BadMedia(f"{name}: the header promises {length:,} bytes of sound, but {held:,} follow; export it again")


def _check_last_ogg_page(file: BinaryIO, name: str) -> None:
    """Refuse a cut-off Ogg file: the last whole page (at most 65,307 bytes) would pass for the end of the sound."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 65_307))
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
        raise BadMedia(f"{name}: the last page of the Ogg file is incomplete; it was cut off, copy it again")


def load(part: Part, limits: Limits = DEFAULT, rate_hz: int = 16_000, fps: float = 2.0) -> Part:
    """The same part with its media in memory: files are decoded, what is loaded is checked, sound comes at `rate_hz`.

    Raises BadMedia as the loaders do, and for arrays of a wrong type, shape or value.
    """
    match part:
        case Text():
            return part
        case Audio(samples=None, path=Path() as path):
            return load_audio(path, rate_hz, limits)
        case Image(pixels=None, path=Path() as path):
            return load_image(path, limits)
        case Video(frames=None, path=Path() as path):
            return load_video(path, limits, fps)
        case Audio(samples=np.ndarray() as samples):
            _check_array("sound", samples, np.float32, "W")
            if not limits.min_rate_hz <= part.rate_hz <= limits.max_rate_hz:
                raise BadMedia(f"sound: rate_hz is {part.rate_hz}; set the rate that the samples were recorded with")
            _check_short("sound", len(samples), part.rate_hz, limits)
            if part.seconds > limits.max_audio_seconds:
                refuse_long("sound", "sound", f"{part.seconds:.1f} s", limits.max_audio_seconds)
            check_values(samples, "sound", limits)
            return replace(part, samples=resample(samples, part.rate_hz, rate_hz), rate_hz=rate_hz)
        case Image(pixels=np.ndarray() as pixels):
            _check_array("picture", pixels, np.uint8, "H W 3")
            check_pixels("picture", pixels.shape[1], pixels.shape[0], limits)
            return part
        case Video(frames=np.ndarray() as frames):
            _check_array("film", frames, np.uint8, "N H W 3")
            check_pixels("film", frames.shape[2], frames.shape[1], limits)
            if not 0 < part.fps < math.inf:
                raise BadMedia(f"film: fps is {part.fps}; set the frames per second of the array")
            if len(frames) > limits.max_video_frames:
                refuse_frames("film", f"{len(frames) / part.fps:.1f} s", part.fps, limits)
            return part
    raise BadMedia(f"{type(part).__name__.lower()} part: expected a Path or a loaded array, found neither; set one")


def _check_array(kind: str, array: np.ndarray, dtype: type, shape: str) -> None:
    sizes = shape.split()
    fits = array.ndim == len(sizes) and all(array.shape) and (sizes[-1] != "3" or array.shape[-1] == 3)
    if array.dtype != dtype or not fits:
        expected = f"{np.dtype(dtype)} [{', '.join(sizes)}] with no dimension 0"
        raise BadMedia(f"{kind}: array of {array.dtype} {list(array.shape)}, expected {expected}; convert it")


def resample(samples: np.ndarray, rate_hz: int, to_hz: int) -> np.ndarray:
    """Sound f32 [W] at another rate: f32 [W'], W' = W * to_hz / rate_hz rounded (soxr, high quality)."""
    return samples if rate_hz == to_hz else soxr.resample(samples, rate_hz, to_hz, quality="HQ")


class StreamResampler:
    """`resample` for sound that arrives in pieces: all outputs joined equal the offline result."""

    def __init__(self, rate_hz: int, to_hz: int) -> None:
        same = rate_hz == to_hz
        self._stream = None if same else soxr.ResampleStream(rate_hz, to_hz, 1, dtype="float32", quality="HQ")

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Take f32 [W], give what is ready (f32, possibly empty: the filter looks ahead)."""
        return samples if self._stream is None else self._stream.resample_chunk(samples)

    def finish(self) -> np.ndarray:
        """The rest, f32; the resampler must not be used afterwards."""
        return self._stream.resample_chunk(NO_SAMPLES, last=True) if self._stream else NO_SAMPLES


def wav_bytes(samples: np.ndarray, rate_hz: int) -> bytes:
    """A mono 16-bit wav file of f32 [W]; values beyond ±1 are clipped to full scale."""
    assert samples.ndim == 1 and np.isfinite(samples).all(), "sound to write must be finite f32 [W]"
    pcm = np.clip(np.round(samples * 32768.0), -32768, 32767).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(pcm.tobytes())
    return buffer.getvalue()


def write_wav(path: Path | str, samples: np.ndarray, rate_hz: int) -> None:
    """Write `wav_bytes` so that the file is either whole or absent. Raises BadMedia where it cannot be written."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        partial.write_bytes(wav_bytes(samples, rate_hz))
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BadMedia(f"{path}: cannot be written ({error.strerror}); choose an existing folder") from None
