"""Rows of different lengths laid end to end, so that no layer computes padding.

A padded batch [B, T] becomes packs [G, L] of whole rows, each of which sees only itself. What all rows begin with (the
system prompt) is laid once into every pack and seen by all rows of it: under a causal mask its states are the same
whoever follows. Outputs and gradients are those of the padded batch (`tests/test_packing.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

# Lengths of packs are multiples of this. In bfloat16 on a CPU every product of a new shape is compiled when it is first
# met, 4 to 6 ms each: with lengths as they come that was a fifth of a training step of the tiny system.
GRAIN = 64
# No pack is longer than the longest row or this: attention's memory grows with a pack's length, and a plan of memory
# that was made for padded rows must stay an upper bound.
SHORT = 256
PREFIX, UNUSED = -1, -2


@dataclass(frozen=True)
class Packing:
    """Where every position of a padded batch lies, and what of it a pack shows.

    `source` is the flat position (row x T + t) shown at each place of a pack, `segment` the row it belongs to, PREFIX
    or UNUSED; `place` the flat place in the packs of each padded position (0 for padding: any state will do).
    """

    source: Int[Tensor, "G L"]
    segment: Int[Tensor, "G L"]
    place: Int[Tensor, "B T"]

    def pack(self, padded: Shaped[Tensor, "B T *D"]) -> Shaped[Tensor, "G L *D"]:
        """Rows to packs; unused places show the first position of the batch."""
        flat = padded.flatten(0, 1).index_select(0, self.source.flatten().to(padded.device))
        return flat.unflatten(0, self.source.shape)

    def unpack(self, packed: Shaped[Tensor, "G L *D"]) -> Shaped[Tensor, "B T *D"]:
        """Packs to rows; padding shows the first place of the packs."""
        flat = packed.flatten(0, 1).index_select(0, self.place.flatten().to(packed.device))
        return flat.unflatten(0, self.place.shape)

    def sees(self, causal: bool) -> Bool[Tensor, "G 1 L L"]:
        """Which place (third axis) sees which (fourth): those of its own row and of the prefix, if `causal` none that
        come later. Unused places see each other, so that every softmax has something to share out."""
        asks, told = self.segment[:, :, None], self.segment[:, None]
        seen = (asks == told) | ((told == PREFIX) & (asks != UNUSED))
        return (seen.tril() if causal else seen)[:, None]

    def bias(self, causal: bool, like: Tensor) -> Float[Tensor, "G 1 L L"]:
        """`sees` as what is added to attention scores, on the device and in the type of `like`."""
        hidden = ~self.sees(causal).to(like.device)
        zeros = torch.zeros(hidden.shape, device=like.device, dtype=like.dtype)
        return zeros.masked_fill(hidden, torch.finfo(like.dtype).min)


def packed(lengths: Sequence[int], longest: int, width: int, shared: int = 0) -> Packing | None:
    """How to pack rows of these lengths, of which the first `shared` positions are the same, from a batch padded to
    `longest`; None where that saves nothing. `width` is that of the layers: it says what attention costs beside them.
    """
    rest = [length - shared for length in lengths]
    if not max(rest):
        return None
    order = sorted(range(len(rest)), key=lambda row: -rest[row])
    tried = []
    least, most = shared + max(rest), max(longest, SHORT)
    for size in range(min(least + -least % GRAIN, most), most + 1, GRAIN):
        packs = _first_fit(order, rest, size - shared)
        tried.append((len(packs) * _cost(size, width), size, packs))
    cost, size, packs = min(tried, key=lambda one: one[0])
    if cost >= len(lengths) * _cost(longest, width):
        return None
    return _laid(packs, size, lengths, longest, shared)


def _cost(length: int, width: int) -> float:
    """Of one pack: products grow with its length, attention with the square. Where a pack is twice as long as the
    layers are wide, attention written out costs about as much as the products: an estimate, from their shares of a
    step at width 256."""
    return length * (1 + length / (2 * width))


def _first_fit(order: Sequence[int], sizes: Sequence[int], room: int) -> list[list[int]]:
    """Rows into packs of `room`, the longest first, each into the first pack that has room."""
    packs: list[list[int]] = []
    left: list[int] = []
    for row in order:
        found = next((pack for pack, free in enumerate(left) if free >= sizes[row]), None)
        if found is None:
            packs.append([])
            left.append(room)
            found = len(packs) - 1
        packs[found].append(row)
        left[found] -= sizes[row]
    return packs


def _laid(packs: Sequence[Sequence[int]], size: int, lengths: Sequence[int], longest: int, shared: int) -> Packing:
    source = torch.zeros(len(packs), size, dtype=torch.long)
    segment = torch.full((len(packs), size), UNUSED)
    place = torch.zeros(len(lengths), longest, dtype=torch.long)
    for number, pack in enumerate(packs):
        source[number, :shared] = torch.arange(shared) + pack[0] * longest
        segment[number, :shared] = PREFIX
        at = shared
        for row in pack:
            end = at + lengths[row] - shared
            source[number, at:end] = torch.arange(shared, lengths[row]) + row * longest
            segment[number, at:end] = row
            place[row, :shared] = torch.arange(shared) + number * size
            place[row, shared : lengths[row]] = torch.arange(at, end) + number * size
            at = end
    return Packing(source, segment, place)
