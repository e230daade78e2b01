"""Sound, and parts of any kind: what is understood whole, and what is refused, with which words."""

import math
import struct
import time
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from files import RGB, compressed_sound, film_file, refusal, sound_file, tone
from hypothesis import given
from hypothesis import strategies as st

from nexus.media import StreamResampler, load, load_audio, resample, wav_bytes, write_wav
from nexus.sight import png_bytes
from nexus.source import Limits
from nexus.types import Audio, Image, Text, Video

RNG = np.random.default_rng(7)


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
