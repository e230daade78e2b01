"""Real noise and rooms: what a folder holds, how loud a noise becomes, where words stay in a room."""

import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from suites import lines, sound

from nexus.errors import BadMedia, BadRecord
from nexus.eval.run import evaluate
from nexus.eval.suites.tasks import SuiteConfig, suite_of
from nexus.synth.noise import at_snr, excerpt, in_room, surroundings
from nexus.types import Audio


def noise(samples: int, seed: int = 0, level: float = 0.1) -> np.ndarray:
    return (level * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def power_db(wave: np.ndarray) -> float:
    return 10 * float(np.log10(np.square(wave, dtype=np.float64).mean()))


def clips(folder: Path, names: tuple[str, ...], seconds: float = 0.3) -> Path:
    for seed, name in enumerate(names):
        sound(folder / name, seconds, seed)
    return folder


@settings(deadline=None, max_examples=40)
@given(
    snr_db=st.floats(-10, 40),
    samples=st.integers(400, 4_000),
    noise_samples=st.integers(100, 8_000),
    level=st.floats(0.01, 0.9),
)
def test_the_noise_is_as_far_below_the_speech_as_asked(
    snr_db: float, samples: int, noise_samples: int, level: float
) -> None:
    speech, around = noise(samples, 1, level), noise(noise_samples, 2)
    mixed = at_snr(speech, around, snr_db)
    assert mixed.shape == speech.shape and mixed.dtype == np.float32
    assert np.abs(mixed).max() <= max(1.0, np.abs(speech).max()) + 1e-6
    heard = np.resize(around, samples)
    ratio, share = np.linalg.lstsq(np.stack([speech, heard], 1).astype(np.float64), mixed, rcond=None)[0]
    assert power_db(ratio * speech) - power_db(share * heard) == pytest.approx(snr_db, abs=0.05)


def test_silent_speech_stays_and_silent_noise_is_refused() -> None:
    silence = np.zeros(800, np.float32)
    np.testing.assert_array_equal(at_snr(silence, noise(800), 10), silence)
    with pytest.raises(BadMedia, match="noise is silent where it is to be mixed in"):
        at_snr(noise(800), silence, 10)


def test_an_excerpt_begins_where_something_is_heard_and_begins_anew_at_the_end() -> None:
    clip = np.concatenate([np.zeros(5_000), np.arange(1, 101)]).astype(np.float32)
    starts = {int(excerpt(clip, 10, random.Random(seed))[0]) for seed in range(200)}
    assert len(starts) > 50 and min(starts) >= 1
    whole = excerpt(clip, 2 * len(clip), random.Random(3))
    np.testing.assert_array_equal(whole[: len(clip)], whole[len(clip) :])
    with pytest.raises(BadMedia, match="noise is silent"):
        excerpt(np.zeros(100, np.float32), 10, random.Random(0))


def test_words_begin_in_a_room_where_they_began() -> None:
    speech = np.zeros(4_000, np.float32)
    speech[1_000] = 0.5
    impulse = np.zeros(3_000, np.float32)
    impulse[[700, 900, 2_900]] = 1.0, 0.5, 0.25  # direct sound, an echo, one that is still heard
    wet = in_room(speech, impulse)
    assert wet.shape == speech.shape
    assert wet.argmax() == 1_000
    assert np.flatnonzero(np.abs(wet) > 1e-4).tolist() == [1_000, 1_200, 3_200]
    assert power_db(wet) == pytest.approx(power_db(speech), abs=0.01)
    np.testing.assert_allclose(wet[1_200] / wet[1_000], 0.5, rtol=1e-4)


def test_a_room_of_one_impulse_changes_nothing() -> None:
    speech = noise(3_000, 4)
    np.testing.assert_allclose(in_room(speech, np.array([0.2], np.float32)), speech, atol=1e-5)
    with pytest.raises(BadMedia, match="impulse response is silent"):
        in_room(speech, np.zeros(10, np.float32))


def test_rooms_and_noises_are_told_apart_by_their_names(tmp_path: Path) -> None:
    clips(tmp_path, ("noise1.wav", "noise2.wav", "rir1.wav", "street/a.wav", "rirs/hall.wav", "inspirire/x.wav"))
    (tmp_path / "README.md").write_text("where these come from")
    found = surroundings(tmp_path)
    assert {(clip.name, clip.category) for clip in found.noises} == {
        ("noise1.wav", "noise"),
        ("noise2.wav", "noise"),
        ("street/a.wav", "street"),
        ("inspirire/x.wav", "inspirire"),
    }
    assert {clip.name for clip in found.rooms} == {"rir1.wav", "rirs/hall.wav"}
    assert len(found.noises[0].sound()) == 4_800


def test_a_folder_without_noise_is_refused(tmp_path: Path) -> None:
    clips(tmp_path, ("rir1.wav",))
    with pytest.raises(BadRecord, match=r"holds no noise \(1 rooms\), expected \.wav"):
        surroundings(tmp_path)
    with pytest.raises(BadRecord, match="is no folder"):
        surroundings(tmp_path / "absent")


def test_a_silent_clip_is_refused_by_name(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "noise.wav", np.zeros(1_000), 16_000)
    with pytest.raises(BadMedia, match=r"noise\.wav: is silent"):
        surroundings(tmp_path).noises[0].sound()


def test_what_is_held_out_is_never_trained_on_and_stays_so_when_others_come(tmp_path: Path) -> None:
    names = tuple(f"street/{number}.wav" for number in range(10))
    clips(tmp_path, (*names, "hum/only.wav", "rir1.wav", "rir2.wav"), 0.05)
    train, test = surroundings(tmp_path).split()
    assert {clip.name for clip in train.noises} | {clip.name for clip in test.noises} == {*names, "hum/only.wav"}
    assert not {clip.name for clip in train.noises} & {clip.name for clip in test.noises}
    assert (len(test.noises), len(train.rooms), len(test.rooms)) == (4, 1, 1)
    assert "hum/only.wav" in {clip.name for clip in train.noises}  # a category of one belongs to training
    clips(tmp_path, ("babble/1.wav", "babble/2.wav"), 0.05)
    again, held = surroundings(tmp_path).split()
    assert set(train.noises) < set(again.noises) and set(test.noises) < set(held.noises)


def test_the_fingerprint_of_surroundings_follows_names_and_sound(tmp_path: Path) -> None:
    names = ("hum1.wav", "hum2.wav", "rir1.wav")
    here, there = (surroundings(clips(tmp_path / name, names)) for name in "ab")
    assert here.fingerprint() == there.fingerprint()
    assert here.split()[0].fingerprint() != here.fingerprint()
    sound(tmp_path / "b" / "hum2.wav", 0.3, seed=9)
    assert there.fingerprint() != here.fingerprint()


def robustness(folder: Path) -> Path:
    """Two sentences and three noises."""
    rows = ["file\ttext", "a.wav\tone two three", "b.wav\tfour five"]
    lines(folder / "transcripts.tsv", rows)
    clips(folder, ("a.wav", "b.wav"), 0.5)
    clips(folder / "noise", ("hum1.wav", "hum2.wav", "hum3.wav"), 0.4)
    return folder


def test_robustness_asks_every_recording_at_every_level(tmp_path: Path) -> None:
    suite = suite_of("robustness", SuiteConfig(kind="robustness"), robustness(tmp_path))
    assert [item.id for item in suite.items[:5]] == ["a/clean", "a/20 dB", "a/10 dB", "a/5 dB", "a/0 dB"]
    sounds = [item.sample().turns[0].parts[0] for item in suite.items[:5]]
    assert isinstance(sounds[0], Audio) and sounds[0].path == tmp_path / "a.wav"
    speech = soundfile.read(tmp_path / "a.wav", dtype="float32")[0]
    for mixed, snr_db in zip(sounds[1:], (20, 10, 5, 0), strict=True):
        assert isinstance(mixed, Audio) and mixed.samples is not None
        assert power_db(speech) - power_db(mixed.samples - speech) == pytest.approx(snr_db, abs=0.05)


def test_robustness_scores_every_level_by_itself(tmp_path: Path) -> None:
    data = robustness(tmp_path / "data")
    suite = suite_of("robustness", SuiteConfig(kind="robustness"), data)
    said = [{"id": i.id, "text": "wrong" if i.group == "0 dB" else i.reference} for i in suite.items]
    answers = lines(tmp_path / "answers.jsonl", said)
    scores = evaluate(f"answers:{answers}", "robustness", data, tmp_path / "out")["robustness"]
    assert {name: group["wer"] for name, group in scores["groups"].items()} == {
        "clean": 0.0,
        "20 dB": 0.0,
        "10 dB": 0.0,
        "5 dB": 0.0,
        "0 dB": 1.0,
    }
    assert scores["n"] == 10


def test_robustness_without_noise_is_refused(tmp_path: Path) -> None:
    data = robustness(tmp_path)
    for clip in sorted((data / "noise").iterdir())[1:]:
        clip.unlink()
    with pytest.raises(BadRecord, match="expected at least 2 of one"):
        suite_of("robustness", SuiteConfig(kind="robustness"), data)
    with pytest.raises(BadRecord, match="elsewhere: is no folder"):
        suite_of("robustness", SuiteConfig(kind="robustness", noise="elsewhere"), data)
