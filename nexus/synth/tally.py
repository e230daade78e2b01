"""What a run came to, counted in one pass over its journal: report.json, and what the report page shows.

Everything here is counters and a few examples: its size does not grow with the number of samples.
"""

from collections import Counter, defaultdict
from typing import Any

from nexus.synth.journal import Line, sound_name

EXAMPLES = 3  # shown of every reason to drop a sample
LISTEN = 12  # kept samples to listen to: the first, and as many whose words were heard worst
SECONDS_STEP, RATE_STEP = 0.5, 0.05  # widths of the bars of histograms
LONGEST_SECONDS = 30.0  # the last bar holds what is longer


class Tally:
    """Counts final decisions, line by line and row by row."""

    def __init__(self) -> None:
        self.kept, self.rows = 0, 0
        self.states = Counter[str]()  # of kept samples: verified, unchecked (not drawn), unverified (no recogniser)
        self.dropped = Counter[str]()
        self.failed = Counter[str]()
        self.attempts, self.passed = 0, 0
        self.seconds, self.wall_seconds = 0.0, 0.0
        self.step_seconds = Counter[str]()
        self.by: dict[str, dict[str, list[float]]] = {  # kind -> name -> [samples, seconds]
            name: defaultdict(lambda: [0, 0.0]) for name in ("language", "voice", "task", "source")
        }
        self.durations, self.error_rates = Counter[int](), Counter[int]()
        self.examples: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.first: list[dict[str, Any]] = []
        self.worst: list[tuple[float, dict[str, Any]]] = []

    def add_line(self, line: Line) -> None:
        """Times, and every attempt at the gate."""
        batch = line.get("batch")
        if batch is not None:
            self.wall_seconds += batch["seconds"]
            self.step_seconds.update(batch["step_seconds"])
        for entry in line["outcomes"]:
            if entry.get("failed"):
                self.failed[entry["reason"]] += 1
            scores = entry["meta"].get("verify", {})
            at_gate = entry.get("step") == "verify" and not entry.get("failed")
            passed = not entry.get("reason") and scores.get("state") == "verified"
            self.attempts += at_gate or passed
            self.passed += passed
            rate = error_rate(entry)
            if rate is not None:
                self.error_rates[min(round(1 / RATE_STEP), int(rate / RATE_STEP))] += 1

    def drop(self, entry: Line) -> None:
        """A sample that is not in the result."""
        self.dropped[entry["reason"]] += 1
        examples = self.examples[entry["reason"]]
        if len(examples) < EXAMPLES:
            examples.append(_shown(entry))

    def keep(self, entry: Line, tasks: list[str]) -> None:
        """A sample that is in the result, as so many rows."""
        self.kept += 1
        self.rows += len(tasks)
        if state := entry["meta"].get("verify", {}).get("state"):
            self.states[state] += 1
        seconds = entry.get("seconds", 0.0)
        self.seconds += seconds
        self.durations[int(min(seconds, LONGEST_SECONDS) / SECONDS_STEP)] += 1
        for kind, name in (
            ("language", entry["language"]),
            ("voice", voice_of(entry)),
            ("source", entry["meta"].get("source", "")),
            *(("task", task) for task in tasks),
        ):
            if name:
                count = self.by[kind][name]
                count[0] += 1
                count[1] += seconds
        shown = _shown(entry)
        if len(self.first) < LISTEN:
            self.first.append(shown)
        rate = error_rate(entry)
        if rate:
            self.worst = sorted([*self.worst, (rate, shown)], key=lambda pair: -pair[0])[:LISTEN]

    def report(self) -> dict[str, Any]:
        """report.json but for the gate's test; times in seconds, `hours` of kept sound."""
        engine_seconds = sum(self.step_seconds.values())
        read = self.kept + self.dropped.total()
        return {
            "schema": 1,
            "read": read,
            "kept": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "failed": dict(self.failed.most_common()),
            "unverified": self.states["unverified"],
            "unchecked": self.states["unchecked"],
            "rows": self.rows,
            "voices": len(self.by["voice"]),
            "hours": self.seconds / 3600,
            "seconds": self.wall_seconds,
            "samples_per_second": read / self.wall_seconds if self.wall_seconds else None,
            "engine_seconds": engine_seconds,
            "step_seconds": dict(self.step_seconds),
            "by": {
                kind: {name: {"samples": n, "hours": s / 3600} for name, (n, s) in sorted(names.items())}
                for kind, names in self.by.items()
            },
            "gate": {"attempts": self.attempts, "passed": self.passed},
            "histograms": {
                "seconds": _bars(self.durations, SECONDS_STEP),
                "error_rate": _bars(self.error_rates, RATE_STEP),
            },
        }

    def exhibits(self) -> dict[str, Any]:
        """What there is to look at and listen to."""
        return {"dropped": dict(self.examples), "kept": self.first, "worst": [shown for _, shown in self.worst]}


def error_rate(entry: Line) -> float | None:
    """What the gate measured of an attempt, word errors or of Chinese character errors; None where nobody heard it."""
    scores = entry["meta"].get("verify", {})
    rate: float | None = scores.get("cer" if entry["language"] == "zh" else "wer")
    return rate


def voice_of(entry: Line) -> str:
    """The name of the voice that speaks; empty for a recording of nobody known."""
    return str(entry["meta"].get("voice", entry["meta"].get("speaker", "")))


def _shown(entry: Line) -> dict[str, Any]:
    shown: dict[str, Any] = {key: entry[key] for key in ("id", "text", "language", "meta")}
    shown |= {"numbers": dict(entry.get("numbers", {})), "place": entry.get("audio")}
    return shown | ({"audio": sound_name(entry["audio"])} if "audio" in entry else {})


def _bars(counts: Counter[int], step: float) -> list[list[float]]:
    """[lower edge, number] from the first bar to the last that holds something."""
    last = max(counts, default=-1)
    return [[round(index * step, 6), counts[index]] for index in range(last + 1)]
