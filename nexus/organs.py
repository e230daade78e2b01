"""The organs' sections of a recipe: sizes and choices of language, vision, hearing, voice and codec.

Everything is strict and frozen, and nothing here imports torch: a recipe must be readable and checkable without it.
The formulas that both the loader and the encoders need (how many tokens a sound or a picture becomes) live here once,
on the section they belong to. A section is chosen by its `type`.
"""

import importlib
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from nexus.errors import BadMedia

Count = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Strict(BaseModel):
    """A section of the recipe: frozen, unknown keys are errors, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Attention = Literal["eager", "sdpa"]  # written out, or torch's fused one: the same sums in another order


class LanguageConfig(Strict):
    """Causal language model: the text half of Qwen2.5-VL (`qwen2_5_vl`, M-RoPE) or Qwen2.5 (`qwen2`), both with the
    classes of transformers."""

    type: Literal["qwen2_5_vl", "qwen2"] = "qwen2_5_vl"
    vocab_size: Count
    width: Count
    layers: Count
    heads: Count
    kv_heads: Count
    ffn_width: Count
    # Rotary pairs for time, height, width, summing to head width / 2; qwen2 has one position per token and none.
    mrope_section: tuple[Count, Count, Count] | None = None
    tied: bool = False  # the head is the embedding table
    attention: Attention = "eager"
    rope_theta: Positive = 1e6
    norm_eps: Positive = 1e-6
    max_positions: Count = 32768

    @model_validator(mode="after")
    def _fits(self) -> "LanguageConfig":
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"width {self.width} must divide by heads {self.heads}, heads by kv_heads {self.kv_heads}")
        if (self.mrope_section is None) != (self.type == "qwen2"):
            raise ValueError("mrope_section belongs to type qwen2_5_vl, which needs it, and not to qwen2")
        if self.mrope_section and 2 * sum(self.mrope_section) != self.width // self.heads:
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
    attention: Attention = "eager"
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


class InternViTConfig(Strict):
    """InternViT with pixel shuffle and a two-layer projector, as in VITA-1.5: every picture is one square.

    The projector (`width * shuffle**2` -> `projector_width` -> language) is the vision adapter.
    """

    type: Literal["internvit"]
    width: Count
    layers: Count
    heads: Count
    ffn_width: Count
    patch: Count = 14
    side: Count = 448  # pixels; pictures are resized to side x side, none of them is cropped
    shuffle: Count = 2  # neighbouring tokens per axis that become one
    scale: Positive = 0.5  # VITA multiplies the tower's states by this
    projector_width: Count
    norm_eps: Positive = 1e-6
    attention: Attention = "eager"
    frames_per_second: Positive = 1.0
    max_frames: Count = 16

    @model_validator(mode="after")
    def _fits(self) -> "InternViTConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must divide by heads {self.heads}")
        if self.side % (self.patch * self.shuffle):
            raise ValueError(f"side {self.side} must be a multiple of patch x shuffle = {self.patch * self.shuffle}")
        return self

    @property
    def merge(self) -> int:
        """Patches per axis that one language position stands for."""
        return self.shuffle

    @property
    def temporal_patch(self) -> int:
        """Frames per time step."""
        return 1

    @property
    def tokens_per_second(self) -> int:
        """Steps of the time axis per second of film, for language models with M-RoPE."""
        return 1

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """Target (height, width) in pixels: always the square."""
        if max(height, width) / min(height, width) > 200:
            raise BadMedia(f"picture of {width} x {height}: sides differ by more than 200 times; crop it first")
        return self.side, self.side

    def grid_for(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Patches before shuffling (time, height, width)."""
        tall, wide = self.size_for(height, width)
        return frames, tall // self.patch, wide // self.patch

    def tokens_for(self, grid: tuple[int, int, int]) -> int:
        """Language positions one picture or film takes."""
        return grid[0] * grid[1] * grid[2] // self.shuffle**2


def _tag(default: str) -> Discriminator:
    """Chooses a section by its `type`; `default` where none is given."""

    def choose(section: Any) -> str:
        kind = section.get("type", default) if isinstance(section, dict) else getattr(section, "type", default)
        return "outside" if ":" in str(kind) else str(kind)

    return Discriminator(choose)


AnyVision = Annotated[
    Annotated[VisionConfig, Tag("qwen2_5_vl")] | Annotated[InternViTConfig, Tag("internvit")], _tag("qwen2_5_vl")
]


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

    @property
    def state_rate_hz(self) -> float:
        """States per second of sound."""
        return 100 / math.prod(self.conv_strides)


class OutsideEncoder(Strict):
    """An audio encoder from outside this package: `type: my_package.my_module:MyEncoder`, an installed `nn.Module`.

    The class is made as MyEncoder(num_mels, width, **settings); its forward(mel [X, F, L], lengths [X]) gives states
    [X, L2, E], and its static frames_for(mel_frames, **settings) says how many of them a window of that many mel
    frames (10 ms each) has. Nothing is ever imported from a model folder.
    """

    type: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    num_mels: Count = 128
    width: Count  # of the states it gives
    settings: dict[str, Any] = Field(default_factory=dict)
    window_seconds: Annotated[float, Field(ge=0.5)] = 30.0
    pad_to_window: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "OutsideEncoder":
        made = self.resolve()
        for name in ("forward", "frames_for"):
            if not callable(getattr(made, name, None)):
                raise ValueError(f"{self.type} has no {name}(); an audio encoder needs forward and a static frames_for")
        try:
            frames = [self.frames_for(n) for n in (10, 100, round(self.window_seconds * 100))]
        except Exception as error:
            raise ValueError(f"{self.type}.frames_for fails with settings {self.settings}: {error!r}") from None
        if not all(type(n) is int and n > 0 for n in frames):
            raise ValueError(f"{self.type}.frames_for must give a positive int, given {frames[0]!r}")
        return self

    def resolve(self) -> Any:
        """The class. Raises ValueError for a name that leads to no installed nn.Module."""
        module, _, name = self.type.partition(":")
        try:
            made = getattr(importlib.import_module(module), name, None)
        except ImportError as error:
            raise ValueError(
                f"{module!r} cannot be imported ({error}); install the package that holds {name}"
            ) from None
        # Whatever a recipe names will be called: only a class made to be a part of a model is acceptable.
        if not (isinstance(made, type) and any(base.__module__ == "torch.nn.modules.module" for base in made.__mro__)):
            raise ValueError(f"{self.type} is no torch.nn.Module class of that module; name one")
        return made

    def frames_for(self, mel_frames: int) -> int:
        """Encoder states for mel_frames of 10 ms."""
        frames: int = self.resolve().frames_for(mel_frames, **self.settings)
        return frames

    @property
    def state_rate_hz(self) -> float:
        """States per second of sound."""
        return self.frames_for(round(self.window_seconds * 100)) / self.window_seconds


AnyEncoder = Annotated[
    Annotated[EncoderConfig, Tag("whisper")] | Annotated[OutsideEncoder, Tag("outside")], _tag("whisper")
]


class AdapterConfig(Strict):
    """Two-layer audio adapter whose first layer concatenates `stack` states (Nexus 3.1)."""

    type: Literal["concat_mlp"] = "concat_mlp"
    stack: Count = 5
    width: Count


class HearingConfig(Strict):
    """Audio encoder and adapter."""

    encoder: AnyEncoder
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
        return self.encoder.state_rate_hz / self.adapter.stack


class VoiceConfig(Strict):
    """Autoregressive decoder of delayed codebooks, fused with language states (Nexus 3.1, MusicGen's delay).

    With one book there is no delay (CosyVoice 2's tokens). `norm`, `feed_forward`, `positions` and the fusions `sum`
    and `codes` make the decoder MusicGen's, for comparison. Four switches are the points the paper leaves open:
    conditioning  clock: a token's state is held for frames_per_character x (letters + 1) frames;
                  hold: one state per frame, then the last one; last: the last state at every frame.
    fusion        mean9: mean of the eight code vectors and the state; half: mean of codes and state;
                  sum: sum of codes and state; codes: sum of the codes alone, no state.
    states        post: the state at the token's own position; pre: the one that predicted it.
    source        state, or state+embedding (the token's input embedding is added).
    And one is ours:
    spelling      whether a frame is also told on which letter of its token it stands under the clock.
    """

    type: Literal["delayed"] = "delayed"
    width: Count
    layers: Count = 6
    heads: Count
    ffn_width: Count
    norm: Literal["rms", "layer"] = "rms"
    feed_forward: Literal["gated", "gelu"] = "gated"
    positions: Literal["rope", "sinusoidal"] = "rope"
    books: Count = 8
    book_size: Count
    conditioning: Literal["clock", "hold", "last"] = "clock"
    frames_per_character: Positive = 1.3
    fusion: Literal["mean9", "half", "sum", "codes"] = "mean9"
    states: Literal["post", "pre"] = "post"
    source: Literal["state", "state+embedding"] = "state+embedding"
    spelling: bool = False
    book_weights: tuple[float, ...] | None = None  # loss weight per book; None: all equal
    max_seconds: Positive = 60.0
    greedy_books: Natural | None = None  # books decoded greedily, the rest sampled at `temperature`; None: all
    temperature: Positive = 0.5

    @model_validator(mode="after")
    def _fits(self) -> "VoiceConfig":
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must divide by heads {self.heads} into even head widths")
        if self.spelling and (self.conditioning != "clock" or self.fusion == "codes"):
            raise ValueError(
                f"spelling needs conditioning clock and a fusion with states, given {self.conditioning} and "
                f"{self.fusion}; take spelling: false"
            )
        if self.book_weights is not None and len(self.book_weights) != self.books:
            raise ValueError(f"book_weights has {len(self.book_weights)} entries for {self.books} books")
        return self


class RVQConfig(Strict):
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


class FireFlyConfig(Strict):
    """FireFly GAN of fish-speech 1.4: finite scalar quantisation in groups, one book per group.

    The defaults are the released codec: 44.1 kHz, 8 books of 1000, 21.5 frames a second.
    """

    type: Literal["firefly"]
    rate_hz: Count = 44_100
    num_fft: Count = 2048
    hop: Count = 512
    num_mels: Count = 160
    depths: tuple[Count, ...] = (3, 3, 9, 3)  # ConvNeXt blocks per stage of the backbone
    widths: tuple[Count, ...] = (128, 256, 384, 512)
    downsample: tuple[Count, ...] = (2, 2)
    books: Count = 8
    levels: tuple[Count, ...] = (8, 5, 5, 5)
    upsample_rates: tuple[Count, ...] = (8, 8, 2, 2, 2)
    upsample_kernels: tuple[Count, ...] = (16, 16, 4, 4, 4)
    upsample_width: Count = 512  # halved at each upsampling stage, rounding down
    residual_kernels: tuple[Count, ...] = (3, 7, 11)
    residual_dilations: tuple[Count, ...] = (1, 3, 5)

    @model_validator(mode="after")
    def _fits(self) -> "FireFlyConfig":
        if len(self.depths) != len(self.widths):
            raise ValueError(f"depths has {len(self.depths)} entries, widths {len(self.widths)}; they go in pairs")
        if len(self.upsample_rates) != len(self.upsample_kernels):
            raise ValueError("upsample_rates and upsample_kernels go in pairs")
        if math.prod(self.upsample_rates) != self.hop:
            raise ValueError(f"upsample_rates multiply to {math.prod(self.upsample_rates)}, hop is {self.hop}")
        if self.widths[-1] % self.books:
            raise ValueError(f"the last width {self.widths[-1]} must divide by books {self.books}")
        if self.upsample_width >> len(self.upsample_rates) < 1:
            raise ValueError(f"upsample_width {self.upsample_width} cannot be halved {len(self.upsample_rates)} times")
        return self

    @property
    def book_size(self) -> int:
        return math.prod(self.levels)

    @property
    def samples_per_frame(self) -> int:
        return self.hop * math.prod(self.downsample)

    @property
    def frame_rate_hz(self) -> float:
        return self.rate_hz / self.samples_per_frame


class CosyVoice2Config(Strict):
    """The speech tokens of CosyVoice 2: one book of 3^8 entries at 25 a second. Their vocoder runs elsewhere and is
    handed to whoever speaks (`nexus.load(folder, vocoder=...)`)."""

    type: Literal["cosyvoice2"]
    rate_hz: Count = 24_000
    samples_per_frame: Count = 960
    books: Literal[1] = 1
    book_size: Count = 6561

    @property
    def frame_rate_hz(self) -> float:
        return self.rate_hz / self.samples_per_frame


AnyCodec = Annotated[
    Annotated[RVQConfig, Tag("rvq")]
    | Annotated[FireFlyConfig, Tag("firefly")]
    | Annotated[CosyVoice2Config, Tag("cosyvoice2")],
    _tag("rvq"),
]


class ModelConfig(Strict):
    """The four organs and the codec; written into every model folder as config.json."""

    language: LanguageConfig
    vision: AnyVision | None = None
    hearing: HearingConfig | None = None
    voice: VoiceConfig | None = None
    codec: AnyCodec | None = None

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
