"""From verified samples to training rows: which tasks of table 1 a sample serves, how many, on which side of the split.

All samples are seen twice, in the same order: `Assemble.survey` looks at them (who is tested, what there is of each
kind, which replies are spoken), then the step makes rows. Nothing is decided by a draw.

* **Split.** Speaking and hand-made corpora state a side in meta `split`; elsewhere the hash of the speaker decides. A
  training sample whose text or speaker is tested is dropped (in_test), so that neither is on both sides; `report`
  proves it on the rows that were made.
* **Halves.** With `recorded_share` the training rows of a task are recorded and synthetic in that proportion: of the
  kind that there is too much of, what is beyond is dropped (enough), and where one is short the report says so.
* **Sizes.** `rows: table-1` are the paper's numbers; a sample serves a task in one stage only, the first with room.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from nexus.data.chat import task_turns
from nexus.data.records import write_record
from nexus.organs import Count, Share, Strict
from nexus.recipe import fingerprint
from nexus.synth.duplicates import comparable
from nexus.synth.records import Record, Rejected
from nexus.types import Audio, Sample

TaskName = Literal["asr", "s2tt", "chat", "caption", "ser", "tts", "s2s"]
Origin = Literal["recorded", "synthetic"]
Side = Literal["train", "test"]

# Nexus, table 1: rows by stage and task.
TABLE_1: dict[str, dict[TaskName, int]] = {
    "1": {"asr": 5_600_000, "s2tt": 1_500_000, "chat": 200_000, "caption": 140_000, "ser": 750_000},
    "2": {"chat": 230_000, "asr": 20_000, "s2tt": 20_000},
    "3": {"tts": 40_000_000, "s2s": 220_000},
}
# What a sample needs for a task besides its sound: keys of meta.
NEEDS: dict[TaskName, tuple[str, ...]] = {
    "asr": (),
    "s2tt": ("translation",),
    "chat": ("reply",),
    "caption": ("caption",),
    "ser": ("emotion",),
    "tts": (),
    "s2s": ("reply",),
}


class AssembleConfig(Strict):
    """Which rows are made. A sample makes a row of every task in `tasks` for which it has what is needed; one whose
    source names a `task` makes that one alone."""

    tasks: Annotated[tuple[TaskName, ...], Field(min_length=1)] = ("asr", "tts")
    # Training rows by stage and task; null: as many as there are, in one stage without a name.
    rows: Literal["table-1"] | dict[str, dict[TaskName, Count]] | None = None
    recorded_share: Annotated[float, Field(gt=0, lt=1)] | None = None  # the paper: 0.5
    test_share: Share = 0.0  # of speakers, where nothing states a side

    @model_validator(mode="after")
    def _fits(self) -> "AssembleConfig":
        sizes = self.sizes()
        if sizes is not None and (unused := {task for stage in sizes.values() for task in stage} - set(self.tasks)):
            raise ValueError(f"rows names task {min(unused)!r}, which `tasks` does not; add it there")
        return self

    def sizes(self) -> Mapping[str, Mapping[TaskName, int]] | None:
        """Training rows by stage and task."""
        return TABLE_1 if self.rows == "table-1" else self.rows


@dataclass
class _Count:
    """Training rows of one kind: how many are wanted, and made."""

    wanted: int | None
    made: int = 0

    @property
    def full(self) -> bool:
        return self.wanted is not None and self.made >= self.wanted


@dataclass
class _Split:
    """What stands on one side of the split: hashes of texts, one per row, and speakers."""

    texts: "array[int]" = field(default_factory=lambda: array("Q"))
    speakers: set[str] = field(default_factory=set)
    rows: int = 0
    unknown_speaker: int = 0


class Assemble:
    """The step. Makes one record per row, with its task set and meta `split`, `stage`, `origin`; several per sample
    where it serves several tasks. Runs in one process: it counts."""

    name = "assemble"

    def __init__(self, config: AssembleConfig) -> None:
        self._config = config
        self.setup()

    @property
    def fingerprint(self) -> str:
        """Over every setting."""
        return fingerprint({"assemble": 1, **self._config.model_dump(mode="json")})

    def setup(self) -> None:
        """Forget everything that was surveyed and made."""
        self._tested_texts: set[int] = set()
        self._tested_speakers: set[str] = set()
        self._replies: dict[str, tuple[str, Path]] = {}
        self._available: Counter[tuple[TaskName, Origin]] = Counter()
        self._counts: dict[tuple[str, TaskName, Origin], _Count] | None = None
        self._sides: dict[Side, _Split] = {"train": _Split(), "test": _Split()}

    def survey(self, samples: Callable[[], Iterable[Record]]) -> None:
        """Look at all samples that will be assembled, before the first is; `samples` gives them anew on every call,
        with sounds as paths. A sample with meta `reply_to` is the spoken reply to the row of that id."""
        assert self._counts is None, "a survey behind the first row would change what was decided"
        for record in samples():
            if (asked := record.meta.get("reply_to")) and record.sound and record.sound.path:
                self._replies[str(asked)] = (record.text, record.sound.path)
            if self._side(record) == "test":
                self._tested_texts.add(_text_hash(record.text))
                self._tested_speakers.add(speaker_of(record))
        if self._config.recorded_share is not None and self._config.rows is None:
            # What a sample can serve is known only when all replies and all tested speakers are.
            for record in samples():
                if self._side(record) == "train" and not self._excluded(record):
                    self._available.update((task, origin_of(record)) for task in self._tasks_of(record))

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        """Rows of surveyed samples. Reasons: no_task (numbers: what is missing for which), in_test (its text or its
        speaker), enough (every task that it serves is full), reply_of_another (serves no task itself; the row of its
        question holds its sound, where that was kept)."""
        if self._counts is None:
            self._counts = self._planned()
        return [row for record in records for row in self._rows(record)]

    def _rows(self, record: Record) -> list[Record | Rejected]:
        tasks = self._tasks_of(record)
        if not tasks and (asked := record.meta.get("reply_to")):
            return [Rejected(record, "reply_of_another", {"of": str(asked)})]
        if not tasks:
            return [Rejected(record, "no_task", {"missing": self._missing(record)})]
        if excluded := self._excluded(record):
            return [Rejected(record, "in_test", {"shares": excluded})]
        side, rows = self._side(record), list[Record]()
        if side == "test":
            assert _text_hash(record.text) in self._tested_texts, f"{record.id} is tested, and was not surveyed"
        for task in tasks:
            stage = "" if side == "test" else self._room(task, origin_of(record))
            if stage is not None:
                rows.append(self._row(record, task, stage, side))
        if not rows:
            return [Rejected(record, "enough", {"tasks": ", ".join(tasks), "origin": origin_of(record)})]
        for _ in rows:
            self._note(record, side)
        return [*rows]

    def _row(self, record: Record, task: TaskName, stage: str, side: Side) -> Record:
        notes: dict[str, Any] = {"split": side, "origin": origin_of(record)}
        if stage:
            notes["stage"] = stage
        if task == "s2s":
            text, path = self._replies[_row_id(record)]
            notes |= {"reply": text, "reply_audio": str(path)}
        direction = "s2tt_en_zh" if task == "s2tt" and record.language == "en" else task
        name = f"{record.id}-{task}"
        return record.with_(id=f"{name}-{stage}" if stage else name, task=direction).noted(**notes)

    def _room(self, task: TaskName, origin: Origin) -> str | None:
        """The first stage with room for such a row, which it takes; None where all are full."""
        assert self._counts is not None
        for (stage, name, kind), count in self._counts.items():
            if (name, kind) == (task, origin) and not count.full:
                count.made += 1
                return stage
        return None

    def _planned(self) -> dict[tuple[str, TaskName, Origin], _Count]:
        counts: dict[tuple[str, TaskName, Origin], _Count] = {}
        share = self._config.recorded_share
        sizes: Mapping[str, Mapping[TaskName, int | None]] = self._config.sizes() or {
            "": dict.fromkeys(self._config.tasks)
        }
        for stage, wanted in sizes.items():
            for task, rows in wanted.items():
                if share is None:
                    counts[stage, task, "recorded"] = counts[stage, task, "synthetic"] = _Count(rows)
                    continue
                if rows is None:  # as many as the shorter kind allows
                    recorded, synthetic = self._available[task, "recorded"], self._available[task, "synthetic"]
                    rows = int(min(recorded / share, synthetic / (1 - share)))
                counts[stage, task, "recorded"] = _Count(round(rows * share))
                counts[stage, task, "synthetic"] = _Count(rows - round(rows * share))
        return counts

    def _tasks_of(self, record: Record) -> list[TaskName]:
        """The tasks that a sample can serve."""
        if record.sound is None:
            return []
        named = record.meta.get("task", "")
        return [t for t in self._config.tasks if (not named or t == named) and not self._lacks(record, t)]

    def _lacks(self, record: Record, task: TaskName) -> list[str]:
        lacks = [key for key in NEEDS[task] if not str(record.meta.get(key) or "").strip()]
        return lacks + (["spoken reply"] if task == "s2s" and _row_id(record) not in self._replies else [])

    def _missing(self, record: Record) -> str:
        if record.sound is None:
            return "sound"
        named = record.meta.get("task", "")
        if named and named not in self._config.tasks:
            return f"task {named} in assemble.tasks"
        tasks = [task for task in self._config.tasks if not named or task == named]
        return "; ".join(f"{', '.join(self._lacks(record, task))} for {task}" for task in tasks)

    def _side(self, record: Record) -> Side:
        stated = record.meta.get("split")
        if stated is not None:
            assert stated in ("train", "test"), f"split {stated!r} of {record.id}"
            return "test" if stated == "test" else "train"
        speaker = speaker_of(record)
        # Nobody can prove that an unknown speaker is not in the training data.
        return "test" if speaker and _hash(speaker.encode()) < self._config.test_share * 2**64 else "train"

    def _excluded(self, record: Record) -> str:
        """What a training sample shares with the test side."""
        if self._side(record) == "test":
            return ""
        if _text_hash(record.text) in self._tested_texts:
            return "text"
        speaker = speaker_of(record)
        return "speaker" if speaker and speaker in self._tested_speakers else ""

    def _note(self, record: Record, side: Side) -> None:
        split, speaker = self._sides[side], speaker_of(record)
        split.rows += 1
        split.texts.append(_text_hash(record.text))
        if speaker:
            split.speakers.add(speaker)
        else:
            split.unknown_speaker += 1

    def report(self) -> dict[str, Any]:
        """For report.json: `rows` by stage and task with what was wanted, and `split`, the proof that no text and no
        known speaker is on both sides, counted on the rows that were made (digests are over sorted hashes). A text is
        what a sample says; written replies, translations and labels are not compared."""
        rows = [
            {"stage": stage, "task": task, "origin": kind, "wanted": count.wanted, "made": count.made}
            for (stage, task, kind), count in (self._counts or {}).items()
            if self._config.recorded_share is not None or kind == "synthetic"
        ]
        for row in rows:
            if self._config.recorded_share is None:
                row["origin"] = "any"
        texts = {side: np.unique(np.frombuffer(split.texts, np.uint64)) for side, split in self._sides.items()}
        train, test = self._sides["train"], self._sides["test"]
        return {
            "rows": rows,
            "split": {
                "rows": {side: split.rows for side, split in self._sides.items()},
                "texts": {side: len(found) for side, found in texts.items()},
                "speakers": {side: len(split.speakers) for side, split in self._sides.items()},
                "unknown_speaker_rows": {side: split.unknown_speaker for side, split in self._sides.items()},
                "shared_texts": len(np.intersect1d(texts["train"], texts["test"], assume_unique=True)),
                "shared_speakers": len(train.speakers & test.speakers),
                "texts_sha256": {side: hashlib.sha256(found.tobytes()).hexdigest() for side, found in texts.items()},
                "speakers_sha256": {side: _digest(split.speakers) for side, split in self._sides.items()},
            },
        }


def origin_of(record: Record) -> Origin:
    """Whether a person was recorded or an engine spoke."""
    return "synthetic" if "voice_group" in record.meta else "recorded"


def speaker_of(record: Record) -> str:
    """Who speaks: the group of voices that sound alike, or the speaker that the source names; "" where nobody knows."""
    meta = record.meta
    return f"voice:{meta['voice_group']}" if "voice_group" in meta else str(meta.get("speaker") or "")


def row_line(record: Record, root: Path) -> str:
    """The canonical line of rows.jsonl for a record that assembling made; media below `root` are named relative to it.

    Sound and spoken reply must be files. Raises BadRecord where they are not.
    """
    return write_record(_sample(record), root)


def _sample(record: Record) -> Sample:
    sound, meta = record.sound, record.meta
    keep = {key: value for key, value in meta.items() if key not in ("row", "attempt", "reply_audio")}
    keep["language"] = record.language
    match record.task:
        case "asr":
            turns = task_turns("asr", sound=sound, text=record.text)
        case "s2tt" | "s2tt_en_zh":
            turns = task_turns(record.task, sound=sound, text=meta["translation"])
        case "chat":
            turns = task_turns("chat", sound=sound, text=meta["reply"])
        case "caption":
            turns = task_turns("caption", sound=sound, text=meta["caption"])
        case "ser":
            turns = task_turns("ser", sound=sound, text=meta["emotion"])
        case "tts":
            turns = task_turns("tts", text=record.text, speech=sound)
        case "s2s":
            turns = task_turns("s2s", sound=sound, text=meta["reply"], speech=Audio(path=Path(meta["reply_audio"])))
        case _:
            raise AssertionError(f"record {record.id} has task {record.task!r}: assembling comes first")
    if record.task not in ("asr", "tts"):
        keep["text"] = record.text
    return Sample(record.id, record.task, turns, keep)


def _row_id(record: Record) -> str:
    return str(record.meta.get("row", record.id))


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _text_hash(text: str) -> int:
    return _hash(comparable(text))


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def build(config: AssembleConfig) -> Assemble:
    """The step."""
    return Assemble(config)
