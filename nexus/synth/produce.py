"""From rows to journalled outcomes: one pass over the sources, resumable at any row.

The order of work is the order of the source. Text rules run here, in one process, because they remember what they have
seen; what costs time runs in workers; the outcomes are journalled in the order in which the rows were read. A run that
goes on reads the source again from its beginning, passes over the rows that the journal holds, and compares them with
it on the way.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from nexus.errors import BadConfig, NexusError
from nexus.progress import Stage
from nexus.synth.executors import Crew, LocalCrew, RayCrew, in_order
from nexus.synth.journal import Journal, Line, lines_of
from nexus.synth.pipeline import Outcome, Pipeline, judge
from nexus.synth.records import Record, Rejected, Step

RULED = 256  # rows that the rules take at a time
HELD = 16  # rows read ahead where there are no rules: they may be sounds
MOST_PER_RECORD = 64  # rows of a batch for every record of it that goes to a worker: the others are rejected already


@dataclass(frozen=True)
class Workers:
    """Who does the work. Changes how fast the result is there, not the result."""

    executor: Literal["local", "ray"] = "local"
    number: int = 1
    address: str | None = None  # of a Ray cluster; None: one that is started here

    def crew(self, pipeline: Pipeline) -> Crew:
        """Workers of this kind, none hired yet. Raises BadConfig where there can be none."""
        if self.number < 1:
            raise BadConfig(f"workers: expected at least 1, given {self.number}")
        match self.executor:
            case "local":
                if self.address is not None:
                    raise BadConfig(f"--address {self.address} is of a Ray cluster; say --executor ray as well")
                return LocalCrew(pipeline, self.number)
            case "ray":
                return RayCrew(pipeline, self.number, self.address)


@dataclass(frozen=True)
class Patience:
    """How many failures a run puts up with: more than `share` of its rows failing in one way, once there are
    `at_least` of them, end it. What a step rejects by judging is no failure."""

    share: float = 0.2
    at_least: int = 20


# A row with what has been decided of it here: nothing yet (Record), or all (Outcome)
Item = tuple[dict[str, Any], Record | Outcome]


def produce(
    rows: Iterator[Record | Rejected],
    front: Sequence[Step],
    pipeline: Pipeline,
    journal: Journal,
    workers: Workers,
    *,
    batch: int,
    patience: Patience,
    stage: Stage,
) -> None:
    """Work on every row that the journal does not hold, and keep its outcomes there.

    `front` steps see all rows here, one by one; `batch` records at a time go through the pipeline. Raises BadConfig
    where the rows are not those of the journal, NexusError where patience ends, OSError where the disk is full; what
    was finished is kept.
    """
    for step in front:
        step.setup()
    items = _fresh(_ruled(rows, front), journal)
    first = next(items, None)
    if first is None:
        return
    waiting: deque[list[Item]] = deque()

    def batches() -> Iterator[list[Record]]:
        for some in _batched(first, items, batch):
            waiting.append(some)
            yield [what for _, what in some if isinstance(what, Record)]

    failures, done, since = Counter[str](), 0, time.perf_counter()
    crew = workers.crew(pipeline)
    try:
        for worked in in_order(crew, batches()):
            outcomes = iter(worked.rows)
            some = [(head, [what] if isinstance(what, Outcome) else next(outcomes)) for head, what in waiting.popleft()]
            now = time.perf_counter()
            journal.append(some, {"seconds": now - since, "step_seconds": worked.step_seconds})
            since, done = now, done + len(some)
            last = _failed(some, failures)
            stage.advance(len(some), kept=_kept(some) + stage.values.get("kept", 0))
            _check(failures, done, patience, last)
    finally:
        crew.close()


def _ruled(rows: Iterator[Record | Rejected], front: Sequence[Step]) -> Iterator[Item]:
    """Every row with what the reader and the front steps make of it, in order."""
    while some := list(islice(rows, RULED if front else HELD)):
        heads = [_head(row.record if isinstance(row, Rejected) else row) for row in some]
        decided: list[Record | Outcome] = [
            Outcome(row.record, "read", row.reason, row.numbers) if isinstance(row, Rejected) else row for row in some
        ]
        for step in front:
            places = [place for place, row in enumerate(decided) if isinstance(row, Record)]
            records = [row for row in decided if isinstance(row, Record)]
            results = judge(step, records)
            assert len(results) == len(records), f"step {step.name}: {len(records)} went in, {len(results)} came out"
            for place, result in zip(places, results, strict=True):
                decided[place] = result
        yield from zip(heads, decided, strict=True)


def _head(record: Record) -> dict[str, Any]:
    return {"row": record.meta["row"]}


def _fresh(items: Iterator[Item], journal: Journal) -> Iterator[Item]:
    """The items behind those of the journal. Raises BadConfig where they differ from it, before the first is given."""
    for number, line in enumerate(lines_of(journal.folder), 1):
        head, _ = next(items, ({"row": None}, None))
        if head["row"] != line["row"]:
            there = "is another one now" if head["row"] else "is not there any more"
            raise BadConfig(
                f"{journal.folder}: row {number} of the sources was done, and {there}; give another --out, or the "
                "sources as they were"
            )
    return items


def _batched(first: Item, items: Iterator[Item], records: int) -> Iterator[list[Item]]:
    """Items in order with `records` undecided ones each, and not many more decided ones."""
    some: list[Item] = []
    undecided = 0

    def all_items() -> Iterator[Item]:
        yield first
        yield from items

    for item in all_items():
        some.append(item)
        undecided += isinstance(item[1], Record)
        if undecided == records or len(some) == MOST_PER_RECORD * records:
            yield some
            some, undecided = [], 0
    if some:
        yield some


def _kept(some: Sequence[tuple[Line, Sequence[Outcome]]]) -> int:
    return sum(not outcome.reason for _, outcomes in some for outcome in outcomes)


def _failed(some: Sequence[tuple[Line, Sequence[Outcome]]], failures: Counter[str]) -> str:
    """Count failures by kind; returns what the last of them said."""
    said = ""
    for _, outcomes in some:
        for outcome in outcomes:
            if outcome.failed:
                failures[outcome.reason] += 1
                said = str(outcome.numbers.get("error", outcome.reason))
    return said


def _check(failures: Counter[str], rows: int, patience: Patience, said: str) -> None:
    for reason, number in failures.most_common(1):
        if number >= patience.at_least and number > patience.share * rows:
            raise NexusError(
                f"stopped: {number} of {rows} rows failed with {reason}, the limit is {patience.share:.0%} "
                f"(failures.share); last: {said[:300]}; what was finished is kept: mend it and run this again"
            )
