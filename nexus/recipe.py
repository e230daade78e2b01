"""The recipe: one YAML file that says which organs, with which sizes, trained by which stages on what.

Everything here is strict and frozen: an unknown key, a wrong type or parts that do not fit each other are refused
with file, key, expected and given before any weight is touched. All sections stand in this one module because a
recipe must be readable and checkable without importing torch; the formulas that both the loader and the encoders
need (how many tokens a sound or a picture becomes) live here once, on the section they belong to.
"""

import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nexus.errors import BadConfig, BadMedia

RECIPES = Path(__file__).parent / "recipes"


Count = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Strict(BaseModel):
    """A section of the recipe: frozen, unknown keys are errors, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class LanguageConfig(Strict):
    """Causal language model of the Qwen2.5-VL family (transformers classes)."""

    type: Literal["qwen2_5_vl"] = "qwen2_5_vl"
    vocab_size: Count
    width: Count
    layers: Count
    heads: Count
    kv_heads: Count
    ffn_width: Count
    mrope_section: tuple[Count, Count, Count]  # rotary pairs for time, height, width: sums to head width / 2
    rope_theta: Positive = 1e6
    norm_eps: Positive = 1e-6
    max_positions: Count = 32768

    @model_validator(mode="after")
    def _fits(self) -> "LanguageConfig":
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"width {self.width} must divide by heads {self.heads}, heads by kv_heads {self.kv_heads}")
        if 2 * sum(self.mrope_section) != self.width // self.heads:
            half = self.width // self.heads // 2
            raise ValueError(f"mrope_section {list(self.mrope_section)} must sum to half the head width, {half}")
        return self


class VisionConfig(Strict):
    """Qwen2.5-VL vision tower; its merger is the vision adapter."""

    type: Literal["qwen2_5_vl"] = "qwen2_5_vl"
    width: Count
    layers: Count
    heads: Count
    ffn_width: Count
    patch: Count = 14
    merge: Count = 2
    temporal_patch: Count = 2
    window: Count = 112  # pixels
    full_attention_layers: tuple[int, ...]
    tokens_per_second: Count = 2
    min_pixels: Count = 56 * 56
    max_pixels: Count = 28 * 28 * 1280
    frames_per_second: Positive = 2.0
    max_frames: Count = 64

    @model_validator(mode="after")
    def _fits(self) -> "VisionConfig":
        if self.width % (4 * self.heads):
            raise ValueError(f"width {self.width} must divide by 4 x heads {self.heads} (rotary height and width)")
        bad = [i for i in self.full_attention_layers if not 0 <= i < self.layers]
        if bad:
            raise ValueError(f"full_attention_layers {bad} are outside 0..{self.layers - 1}")
        if self.window % (self.patch * self.merge):
            raise ValueError(f"window {self.window} must be a multiple of patch x merge = {self.patch * self.merge}")
        return self

    @property
    def unit(self) -> int:
        """Picture sides are multiples of this many pixels (28)."""
        return self.patch * self.merge

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """Target (height, width) in pixels: multiples of 28 within min_pixels..max_pixels (Qwen2.5-VL's rule)."""
        if max(height, width) / min(height, width) > 200:
            raise BadMedia(f"picture of {width} x {height}: sides differ by more than 200 times; crop it first")
        unit = self.unit
        tall, wide = round(height / unit) * unit, round(width / unit) * unit
        if tall * wide > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            tall = max(unit, math.floor(height / scale / unit) * unit)
            wide = max(unit, math.floor(width / scale / unit) * unit)
        elif tall * wide < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            tall, wide = math.ceil(height * scale / unit) * unit, math.ceil(width * scale / unit) * unit
        return tall, wide

    def grid_for(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Patches before merging (time, height, width) of `frames` pictures of the given size."""
        tall, wide = self.size_for(height, width)
        return math.ceil(frames / self.temporal_patch), tall // self.patch, wide // self.patch

    def tokens_for(self, grid: tuple[int, int, int]) -> int:
        """Language positions one picture or film takes."""
        return grid[0] * grid[1] * grid[2] // self.merge**2


class EncoderConfig(Strict):
    """Whisper-shaped audio encoder: two convolutions, then transformer layers."""

    type: Literal["whisper"] = "whisper"
    num_mels: Count = 128
    width: Count
    layers: Count
    heads: Count
    ffn_width: Count
    conv_strides: tuple[Count, Count] = (1, 2)
    positions: Literal["sinusoidal", "rope"] = "sinusoidal"
    # Longer sound is encoded in windows of this length, none of it is dropped.
    window_seconds: Annotated[float, Field(ge=0.5)] = 30.0
    pad_to_window: bool = False  # Whisper's own weights were trained on padded windows

    @model_validator(mode="after")
    def _fits(self) -> "EncoderConfig":
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must divide by heads {self.heads} into even head widths")
        return self

    def frames_for(self, mel_frames: int) -> int:
        """Encoder states for mel_frames of 10 ms: each convolution rounds up."""
        for stride in self.conv_strides:
            mel_frames = -(-mel_frames // stride)
        return mel_frames


class AdapterConfig(Strict):
    """Two-layer audio adapter whose first layer concatenates `stack` states (Nexus 3.1)."""

    type: Literal["concat_mlp"] = "concat_mlp"
    stack: Count = 5
    width: Count


class HearingConfig(Strict):
    """Audio encoder and adapter."""

    encoder: EncoderConfig
    adapter: AdapterConfig
    max_seconds: Positive = 600.0

    def windows_for(self, num_samples: int) -> list[int]:
        """Lengths in samples (16 kHz) of the windows a sound is encoded in.

        No window is longer than the encoder's, and none but a whole sound shorter than 0.1 s: a shorter rest takes
        0.1 s from the window before it. No sample is lost. Raises BadMedia beyond max_seconds.
        """
        if num_samples > self.max_seconds * 16_000:
            raise BadMedia(
                f"sound of {num_samples / 16_000:.1f} s is longer than this model's limit of {self.max_seconds:g} s "
                "(hearing.max_seconds); cut it into pieces"
            )
        window = round(self.encoder.window_seconds * 16_000)
        full, rest = divmod(num_samples, window)
        lengths = [window] * full
        if rest >= 1600 or not full:
            lengths.append(rest)
        elif rest:
            lengths[-1] -= 1600
            lengths.append(rest + 1600)
        return lengths

    def tokens_for(self, num_samples: int) -> int:
        """Language positions of a sound of num_samples at 16 kHz."""
        frames = (self.encoder.frames_for(n // 160) for n in self.windows_for(num_samples))
        return sum(-(-n // self.adapter.stack) for n in frames)

    @property
    def token_rate_hz(self) -> float:
        """Audio tokens per second of sound."""
        return 100 / math.prod(self.encoder.conv_strides) / self.adapter.stack


class VoiceConfig(Strict):
    """Autoregressive decoder of delayed codebooks, fused with language states (Nexus 3.1, MusicGen's delay).

    The four switches are the points the paper leaves open:
    conditioning  clock: a token's state is held for frames_per_character x (letters + 1) frames;
                  hold: one state per frame, then the last one; last: the last state at every frame.
    fusion        mean9: mean of the eight code vectors and the state; half: mean of codes and state.
    states        post: the state at the token's own position; pre: the one that predicted it.
    source        state, or state+embedding (the token's input embedding is added).
    """

    type: Literal["delayed"] = "delayed"
    width: Count
    layers: Count = 6
    heads: Count
    ffn_width: Count
    books: Count = 8
    book_size: Count
    conditioning: Literal["clock", "hold", "last"] = "clock"
    frames_per_character: Positive = 1.3
    fusion: Literal["mean9", "half"] = "mean9"
    states: Literal["post", "pre"] = "post"
    source: Literal["state", "state+embedding"] = "state+embedding"
    book_weights: tuple[float, ...] | None = None  # loss weight per book; None: all equal
    max_seconds: Positive = 60.0
    greedy_books: Natural | None = None  # books decoded greedily, the rest sampled at `temperature`; None: all
    temperature: Positive = 0.5

    @model_validator(mode="after")
    def _fits(self) -> "VoiceConfig":
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must divide by heads {self.heads} into even head widths")
        if self.book_weights is not None and len(self.book_weights) != self.books:
            raise ValueError(f"book_weights has {len(self.book_weights)} entries for {self.books} books")
        return self


class CodecConfig(Strict):
    """The trainable residual-quantiser codec (`codec/rvq.py`)."""

    type: Literal["rvq"] = "rvq"
    rate_hz: Count = 16_000
    num_fft: Count = 1024
    hop: Count = 256
    num_mels: Count = 80
    stack: Count = 3
    pca_dims: Count = 64
    books: Count = 8
    book_size: Count = 256
    vocoder_width: Count = 192
    vocoder_blocks: Count = 4

    @property
    def samples_per_frame(self) -> int:
        return self.hop * self.stack

    @property
    def frame_rate_hz(self) -> float:
        return self.rate_hz / self.samples_per_frame


class ModelConfig(Strict):
    """The four organs and the codec; written into every model folder as config.json."""

    language: LanguageConfig
    vision: VisionConfig | None = None
    hearing: HearingConfig | None = None
    voice: VoiceConfig | None = None
    codec: CodecConfig | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        if (self.voice is None) != (self.codec is None):
            raise ValueError("voice and codec come together: give both or neither")
        if self.voice and self.codec:
            for name in ("books", "book_size"):
                mine, theirs = getattr(self.voice, name), getattr(self.codec, name)
                if mine != theirs:
                    raise ValueError(f"voice.{name} is {mine} but codec.{name} is {theirs}; they must be equal")
        return self


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

    `seconds` is the wall-clock budget at scale 1; the demo turns it into a fixed number of steps after measuring
    its speed, never fewer than min_steps.
    """

    name: str
    trainable: tuple[str, ...]  # globs over full parameter names
    mixture: dict[str, Count]  # task -> rows per step
    optim: OptimConfig = OptimConfig()
    wrong_codes: Share = 0.0  # speech: share of past codes shown wrong, so that the voice leans on the words
    wrong_frames: Share = 0.0  # speech: the same for all codes of a frame
    auxiliary: dict[str, float] = Field(default_factory=dict)  # loss -> weight; heads live in the stage
    seconds: Annotated[float, Field(ge=0)]
    min_steps: Count = 100


class WorldConfig(Strict):
    """What the demo makes: numbers of utterances, pictures and test items."""

    seed: int = 0
    heard: Count  # utterances for recognition and questions, many voices
    spoken: Count  # utterances of the one voice that is learned
    pictures: Count
    test_heard: Count = 400
    test_questions: Count = 400
    test_pictures: Count = 1000
    test_spoken: Count = 200
    noise_db: tuple[float, float] = (15.0, 40.0)  # signal to noise, drawn per utterance
    target_voice: str = "en-us+f2"
    target_rate_wpm: Count = 165


class TokenizerConfig(Strict):
    """Byte-level BPE trained in stage 0 where no published tokenizer is given."""

    type: Literal["bpe"] = "bpe"
    uncased: bool = True  # lower case, no punctuation: the tiny system's spelling


class Recipe(Strict):
    """A whole system: organs, stand-ins (stage 0), the three stages, and the data of the demo."""

    name: str
    description: str = ""
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    standins: tuple[StageConfig, ...] = ()  # stage 0: stands for published checkpoints, never Nexus training
    stages: tuple[StageConfig, ...] = ()
    world: WorldConfig | None = None

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
        path = find_recipe(source)
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise BadConfig(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict):
            raise BadConfig(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
        for override in overrides:
            _override(tree, override, cls, str(path))
        return validate(cls, tree, str(path))


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


M = typing.TypeVar("M", bound=Strict)


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
    keys = [str(part) for part in fault["loc"]]
    key = ".".join(keys) or "the recipe"
    match fault["type"]:
        case "extra_forbidden":
            section = _section(cls, keys[:-1])
            known = list(section.model_fields) if section else []
            return f"unknown key {key!r}{_did_you_mean(keys[-1], known)} (known here: {', '.join(known)})"
        case "missing":
            return f"key {key!r} is missing"
        case "value_error":
            return f"{key}: {fault['ctx']['error']}"
        case _:
            return f"{key}: {fault['msg'].removeprefix('Input ').strip()}, given {fault['input']!r}"


def _section(cls: Any, keys: Sequence[str]) -> type[Strict] | None:
    """The section a dotted key leads into, or None when it leaves the known sections."""
    for key in keys:
        if key.isdigit():
            continue
        if cls is None or key not in cls.model_fields:
            return None
        cls = _strict_in(cls.model_fields[key].annotation)
    return cls


def _strict_in(annotation: Any) -> type[Strict] | None:
    """The section class inside an annotation such as `tuple[StageConfig, ...]` or `VoiceConfig | None`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, Strict) else None
    return next((found for a in typing.get_args(annotation) if (found := _strict_in(a))), None)


def _did_you_mean(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _override(tree: dict[str, Any], override: str, cls: type[Strict], where: str) -> None:
    """Apply `a.b=value` in place; list items are named by index or by their `name`."""
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        raise BadConfig(f"--set {override}: expected KEY=VALUE, for example world.heard=1000")
    keys = dotted.split(".")
    try:
        value = yaml.safe_load(text)
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
