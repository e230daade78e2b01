"""What passes between the steps of the factory: records, rejections, and the contract of a step.

A record is one try at one row of a source: `meta["row"]` is the row's id, `meta["attempt"]` counts its tries from 0,
and `id` is a hash of both. The pipeline, never a step, tries again: where a step with `retries` > 0 rejects a record,
the row goes back to the speaking step as a new record with the next attempt, until it passes or the tries are used up.
Whoever draws (voices, noise, seeds) draws from `row` and `attempt`, so that every try is another one and a run made
again draws the same.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from nexus.types import Audio


@dataclass(frozen=True)
class Record:
    """One sample on its way through the factory."""

    id: str  # content hash of (source row, attempt)
    text: str
    language: str = ""  # "en", "zh"
    task: str = ""  # of table 1, set by assembling
    sound: Audio | None = None  # samples or path
    meta: Mapping[str, Any] = field(default_factory=dict)  # JSON-like: source, licence, voice, seeds, scores, steps

    def with_(self, **changes: Any) -> "Record":
        """The record with other fields."""
        return replace(self, **changes)

    def noted(self, **meta: Any) -> "Record":
        """The record with more in its meta."""
        return replace(self, meta={**self.meta, **meta})


@dataclass(frozen=True)
class Rejected:
    """A record that goes no further, and why."""

    record: Record
    reason: str  # short stable key, e.g. "too_long"; counted in report.dropped
    numbers: Mapping[str, float | str] = field(default_factory=dict)


class Step(Protocol):
    """One station of the factory. Picklable before `setup`, which runs once in every worker.

    A step may also have `retries: int`: how often a row it rejects is spoken again (0 where it has none).
    """

    name: str

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over every setting that changes results."""
        ...

    def setup(self) -> None:
        """Load models. Runs once per worker."""
        ...

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        """One result per record in the same order; a step that splits its records says so, returns more, and leaves
        `meta["row"]` as it was."""
        ...


def content_id(*parts: Any) -> str:
    """Twenty hex digits over JSON-like parts, independent of key order: the same content, the same id."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def first_attempt(text: str, language: str, meta: Mapping[str, Any], sound: Audio | None = None) -> Record:
    """The first try at a source row; `meta` holds what identifies it: source, line, licence, further columns."""
    row = content_id(text, language, meta)
    return Record(content_id(row, 0), text, language, sound=sound, meta={**meta, "row": row, "attempt": 0})


def next_attempt(record: Record) -> Record:
    """`record`, as it stood before it was spoken, as the next try at its row."""
    attempt = record.meta["attempt"] + 1
    return record.with_(id=content_id(record.id, attempt)).noted(attempt=attempt)
