"""report.html of an alignment run: the paper's tables 6 and 7, its figures 5 to 9, from what was measured here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nexus.eval.alignment.drawings import Bars, Cloud, drawing
from nexus.eval.alignment.subjects import Features, Input
from nexus.eval.alignment.views import NUM_CLUSTERS, View, clusters, principal_view
from nexus.eval.report import Block, Cell, Report, Table, write_report

COLUMNS = ("cycle_knn", "mutual_knn", "lcs_knn", "cka", "cknna", "svcca", "edit_knn")  # in the order of the tables
ALL_COLUMNS = (*COLUMNS, "cka_unbiased", "average")
MOST_POINTS = 512  # of each input in a view


def write_page(path: Path, report: Mapping[str, Any], features: Mapping[str, Features]) -> None:
    """Write the page; `features` by role ("model", "baseline") are those that `report["align"]` measured."""
    scores = report["align"]
    subjects = {role: {**scores[role], "label": _label(scores, role)} for role in features}
    bars = [drawing(_bars(subjects, pool)) for pool in ("mean", "last")]
    sections: tuple[tuple[str, tuple[Block, ...]], ...] = (
        ("Scores", (_unembedding(subjects), _embedding(subjects, "mean"), _embedding(subjects, "last"))),
        ("Layer by layer", (*bars, *(_layers(subject) for subject in subjects.values()))),
        *((f"Views: {subjects[role]['label']}", tuple(map(drawing, _views(f)))) for role, f in features.items()),
    )
    write_report(path, Report("Alignment of language and vision", _lead(scores), _facts(scores), sections))


def _label(scores: Mapping[str, Any], role: str) -> str:
    """The name of a model's folder, with its role where both folders are called the same."""
    others = [scores[other]["name"] for other in ("model", "baseline") if other != role and scores[other]]
    name = str(scores[role]["name"])
    return f"{name} ({role})" if name in others else name


def _lead(scores: Mapping[str, Any]) -> str:
    subjects = [scores[role] for role in ("model", "baseline") if scores[role]]
    deaf = [subject["name"] for subject in subjects if not subject["hears"]]
    said = f"{', '.join(deaf)}: no hearing, so there are no rows with audio." if deaf else ""
    return (
        "How alike a model places pictures and the words about them, and whether sound beside the picture brings it "
        "closer. Every score compares language with what its row names. The rows called shuffled are the same features "
        "with the words of another item: what a score is worth begins above them. The sound says these very words, so "
        "some of what it adds is the words themselves: compare vision+audio with audio alone.\n\n" + said
    )


def _facts(scores: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    data, speech = scores["data"], scores["data"]["speech"]
    clamp = scores["clamp_quantile"]
    facts = [
        ("triples", f"{scores['n']} of {data['source']}"),
        ("neighbours", f"k = {scores['k']}"),
        ("rows", "normalised" if scores["normalise"] else "as they are"),
        ("outliers", "as they are" if clamp == 1 else f"clamped at the {clamp:g} quantile"),
    ]
    if scores["preset"]:
        facts.append(("preset", scores["preset"]))
    if speech and speech["spoken"]:
        facts.append(("speech", f"{speech['spoken']} spoken by {speech['engine']}, {speech['voice']}"))
    if speech and speech["recorded"]:
        facts.append(("recordings", str(speech["recorded"])))
    for reason, count in data["left_out"].items():
        facts.append(("left out", f"{count}: {reason}"))
    return tuple(facts)


def _row(name: str, given: str, score: Mapping[str, Any]) -> tuple[Cell, ...]:
    return (name, given, *(score[column] for column in ALL_COLUMNS))


def _table(title: str, note: str, rows: Sequence[tuple[Cell, ...]]) -> Table:
    columns = ("model", "language and", *(column.replace("_", " ") for column in ALL_COLUMNS))
    return Table(title, note, columns, tuple(rows), bars=("average",))


def _scored(subjects: Mapping[str, Any], pick: Any) -> list[tuple[Cell, ...]]:
    """Rows of every subject: its inputs, then the same with shuffled words."""
    rows = []
    for role in reversed(list(subjects)):  # baselines stand above, as in the paper
        subject = subjects[role]
        rows += [_row(subject["label"], given, score) for given, score in pick(subject).items() if score]
        shuffled = pick(subject["shuffled"])
        rows += [_row(subject["label"], f"{given}, shuffled", score) for given, score in shuffled.items() if score]
    return rows


def _unembedding(subjects: Mapping[str, Any]) -> Table:
    return _table(
        "Unembedding space",
        "Mean token embedding of each encoder's output; vision+audio: both side by side. After table 6 of the paper. "
        "lcs knn is a length of 0 to k; average is that of the seven columns of the paper with lcs knn / k.",
        _scored(subjects, lambda subject: subject["unembedding"]),
    )


def _embedding(subjects: Mapping[str, Any], pool: str) -> Table:
    what = {"mean": "Mean over the tokens given", "last": "Last token of the prompt"}[pool]
    return _table(
        f"Embedding space, last hidden layer: {'avg token' if pool == 'mean' else 'last token'}",
        f"{what}; vision+audio: both in one prompt. After table 7 of the paper.",
        _scored(subjects, lambda subject: subject["embedding"][pool][str(subject["layers"])]),
    )


def _layers(subject: Mapping[str, Any]) -> Table:
    rows = [
        (pool, int(layer), given, *(score[column] for column in ALL_COLUMNS))
        for pool, layers in subject["embedding"].items()
        for layer, inputs in layers.items()
        for given, score in inputs.items()
        if score
    ]
    columns = ("pool", "layer", "language and", *(column.replace("_", " ") for column in ALL_COLUMNS))
    return Table(f"{subject['label']}: layer by layer", "", columns, tuple(rows), bars=("average",))


def _bars(subjects: Mapping[str, Any], pool: str) -> Bars:
    """Figure 6: the average score by layer."""
    numbers = sorted({int(layer) for subject in subjects.values() for layer in subject["embedding"][pool]})
    series: dict[str, list[float | None]] = {}
    for role in reversed(list(subjects)):
        layers = subjects[role]["embedding"][pool]
        for given in ("vision", "vision+audio"):
            found = [(layers.get(str(number), {}).get(given) or {}).get("average") for number in numbers]
            if any(value is not None for value in found):
                series[f"{subjects[role]['label']}: {given}"] = found
    what = "mean over the tokens given" if pool == "mean" else "last token"
    note = "Average of seven scores (lcs knn / k) of language and the input named. After figure 6 of the paper."
    return Bars(f"Average score, {what}", note, "hidden layer", [str(number) for number in numbers], series)


def _views(found: Features) -> list[Cloud]:
    """Figure 5 (each input alone, clusters), then figures 7 to 9 (inputs together, layer by layer)."""
    clouds = [_clustered(f"Unembedding, {given}", found.at(0, given, "mean")) for given in found.inputs[:3]]
    if "vision+audio" in found.inputs:
        both = torch.cat([found.at(0, "vision", "mean"), found.at(0, "audio", "mean")], dim=1)
        clouds.append(_clustered("Unembedding, vision and audio side by side", both))
    for layer in found.layers:
        if layer == 0:
            continue
        apart: dict[str, Input] = {"language": "text", "vision": "vision"}
        if "audio" in found.inputs:
            apart["audio"] = "audio"
        clouds.append(_together(found, layer, apart))
        if "vision+audio" in found.inputs:
            clouds.append(_together(found, layer, {"language": "text", "vision+audio": "vision+audio"}))
    return clouds


def _clustered(title: str, x: torch.Tensor) -> Cloud:
    x = x[:MOST_POINTS]
    view, groups = principal_view(x), clusters(x)
    points = {
        f"cluster {group + 1}": _points(view, (groups == group).nonzero().flatten().tolist())
        for group in range(int(groups.max()) + 1)
    }
    note = f"Two principal components of the first {len(x)} items; at most {NUM_CLUSTERS} clusters by k-means."
    return Cloud(title, note, *_axes(view), points)


def _together(found: Features, layer: int, inputs: Mapping[str, Input]) -> Cloud:
    tables = {name: found.at(layer, given, "mean")[:MOST_POINTS] for name, given in inputs.items()}
    view, at, points = principal_view(torch.cat(list(tables.values()))), 0, {}
    for name, table in tables.items():
        points[name] = _points(view, range(at, at + len(table)))
        at += len(table)
    note = f"Mean over the tokens given; the first {len(next(iter(tables.values())))} items."
    return Cloud(f"Layer {layer}: {', '.join(inputs)}", note, *_axes(view), points)


def _points(view: View, rows: Sequence[int]) -> list[tuple[float, float]]:
    return [(float(view.points[row, 0]), float(view.points[row, 1])) for row in rows]


def _axes(view: View) -> tuple[str, str]:
    first, second = view.shares
    return f"first component ({first:.0%} of the variance)", f"second ({second:.0%})"
