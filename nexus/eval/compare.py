"""`nexus eval diff A B`: two runs on the same items, item by item, with paired intervals and an exact test.

Both runs must have marked the same items under the same protocol; anything else is refused, because a difference of
such numbers says nothing about the responders.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nexus.errors import BadConfig, BadRecord
from nexus.eval.scores import bootstrap, paired_drop, rate
from nexus.eval.suites.rows import read_jsonl
from nexus.eval.suites.translation import bleu_of

Item = Mapping[str, Any]
Statistic = Callable[[np.ndarray], float | None]


def diff(a: Path, b: Path) -> dict[str, Any]:
    """What changed from run A to run B: {suite: {metric, a, b, difference, ci95, n, ...}}, `difference` is b - a.

    Accuracies come with the ids that were won and lost and the two-sided p of McNemar's exact test (Fagerland and
    others 2013); error rates and BLEU with the paired bootstrap (Koehn 2004) and the ids that became better or worse.
    Where a run has not measured an item, the numbers are None with a reason. Raises BadConfig for runs of other suites,
    data, protocols, recognisers or judges, BadRecord for folders that hold no finished run.
    """
    first, second = _report(a), _report(b)
    _check_cards(a, first["card"], b, second["card"])
    ours, theirs = (_by_suite(path) for path in (a, b))
    result: dict[str, Any] = {"schema": 1}
    for suite in first["card"]["suites"]:
        before, after = ours.get(suite, []), theirs.get(suite, [])
        if [item["id"] for item in before] != [item["id"] for item in after]:
            raise BadRecord(
                f"{a} and {b}: {suite} has {len(before)} and {len(after)} items of other ids or order in items.jsonl; "
                "evaluate again"
            )
        result[suite] = _compared(before, after)
    return result


def _compared(before: Sequence[Item], after: Sequence[Item]) -> dict[str, Any]:
    if "right" in before[0]:
        return _accuracies(before, after)
    if "errors" in before[0]:
        columns = [_columns(items, ("errors", "units")) for items in (before, after)]
        return _sums("error_rate", columns, rate, before, after, lambda item: float(item["errors"]))
    # One BLEU per direction would be two tests; runs of both directions are compared direction by direction.
    groups = sorted({str(item["group"]) for item in before})
    return {
        group: _bleus([i for i in before if i["group"] == group], [i for i in after if i["group"] == group])
        for group in groups
    }


def _accuracies(before: Sequence[Item], after: Sequence[Item]) -> dict[str, Any]:
    if any(item["right"] is None for item in (*before, *after)):
        return {
            "metric": "accuracy",
            "difference": None,
            "n": len(before),
            "reason": "a run has not measured all items",
        }
    ours, theirs = ([bool(item["right"]) for item in items] for items in (before, after))
    won = [item["id"] for item, old, new in zip(before, ours, theirs, strict=True) if new and not old]
    lost = [item["id"] for item, old, new in zip(before, ours, theirs, strict=True) if old and not new]
    fall = paired_drop(theirs, ours)  # of B against A with the sign turned: a rise is positive
    return {
        "metric": "accuracy",
        "a": float(np.mean(ours)),
        "b": float(np.mean(theirs)),
        "difference": fall["drop"],
        "ci95": fall["ci95"],
        "n": len(before),
        "p": _mcnemar(len(won), len(lost)),
        "won": won,
        "lost": lost,
    }


def _mcnemar(won: int, lost: int) -> float:
    """Two-sided exact p that a change is as likely to win as to lose an item; 1 where nothing changed."""
    changed, fewer = won + lost, min(won, lost)
    tail = sum(math.comb(changed, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**changed)


def _bleus(before: Sequence[Item], after: Sequence[Item]) -> dict[str, Any]:
    columns = [_columns(items, ("statistics",)) for items in (before, after)]
    return _sums("bleu", columns, bleu_of, before, after, lambda item: -float(sum(item["statistics"][:4])))


def _columns(items: Sequence[Item], keys: tuple[str, ...]) -> np.ndarray | None:
    """The sums of every item, f64 [N, K]; None where one was not measured."""
    if any(item[key] is None for item in items for key in keys):
        return None
    return np.array([np.hstack([item[key] for key in keys]) for item in items], dtype=np.float64)


def _sums(
    metric: str,
    columns: Sequence[np.ndarray | None],
    statistic: Statistic,
    before: Sequence[Item],
    after: Sequence[Item],
    badness: Callable[[Item], float],
) -> dict[str, Any]:
    ours, theirs = columns
    if ours is None or theirs is None:
        return {"metric": metric, "difference": None, "n": len(before), "reason": "a run has not measured all items"}
    width = ours.shape[1]

    def rise(sums: np.ndarray) -> float | None:
        old, new = statistic(sums[:width]), statistic(sums[width:])
        return None if old is None or new is None else new - old

    both = np.hstack([ours, theirs])
    pairs = [(item["id"], badness(item), badness(other)) for item, other in zip(before, after, strict=True)]
    return {
        "metric": metric,
        "a": statistic(ours.sum(0)),
        "b": statistic(theirs.sum(0)),
        "difference": rise(both.sum(0)),
        "ci95": bootstrap(both, rise),
        "n": len(before),
        "better": [id for id, old, new in pairs if new < old],
        "worse": [id for id, old, new in pairs if new > old],
    }


def _report(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(report["card"]["suites"], dict):
            return dict(report)
    except OSError as error:
        raise BadRecord(
            f"{path}: cannot be read ({error.strerror}); name the folder of a finished evaluation"
        ) from None
    except (ValueError, KeyError, TypeError):
        pass
    raise BadRecord(f"{path}: expected the report of an evaluation with its card, given something else")


def _by_suite(folder: Path) -> dict[str, list[Item]]:
    grouped: dict[str, list[Item]] = {}
    for number, row in read_jsonl(folder / "items.jsonl"):
        if not {"suite", "id", "group"} <= set(row) or not {"right", "errors", "statistics"} & set(row):
            raise BadRecord(f"{folder / 'items.jsonl'}:{number}: is no marked item; name the folder of an evaluation")
        grouped.setdefault(row["suite"], []).append(row)
    return grouped


def _check_cards(a: Path, first: Mapping[str, Any], b: Path, second: Mapping[str, Any]) -> None:
    """Refuse two runs that did not measure the same thing in the same way; responders may differ."""

    def refuse(what: str, ours: Any, theirs: Any) -> None:
        raise BadConfig(
            f"{a} and {b} cannot be compared: {what} is {json.dumps(ours, ensure_ascii=False)} there and "
            f"{json.dumps(theirs, ensure_ascii=False)} here; evaluate both alike"
        )

    for key in ("recogniser", "judge", "seed", "resamples"):
        if first[key] != second[key]:
            refuse(key, first[key], second[key])
    ours, theirs = first["suites"], second["suites"]
    if set(ours) != set(theirs):
        refuse("the set of suites", sorted(ours), sorted(theirs))
    for suite in ours:
        if ours[suite]["data"] != theirs[suite]["data"]:
            refuse(f"the data fingerprint of {suite}", ours[suite]["data"], theirs[suite]["data"])
        for key in {**ours[suite]["protocol"], **theirs[suite]["protocol"]}:
            old, new = (side[suite]["protocol"].get(key) for side in (ours, theirs))
            if old != new:
                refuse(f"{suite}: {key}", old, new)
