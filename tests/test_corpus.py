"""The demo's sound: identities that do not hang on it, a plan that follows from the seed, shards that survive."""

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.demo import corpus
from nexus.demo.corpus import RATE_HZ, Plan, Utterance, Waves, finish, plan, speak_set
from nexus.demo.world import World
from nexus.engines.speak import Espeak, Voice
from nexus.recipe import WorldConfig
from nexus.types import Audio

ROOT = Path(__file__).resolve().parent.parent
SMALL = WorldConfig(heard=60, spoken=30, pictures=5, test_heard=20, test_questions=20, test_pictures=5, test_spoken=20)
SHARD = 8  # utterances, where a test must see several shards


@functools.cache
def small_plan(seed: int = 0) -> Plan:
    return plan(World(seed), SMALL.model_copy(update={"seed": seed}))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SHARD", SHARD)


def silent(count: int, seconds: float) -> None:
    """Nobody watches."""


def test_equal_utterances_have_equal_ids_and_every_parameter_counts() -> None:
    said = Utterance("two plus three is five", Voice("en-us+f2", 165, 50, 50), -3.0, 20.0)
    assert said.id == dataclasses.replace(said).id and len(said.id) == 16
    others = [
        dataclasses.replace(said, text="two plus three is six"),
        dataclasses.replace(said, voice=Voice("en-us+f3", 165, 50, 50)),
        dataclasses.replace(said, voice=Voice("en-us+f2", 166, 50, 50)),
        dataclasses.replace(said, voice=Voice("en-us+f2", 165, 51, 50)),
        dataclasses.replace(said, voice=Voice("en-us+f2", 165, 50, 51)),
        dataclasses.replace(said, gain_db=-3.1),
        dataclasses.replace(said, noise_db=20.1),
        dataclasses.replace(said, noise_db=None),
    ]
    assert len({said.id, *(other.id for other in others)}) == 1 + len(others)


def test_a_new_version_of_a_step_is_a_new_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Utterance("two", Voice("en-us+f2")).id
    monkeypatch.setitem(corpus.STEPS, "trim", 2)
    assert Utterance("two", Voice("en-us+f2")).id != before


def test_ids_and_plan_are_the_same_in_another_process() -> None:
    """Also with another hash seed: nothing hangs on the order of a set."""
    code = (
        "from nexus.demo.corpus import plan; from nexus.demo.world import World; from nexus.recipe import WorldConfig\n"
        f"p = plan(World(0), WorldConfig.model_validate_json({SMALL.model_dump_json()!r}))\n"
        "print(p.fingerprint, *(u.id for u in p.sets['heard']))"
    )
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [small_plan().fingerprint, *(u.id for u in small_plan().sets["heard"])]


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_the_seed_alone_decides_the_plan(seed: int, other: int) -> None:
    first, again, second = (plan(World(s), SMALL.model_copy(update={"seed": s})) for s in (seed, seed, other))
    assert first == again and first.fingerprint == again.fingerprint
    assert (first.fingerprint == second.fingerprint) == (seed == other)


def test_the_sets_have_the_sizes_that_were_asked_for() -> None:
    sizes = {name: len(members) for name, members in small_plan().sets.items()}
    assert sizes == {
        "heard": 60,
        "spoken": 30,
        "test_heard": 20,
        "test_questions": 20,
        "test_spoken": 20,
        "test_answers": 20,
    }


def test_questions_and_replies_belong_to_their_utterances() -> None:
    plans = small_plan()
    heard, spoken = plans.sets["heard"], plans.sets["spoken"]
    assert [u.text for u in heard[: len(plans.questions)]] == [item.question for item in plans.questions]
    assert [u.text for u in plans.sets["test_questions"]] == [item.question for item in plans.test_questions]
    replies = [(item, place) for item, place in zip(plans.questions, plans.replies, strict=True) if place >= 0]
    assert replies and all(spoken[place].text == item.answer for item, place in replies)


@pytest.mark.parametrize("seed", [0, 5])
def test_nothing_that_is_tested_was_trained_on(seed: int) -> None:
    sets = plan(World(seed), WorldConfig(seed=seed, heard=4000, spoken=2000, pictures=5)).sets
    train = {u.text for name in ("heard", "spoken") for u in sets[name]}
    test = {u.text for name in ("test_heard", "test_questions", "test_spoken") for u in sets[name]}
    assert not train & test
    heard = {u.voice.name.partition("+")[2] for u in sets["heard"]}
    tested = {u.voice.name.partition("+")[2] for name in ("test_heard", "test_questions") for u in sets[name]}
    assert len(heard) > 30 and len(tested) > 3 and not heard & tested


def test_the_voice_to_be_learned_is_one_and_clean() -> None:
    sets = small_plan().sets
    target = Voice(SMALL.target_voice, SMALL.target_rate_wpm)
    assert {
        (u.voice, u.gain_db, u.noise_db) for name in ("spoken", "test_spoken", "test_answers") for u in sets[name]
    } == {(target, 0.0, None)}
    assert len({u.text for u in sets["spoken"]}) == len(sets["spoken"])


def test_noise_is_as_loud_as_planned_and_differs_from_clip_to_clip() -> None:
    speaker, noises = Espeak(), []
    low, high = SMALL.noise_db
    for utterance in small_plan().sets["heard"][:24]:
        utterance = dataclasses.replace(utterance, gain_db=-12.0)  # far from full scale, so that nothing is clipped
        sound = speaker.speak(utterance.text, utterance.voice)
        clean = finish(dataclasses.replace(utterance, noise_db=None), sound).astype(np.float64)
        noise = finish(utterance, sound) - clean
        ratio_db = 10 * np.log10(np.square(clean).mean() / np.square(noise).mean())
        assert utterance.noise_db is not None and low <= utterance.noise_db <= high
        assert ratio_db == pytest.approx(utterance.noise_db, abs=0.3), utterance
        noises.append(noise[:4000])
    likeness = np.corrcoef([noise / noise.std() for noise in noises])
    assert np.abs(likeness - np.eye(len(noises))).max() < 0.9


def test_a_clip_is_trimmed_at_both_ends_levelled_and_at_16_khz() -> None:
    speaker = Espeak()
    said = Utterance("seven red circle", Voice("en-us+f2"))
    sound = speaker.speak(said.text, said.voice)
    assert sound.samples is not None
    quiet = np.zeros(sound.rate_hz, np.float32)
    wave, longer = (
        finish(said, Audio(samples=np.concatenate([*[quiet] * n, sound.samples, quiet]), rate_hz=sound.rate_hz))
        for n in (1, 2)
    )
    assert wave.dtype == np.int16 and np.array_equal(wave, longer)
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    margin = round(0.04 * RATE_HZ)
    assert 0 <= loud[0] <= 1.5 * margin and 0 <= len(wave) - loud[-1] <= 1.5 * margin
    quieter = finish(dataclasses.replace(said, gain_db=-6.0), sound)
    assert np.abs(quieter).max() / np.abs(wave).max() == pytest.approx(10 ** (-6 / 20), rel=0.01)


def test_waveforms_come_back_as_they_were_made(tmp_path: Path) -> None:
    utterances = small_plan().sets["heard"][:20]
    told: list[tuple[int, float]] = []
    waves = speak_set(tmp_path, utterances, 1, lambda count, seconds: told.append((count, seconds)))
    assert len(waves) == 20 == sum(count for count, _ in told)
    assert sum(seconds for _, seconds in told) == pytest.approx(waves.lengths.sum() / RATE_HZ)
    speaker = Espeak()
    for place in (0, 7, 8, 19):  # both sides of a shard's border
        said = utterances[place]
        made = finish(said, speaker.speak(said.text, said.voice))
        found = waves[place]
        assert found.rate_hz == RATE_HZ and found.samples is not None
        assert np.array_equal(np.round(found.samples * 32767).astype(np.int16), made)
    assert Waves(tmp_path, utterances).digest() == waves.digest()


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_what_is_there_is_not_spoken_again(tmp_path: Path) -> None:
    utterances = small_plan().sets["heard"][:20]
    digest = speak_set(tmp_path, utterances, 1, silent).digest()
    before, told = times(tmp_path), []
    assert speak_set(tmp_path, utterances, 1, lambda count, _: told.append(count)).digest() == digest
    assert times(tmp_path) == before and sum(told) == 20


def test_other_utterances_in_the_same_folder_are_not_mistaken_for_these(tmp_path: Path) -> None:
    heard = small_plan().sets["heard"]
    speak_set(tmp_path / "shared", heard[:16], 1, silent)
    other = [*heard[:8], *heard[16:24]]  # the second shard differs
    before = times(tmp_path / "shared")
    waves = speak_set(tmp_path / "shared", other, 1, silent)
    assert waves.digest() == speak_set(tmp_path / "alone", other, 1, silent).digest()
    after = times(tmp_path / "shared")
    assert {name for name in before if before[name] != after[name]} == {"001.i16", "001.lengths.npy", "001.json"}


@pytest.mark.parametrize("damage", ["shorter", "gone", "undeclared"])
def test_a_damaged_shard_is_made_again(damage: str, tmp_path: Path) -> None:
    utterances = small_plan().sets["heard"][:16]
    digest = speak_set(tmp_path, utterances, 1, silent).digest()
    match damage:
        case "shorter":
            (tmp_path / "001.i16").write_bytes((tmp_path / "001.i16").read_bytes()[:-100])
        case "gone":
            (tmp_path / "001.i16").unlink()
        case "undeclared":
            (tmp_path / "001.json").unlink()
    assert speak_set(tmp_path, utterances, 1, silent).digest() == digest


SPEAKING = """
import sys
from pathlib import Path
from nexus.demo import corpus
from nexus.demo.world import World
from nexus.recipe import WorldConfig

if __name__ == "__main__":
    corpus.SHARD = {shard}
    plans = corpus.plan(World(0), WorldConfig(heard=400, spoken=30, pictures=5))
    waves = corpus.speak_set(Path(sys.argv[1]), plans.sets["heard"], 1, lambda count, seconds: None)
    print(waves.digest())
"""


def test_shards_survive_a_kill_in_the_middle_of_speaking(tmp_path: Path) -> None:
    script, shard = tmp_path / "speak.py", 40
    script.write_text(SPEAKING.format(shard=shard))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def speak(folder: str) -> subprocess.Popen[str]:
        line = [sys.executable, str(script), str(tmp_path / folder)]
        return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)

    process = speak("broken")
    deadline = time.monotonic() + 60
    while not (tmp_path / "broken" / "002.json").is_file():  # three shards are whole, the fourth is being spoken
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    whole = {path.stem for path in (tmp_path / "broken").glob("*.json")}
    assert 3 <= len(whole) < 10
    before = {name: when for name, when in times(tmp_path / "broken").items() if name.split(".")[0] in whole}
    digests = []
    for folder in ("broken", "never"):
        process = speak(folder)
        digests.append(process.communicate(timeout=60)[0])
        assert process.returncode == 0
    assert digests[0] == digests[1] and digests[0].strip()
    after = times(tmp_path / "broken")
    assert {name: after[name] for name in before} == before
    assert not list((tmp_path / "broken").glob("*.part"))
