"""The demo's corpus as it is spoken: sounds as they were planned, a gate that blames no voice, shards that survive."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab import small_world

from nexus.demo import spoken
from nexus.demo.corpus import Plan, Utterance, plan
from nexus.demo.manner import Delivery
from nexus.demo.spoken import RATE_HZ, Listen, Say, Surround, Waves, around_of, counts, said, speak
from nexus.demo.world import World
from nexus.engines.speak import Espeak, Voice
from nexus.engines.transcribe import Heard
from nexus.errors import BadConfig, BadRecord, NexusError
from nexus.media import write_wav
from nexus.progress import Progress
from nexus.synth.records import Record, Rejected
from nexus.synth.verify import Verify, VerifyConfig
from nexus.types import Audio

ROOT = Path(__file__).resolve().parent.parent
SMALL = small_world()
SHARD = 8  # utterances, so that a few make several shards


@functools.cache
def small_plan() -> Plan:
    return plan(World(0), SMALL)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spoken, "SHARD", SHARD)
    monkeypatch.setattr(spoken, "BATCH", SHARD)


def made(folder: Path, utterances: Sequence[Utterance], verified: float = 0.0) -> Waves:
    return speak(folder, {"heard": utterances}, verified, 1, Progress())["heard"]


# Sounds


class Canned(Espeak):
    """Says what it was given."""

    def __init__(self, sound: Audio) -> None:
        self.sound = sound

    def speak(self, text: str, voice: Voice) -> Audio:
        return self.sound


def finished(utterance: Utterance, sound: Audio) -> np.ndarray:
    """What becomes of a synthesiser's sound in the end, f32 [W]."""
    given = spoken._rows({"heard": [utterance]}, "")
    [record] = [row.with_(sound=said(Canned(sound), row.text, utterance.delivery)) for row in given]  # type: ignore[union-attr]
    [result] = Surround(None)([record])
    assert isinstance(result, Record) and result.sound is not None and result.sound.samples is not None
    return result.sound.samples


def with_delivery(utterance: Utterance, **changes: Any) -> Utterance:
    return Utterance(utterance.text, dataclasses.replace(utterance.delivery, **changes))


def test_noise_is_as_loud_as_planned_and_differs_from_clip_to_clip() -> None:
    speaker, noises = Espeak(), []
    low, high = SMALL.noise_db
    for utterance in small_plan().sets["heard"][:24]:
        wanted_db = utterance.delivery.noise_db
        sound = speaker.speak(utterance.text, utterance.delivery.voice)
        clean = finished(with_delivery(utterance, noise_db=None), sound).astype(np.float64)
        noise = finished(utterance, sound) - clean
        ratio_db = 10 * np.log10(np.square(clean).mean() / np.square(noise).mean())
        assert wanted_db is not None and low <= wanted_db <= high
        assert ratio_db == pytest.approx(wanted_db, abs=0.3), utterance
        noises.append(noise[:4000])
    likeness = np.corrcoef([noise / noise.std() for noise in noises])
    assert np.abs(likeness - np.eye(len(noises))).max() < 0.9


def test_a_clip_is_trimmed_at_both_ends_levelled_and_at_16_khz() -> None:
    speaker = Espeak()
    words = Utterance("seven red circle", Delivery(Voice("en-us+f2")))
    sound = speaker.speak(words.text, words.delivery.voice)
    assert sound.samples is not None
    quiet = np.zeros(sound.rate_hz, np.float32)
    wave, longer = (
        finished(words, Audio(samples=np.concatenate([*[quiet] * n, sound.samples, quiet]), rate_hz=sound.rate_hz))
        for n in (1, 2)
    )
    assert len(wave) == len(longer) and np.abs(wave - longer).max() < 1e-4
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    margin = round(0.04 * RATE_HZ)
    assert 0 <= loud[0] <= 1.5 * margin and 0 <= len(wave) - loud[-1] <= 1.5 * margin
    quieter = finished(with_delivery(words, gain_db=-6.0), sound)
    assert np.abs(quieter).max() / np.abs(wave).max() == pytest.approx(10 ** (-6 / 20), rel=0.01)


def test_a_delivery_makes_the_sound_tremble_and_bright() -> None:
    words = Utterance("seven red circle", Delivery(Voice("en-us+f2"), -12.0))
    sound = Espeak().speak(words.text, words.delivery.voice)
    plain, trembling, bright = (
        finished(each, sound).astype(np.float64)
        for each in (
            words,
            with_delivery(words, tremor_depth=0.9, tremor_hz=10.0),
            with_delivery(words, slope_db_per_octave=4.0),
        )
    )
    assert len(plain) == len(trembling) == len(bright)
    assert (np.abs(trembling) <= np.abs(plain) + 1e-4).all()
    assert 0.2 < np.square(trembling).mean() / np.square(plain).mean() < 0.6

    def share_above_2_khz(wave: np.ndarray) -> float:
        power = np.abs(np.fft.rfft(wave)) ** 2
        return float(power[np.fft.rfftfreq(len(wave), 1 / RATE_HZ) > 2000].sum() / power.sum())

    assert share_above_2_khz(bright) > 2 * share_above_2_khz(plain)


def test_waveforms_come_back_as_they_were_made(tmp_path: Path) -> None:
    sets = {"heard": small_plan().sets["heard"][:13], "mandarin": small_plan().sets["mandarin"][:7]}
    waves = speak(tmp_path, sets, 0.0, 2, Progress())
    assert {name: len(each) for name, each in waves.items()} == {"heard": 13, "mandarin": 7}
    speaker = Espeak()
    for name, place in (("heard", 0), ("heard", 7), ("heard", 8), ("heard", 12), ("mandarin", 0), ("mandarin", 6)):
        utterance, found = sets[name][place], waves[name][place]
        wave = finished(utterance, speaker.speak(utterance.text, utterance.delivery.voice))
        assert found.rate_hz == RATE_HZ and found.samples is not None
        assert np.array_equal(np.round(found.samples * 32767), np.round(np.clip(wave, -1, 1) * 32767)), (name, place)
    assert waves["heard"].places == list(range(13))


def tone(path: Path, hz: int) -> None:
    path.parent.mkdir(exist_ok=True)
    wave = 0.3 * np.sin(2 * np.pi * hz * np.arange(RATE_HZ) / RATE_HZ)
    write_wav(path, wave.astype(np.float32), RATE_HZ)


def loudest_hz(sound: Audio) -> int:
    assert sound.samples is not None
    power = np.abs(np.fft.rfft(sound.samples, RATE_HZ)) ** 2
    return int(power.argmax())


def test_real_noise_differs_between_training_and_examination_and_belongs_to_the_corpus(tmp_path: Path) -> None:
    pitches = {"hum1.wav": 5000, "hum2.wav": 6000}
    for name, hz in pitches.items():
        tone(tmp_path / "noise" / name, hz)
    around = around_of(str(tmp_path / "noise"))
    loud = [with_delivery(utterance, noise_db=-20.0) for utterance in small_plan().sets["heard"][:4]]
    sets = {"heard": loud, "test_heard": loud}
    waves = speak(tmp_path / "cache", sets, 0.0, 1, Progress(), around)
    for name, clips in (("heard", around.learned.noises), ("test_heard", around.examined.noises)):
        assert {loudest_hz(waves[name][place]) for place in range(4)} == {pitches[clip.name] for clip in clips}
    with pytest.raises(BadConfig, match="was done, and is another one now"):
        speak(tmp_path / "cache", sets, 0.0, 1, Progress())
    (tmp_path / "noise" / "hum2.wav").unlink()
    with pytest.raises(BadConfig, match=r"world\.noise: .* 1 noises for training and 0 for the examination"):
        around_of(str(tmp_path / "noise"))


def test_some_utterances_sound_in_a_real_room_and_none_becomes_longer(tmp_path: Path) -> None:
    for name, hz in (("hum1.wav", 50), ("hum2.wav", 60), ("rir1.wav", 90), ("rir2.wav", 80)):
        tone(tmp_path / "noise" / name, hz)
    quiet = [with_delivery(utterance, noise_db=None) for utterance in small_plan().sets["heard"][:24]]
    plain = speak(tmp_path / "plain", {"heard": quiet}, 0.0, 1, Progress())["heard"]
    roomy = speak(tmp_path / "roomy", {"heard": quiet}, 0.0, 1, Progress(), around_of(str(tmp_path / "noise")))["heard"]
    assert np.array_equal(plain.lengths, roomy.lengths)
    same = [np.array_equal(plain[place].samples, roomy[place].samples) for place in range(24)]
    assert 0 < same.count(False) < 16


# The gate


class Ear:
    """Hears every text in voices whose names it knows but a given one; of others nothing."""

    id = "double"

    def __init__(self, knows: str, but: str = "") -> None:
        self.knows, self.but, self.heard = knows, but, list[str]()

    def hear(self, audios: Sequence[Audio], language: str) -> list[Heard]:
        text, voice = current
        self.heard.append(text)
        return [Heard(text if voice.startswith(self.knows) and text != self.but else "", 1.0)]


current = ("", "")


class Noted(Espeak):
    """A tone for every text, and a note of it for the double of a recogniser."""

    def __init__(self) -> None: ...

    def speak(self, text: str, voice: Voice) -> Audio:
        global current
        current = (text, voice.name)
        return Audio(samples=np.sin(np.arange(RATE_HZ) / 9).astype(np.float32), rate_hz=RATE_HZ)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Record | Rejected]:
    monkeypatch.setattr(spoken, "Espeak", Noted)

    def judge(ear: Ear, name: str, voice: str, fraction: float = 1.0) -> Record | Rejected:
        config = VerifyConfig(fraction=fraction, max_wer=spoken.MAX_WER, seconds_per_letter={}, retries=0)
        monkeypatch.setattr("nexus.synth.verify.open_ear", lambda *_: ear)
        say, listen = Say(), Listen(Verify(config, tmp_path, None), ("one two three", "four five six", "seven eight"))
        for step in (say, listen):
            step.setup()
        records = say([*spoken._rows({name: [Utterance("the red circle", Delivery(Voice(voice)))]}, "")])  # type: ignore[list-item]
        [result] = listen(records)  # type: ignore[arg-type]
        return result

    return judge


def state(result: Record | Rejected) -> str:
    assert isinstance(result, Record)
    return str(result.meta["verify"]["state"])


def test_what_is_understood_is_verified_and_what_is_not_drawn_is_not_heard(judged: Any) -> None:
    assert state(judged(Ear("en-us"), "heard", "en-us+f2")) == "verified"
    ear = Ear("en-us")
    assert state(judged(ear, "heard", "en-us+f2", 1e-9)) == "unchecked"
    assert state(judged(ear, "mandarin", "cmn+f2")) == "unverified" and ear.heard == []


def test_a_clip_fails_only_where_the_same_voice_is_understood_on_other_texts(judged: Any) -> None:
    ear = Ear("en-us", but="the red circle")
    rejected = judged(ear, "heard", "en-us+f2")
    assert isinstance(rejected, Rejected) and rejected.reason == "not_heard"
    assert len(ear.heard) == 1 + spoken.CONTROLS
    deaf = Ear("en-us")
    assert state(judged(deaf, "heard", "en-gb-scotland+f2")) == "unverified"
    assert len(deaf.heard) == 2, "one control that is not understood is enough"


def test_what_is_examined_is_judged_and_never_rejected(judged: Any) -> None:
    kept = judged(Ear("en-us", but="the red circle"), "test_heard", "en-us+f2")
    assert state(kept) == "failed" and kept.sound is not None


def test_the_real_recogniser_understands_the_best_voice_and_tells_wrong_texts(tmp_path: Path) -> None:
    """Texts are exchanged behind the synthesiser's back: what is said is not what is written."""
    texts = [utterance.text for utterance in small_plan().sets["spoken"]]
    right = [Utterance(text, Delivery(Voice("en-us+f2"))) for text in texts[:8]]
    say, listen = spoken._steps(tmp_path, {"spoken": [Utterance(t, right[0].delivery) for t in texts]}, 1.0)
    for step in (say, listen):
        step.setup()
    records = say([*spoken._rows({"spoken": right}, "")])  # type: ignore[list-item]
    wrong = [record.with_(text=other) for record, other in zip(records, texts[8:], strict=False)]  # type: ignore[union-attr]
    results = listen(records)  # type: ignore[arg-type]
    assert sum(isinstance(r, Record) and r.meta["verify"]["state"] == "verified" for r in results) >= 7
    results = listen(wrong)
    assert not any(isinstance(r, Record) and r.meta["verify"]["state"] == "verified" for r in results)
    assert sum(isinstance(r, Rejected) for r in results) >= 4


# Rejections


class Refusing(Say):
    """Cannot say the third of ten."""

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        for record in records:
            if record.meta["row"].split()[1] == "2":
                raise NexusError("nothing in this can be spoken")
        return super().__call__(records)


def test_a_place_without_sound_is_left_out_counted_and_never_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spoken, "_steps", lambda *_: [Refusing()])
    waves = made(tmp_path / "train", small_plan().sets["heard"][:10])
    assert waves.lengths[2] == 0 and waves.places == [0, 1, *range(3, 10)]
    told = counts(tmp_path / "train")["heard"]
    assert told["spoken"] == 10 and told["failed"] == 1 and told["rejected"] == {"speak_failed": 1}
    assert told["verified"] + told["failed"] + told["unverified"] + told["unchecked"] == told["spoken"]
    with pytest.raises(AssertionError, match="place 2 has no sound"):
        waves[2]
    with pytest.raises(NexusError, match=r"^test_heard 2 .* is to be examined and could not be spoken: speak_failed"):
        speak(tmp_path / "test", {"test_heard": small_plan().sets["test_heard"][:10]}, 0.0, 1, Progress())


# Going on


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_what_is_there_is_not_spoken_again(tmp_path: Path) -> None:
    utterances = small_plan().sets["heard"][:20]
    digest = made(tmp_path, utterances).digest()
    before = times(tmp_path)
    assert made(tmp_path, utterances).digest() == digest
    assert times(tmp_path) == before


def test_other_utterances_in_the_same_folder_are_not_mistaken_for_these(tmp_path: Path) -> None:
    heard = small_plan().sets["heard"]
    made(tmp_path, heard[:16])
    with pytest.raises(BadConfig, match=r"row 9 of the sources was done, and is another one now"):
        made(tmp_path, [*heard[:8], *heard[16:24]])


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_damaged_shard_is_named(damage: str, tmp_path: Path) -> None:
    utterances = small_plan().sets["heard"][:16]
    made(tmp_path, utterances)
    shard = tmp_path / "audio" / "00001.i16"
    if damage == "shorter":
        os.truncate(shard, shard.stat().st_size - 100)
    else:
        shard.unlink()
    with pytest.raises(BadRecord, match=r"00001.i16: has \d+ of \d+ bytes; remove .* and run the same command again"):
        made(tmp_path, utterances)


SPEAKING = """
import sys
from pathlib import Path
from nexus.demo import corpus, spoken
from nexus.demo.world import World
from nexus.progress import Progress
from nexus.recipe import WorldConfig

if __name__ == "__main__":
    spoken.SHARD, spoken.BATCH = {shard}, 8
    sets = corpus.plan(World(0), WorldConfig.model_validate_json({config!r})).sets
    sets = {{name: sets[name] for name in ("heard", "mandarin", "test_heard")}}
    waves = spoken.speak(Path(sys.argv[1]), sets, 0.05, 1, Progress())
    print(*(each.digest() for each in waves.values()), spoken.counts(Path(sys.argv[1])))
"""


def test_a_kill_in_the_middle_of_speaking_loses_nothing_and_says_nothing_twice(tmp_path: Path) -> None:
    script = tmp_path / "speak.py"
    script.write_text(SPEAKING.format(shard=40, config=SMALL.model_copy(update={"heard": 400}).model_dump_json()))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def begin(folder: str) -> subprocess.Popen[str]:
        line = [sys.executable, str(script), str(tmp_path / folder)]
        return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    journal = tmp_path / "broken" / ".journal.jsonl"
    process = begin("broken")
    deadline = time.monotonic() + 60
    while not (tmp_path / "broken" / "audio" / "00002.i16").is_file():  # two shards are whole, the third is begun
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    before, whole = journal.read_bytes().rpartition(b"\n")[0], times(tmp_path / "broken" / "audio")
    assert before.count(b'"seal"') >= 2
    told = []
    for folder in ("broken", "never"):
        process = begin(folder)
        told.append(process.communicate(timeout=60)[0])
        assert process.returncode == 0
    assert told[0] == told[1] and told[0].strip()
    after = times(tmp_path / "broken" / "audio")
    assert journal.read_bytes().startswith(before)
    assert {name: after[name] for name in ("00000.i16", "00001.i16")} == {
        name: whole[name] for name in ("00000.i16", "00001.i16")
    }
    rows = [json.loads(line)["row"] for line in journal.read_bytes().splitlines() if b'"seal"' not in line]
    assert len(rows) == len(set(rows)) == 400 + SMALL.mandarin + SMALL.test_heard
