"""The values that pass between the rooms of the house, and the one shape legend.

Shape legend, used everywhere:
    B rows, T language positions, D language width, V vocabulary, N media items, M packed media tokens,
    F mel bins, L mel frames, P picture patches, K codebooks, S speech frames, C codes per book,
    W samples of waveform, Z letters of a token.

A training row, a prompt, a test item and an alignment probe are all `Sample`s. Nothing here imports torch:
tensors appear only in annotations.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["system", "user", "assistant"]
MediaKind = Literal["audio", "image", "video"]
IGNORE = -100  # label of a position that carries no loss
LETTERS = 24  # of a token that the voice is told; what is longer is cut there


@dataclass(frozen=True)
class Text:
    """Words. `aloud` marks words to be spoken: they are rendered between the audio markers
    (Nexus, appendix A, Speech Synthesis)."""

    text: str
    aloud: bool = False


@dataclass(frozen=True, eq=False)
class Audio:
    """Mono sound: a file not read yet (`path`), or `samples` f32 [W] within -1..1 at `rate_hz`."""

    path: Path | None = None
    samples: np.ndarray | None = None
    rate_hz: int = 0

    @property
    def seconds(self) -> float:
        """Duration of loaded sound."""
        assert self.samples is not None, "sound is not loaded"
        return len(self.samples) / self.rate_hz


@dataclass(frozen=True, eq=False)
class Image:
    """A picture: a file not read yet (`path`), or `pixels` u8 [H, W, 3] (RGB)."""

    path: Path | None = None
    pixels: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Video:
    """A film: a file not read yet (`path`), or `frames` u8 [N, H, W, 3] (RGB) sampled at `fps`."""

    path: Path | None = None
    frames: np.ndarray | None = None
    fps: float = 0.0


Part = Text | Audio | Image | Video


@dataclass(frozen=True)
class Turn:
    """One speaker's contribution: ordered parts."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Sample:
    """A conversation with an identity. `meta` is JSON-like and never read by the model."""

    id: str
    task: str
    turns: tuple[Turn, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """Where one media item sits in the token sequence of `row`: positions start .. start+length-1.

    `item` indexes the media of its kind within the batch, `grid` is (frames, height, width) in patches
    before merging for pictures and films, None for sound.
    """

    kind: MediaKind
    row: int
    start: int
    length: int
    item: int
    grid: tuple[int, int, int] | None = None
    seconds_per_grid: float = 1.0


@dataclass(frozen=True)
class Encoded:
    """Media as language embeddings: `embeds` [M, D] packed, `lengths` tokens per item; they sum to M."""

    embeds: "Tensor"
    lengths: Sequence[int]


@dataclass(frozen=True)
class Sound:
    """Sound of N items cut into X windows: `mel` [X, F, L] zero-padded, `lengths` [X] valid mel frames per window,
    `windows` how many windows each item has."""

    mel: "Tensor"
    lengths: "Tensor"
    windows: Sequence[int]


@dataclass(frozen=True)
class Sight:
    """Pictures and films of N items: `rows` [P, E] patch rows packed, `grids` [N, 3] patches in time, height, width."""

    rows: "Tensor"
    grids: "Tensor"


@dataclass(frozen=True)
class Batch:
    """Rendered conversations side by side: `tokens`, `labels` (aligned with tokens, IGNORE elsewhere) i64 [B, T],
    `mask` bool [B, T] true on real positions, and the media their spans refer to."""

    tokens: "Tensor"
    labels: "Tensor"
    mask: "Tensor"
    spans: Sequence[Span]
    sound: Sound | None = None
    sight: Sight | None = None


@dataclass(frozen=True)
class Script:
    """What is to be said, padded: language states and input embeddings [B, N, D] of the spoken tokens, the letters of
    each [B, N, LETTERS] as numbers 1..255 with zeros behind them, and `lengths` [B] tokens per row."""

    states: "Tensor"
    embeds: "Tensor"
    letters: "Tensor"
    lengths: "Tensor"


@dataclass(frozen=True)
class SpeechBatch:
    """Speech to learn: a script and its codes i64 [B, K, S], padded, with `lengths` [B] frames per row.

    `previous` are the codes that the decoder is shown as its own past, where these differ from `codes`.
    """

    script: Script
    codes: "Tensor"
    lengths: "Tensor"
    previous: "Tensor | None" = None


@dataclass(frozen=True)
class Delta:
    """A piece of an answer: new `text` and, or, new sound `pcm` f32 [W] at the voice's rate. `cut` says, in the last
    piece, at which limit the answer was stopped; empty when it ended by itself."""

    text: str = ""
    pcm: np.ndarray | None = None
    cut: str = ""


class Responder(Protocol):
    """Anything that answers conversations with a stream of text and sound."""

    def respond(self, turns: Sequence[Turn], **options: Any) -> Iterator[Delta]: ...
