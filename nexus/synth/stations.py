"""From a recipe to its steps: which there are, in which order, and what they must know before the first row.

A recogniser that is adapted to the corpus reads its texts first; voices are heard before they take part. Both are kept
in the folder of the run, so that a run that goes on has the same steps.
"""

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nexus.engines.transcribe import Heard
from nexus.errors import BadRecord
from nexus.progress import Progress
from nexus.recipe import fingerprint
from nexus.synth import augment, rewrite, rules, speak, verify
from nexus.synth.audition import audition
from nexus.synth.pipeline import judge
from nexus.synth.read import read
from nexus.synth.recipe import SynthRecipe
from nexus.synth.recordings import Recognise
from nexus.synth.records import Record, Rejected, Step, content_id
from nexus.synth.verify import Ear, EarConfig, Verify, open_ear
from nexus.types import Audio

EARS = ".ears"  # what recognisers were adapted to
AUDITION = ".audition.jsonl"
ANSWERS = ".answers.sqlite"
AUDITION_TEXTS = 2000  # of the corpus, from which voices are given theirs
RULED = 256


@dataclass(frozen=True)
class Stations:
    """The steps of a run: `front` sees every text in the order of the source, `texts` and `recordings` run in workers.
    `card` says of them what is not in the recipe."""

    front: tuple[Step, ...]
    texts: tuple[Step, ...]
    recordings: tuple[Step, ...]
    card: Mapping[str, Any]


def stations(recipe: SynthRecipe, folder: Path, limit: int | None, processes: int, progress: Progress) -> Stations:
    """Build the steps of a run in `folder`. Raises NexusError for settings that cannot be."""
    front: tuple[Step, ...] = () if recipe.rules is None else (rules.build(recipe.rules),)
    heard = None
    if recipe.verify is not None:
        heard = verify.build(recipe.verify, corpus(recipe, limit), folder / EARS)
    texts: list[Step] = []
    card: dict[str, Any] = {}
    if recipe.rewrite is not None:
        card["rewrite"] = rewrite.describe(recipe.rewrite)
        texts.append(rewrite.build(recipe.rewrite, folder / ANSWERS))
    if recipe.assemble is not None and "s2s" in recipe.assemble.tasks:
        texts.append(Replies())
    if recipe.speak is not None:
        speaking = speak.build(recipe.speak)
        if heard is not None:
            known = _audition(speaking, heard, recipe, folder, limit, processes, progress)
            deaf = [voice["voice"] for voice in known if voice["deaf"]]
            card["voices_left_out"] = deaf
            speaking = speak.build(recipe.speak, deaf)
        texts.append(speaking)
    if recipe.augment is not None:
        texts.append(augment.build(recipe.augment))
    if heard is not None:
        texts.append(heard)
        card["recognisers"] = {name: ear.type for name, ear in heard.config.recognisers.items()}
        if heard.adaptation is not None:
            adapted = heard.adaptation
            said = {"words": adapted.num_words, "pronounced_by_rule": len(adapted.pronounced)}
            card["adapted"] = {**said, "never_heard": list(adapted.unsayable)}
    recordings: tuple[Step, ...] = ()
    if recipe.recordings is not None and recipe.verify is not None and heard is not None:
        ears = [Listener("first", recipe.verify.recognisers, folder / EARS, heard.fingerprint)]
        if recipe.second_recognisers:
            ears.append(Listener("second", recipe.second_recognisers, folder / EARS, heard.fingerprint))
        recordings = (Recognise(recipe.recordings.recognise, ears),)
    return Stations(front, tuple(texts), recordings, card)


def corpus(recipe: SynthRecipe, limit: int | None) -> Iterator[tuple[str, str]]:
    """(text, language) of every row that the rules let pass, in order."""
    if not recipe.sources:
        return
    rows = read(recipe.text_sources(), recipe.seed, limit)
    step = None if recipe.rules is None else rules.build(recipe.rules)
    if step is not None:
        step.setup()
    while some := list(islice(rows, RULED)):
        records = [row for row in some if isinstance(row, Record)]
        for result in records if step is None else judge(step, records):
            if isinstance(result, Record):
                yield result.text, result.language


def _audition(
    speaking: speak.Speak,
    heard: Verify,
    recipe: SynthRecipe,
    folder: Path,
    limit: int | None,
    processes: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """What every voice came to, each kept as soon as it was heard: a run that goes on hears those that are left."""
    path = folder / AUDITION
    settings = fingerprint([speaking.fingerprint, heard.fingerprint])
    voices = _auditioned(path, settings)
    known = {voice["voice"] for voice in voices}
    waiting = copy.copy(speaking)
    waiting.voices = copy.copy(speaking.voices)
    waiting.voices.speakers = tuple(speaker for speaker in speaking.voices.speakers if speaker.id not in known)
    if not heard.config.audition.texts or not waiting.voices.speakers:
        return voices
    texts = list(islice(corpus(recipe, limit), AUDITION_TEXTS))
    with (
        path.open("a", encoding="utf-8") as file,
        progress.stage("audition", len(speaking.voices.speakers), "voices", len(voices)) as stage,
    ):
        for each in audition(waiting, heard, texts, processes):
            voices.append(asdict(each))
            file.write(json.dumps({"settings": settings, **voices[-1]}) + "\n")
            file.flush()
            stage.advance(1, left_out=sum(voice["deaf"] for voice in voices))
    return voices


def _auditioned(path: Path, settings: str) -> list[dict[str, Any]]:
    """The voices that were heard under these settings; what a kill tore off is taken away."""
    if not path.is_file():
        return []
    whole, newline, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        os.truncate(path, len(whole) + len(newline))
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        of_these = [line for line in lines if line.pop("settings") == settings]
    except (ValueError, KeyError, AttributeError) as error:
        raise BadRecord(f"{path}: is no record of an audition ({error}); remove it") from None
    return of_these


class Replies:
    """Adds to every record with a reply (meta `reply`) a record of the same row that says it, with meta `reply_to`."""

    name = "replies"
    fingerprint = fingerprint("replies 1")

    def setup(self) -> None:
        """Nothing is needed."""

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        """One or two records for each."""
        return [each for record in records for each in (record, *self._reply(record))]

    def _reply(self, record: Record) -> Iterator[Record]:
        if reply := str(record.meta.get("reply") or "").strip():
            meta = {key: value for key, value in record.meta.items() if key not in ("reply", "text_written")}
            asked = {**meta, "reply_to": record.meta["row"]}
            yield record.with_(id=content_id(record.id, "reply"), text=reply, meta=asked)


class Listener:
    """The recognisers of a recipe, by language, as one that hears recordings."""

    def __init__(self, name: str, ears: Mapping[str, EarConfig], folder: Path, adapted: str) -> None:
        self.name, self._configs, self._folder, self._adapted = name, dict(ears), folder, adapted
        self._ears: dict[str, Ear] = {}

    @property
    def fingerprint(self) -> str:
        """Over settings and what they are adapted to."""
        ears = {language: ear.model_dump(mode="json") for language, ear in self._configs.items()}
        return fingerprint([self.name, ears, self._adapted])

    def setup(self) -> None:
        """Load the recognisers."""
        self._ears = {language: open_ear(ear, language, self._folder) for language, ear in self._configs.items()}

    def hear(self, audio: Audio, language: str) -> Heard | None:
        """What was said; None for a language without a recogniser."""
        ear = self._ears.get(language)
        return None if ear is None else ear.hear([audio], language)[0]
