"""From replies to scores: one mark per item, and what the marks of a suite come to, with intervals and baselines.

Pure functions of a suite and its rows. A row is what stands in items.jsonl: {"id", "text", "heard", "missing", ...};
`heard` is what the recogniser heard of a spoken answer. A mark is all that a comparison of two runs needs.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nexus.eval.scores import accuracy, bootstrap, rate
from nexus.eval.suites.normalise import Language, error_counts, rate_name
from nexus.eval.suites.synthesis import Utterance, score_synthesis
from nexus.eval.suites.tasks import Item, Suite
from nexus.eval.suites.translation import bleu, statistics

Row = Mapping[str, Any]
Mark = dict[str, Any]
UNHEARD = "some answers are sound alone and no recogniser was given; name one with --recogniser"


def marks(suite: Suite, rows: Sequence[Row]) -> list[Mark]:
    """One mark per item, in order. `right`, `text_right`, `speech_right` (None: not measured) where the metric is
    accuracy; `errors` and `units` of an error rate; `statistics` of BLEU, ten sums as sacrebleu counts them."""
    match suite.metric:
        case "accuracy":
            return [_right(suite, item, row) for item, row in zip(suite.items, rows, strict=True)]
        case "error_rate" | "seed_tts":
            return _errors(suite, rows)
        case "bleu":
            return [_ngrams(item, row) for item, row in zip(suite.items, rows, strict=True)]


def score(suite: Suite, rows: Sequence[Row], marked: Sequence[Mark]) -> dict[str, Any]:
    """The suite's task object of report.json."""
    match suite.metric:
        case "accuracy":
            result = _accuracy(suite, rows, marked)
        case "error_rate":
            result = _error_rate(suite, marked)
        case "seed_tts":
            result = _seed_tts(suite, rows)
        case "bleu":
            result = _bleu(suite, rows, marked)
    missing = len(result["missing_ids"]) if "missing_ids" in result else sum(bool(row["missing"]) for row in rows)
    cut = sum(not row["complete"] for row in rows)
    return {**result, "missing": missing, "cut": cut}


def reply_of(row: Row, spoken: bool = False) -> str | None:
    """What is marked: the text, else what was heard; "" for a missing answer, None for sound nobody heard."""
    if row["missing"]:
        return ""
    given = row["heard"] if spoken or row["text"] is None else row["text"]
    if spoken and given is None:
        return ""  # speech was asked for and did not come
    return None if given is None else str(given)


def _right(suite: Suite, item: Item, row: Row) -> Mark:
    text = None if row["text"] is None else suite.is_right(item, row["text"])
    speech = None if row["heard"] is None else suite.is_right(item, row["heard"])
    right = False if row["missing"] else speech if text is None else text
    return {"right": right, "text_right": text, "speech_right": speech}


def _errors(suite: Suite, rows: Sequence[Row]) -> list[Mark]:
    marked: list[Mark] = [{} for _ in rows]
    for language, protocol in suite.protocol["normalisers"].items():
        places = [i for i, item in enumerate(suite.items) if item.language == language]
        replies = [reply_of(rows[i], suite.form == "speech") for i in places]
        references = [suite.items[i].reference for i in places]
        counts = error_counts(references, [reply or "" for reply in replies], language, protocol)
        for place, reply, (errors, units) in zip(places, replies, counts.tolist(), strict=True):
            marked[place] = {"errors": None if reply is None else errors, "units": units}
    return marked


def _ngrams(item: Item, row: Row) -> Mark:
    reply = reply_of(row)
    if reply is None:
        return {"statistics": None}
    return {"statistics": statistics([item.reference], [reply], item.language)[0].tolist()}


def _accuracy(suite: Suite, rows: Sequence[Row], marked: Sequence[Mark]) -> dict[str, Any]:
    usual, _ = Counter(item.reference for item in suite.items).most_common(1)[0]
    baseline = float(np.mean([suite.is_right(item, usual) for item in suite.items]))
    result: dict[str, Any] = {
        **_share([mark["right"] for mark in marked]),
        "baseline": baseline,
        "baseline_is": f"{usual!r} to everything, the most frequent reference",
        "text_accuracy": _share_of_given("text_right", marked),
        "speech_accuracy": _share_of_given("speech_right", marked),
    }
    if result["text_accuracy"] is None:
        result["text_reason"] = "no answer has a text"
    if result["speech_accuracy"] is None:
        spoken = any(row["audio"] is not None for row in rows)
        result["speech_reason"] = "no recogniser was given" if spoken else "no answer has a sound"
    if suite.chooses is not None:
        result |= _of_choices(suite.chooses, rows, marked)
    by_group = _by_group(suite.items, [mark["right"] for mark in marked], _share)
    if by_group:
        result["groups"] = by_group
        if suite.groups != "groups":
            result[suite.groups] = {name: scores["accuracy"] for name, scores in by_group.items()}
    return result


def _of_choices(chooses: Callable[[str], bool], rows: Sequence[Row], marked: Sequence[Mark]) -> dict[str, Any]:
    """`unparsed`, replies that name no choice, which are wrong; and the accuracy without them and without missing
    replies, as AIR-Bench's published scores leave them out (None where no reply names a choice)."""
    replies = [str(row["text"] or "") for row in rows if not row["missing"]]
    num_parsed = sum(map(chooses, replies))
    right = sum(bool(mark["right"]) for mark in marked)
    return {
        "unparsed": len(replies) - num_parsed,
        "accuracy_of_parsed": right / num_parsed if num_parsed else None,
    }


def _share(right: Sequence[bool | None]) -> dict[str, Any]:
    known = [mark for mark in right if mark is not None]
    if len(known) < len(right):
        return {"accuracy": None, "n": len(right), "ci95": None, "reason": UNHEARD}
    return accuracy(known)


def _share_of_given(key: str, marked: Sequence[Mark]) -> float | None:
    """Share of all items that are right in this form; an item without this form is wrong. None where none has it."""
    given = [mark[key] for mark in marked]
    return None if all(value is None for value in given) else sum(map(bool, given)) / len(given)


def _by_group(items: Sequence[Item], values: Sequence[Any], scored: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """The score of every named group; {} where items have none."""
    grouped: dict[str, list[Any]] = {}
    for item, value in zip(items, values, strict=True):
        if item.group:
            grouped.setdefault(item.group, []).append(value)
    return {name: scored(some) for name, some in sorted(grouped.items())}


def _error_rate(suite: Suite, marked: Sequence[Mark]) -> dict[str, Any]:
    pairs = [(item.language, mark) for item, mark in zip(suite.items, marked, strict=True)]
    result = _rates(pairs) | {"baseline": 1.0, "baseline_is": "empty answers"}
    by_group = _by_group(suite.items, pairs, _rates)
    return {**result, "groups": by_group} if by_group else result


def _rates(pairs: Sequence[tuple[Language, Mark]]) -> dict[str, Any]:
    """`wer` and, or, `cer` over some items, with intervals; `ci95` is that of the first that is there."""
    result: dict[str, Any] = {}
    for language in sorted({language for language, _ in pairs}):
        name, some = rate_name(language), [mark for spoken, mark in pairs if spoken == language]
        if any(mark["errors"] is None for mark in some):
            scored: dict[str, Any] = {name: None, "n": len(some), "ci95": None, "reason": UNHEARD}
        else:
            counts = np.array([[mark["errors"], mark["units"]] for mark in some], dtype=np.float64)
            scored = {name: rate(counts.sum(0)), "n": len(some), "ci95": bootstrap(counts, rate)}
            if scored[name] is None:
                scored["reason"] = "the references hold no words under this normaliser"
        result = scored if not result else {**result, name: scored[name], f"{name}_ci95": scored["ci95"]}
    return {**result, "n": len(pairs)}


def _seed_tts(suite: Suite, rows: Sequence[Row]) -> dict[str, Any]:
    said = [Utterance(item.id, item.reference) for item in suite.items]
    replies = {row["id"]: row["heard"] for row in rows if row["heard"] is not None}
    scored = score_synthesis(said, replies, suite.items[0].language)
    return {**scored, "missing_ids": scored["missing"], "baseline": 1.0, "baseline_is": "silence"}


def _bleu(suite: Suite, rows: Sequence[Row], marked: Sequence[Mark]) -> dict[str, Any]:
    result: dict[str, Any] = {"n": len(rows), "baseline": 0.0, "baseline_is": "empty answers"}
    directions: dict[str, Any] = {}
    for direction in sorted({item.group for item in suite.items}):
        places = [i for i, item in enumerate(suite.items) if item.group == direction]
        if any(marked[i]["statistics"] is None for i in places):
            directions[direction] = {"bleu": None, "n": len(places), "ci95": None, "reason": UNHEARD}
        else:
            replies = [reply_of(rows[i]) or "" for i in places]
            target: Any = suite.items[places[0]].language
            directions[direction] = bleu([suite.items[i].reference for i in places], replies, target)
        result[f"bleu_{direction}"] = directions[direction]["bleu"]
    only = next(iter(directions.values())) if len(directions) == 1 else {}
    return {**result, **{key: only[key] for key in ("ci95", "reason") if key in only}, "groups": directions}
