"""Rendered rows to a Batch: padding, log-mel windows, patch rows. Knows no model class."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from nexus.data.chat import Rendered
from nexus.mel import log_mel
from nexus.pixels import patches
from nexus.recipe import HearingConfig, ModelConfig, VisionConfig
from nexus.types import IGNORE, Audio, Batch, Image, Sight, Sound, Span, Video


def collate(rows: Sequence[Rendered], pad: int, specs: ModelConfig, side: Literal["left", "right"] = "right") -> Batch:
    """One Batch, padded with token `pad` on the given side (left for generation)."""
    longest = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), IGNORE)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    spans: list[Span] = []
    heard: list[Audio] = []
    seen: list[Image | Video] = []
    for number, row in enumerate(rows):
        start = longest - len(row.tokens) if side == "left" else 0
        here = slice(start, start + len(row.tokens))
        tokens[number, here] = torch.tensor(row.tokens)
        labels[number, here] = torch.tensor(row.labels)
        mask[number, here] = True
        for span, part in zip(row.spans, row.media, strict=True):
            if isinstance(part, Audio):
                item = len(heard)
                heard.append(part)
            else:
                item = len(seen)
                seen.append(part)
            spans.append(replace(span, row=number, start=span.start + start, item=item))
    return Batch(tokens, labels, mask, spans, sound(heard, specs.hearing), sight(seen, specs.vision))


def sound(items: Sequence[Audio], config: HearingConfig | None) -> Sound | None:
    """Log-mel windows of 16 kHz sounds; None for no items."""
    if not items or config is None:
        return None
    windows, mels = [], []
    for item in items:
        assert item.samples is not None
        sizes = config.windows_for(len(item.samples))
        windows.append(len(sizes))
        for piece in torch.as_tensor(item.samples).split(sizes):
            mels.append(log_mel(piece, config.encoder.num_mels))
    lengths = torch.tensor([mel.shape[1] for mel in mels])
    padded = torch.zeros(len(mels), config.encoder.num_mels, int(lengths.max()))
    for row, mel in enumerate(mels):
        padded[row, :, : mel.shape[1]] = mel
    return Sound(padded, lengths, windows)


def sight(items: Sequence[Image | Video], config: VisionConfig | None) -> Sight | None:
    """Patch rows of pictures and films; None for no items."""
    if not items or config is None:
        return None
    rows, grids = [], []
    for item in items:
        frames = item.pixels[None] if isinstance(item, Image) and item.pixels is not None else item.frames  # type: ignore[union-attr]
        row, grid = patches(frames, config)
        rows.append(row)
        grids.append(grid)
    return Sight(torch.cat(rows), torch.tensor(grids))
