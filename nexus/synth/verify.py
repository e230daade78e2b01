"""The verifying step: a recogniser hears every clip, and a gate decides whether it says its text.

Text and what was heard go through one normaliser (`readings.comparable`). All that the gate looks at is stored with
the sample, so that it can be moved later without hearing again: `gate` is a pure function of stored scores.
"""

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from nexus.engines.transcribe import BIGRAM, DICTIONARY, Adaptation, AdaptedPocketSphinx, Heard, adapt
from nexus.errors import BadConfig
from nexus.organs import Count, Natural, Positive, Share, Strict
from nexus.synth.readings import comparable, num_letters, wordings_en
from nexus.synth.records import Record, Rejected
from nexus.synth.speak import token_of
from nexus.text import character_errors, is_chinese, word_errors
from nexus.types import Audio

State = Literal["verified", "unverified", "unchecked"]
MOST_PAIRS = 10_000
SILENT_PEAK = 1e-3  # -60 dB of full scale


class PocketSphinxEar(Strict):
    """The offline ear, English alone: its language model is the bigram of the corpus, of at most `max_texts` texts.
    `noise_floor_db` and `language_weight` as in `nexus.engines.transcribe.AdaptedPocketSphinx`."""

    type: Literal["pocketsphinx"] = "pocketsphinx"
    max_texts: Count = 200_000
    discount: Share = 0.5
    noise_floor_db: float | None = 30.0
    language_weight: Positive = 10.0


class WhisperEar(Strict):
    """A Whisper model of transformers in a local folder, on `device`, `batch` clips at a time."""

    type: Literal["whisper"]
    folder: str
    device: str = "cpu"
    batch: Count = 8


class TranscriptionEar(Strict):
    """A server of `/v1/audio/transcriptions` (`url` ends before `/audio`)."""

    type: Literal["openai"]
    url: str
    model: str
    token_env: str | None = None  # environment variable that holds the token
    timeout_seconds: Positive = 120.0
    tries: Count = 3


EarConfig = Annotated[PocketSphinxEar | WhisperEar | TranscriptionEar, Field(discriminator="type")]


def _english_ear() -> dict[str, EarConfig]:
    return {"en": PocketSphinxEar()}


def _paces() -> dict[str, tuple[float, float]]:
    return {"en": (0.03, 0.16), "zh": (0.1, 0.6)}


class AuditionConfig(Strict):
    """Every voice says up to `texts` texts of the corpus before the run; the recogniser must pass it on at least
    `passed` of them, or it takes no part. 0 texts: no audition."""

    texts: Natural = 4
    passed: Natural = 2

    @model_validator(mode="after")
    def _fits(self) -> "AuditionConfig":
        if self.passed > self.texts:
            raise ValueError(f"passed must be at most texts, {self.texts}, given {self.passed}")
        return self


class VerifyConfig(Strict):
    """Who hears which language, how many texts are checked, and where the gate stands.

    `max_wer` holds for languages written in words, `max_cer` for Chinese. Its default lets one word in eight be wrong:
    at 0.15, 1.1 % of wrong pairs of clip and text pass among 300 questions that differ in one word of seven ("the
    chemical symbol for tin"), at 0.125 below 0.1 %. `length_ratio` is letters heard to letters
    written. `seconds_per_letter` bounds, by language, how slowly and fast texts may be said, and holds for unchecked
    clips too. A failed text is tried again up to `retries` times, each time by another voice. A language without a
    recogniser is not checked at all.
    """

    recognisers: dict[str, EarConfig] = Field(default_factory=_english_ear)
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_wer: Annotated[float, Field(ge=0)] = 0.125
    max_cer: Annotated[float, Field(ge=0)] = 0.10
    length_ratio: tuple[Positive, Positive] = (0.7, 1.3)
    seconds_per_letter: dict[str, tuple[Positive, Positive]] = Field(default_factory=_paces)
    retries: Natural = 4
    audition: AuditionConfig = AuditionConfig()

    @model_validator(mode="after")
    def _fits(self) -> "VerifyConfig":
        for name, (low, high) in {"length_ratio": self.length_ratio, **self.seconds_per_letter}.items():
            if low >= high:
                raise ValueError(f"{name}: expected low < high, given {[low, high]}")
        strange = [key for key, ear in self.recognisers.items() if ear.type == "pocketsphinx" and key != "en"]
        if strange:
            raise ValueError(f"recognisers.{strange[0]}: pocketsphinx hears English (en) alone; name whisper or openai")
        return self


class Ear(Protocol):
    """A recogniser; `id` names it, with what it was adapted to, in cards and scores."""

    id: str

    def hear(self, audios: Sequence[Audio], language: str) -> list[Heard]:
        """What is said in every clip, in order. Raises NexusError where it cannot hear."""
        ...


class Verify:
    """Records with sound in; those that say their text out, with their scores in `meta["verify"]`.

    `state` there is `verified`, `unchecked` (not drawn by `fraction`) or `unverified` (no recogniser for the
    language). Rejects with `silent`, `too_fast`, `too_slow`, `not_heard`, `wrong_language`, `length_ratio`,
    `word_errors`, `character_errors`.
    """

    name = "verify"

    def __init__(self, config: VerifyConfig, folder: Path, adaptation: Adaptation | None) -> None:
        self.config, self.retries, self.adaptation = config, config.retries, adaptation
        self._folder = folder
        self._ears: dict[str, Ear] = {}

    @property
    def fingerprint(self) -> str:
        """Over settings and the adapted model."""
        digest = hashlib.sha256(self.config.model_dump_json().encode())
        digest.update(_model_digest(self._folder).encode() if self.adaptation else b"")
        return digest.hexdigest()[:16]

    def setup(self) -> None:
        """Load the recognisers. Raises NexusError for folders and addresses that cannot be."""
        self._ears = {
            language: open_ear(ear, language, self._folder) for language, ear in self.config.recognisers.items()
        }

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        """One result per record, in order. Raises NexusError where a recogniser fails."""
        results: list[Record | Rejected] = [self._unheard(record) for record in records]
        for language, ear in self._ears.items():
            places = [
                place
                for place, result in enumerate(results)
                if isinstance(result, Record) and result.language == language and self.checks(result.meta["row"])
            ]
            for place, result in zip(places, self._heard(ear, [records[place] for place in places]), strict=True):
                results[place] = result
        return results

    def for_all(self) -> "Verify":
        """The same step, not set up, that checks every text whatever `fraction` is."""
        return Verify(self.config.model_copy(update={"fraction": 1.0}), self._folder, self.adaptation)

    def checks(self, row: str) -> bool:
        """Whether a text is among those to be heard, by the id of its row."""
        return random.Random(f"verify {row}").random() < self.config.fraction

    def _unheard(self, record: Record) -> Record | Rejected:
        """What can be said without a recogniser."""
        sound = _sound(record)
        assert sound.samples is not None
        scores: dict[str, Any] = {
            "state": "unchecked" if record.language in self._ears else "unverified",
            "seconds": round(sound.seconds, 3),
            "letters": num_letters(record.text, record.language),
        }
        record = record.noted(verify=scores)
        if np.abs(sound.samples).max(initial=0.0) < SILENT_PEAK:
            return Rejected(record, "silent", {"seconds": scores["seconds"]})
        reason = _pace(scores, record.language, self.config)
        return Rejected(record, reason, _numbers(scores)) if reason else record

    def _heard(self, ear: Ear, records: Sequence[Record]) -> list[Record | Rejected]:
        heard = ear.hear([_sound(record) for record in records], records[0].language) if records else []
        results: list[Record | Rejected] = []
        for record, words in zip(records, heard, strict=True):
            scores = scores_of(record.text, record.language, words, _sound(record).seconds) | {"recogniser": ear.id}
            reason = gate(scores, self.config)
            record = record.noted(verify=scores)
            results.append(Rejected(record, reason, _numbers(scores)) if reason else record)
        return results


def build(config: VerifyConfig, texts: Iterable[tuple[str, str]], folder: Path) -> Verify:
    """The step. `texts` are the (text, language) of the corpus, read only where PocketSphinx is to be adapted to them;
    its model is written into `folder`, which must outlive the step.

    Raises BadConfig where there are more texts than `max_texts`, or none of its language; NexusError as `adapt`.
    """
    ear = config.recognisers.get("en")
    if not isinstance(ear, PocketSphinxEar):
        return Verify(config, folder, None)
    english = list(islice((text for text, language in texts if language == "en"), ear.max_texts + 1))
    if len(english) > ear.max_texts:
        raise BadConfig(
            f"verify.recognisers.en: PocketSphinx is adapted to at most {ear.max_texts:,} texts (max_texts), given "
            "more; raise it where there is memory, or name whisper or openai"
        )
    if not english:
        raise BadConfig("verify.recognisers.en: PocketSphinx needs English texts to adapt to, given none; remove it")
    folder.mkdir(parents=True, exist_ok=True)
    sentences = (wording for text in english for wording in wordings_en(text))
    return Verify(config, folder, adapt(sentences, folder, ear.discount))


def open_ear(config: EarConfig, language: str, folder: Path) -> Ear:
    """The recogniser of a recipe's section; `folder` holds what `build` adapted. Raises NexusError."""
    match config:
        case PocketSphinxEar():
            return _Offline(config, folder)
        case WhisperEar():
            from nexus.engines.whisper import Whisper

            return Whisper(Path(config.folder), config.device, config.batch)
        case TranscriptionEar():
            from nexus.engines.transcribe_api import TranscriptionApi

            token = token_of(config.token_env, f"verify.recognisers.{language}")
            return TranscriptionApi(config.url, config.model, token, config.timeout_seconds, config.tries)


class _Offline:
    def __init__(self, config: PocketSphinxEar, folder: Path) -> None:
        self._recogniser = AdaptedPocketSphinx(folder, config.noise_floor_db, config.language_weight)
        self.id = f"pocketsphinx en-us, bigram and dictionary of the corpus ({_model_digest(folder)})"

    def hear(self, audios: Sequence[Audio], language: str) -> list[Heard]:
        return [self._recogniser.hear(audio) for audio in audios]


def scores_of(text: str, language: str, heard: Heard, seconds: float) -> dict[str, Any]:
    """All that the gate looks at, JSON-like: `wer`, `cer`, `length_ratio` (None where the text holds no letters)."""
    expected, given = comparable(text, language), comparable(heard.text, language)
    rates: dict[str, float | None] = {"wer": None, "cer": None, "length_ratio": None}
    if expected:
        words, letters = word_errors(expected, given), character_errors(expected, given)
        ratio = len(given.replace(" ", "")) / len(expected.replace(" ", ""))
        rates = {
            "wer": round(words[0] / words[1], 4),
            "cer": round(letters[0] / letters[1], 4),
            "length_ratio": round(ratio, 4),
        }
    return {
        "state": "verified",
        "language": language,
        "heard": heard.text,
        "confidence": None if heard.confidence is None else round(heard.confidence, 4),
        **rates,
        "other_script": bool(given) and is_chinese(heard.text) != (language == "zh"),
        "seconds": round(seconds, 3),
        "letters": num_letters(text, language),
    }


def gate(scores: Mapping[str, Any], config: VerifyConfig) -> str:
    """The reason why a clip with these stored scores is rejected, "" where it passes."""
    if pace := _pace(scores, scores["language"], config):
        return pace
    if not scores["heard"] or scores["wer"] is None:
        return "not_heard"
    if scores["other_script"]:
        return "wrong_language"
    low, high = config.length_ratio
    if not low <= scores["length_ratio"] <= high:
        return "length_ratio"
    if scores["language"] == "zh":
        return "character_errors" if scores["cer"] > config.max_cer else ""
    return "word_errors" if scores["wer"] > config.max_wer else ""


def mismatched(judged: Sequence[tuple[str, Mapping[str, Any]]], config: VerifyConfig, seed: int = 0) -> tuple[int, int]:
    """How the gate treats wrong pairs: clips that were heard (text, scores), each against the text of another one.

    Returns the number of pairs, ten for every clip and MOST_PAIRS at most, and how many passed. Two languages, or texts
    that are the same once normalised, make no pair.
    """
    rng, num_pairs, num_passed = random.Random(seed), 0, 0
    clips = [clip for clip in judged if "heard" in clip[1]]
    for _ in range(min(10 * len(clips), MOST_PAIRS)):
        (said, scores), (text, other) = rng.choice(clips), rng.choice(clips)
        language = scores["language"]
        if other["language"] == language and comparable(text, language) != comparable(said, language):
            heard = Heard(scores["heard"], scores["confidence"])
            num_pairs += 1
            num_passed += not gate(scores_of(text, language, heard, scores["seconds"]), config)
    return num_pairs, num_passed


def _pace(scores: Mapping[str, Any], language: str, config: VerifyConfig) -> str:
    if language not in config.seconds_per_letter or not scores["letters"]:
        return ""
    low, high = config.seconds_per_letter[language]
    pace = scores["seconds"] / scores["letters"]
    return "too_fast" if pace < low else "too_slow" if pace > high else ""


def _numbers(scores: Mapping[str, Any]) -> dict[str, float | str]:
    kept = ("wer", "cer", "length_ratio", "seconds", "letters", "heard")
    return {key: scores[key] for key in kept if scores.get(key) is not None}


def _sound(record: Record) -> Audio:
    assert record.sound is not None and record.sound.samples is not None, f"record {record.id} has no loaded sound"
    return record.sound


def _model_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (DICTIONARY, BIGRAM):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:8]
