"""Who speaks: pools of speakers per language, one drawn for every try at a text, some held back for testing.

A draw depends on the seed, the row and the attempt alone, so that a run made again, or with other workers, hears the
same voices. Speakers of one `group` sound alike and never stand on both sides of the split.
"""

import hashlib
import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from nexus.errors import BadConfig, BadRecord
from nexus.organs import Count, Natural, Positive, Strict

MOST_ATTEMPTS = 16  # different speakers drawn for a text, at most
ESPEAK_LANGUAGES = {"en": "en", "zh": "cmn"}
Split = Literal["train", "test"]


class EspeakPool(Strict):
    """Settings of espeak-ng: every accent and variant in turn, each time with another rate (words a minute), pitch and
    pitch range (0..99), until there are `voices`."""

    type: Literal["espeak"] = "espeak"
    voices: Count = 2000
    accents: tuple[str, ...] = ()  # none named: all of the language
    rate_wpm: tuple[Count, Count] = (130, 190)
    pitch: tuple[Natural, Natural] = (25, 75)
    pitch_range: tuple[Natural, Natural] = (30, 70)


class CosyVoicePool(Strict):
    """The published server of CosyVoice and the speakers listed in a JSONL file, one object per line: `id`, `mode`
    (sft, zero_shot, cross_lingual, instruct), and what the mode needs of `speaker`, `prompt` (a file beside the list),
    `prompt_text`, `instruction`; `language` is the prompt's, `group` who it is (default: the id)."""

    type: Literal["cosyvoice"]
    url: str
    version: Literal[1, 2, 3] = 2
    speakers: str
    token_env: str | None = None  # environment variable that holds the token
    timeout_seconds: Positive = 60.0
    tries: Count = 3


class SpeechApiPool(Strict):
    """A server of `/v1/audio/speech` (`url` ends before `/audio`) and the voices it has for this language. It must
    answer with headerless 16-bit PCM at `rate_hz`."""

    type: Literal["openai"]
    url: str
    model: str
    voices: Annotated[tuple[str, ...], Field(min_length=1)]
    rate_hz: Count = 24_000
    token_env: str | None = None
    timeout_seconds: Positive = 60.0
    tries: Count = 3


PoolConfig = Annotated[EspeakPool | CosyVoicePool | SpeechApiPool, Field(discriminator="type")]


class CosyVoiceSpeaker(Strict):
    """A line of a CosyVoice pool's list."""

    id: Annotated[str, Field(min_length=1)]
    mode: Literal["sft", "zero_shot", "cross_lingual", "instruct"]
    language: str
    speaker: str = ""
    prompt: str = ""
    prompt_text: str = ""
    instruction: str = ""
    group: str = ""

    def lacks(self) -> list[str]:
        """The fields that the mode needs and that are empty."""
        needed = {
            "sft": ("speaker",),
            "zero_shot": ("prompt", "prompt_text"),
            "cross_lingual": ("prompt",),
            "instruct": ("prompt", "instruction"),
        }[self.mode]
        return [name for name in needed if not getattr(self, name)]


@dataclass(frozen=True)
class Speaker:
    """One voice: its `id` (the same for the same voice, everywhere), whose it is, and what its engine must know."""

    id: str
    language: str
    group: str
    setting: Mapping[str, Any] = field(default_factory=dict)


class Voices:
    """The speakers of a run, by language, without the deaf ones, and their draw.

    `held_out` is the share of groups, and of texts, that are for testing alone; 0 for none.
    """

    def __init__(self, speakers: Sequence[Speaker], seed: int, held_out: float, deaf: Collection[str] = ()) -> None:
        unknown = sorted(set(deaf) - {speaker.id for speaker in speakers})
        if unknown:
            raise BadConfig(f"voices to leave out: expected ids of the pool, given {unknown[0]!r}; audition again")
        self._seed, self._held_out = seed, held_out
        self.speakers = tuple(speaker for speaker in speakers if speaker.id not in set(deaf))
        self._by_side: dict[tuple[str, Split], list[Speaker]] = {}
        for speaker in self.speakers:
            side = (speaker.language, self._side("group", speaker.group))
            self._by_side.setdefault(side, []).append(speaker)
        for language in {speaker.language for speaker in speakers}:
            for split in ("train", "test") if held_out else ("train",):
                if not self._by_side.get((language, split)):
                    raise BadConfig(
                        f"voices: of {len(speakers)} speakers, {len(self.speakers)} are left and none of them is for "
                        f"{split} in {language!r}; give more voices, or move held_out ({held_out:g})"
                    )

    def split_of(self, row: str) -> Split:
        """The side of the split on which a text lies, by the id of its row."""
        return self._side("text", row)

    def draw(self, language: str, row: str, attempt: int) -> Speaker | None:
        """The speaker of a try: another one for every attempt at the row, None where no other is left."""
        candidates = self._by_side.get((language, self.split_of(row)), [])
        # One draw for all attempts: sampling fewer would not give the beginning of sampling more.
        order = random.Random(f"{self._seed} {row}").sample(candidates, min(MOST_ATTEMPTS, len(candidates)))
        return order[attempt] if attempt < len(order) else None

    def _side(self, kind: str, name: str) -> Split:
        digest = hashlib.sha256(f"{self._seed} {kind} {name}".encode()).digest()
        return "test" if int.from_bytes(digest[:8], "big") < self._held_out * 2**64 else "train"


def speakers_of(config: PoolConfig, language: str, seed: int) -> list[Speaker]:
    """The speakers of a pool. Raises BadConfig for a pool that cannot be, BadRecord for a line of a list."""
    match config:
        case EspeakPool():
            return _espeak_speakers(config, language, seed)
        case CosyVoicePool():
            return _listed_speakers(config, language)
        case SpeechApiPool():
            names = [f"{config.model}/{voice}" for voice in config.voices]
            return [
                Speaker(name, language, name, {"voice": voice})
                for name, voice in zip(names, config.voices, strict=True)
            ]


def _espeak_speakers(config: EspeakPool, language: str, seed: int) -> list[Speaker]:
    from nexus.engines.speak import Voice, voice_pool

    if language not in ESPEAK_LANGUAGES:
        raise BadConfig(f"speak.pools.{language}: espeak is set up for {', '.join(ESPEAK_LANGUAGES)}; name a server")
    names = voice_pool(ESPEAK_LANGUAGES[language])
    accents = sorted({name.partition("+")[0] for name in names})
    strange = sorted(set(config.accents) - set(accents))
    if strange:
        raise BadConfig(f"speak.pools.{language}.accents: expected some of {accents}, given {strange[0]!r}")
    chosen = [name for name in names if not config.accents or name.partition("+")[0] in config.accents]
    rng = random.Random(f"{seed} espeak {language}")
    found: dict[str, Speaker] = {}
    while len(found) < config.voices:
        for name in rng.sample(chosen, len(chosen)):
            numbers = {key: rng.randint(*getattr(config, key)) for key in ("rate_wpm", "pitch", "pitch_range")}
            voice = Voice(name, **numbers)
            found[voice.key()] = Speaker(
                voice.key(), language, f"espeak {name.partition('+')[2]}", {"name": name, **numbers}
            )
            if len(found) == config.voices:
                break
    return list(found.values())


def _listed_speakers(config: CosyVoicePool, language: str) -> list[Speaker]:
    path = Path(config.speakers)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(
            f"speak.pools.{language}.speakers: {path} cannot be read ({error}); name a JSONL file"
        ) from None
    speakers = [_listed(path, number, line, language) for number, line in enumerate(lines, 1) if line.strip()]
    if not speakers or len({speaker.id for speaker in speakers}) < len(speakers):
        raise BadConfig(f"{path}: expected speakers with different ids, given {len(speakers)}; correct the list")
    return speakers


def _listed(path: Path, number: int, line: str, language: str) -> Speaker:
    try:
        listed = CosyVoiceSpeaker.model_validate(json.loads(line))
    except (ValueError, ValidationError) as error:
        raise BadRecord(f"{path}:{number}: no speaker ({' '.join(str(error).split())[:200]}); correct it") from None
    if lacks := listed.lacks():
        raise BadRecord(f"{path}:{number}: mode {listed.mode} needs {' and '.join(lacks)}, given none; add it")
    if listed.language != language and listed.mode != "cross_lingual":
        raise BadRecord(
            f"{path}:{number}: speaker {listed.id!r} speaks {listed.language!r}, expected {language!r}; give it mode "
            "cross_lingual, or put it into the pool of its language"
        )
    prompt = str(path.parent / listed.prompt) if listed.prompt else ""
    return Speaker(listed.id, language, listed.group or listed.id, {**listed.model_dump(), "prompt": prompt})
