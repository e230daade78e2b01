"""The recipe: one YAML file that says which organs, with which sizes, trained by which stages on what.

Everything here is strict and frozen: an unknown key, a wrong type or parts that do not fit each other are refused
with file, key, expected and given before any weight is touched. The organs' own sections are in `nexus.organs`.
"""

import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, Tag, ValidationError, model_validator
from pydantic.fields import FieldInfo

from nexus.errors import BadConfig
from nexus.organs import Count, ModelConfig, Natural, Positive, Share, Strict
from nexus.training import DataConfig, EngineConfig, GateConfig

RECIPES = Path(__file__).parent / "recipes"
M = typing.TypeVar("M", bound=Strict)


class OptimConfig(Strict):
    """AdamW with warm-up, a constant stretch and a linear decay that starts at `decay_from` of the steps.

    Matrices that a glob in `muon` names are moved by Muon instead (orthogonalised momentum, torch.optim.Muon), at the
    same size of update as AdamW's, so that one rate serves both.
    """

    rate: Positive = 2e-3
    muon: tuple[str, ...] = ()
    rates: dict[str, float] = Field(default_factory=dict)  # parameter glob -> factor on `rate`
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip_norm: Positive = 1.0
    warmup_steps: Natural = 60
    decay_from: float = 0.4
    final_factor: float = 0.03


class StageConfig(Strict):
    """One training stage: which parameters, on which mixture, for how long.

    `steps` or `epochs` fix its length. Without them `seconds` is the wall-clock budget at scale 1: it becomes a fixed
    number of steps once the speed is measured, never fewer than min_steps.
    """

    name: str
    trainable: tuple[str, ...]  # globs over full parameter names
    mixture: dict[str, Count]  # task -> rows per step
    optim: OptimConfig = OptimConfig()
    wrong_codes: Share = 0.0  # speech: share of past codes shown wrong, so that the voice leans on the words
    wrong_frames: Share = 0.0  # speech: the same for all codes of a frame
    auxiliary: dict[str, float] = Field(default_factory=dict)  # loss -> weight; heads live in the stage
    checkpointing: bool = False  # compute activations again in the backward pass: less memory, a third more work
    seconds: Annotated[float, Field(ge=0)]
    min_steps: Count = 100
    steps: Count | None = None
    epochs: Positive | None = None  # passes over the data of the stage

    @model_validator(mode="after")
    def _one_length(self) -> "StageConfig":
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"stage {self.name} has steps {self.steps} and epochs {self.epochs}; give one of them")
        return self


class WorldConfig(Strict):
    """What the demo makes: numbers of utterances, pictures, films and test items. What is 0 is neither learned nor
    examined."""

    seed: int = 0
    heard: Count  # utterances for recognition and questions, many voices
    spoken: Count  # utterances of the one voice that is learned
    mandarin: Natural = 0  # Mandarin utterances, to be transcribed and translated
    english: Natural = 0  # English ones, to be translated
    captioned: Natural = 0  # utterances of which is said who speaks how
    felt: Natural = 0  # utterances whose emotion is asked
    looked: Natural = 0  # spoken questions about pictures
    followed: Natural = 0  # spoken follow-ups of a conversation
    pictures: Count
    films: Natural = 0
    test_heard: Count = 400
    test_questions: Count = 400
    test_spoken: Count = 200
    test_mandarin: Count = 200
    test_english: Count = 200
    test_captioned: Count = 200
    test_felt: Count = 200
    test_looked: Count = 200  # recordings; each is asked about two pictures
    test_followed: Count = 150  # recordings; each ends two conversations
    test_pictures: Count = 1000
    test_films: Count = 300
    noise_db: tuple[float, float] = (15.0, 40.0)  # signal to noise, drawn per utterance
    noise: str | None = None  # folder of real noises and rooms, some for learning, others for tests; None: made noise
    target_voice: str = "en-us+f2"
    target_rate_wpm: Count = 165
    verified: Annotated[float, Field(ge=0, le=1)] = 0.01  # share of the English utterances that a recogniser hears


class TokenizerConfig(Strict):
    """`bpe`: byte-level BPE trained in stage 0, where no published tokenizer is given. `published`: the one of
    checkpoints.language, with the audio tokens in spare rows of its embedding table."""

    type: Literal["bpe", "published"] = "bpe"
    uncased: bool = True  # lower case, no punctuation: the tiny system's spelling


class CheckpointConfig(Strict):
    """Published weights for an organ: a folder, a file, or a repository of the Hugging Face hub (`owner/name`)."""

    source: Annotated[str, Field(min_length=1)]
    file: str | None = None  # the one file meant, where the source holds others
    revision: str | None = None  # of a hub repository; None: its main branch
    licence: Annotated[str, Field(min_length=1)]
    commercial: bool = True  # whether the licence allows commercial use of the weights


class CheckpointsConfig(Strict):
    """Where published weights come from. Organs without an entry start from random numbers and are trained.

    `language` names a Qwen2.5-VL or Qwen2.5 checkpoint: it gives the language model, the tokenizer and, unless
    `vision` is named, the vision tower of a Qwen2.5-VL.
    """

    language: CheckpointConfig | None = None
    vision: CheckpointConfig | None = None
    hearing: CheckpointConfig | None = None
    codec: CheckpointConfig | None = None


class Recipe(Strict):
    """A whole system: organs, stand-ins (stage 0), the three stages, how they are trained, and the data of the demo."""

    name: str
    description: str = ""
    licence: str = "Apache-2.0"  # of what is trained here; parts bring their own
    model: ModelConfig
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights `nexus build` writes; a codec stays float32
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    standins: tuple[StageConfig, ...] = ()  # stage 0: stands for published checkpoints, never Nexus training
    stages: tuple[StageConfig, ...] = ()
    data: DataConfig = DataConfig()
    engine: EngineConfig = EngineConfig()
    gate: GateConfig | None = None
    world: WorldConfig | None = None
    minutes: Positive = 14.5  # of the whole demo, to which the stages' seconds belong

    def fingerprint(self) -> str:
        """Sixteen hex digits over every setting."""
        return fingerprint(self.model_dump(mode="json"))

    def stage(self, name: str) -> StageConfig:
        """The stand-in or stage of that name."""
        for stage in (*self.standins, *self.stages):
            if stage.name == name:
                return stage
        names = [stage.name for stage in (*self.standins, *self.stages)]
        raise BadConfig(f"recipe {self.name} has no stage {name!r}; it has {', '.join(names)}")

    @classmethod
    def load(cls, source: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a shipped recipe by name, or a YAML file by path, and apply `a.b=value` overrides.

        Raises BadConfig naming file, key, expected and given.
        """
        return read_settings(cls, find_recipe(source), overrides)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-6 is a number, as in YAML 1.2, and not a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_settings(cls: type[M], path: Path | None, overrides: Sequence[str] = (), where: str = "") -> M:
    """The settings of a YAML file (None: the defaults, called `where`) with `a.b=value` overrides.

    Raises BadConfig naming file, key, expected and given.
    """
    named = where or str(path)
    try:
        tree = cls().model_dump(mode="json") if path is None else _read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadConfig(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise BadConfig(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    for change in overrides:
        _override(tree, change, cls, named)
    return validate(cls, tree, named)


def _read_yaml(text: str) -> Any:
    """The tree of a YAML text, safe, with numbers as in YAML 1.2. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def find_recipe(source: str | Path) -> Path:
    """Path of a recipe given by file or by shipped name (`-` and `_` alike)."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise BadConfig(f"{path}: no such recipe file")
        return path
    names = {p.stem: p for p in sorted(RECIPES.glob("*.yaml"))}
    name = str(source).replace("_", "-")
    if name in names:
        return names[name]
    raise BadConfig(
        f"no recipe {str(source)!r}{_did_you_mean(name, names)}; shipped: {', '.join(names)}, or give FILE.yaml"
    )


def fingerprint(tree: Any) -> str:
    """Sixteen hex digits over a JSON-like value, independent of key order."""
    text = json.dumps(tree, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_digest() -> str:
    """Sixteen hex digits over this package's code: what was begun is continued by the code that began it."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def validate(cls: type[M], tree: Any, where: str) -> M:
    """`tree` as a `cls`. Raises BadConfig with one line for the first fault: where, key, expected and given."""
    try:
        return cls.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        first = error.errors()[0]
        raise BadConfig(f"{where}: {_explain(cls, first)}") from None
    except TypeError as error:
        raise BadConfig(f"{where}: holds a value that is no number, text, list or mapping: {error}") from None


def _explain(cls: type[Strict], fault: Any) -> str:
    keys, section = _walk(cls, fault["loc"])
    key = ".".join(keys) or "the recipe"
    match fault["type"]:
        case "extra_forbidden":
            known = list(section.model_fields) if section else []
            return f"unknown key {key!r}{_did_you_mean(keys[-1], known)} (known here: {', '.join(known)})"
        case "missing":
            return f"key {key!r} is missing"
        case "union_tag_invalid":
            expected, given = fault["ctx"]["expected_tags"], fault["ctx"]["tag"]
            return f"{key}.type: expected one of {expected}, given {given!r}"
        case "value_error":
            return f"{key}: {fault['ctx']['error']}"
        case _:
            return f"{key}: {fault['msg'].removeprefix('Input ').strip()}, given {fault['input']!r}"


def _walk(cls: type[Strict], loc: Sequence[str | int]) -> tuple[list[str], type[Strict] | None]:
    """The dotted key of a fault, and the section that holds its last key (None outside the known sections).

    Where a section is chosen by its type, the place of a fault names the choice as well; people do not write that.
    """
    keys: list[str] = []
    inside: dict[str, type[Strict]] = {"": cls}
    holder: type[Strict] | None = cls
    for key in map(str, loc):
        if len(inside) > 1 and key in inside:
            inside = {"": inside[key]}
            continue
        keys.append(key)
        if key.isdigit():
            continue
        holder = next(iter(inside.values()), None)
        inside = _sections(holder.model_fields[key]) if holder and key in holder.model_fields else {}
    return keys, holder


def _sections(annotation: Any) -> dict[str, type[Strict]]:
    """The sections inside an annotation such as `tuple[StageConfig, ...]` or a choice by type, by their tag."""
    if isinstance(annotation, FieldInfo):
        return _sections(annotation.annotation)
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return {"": annotation} if issubclass(annotation, Strict) else {}
    inner, *notes = typing.get_args(annotation) or (None,)
    tag = next((note.tag for note in notes if isinstance(note, Tag)), None)
    if tag is not None:
        return {tag: next(iter(_sections(inner).values()))}
    found: dict[str, type[Strict]] = {}
    for part in typing.get_args(annotation):
        found.update(_sections(part))
    return found


def _did_you_mean(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _override(tree: dict[str, Any], change: str, cls: type[Strict], where: str) -> None:
    """Apply the change `a.b=value` in place; list items are named by index or by their `name`."""
    dotted, equals, text = change.partition("=")
    if not equals or not all(dotted.split(".")):
        raise BadConfig(f"--set {change}: expected KEY=VALUE, for example world.heard=1000")
    keys = dotted.split(".")
    try:
        value = _read_yaml(text)
    except yaml.YAMLError as error:
        raise BadConfig(f"--set {dotted}: {text!r} is no YAML value: {' '.join(str(error).split())}") from None
    at: Any = tree
    for key in keys[:-1]:
        at = _child(at, key, dotted, where)
    last = keys[-1]
    if isinstance(at, list):
        at[_place(at, last, dotted, where)] = value
    elif isinstance(at, dict):
        at[last] = value
    else:
        raise BadConfig(f"{where}: --set {dotted}: {keys[-2]!r} is a value, it has no key {last!r}")


def _child(at: Any, key: str, dotted: str, where: str) -> Any:
    if isinstance(at, list):
        return at[_place(at, key, dotted, where)]
    if isinstance(at, dict):
        return at.setdefault(key, {})  # an unknown section is refused by the validation that follows
    raise BadConfig(f"{where}: --set {dotted}: {key!r} is inside a value, not a section")


def _place(at: list[Any], key: str, dotted: str, where: str) -> int:
    """Index of the list item that `key` means: its number or its `name`."""
    names = [str(item.get("name", i)) if isinstance(item, dict) else str(i) for i, item in enumerate(at)]
    for index, name in enumerate(names):
        if key in (str(index), name):
            return index
    raise BadConfig(f"{where}: --set {dotted}: no item {key!r}{_did_you_mean(key, names)}; items: {', '.join(names)}")
