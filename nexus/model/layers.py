"""The transformer block shared by hearing and voice: settings instead of variants, state as an explicit value.

With other numbers the same block is Whisper's encoder layer (layer norm, GELU, no rotation, no bias on keys) or a
decoder layer of the voice (RMS norm, gated feed-forward, rotary positions, causal). One position at a time, the voice
runs frozen copies of its blocks (`voice/decoder.py`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nexus.model.fused import RMSNorm, attend, autocast_type


@dataclass(frozen=True)
class BlockConfig:
    """Sizes and choices of one block."""

    width: int
    heads: int
    ffn_width: int
    norm: Literal["layer", "rms"] = "rms"
    feed_forward: Literal["gelu", "gated"] = "gated"
    bias: bool = False  # Whisper: True, except on the keys
    rope: bool = True


def rotary(positions: Int[Tensor, "B T"], head_width: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, T, head_width] of integer positions, in the autocast type where there is one."""
    rates = theta ** (-torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width)
    angles = positions[..., None].float() * rates
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    kind = autocast_type(angles)
    return angles.cos().to(kind), angles.sin().to(kind)


def sinusoids(positions: Int[Tensor, "T"], width: int, theta: float = 10_000.0) -> Float[Tensor, "T W"]:
    """MusicGen's fixed positions: cosines in the first half of the channels, sines in the second."""
    half = width // 2
    step = torch.log(torch.tensor(theta, device=positions.device)) / max(1, half - 1)
    angles = positions[:, None].float() * torch.exp(torch.arange(half, device=positions.device) * -step)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotate(x: Float[Tensor, "B H T d"], cosines: Tensor, sines: Tensor) -> Float[Tensor, "B H T d"]:
    """Apply rotary positions to queries or keys."""
    left, right = x.chunk(2, dim=-1)
    return (x * cosines + torch.cat([-right, left], dim=-1) * sines).to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        norm = nn.LayerNorm if config.norm == "layer" else RMSNorm
        width, bias = config.width, config.bias
        self.attention_norm = norm(width)
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.ffn_norm = norm(width)
        self.up = nn.Linear(width, config.ffn_width, bias=bias)
        self.gate = nn.Linear(width, config.ffn_width, bias=bias) if config.feed_forward == "gated" else None
        self.down = nn.Linear(config.ffn_width, width, bias=bias)

    def _project(self, x: Tensor, turns: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, T, head width], rotated."""
        batch, length, width = x.shape
        heads = self.config.heads
        shape = (batch, length, heads, width // heads)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        if turns is not None:
            q, k = rotate(q, *turns), rotate(k, *turns)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return self.out(attend(q, k, v, bias, q.shape[-1] ** -0.5).transpose(1, 2).flatten(2))

    def _feed(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(nn.functional.gelu(self.up(x)))
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        bias: Float[Tensor, "#B #H #T T"] | None = None,
        turns: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Whole sequences. `bias` is added to the attention scores (0 or -inf), `turns` from `rotary`."""
        assert (turns is not None) == self.config.rope, "a block turns its queries and keys exactly if it has `rope`"
        x = x + self._attend(*self._project(self.attention_norm(x), turns), bias)
        return x + self._feed(self.ffn_norm(x))


def padding_bias(lengths: Int[Tensor, "N"], longest: int) -> Float[Tensor, "N 1 1 T"]:
    """Attention bias that hides positions at and after each row's length."""
    hidden = torch.arange(longest, device=lengths.device) >= lengths[:, None]
    return torch.zeros(hidden.shape, device=lengths.device).masked_fill(hidden, float("-inf"))[:, None, None]


def causal_bias(length: int, device: torch.device | None = None) -> Float[Tensor, "1 1 T T"]:
    """Attention bias that hides the future."""
    return torch.full((length, length), float("-inf"), device=device).triu(1)[None, None]
