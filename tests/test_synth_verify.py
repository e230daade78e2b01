"""Verifying: how texts are compared, where the gate stands, and the adapted recogniser on real speech."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nexus.engines.speak import Espeak, Voice
from nexus.engines.transcribe import AdaptedPocketSphinx, Heard, adapt
from nexus.errors import BadConfig, NexusError
from nexus.media import load_audio
from nexus.synth.audition import audition
from nexus.synth.readings import comparable, num_letters, spoken_en, wordings_en
from nexus.synth.records import Record, Rejected, first_attempt
from nexus.synth.speak import SpeakConfig
from nexus.synth.speak import build as speaking
from nexus.synth.verify import TranscriptionEar, Verify, VerifyConfig, build, gate, mismatched, scores_of
from nexus.synth.voices import EspeakPool
from nexus.text import normalise_en, word_errors
from nexus.types import Audio

QUESTIONS = [
    "What is the capital of France?",
    "Which river is the longest in South America?",
    "Who painted the famous painting Mona Lisa?",
    "How many moons does Jupiter have?",
    "Which planet has rings of ice and dust?",
    "Who was the leader of the Soviet Union during World War II?",
    "Which Olympic sport was introduced in 1932?",
    "How many candles does a Hanukkah menorah have?",
    "What do the Zorblax people of Quindar eat?",
    "Who wrote the book about a hobbit with a ring?",
]
TEXTS = [(question, "en") for question in QUESTIONS]
CLEAR = Voice("en-us+f2", 150)


# --- what is compared


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("in 1999", "in nineteen ninety nine"),
        ("in 1999", "in nineteen hundred and ninety nine"),
        ("in 1999", "in one thousand nine hundred ninety-nine"),
        ("in 1999", "in one nine nine nine"),
        ("in 1905", "in nineteen oh five"),
        ("in 2012", "in twenty twelve"),
        ("in 2012", "in two thousand and twelve"),
        ("open 24/7", "open twenty four seven"),
        ("open 24/7", "open twenty four slash seven"),
        ("the 1990s", "the nineteen nineties"),
        ("the '90s", "the nineties"),
        ("the 21st", "the twenty first"),
        ("1,105 people", "one thousand one hundred and five people"),
        ("3.14", "three point one four"),
        ("$5 and 50%", "five dollars and fifty percent"),
        ("$2 million", "two million dollars"),
        ("100 days", "a hundred days"),
        ("World War II", "world war two"),
    ],
)
def test_a_number_is_the_same_in_every_reading(written: str, said: str) -> None:
    assert comparable(written, "en") == comparable(said, "en")


@pytest.mark.parametrize(
    ("one", "other"),
    [("1999", "1990"), ("15", "50"), ("1905", "1950"), ("24/7", "24"), ("two hundred", "two thousand"), ("0", "10")],
)
def test_different_numbers_stay_different(one: str, other: str) -> None:
    assert comparable(one, "en") != comparable(other, "en")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("1999年", "一九九九年"),
        ("105个", "一百零五个"),
        ("12345", "一万两千三百四十五"),
        ("3.14", "三点一四"),
        ("體育", "体育"),
        ("你好,世界!", "你好世界"),
    ],
)
def test_chinese_is_compared_in_simplified_characters_and_digits(written: str, said: str) -> None:
    assert comparable(written, "zh") == comparable(said, "zh")


@given(number=st.integers(0, 999_999))
@settings(max_examples=300, deadline=None)
def test_any_number_and_its_words_are_its_digits(number: int) -> None:
    digits = " ".join(str(number))
    assert comparable(normalise_en(str(number)), "en") == comparable(str(number), "en") == digits


@given(text=st.text(max_size=60), language=st.sampled_from(["en", "zh", "de"]))
@settings(max_examples=300, deadline=None)
def test_any_text_can_be_read_and_compared(text: str, language: str) -> None:
    units = comparable(text, language)
    assert units == " ".join(units.split())
    assert num_letters(text, language) >= 0
    assert all(normalise_en(wording) == wording for wording in wordings_en(text))


def test_english_is_spelled_out_only_where_its_spelling_misleads() -> None:
    assert spoken_en("It cost $5.20 in 1905.") == "It cost 5.20 dollars in nineteen oh five."
    assert spoken_en("Is AC/DC from the Isle of Man, I ask?") == "Is AC/DC from the Isle of Man, I ask?"
    assert "nineteen hundred thirty two" in wordings_en("1932") and "nineteen thirty two" in wordings_en("1932")


# --- the gate


def scores(text: str, heard: str, seconds: float = 2.0, language: str = "en") -> dict[str, Any]:
    return scores_of(text, language, Heard(heard, 0.5), seconds)


@pytest.mark.parametrize(
    ("text", "heard", "seconds", "language", "reason"),
    [
        (QUESTIONS[0], "what is the capital of france", 2.0, "en", ""),
        (QUESTIONS[0], "what is the capital of spain", 2.0, "en", "word_errors"),
        (QUESTIONS[0], "", 2.0, "en", "not_heard"),
        (QUESTIONS[0], "what is", 2.0, "en", "length_ratio"),
        (QUESTIONS[0], "what is the capital of france what is the capital", 2.0, "en", "length_ratio"),
        (QUESTIONS[0], "法国的首都是哪里", 2.0, "en", "wrong_language"),
        (QUESTIONS[0], "what is the capital of france", 0.3, "en", "too_fast"),
        (QUESTIONS[0], "what is the capital of france", 9.0, "en", "too_slow"),
        ("...", "yes", 2.0, "en", "not_heard"),
        ("法国的首都是哪里", "法国的首都是哪里", 2.0, "zh", ""),
        ("法国的首都是哪里", "法国的首都是那里", 2.0, "zh", "character_errors"),
        ("法国的首都是哪里", "the capital of france", 2.0, "zh", "wrong_language"),
    ],
)
def test_the_gate_names_what_is_wrong(text: str, heard: str, seconds: float, language: str, reason: str) -> None:
    assert gate(scores(text, heard, seconds, language), VerifyConfig()) == reason


def test_the_gate_moves_on_stored_scores_alone() -> None:
    stored = scores(QUESTIONS[0], "what is the capital of spain")
    assert stored["wer"] == pytest.approx(1 / 6, abs=1e-4)
    assert gate(stored, VerifyConfig(max_wer=0.2)) == ""
    assert gate(stored, VerifyConfig(max_wer=0.1)) == "word_errors"


@given(text=st.sampled_from(QUESTIONS), heard=st.text(max_size=80), looser=st.floats(0.125, 2.0))
@settings(max_examples=100, deadline=None)
def test_a_looser_gate_lets_pass_what_a_stricter_one_does(text: str, heard: str, looser: float) -> None:
    stored = scores(text, heard)
    if not gate(stored, VerifyConfig()):
        assert not gate(stored, VerifyConfig(max_wer=looser, max_cer=looser))


def test_wrong_pairs_of_clip_and_text_are_counted_and_rarely_pass() -> None:
    right = [(text, scores(text, normalise_en(text), seconds=0.07 * num_letters(text, "en"))) for text in QUESTIONS]
    num_pairs, num_passed = mismatched(right * 2, VerifyConfig())
    assert num_pairs > 100 and num_passed == 0
    deaf = VerifyConfig(max_wer=99.0, length_ratio=(0.001, 99.0), seconds_per_letter={})
    assert mismatched(right * 2, deaf) == (num_pairs, num_pairs)
    assert mismatched([*right[:1] * 5, ("unchecked", {"state": "unchecked"})], VerifyConfig()) == (0, 0)


@pytest.mark.parametrize(
    "section",
    [
        {"recognisers": {"zh": {"type": "pocketsphinx"}}},
        {"recognisers": {"en": {"type": "ouija"}}},
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"length_ratio": (1.2, 0.8)},
        {"audition": {"texts": 2, "passed": 3}},
        {"max_wre": 0.1},
    ],
)
def test_a_section_that_cannot_be_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        VerifyConfig.model_validate(section)


# --- the adapted recogniser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def verify(folder: Path) -> Verify:
    step = build(VerifyConfig(), TEXTS, folder)
    step.setup()
    return step


def spoken(text: str, voice: Voice = CLEAR, language: str = "en") -> Record:
    sound = Espeak().speak(text, voice)
    return first_attempt(text, language, {"source": "test"}).with_(sound=sound)


def test_words_outside_the_dictionary_are_given_phonemes_and_heard(tmp_path: Path) -> None:
    made = adapt([normalise_en(text) for text in QUESTIONS], tmp_path)
    assert set(made.pronounced) == {"zorblax", "quindar", "ii"} and not made.unsayable
    assert made.pronounced["zorblax"].split()[:3] == ["Z", "AO", "R"]
    heard = AdaptedPocketSphinx(tmp_path).hear(Espeak().speak(QUESTIONS[8], CLEAR))
    assert heard.text == normalise_en(QUESTIONS[8])
    assert heard.confidence is not None and 0 < heard.confidence <= 1


def test_words_without_english_sounds_are_named_and_do_no_harm(tmp_path: Path) -> None:
    made = adapt(["the 你好 lamp", "the red lamp"], tmp_path)
    assert made.unsayable == ("你好",) and made.num_words == 4
    assert AdaptedPocketSphinx(tmp_path).hear(Espeak().speak("the red lamp", CLEAR)).text == "the red lamp"


@given(word=st.text("abcdefghijklmnopqrstuvwxyz'", min_size=2, max_size=12).filter(lambda word: word[0] != "'"))
@settings(max_examples=60, deadline=None)
def test_every_made_up_word_can_be_pronounced(word: str, folder: Path) -> None:
    words = normalise_en(word)
    if words:
        other = folder / "words"
        other.mkdir(exist_ok=True)
        assert adapt([words], other).unsayable == ()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NexusError, match=r"expected an adapted model .* is missing"):
        AdaptedPocketSphinx(tmp_path)


def test_silence_is_heard_as_nothing_without_confidence(verify: Verify, folder: Path) -> None:
    silence = Audio(samples=np.zeros(16_000, np.float32), rate_hz=16_000)
    assert AdaptedPocketSphinx(folder).hear(silence) == Heard("", 0.0)


# --- the step


def test_clips_pass_with_their_scores_and_the_name_of_their_judge(verify: Verify) -> None:
    results = verify([spoken(text) for text in QUESTIONS[:5]])
    passed = [result for result in results if isinstance(result, Record)]
    assert len(passed) >= 4
    stored = passed[0].meta["verify"]
    assert stored["state"] == "verified" and stored["recogniser"].startswith("pocketsphinx en-us, bigram")
    assert gate(stored, verify.config) == ""
    assert verify.retries == 4


def test_the_sound_of_another_text_is_rejected_with_its_numbers(verify: Verify) -> None:
    records = [spoken(text) for text in QUESTIONS[:4]]
    sounds = [record.sound for record in records]
    results = verify(
        [record.with_(sound=sound) for record, sound in zip(records, sounds[1:] + sounds[:1], strict=True)]
    )
    assert all(isinstance(result, Rejected) for result in results)
    assert {"heard", "seconds"} <= set(results[0].numbers)  # type: ignore[union-attr]


def test_silence_and_cut_off_sound_are_rejected(verify: Verify) -> None:
    whole = spoken(QUESTIONS[1])
    assert whole.sound is not None and whole.sound.samples is not None
    silent = Audio(samples=np.zeros(40_000, np.float32), rate_hz=22_050)
    half = Audio(samples=whole.sound.samples[: len(whole.sound.samples) // 2], rate_hz=22_050)
    reasons = [
        result.reason
        for result in verify([whole.with_(sound=silent), whole.with_(sound=half)])
        if isinstance(result, Rejected)
    ]
    assert reasons[0] == "silent" and reasons[1] in ("length_ratio", "word_errors", "too_fast")


def test_a_language_without_a_recogniser_passes_as_unverified(verify: Verify) -> None:
    [result] = verify([spoken("你好,世界,今天天气很好。", Voice("cmn"), "zh")])
    assert isinstance(result, Record)
    assert result.meta["verify"]["state"] == "unverified" and "heard" not in result.meta["verify"]


def test_of_a_fraction_the_rest_passes_as_unchecked_but_not_silence(folder: Path) -> None:
    step = build(VerifyConfig(fraction=0.3), TEXTS, folder)
    step.setup()
    checked = [step.checks(f"row {number}") for number in range(2000)]
    assert 0.25 < sum(checked) / 2000 < 0.35
    records = [spoken(text) for text in QUESTIONS]
    silent = Audio(samples=np.zeros(40_000, np.float32), rate_hz=22_050)
    skipped = next(record for record in records if not step.checks(record.meta["row"]))
    results = step([skipped, skipped.with_(sound=silent)])
    assert isinstance(results[0], Record) and results[0].meta["verify"]["state"] == "unchecked"
    assert isinstance(results[1], Rejected) and results[1].reason == "silent"


def test_the_fingerprint_follows_settings_and_adaptation(folder: Path, tmp_path: Path) -> None:
    same = [build(VerifyConfig(), TEXTS, folder).fingerprint for _ in range(2)]
    others = [
        build(VerifyConfig(max_wer=0.1), TEXTS, folder).fingerprint,
        build(VerifyConfig(), TEXTS[:5], tmp_path).fingerprint,
    ]
    assert same[0] == same[1] and same[0] not in others and others[0] != others[1]


def test_a_corpus_that_the_offline_ear_cannot_take_is_refused(tmp_path: Path) -> None:
    small = VerifyConfig.model_validate({"recognisers": {"en": {"type": "pocketsphinx", "max_texts": 3}}})
    with pytest.raises(BadConfig, match=r"at most 3 texts \(max_texts\), given more"):
        build(small, TEXTS, tmp_path)
    with pytest.raises(BadConfig, match="needs English texts"):
        build(VerifyConfig(), [("你好", "zh")], tmp_path)
    server = VerifyConfig(recognisers={"zh": TranscriptionEar(type="openai", url="http://127.0.0.1:9", model="m")})
    assert build(server, iter(TEXTS), tmp_path).adaptation is None


def test_voices_that_cannot_be_heard_are_found_before_the_run(folder: Path) -> None:
    verify = build(VerifyConfig(), TEXTS, folder)
    config = SpeakConfig(pools={"en": EspeakPool(voices=3, accents=("en-us",))})
    speak = speaking(config)
    short = [("Which planet has rings?", "en"), ("How many moons does Jupiter have?", "en")]
    results = list(audition(speak, verify, short, 1))
    assert [result.voice for result in results] == [speaker.id for speaker in speak.voices.speakers]
    assert all(result.deaf == (result.num_passed < 2) and 1 <= result.num_said <= 2 for result in results)
    deaf = [result.voice for result in results if result.deaf]
    assert len(deaf) < 3
    assert {speaker.id for speaker in speaking(config, deaf).voices.speakers} == {
        result.voice for result in results if not result.deaf
    }
    none = VerifyConfig.model_validate({"audition": {"texts": 0, "passed": 0}})
    assert list(audition(speak, build(none, TEXTS, folder), TEXTS, 1)) == []


# --- real recordings


def recordings(step: int) -> tuple[list[str], Sequence[Audio]]:
    folder = Path(os.environ.get("NEXUS_DATA", "")) / "llama_questions"
    if "NEXUS_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("real recordings: set NEXUS_DATA to the folder that holds llama_questions")
    with (folder / "llama_questions_300.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [row["Questions"] for row in rows], [load_audio(folder / row["Wav Filename"]) for row in rows[::step]]


def test_real_recordings_are_heard_with_few_errors(tmp_path: Path) -> None:
    texts, audios = recordings(step=50)
    adapt([wording for text in texts for wording in wordings_en(text)], tmp_path)
    ear = AdaptedPocketSphinx(tmp_path)
    counts = [
        word_errors(comparable(text, "en"), comparable(ear.hear(audio).text, "en"))
        for text, audio in zip(texts[::50], audios, strict=True)
    ]
    assert sum(errors for errors, _ in counts) / sum(words for _, words in counts) <= 0.12
