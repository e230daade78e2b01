"""What holds for every loader: what is no fit file is refused in one line, and damage is survived in silence."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from files import compressed_sound, film_file, picture_file, refusal, sound_file, tone
from PIL import Image as Pillow

from nexus.errors import BadConfig, BadMedia
from nexus.media import load_audio
from nexus.sight import load_image, load_video, png_bytes
from nexus.source import Limits

RNG = np.random.default_rng(7)
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


def test_sound_given_as_a_film_says_so() -> None:
    refusal(lambda: load_video(compressed_sound("ipod", "aac", 0.5)), "holds no film", "audio")
    refusal(lambda: load_audio(film_file(3)), "holds no sound")


def test_an_unfit_limit_is_refused() -> None:
    with pytest.raises(BadConfig, match="max_audio_seconds is -1"):
        Limits(max_audio_seconds=-1)
