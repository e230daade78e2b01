"""Media files: what is understood whole, and what is refused, with which words, before and while decoding."""

import io
import math
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from nexus.errors import BadConfig, BadMedia
from nexus.media import (
    Limits,
    StreamResampler,
    load,
    load_audio,
    load_image,
    load_video,
    png_bytes,
    resample,
    wav_bytes,
    write_wav,
)
from nexus.types import Audio, Image, Text, Video

RNG = np.random.default_rng(7)


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


LOADERS: list[Callable[..., object]] = [load_audio, load_image, load_video]


@pytest.mark.parametrize("loader", LOADERS)
def test_what_is_no_readable_file_is_refused_in_one_line(loader: Callable, tmp_path: Path) -> None:
    refusal(lambda: loader(tmp_path / "nothing.wav"), "nothing.wav", "no such file")
    refusal(lambda: loader(tmp_path), str(tmp_path), "folder")
    refusal(lambda: loader("/dev/zero"), "not a regular file")
    refusal(lambda: loader("a\0b.wav"), "bad file name")
    (tmp_path / "two\nlines.png").write_bytes(b"")
    refusal(lambda: loader(tmp_path / "two\nlines.png"), "empty")
    refusal(lambda: loader(b""), "empty")
    refusal(lambda: loader(b"12345", limits=Limits(max_file_bytes=4)), "5 bytes", "max_file_bytes")


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("suffix", [".wav", ".raw", ".png", ".mp4", ""])
def test_random_bytes_are_refused_whatever_their_name(loader: Callable, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"noise{suffix}"
    path.write_bytes(RNG.bytes(5000))
    refusal(lambda: loader(path), path.name)


@pytest.mark.parametrize("loader", LOADERS)
def test_the_wrong_kind_of_file_is_refused(loader: Callable) -> None:
    own = {load_audio: "wav", load_image: "png", load_video: "mp4"}[loader]
    files = {
        "wav": sound_file(tone(0.5, 8000), 8000),
        "png": png_bytes(np.zeros((9, 9, 3), np.uint8)),
        "mp4": film_file(3),
    }
    for kind, content in files.items():
        if kind != own:
            refusal(partial(loader, content))


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{0}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {0}\n",
        "ffconcat version 1.0\nfile other.mp4\n",
    ],
)
def test_a_playlist_cannot_make_us_open_another_file(playlist: str, tmp_path: Path) -> None:
    (tmp_path / "other.mp4").write_bytes(film_file(5))
    path = tmp_path / "list.mp4"
    path.write_text(playlist.format(tmp_path / "other.mp4"))
    refusal(lambda: load_video(path), "list.mp4")
    refusal(lambda: load_audio(path), "list.mp4")


@pytest.mark.parametrize("seed", range(4))
def test_damage_anywhere_gives_a_result_or_one_line_and_nothing_on_stderr(
    seed: int, capfd: pytest.CaptureFixture
) -> None:
    random = np.random.default_rng(seed)
    rgb = Pillow.fromarray(random.integers(0, 255, (20, 30, 3), dtype=np.uint8))
    files: list[tuple[Callable[..., object], bytes]] = [
        *[(load_audio, sound_file(tone(0.2, 8000), 8000, format)) for format in ("WAV", "AIFF", "FLAC", "RF64", "OGG")],
        *[(load_audio, compressed_sound("mp3", "libmp3lame", 0.3)), (load_audio, compressed_sound("ipod", "aac", 0.3))],
        *[(load_image, picture_file(rgb, format)) for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")],
        *[(load_video, film_file(4)), (load_video, film_file(4, format="matroska", codec="libx264"))],
    ]
    for loader, content in files:
        loader(content)
        for _ in range(12):
            damaged = bytearray(content)
            start = int(random.integers(0, len(content)))
            damaged[start : start + 8] = random.bytes(8)
            try:
                loader(bytes(damaged[: int(random.integers(len(content) // 2, len(content) + 40))]))
            except BadMedia as error:
                assert "\n" not in str(error)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("format", "subtype", "rate_hz", "tolerance"),
    [
        ("WAV", "PCM_U8", 8_000, 0.01),
        ("WAV", "PCM_16", 44_100, 1e-3),
        ("WAV", "PCM_24", 96_000, 1e-3),
        ("WAV", "PCM_32", 48_000, 1e-3),
        ("WAV", "FLOAT", 22_050, 1e-3),
        ("WAV", "DOUBLE", 16_000, 1e-3),
        ("WAV", "ULAW", 8_000, 0.02),
        ("WAVEX", "PCM_16", 16_000, 1e-3),
        ("RF64", "PCM_16", 16_000, 1e-3),
        ("AIFF", "PCM_16", 16_000, 1e-3),
        ("FLAC", "PCM_24", 96_000, 1e-3),
        ("OGG", "VORBIS", 16_000, 0.1),
    ],
)
def test_sound_of_any_format_comes_as_mono_at_the_asked_rate(
    format: str, subtype: str, rate_hz: int, tolerance: float
) -> None:
    audio = load_audio(sound_file(tone(1.0, rate_hz), rate_hz, format, subtype), 16_000)
    assert audio.samples is not None and audio.samples.dtype == np.float32 and audio.rate_hz == 16_000
    assert audio.samples.shape == (16_000,)
    inner = slice(1000, -1000)
    assert np.abs(audio.samples - tone(1.0, 16_000))[inner].max() < tolerance


@pytest.mark.parametrize(
    ("format", "codec"),
    [("mp3", "libmp3lame"), ("ipod", "aac"), ("adts", "aac"), ("webm", "libopus"), ("ogg", "libopus")],
)
def test_compressed_sound_keeps_its_length_level_and_pitch(format: str, codec: str) -> None:
    samples = load_audio(compressed_sound(format, codec)).samples
    assert samples is not None and abs(len(samples) - 32_000) < 1_000
    middle = samples[8_000:24_000]
    assert abs(np.sqrt(np.mean(middle**2)) - 0.4 / math.sqrt(2)) < 0.02
    assert abs(np.argmax(np.abs(np.fft.rfft(middle))) - 440) <= 1


@pytest.mark.parametrize(("format", "subtype"), [("WAV", "FLOAT"), ("FLAC", "PCM_24")])
@pytest.mark.parametrize("channels", [2, 6, 8])
def test_channels_are_averaged(channels: int, format: str, subtype: str) -> None:
    values = RNG.uniform(-0.9, 0.9, (4000, channels)).astype(np.float32)
    samples = load_audio(sound_file(values, 16_000, format, subtype)).samples
    assert samples is not None
    np.testing.assert_allclose(samples, values.mean(axis=1), atol=1e-6)


def test_floats_beyond_full_scale_keep_their_values_and_silence_is_legal() -> None:
    loud = 1.2 / 0.4 * tone(0.5, 16_000)
    np.testing.assert_array_equal(load_audio(sound_file(loud, 16_000, subtype="FLOAT")).samples, loud)
    assert not np.any(load_audio(sound_file(np.zeros(800), 16_000)).samples)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_samples_that_are_no_numbers_are_refused(value: float) -> None:
    samples = tone(1.0, 16_000)
    samples[12_345] = value
    refusal(lambda: load_audio(sound_file(samples, 16_000, subtype="FLOAT")), "not finite")


def test_integers_stored_as_floats_are_refused() -> None:
    refusal(lambda: load_audio(sound_file(30_000 * tone(1.0, 16_000), 16_000, subtype="FLOAT")), "peaks at", "divided")


def test_short_sound_is_refused_with_both_durations() -> None:
    refusal(lambda: load_audio(sound_file(np.zeros(0), 16_000)), "no samples")
    refusal(lambda: load_audio(sound_file(np.zeros(319), 16_000)), "19.9 ms", "20 ms")
    assert load_audio(sound_file(np.zeros(320), 16_000)).seconds == 0.02


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_three_hours_are_refused_from_the_header_with_both_durations(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"long.{suffix}"
    soundfile.write(path, np.zeros(3 * 3600 * 1000, np.int16), 1000, subtype="PCM_U8" if suffix == "wav" else "PCM_16")
    start = time.perf_counter()
    refusal(lambda: load_audio(path), f"long.{suffix}", "10800.0 s", "600 s", "max_audio_seconds")
    assert time.perf_counter() - start < 0.5


def test_a_bomb_without_a_declared_length_stops_at_the_limit_in_little_memory() -> None:
    bomb = bytearray(sound_file(np.zeros((1_000_000, 8), np.int16), 16_000, "FLAC"))
    bomb[21] &= 0xF0  # the 36 bits of STREAMINFO that hold the number of samples; 0 stands for "unknown"
    bomb[22:26] = bytes(4)
    assert len(bomb) < 100_000
    tracemalloc.start()
    refusal(lambda: load_audio(bytes(bomb), limits=Limits(max_audio_seconds=2.0)), "more than", "2 s")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 16 * 2**20  # the whole would take 32 MB
    assert len(load_audio(bytes(bomb)).samples) == 1_000_000  # type: ignore[arg-type]


def test_wav_that_promises_more_than_it_holds_is_refused() -> None:
    whole = sound_file(tone(1.0, 16_000), 16_000)
    refusal(lambda: load_audio(whole[:20_000]), "promises 32,000", "the file holds 19,956")
    refusal(lambda: load_audio(whole[:40] + struct.pack("<I", 10**9) + whole[44:]), "promises 1,000,000,000")
    refusal(lambda: load_audio(sound_file(tone(1.0, 16_000), 16_000, "AIFF")[:20_000]), "promises")
    refusal(lambda: load_audio(sound_file(tone(1.0, 16_000), 16_000, "RF64")[:20_000]), "promises")


def test_wav_that_promises_less_than_it_holds_is_refused() -> None:
    whole = sound_file(-tone(1.0, 16_000) - 0.5, 16_000)  # bytes that cannot pass for the name of a chunk
    refusal(lambda: load_audio(whole[:40] + struct.pack("<I", 1001) + whole[44:]), "promises 1,001", "follow")


def test_wav_written_into_a_pipe_is_read_to_its_end() -> None:
    streamed = bytearray(wav_bytes(tone(1.0, 16_000), 16_000))
    streamed[4:8] = streamed[40:44] = b"\xff\xff\xff\xff"
    assert load_audio(bytes(streamed)).seconds == 1.0


def test_chunks_around_the_sound_do_no_harm() -> None:
    plain = wav_bytes(tone(0.1, 16_000), 16_000)
    note = b"LIST" + struct.pack("<I", 3) + b"abc\0"
    body = plain[12:36] + note + plain[36:] + note
    framed = b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body
    np.testing.assert_array_equal(load_audio(framed).samples, load_audio(plain).samples)
    np.testing.assert_array_equal(load_audio(framed + RNG.bytes(99)).samples, load_audio(plain).samples)


@pytest.mark.parametrize("format", ["flac", "ogg", "mp3", "ipod", "adts", "webm", "matroska"])
def test_compressed_sound_that_was_cut_off_is_refused(format: str) -> None:
    codec = {"mp3": "libmp3lame", "webm": "libopus", "ogg": "libopus", "ipod": "aac", "adts": "aac"}.get(format, "flac")
    whole = compressed_sound(format, codec) if format != "flac" else sound_file(tone(2.0, 48_000), 48_000, "FLAC")
    for share in (0.35, 0.66):
        refusal(partial(load_audio, whole[: int(share * len(whole))]))


def test_rates_and_channels_outside_the_limits_are_refused() -> None:
    header = bytearray(wav_bytes(tone(0.5, 16_000), 16_000))
    for rate_hz in (1, 4_000_000_000):
        header[24:28] = struct.pack("<I", rate_hz)
        refusal(lambda: load_audio(bytes(header)))
    refusal(lambda: load_audio(sound_file(np.zeros((900, 100)), 16_000)), "100 channels", "64")


def test_an_unfit_limit_is_refused() -> None:
    with pytest.raises(BadConfig, match="max_audio_seconds is -1"):
        Limits(max_audio_seconds=-1)


@given(
    rates=st.sampled_from([(8_000, 16_000), (44_100, 16_000), (96_000, 16_000), (24_000, 24_000), (16_000, 24_000)]),
    cuts=st.lists(st.integers(0, 5_000), max_size=8),
    length=st.integers(50, 5_000),
)
def test_resampling_in_pieces_equals_resampling_at_once(rates: tuple[int, int], cuts: list[int], length: int) -> None:
    samples = np.random.default_rng(length).uniform(-1, 1, length).astype(np.float32)
    stream = StreamResampler(*rates)
    pieces = [stream.push(piece) for piece in np.split(samples, sorted(min(cut, length) for cut in cuts))]
    joined = np.concatenate([*pieces, stream.finish()])
    whole = resample(samples, *rates)
    assert joined.dtype == whole.dtype == np.float32 and abs(len(whole) - length * rates[1] / rates[0]) <= 0.5
    np.testing.assert_allclose(joined, whole, atol=1e-6)


@given(st.integers(0, 10**6), st.integers(320, 2_000))
def test_written_sound_is_read_back_within_half_a_step(seed: int, length: int) -> None:
    samples = np.random.default_rng(seed).uniform(-1, 1, length).astype(np.float32)
    back = load_audio(wav_bytes(samples, 16_000)).samples
    assert back is not None and np.abs(back - np.minimum(samples, 32767 / 32768)).max() <= 0.5 / 32768


def test_writing_clips_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.wav"
    path.write_bytes(b"old")
    write_wav(path, np.array([2.0, -2.0] * 500, np.float32), 24_000)
    back = load_audio(path, 24_000).samples
    assert back is not None and back.max() == 32767 / 32768 and back.min() == -1.0
    assert list(tmp_path.iterdir()) == [path]
    refusal(lambda: write_wav(tmp_path / "no" / "out.wav", np.zeros(9, np.float32), 8_000), "no/out.wav", "folder")
    refusal(lambda: write_wav(tmp_path, np.zeros(9, np.float32), 8_000), "cannot be written")


RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_pictures_come_back_exactly(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(load_image(picture_file(Pillow.fromarray(RGB), format, **options)).pixels, RGB)
    np.testing.assert_array_equal(load_image(png_bytes(RGB)).pixels, RGB)


def test_every_mode_of_pixels_becomes_rgb() -> None:
    grey = RGB[..., 0]
    as_rgb = np.repeat(grey[..., None], 3, axis=2)
    deep = Pillow.fromarray(grey.astype(np.uint16) * 257)
    for picture, format, expected in [
        (Pillow.fromarray(grey), "PNG", as_rgb),
        (deep, "PNG", as_rgb),
        (deep, "TIFF", as_rgb),
        (Pillow.fromarray(grey > 100), "PNG", np.where(as_rgb > 100, 255, 0)),
        (Pillow.fromarray(RGB).quantize(64), "PNG", RGB),
        (Pillow.new("CMYK", (6, 4), (0, 255, 255, 0)), "TIFF", np.full((4, 6, 3), (255, 0, 0))),
    ]:
        pixels = load_image(picture_file(picture, format)).pixels
        assert pixels is not None and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
        np.testing.assert_allclose(pixels, expected, atol=1)


def test_transparency_lies_on_white() -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = [0, 128, 255]
    pixels = load_image(picture_file(Pillow.fromarray(rgba))).pixels
    assert pixels is not None and pixels[0, :, 0].tolist() == [255, 127, 0]
    palette = Pillow.fromarray(RGB).quantize(8)
    gif = picture_file(palette, "GIF", transparency=int(np.asarray(palette)[0, 0]))
    assert load_image(gif).pixels[0, 0].tolist() == [255, 255, 255]  # type: ignore[index]


def test_the_orientation_tag_is_applied() -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    pixels = load_image(picture_file(Pillow.fromarray(RGB), "PNG", exif=exif)).pixels
    np.testing.assert_array_equal(pixels, np.rot90(RGB, -1))


def test_one_pixel_is_legal() -> None:
    assert load_image(png_bytes(np.zeros((1, 1, 3), np.uint8))).pixels.shape == (1, 1, 3)  # type: ignore[union-attr]


def test_a_huge_picture_is_refused_before_it_is_decoded() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b"")]
    huge = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body)) for tag, body in chunks
    )
    tracemalloc.start()
    start = time.perf_counter()
    refusal(lambda: load_image(huge), "60000 x 60000", "50,000,000", "max_image_pixels")
    assert time.perf_counter() - start < 0.5 and tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_picture_that_was_cut_off_is_refused(format: str, capfd: pytest.CaptureFixture) -> None:
    whole = picture_file(Pillow.fromarray(RNG.integers(0, 255, (40, 50, 3), dtype=np.uint8)), format)
    for share in (0.05, 0.5, 0.9):
        refusal(partial(load_image, whole[: int(share * len(whole))]))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_pictures_in_one_file_are_refused(format: str) -> None:
    pages = [Pillow.fromarray(RGB), Pillow.fromarray(255 - RGB), Pillow.fromarray(RGB // 2)]
    whole = picture_file(pages[0], format, save_all=True, append_images=pages[1:])
    refusal(lambda: load_image(whole), "3 pictures", "video")


@pytest.mark.parametrize(
    ("format", "codec"),
    [("mp4", "mpeg4"), ("mp4", "libx264"), ("avi", "mpeg4"), ("matroska", "libx264"), ("webm", "libvpx-vp9")],
)
def test_films_are_sampled_on_the_grid(format: str, codec: str) -> None:
    film = load_video(film_file(30, 10, format, codec), fps=2.0)
    assert film.frames is not None and film.fps == 2.0
    assert film.frames.shape == (6, 48, 64, 3) and film.frames.dtype == np.uint8
    brightness = film.frames[:, 10:-10, 40:-8].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(brightness, [8 * index for index in range(0, 30, 5)], atol=6)


@given(
    num_frames=st.integers(1, 12),
    film_fps=st.sampled_from([5, 10, 24]),
    fps=st.fractions(Fraction(1, 2), 30, max_denominator=8),
)
@settings(max_examples=40)
def test_frame_k_is_the_last_one_not_after_its_grid_point(num_frames: int, film_fps: int, fps: Fraction) -> None:
    frames = load_video(film_file(num_frames, film_fps), fps=float(fps)).frames
    assert frames is not None
    expected = [8 * math.floor(index / fps * film_fps) for index in range(math.ceil(num_frames * fps / film_fps))]
    np.testing.assert_allclose(frames[:, 10:-10, 40:-8].mean(axis=(1, 2, 3)), expected, atol=7)


def test_the_rotation_of_a_phone_film_is_applied() -> None:
    upright = bytearray(film_file(3))
    unit, turned = (
        struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30),
        struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30),
    )
    at = upright.index(unit, upright.index(b"tkhd"))
    upright[at : at + 36] = turned
    frames = load_video(bytes(upright), fps=10).frames
    assert frames is not None and frames.shape[1:3] == (64, 48)
    assert frames[-1, :28].mean() < 5 < frames[-1, 36:].mean()  # the black left half is now on top


def test_an_animated_gif_is_a_film() -> None:
    pages = [Pillow.new("RGB", (20, 10), colour) for colour in ("red", "lime")]
    frames = load_video(picture_file(pages[0], "GIF", save_all=True, append_images=pages[1:], duration=1000)).frames
    assert frames is not None and [tuple(frame[5, 5]) for frame in frames] == [(255, 0, 0)] * 2 + [(0, 255, 0)] * 2


def test_film_limits_are_checked() -> None:
    film = film_file(30, 10)
    refusal(lambda: load_video(film, Limits(max_video_seconds=1.5)), "3.0 s", "1.5 s", "max_video_seconds")
    refusal(lambda: load_video(film, Limits(max_video_frames=5)), "limit of 5 frames", "max_video_frames")
    refusal(lambda: load_video(film, Limits(max_image_pixels=1000)), "64 x 48", "max_image_pixels")
    refusal(lambda: load_video(film, Limits(max_video_total_pixels=10_000)), "4 frames", "max_video_total_pixels")
    refusal(lambda: load_video(film, Limits(max_video_decoded_frames=20)), "20 frames", "max_video_decoded_frames")
    assert len(load_video(film, Limits(max_video_frames=6)).frames) == 6  # type: ignore[arg-type]
    with pytest.raises(BadConfig, match="fps is 0"):
        load_video(film, fps=0)


def test_film_limits_hold_where_the_header_declares_no_duration() -> None:
    film = film_file(60, 10, "mpegts", "libx264")
    refusal(lambda: load_video(film, Limits(max_video_seconds=3.0)), "more than 3 s")
    refusal(lambda: load_video(film, Limits(max_video_frames=3)), "limit of 3 frames")


def test_sound_given_as_a_film_says_so() -> None:
    refusal(lambda: load_video(compressed_sound("ipod", "aac", 0.5)), "holds no film", "audio")
    refusal(lambda: load_audio(film_file(3)), "holds no sound")


@pytest.mark.parametrize(
    ("format", "codec"), [("mp4", "libx264"), ("avi", "mpeg4"), ("matroska", "libx264"), ("webm", "libvpx-vp9")]
)
def test_a_film_that_was_cut_off_is_refused(format: str, codec: str) -> None:
    whole = film_file(30, 10, format, codec)
    for share in (0.1, 0.5, 0.8):
        refusal(partial(load_video, whole[: int(share * len(whole))]))


def test_parts_are_loaded_and_loaded_parts_are_checked(tmp_path: Path) -> None:
    files = {"a.wav": wav_bytes(tone(1.0, 8_000), 8_000), "i.png": png_bytes(RGB), "v.mp4": film_file(30)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    audio = load(Audio(path=tmp_path / "a.wav"))
    assert isinstance(audio, Audio) and audio.rate_hz == 16_000 and audio.path == tmp_path / "a.wav"
    again = load(audio, rate_hz=24_000)
    assert isinstance(again, Audio) and again.samples is not None and again.samples.shape == (24_000,)
    image, film = load(Image(path=tmp_path / "i.png")), load(Video(path=tmp_path / "v.mp4"), fps=1.0)
    assert load(image) is image and load(film) is film
    assert isinstance(film, Video) and film.frames is not None and len(film.frames) == 3
    assert load(Text("hello")) == Text("hello")


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (Audio(), "neither"),
        (Image(), "neither"),
        (Audio(samples=np.zeros(16_000, np.int16), rate_hz=16_000), "int16 [16000], expected float32 [W]"),
        (Audio(samples=np.zeros((2, 16_000), np.float32), rate_hz=16_000), "[2, 16000]"),
        (Audio(samples=np.zeros(0, np.float32), rate_hz=16_000), "no dimension 0"),
        (Audio(samples=np.full(16_000, np.nan, np.float32), rate_hz=16_000), "not finite"),
        (Audio(samples=np.zeros(16_000, np.float32)), "rate_hz is 0"),
        (Audio(samples=np.zeros(100, np.float32), rate_hz=16_000), "6.25 ms"),
        (Audio(samples=np.zeros(700_000, np.float32), rate_hz=1_000), "700.0 s"),
        (Image(pixels=np.zeros((4, 4), np.uint8)), "expected uint8 [H, W, 3]"),
        (Image(pixels=np.zeros((4, 4, 3), np.float32)), "float32"),
        (Image(pixels=np.broadcast_to(np.uint8(0), (9_000, 9_000, 3))), "9000 x 9000"),
        (Video(frames=np.zeros((2, 4, 4, 4), np.uint8), fps=1.0), "[2, 4, 4, 4]"),
        (Video(frames=np.zeros((2, 4, 4, 3), np.uint8)), "fps is 0"),
        (Video(frames=np.zeros((300, 4, 4, 3), np.uint8), fps=1.0), "256 frames"),
    ],
)
def test_unfit_arrays_are_refused(part: Audio | Image | Video, words: str) -> None:
    refusal(lambda: load(part), words)


def test_real_recordings_load_at_their_length(real_data: Path) -> None:
    paths = [*sorted((real_data / "fsdd").glob("*.wav"))[::250], *sorted((real_data / "sentences").rglob("*.wav"))]
    if not paths:
        pytest.skip(f"no wav files in fsdd/ and sentences/ of {real_data}")
    for path in paths:
        audio = load_audio(path)
        assert audio.samples is not None and np.abs(audio.samples).max() > 0.01
        assert abs(audio.seconds - soundfile.info(path).duration) < 1e-3
