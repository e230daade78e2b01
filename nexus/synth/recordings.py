"""Recordings in, transcribed speech out: which recordings there are, what two recognisers make of each utterance, and
which of it nobody needs to listen to.

`read` gives utterances as the factory's rows, one at a time and in an order that never changes; `Recognise` is the step
that follows. What it is sure of is kept; all else is rejected as `to_review`, with its sound and with the words heard,
and is the queue for people (`nexus.synth.review`).
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Protocol

from pydantic import model_validator

from nexus.engines.transcribe import Heard
from nexus.errors import BadConfig
from nexus.organs import Share, Strict
from nexus.recipe import fingerprint
from nexus.synth.read import SourceConfig
from nexus.synth.read import read as read_rows
from nexus.synth.readings import comparable
from nexus.synth.records import Record, Rejected, first_attempt
from nexus.synth.segment import SegmentConfig, Segmenter
from nexus.text import character_errors, word_errors
from nexus.types import Audio

TO_REVIEW = "to_review"
SOUNDS = (
    *(
        ".wav",
        ".flac",
        ".ogg",
        ".opus",
        ".mp3",
        ".m4a",
        ".aac",
        ".aif",
        ".aiff",
        ".amr",
        ".au",
        ".caf",
        ".mka",
        ".webm",
    ),
    *(".mp4", ".mkv", ".mov"),  # of a film, its sound
)


class RecogniseConfig(Strict):
    """What has to hold for an utterance to be kept without a person: the first recogniser is sure, the second agrees
    with it, and speech stands well above noise."""

    min_confidence: Share = 0.0  # of the first recogniser, where it has one; their scales differ: look at your own
    max_disagreement: Share = 0.05  # errors of the second's words against the first's (characters of Chinese)
    min_snr_db: float = 6.0
    min_words: int = 1  # (characters of Chinese)


class RecordingsConfig(Strict):
    """The recordings of a run: all sound files below `folder`, or those that a manifest names in its column `audio`.

    A manifest's `text` is what was said: it is not given to the recognisers, and serves to count their errors. Rows
    with the columns `start` and `seconds` (lhotse's cuts) are taken as they are cut; every other recording is cut at
    its pauses.
    """

    folder: str = ""
    manifest: SourceConfig | None = None
    language: str = ""  # of recordings whose row names none
    licence: str = "unknown"
    segment: SegmentConfig = SegmentConfig()
    recognise: RecogniseConfig = RecogniseConfig()

    @model_validator(mode="after")
    def _fits(self) -> "RecordingsConfig":
        if bool(self.folder) == (self.manifest is not None):
            raise ValueError("recordings come from a `folder` or a `manifest`; give one of them")
        if self.manifest is not None and "audio" not in self.manifest.columns:
            raise ValueError("the manifest of recordings needs a column for `audio`; name it under columns")
        return self


class Recogniser(Protocol):
    """Whoever hears. `setup` loads its model, once per worker."""

    name: str

    @property
    def fingerprint(self) -> str: ...

    def setup(self) -> None: ...

    def hear(self, audio: Audio, language: str) -> Heard | None:
        """What was said; None for a language it does not know."""
        ...


def read(config: RecordingsConfig) -> Iterator[Record | Rejected]:
    """The utterances of all recordings, in order, mono at 16 kHz, one at a time; `meta["reference"]` is what the
    manifest says was said in the whole recording. Recordings that give none are rejected with their reason.

    Raises BadConfig for a folder without a sound file, and as `nexus.synth.read` for a manifest.
    """
    segmenter = Segmenter(config.segment)
    given = _of_folder(config) if config.manifest is None else _of_manifest(config)
    for path, rows in groupby(given, _file):
        recordings: list[Record] = []
        for row in rows:
            if isinstance(row, Rejected):
                yield row
            elif "start" in row.meta and "seconds" in row.meta:
                recordings.append(row)
            else:
                yield from segmenter.pieces(row)
        if recordings and path is not None:
            yield from segmenter.cuts(path, recordings)


def _file(row: Record | Rejected) -> Path | None:
    return row.sound.path if isinstance(row, Record) and row.sound else None


def _of_folder(config: RecordingsConfig) -> Iterator[Record]:
    folder = Path(config.folder)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SOUNDS and path.is_file())
    if not paths:
        what = "holds no sound file" if folder.is_dir() else "is no folder"
        raise BadConfig(f"{folder}: {what}, expected {', '.join(SOUNDS)} files in it or below it; name the folder")
    for path in paths:
        name = path.relative_to(folder).as_posix()
        meta = {"source": folder.name, "file": name, "licence": config.licence}
        yield first_attempt("", config.language, meta, Audio(path=path))


def _of_manifest(config: RecordingsConfig) -> Iterator[Record | Rejected]:
    assert config.manifest is not None
    for row in read_rows([config.manifest], 0, None):
        if isinstance(row, Rejected):
            yield row
        else:
            language = row.language or config.language
            noted = row.noted(reference=row.text) if row.text else row
            yield noted.with_(text="", language=language)


class Recognise:
    """The step. Keeps an utterance with the words of the first recogniser, or rejects it as `to_review`.

    `meta["heard"]` has {text, confidence} by recogniser. The numbers of a rejection say why (`cause`: no_recogniser,
    nothing_heard, too_short, confidence, disagreement, noise) and how bad it is (`badness`, 0 to 1 and more: the queue
    begins with the worst).
    """

    name = "recognise"

    def __init__(self, config: RecogniseConfig, recognisers: Sequence[Recogniser]) -> None:
        assert recognisers, "recognition without a recogniser"
        self._config, self._recognisers = config, tuple(recognisers)

    @property
    def fingerprint(self) -> str:
        """Over every setting and the recognisers."""
        return fingerprint([self._config.model_dump(mode="json"), [each.fingerprint for each in self._recognisers]])

    def setup(self) -> None:
        """Load the recognisers."""
        for each in self._recognisers:
            each.setup()

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        """Each record with its words, or for review, in order."""
        return [self._heard(record) for record in records]

    def _heard(self, record: Record) -> Record | Rejected:
        assert record.sound is not None, f"record {record.id} reaches recognise without sound"
        heard: dict[str, Heard] = {}
        for each in self._recognisers:
            what = each.hear(record.sound, record.language)
            if what is not None:
                heard[each.name] = what
        told = {name: {"text": what.text, "confidence": what.confidence} for name, what in heard.items()}
        record = record.noted(heard=told)
        if not heard:
            return Rejected(record, TO_REVIEW, {"cause": "no_recogniser", "badness": 1.0})
        first, *others = heard.values()
        record = record.with_(text=first.text)
        disagreement = max((disagreement_of(first.text, other.text, record.language) for other in others), default=0.0)
        numbers = {"disagreement": disagreement, "badness": disagreement + 1 - _sure(first)}
        if first.confidence is not None:
            numbers["confidence"] = first.confidence
        if "segment" in record.meta:
            numbers["snr_db"] = record.meta["segment"]["snr_db"]
        cause = self._cause(first, record.language, numbers)
        return Rejected(record, TO_REVIEW, {"cause": cause, **numbers}) if cause else record.noted(hearing=numbers)

    def _cause(self, first: Heard, language: str, numbers: dict[str, float]) -> str:
        words = comparable(first.text, language)
        length = len(words) if language == "zh" else len(words.split())
        if length == 0:
            return "nothing_heard"
        if length < self._config.min_words:
            return "too_short"
        if numbers["disagreement"] > self._config.max_disagreement:
            return "disagreement"
        if _sure(first) < self._config.min_confidence:
            return "confidence"
        if numbers.get("snr_db", self._config.min_snr_db) < self._config.min_snr_db:
            return "noise"
        return ""


def disagreement_of(first: str, second: str, language: str) -> float:
    """Errors of `second` against `first`, per word of `first` (character of Chinese); 1 where only one has words."""
    errors, length = _errors(first, second, language)
    return errors / length if length else float(errors > 0)


def errors_of(records: Iterable[Record]) -> dict[str, float | int]:
    """Word errors (character errors of Chinese) of recordings whose manifest says what was said: {rate, errors, words,
    recordings}; utterances of one recording are put together in their order. No `rate` where there are none."""
    said: dict[str, tuple[str, str]] = {}
    heard: dict[str, list[tuple[float, str]]] = {}
    for record in records:
        if "reference" in record.meta:
            recording = record.meta["recording"]
            said[recording] = (record.meta["reference"], record.language)
            heard.setdefault(recording, []).append((record.meta["segment"]["start_seconds"], record.text))
    errors, words = 0, 0
    for recording, (reference, language) in said.items():
        wrong, expected = _errors(reference, " ".join(text for _, text in sorted(heard[recording])), language)
        errors, words = errors + wrong, words + expected
    counts: dict[str, float | int] = {"recordings": len(said), "errors": errors, "words": words}
    return {**counts, "rate": errors / words} if words else counts


def _errors(reference: str, heard: str, language: str) -> tuple[int, int]:
    """(errors, length of the reference), numbers as digits on both sides."""
    count = character_errors if language == "zh" else word_errors
    return count(comparable(reference, language), comparable(heard, language))


def _sure(heard: Heard) -> float:
    return 1.0 if heard.confidence is None else heard.confidence
