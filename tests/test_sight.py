"""Pictures and films: what is understood whole, and what is refused, before and while decoding."""

import math
import struct
import time
import tracemalloc
import zlib
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from files import RGB, film_file, picture_file, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from nexus.errors import BadConfig
from nexus.sight import load_image, load_video, png_bytes
from nexus.source import Limits

RNG = np.random.default_rng(7)


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


@pytest.mark.parametrize(
    ("format", "codec"), [("mp4", "libx264"), ("avi", "mpeg4"), ("matroska", "libx264"), ("webm", "libvpx-vp9")]
)
def test_a_film_that_was_cut_off_is_refused(format: str, codec: str) -> None:
    whole = film_file(30, 10, format, codec)
    for share in (0.1, 0.5, 0.8):
        refusal(partial(load_video, whole[: int(share * len(whole))]))
