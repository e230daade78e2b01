"""What a micro-batch holds, and how ranks whose batches hold different media take the same steps.

Where weights lie in shards, every rank must run every layer that any rank runs, or the others wait for ever. All ranks
agree on the media of a micro-batch; a rank that lacks one gets a row with the smallest item of it and no label. Its
organ runs and gets gradients that are exactly zero.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace

import numpy as np
from torch import Tensor, nn

from nexus.data.collate import sight, sound
from nexus.errors import BadRecord
from nexus.organs import ModelConfig
from nexus.train.parallel import Ranks
from nexus.types import IGNORE, Audio, Batch, Image, Span, SpeechBatch

SMALLEST_SOUND = 1600  # samples at 16 kHz
SMALLEST_SIDE = 28  # pixels; made larger by the vision section's own rule


@dataclass(frozen=True)
class Load:
    """Counts of one micro-batch, or sums over ranks: labels that carry loss, rows, language positions and audio frames
    with and without padding (codec frames in batches of speech), and how many batches hold sound, pictures, and
    prepared speech."""

    labels: int = 0
    rows: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    audio_frames: int = 0
    padded_audio_frames: int = 0
    sound: int = 0
    sight: int = 0
    speech: int = 0


def weigh(batch: Batch | SpeechBatch) -> Load:
    """Counts of a batch. Raises BadRecord for a batch without any label: nothing can be learned from it."""
    if isinstance(batch, SpeechBatch):
        frames, books = int(batch.lengths.sum()), batch.codes.shape[1]
        load = Load(
            labels=(frames + len(batch.lengths)) * books,  # every book ends once
            rows=len(batch.lengths),
            tokens=int(batch.script.lengths.sum()),
            padded_tokens=batch.script.letters.shape[:2].numel(),
            audio_frames=frames,
            padded_audio_frames=batch.codes.shape[0] * batch.codes.shape[2],
            speech=1,
        )
    else:
        heard = batch.sound
        load = Load(
            labels=int((batch.labels[:, 1:] != IGNORE).sum()),
            rows=len(batch.tokens),
            tokens=int(batch.mask.sum()),
            padded_tokens=batch.mask.numel(),
            audio_frames=0 if heard is None else int(heard.lengths.sum()),
            padded_audio_frames=0 if heard is None else heard.mel.shape[0] * heard.mel.shape[2],
            sound=int(heard is not None),
            sight=int(batch.sight is not None),
        )
    if not load.labels:
        raise BadRecord(
            f"a batch of {load.rows} rows holds no label, expected the text of an assistant's turn in every row; run "
            "nexus data check on the file"
        )
    return load


def agree(loads: Sequence[Load], ranks: Ranks) -> list[Load]:
    """The loads of a step's micro-batches, summed over ranks: one exchange for all of them."""
    width = len(fields(Load))
    sums = [round(x) for x in ranks.sum([float(x) for load in loads for x in astuple(load)])]
    return [Load(*sums[at : at + width]) for at in range(0, len(sums), width)]


def total(loads: Sequence[Load]) -> Load:
    """The sum of loads."""
    return Load(*(sum(column) for column in zip(*(astuple(load) for load in loads), strict=True)))


def complete(batch: Batch, together: Load, config: ModelConfig) -> Batch:
    """`batch` with a row of what other ranks have and it lacks, or itself where it lacks nothing."""
    spans: list[Span] = []
    heard, seen, at = batch.sound, batch.sight, 0
    row = len(batch.tokens)
    if together.sound and heard is None:
        assert config.hearing is not None, "sound for a model without hearing"
        heard = sound([Audio(samples=np.zeros(SMALLEST_SOUND, np.float32), rate_hz=16_000)], config.hearing)
        length = config.hearing.tokens_for(SMALLEST_SOUND)
        spans.append(Span("audio", row, at, length, 0))
        at += length
    if together.sight and seen is None:
        assert config.vision is not None, "pictures for a model without vision"
        seen = sight([Image(pixels=np.zeros((SMALLEST_SIDE, SMALLEST_SIDE, 3), np.uint8))], config.vision)
        grid = config.vision.grid_for(1, SMALLEST_SIDE, SMALLEST_SIDE)
        length = config.vision.tokens_for(grid)
        spans.append(Span("image", row, at, length, 0, grid))
        at += length
    if not spans:
        return batch
    return replace(
        batch,
        tokens=_with_row(batch.tokens, 0, at, 0),
        labels=_with_row(batch.labels, IGNORE, at, IGNORE),
        mask=_with_row(batch.mask, False, at, True),
        spans=[*batch.spans, *spans],
        sound=heard,
        sight=seen,
    )


def _with_row(table: Tensor, beyond: int | bool, length: int, inside: int | bool) -> Tensor:
    """A row [B, T] -> [B + 1, T'] whose first `length` entries are `inside`; all else that is new is `beyond`."""
    grown = nn.functional.pad(table, (0, max(0, length - table.shape[1]), 0, 1), value=beyond)
    grown[-1, :length] = inside
    return grown


def shares(loads: Sequence[Load], whole: Sequence[Load]) -> list[float]:
    """Weight of each micro-batch's mean loss in the mean over all labels of all ranks and micro-batches of a step."""
    everything = total(whole).labels
    return [load.labels / everything for load in loads]


def padding_shares(load: Load) -> dict[str, float]:
    """Shares of language positions and audio frames that are padding, 0..1."""
    return {
        "token_padding": 1 - load.tokens / load.padded_tokens if load.padded_tokens else 0.0,
        "audio_padding": 1 - load.audio_frames / load.padded_audio_frames if load.padded_audio_frames else 0.0,
    }
