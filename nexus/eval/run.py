"""`nexus eval`: a responder answers suites, and a folder says how well, in report.json, items.jsonl and report.html.

Answers are kept batch by batch as they come. A run that was killed goes on behind the last whole batch and leaves the
same report.json and items.jsonl, byte for byte; what differs between equal runs (times, host) stands in run.json.
"""

import hashlib
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import nexus
from nexus.errors import BadConfig
from nexus.eval.judge import Judge
from nexus.eval.page import write_page
from nexus.eval.recognisers import Recogniser, recogniser_of
from nexus.eval.responders import MAX_TOKENS, ROWS, Answer, Responder, responder_of
from nexus.eval.scores import RESAMPLES, SEED, accuracy
from nexus.eval.suites.marking import Row, marks, reply_of, score
from nexus.eval.suites.rows import Journal
from nexus.eval.suites.synthesis import speaker_similarity
from nexus.eval.suites.tasks import Item, Suite, suite_of, suites_of
from nexus.media import load, write_wav
from nexus.progress import Progress
from nexus.recipe import code_digest
from nexus.results import hold, write_whole
from nexus.types import Audio

if TYPE_CHECKING:
    from nexus.engines.speaker import SpeakerModel  # brings transformers, which only speaker similarity needs

RESERVED = ("schema", "card")


@dataclass(frozen=True)
class Examination:
    """Who is examined in what, and by which means."""

    responder: Responder
    suites: Sequence[Suite]
    recogniser: Recogniser | None
    judge_name: str | None
    rows: int
    speaker: "SpeakerModel | None" = None

    def card(self) -> dict[str, Any]:
        """What the scores depend on: equal cards and equal answers give equal reports."""
        return {
            "responder": dict(self.responder.identity),
            "recogniser": None if self.recogniser is None else self.recogniser.id,
            "judge": self.judge_name,
            "speaker": None if self.speaker is None else self.speaker.id,
            "seed": SEED,
            "resamples": RESAMPLES,
            "suites": {
                suite.name: {"protocol": dict(suite.protocol), "data": suite.fingerprint()} for suite in self.suites
            },
        }


def evaluate(
    responder: str,
    suite: str,
    data: Path | None,
    out: Path,
    limit: int | None = None,
    *,
    split: str | None = None,
    recogniser: str | None = None,
    judge: str | None = None,
    speaker: Path | None = None,
    rows: int = ROWS,
    max_tokens: int = MAX_TOKENS,
    device: str = "cpu",
    token: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answer, mark and report; returns what report.json holds.

    `suite` is a name or a FILE.yaml, `limit` takes the first items of each suite, `rows` conversations are answered at
    a time, `token` is sent to every server that is named. Raises a NexusError for every mistake in what is named, and
    BadConfig for an `out` that holds another run, Busy for one in use.
    """
    suites = _suites(suite, data, split, limit)
    ear = None if recogniser is None else recogniser_of(recogniser, token)
    _check_ear(suites, ear)
    listener = None if speaker is None else _speaker_model(speaker)
    _check_speaker(suites, listener)
    examined = responder_of(responder, rows=rows, max_tokens=max_tokens, device=device, token=token)
    _check_ids(suites, examined)
    examination = Examination(examined, suites, ear, judge, rows, listener)
    referee = None if judge is None else Judge(judge, out / "judgements.jsonl", token)
    named = {"responder": responder, "suite": suite, "data": None if data is None else str(data)}
    with Progress() if progress is None else progress as shown, _opened(out, examination.card(), named) as folder:
        return _examine(examination, referee, folder, shown)


def _examine(examination: Examination, judge: Judge | None, folder: "_Folder", progress: Progress) -> dict[str, Any]:
    report: dict[str, Any] = {"schema": 1}
    items: list[dict[str, Any]] = []
    for suite in examination.suites:
        began = time.perf_counter()
        rows = _answered(suite, examination, judge, folder, progress)
        marked = marks(suite, rows)
        report[suite.name] = score(suite, rows, marked)
        if judge is not None and suite.metric == "accuracy":
            report[suite.name]["judge"] = _judged(rows, judge)
        if examination.speaker is not None and suite.metric == "seed_tts":
            report[suite.name]["speaker"] = _same_voice(suite, rows, examination.speaker, folder.path)
        items += [
            {**_head(suite, item), **row, **mark} for item, row, mark in zip(suite.items, rows, marked, strict=True)
        ]
        folder.seconds[suite.name] = time.perf_counter() - began
    report["card"] = folder.card
    folder.write("items.jsonl", "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    folder.write("report.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_page(folder.path, report, examination.suites, items)
    folder.close()
    return report


def _answered(
    suite: Suite, examination: Examination, judge: Judge | None, folder: "_Folder", progress: Progress
) -> list[Row]:
    """One row per item: what an earlier process kept, then what is answered now."""
    kept = [entry["rows"] for entry in folder.journal.rows if entry["suite"] == suite.name]
    rows: list[Row] = [row for batch in kept for row in batch]
    order = batch_order(suite)
    assert [row["id"] for row in rows] == [suite.items[i].id for i in order[: len(rows)]], "a journal of other items"
    folder.resumed += len(rows)
    with progress.stage(suite.name, len(suite.items), "items", len(rows)) as stage:
        for start in range(len(rows), len(suite.items), examination.rows):
            places = order[start : start + examination.rows]
            batch = [suite.items[place] for place in places]
            speak = suite.form == "speech" or (suite.form == "either" and examination.recogniser is not None)
            answers = examination.responder.answer([item.sample() for item in batch], speak)
            fresh = [
                _row(suite, item, answer, place, examination.recogniser, judge, folder.path)
                for place, item, answer in zip(places, batch, answers, strict=True)
            ]
            folder.journal.append({"suite": suite.name, "rows": fresh})
            rows += fresh
            stage.advance(len(batch))
    by_place = dict(zip(order, rows, strict=True))
    return [by_place[place] for place in range(len(rows))]


def batch_order(suite: Suite) -> list[int]:
    """Places of the items in the order in which they are asked: alike in size, so that little of a batch is padding.

    On one thread and the demo's model this makes 16 at a time 3 times as fast as one by one, not 2.4 times. Excerpts
    keep their order: those of one recording are cut from it while it is in memory.
    """
    if any(item.excerpt for item in suite.items):
        return list(range(len(suite.items)))
    sizes = [sum(path.stat().st_size for path in item.media) or len(item.reference) for item in suite.items]
    return sorted(range(len(sizes)), key=lambda place: (sizes[place], place))


def _row(
    suite: Suite, item: Item, answer: Answer, index: int, ear: Recogniser | None, judge: Judge | None, out: Path
) -> dict[str, Any]:
    name = heard = None
    if answer.audio is not None:
        sound = load(answer.audio) if answer.audio.samples is None else answer.audio
        assert isinstance(sound, Audio) and sound.samples is not None
        name = f"audio/{suite.name}/{index:06d}.wav"
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_wav(out / name, sound.samples, sound.rate_hz)
        heard = None if ear is None else ear.transcribe(sound, item.language)
    row: dict[str, Any] = {
        "id": item.id,
        "text": answer.text,
        "heard": heard,
        "audio": name,
        "missing": answer.is_missing,
        "complete": answer.complete,
    }
    if judge is not None and suite.metric == "accuracy":
        reply = reply_of(row)
        row["verdict"] = judge.verdict(suite.questions.get(item.id, ""), item.reference, reply) if reply else None
    return row


def _head(suite: Suite, item: Item) -> dict[str, Any]:
    return {"suite": suite.name, "id": item.id, "group": item.group, "reference": item.reference}


def _judged(rows: Sequence[Row], judge: Judge) -> dict[str, Any]:
    """The judge's score: what it left undecided, and what there was no answer to, is wrong."""
    verdicts = [row["verdict"] for row in rows]
    return {**accuracy([bool(verdict) for verdict in verdicts]), "undecided": verdicts.count(None), "id": judge.id}


def _same_voice(suite: Suite, rows: Sequence[Row], speaker: "SpeakerModel", out: Path) -> dict[str, Any]:
    """How alike the voices of prompts and of what was spoken are. Null, with the reason, where nothing was spoken."""
    spoken = [(item.prompt, out / row["audio"]) for item, row in zip(suite.items, rows, strict=True) if row["audio"]]
    if not spoken:
        return {"similarity": None, "n": len(rows), "ci95": None, "reason": "no answer has a sound", "id": speaker.id}
    prompts, said = (
        np.stack([speaker.embed(Audio(path=path)) for path in paths]) for paths in zip(*spoken, strict=True)
    )
    return {**speaker_similarity(prompts, said, len(rows) - len(spoken)), "id": speaker.id}


def _speaker_model(folder: Path) -> "SpeakerModel":
    from nexus.engines.speaker import SpeakerModel

    return SpeakerModel(folder)


def _check_speaker(suites: Sequence[Suite], speaker: "SpeakerModel | None") -> None:
    if speaker is None:
        return
    wanted = [suite for suite in suites if suite.metric == "seed_tts"]
    if not wanted:
        raise BadConfig("--speaker-model compares voices in the suite seed_tts, which is not asked for; leave it out")
    for item in (item for suite in wanted for item in suite.items if item.prompt is None):
        raise BadConfig(f"item {item.id}: its line names no prompt to compare voices with; leave out --speaker-model")


def _suites(suite: str, data: Path | None, split: str | None, limit: int | None) -> list[Suite]:
    if limit is not None and limit < 1:
        raise BadConfig(f"limit: expected at least 1, given {limit}")
    suites = []
    for name, config, folder in suites_of(suite, data, split):
        if name in RESERVED or not name.isidentifier():
            raise BadConfig(f"{suite}: a suite cannot be named {name!r}, expected letters, digits and _; rename it")
        if limit is not None and config.limit is not None:
            raise BadConfig(f"{suite}: {name}.limit is {config.limit} there and {limit} beside it; name it once")
        suites.append(suite_of(name, config if limit is None else config.model_copy(update={"limit": limit}), folder))
    return suites


def _check_ear(suites: Sequence[Suite], ear: Recogniser | None) -> None:
    for suite in suites:
        if suite.form == "speech" and ear is None:
            raise BadConfig(f"suite {suite.name}: marks speech, given no recogniser; name one with --recogniser")
        unheard = {item.language for item in suite.items} - set(ear.languages if ear else ("en", "zh"))
        if unheard:
            raise BadConfig(
                f"suite {suite.name}: has items in {min(unheard)}, {ear.id if ear else ''} hears "
                f"{', '.join(ear.languages if ear else ())} alone; name another recogniser"
            )


def _check_ids(suites: Sequence[Suite], responder: Responder) -> None:
    if responder.identity["kind"] == "answers" and len(suites) > 1:
        raise BadConfig(f"recorded answers are to one suite, given {len(suites)}; name one suite for each file")
    for suite in suites:
        responder.check(suite.ids)


# The result folder


class _Folder:
    """A result folder that this process holds: its journal, its times, and files that are whole or not there."""

    def __init__(self, path: Path, card: dict[str, Any], named: Mapping[str, Any]) -> None:
        self.path, self.card, self._named = path, card, named
        self.journal = Journal(path / ".journal.jsonl")
        self.seconds: dict[str, float] = {}
        self.resumed = 0
        self._began = time.time()

    def write(self, name: str, text: str) -> None:
        write_whole(self.path / name, text)

    def begin(self) -> None:
        """Say in run.json whose folder this is, before anything is kept in it."""
        self._note(finished=None)

    def close(self) -> None:
        """Say in run.json when and how fast it was done."""
        self._note(finished=time.time(), seconds=self.seconds, resumed_items=self.resumed)

    def _note(self, finished: float | None, **more: Any) -> None:
        run = {
            "identity": {**self.card, "code": code_digest()},
            "named": self._named,
            "version": nexus.__version__,
            "host": {"name": platform.node(), "machine": platform.machine(), "python": platform.python_version()},
            "began": self._began,
            "finished": finished,
            **more,
        }
        self.write("run.json", json.dumps(run, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def _opened(out: Path, card: dict[str, Any], named: Mapping[str, Any]) -> Iterator[_Folder]:
    """Hold the folder: begin anew, or continue what was begun there with the same card and code."""
    with hold(out):
        path = out / "run.json"
        if path.is_file():
            _refuse_others(out, {**card, "code": code_digest()}, json.loads(path.read_text(encoding="utf-8")))
        folder = _Folder(out, card, named)
        folder.begin()
        yield folder


def _refuse_others(out: Path, mine: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    theirs = run.get("identity", {})
    differing = [key for key in mine if json.loads(json.dumps(mine[key])) != theirs.get(key)]
    if differing:
        said = ", ".join(f"{key} (there {_brief(theirs.get(key))}, now {_brief(mine[key])})" for key in differing)
        raise BadConfig(f"{out}: holds another run; different: {said}; give another --out or remove it")


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:80]} … {hashlib.sha256(text.encode()).hexdigest()[:8]}"
