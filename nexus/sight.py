"""Pictures and films: decoded whole to RGB within the limits, or refused; and the pictures we write."""

import io
import logging
import math
import warnings
from pathlib import Path
from typing import BinaryIO, NoReturn

import av
import numpy as np
from av.stream import Disposition
from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL import Image as Pillow
from PIL.ImageFile import ImageFile
from PIL.ImageOps import exif_transpose

from nexus.errors import BadConfig, BadMedia, NexusError
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
    refuse_long,
)
from nexus.types import Image, Video

QUIET = logging.NullHandler()  # keeps Pillow's notes on damaged files off stderr

PICTURES: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (b"\x89PNG", PngImagePlugin.PngImageFile),
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"GIF8", GifImagePlugin.GifImageFile),
    (b"II*\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0*", TiffImagePlugin.TiffImageFile),
)


def load_image(source: Source, limits: Limits = DEFAULT) -> Image:
    """Decode a PNG, JPEG, WebP, BMP, GIF or TIFF file (or its bytes) to RGB u8 [H, W, 3].

    EXIF orientation is applied, transparency is laid on white, 16-bit grey keeps its upper eight bits. The pixel limit
    is checked before anything is decoded. Raises BadMedia, also for animations and several pages: one picture is asked.
    For a damaged compressed TIFF libtiff adds a line of its own to stderr.
    """
    with open_source(source, "a picture", limits) as (file, name), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # odd metadata does no harm to the pixels
        logging.getLogger("PIL").addHandler(QUIET)
        picture = _open_picture(file, name)
        check_pixels(name, picture.width, picture.height, limits)
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


def check_pixels(name: str, width: int, height: int, limits: Limits) -> None:
    """Raises BadMedia where one picture or frame has too many pixels."""
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
    with open_source(source, "a film", limits) as (file, name), open_container(file, name, "film") as container:
        films = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        stream = first_stream(films, name, "film", "give it as audio, or give a video file")
        declared = declared_seconds(container, stream, b"")
        check_pixels(name, stream.width, stream.height, limits)
        if declared is not None and declared > limits.max_video_seconds + MISSING_SECONDS:
            refuse_long(name, "film", f"{declared:.1f} s", limits.max_video_seconds)
        if declared is not None and math.ceil((declared - MISSING_SECONDS) * fps) > limits.max_video_frames:
            refuse_frames(name, f"{declared:.1f} s", fps, limits)
        grid = _Grid(name, fps, limits)
        for frame in decoded_frames(container, stream, name, "film"):
            grid.add(frame)
        frames = grid.finish()
    if declared is not None and grid.end_seconds < declared - MISSING_SECONDS:
        refuse_cut(name, declared, grid.end_seconds)
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
            check_pixels(name, frame.width, frame.height, limits)
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
            refuse_long(name, "film", f"more than {limits.max_video_seconds:g} s", limits.max_video_seconds)
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
                refuse_frames(self.name, f"more than {len(self.picked) / self.fps:.1f} s", self.fps, self.limits)
            if (len(self.picked) + 1) * self.last.width * self.last.height > self.limits.max_video_total_pixels:
                given = f"{len(self.picked) + 1} frames of {self.last.width} x {self.last.height} pixels"
                limit = f"{self.limits.max_video_total_pixels:,} in all (max_video_total_pixels)"
                raise BadMedia(f"{self.name}: {given} pass the limit of {limit}; scale it down or lower fps")
            self.picked.append(pixels)


def refuse_frames(name: str, lasts: str, fps: float, limits: Limits) -> NoReturn:
    """`lasts` says in words how long the film is that would need too many frames."""
    limit = f"the limit of {limits.max_video_frames} frames (max_video_frames)"
    raise BadMedia(f"{name}: lasts {lasts}, at {fps:g} frames per second that passes {limit}; shorten it or lower fps")


def png_bytes(pixels: np.ndarray) -> bytes:
    """A PNG file of RGB u8 [H, W, 3]."""
    buffer = io.BytesIO()
    Pillow.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
