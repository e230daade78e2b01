"""A file or its bytes, opened within hard limits: what sound, pictures and films share before they differ.

Limits are checked on what a header declares, before decoding, and again on what is decoded, because headers lie.
Every refusal is one line of `BadMedia` that names the file, both sides and the next step.
"""

import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import av

from nexus.errors import BadConfig, BadMedia

Source = Path | str | bytes


@dataclass(frozen=True)
class Limits:
    """What we are willing to decode. Peaks are relative to full scale (1.0)."""

    max_file_bytes: int = 512 * 2**20
    min_audio_seconds: float = 0.02
    max_audio_seconds: float = 600.0
    min_rate_hz: int = 1_000
    max_rate_hz: int = 768_000
    max_channels: int = 64
    max_audio_peak: float = 16.0
    max_image_pixels: int = 50_000_000
    max_video_seconds: float = 600.0
    max_video_frames: int = 256
    max_video_total_pixels: int = 400_000_000
    max_video_decoded_frames: int = 100_000

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not 0 < value < math.inf:
                raise BadConfig(f"limit {limit.name} is {value}: expected a finite number above 0")


DEFAULT = Limits()

MISSING_SECONDS = 0.25  # containers round durations by a frame or two; more is lost material

# Only self-contained formats: playlists (hls, concat, ...) would open other files and addresses.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mp3,aac,ogg,flac,wav,caf,au,amr,asf,flv,mpeg,mpegts,gif"
GUESSED_DURATION = {"aac", "amr", "mpeg", "mpegts"}  # no declared duration: FFmpeg estimates one from the bit rate


class _Bytes(io.BytesIO):
    """Stays where it is on a seek before its start, as files do: damaged headers make libsndfile ask for that."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


@contextmanager
def open_source(source: Source, kind: str, limits: Limits) -> Iterator[tuple[BinaryIO, str]]:
    """An unbuffered seekable file and the name to use in messages. Refuses what is no regular, non-empty file."""
    if isinstance(source, bytes):
        name, size = f"{kind} of {len(source):,} bytes", len(source)
    else:
        name = str(source) if str(source).isprintable() else ascii(str(source))
        size = _size_of(source, name)
    if size == 0:
        raise BadMedia(f"{name}: the file is empty; expected {kind}")
    if size > limits.max_file_bytes:
        raise BadMedia(f"{name}: {size:,} bytes, the limit is {limits.max_file_bytes:,} (max_file_bytes); shrink it")
    if isinstance(source, bytes):
        yield _Bytes(source), name
        return
    try:
        file = open(source, "rb", buffering=0)  # noqa: SIM115  # closed below; OSErrors of the body are not ours
    except OSError as error:
        raise BadMedia(f"{name}: cannot be opened ({error.strerror}); check its permissions") from None
    with file:
        yield file, name


def _size_of(source: Path | str, name: str) -> int:
    path = Path(source)
    try:
        if path.is_dir():
            raise BadMedia(f"{name}: is a folder; name a file inside it")
        if path.exists() and not path.is_file():
            raise BadMedia(f"{name}: is not a regular file; save it to disk first")
        return path.stat().st_size
    except FileNotFoundError:
        raise BadMedia(f"{name}: no such file; check the path") from None
    except (OSError, ValueError) as error:
        raise BadMedia(f"{name}: cannot be read ({getattr(error, 'strerror', None) or 'bad file name'})") from None


def open_container(file: BinaryIO, name: str, kind: str) -> av.container.InputContainer:
    """FFmpeg's demuxer at the start of the file. Raises BadMedia where no format fits."""
    file.seek(0)
    av.logging.set_level(None)  # FFmpeg writes to stderr on its own otherwise
    try:
        return av.open(file, "r", container_options={"format_whitelist": CONTAINERS}, metadata_errors="replace")
    except (av.FFmpegError, ValueError):
        raise BadMedia(f"{name}: is no {kind} in a known format, or is damaged; convert it to wav or mp4") from None


def first_stream(streams: Sequence[Any], name: str, kind: str, next_step: str) -> Any:
    """The first of the streams of a kind. Raises BadMedia where there is none, or none that can be decoded."""
    if not streams:
        raise BadMedia(f"{name}: holds no {kind}; {next_step}")
    if streams[0].codec_context is None:
        raise BadMedia(f"{name}: the codec of the {kind} is unknown; convert it to wav or mp4")
    return streams[0]


def decoded_frames(
    container: av.container.InputContainer, stream: av.stream.Stream, name: str, kind: str
) -> Iterator[Any]:
    """The frames of a stream in order. Raises BadMedia at the first that is damaged."""
    seconds = 0.0
    try:
        frames: Iterator[Any] = container.decode(stream)
        for frame in frames:
            if frame.is_corrupt:
                refuse_damaged(name, kind, seconds)
            seconds = frame.time or seconds
            yield frame
    except (av.FFmpegError, ValueError, OSError):
        refuse_damaged(name, kind, seconds)


def declared_seconds(container: av.container.InputContainer, stream: av.stream.Stream, head: bytes) -> float | None:
    """The duration that the file itself states for this stream, None where FFmpeg would only guess it."""
    counted = b"Xing" in head or b"Info" in head  # an mp3 that counts its frames
    if container.format.name in GUESSED_DURATION or (container.format.name == "mp3" and not counted):
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if len(container.streams) == 1 and container.duration is not None:
        return container.duration / av.time_base
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))  # Matroska's way
    return None if tag is None else int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])


def refuse_long(name: str, kind: str, given: str, limit_seconds: float) -> NoReturn:
    """`given` is how long it lasts, in words; `kind` decides which limit is named."""
    field = "max_video_seconds" if kind == "film" else "max_audio_seconds"
    raise BadMedia(f"{name}: lasts {given}, the limit is {limit_seconds:g} s ({field}); cut it into shorter pieces")


def refuse_cut(name: str, declared: float, seconds: float) -> NoReturn:
    """Fewer seconds could be decoded than the file declares."""
    raise BadMedia(f"{name}: declares {declared:.2f} s but only {seconds:.2f} s can be decoded; copy it again")


def refuse_damaged(name: str, kind: str, seconds: float) -> NoReturn:
    """Decoding failed after so many seconds; the decoder's own error is not shown."""
    raise BadMedia(f"{name}: the {kind} is damaged or cut off after {seconds:.1f} s; copy or export it again") from None
