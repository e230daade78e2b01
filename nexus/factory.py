"""`nexus synth`, whole: the factory's run, and report.html beside what it leaves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nexus.eval.plots import Curves
from nexus.eval.report import Block, Cell, Report, Table, write_report
from nexus.media import load_audio
from nexus.progress import Progress
from nexus.synth.journal import read_sound
from nexus.synth.produce import Workers
from nexus.synth.recipe import SynthRecipe
from nexus.synth.run import Result, synthesise
from nexus.synth.run import regate as regate_folder
from nexus.types import Audio

MOST_NAMES = 40  # voices in a table: the ones with most samples
LONGEST = 200  # characters of a text on the page


def synth(
    recipe: str,
    out: Path,
    overrides: Sequence[str] = (),
    limit: int | None = None,
    *,
    executor: Literal["local", "ray"] = "local",
    workers: int = 1,
    address: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a recipe (shipped name or FILE.yaml) into `out`, or go on with it; returns what report.json holds.

    Raises as `nexus.synth.run.synthesise`, and BadConfig for a recipe that cannot be.
    """
    settings = SynthRecipe.load(recipe, overrides)
    result = synthesise(settings, out, limit, workers=Workers(executor, workers, address), progress=progress)
    _write_pages(result)
    return result.report


def regate(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Move the gate of a finished run (`verify.max_wer=0.1`); returns the new report.

    Raises as `nexus.synth.run.regate`.
    """
    result = regate_folder(folder, overrides)
    _write_pages(result)
    return result.report


def _write_pages(result: Result) -> None:
    write_report(result.folder / "report.html", _page(result))
    if result.recordings is not None:
        _write_pages(result.recordings)


def _page(result: Result) -> Report:
    report = result.report
    facts = [
        ("Read", f"{report['read']:,}"),
        ("Kept", f"{report['kept']:,}"),
        ("Dropped", f"{sum(report['dropped'].values()):,}"),
        ("Voices", f"{report['voices']:,}"),
        ("Sound", f"{report['hours']:.2f} h"),
        ("Time", f"{report['seconds']:.0f} s, {_rate(report)}"),
    ]
    sections: list[tuple[str, tuple[Block, ...]]] = [
        ("Kept and dropped", tuple(_counts(report))),
        ("What there is", tuple(_holdings(report))),
        ("Distributions", tuple(_distributions(report))),
        ("To listen to", tuple(_listening(result))),
        ("Dropped, for example", tuple(_examples(result))),
        ("How it was made", (_settings(report),)),
    ]
    shown = tuple((heading, blocks) for heading, blocks in sections if blocks)
    return Report(f"Data: {report['card']['recipe']['name']}", _lead(report), tuple(facts), shown)


def _rate(report: Mapping[str, Any]) -> str:
    rate = report["samples_per_second"]
    return "no rate" if rate is None else f"{rate:.2f} samples/s"


def _lead(report: Mapping[str, Any]) -> str:
    parts = [report["card"]["recipe"]["description"] or "Speech data."]
    for state, what in (("unverified", "in languages without a recogniser"), ("unchecked", "not drawn to be checked")):
        if report[state]:
            parts.append(f"{report[state]:,} of the kept samples were heard by nobody: {what}.")
    if "rewrite" in report["card"]:
        parts.append(f"Chat texts: {report['card']['rewrite']}.")
    if "regated" in report["card"]:
        parts.append(f"The gate was moved after the run: {', '.join(report['card']['regated'])}.")
    return " ".join(parts)


def _counts(report: Mapping[str, Any]) -> list[Block]:
    read = max(1, report["read"])
    rows: list[tuple[Cell, ...]] = [("kept", report["kept"], report["kept"] / read, None)]
    for reason, number in report["dropped"].items():
        rows.append((reason, number, number / read, "failure" if reason in report["failed"] else None))
    note = "Every sample that was read, once. A failure is a step that could not do its work, not one that judged."
    columns = ("what", "samples", "share", "kind")
    blocks: list[Block] = [Table("Samples", note, columns, tuple(rows), bars=("share",))]
    gate = report.get("gate")
    if gate is not None:
        passed = gate["mismatched_pairs_passed"]
        wrong = "not measured" if passed is None else f"{passed:.2%} of {gate['mismatched_pairs']:,}"
        gate_rows: tuple[tuple[Cell, ...], ...] = (
            ("attempts, each by another voice", f"{gate['attempts']:,}"),
            ("attempts that passed", f"{gate['passed']:,}"),
            ("wrong pairs of sound and text that passed", wrong),
        )
        blocks.append(Table("The gate", "", ("what", "number"), gate_rows))
    errors = report.get("errors")
    if errors is not None and "rate" in errors:
        note = "Against what the manifest says was said, over all that was heard: kept, and left to people."
        shown_errors: tuple[tuple[Cell, ...], ...] = ((errors["recordings"], errors["words"], errors["rate"]),)
        blocks.append(Table("Errors of the recogniser", note, ("recordings", "words", "error rate"), shown_errors))
    return blocks


def _holdings(report: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for kind, names in report["by"].items():
        ordered = sorted(names.items(), key=lambda item: -item[1]["samples"])
        rows = tuple((name, count["samples"], count["hours"]) for name, count in ordered[:MOST_NAMES])
        if rows:
            note = f"The first {MOST_NAMES} of {len(ordered)}." if len(ordered) > MOST_NAMES else ""
            blocks.append(Table(f"By {kind}", note, (kind, "samples", "hours"), rows))
    if "assembled" in report:
        split = report["assembled"]["split"]
        proof = tuple(
            (side, split["rows"][side], split["texts"][side], split["speakers"][side]) for side in split["rows"]
        )
        note = f"On both sides: {split['shared_texts']} texts, {split['shared_speakers']} speakers."
        blocks.append(Table("Train and test", note, ("side", "rows", "texts", "speakers"), proof))
    return blocks


def _distributions(report: Mapping[str, Any]) -> list[Block]:
    titles = {
        "seconds": ("Length of kept samples", "seconds"),
        "error_rate": ("Errors of all attempts at the gate", "word (of Chinese: character) error rate"),
    }
    return [
        Curves(title, "Samples per bar, drawn at its lower edge.", x, {"samples": [(at, n) for at, n in bars]})
        for name, (title, x) in titles.items()
        if (bars := report["histograms"][name])
    ]


def _listening(result: Result) -> list[Block]:
    blocks: list[Block] = []
    for name, title in (("kept", "The first"), ("worst", "Kept, and heard worst")):
        samples = result.exhibits[name]
        if samples:
            rows = tuple(
                (_brief(s["text"]), _sound(result.folder, s), s["language"], _voice(s), _heard(s)) for s in samples
            )
            blocks.append(Table(title, "", ("text", "sound", "language", "voice", "heard"), rows))
    return blocks


def _examples(result: Result) -> list[Block]:
    rows: list[tuple[Cell, ...]] = []
    for reason, samples in result.exhibits["dropped"].items():
        for sample in samples:
            numbers = ", ".join(f"{key} {value}" for key, value in sample["numbers"].items())
            rows.append((reason, _brief(sample["text"]), _brief(numbers), _sound(result.folder, sample)))
    return [Table("By reason", "", ("reason", "text", "numbers", "sound"), tuple(rows))] if rows else []


def _settings(report: Mapping[str, Any]) -> Table:
    card = {key: value for key, value in report["card"].items() if key != "recipe"}
    recipe = {key: value for key, value in report["card"]["recipe"].items() if value not in (None, "", [], {})}
    rows = tuple((key, _brief(str(value))) for key, value in {**recipe, **card}.items())
    return Table("Settings", "run.json and report.json hold them whole.", ("setting", "value"), rows)


def _sound(folder: Path, sample: Mapping[str, Any]) -> Audio | None:
    return None if sample["place"] is None else load_audio(read_sound(folder, sample["place"]))


def _voice(sample: Mapping[str, Any]) -> str | None:
    meta = sample["meta"]
    return meta.get("voice") or meta.get("speaker")


def _heard(sample: Mapping[str, Any]) -> str | None:
    heard = sample["meta"].get("verify", {}).get("heard")
    return None if heard is None else _brief(heard)


def _brief(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
