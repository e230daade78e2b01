"""Long recordings cut into utterances: no word lost, nothing kept in memory, every bad recording refused in words."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from files import tone
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.media import load_audio
from nexus.source import DEFAULT
from nexus.synth.records import Record, Rejected, first_attempt
from nexus.synth.segment import SegmentConfig, Segmenter, survey
from nexus.types import Audio

RATE = 16_000
CUT = SegmentConfig(whole_seconds=0.1)


def speech(seconds: float, seed: int = 0, rate_hz: int = RATE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    carrier = sum(np.sin(2 * np.pi * hz * time + rng.uniform(0, 6)) for hz in (220, 700, 1200, 1900, 2600))
    return (0.1 * carrier * (0.6 - 0.4 * np.cos(2 * np.pi * 4 * time))).astype(np.float32)


def talk(lengths: list[float], pause: float = 1.0, noise: float = 1e-4, seed: int = 0) -> tuple[np.ndarray, list]:
    """Utterances of these seconds with pauses around them, in noise; and their (start, end) in seconds."""
    rng, parts, places, at = np.random.default_rng(seed), [np.zeros(round(pause * RATE))], [], pause
    for index, length in enumerate(lengths):
        parts += [speech(length, index), np.zeros(round(pause * RATE))]
        places.append((at, at + length))
        at += length + pause
    wave = np.concatenate(parts)
    return (wave + noise * rng.standard_normal(len(wave))).astype(np.float32), places


def recording(path: Path, **meta: object) -> Record:
    return first_attempt("", "en", {"file": path.name, **meta}, Audio(path=path))


def pieces(path: Path, config: SegmentConfig = CUT) -> list[Record | Rejected]:
    return list(Segmenter(config).pieces(recording(path)))


def written(path: Path, wave: np.ndarray, rate_hz: int = RATE, **options: str) -> Path:
    soundfile.write(path, wave, rate_hz, **options)
    return path


@pytest.mark.parametrize("noise", [0.0, 1e-4, 0.02])
def test_every_utterance_is_found_whole_and_alone(tmp_path: Path, noise: float) -> None:
    wave, places = talk([2.0, 0.6, 4.0, 1.2], noise=noise)
    found = pieces(written(tmp_path / "a.wav", wave))
    assert len(found) == len(places)
    for piece, (start, end) in zip(found, places, strict=True):
        cut = piece.meta["segment"]
        assert start - 0.5 < cut["start_seconds"] <= start + 0.05 and end - 0.05 <= cut["end_seconds"] < end + 0.5
        assert piece.sound.rate_hz == RATE and piece.sound.seconds == pytest.approx(
            cut["end_seconds"] - cut["start_seconds"]
        )
        offset = round(cut["start_seconds"] * RATE)
        assert np.allclose(piece.sound.samples, wave[offset : offset + len(piece.sound.samples)], atol=1e-4)


def test_a_floor_that_changes_is_followed(tmp_path: Path) -> None:
    quiet, places = talk([2.0] * 10, noise=1e-4)
    loud, others = talk([2.0] * 10, noise=0.03, seed=1)
    path = written(tmp_path / "a.wav", np.concatenate([quiet, loud]))
    found = [piece.meta["segment"] for piece in pieces(path)]
    shift = len(quiet) / RATE
    for start, end in places + [(a + shift, b + shift) for a, b in others]:
        assert any(cut["start_seconds"] <= start + 0.1 and cut["end_seconds"] >= end - 0.1 for cut in found)
    assert sum(cut["end_seconds"] - cut["start_seconds"] for cut in found) < 0.9 * (len(quiet) + len(loud)) / RATE
    assert found[0]["snr_db"] > found[-1]["snr_db"] + 20


@settings(max_examples=25)
@given(st.lists(st.floats(0.3, 3.0), min_size=1, max_size=5), st.floats(0.05, 0.4), st.floats(1.0, 2.5))
def test_pieces_are_in_order_apart_and_short_enough(
    tmp_path_factory, lengths: list[float], pad: float, longest: float
) -> None:
    wave, _ = talk(lengths, pause=0.7)
    path = written(tmp_path_factory.mktemp("talk") / "a.wav", wave)
    config = SegmentConfig(whole_seconds=0.1, pad_seconds=min(pad, longest / 4), max_seconds=longest)
    cuts = [piece.meta["segment"] for piece in pieces(path, config)]
    ends = 0.0
    for cut in cuts:
        assert ends <= cut["start_seconds"] < cut["end_seconds"] <= cut["start_seconds"] + longest + 0.01
        ends = cut["end_seconds"]


def test_a_long_utterance_is_cut_without_losing_a_sample(tmp_path: Path) -> None:
    path = written(tmp_path / "a.wav", talk([30.0])[0])
    found = pieces(path, SegmentConfig(whole_seconds=0.1, max_seconds=7.0))
    cuts = [piece.meta["segment"] for piece in found]
    assert len(cuts) >= 5
    assert [cut["end_seconds"] for cut in cuts[:-1]] == [cut["start_seconds"] for cut in cuts[1:]]
    assert cuts[0]["start_seconds"] <= 1.0 and cuts[-1]["end_seconds"] >= 31.0


def test_a_short_recording_stays_whole(tmp_path: Path) -> None:
    wave, _ = talk([2.0, 2.0])
    (piece,) = pieces(written(tmp_path / "a.wav", wave), SegmentConfig())
    assert len(piece.sound.samples) == len(wave)


def test_ids_follow_place_and_sound(tmp_path: Path) -> None:
    path = written(tmp_path / "a.wav", talk([1.0, 1.0])[0])
    first, again = pieces(path), pieces(path)
    assert [piece.id for piece in first] == [piece.id for piece in again] and first[0].id != first[1].id
    written(path, 0.5 * talk([1.0, 1.0])[0])
    assert {piece.id for piece in pieces(path)}.isdisjoint(piece.id for piece in first)


def test_a_hearing_in_blocks_equals_one_in_one_go(tmp_path: Path) -> None:
    wave = talk([2.0, 3.0, 1.0])[0]
    for rate_hz, name in ((RATE, "a.wav"), (44_100, "b.flac"), (11_025, "c.wav")):
        path = written(tmp_path / name, wave, rate_hz)
        about = survey(path, DEFAULT)
        whole = load_audio(path).samples
        (piece,) = Segmenter(SegmentConfig(whole_seconds=60.0, max_seconds=60.0)).pieces(recording(path))
        assert np.array_equal(piece.sound.samples, whole)
        assert about.num_samples == len(whole) and len(about.levels_db) == len(about.clipped) == -(-len(whole) // 160)


def test_96_kilohertz_and_eight_channels_are_one_voice_at_16(tmp_path: Path) -> None:
    wave = speech(2.0, rate_hz=96_000)
    path = written(tmp_path / "a.wav", np.stack([wave] * 8, 1), 96_000)
    (piece,) = pieces(path, SegmentConfig())
    assert piece.meta["segment"]["channels"] == 8 and piece.meta["segment"]["rate_hz"] == 96_000
    assert len(piece.sound.samples) == 2 * RATE


def hiss(seconds: float) -> np.ndarray:
    return 0.05 * np.random.default_rng(0).standard_normal(round(seconds * RATE))


@pytest.mark.parametrize(
    ("wave", "reason"),
    [
        (np.zeros(3 * RATE), "silent"),
        (1e-4 * np.ones(3 * RATE), "silent"),  # an offset is no sound
        (hiss(20.0), "no_speech"),
        (tone(20.0, RATE), "no_speech"),
    ],
    ids=["silence", "offset", "hiss", "tone"],
)
def test_recordings_without_speech_say_so(tmp_path: Path, wave: np.ndarray, reason: str) -> None:
    (rejected,) = pieces(written(tmp_path / "a.wav", wave))
    assert isinstance(rejected, Rejected) and rejected.reason == reason


def test_only_the_clipped_utterance_is_rejected(tmp_path: Path) -> None:
    wave = np.concatenate([np.zeros(RATE), speech(2.0), np.zeros(RATE), 12 * speech(2.0), np.zeros(RATE), speech(2.0)])
    wave = np.clip(wave + 1e-4 * hiss(9.0), -1, 1)
    first, second, third = pieces(written(tmp_path / "a.wav", wave, subtype="FLOAT"))
    assert isinstance(first, Record) and isinstance(third, Record)
    assert isinstance(second, Rejected) and second.reason == "clipped" and 0.05 < second.numbers["share"] < 1


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3"])
def test_a_damaged_recording_gives_no_piece_at_all(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, talk([2.0] * 5)[0])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (rejected,) = pieces(path)
    assert isinstance(rejected, Rejected) and rejected.reason == "unreadable" and name in rejected.numbers["error"]


def test_text_a_missing_file_and_a_recording_too_long_are_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("no sound")
    long = written(tmp_path / "b.wav", talk([2.0])[0])
    for path in (tmp_path / "a.wav", tmp_path / "none.wav", long):
        (rejected,) = pieces(path, SegmentConfig(max_hours=1 / 3600))
        assert rejected.reason == "unreadable" and path.name in rejected.numbers["error"]


def test_memory_does_not_grow_with_the_recording(tmp_path: Path) -> None:
    peaks = []
    for name, repeats in (("a.wav", 4), ("b.wav", 24)):
        path = written(tmp_path / name, np.tile(talk([4.0, 5.0])[0], repeats))
        segmenter, number = Segmenter(CUT), 0
        tracemalloc.start()
        for piece in segmenter.pieces(recording(path)):
            number += isinstance(piece, Record)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert number == 2 * repeats
    assert peaks[1] < peaks[0] + 2 * 2**20  # 4 MB of levels for three hours; as samples five minutes are 17 MB


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_hours_are_cut_in_the_memory_of_three_minutes(tmp_path: Path) -> None:
    check_hours(tmp_path / "a.wav", 3)


def check_hours(path: Path, hours: float) -> None:
    minute = talk([9.0, 9.0, 9.0, 9.0, 9.0, 9.0])[0][
        : 60 * RATE : 2
    ]  # at 8 kHz; what this folds over is no matter here
    with soundfile.SoundFile(path, "w", RATE // 2, 1) as file:
        for _ in range(round(60 * hours)):
            file.write(minute)
    tracemalloc.start()
    spoken = sum(piece.sound.seconds for piece in Segmenter(CUT).pieces(recording(path)) if isinstance(piece, Record))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.85 < spoken / (3600 * hours) < 0.99
    assert peak < (44 + 4 * hours) * 2**20  # the samples alone are 220 MiB an hour


def test_stretches_that_rows_name_are_cut_where_they_say(tmp_path: Path) -> None:
    wave = talk([2.0, 2.0, 2.0])[0]
    path = written(tmp_path / "a.wav", wave)
    places = [(4.0, 2.0), (1.0, 2.5), (2.0, 4.5), (8.0, 100.0), (-1.0, 2.0)]
    rows = [recording(path, start=start, seconds=seconds) for start, seconds in places]
    found = list(Segmenter(CUT).cuts(path, rows))
    outside = [each for each in found if isinstance(each, Rejected)]
    assert [each.reason for each in outside] == ["outside", "outside"]
    kept = [each for each in found if isinstance(each, Record)]
    assert [each.meta["start"] for each in kept] == [1.0, 2.0, 4.0]
    for each in kept:
        start, end = round(each.meta["start"] * RATE), round((each.meta["start"] + each.meta["seconds"]) * RATE)
        assert np.allclose(each.sound.samples, wave[start:end], atol=1e-4)


def test_real_questions_in_real_noise_lose_nothing(tmp_path: Path, real_data: Path) -> None:
    files = sorted((real_data / "llama_questions").glob("*.wav"))[:30]
    noise = load_audio(real_data / "noise" / "noise1.wav").samples
    rng, parts, places, at = np.random.default_rng(0), [], [], 0
    for path in files:
        wave, gap = load_audio(path).samples, int(rng.integers(12_000, 40_000))
        loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
        places.append((at + gap + loud[0], at + gap + loud[-1]))
        parts += [np.zeros(gap, np.float32), wave]
        at += gap + len(wave)
    mixed = np.concatenate(parts)
    power = np.mean([np.square(mixed[a:b]).mean() for a, b in places])
    heard = np.resize(noise, len(mixed))
    mixed = mixed + heard * np.sqrt(power / np.square(heard).mean() / 10)  # 10 dB
    path = written(tmp_path / "a.wav", 0.5 * mixed)
    cuts = [piece.meta["segment"] for piece in pieces(path)]
    spans = [(cut["start_seconds"] * RATE, cut["end_seconds"] * RATE) for cut in cuts]
    covered = sum(max(0, min(b, end) - max(a, start)) for a, b in places for start, end in spans)
    assert covered / sum(b - a for a, b in places) > 0.99
    assert sum(end - start for start, end in spans) < 0.85 * len(mixed)
