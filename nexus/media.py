"""Sound, pictures and films: decoding within hard limits, resampling, and the files we write.

Every limit is checked on what the header declares, before decoding, and again on what is decoded, because headers lie.
Nothing is cut, clipped or replaced on loading: a file is understood whole or refused with `BadMedia`. Damage that a
codec conceals by design (a click in an mp3, a smeared block in a film) cannot be seen from here.
"""

import io
import logging
import math
import os
import re
import secrets
import struct
import warnings
import wave
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import av
import numpy as np
import soundfile
import soxr
from av.stream import Disposition
from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL import Image as Pillow
from PIL.ImageFile import ImageFile
from PIL.ImageOps import exif_transpose

from nexus.errors import BadConfig, BadMedia, NexusError
from nexus.types import Audio, Image, Part, Text, Video

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

NO_SAMPLES = np.zeros(0, np.float32)
PCM_BLOCK_VALUES = 2**18  # decoded at a time, over all channels: 1 MiB
MAX_CHUNKS = 10_000  # real files hold a handful; bounds the walk through a hostile one
MISSING_SECONDS = 0.25  # containers round durations by a frame or two; more is lost material
QUIET = logging.NullHandler()  # keeps Pillow's notes on damaged files off stderr
HEAD_BYTES = 2**20  # searched for an mp3's frame count, which may stand behind a cover picture
STREAMED = 0xFFFFFFFF  # the length that programs writing wav into a pipe put into the header

# Only self-contained formats: playlists (hls, concat, ...) would open other files and addresses.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mp3,aac,ogg,flac,wav,caf,au,amr,asf,flv,mpeg,mpegts,gif"
GUESSED_DURATION = {"aac", "amr", "mpeg", "mpegts"}  # no declared duration: FFmpeg estimates one from the bit rate

PICTURES: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (b"\x89PNG", PngImagePlugin.PngImageFile),
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"GIF8", GifImagePlugin.GifImageFile),
    (b"II*\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0*", TiffImagePlugin.TiffImageFile),
)


class _Bytes(io.BytesIO):
    """Stays where it is on a seek before its start, as files do: damaged headers make libsndfile ask for that."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


@contextmanager
def _opened(source: Source, kind: str, limits: Limits) -> Iterator[tuple[BinaryIO, str]]:
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
    with _opened(source, "sound", limits) as (file, name):
        sound = _open_sound(file, name)
        _check_declared_sound(sound, name, limits)
        resampler, pieces, frames = StreamResampler(sound.rate_hz, rate_hz), [], 0
        for block in sound.blocks:
            frames += len(block)
            if frames > limits.max_audio_seconds * sound.rate_hz:
                _refuse_long(name, "sound", f"more than {frames / sound.rate_hz:.1f} s", limits.max_audio_seconds)
            _check_values(block, name, limits)
            pieces.append(resampler.push(block.mean(axis=1, dtype=np.float32)))
        pieces.append(resampler.finish())
    if sound.seconds is not None and frames / sound.rate_hz < sound.seconds - MISSING_SECONDS:
        _refuse_cut(name, sound.seconds, frames / sound.rate_hz)
    _check_short(name, frames, sound.rate_hz, limits)
    path = None if isinstance(source, bytes) else Path(source)
    return Audio(path=path, samples=np.concatenate(pieces), rate_hz=rate_hz)


def _open_sound(file: BinaryIO, name: str) -> _Sound:
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
                    _refuse_damaged(name, "sound", frames / opened.samplerate)
                if not len(block):
                    break
                frames += len(block)
                yield block
        if frames < opened.frames:
            _refuse_cut(name, declared, frames / opened.samplerate)

    declared = opened.frames / opened.samplerate
    return _Sound(opened.samplerate, opened.channels, declared, blocks())


def _open_with_ffmpeg(file: BinaryIO, head: bytes, name: str) -> _Sound:
    container = _open_container(file, name, "sound")
    stream = _first(container.streams.audio, name, "sound", "give a recording")

    def blocks() -> Iterator[np.ndarray]:
        with container:
            floats = av.AudioResampler(format="flt")  # interleaved: PyAV reads planes of 8 channels out of bounds
            for frame in _decoded(container, stream, name, "sound"):
                try:
                    for block in floats.resample(frame):
                        yield block.to_ndarray().reshape(-1, block.layout.nb_channels)
                except (av.FFmpegError, ValueError):
                    raise BadMedia(f"{name}: rate or channels change within the sound; convert it to wav") from None

    return _Sound(stream.rate, stream.channels, _declared_seconds(container, stream, head), blocks())


def _check_declared_sound(sound: _Sound, name: str, limits: Limits) -> None:
    if not limits.min_rate_hz <= sound.rate_hz <= limits.max_rate_hz:
        expected = f"{limits.min_rate_hz:,} to {limits.max_rate_hz:,} (min_rate_hz, max_rate_hz)"
        raise BadMedia(f"{name}: {sound.rate_hz:,} samples per second, expected {expected}; export it again")
    if not 1 <= sound.channels <= limits.max_channels:
        raise BadMedia(f"{name}: {sound.channels} channels, limit {limits.max_channels} (max_channels); mix it down")
    if sound.seconds is not None and sound.seconds > limits.max_audio_seconds + MISSING_SECONDS:
        _refuse_long(name, "sound", f"{sound.seconds:.1f} s", limits.max_audio_seconds)


def _check_values(samples: np.ndarray, name: str, limits: Limits) -> None:
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


def _open_container(file: BinaryIO, name: str, kind: str) -> av.container.InputContainer:
    """FFmpeg's demuxer at the start of the file."""
    file.seek(0)
    av.logging.set_level(None)  # FFmpeg writes to stderr on its own otherwise
    try:
        return av.open(file, "r", container_options={"format_whitelist": CONTAINERS}, metadata_errors="replace")
    except (av.FFmpegError, ValueError):
        raise BadMedia(f"{name}: is no {kind} in a known format, or is damaged; convert it to wav or mp4") from None


def _first(streams: Sequence[Any], name: str, kind: str, next_step: str) -> Any:
    if not streams:
        raise BadMedia(f"{name}: holds no {kind}; {next_step}")
    if streams[0].codec_context is None:
        raise BadMedia(f"{name}: the codec of the {kind} is unknown; convert it to wav or mp4")
    return streams[0]


def _decoded(container: av.container.InputContainer, stream: av.stream.Stream, name: str, kind: str) -> Iterator[Any]:
    seconds = 0.0
    try:
        frames: Iterator[Any] = container.decode(stream)
        for frame in frames:
            if frame.is_corrupt:
                _refuse_damaged(name, kind, seconds)
            seconds = frame.time or seconds
            yield frame
    except (av.FFmpegError, ValueError, OSError):
        _refuse_damaged(name, kind, seconds)


def _declared_seconds(container: av.container.InputContainer, stream: av.stream.Stream, head: bytes) -> float | None:
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


def _refuse_long(name: str, kind: str, given: str, limit_seconds: float) -> NoReturn:
    field = "max_video_seconds" if kind == "film" else "max_audio_seconds"
    raise BadMedia(f"{name}: lasts {given}, the limit is {limit_seconds:g} s ({field}); cut it into shorter pieces")


def _refuse_cut(name: str, declared_seconds: float, seconds: float) -> NoReturn:
    raise BadMedia(f"{name}: declares {declared_seconds:.2f} s but only {seconds:.2f} s can be decoded; copy it again")


def _refuse_damaged(name: str, kind: str, seconds: float) -> NoReturn:
    raise BadMedia(f"{name}: the {kind} is damaged or cut off after {seconds:.1f} s; copy or export it again") from None


def load_image(source: Source, limits: Limits = DEFAULT) -> Image:
    """Decode a PNG, JPEG, WebP, BMP, GIF or TIFF file (or its bytes) to RGB u8 [H, W, 3].

    EXIF orientation is applied, transparency is laid on white, 16-bit grey keeps its upper eight bits. The pixel limit
    is checked before anything is decoded. Raises BadMedia, also for animations and several pages: one picture is asked.
    For a damaged compressed TIFF libtiff adds a line of its own to stderr.
    """
    with _opened(source, "a picture", limits) as (file, name), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # odd metadata does no harm to the pixels
        logging.getLogger("PIL").addHandler(QUIET)
        picture = _open_picture(file, name)
        _check_pixels(name, picture.width, picture.height, limits)
        try:
            if getattr(picture, "is_animated", False):
                several = f"holds {getattr(picture, 'n_frames', 'several')} pictures, expected one"
                raise BadMedia(f"{name}: {several}; give it as a video or save the one you mean")
            pixels = _rgb(picture, name)
        except (NexusError, MemoryError):
            raise
        except Exception:  # Pillow's decoders raise nearly any type on damaged data
            raise BadMedia(f"{name}: the picture is damaged or cut off; copy or export it again") from None
    return Image(path=None if isinstance(source, bytes) else Path(source), pixels=pixels)


def _open_picture(file: BinaryIO, name: str) -> ImageFile:
    head = file.read(16)
    file.seek(0)
    for magic, reader in PICTURES:
        if head.startswith(magic) and (magic != b"RIFF" or head[8:12] == b"WEBP"):
            try:
                # Not Pillow.open: it knows far more formats and brings its own, global pixel limit.
                return reader(file)
            except Exception:  # as above
                raise BadMedia(f"{name}: the picture's header is damaged; copy or export it again") from None
    raise BadMedia(f"{name}: is no PNG, JPEG, WebP, BMP, GIF or TIFF picture; convert it to PNG")


def _check_pixels(name: str, width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_image_pixels:
        limit = f"{limits.max_image_pixels:,} in all (max_image_pixels)"
        raise BadMedia(f"{name}: {width} x {height} pixels, the limit is {limit}; scale it down")


def _rgb(opened: ImageFile, name: str) -> np.ndarray:
    picture: Pillow.Image = exif_transpose(opened)
    if picture.mode.startswith("I"):  # one channel of 16 bits; Pillow's own conversion would clip it at 255
        grey = np.asarray(picture).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65_535:
            raise BadMedia(f"{name}: a picture of 32-bit numbers; save it with 8 or 16 bits per channel")
        return np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if picture.mode == "F":
        raise BadMedia(f"{name}: a picture of floating-point numbers; save it with 8 or 16 bits per channel")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Pillow.alpha_composite(Pillow.new("RGBA", picture.size, "white"), picture)
    return np.array(picture.convert("RGB"))


def load_video(source: Source, limits: Limits = DEFAULT, fps: float = 2.0) -> Video:
    """Decode a film (or its bytes) to RGB u8 frames [N, H, W, 3], N >= 1, on a uniform grid of `fps` per second.

    Time starts at the first frame; frame k is the last decoded frame with time <= k / fps, for every k / fps before the
    end of the last frame. Rotation (phones) is applied. Decoding stops where a limit is passed.
    Raises BadMedia (missing, damaged, no pictures, too long, too large) and BadConfig (fps).
    """
    if not 0 < fps < math.inf:
        raise BadConfig(f"fps is {fps}: expected a finite number of frames per second above 0")
    with _opened(source, "a film", limits) as (file, name), _open_container(file, name, "film") as container:
        films = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        stream = _first(films, name, "film", "give it as audio, or give a video file")
        declared = _declared_seconds(container, stream, b"")
        _check_pixels(name, stream.width, stream.height, limits)
        if declared is not None and declared > limits.max_video_seconds + MISSING_SECONDS:
            _refuse_long(name, "film", f"{declared:.1f} s", limits.max_video_seconds)
        if declared is not None and math.ceil((declared - MISSING_SECONDS) * fps) > limits.max_video_frames:
            _refuse_frames(name, f"{declared:.1f} s", fps, limits)
        grid = _Grid(name, fps, limits)
        for frame in _decoded(container, stream, name, "film"):
            grid.add(frame)
        frames = grid.finish()
    if declared is not None and grid.end_seconds < declared - MISSING_SECONDS:
        _refuse_cut(name, declared, grid.end_seconds)
    return Video(path=None if isinstance(source, bytes) else Path(source), frames=frames, fps=fps)


class _Grid:
    """Picks frames for a uniform grid in time from decoded frames, within the limits."""

    def __init__(self, name: str, fps: float, limits: Limits) -> None:
        self.name, self.fps, self.limits = name, fps, limits
        self.picked: list[np.ndarray] = []
        self.num_decoded = 0
        self.start_seconds = self.last_seconds = self.end_seconds = 0.0
        self.last: av.VideoFrame | None = None

    def add(self, frame: av.VideoFrame) -> None:
        name, limits = self.name, self.limits
        if frame.time is None:
            raise BadMedia(f"{name}: frame {self.num_decoded} carries no time; convert it to mp4")
        if self.last is None:
            self.start_seconds = frame.time
            _check_pixels(name, frame.width, frame.height, limits)
        elif (frame.width, frame.height) != (self.last.width, self.last.height):
            raise BadMedia(f"{name}: the picture size changes within the film; convert it to one size")
        seconds = frame.time - self.start_seconds
        if seconds < self.last_seconds:
            raise BadMedia(f"{name}: time runs backwards at {self.last_seconds:.2f} s; convert it to mp4")
        self.num_decoded += 1
        self._pick_before(seconds)
        self.last, self.last_seconds = frame, seconds
        self.end_seconds = seconds + (frame.duration or 0) * float(frame.time_base or 0)
        if self.end_seconds > limits.max_video_seconds + MISSING_SECONDS:
            _refuse_long(name, "film", f"more than {limits.max_video_seconds:g} s", limits.max_video_seconds)
        if self.num_decoded > limits.max_video_decoded_frames:
            limit = f"{limits.max_video_decoded_frames:,} frames (max_video_decoded_frames)"
            raise BadMedia(f"{name}: holds more than {limit}; shorten it")

    def finish(self) -> np.ndarray:
        """Frames [N, H, W, 3]."""
        if self.last is None:
            raise BadMedia(f"{self.name}: not one frame can be decoded; export it again")
        self._pick_before(max(self.end_seconds, self.last_seconds + 1e-3))
        return np.stack(self.picked)

    def _pick_before(self, seconds: float) -> None:
        """The last frame fills all free grid points before `seconds` (times are exact to a microsecond)."""
        pixels: np.ndarray | None = None
        while self.last is not None and len(self.picked) / self.fps < seconds - 1e-6:
            if pixels is None:
                turns, rest = divmod(self.last.rotation, 90)
                if rest:
                    raise BadMedia(f"{self.name}: turned by {self.last.rotation} degrees; make it upright")
                pixels = np.rot90(self.last.to_ndarray(format="rgb24"), turns)
            if len(self.picked) == self.limits.max_video_frames:
                _refuse_frames(self.name, f"more than {len(self.picked) / self.fps:.1f} s", self.fps, self.limits)
            if (len(self.picked) + 1) * self.last.width * self.last.height > self.limits.max_video_total_pixels:
                given = f"{len(self.picked) + 1} frames of {self.last.width} x {self.last.height} pixels"
                limit = f"{self.limits.max_video_total_pixels:,} in all (max_video_total_pixels)"
                raise BadMedia(f"{self.name}: {given} pass the limit of {limit}; scale it down or lower fps")
            self.picked.append(pixels)


def _refuse_frames(name: str, lasts: str, fps: float, limits: Limits) -> NoReturn:
    limit = f"the limit of {limits.max_video_frames} frames (max_video_frames)"
    raise BadMedia(f"{name}: lasts {lasts}, at {fps:g} frames per second that passes {limit}; shorten it or lower fps")


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
                _refuse_long("sound", "sound", f"{part.seconds:.1f} s", limits.max_audio_seconds)
            _check_values(samples, "sound", limits)
            return replace(part, samples=resample(samples, part.rate_hz, rate_hz), rate_hz=rate_hz)
        case Image(pixels=np.ndarray() as pixels):
            _check_array("picture", pixels, np.uint8, "H W 3")
            _check_pixels("picture", pixels.shape[1], pixels.shape[0], limits)
            return part
        case Video(frames=np.ndarray() as frames):
            _check_array("film", frames, np.uint8, "N H W 3")
            _check_pixels("film", frames.shape[2], frames.shape[1], limits)
            if not 0 < part.fps < math.inf:
                raise BadMedia(f"film: fps is {part.fps}; set the frames per second of the array")
            if len(frames) > limits.max_video_frames:
                _refuse_frames("film", f"{len(frames) / part.fps:.1f} s", part.fps, limits)
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


def png_bytes(pixels: np.ndarray) -> bytes:
    """A PNG file of RGB u8 [H, W, 3]."""
    buffer = io.BytesIO()
    Pillow.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
