"""The gate moved: other decisions on the scores that a run has stored. Nothing is spoken or heard again."""

from collections.abc import Sequence
from typing import Any

import yaml

from nexus.errors import BadConfig
from nexus.recipe import validate
from nexus.synth.journal import Line
from nexus.synth.verify import VerifyConfig, gate

MOVABLE = ("max_wer", "max_cer", "length_ratio", "seconds_per_letter")
PREFIX = "verify."


def moved(config: VerifyConfig, overrides: Sequence[str]) -> VerifyConfig:
    """The gate with `verify.KEY=VALUE` applied. Raises BadConfig for what would need another run."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    if not overrides:
        raise BadConfig(f"regate moves the gate: give --set verify.KEY=VALUE, KEY one of {', '.join(MOVABLE)}")
    for override in overrides:
        key, equals, text = override.partition("=")
        name = key.removeprefix(PREFIX)
        if not equals or not key.startswith(PREFIX) or name not in MOVABLE:
            movable = ", ".join(PREFIX + name for name in MOVABLE)
            raise BadConfig(f"--set {override}: expected one of {movable}, as KEY=VALUE; all else needs another run")
        try:
            tree[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise BadConfig(f"--set {override}: no YAML value: {' '.join(str(error).split())}") from None
    return validate(VerifyConfig, tree, "regate")


def regated(line: Line, config: VerifyConfig) -> Line:
    """A journal line as this gate would have decided it. Of the attempts that pass, the one that was kept stays, or
    else the first is kept."""
    outcomes = list(line["outcomes"])
    for tries in _tries(outcomes):
        entries = [_decided(outcomes[place], config) for place in tries]
        passing = [i for i, entry in enumerate(entries) if not entry.get("reason")]
        kept_before = [i for i in passing if entries[i]["decision"] == "kept"]
        chosen = (kept_before or passing or [len(entries) - 1])[0]
        for i, place in enumerate(tries):
            decision = "again" if i != chosen else "kept" if passing else "rejected"
            outcomes[place] = {**entries[i], "decision": decision}
    return {**line, "outcomes": outcomes}


def _tries(outcomes: Sequence[Line]) -> list[list[int]]:
    """Places of the attempts at one text, for every text of the row: a question and its reply are two."""
    tries: dict[bool, list[int]] = {}
    for place, entry in enumerate(outcomes):
        tries.setdefault("reply_to" in entry["meta"], []).append(place)
    return list(tries.values())


def _decided(entry: Line, config: VerifyConfig) -> Line:
    scores = entry["meta"].get("verify", {})
    if "heard" not in scores or entry.get("failed") or entry.get("step", "verify") != "verify":
        return entry
    bare = {key: value for key, value in entry.items() if key not in ("step", "reason", "numbers")}
    reason = gate(scores, config)
    if not reason:
        return bare
    numbers = {key: scores[key] for key in ("wer", "cer", "length_ratio") if scores.get(key) is not None}
    return {**bare, "step": "verify", "reason": reason, "numbers": numbers}
