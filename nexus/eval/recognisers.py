"""Who hears the speech that is examined, by name. None of them is told what it should hear, unless its id says so."""

import hashlib
from pathlib import Path
from typing import Protocol, runtime_checkable

from nexus.engines.transcribe import GeneralPocketSphinx, PocketSphinx
from nexus.engines.transcribe_api import TranscriptionApi
from nexus.errors import BadConfig
from nexus.eval.responders import address_of
from nexus.eval.suites.corpora import Language
from nexus.eval.suites.rows import read_lines
from nexus.media import load
from nexus.text import normalise_en
from nexus.types import Audio

KINDS = "pocketsphinx, pocketsphinx:FILE or openai:URL#MODEL"


@runtime_checkable
class Recogniser(Protocol):
    """`id` names recogniser and language model, as the run card shows them; `languages` are those it hears."""

    id: str
    languages: tuple[Language, ...]

    def transcribe(self, audio: Audio, language: Language) -> str:
        """The words heard, "" for none. Takes sound at any rate; raises BadMedia, or NexusError of a server."""
        ...


def recogniser_of(name: str, token: str | None = None) -> Recogniser:
    """The recogniser that a command line names.

    `pocketsphinx`: English, offline, with the general language model of its wheel. `pocketsphinx:FILE`: with a bigram
    of the lines of FILE, which may only be told what the examined system could not profit from; the id says that it
    was adapted. `openai:URL#MODEL`: a server of `/audio/transcriptions`, such as one that runs Whisper.
    Raises BadConfig for another name, NexusError for words that are not in PocketSphinx's dictionary.
    """
    kind, _, rest = name.partition(":")
    match kind:
        case "pocketsphinx" if rest:
            return _Offline(_adapted(Path(rest)), f"pocketsphinx, bigram of {_file_id(Path(rest))} (adapted)")
        case "pocketsphinx" if name == "pocketsphinx":
            return _Offline(GeneralPocketSphinx(), "pocketsphinx, general en-us language model")
        case "openai":
            return _Server(*address_of(rest), token)
        case _:
            raise BadConfig(f"recogniser {name!r}: expected {KINDS}")


class _Offline:
    languages: tuple[Language, ...] = ("en",)

    def __init__(self, recogniser: PocketSphinx | GeneralPocketSphinx, id: str) -> None:
        self._recogniser, self.id = recogniser, id

    def transcribe(self, audio: Audio, language: Language) -> str:
        return self._recogniser.transcribe(_loaded(audio))


class _Server:
    languages: tuple[Language, ...] = ("en", "zh")

    def __init__(self, url: str, model: str, token: str | None) -> None:
        self._api = TranscriptionApi(url, model, token)
        self.id = self._api.id

    def transcribe(self, audio: Audio, language: Language) -> str:
        return self._api.hear([_loaded(audio)], language)[0].text


def _adapted(path: Path) -> PocketSphinx:
    return PocketSphinx([normalise_en(line) for line in read_lines(path)])


def _file_id(path: Path) -> str:
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"


def _loaded(audio: Audio) -> Audio:
    loaded = load(audio) if audio.samples is None else audio
    assert isinstance(loaded, Audio)
    return loaded
