"""Recordings in, words out: what two recognisers agree on is kept, and the rest waits for people with its sound."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_synth_segment import RATE, speech, talk, written

from nexus.engines.speak import Espeak, Voice
from nexus.engines.transcribe import AdaptedPocketSphinx, Heard, adapt
from nexus.errors import BadConfig
from nexus.media import load_audio
from nexus.recipe import validate
from nexus.synth.read import SourceConfig
from nexus.synth.recordings import (
    TO_REVIEW,
    Recognise,
    RecogniseConfig,
    RecordingsConfig,
    disagreement_of,
    errors_of,
    read,
)
from nexus.synth.records import Record, Rejected
from nexus.synth.segment import SegmentConfig
from nexus.text import normalise_en
from nexus.types import Audio


class Ear:
    """Hears by the loudest sample: a table of what it makes of each; the languages it knows."""

    def __init__(self, name: str, heard: Sequence[Heard], languages: Sequence[str] = ("en",)) -> None:
        self.name, self.fingerprint, self._heard, self._languages = name, name, heard, languages
        self.ready = False

    def setup(self) -> None:
        self.ready = True

    def hear(self, audio: Audio, language: str) -> Heard | None:
        assert self.ready
        return self._heard[round(10 * float(audio.samples[0]))] if language in self._languages else None


def utterance(index: int, snr_db: float = 30.0, language: str = "en") -> Record:
    samples = np.full(1600, 0.1 * index, np.float32)
    meta = {"row": f"r{index}", "attempt": 0, "segment": {"snr_db": snr_db, "start_seconds": 0.0}}
    return Record(f"id{index}", "", language, sound=Audio(samples=samples, rate_hz=RATE), meta=meta)


def judged(first: Heard, second: Heard | None = None, snr_db: float = 30.0, **config: float) -> Record | Rejected:
    ears = [Ear("first", [first])] + ([Ear("second", [second])] if second else [])
    step = Recognise(RecogniseConfig(**config), ears)
    step.setup()
    (result,) = step([utterance(0, snr_db)])
    return result


def test_what_two_recognisers_agree_on_is_kept_in_the_words_of_the_first() -> None:
    kept = judged(Heard("It was nineteen ninety nine.", 0.9), Heard("it was 1999", 0.2))
    assert isinstance(kept, Record) and kept.text == "It was nineteen ninety nine."
    assert kept.meta["heard"]["second"] == {"text": "it was 1999", "confidence": 0.2}
    assert kept.meta["hearing"]["disagreement"] == 0.0


@pytest.mark.parametrize(
    ("first", "second", "settings", "cause"),
    [
        (Heard("one two three four", 0.9), Heard("one two free four", 0.9), {}, "disagreement"),
        (Heard("one two three four", 0.3), None, {"min_confidence": 0.5}, "confidence"),
        (Heard("one two three four", 0.9), None, {"snr_db": 3.0}, "noise"),
        (Heard("", 0.0), Heard("", 0.0), {}, "nothing_heard"),
        (Heard("...", None), None, {}, "nothing_heard"),
        (Heard("one two", 0.9), None, {"min_words": 3}, "too_short"),
    ],
)
def test_what_is_doubtful_waits_for_people_and_says_why(first, second, settings, cause) -> None:
    result = judged(first, second, **settings)
    assert isinstance(result, Rejected) and result.reason == TO_REVIEW and result.numbers["cause"] == cause
    assert result.record.text == first.text and result.record.sound is not None


def test_a_language_that_nobody_knows_is_not_passed_silently() -> None:
    step = Recognise(RecogniseConfig(), [Ear("first", [Heard("a", 1.0)])])
    step.setup()
    (result,) = step([utterance(0, language="fr")])
    assert isinstance(result, Rejected) and result.numbers["cause"] == "no_recogniser"


def test_order_and_number_are_kept_and_the_worse_is_the_worse_number() -> None:
    heard = [Heard("a b c d", 0.9), Heard("a b c d", 0.6), Heard("a b c d", 0.9)]
    other = [Heard("a b c d", 0.9), Heard("a b c d", 0.9), Heard("x y z d", 0.9)]
    step = Recognise(RecogniseConfig(min_confidence=0.95), [Ear("first", heard), Ear("second", other)])
    step.setup()
    results = step([utterance(index) for index in range(3)])
    assert [result.record.id for result in results] == ["id0", "id1", "id2"]
    first, second, third = (result.numbers["badness"] for result in results)
    assert first < second < third


def test_the_fingerprint_follows_settings_and_recognisers() -> None:
    ears = [Ear("first", [])]
    prints = {
        Recognise(RecogniseConfig(), ears).fingerprint,
        Recognise(RecogniseConfig(min_words=2), ears).fingerprint,
        Recognise(RecogniseConfig(), [*ears, Ear("second", [])]).fingerprint,
    }
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("first", "second", "language", "expected"),
    [
        ("two cats", "2 cats", "en", 0.0),
        ("a b c d", "a b c", "en", 0.25),
        ("", "", "en", 0.0),
        ("", "word", "en", 1.0),
        ("word", "", "en", 1.0),
        ("你好吗", "你好妈", "zh", 1 / 3),
        ("二十三", "23", "zh", 0.0),
    ],
)
def test_disagreement_is_errors_per_word_or_character(first: str, second: str, language: str, expected: float) -> None:
    assert disagreement_of(first, second, language) == pytest.approx(expected)


def test_errors_are_counted_over_whole_recordings(tmp_path: Path) -> None:
    def piece(name: str, start: float, text: str, reference: str) -> Record:
        meta = {"recording": name, "segment": {"start_seconds": start}, "reference": reference}
        return Record(f"{name}{start}", text, "en", meta=meta)

    pieces = [piece("a", 5.0, "c x", "a b c d"), piece("a", 1.0, "a b", "a b c d"), piece("b", 0.0, "e", "e")]
    assert errors_of(pieces) == {"recordings": 2, "errors": 1, "words": 5, "rate": 0.2}
    assert errors_of([Record("c", "words", "en")]) == {"recordings": 0, "errors": 0, "words": 0}


# Reading


def test_a_folder_is_read_in_order_and_bad_files_are_rejected_by_name(tmp_path: Path) -> None:
    for name in ("b.wav", "sub/a.flac"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        written(tmp_path / name, talk([1.0, 1.5])[0])
    (tmp_path / "c.mp3").write_bytes(b"no music")
    written(tmp_path / "d.wav", np.zeros(RATE))
    (tmp_path / "notes.txt").write_text("no recording")
    config = RecordingsConfig(
        folder=str(tmp_path), language="en", licence="CC0", segment=SegmentConfig(whole_seconds=0.1)
    )
    rows = list(read(config))
    told = [
        (row.record.meta["file"], row.reason) if isinstance(row, Rejected) else (row.meta["file"], "") for row in rows
    ]
    assert told == [
        *[("b.wav", "")] * 2,
        ("c.mp3", "unreadable"),
        ("d.wav", "silent"),
        *[("sub/a.flac", "")] * 2,
    ]
    kept = [row for row in rows if isinstance(row, Record)]
    assert all(row.language == "en" and row.meta["licence"] == "CC0" and not row.text for row in kept)
    assert len({row.meta["row"] for row in kept}) == len({row.id for row in kept}) == 4
    assert [row.id for row in read(config) if isinstance(row, Record)] == [row.id for row in kept]


def manifest(folder: Path, rows: list[dict], columns: Sequence[str]) -> RecordingsConfig:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(path=str(folder / "rows.jsonl"), columns={name: name for name in columns}, language="en")
    return RecordingsConfig(manifest=source)


def test_a_manifest_says_what_was_said_and_where(tmp_path: Path) -> None:
    wave = talk([2.0, 2.0])[0]
    written(tmp_path / "a.wav", wave)
    rows = [
        {"audio": "a.wav", "text": "hello there"},
        {"audio": "missing.wav", "text": "gone"},
        {"audio": 5, "text": "x"},
    ]
    first, second, third = read(manifest(tmp_path, rows, ("audio", "text")))
    assert isinstance(first, Record) and first.text == "" and first.meta["reference"] == "hello there"
    assert isinstance(second, Rejected) and "missing.wav" in second.numbers["error"]
    assert isinstance(third, Rejected) and third.reason == "unreadable"
    stretches = [{"audio": "a.wav", "start": start, "seconds": 1.0} for start in (3.5, 1.5)]
    cuts = list(read(manifest(tmp_path, stretches, ("audio", "start", "seconds"))))
    assert [cut.meta["segment"]["start_seconds"] for cut in cuts] == [1.5, 3.5]
    assert all(len(cut.sound.samples) == RATE for cut in cuts)


def test_folders_without_recordings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadConfig, match=folder.name):
            next(read(RecordingsConfig(folder=str(folder))))


@pytest.mark.parametrize(
    "section",
    [{}, {"folder": "a", "manifest": {"path": "b", "columns": {"audio": "file"}}}, {"manifest": {"path": "b"}}],
    ids=["neither", "both", "no audio"],
)
def test_recordings_come_from_one_place(section: dict) -> None:
    with pytest.raises(BadConfig, match="recordings"):
        validate(RecordingsConfig, section, "here.yaml")


# The whole branch


class Sphinx:
    def __init__(self, folder: Path, name: str, noise_floor_db: float | None) -> None:
        self.name, self.fingerprint, self._folder, self._floor = name, name, folder, noise_floor_db

    def setup(self) -> None:
        self._ear = AdaptedPocketSphinx(self._folder, self._floor)

    def hear(self, audio: Audio, language: str) -> Heard:
        return self._ear.hear(audio)


def test_speech_is_kept_and_noise_waits_for_people(tmp_path: Path) -> None:
    sentences = ["the red square is left of the blue circle", "how many green stars are there", "play the next song"]
    adapt(sentences, tmp_path)
    (tmp_path / "audio").mkdir()
    espeak = Espeak()
    for index, sentence in enumerate(sentences):
        sound = espeak.speak(sentence, Voice("en-us+f2"))
        soundfile.write(tmp_path / "audio" / f"{index}.wav", sound.samples, sound.rate_hz)
    written(tmp_path / "audio" / "3.wav", speech(2.0))
    step = Recognise(RecogniseConfig(), [Sphinx(tmp_path, "first", 30.0), Sphinx(tmp_path, "second", None)])
    step.setup()
    config = RecordingsConfig(folder=str(tmp_path / "audio"), language="en")
    *kept, doubtful = step([row for row in read(config) if isinstance(row, Record)])
    assert [row.text for row in kept] == sentences
    assert isinstance(doubtful, Rejected) and doubtful.reason == TO_REVIEW


def test_real_questions_are_understood_within_the_bar(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "llama_questions"
    lines = [line.split("\t") for line in (folder / "llama_questions_300.tsv").read_text().splitlines()[1:]]
    adapt([normalise_en(text) for text, *_ in lines], tmp_path)
    chosen = "\n".join(["Questions\tAnswer\tWav Filename", *("\t".join(line) for line in lines[75:87])])
    (tmp_path / "some.tsv").write_text(chosen)
    columns = {"text": "Questions", "audio": "Wav Filename"}
    source = SourceConfig(path=str(tmp_path / "some.tsv"), columns=columns, language="en", audio_root=str(folder))
    step = Recognise(RecogniseConfig(), [Sphinx(tmp_path, "first", 30.0)])
    step.setup()
    results = step([row for row in read(RecordingsConfig(manifest=source)) if isinstance(row, Record)])
    records = [result if isinstance(result, Record) else result.record for result in results]
    errors = errors_of(records)
    assert errors["recordings"] == 12 and errors["rate"] <= 0.12
    assert load_audio(folder / "76.wav").seconds == pytest.approx(records[0].sound.seconds, abs=0.01)
