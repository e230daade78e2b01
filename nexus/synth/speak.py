"""The speaking step: a text becomes sound, said by the voice that was drawn for this try."""

import functools
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, model_validator

from nexus.errors import BadConfig, NexusError
from nexus.organs import Share, Strict
from nexus.synth.readings import spoken_en
from nexus.synth.records import Record, Rejected
from nexus.synth.steps import at_level, trimmed
from nexus.synth.voices import (
    CosyVoicePool,
    EspeakPool,
    PoolConfig,
    Speaker,
    SpeechApiPool,
    Voices,
    speakers_of,
)
from nexus.text import is_chinese
from nexus.types import Audio

if TYPE_CHECKING:
    from nexus.engines import cosyvoice

FIRST_PAUSE_SECONDS = 0.5
Mouth = Callable[[str, Speaker], Audio]


def _english_pool() -> dict[str, PoolConfig]:
    return {"en": EspeakPool()}


class SpeakConfig(Strict):
    """Pools by language, how much is held out for testing (speakers and texts alike), and the level: every clip is
    turned down by a gain drawn from `gain_db`."""

    seed: int = 0
    pools: Annotated[dict[str, PoolConfig], Field(min_length=1)] = Field(default_factory=_english_pool)
    held_out: Share = 0.0
    gain_db: tuple[float, float] = (-6.0, 0.0)

    @model_validator(mode="after")
    def _fits(self) -> "SpeakConfig":
        if not -60 <= self.gain_db[0] <= self.gain_db[1] <= 0:
            raise ValueError(f"gain_db: expected -60 <= low <= high <= 0, given {list(self.gain_db)}")
        return self


class Speak:
    """Records in, records with sound out: mono f32 at the engine's rate, silence at the ends trimmed.

    Notes `voice`, `voice_group`, `split`, `gain_db` and, where it differs from the text, `said`. Rejects with
    `no_voice` (no pool for the language, or no other voice left for another try) and `wrong_language` (English letters
    for Chinese or the other way round).
    """

    name = "speak"

    def __init__(self, config: SpeakConfig, voices: Voices) -> None:
        self._config, self.voices = config, voices
        self._mouths: dict[str, Mouth] = {}
        self._done: dict[str, Record | Rejected] = {}

    @property
    def fingerprint(self) -> str:
        """Over settings, speakers and the engines' versions."""
        from nexus.engines.speak import Espeak

        speakers = [(speaker.id, speaker.language, speaker.group) for speaker in self.voices.speakers]
        version = [Espeak().version for pool in self._config.pools.values() if isinstance(pool, EspeakPool)]
        text = json.dumps([self._config.model_dump(mode="json"), speakers, version], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def setup(self) -> None:
        """Open the engines. Contacts no server yet. Raises BadConfig for an address or a token that cannot be."""
        self._mouths = {language: _mouth(pool, language) for language, pool in self._config.pools.items()}

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        """One result per record, in order. Raises NexusError where an engine fails; what was said by then is not said
        again when its record comes once more."""
        for record in records:
            if record.id not in self._done:
                self._done[record.id] = self._spoken(record)
        return [self._done.pop(record.id) for record in records]

    def said(self, text: str, language: str) -> str:
        """What the engine is given: espeak-ng says "$5" as "dollar five", so English is spelled out for it."""
        spelled_out = language == "en" and isinstance(self._config.pools[language], EspeakPool)
        return spoken_en(text) if spelled_out else text

    def say(self, text: str, speaker: Speaker) -> Audio:
        """`text` in that voice, trimmed, at the engine's level. Raises NexusError as the engine does."""
        sound = self._mouths[speaker.language](text, speaker)
        assert sound.samples is not None
        return Audio(samples=trimmed(sound.samples, sound.rate_hz), rate_hz=sound.rate_hz)

    def _spoken(self, record: Record) -> Record | Rejected:
        row, attempt = record.meta["row"], record.meta["attempt"]
        if record.language in ("en", "zh") and is_chinese(record.text) != (record.language == "zh"):
            return Rejected(record, "wrong_language", {"expected": record.language})
        speaker = self.voices.draw(record.language, row, attempt)
        if speaker is None:
            return Rejected(record, "no_voice", {"language": record.language, "attempt": attempt})
        gain_db = round(random.Random(f"{self._config.seed} gain {record.id}").uniform(*self._config.gain_db), 2)
        notes = {"voice": speaker.id, "voice_group": speaker.group, "split": self.voices.split_of(row)}
        said = self.said(record.text, record.language)
        record = record.noted(**notes, gain_db=gain_db, **({"said": said} if said != record.text else {}))
        sound = self.say(said, speaker)
        assert sound.samples is not None
        samples = at_level(sound.samples, gain_db).astype(np.float32)
        return record.with_(sound=Audio(samples=samples, rate_hz=sound.rate_hz))


def build(config: SpeakConfig, deaf: Collection[str] = ()) -> Speak:
    """The step, without the voices of which the recogniser hears nothing (ids from an `audition`).

    Raises BadConfig or BadRecord for pools that cannot be, and where no voice is left.
    """
    speakers = [
        speaker for language, pool in config.pools.items() for speaker in speakers_of(pool, language, config.seed)
    ]
    return Speak(config, Voices(speakers, config.seed, config.held_out, deaf))


def _mouth(pool: PoolConfig, language: str) -> Mouth:
    match pool:
        case EspeakPool():
            return _espeak()
        case CosyVoicePool():
            return functools.partial(_patiently, pool.tries, _cosyvoice(pool, language))
        case SpeechApiPool():
            return functools.partial(_patiently, pool.tries, _speech_api(pool, language))


def _espeak() -> Mouth:
    from nexus.engines.speak import Espeak, Voice

    espeak = Espeak()
    return lambda text, speaker: espeak.speak(text, Voice(**speaker.setting))


def _cosyvoice(pool: CosyVoicePool, language: str) -> Mouth:
    from nexus.engines import cosyvoice
    from nexus.engines.pcm_http import Timeouts

    server = cosyvoice.CosyVoice(
        pool.url, pool.version, token_of(pool.token_env, f"speak.pools.{language}"), Timeouts(5.0, pool.timeout_seconds)
    )
    return lambda text, speaker: server.speak(text, _cosyvoice_voice(json.dumps(dict(speaker.setting))))


@functools.lru_cache(maxsize=64)
def _cosyvoice_voice(setting: str) -> "cosyvoice.Voice":
    from nexus.engines.cosyvoice import CrossLingual, Instructed, Preset, ZeroShot
    from nexus.media import load_audio

    given: Mapping[str, str] = json.loads(setting)
    if given["mode"] == "sft":
        return Preset(given["speaker"])
    prompt = load_audio(Path(given["prompt"]), rate_hz=24_000)
    match given["mode"]:
        case "zero_shot":
            return ZeroShot(prompt, given["prompt_text"])
        case "cross_lingual":
            return CrossLingual(prompt)
        case "instruct":
            return Instructed(prompt, given["instruction"])
    raise AssertionError(given["mode"])


def _speech_api(pool: SpeechApiPool, language: str) -> Mouth:
    from nexus.engines.pcm_http import Timeouts
    from nexus.engines.speech_api import SpeechApi

    token = token_of(pool.token_env, f"speak.pools.{language}")
    server = SpeechApi(pool.url, pool.model, token, pool.rate_hz, Timeouts(5.0, pool.timeout_seconds))
    return lambda text, speaker: server.speak(text, speaker.setting["voice"])


def _patiently(tries: int, mouth: Mouth, text: str, speaker: Speaker) -> Audio:
    """The same request up to `tries` times, with pauses that double: a busy server says so, or breaks off."""
    for attempt in range(1, tries):
        try:
            return mouth(text, speaker)
        except NexusError:
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
    return mouth(text, speaker)


def token_of(variable: str | None, key: str) -> str | None:
    """The token in an environment variable that a recipe names. Raises BadConfig where it is not set."""
    if variable is None:
        return None
    token = os.environ.get(variable)
    if not token:
        raise BadConfig(f"{key}.token_env: expected a token in ${variable}, given none; export it")
    return token
