"""`nexus synth`: a recipe and its sources in, a folder of speech data out.

The folder holds rows.jsonl (what passed, as training rows), rejects.jsonl (what did not, and why), audio/, report.json
and run.json. All but the sounds is made from the journal in a last pass; moving the gate is that pass again, with other
decisions on the same scores. Where a recipe has texts and recordings, these have a folder of the same kind inside,
`recordings/`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from nexus.errors import BadConfig
from nexus.progress import Progress
from nexus.recipe import code_digest, validate
from nexus.results import whole, write_json
from nexus.synth import assemble, recordings
from nexus.synth.assemble import Assemble, row_line
from nexus.synth.folder import held
from nexus.synth.journal import Journal, Line, lines_of, sound_name
from nexus.synth.pipeline import Outcome, Pipeline, judge
from nexus.synth.produce import Patience, Workers, produce
from nexus.synth.read import read
from nexus.synth.recipe import SynthRecipe
from nexus.synth.records import Record, Rejected, Step
from nexus.synth.regate import moved, regated
from nexus.synth.stations import Stations, stations
from nexus.synth.tally import Tally
from nexus.synth.verify import VerifyConfig, mismatched
from nexus.types import Audio

RECORDINGS = "recordings"
ALONE = Workers()
PAIRED = 5000  # heard clips, at most, that are paired with the texts of others to test the gate
ASSEMBLED = 256  # samples that become rows at a time


@dataclass(frozen=True)
class Result:
    """What a run came to: what report.json holds, and what there is to look at and listen to in `folder`."""

    folder: Path
    report: dict[str, Any]
    exhibits: dict[str, Any]
    recordings: "Result | None" = None


def synthesise(
    recipe: SynthRecipe,
    out: Path,
    limit: int | None = None,
    *,
    workers: Workers = ALONE,
    progress: Progress | None = None,
) -> Result:
    """Run the recipe into `out`, or go on with what was begun there; `limit` takes the first rows of the texts, and the
    first utterances of the recordings.

    Raises a NexusError for every mistake in what is named and where too much fails, BadConfig for an `out` that holds
    another run, Busy for one in use, OSError where the disk is full.
    """
    total = _count(recipe, limit)  # and before anything is left behind: are the sources there?
    with held(out) as folder, Progress() if progress is None else progress as shown:
        identity = {"recipe": recipe.identity(), "code": code_digest()}
        folder.check(identity)
        made = stations(recipe, out, limit, workers.number, shown)
        steps = {step.name: step.fingerprint for step in (*made.front, *made.texts, *made.recordings)}
        folder.begin({**identity, "steps": steps}, {"recipe": recipe.model_dump(mode="json"), "limit": limit})
        work = _Work(recipe, workers, shown)
        spoken = heard = None
        if recipe.sources:
            rows = read(recipe.text_sources(), recipe.seed, limit)
            work("speech", out, rows, made.front, made.texts, total)
            spoken = out
        if (source := recipe.recordings_source()) is not None:
            heard = out / RECORDINGS if recipe.sources else out
            work("recordings", heard, islice(recordings.read(source), limit), (), made.recordings, limit)
        result = _concluded(recipe, made, spoken, heard, lambda line: line)
        folder.end()
        return result


def regate(folder: Path, overrides: Sequence[str]) -> Result:
    """Move the gate of a finished run: `verify.max_wer=0.1` and the like. Rewrites rows.jsonl, rejects.jsonl and
    report.json from the scores that are stored; nothing is spoken or heard.

    Raises BadConfig for a folder without a finished run with a gate, and for settings that need another run.
    """
    if not (folder / "run.json").is_file():
        raise BadConfig(f"{folder}: holds no run of synth; name its --out folder")
    with held(folder) as opened:
        run = opened.run()
        if run.get("finished") is None:
            raise BadConfig(f"{folder}: its run is not finished; run the same command again first")
        recipe = validate(SynthRecipe, run["named"]["recipe"], str(folder / "run.json"))
        if recipe.verify is None:
            raise BadConfig(f"{folder}: its recipe has no `verify`, so there is no gate to move")
        gate = moved(recipe.verify, overrides)
        recipe = recipe.model_copy(update={"verify": gate})
        both = recipe.recordings is not None and bool(recipe.sources)
        card = json.loads((folder / "report.json").read_text(encoding="utf-8"))["card"]
        said = {key: value for key, value in card.items() if key not in ("recipe", "code")}
        made = Stations((), (), (), {**said, "regated": list(overrides)})
        heard = folder / RECORDINGS if both else folder if recipe.recordings is not None else None
        return _concluded(recipe, made, folder if recipe.sources else None, heard, lambda line: regated(line, gate))


def _count(recipe: SynthRecipe, limit: int | None) -> int:
    """Rows of texts to come, for the time left: reading is thousands of times as fast as speaking."""
    return sum(1 for _ in read(recipe.text_sources(), recipe.seed, limit)) if recipe.sources else 0


@dataclass(frozen=True)
class _Work:
    """How rows become journal lines in this run."""

    recipe: SynthRecipe
    workers: Workers
    shown: Progress

    def __call__(
        self,
        name: str,
        folder: Path,
        rows: Iterator[Record | Rejected],
        front: Sequence[Step],
        steps: Sequence[Step],
        total: int | None,
    ) -> None:
        folder.mkdir(exist_ok=True)
        journal = Journal(folder, self.recipe.output.form, self.recipe.output.shard_samples)
        if journal.lost:
            self.shown.say(f"{name}: {journal.lost} rows are done again: their sound did not reach the disk")
        limits = self.recipe.failures
        try:
            with self.shown.stage(name, total, "rows", journal.num_rows) as stage:
                produce(
                    rows,
                    front,
                    Pipeline(steps),
                    journal,
                    self.workers,
                    batch=self.recipe.batch,
                    patience=Patience(limits.share, limits.at_least),
                    stage=stage,
                )
        except BaseException:
            journal.abandon()
            raise
        journal.close()


# From the journal to the result


def _concluded(
    recipe: SynthRecipe, made: Stations, spoken: Path | None, heard: Path | None, decided: Callable[[Line], Line]
) -> Result:
    """Rows, rejects and reports of both branches, whose samples are assembled together."""
    folders = [folder for folder in (spoken, heard) if folder is not None]
    assembler = None if recipe.assemble is None else assemble.build(recipe.assemble)
    if assembler is not None:
        assembler.survey(lambda: _kept_records(folders, decided))
    results: list[Result] = []
    for folder in folders:
        is_heard = folder == heard
        results.append(_conclude(folder, recipe, made, assembler, decided, is_heard))
    main = results[0]
    if assembler is not None:
        main.report["assembled"] = assembler.report()
    if len(results) == 2:
        main.report["recordings"] = {key: value for key, value in results[1].report.items() if key != "card"}
        main = replace(main, recordings=results[1])
    for result in results:
        write_json(result.folder / "report.json", result.report)
    return main


def _kept_records(folders: Sequence[Path], decided: Callable[[Line], Line]) -> Iterator[Record]:
    for folder in folders:
        for line in lines_of(folder):
            for entry in decided(line)["outcomes"]:
                if entry["decision"] == "kept":
                    yield _record(folder, line["row"], entry)


def _record(folder: Path, row: str, entry: Mapping[str, Any]) -> Record:
    """A kept sample as it stands on the disk."""
    sound = Audio(path=folder / sound_name(entry["audio"])) if "audio" in entry else None
    meta = {**entry["meta"], "row": row, "attempt": entry["attempt"]}
    return Record(entry["id"], entry["text"], entry["language"], entry["task"], sound, meta)


def _conclude(
    folder: Path,
    recipe: SynthRecipe,
    made: Stations,
    assembler: Assemble | None,
    decided: Callable[[Line], Line],
    is_heard: bool,
) -> Result:
    tally, pairs = Tally(), _Pairs()
    with whole(folder / "rows.jsonl") as rows, whole(folder / "rejects.jsonl") as rejects:
        kept = _kept(folder, decided, tally, pairs, rejects)
        while some := list(islice(kept, ASSEMBLED)):
            _write_rows(folder, some, assembler, tally, rows, rejects)
    report = {**tally.report(), "card": {"recipe": recipe.identity(), "code": code_digest(), **made.card}}
    if is_heard:
        report["errors"] = recordings.errors_of(_heard_records(folder))
        del report["gate"]
    else:
        report["gate"] |= pairs.tested(recipe.verify)
    return Result(folder, report, tally.exhibits())


def _kept(
    folder: Path, decided: Callable[[Line], Line], tally: Tally, pairs: "_Pairs", rejects: TextIO
) -> Iterator[tuple[str, Line]]:
    """(row, entry) of what was kept; what was dropped is counted and written on the way."""
    for stored in lines_of(folder):
        line = decided(stored)
        tally.add_line(line)
        for entry in line["outcomes"]:
            pairs.add(entry)
            if entry["decision"] == "kept":
                yield line["row"], entry
            elif entry["decision"] == "rejected":
                _reject(entry, tally, rejects)


def _reject(entry: Line, tally: Tally, rejects: TextIO) -> None:
    tally.drop(entry)
    keys = ("id", "reason", "step", "numbers", "failed", "attempt", "text", "language", "meta", "seconds")
    row = {key: entry[key] for key in keys if key in entry}
    if "audio" in entry:
        row["audio"] = sound_name(entry["audio"])
    rejects.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_rows(
    folder: Path,
    some: Sequence[tuple[str, Line]],
    assembler: Assemble | None,
    tally: Tally,
    rows: TextIO,
    rejects: TextIO,
) -> None:
    """Kept samples as rows. Without an assembler a row is the sample itself."""
    for row, entry in some:
        if assembler is None:
            plain = {key: entry[key] for key in ("id", "text", "language", "meta", "seconds") if key in entry}
            sound = {"audio": sound_name(entry["audio"])} if "audio" in entry else {}
            rows.write(json.dumps({**plain, **sound}, ensure_ascii=False) + "\n")
            tally.keep(entry, [])
            continue
        made = judge(assembler, [_record(folder, row, entry)])
        tasks = []
        for each in made:
            if isinstance(each, Outcome):
                _reject(
                    {**entry, "step": each.step, "reason": each.reason, "numbers": dict(each.numbers)}, tally, rejects
                )
            else:
                rows.write(row_line(each, folder) + "\n")
                tasks.append(each.task)
        if tasks:
            tally.keep(entry, tasks)


def _heard_records(folder: Path) -> Iterator[Record]:
    """Every utterance that was heard, kept or left to people."""
    for line in lines_of(folder):
        for entry in line["outcomes"]:
            if "heard" in entry["meta"]:
                yield _record(folder, line["row"], entry)


class _Pairs:
    """Heard clips, to be paired with the texts of others: what the gate makes of wrong pairs."""

    def __init__(self) -> None:
        self._judged: list[tuple[str, Mapping[str, Any]]] = []

    def add(self, entry: Line) -> None:
        scores = entry["meta"].get("verify", {})
        if "heard" in scores and len(self._judged) < PAIRED:
            self._judged.append((entry["text"], scores))

    def tested(self, config: VerifyConfig | None) -> dict[str, Any]:
        """For report.json: how many wrong pairs there were, and the share of them that passed."""
        pairs, passed = mismatched(self._judged, config) if config is not None and self._judged else (0, 0)
        if not pairs:
            why = "no two texts were heard, so no wrong pair could be made"
            return {"mismatched_pairs": 0, "mismatched_pairs_passed": None, "reason": why}
        return {"mismatched_pairs": pairs, "mismatched_pairs_passed": passed / pairs}
