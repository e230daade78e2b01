"""Media files made in memory, and what a refusal must look like: shared by the tests of everything that reads files."""

import io
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from PIL import Image as Pillow

from nexus.errors import BadMedia

RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3  # a picture, [4, 6, 3]


def tone(seconds: float, rate_hz: int, hz: float = 440.0) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)).astype(np.float32)


def sound_file(samples: np.ndarray, rate_hz: int, format: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format=format, subtype=subtype)
    return buffer.getvalue()


def compressed_sound(format: str, codec: str, seconds: float = 2.0, rate_hz: int = 48_000) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        stream: Any = container.add_stream(codec, rate=rate_hz)
        stream.layout = "mono"
        samples = tone(seconds, rate_hz)[None]
        for start in range(0, samples.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(samples[:, start : start + 1024]), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = rate_hz, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def film_file(
    num_frames: int = 30, fps: int = 10, format: str = "mp4", codec: str = "mpeg4", size: tuple[int, int] = (64, 48)
) -> bytes:
    """Frame n is grey of brightness 8 n, its left half black."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(num_frames):
            pixels = np.full((size[1], size[0], 3), 8 * index % 256, np.uint8)
            pixels[:, : size[0] // 2] = 0
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def picture_file(picture: Pillow.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def refusal(call: Callable[[], object], *words: str) -> str:
    """The message of the BadMedia that `call` must raise: one line, with all the words, without decoder internals."""
    with pytest.raises(BadMedia) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and " object at 0x" not in message and "Errno" not in message
    assert caught.value.__cause__ is None and (caught.value.__context__ is None or caught.value.__suppress_context__)
    for word in words:
        assert word in message, message
    return message
