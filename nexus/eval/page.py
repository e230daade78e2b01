"""report.html of an evaluation: scores with their intervals, groups, the worst items to listen to and look at."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nexus.eval.published import beside
from nexus.eval.radar import MIN_SPOKES, radar
from nexus.eval.report import Block, Cell, Drawing, Report, Table, write_report
from nexus.eval.suites.tasks import Item, Suite
from nexus.types import Audio, Image

WORST = 12  # items of a suite that are shown
SCORES = ("accuracy", "text_accuracy", "speech_accuracy", "wer", "cer", "bleu")


def write_page(
    out: Path, report: Mapping[str, Any], suites: Sequence[Suite], items: Sequence[Mapping[str, Any]]
) -> None:
    """Write OUT/report.html. Raises BadMedia where a shown medium cannot be read."""
    card = report["card"]
    facts = [
        ("Responder", _said(card["responder"])),
        ("Recogniser", card["recogniser"] or "none"),
        ("Judge", card["judge"] or "none"),
        ("Intervals", f"95 % bootstrap, {card['resamples']} resamples, seed {card['seed']}"),
    ]
    by_suite = {suite.name: [item for item in items if item["suite"] == suite.name] for suite in suites}
    sections: list[tuple[str, tuple[Block, ...]]] = [
        (suite.name, tuple(_blocks(out, suite, report[suite.name], by_suite[suite.name]))) for suite in suites
    ]
    scores: tuple[Block, ...] = (*_radar(report, suites), _scores(report, suites))
    page = Report("Evaluation", _lead(report, suites), tuple(facts), (("Scores", scores), *sections))
    write_report(out / "report.html", page)


def _radar(report: Mapping[str, Any], suites: Sequence[Suite]) -> tuple[Drawing, ...]:
    """All suites on one chart, where there are enough to span an area."""
    shares = _shares(report, suites)
    if len(shares) < MIN_SPOKES:
        return ()
    drawn = radar("Scores of all suites", list(shares), {"this run": list(shares.values())})
    return (Drawing("All suites", "Outside is better: accuracies, 1 - error rate (not below 0), BLEU / 100.", drawn),)


def _shares(report: Mapping[str, Any], suites: Sequence[Suite]) -> dict[str, float]:
    """The main score of every suite that has one, as a share where 1 is best."""
    shares: dict[str, float] = {}
    for suite in suites:
        for name, value in _main_scores(report[suite.name]):
            label = suite.name if name in ("accuracy", "wer", "cer") else f"{suite.name} {name}"
            shares[label] = max(0.0, 1 - value) if name in ("wer", "cer") else value / 100 if "bleu" in name else value
    return shares


def _main_scores(scores: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name in ("accuracy", "wer", "cer", "bleu_en_zh", "bleu_zh_en"):
        if scores.get(name) is not None:
            yield name, scores[name]


def _lead(report: Mapping[str, Any], suites: Sequence[Suite]) -> str:
    parts = []
    for suite in suites:
        said = [f"{name} {value:.3f}" for name, value in _main_scores(report[suite.name])]
        parts.append(f"{suite.name}: {', '.join(said) or 'no score'}")
    return f"{len(suites)} {'suite' if len(suites) == 1 else 'suites'}. {'; '.join(parts)}."


def _said(identity: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in identity.items() if value is not None)


def _scores(report: Mapping[str, Any], suites: Sequence[Suite]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for suite in suites:
        scores = report[suite.name]
        for name in [key for key in scores if key.startswith(("bleu", "mean_")) or key in SCORES]:
            value = scores[name]
            if isinstance(value, list):
                continue
            low, high = scores.get("ci95") or (None, None)
            is_main = name in ("accuracy", "wer", "cer") or name.startswith("bleu")
            own = (low, high, scores.get("baseline")) if is_main else (None, None, None)
            rows.append((suite.name, name, value, *own, scores["n"], scores["missing"]))
    columns = ("suite", "score", "value", "95 % from", "to", "trivial baseline", "n", "missing")
    note = "\n".join(f"{suite.name}: baseline is {report[suite.name]['baseline_is']}" for suite in suites)
    return Table("Scores", note, columns, tuple(rows))


def _blocks(out: Path, suite: Suite, scores: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    protocol = tuple((key, str(value)) for key, value in suite.protocol.items() if value is not None)
    yield Table("Protocol", "What the scores depend on, besides data and responder.", ("setting", "value"), protocol)
    groups = scores.get("groups")
    if groups:
        names = list(dict.fromkeys(key for group in groups.values() for key in group if key not in ("ci95", "reason")))
        names = [name for name in names if not name.endswith("ci95")]
        rows = tuple((name, *(group.get(key) for key in names)) for name, group in groups.items())
        bars = tuple(name for name in names if name in ("accuracy", "wer", "cer"))
        yield Table(f"By {'group' if suite.groups == 'groups' else suite.groups}", "", ("name", *names), rows, bars)
    published = beside(scores, suite.protocol)
    if published is not None:
        yield published
    yield _worst(out, suite, items)


def _worst(out: Path, suite: Suite, items: Sequence[Mapping[str, Any]]) -> Table:
    """Wrong items first, those with most errors before others; equal ones in their order."""
    ranked = sorted(range(len(items)), key=lambda i: (-_badness(items[i]), i))[:WORST]
    with_picture = any(_of(suite.items[i], Image) for i in ranked)
    rows = []
    for i in ranked:
        item, row = suite.items[i], items[i]
        spoken = None if row["audio"] is None else Audio(path=out / row["audio"])
        asked: Cell = None if item.excerpt or item.noise else _of(item, Audio)
        picture: tuple[Cell, ...] = (_of(item, Image),) if with_picture else ()
        words = "no answer" if row["missing"] else row["text"]
        rows.append((item.id, *picture, asked, item.reference, words, spoken, row["heard"], _mark(row)))
    columns = ("id", *(("picture",) if with_picture else ()), "asked", "reference", "answer", "spoken", "heard", "mark")
    return Table("Worst items", f"{len(rows)} of {len(items)} items, the worst first.", columns, tuple(rows))


def _of(item: Item, kind: type[Audio] | type[Image]) -> Any:
    return next((part for turn in item.turns for part in turn.parts if isinstance(part, kind)), None)


def _badness(row: Mapping[str, Any]) -> float:
    if "right" in row:
        return 0.0 if row["right"] else 1.0
    if "errors" in row:
        return 0.0 if row["errors"] is None else row["errors"] / max(1, row["units"])
    counts = row["statistics"] or [0] * 10
    return 1.0 - sum(counts[:4]) / max(1, sum(counts[4:8]), counts[9])


def _mark(row: Mapping[str, Any]) -> Cell:
    if "right" in row:
        return None if row["right"] is None else bool(row["right"])
    return round(_badness(row), 3)
