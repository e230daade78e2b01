"""The voice's blocks as they run when it speaks: frozen weights, one position of some rows at a time.

The same equations as `DelayedVoice.logits` (a test holds them equal), arranged for speed: one matrix for queries, keys
and values and one for gate and up, the fusion's factors folded into the tables, slices instead of gathering while
all rows are at one step, no question to the device. Keys and values are float32 on a CPU, whatever the weights
are: products of two small bfloat16 matrices are up to twenty times slower there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nexus.model.fused import RMSNorm
from nexus.model.layers import Block, rotary, sinusoids
from nexus.model.voice.matrices import Matrix
from nexus.organs import VoiceConfig

Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Layer:
    """One block; `up` makes gate and up side by side where the feed-forward is gated."""

    attention_norm: Norm
    query_key_value: Matrix
    out: Matrix
    ffn_norm: Norm
    up: Matrix
    down: Matrix


class Decoder:
    """Frozen weights of one voice. Holds no state of any row."""

    def __init__(
        self,
        config: VoiceConfig,
        blocks: Sequence[Block],
        norm: nn.Module,
        heads: Tensor,
        matrix: Callable[[Tensor], Matrix],
        dtype: torch.dtype,
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, heads.device
        self._memory_dtype = torch.float32 if heads.device.type == "cpu" else dtype
        self._layers = [_freeze(block, matrix, dtype) for block in blocks]
        self._norm, self._heads = _freeze_norm(norm, dtype), matrix(heads.detach())
        self._gated = config.feed_forward == "gated"
        self._table = torch.empty(0)  # one row per position, made as far as a memory reaches

    def memory(self, rows: int, capacity: int = 16) -> Float[Tensor, "L 2 B H T d"]:
        """Empty keys and values for `rows` rows and `capacity` steps."""
        heads = self.config.heads
        shape = (self.config.layers, 2, rows, heads, capacity, self.config.width // heads)
        return torch.zeros(shape, dtype=self._memory_dtype, device=self.device)

    def grown(self, memory: Float[Tensor, "L 2 B H T d"]) -> Float[Tensor, "L 2 B H T2 d"]:
        """The same memory with room for a quarter more steps, at least 16.

        Little room to spare is fast: what is read in a step then lies nearly without gaps.
        """
        return nn.functional.pad(memory, (0, 0, 0, max(16, memory.shape[4] // 4)))

    def scores(
        self,
        x: Float[Tensor, "R W"],
        memory: Float[Tensor, "L 2 B H T d"],
        rows: Sequence[int],
        at: Sequence[int],
    ) -> Float[Tensor, "R K C2"]:
        """Scores of the column at step `at[i]` of row `rows[i]`, whose input is x[i]; its keys and values are kept.

        The memory must have room for the largest step.
        """
        self._reach(memory.shape[4])
        if len(set(at)) == 1 and list(rows) == list(range(memory.shape[2])):
            return self._run(x, _Together(memory, at[0]), self._table[at[0]])
        where = torch.tensor(at, device=self.device)
        seen = _Apart(memory, torch.tensor(rows, device=self.device), where, max(at) + 1)
        return self._run(x, seen, self._table[where])

    def scores_anywhere(
        self, x: Float[Tensor, "B W"], memory: Float[Tensor, "L 2 B H T d"], at: Int[Tensor, "B"]
    ) -> Float[Tensor, "B K C2"]:
        """`scores` of all rows with steps that only the device knows: every call does the same work on the whole
        memory, which is what a CUDA graph can record."""
        self._reach(memory.shape[4])
        return self._run(x, _Apart(memory, None, at, memory.shape[4]), self._table[at])

    def products(self, rows: int) -> list[Callable[[], Tensor]]:
        """The products of one step alone, called as a step calls them on inputs that are there already."""
        narrow = torch.randn(rows, self.config.width, device=self.device).to(self.dtype)
        wide = torch.randn(rows, self.config.ffn_width, device=self.device).to(self.dtype)
        calls: list[Callable[[], Tensor]] = []
        for layer in self._layers:
            up, out, down = layer.up, layer.out, layer.down
            calls += [
                partial(layer.query_key_value, narrow),
                partial(out.plus, narrow, narrow) if out.fuses else partial(out, narrow),
                partial(up.gelu, narrow) if up.fuses and not self._gated else partial(up, narrow),
                partial(down.plus, wide, narrow) if down.fuses else partial(down, wide),
            ]
        return [*calls, partial(self._heads, narrow)]

    def _reach(self, steps: int) -> None:
        """Positions for all steps of the memory: [T, 2, d] cosines and sines, or [T, W] to be added."""
        if len(self._table) >= steps:
            return
        width = self.config.width
        if self.config.positions == "sinusoidal":
            self._table = sinusoids(torch.arange(steps, device=self.device), width).to(self.dtype)
            return
        cosines, sines = rotary(torch.arange(steps, device=self.device)[None], width // self.config.heads)
        left, right = sines.chunk(2, dim=-1)
        # With the sign in the sines, turning is a product with x and one with x rolled by half its width.
        self._table = torch.stack([cosines[0, 0], torch.cat([-left, right], dim=-1)[0, 0]], dim=1)

    def _run(self, x: Tensor, seen: "_Together | _Apart", where: Tensor) -> Tensor:
        # At width 256 a tenth of a step is Python: views are few, and nothing is converted that need not be.
        rows, width = x.shape
        heads, convert = self.config.heads, self.dtype != self._memory_dtype
        each = width // heads
        turns = None
        if self.config.positions == "sinusoidal":
            x = x + where
        else:
            turns = where.view(-1, 2, 1, 1, each).unbind(1)  # [1 or R, 1, 1, d] each
        for number, layer in enumerate(self._layers):
            mixed = layer.query_key_value(layer.attention_norm(x)).view(rows, 3, heads, each)
            if convert:
                mixed = mixed.to(self._memory_dtype)
            if turns is not None:
                both = mixed[:, :2]
                torch.addcmul(both * turns[0], both.roll(each // 2, -1), turns[1], out=both)
            mixed = mixed.transpose(0, 1)
            keys, values = seen.remember(number, mixed[1:])
            scores = torch.bmm(mixed[0].reshape(-1, 1, each), keys)
            if seen.bias is not None:
                scores += seen.bias
            heard = torch.bmm(scores.softmax(-1), values).view(rows, width)
            x = layer.out.plus(heard.to(self.dtype) if convert else heard, x)
            if self._gated:
                gate, up = layer.up(layer.ffn_norm(x)).chunk(2, dim=-1)
                inner = nn.functional.silu(gate) * up
            else:
                inner = layer.up.gelu(layer.ffn_norm(x))
            x = layer.down.plus(inner, x)
        return self._heads(self._norm(x)).view(rows, self.config.books, -1).float()


class _Together:
    """The memory of all rows at one and the same step: views, nothing is copied and nothing hidden."""

    bias = None

    def __init__(self, memory: Tensor, at: int) -> None:
        self._slots = memory.select(4, at).unbind(0)  # [2, B, H, d] per layer
        keys, values = memory.narrow(4, 0, at + 1).flatten(2, 3).unbind(1)
        self._keys, self._values = keys.transpose(2, 3).unbind(0), values.unbind(0)

    def remember(self, layer: int, fresh: Tensor) -> tuple[Tensor, Tensor]:
        """Store [2, R, H, d]; all keys [R x H, d, T] and all values [R x H, T, d] of a layer."""
        self._slots[layer].copy_(fresh)
        return self._keys[layer], self._values[layer]


class _Apart:
    """The memory of some rows, each at its own step; what a row has not reached is hidden by the bias."""

    def __init__(self, memory: Tensor, rows: Tensor | None, at: Tensor, longest: int) -> None:
        everyone = torch.arange(memory.shape[2], device=at.device)
        self._memory, self._rows, self._at, self._longest = memory, rows, at, longest
        self._slots = everyone if rows is None else rows
        hidden = torch.arange(longest, device=at.device) > at[:, None]
        bias = torch.zeros(hidden.shape, dtype=memory.dtype, device=at.device).masked_fill(hidden, float("-inf"))
        self.bias: Tensor | None = bias.repeat_interleave(memory.shape[3], dim=0)[:, None]  # [R x H, 1, T]

    def remember(self, layer: int, fresh: Tensor) -> tuple[Tensor, Tensor]:
        """Store [2, R, H, d]; the keys [R x H, d, T] and the values [R x H, T, d] of these rows."""
        memory = self._memory[layer]
        memory[:, self._slots, :, self._at] = fresh.transpose(0, 1)
        seen = memory[:, :, :, : self._longest]
        if self._rows is not None:
            seen = seen[:, self._rows]
        keys, values = seen.flatten(1, 2).unbind(0)
        return keys.transpose(1, 2), values


def _freeze(block: Block, matrix: Callable[[Tensor], Matrix], dtype: torch.dtype) -> _Layer:
    assert not block.config.bias, "the voice's blocks have no biases"
    scale = (block.config.width // block.config.heads) ** -0.5  # of the attention's scores, here on the queries
    joined = torch.cat([block.query.weight.detach() * scale, block.key.weight.detach(), block.value.weight.detach()])
    up = block.up.weight.detach()
    if block.gate is not None:
        up = torch.cat([block.gate.weight.detach(), up])
    return _Layer(
        _freeze_norm(block.attention_norm, dtype),
        matrix(joined),
        matrix(block.out.weight.detach()),
        _freeze_norm(block.ffn_norm, dtype),
        matrix(up),
        matrix(block.down.weight.detach()),
    )


def _freeze_norm(norm: nn.Module, dtype: torch.dtype) -> Norm:
    assert isinstance(norm, nn.LayerNorm | RMSNorm)
    weight = norm.weight.detach().to(dtype)
    shape, eps = [len(weight)], norm.eps
    if isinstance(norm, RMSNorm):
        return lambda x: torch.rms_norm(x, shape, weight, eps)
    bias = norm.bias.detach().to(dtype)
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps, False)
