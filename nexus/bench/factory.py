"""The data factory: what the pipeline costs beside its engines, how fast texts are ruled on, and what stays in memory.

Engines are raced on the same texts in the same voices: once straight, espeak-ng into PocketSphinx, once as a run of
the factory with its rules, gate, journal and files; start-up of the processes counts on both sides. Memory is measured
in processes of its own, so that nothing that ran before is in it.
"""

import functools
import io
import math
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from nexus.bench.race import Say, Settings, race, side
from nexus.engines.speak import Espeak, Voice
from nexus.engines.transcribe import AdaptedPocketSphinx
from nexus.processes import in_processes
from nexus.progress import MemoryWatch, Progress
from nexus.recipe import validate
from nexus.synth import rules, speak
from nexus.synth.produce import Workers
from nexus.synth.recipe import SynthRecipe
from nexus.synth.records import Record, first_attempt
from nexus.synth.rules import RulesConfig
from nexus.synth.run import synthesise
from nexus.synth.stations import EARS
from nexus.synth.steps import trimmed
from nexus.types import Audio

SUBJECTS = "the teacher|a small dog|my brother|the old captain|every child|the tall woman|a farmer|our neighbour".split(
    "|"
)
VERBS = "paints|carries|finds|opens|watches|brings|sells|remembers|follows|counts".split("|")
OBJECTS = "a red boat|three green apples|the long letter|an empty box|the yellow house|two silver coins".split("|")
PLACES = "near the river|in the garden|behind the school|on the bridge|before dinner|after the rain".split("|")
STRIDE = 7_368_787  # coprime to the number of sentences: neighbours share little
RULED = 256  # texts to the rules at a time, as in a run
TENTHS = 10
GIB = 2**30


@dataclass(frozen=True)
class Load:
    """Sizes, and what is to be reached."""

    spoken: int = 300  # texts of the race against the bare engines
    processes: int = 2
    repeats: int = 2
    max_overhead: float = 0.05
    ruled: int = 5_000_000  # texts in memory for duplicates
    min_rules_per_second: float = 50_000.0
    max_growth: float = 1.25  # of the time per text, from the first tenth of the corpus to the last
    max_gib: float = 4.0
    streamed: int = 100_000  # samples whose run must not grow
    max_flat_gib: float = 0.1  # more at all of them than at a tenth


FULL = Load()
TINY = Load(4, 1, 1, 1e3, 4000, 0.0, 1e3, 1e3, 20, 1e3)


def bench(load: Load, say: Say) -> dict[str, Any]:
    """All cases as JSON."""
    cases = [_overhead(load, say), *_texts(load, say), _flat(load, say)]
    return {"cases": cases, "passed": all(case["passed"] for case in cases)}


def _verdict(case: str, value: float, bar: float, low_is_good: bool, unit: str, say: Say) -> Settings:
    passed = value <= bar if low_is_good else value >= bar
    sign, word = "at most" if low_is_good else "at least", "passed" if passed else "FAILED"
    say(f"{case}: {value:,.3f} {unit}, {sign} {bar:,g}: {word}")
    return {"case": case, "value": value, "unit": unit, "bar": bar, "passed": passed}


# The pipeline beside its engines


def _overhead(load: Load, say: Say) -> Settings:
    say(f"factory: {load.spoken} texts, spoken and heard, by {load.processes} processes")
    with tempfile.TemporaryDirectory(prefix="nexus-bench-") as folder:
        root = Path(folder)
        (root / "texts.txt").write_text("".join(text + "\n" for text in _sentences(load.spoken)))
        recipe = _recipe(root / "texts.txt", verified=True)
        number = count()

        def pipeline() -> None:
            with Progress(io.StringIO()) as progress:
                workers = Workers("local", load.processes)
                synthesise(recipe, root / f"run{next(number)}", workers=workers, progress=progress)

        pipeline()
        jobs = _jobs(recipe, root / "run0")
        heard_by = root / "run0" / EARS
        work = functools.partial(_spoken_and_heard, str(heard_by))

        def bare() -> None:
            assert sum(1 for _ in in_processes(work, jobs, load.processes, recipe.batch)) == load.spoken

        taken = race({"bare": bare, "pipeline": pipeline}, load.repeats)
    ours, peer = side({}, taken["pipeline"]), side({}, taken["bare"])
    overhead = ours["median_seconds"] / peer["median_seconds"] - 1
    told = _verdict("pipeline over bare engines", overhead, load.max_overhead, True, "of their time", say)
    return {**told, "ours": ours, "peer": peer, "processes": load.processes, "texts": load.spoken}


def _recipe(texts: Path, verified: bool) -> SynthRecipe:
    """Texts through espeak-ng and, `verified`, PocketSphinx with a gate that nothing fails: a second try would be work
    that the other side does not do."""
    open_gate = {"max_wer": 1e9, "length_ratio": [1e-9, 1e9], "seconds_per_letter": {}, "retries": 0}
    verify = {**open_gate, "audition": {"texts": 0, "passed": 0}} if verified else None
    tree = {
        "name": "bench",
        "sources": [{"path": str(texts), "language": "en"}],
        "rules": {"near_duplicates": None} if verified else None,
        "speak": {"pools": {"en": {"type": "espeak", "voices": 40}}},
        "verify": verify,
        "output": {"form": "tar"},
    }
    return validate(SynthRecipe, tree, "bench")


def _jobs(recipe: SynthRecipe, run: Path) -> list[tuple[str, Settings]]:
    """(what is said, the setting of its voice) of every text, as the run in that folder drew them."""
    assert recipe.speak is not None and (run / "rows.jsonl").is_file()
    step = speak.build(recipe.speak)
    jobs = []
    for record in _records(recipe):
        speaker = step.voices.draw(record.language, record.meta["row"], 0)
        assert speaker is not None
        jobs.append((step.said(record.text, record.language), dict(speaker.setting)))
    return jobs


def _records(recipe: SynthRecipe) -> Iterator[Record]:
    from nexus.synth.read import read

    for record in read(recipe.text_sources(), recipe.seed, None):
        assert isinstance(record, Record)
        yield record


@functools.lru_cache(maxsize=1)
def _engines(folder: str) -> tuple[Espeak, AdaptedPocketSphinx]:
    return Espeak(), AdaptedPocketSphinx(Path(folder))


def _spoken_and_heard(folder: str, job: tuple[str, Settings]) -> str:
    espeak, ear = _engines(folder)
    said, setting = job
    sound = espeak.speak(said, Voice(**setting))
    assert sound.samples is not None
    return ear.hear(Audio(samples=trimmed(sound.samples, sound.rate_hz), rate_hz=sound.rate_hz)).text


# Rules and duplicates


def _texts(load: Load, say: Say) -> list[Settings]:
    say(f"factory: rules and duplicates over {load.ruled:,} texts")
    (found,) = in_processes(_ruled, [load.ruled], 1, 1)
    (alone,) = in_processes(_ruled_alone, [min(load.ruled, 500_000)], 1, 1)
    seconds, gib = found["seconds_of_tenths"], found["gib"]
    growth = float(np.median(seconds[-3:]) / np.median(seconds[:3]))
    rate = load.ruled / sum(seconds)
    cases = [
        _verdict("rules", alone, load.min_rules_per_second, False, "texts per second on one core", say),
        _verdict("rules with duplicates, last tenths over first", growth, load.max_growth, True, "times", say),
        _verdict(f"memory with {load.ruled:,} texts", gib, load.max_gib, True, "GiB", say),
    ]
    say(f"rules with duplicates: {rate:,.0f} texts per second")
    return [*cases[:1], {**cases[1], **found, "texts_per_second": rate}, cases[2]]


def _ruled(number: int) -> Settings:
    """CPU seconds of every tenth of so many texts through rules and duplicates, how many were kept, and the memory."""
    step = rules.build(RulesConfig())
    step.setup()
    seconds, kept, phrases = [0.0] * TENTHS, 0, _phrases(number)
    for start in range(0, number, RULED):
        records = [_record(text) for text in islice(phrases, RULED)]
        began = time.process_time()
        results = step(records)
        seconds[start * TENTHS // number] += time.process_time() - began
        kept += sum(isinstance(result, Record) for result in results)
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    return {"seconds_of_tenths": seconds, "kept": kept, "gib": gib}


def _ruled_alone(number: int) -> float:
    """Texts per CPU second through the rules as pure functions."""
    texts, config = list(_phrases(number)), RulesConfig()
    began = time.process_time()
    for text in texts:
        rules.verdict(rules.tidy(text), "en", config)
    return number / (time.process_time() - began)


def _record(text: str) -> Record:
    return first_attempt(text, "en", {"source": "bench"})


def _sentences(number: int) -> Iterator[str]:
    """Distinct sentences, the same ones each time, of words in the recogniser's dictionary."""
    parts: Sequence[Sequence[str]] = (SUBJECTS, VERBS, OBJECTS, PLACES, SUBJECTS, VERBS, OBJECTS, PLACES)
    total = math.prod(map(len, parts))
    assert number <= total
    for index in range(number):
        place, words = index * STRIDE % total, []
        for part in parts:
            place, chosen = divmod(place, len(part))
            words.append(part[chosen])
        yield f"{' '.join(words[:4])} and {' '.join(words[4:])}.".capitalize()


def _phrases(number: int) -> Iterator[str]:
    """Short texts of ten words out of 20,000, as unlike each other as the texts of a corpus; nothing is kept."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "el", "is", "or")]
    words = np.array(["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(20_000)])
    for start in range(0, number, 4096):
        for row in words[rng.integers(0, len(words), (min(4096, number - start), 10))].tolist():
            yield f"{' '.join(row).capitalize()}."


# Flatness


def _flat(load: Load, say: Say) -> Settings:
    say(f"factory: memory of a run of {load.streamed:,} samples beside one of a tenth")
    few, many = (next(in_processes(_streamed, [number], 1, 1)) for number in (load.streamed // 10, load.streamed))
    told = _verdict("memory of all samples over a tenth", many - few, load.max_flat_gib, True, "GiB", say)
    return {**told, "samples": load.streamed, "peak_gib": many, "peak_gib_of_tenth": few}


def _streamed(number: int) -> float:
    """Peak memory in GiB, over all processes, of a run that speaks so many texts into shards."""
    with tempfile.TemporaryDirectory(prefix="nexus-bench-") as folder:
        texts = Path(folder) / "texts.txt"
        with texts.open("w") as file:
            file.writelines(text + "\n" for text in _sentences(number))
        with MemoryWatch(0.5) as watch, Progress(io.StringIO()) as progress:
            synthesise(_recipe(texts, verified=False), Path(folder) / "run", progress=progress)
        return watch.peak_gib
