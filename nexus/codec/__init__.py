"""Waveform <-> discrete codes. A codec knows no language model, no files and no tokens.

Shapes follow the legend of `nexus.types`: B rows, W samples, K codebooks, S speech frames; lower case `s` and `w`
are the part of S and W that one streaming call carries.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class StreamDecoder(Protocol):
    """One utterance being spoken. All state lives here, none in the codec, so a codec may feed many at once."""

    def push(self, codes: Int[Tensor, "K s"]) -> Float[Tensor, " w"]:
        """The next w = s * samples_per_frame samples: no delay, nothing to flush."""
        ...


@runtime_checkable
class Codec(Protocol):
    """Sound as K parallel streams of `book_size` symbols, `samples_per_frame` samples per symbol at `rate_hz`."""

    @property
    def rate_hz(self) -> int: ...

    @property
    def samples_per_frame(self) -> int: ...

    @property
    def books(self) -> int: ...

    @property
    def book_size(self) -> int: ...

    def encode(self, wave: Float[Tensor, "B 1 W"]) -> Int[Tensor, "B K S"]:
        """Codes 0 .. book_size-1 with S = ceil(W / samples_per_frame); the last frame is padded with zeros."""
        ...

    def decode(self, codes: Int[Tensor, "B K S"]) -> Float[Tensor, "B 1 W"]:
        """W = S * samples_per_frame samples; sample w depends on frames 0 .. w // samples_per_frame alone."""
        ...

    def decoder(self) -> StreamDecoder:
        """A fresh stream; its concatenated pushes equal `decode` within 1e-5."""
        ...
