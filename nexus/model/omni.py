"""OmniModel: four organs and a codec. Media become embeddings, embeddings are spliced into the spans, language reads
them, the voice turns language states into sound. Tensors in, tensors out: it knows no files of data and no texts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nexus.codec import StreamDecoder
from nexus.codec.firefly import FireFlyCodec
from nexus.codec.rvq import RVQCodec
from nexus.errors import Misaligned, NexusError
from nexus.model.hearing import Hearing
from nexus.model.internvit import InternViT
from nexus.model.language import Language
from nexus.model.packing import GRAIN
from nexus.model.vision import Vision
from nexus.model.voice.delayed import DelayedVoice, undelay
from nexus.model.voice.speaking import Speaking
from nexus.organs import CosyVoice2Config, FireFlyConfig, InternViTConfig, ModelConfig, RVQConfig, VisionConfig
from nexus.types import IGNORE, Batch, Encoded, Script, Span, SpeechBatch


def splice(embeds: Float[Tensor, "B T D"], media: Encoded, spans: Sequence[Span], kind: str) -> Float[Tensor, "B T D"]:
    """Place media embeddings at their spans. Raises Misaligned naming the item and both counts."""
    for span in spans:
        if span.length != media.lengths[span.item]:
            raise Misaligned(
                f"{kind} item {span.item}: the prompt holds {span.length} placeholders, the encoder produced "
                f"{media.lengths[span.item]}; was the row rendered with another recipe?"
            )
    if len(spans) != len(media.lengths):
        raise Misaligned(f"{kind}: the prompt has {len(spans)} spans, the encoder got {len(media.lengths)} items")
    rows = torch.cat([torch.full((span.length,), span.row) for span in spans])  # on the CPU, like all that steers
    columns = torch.cat([torch.arange(span.start, span.start + span.length) for span in spans])
    return embeds.index_put((rows.to(embeds.device), columns.to(embeds.device)), media.embeds.to(embeds.dtype))


@dataclass(frozen=True)
class Written:
    """One step of an answer: the new token of each row, the state that predicted it, the state at its own position,
    and which rows are still writing (a row's stop token is its last)."""

    tokens: Int[Tensor, "B"]
    pre: Float[Tensor, "B D"]
    post: Float[Tensor, "B D"]
    active: Bool[Tensor, "B"]


class OmniModel(nn.Module):
    """The model of a recipe. Organs the recipe leaves out are None.

    Batches stay on the CPU: the model takes what it computes with to its own device and leaves there what steers the
    computation (spans, lengths, grids, labels, masks), so that nothing waits for a device to answer.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.language.width
        self.language = Language(config.language)
        self.vision = _vision(config.vision, width) if config.vision else None
        self.hearing = Hearing(config.hearing, width) if config.hearing else None
        self.voice: Speaking | None = DelayedVoice(config.voice, width) if config.voice else None
        self.codec = _codec(config.codec) if config.codec else None

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.language.backbone.embed_tokens.weight.device

    def checkpoint(self, on: bool) -> None:
        """Whether training computes activations again in the backward pass instead of keeping them."""
        self.language.checkpoint(on)
        organs: tuple[Any, ...] = (self.vision, self.hearing.encoder if self.hearing else None)
        for organ in organs:
            if hasattr(organ, "checkpointing"):
                organ.checkpointing = on

    def pack(self, on: bool) -> None:
        """Whether training lays rows, and windows of sound, end to end instead of computing their padding."""
        organs: tuple[Any, ...] = (self.language, self.hearing.encoder if self.hearing else None)
        for organ in organs:
            if hasattr(organ, "packing"):
                organ.packing = on

    def embeds(self, batch: Batch) -> Float[Tensor, "B T D"]:
        """Token embeddings with the media spliced in."""
        x = self.language.embed(batch.tokens.to(self.device))
        if batch.sight is not None:
            assert self.vision is not None, "pictures for a model without vision"
            x = splice(x, self.vision(batch.sight), [s for s in batch.spans if s.kind != "audio"], "vision")
        if batch.sound is not None:
            assert self.hearing is not None, "sound for a model without hearing"
            x = splice(x, self.hearing(batch.sound), [s for s in batch.spans if s.kind == "audio"], "audio")
        return x

    def hidden(self, batch: Batch) -> Float[Tensor, "B T D"]:
        """Last language states of a right-padded batch."""
        positions, _ = self.language.positions(batch.mask, batch.spans, self.config.vision)
        shared = _alike(batch) if self.language.packing else 0
        return self.language.hidden(self.embeds(batch), positions.to(self.device), batch.mask, shared)

    def forward(self, batch: Batch | SpeechBatch) -> dict[str, Float[Tensor, ""]]:
        """Losses by name: `text` for conversations, `speech` for scripts with codes."""
        if isinstance(batch, SpeechBatch):
            assert isinstance(self.voice, DelayedVoice), "speech to learn for a model without a voice that learns"
            previous = None if batch.previous is None else batch.previous.to(self.device)
            codes, lengths = batch.codes.to(self.device), batch.lengths.to(self.device)
            return self.voice.loss(self._for_voice(batch.script), codes, lengths, previous)
        hidden = self.hidden(batch)
        targets = batch.labels[:, 1:]  # the one place where labels are shifted
        rows, columns = (targets != IGNORE).nonzero(as_tuple=True)
        wanted = targets[rows, columns]
        if self.language.packing:  # few shapes, as those of packs are; the first place stands in for what is filled up
            spare = -len(wanted) % GRAIN
            rows, columns = (nn.functional.pad(place, (0, spare)) for place in (rows, columns))
            wanted = nn.functional.pad(wanted, (0, spare), value=IGNORE)
        logits = self.language.logits(hidden[rows, columns])  # only where a label exists: [n, V]
        loss = nn.functional.cross_entropy(logits.float(), wanted.to(logits.device), ignore_index=IGNORE)
        silent = (targets == IGNORE).all(1)
        if bool(silent.any()):  # rows that teach nothing: the organs they run through have a gradient, of zeros
            loss = loss + 0.0 * hidden[silent.to(hidden.device)].float().sum()
        return {"text": loss}

    def _for_voice(self, script: Script) -> Script:
        """A script in the voice's own place and type of numbers."""
        assert isinstance(self.voice, DelayedVoice)
        weight = self.voice.start_vector
        return replace(
            script,
            states=script.states.to(weight),
            embeds=script.embeds.to(weight),
            letters=script.letters.to(weight.device),
            lengths=script.lengths.to(weight.device),
        )

    @torch.no_grad()
    def write(self, batch: Batch, stops: Sequence[int], max_tokens: int, vocabulary: int) -> Iterator[Written]:
        """Greedy answers to left-padded prompts, token by token, until every row has stopped or max_tokens passed.

        A row stops with one of the tokens `stops`. Only the first `vocabulary` entries may be written; the embedding
        table may hold spare rows behind them.
        """
        positions, following = self.language.positions(batch.mask, batch.spans, self.config.vision)
        mask, following = batch.mask.to(self.device), following.to(self.device)
        hidden, state = self.language.start(self.embeds(batch), positions.to(self.device), mask, following)
        pre, ends = hidden[:, -1], torch.tensor(stops, device=hidden.device)
        active = torch.ones(len(pre), dtype=torch.bool, device=pre.device)
        for _ in range(max_tokens):
            tokens = torch.where(active, self.language.logits(pre)[:, :vocabulary].argmax(-1), stops[0])
            post = self.language.step(state, tokens)
            yield Written(tokens, pre, post, active)
            active = active & ~torch.isin(tokens, ends)
            if not bool(active.any()):
                return
            pre = post

    @torch.no_grad()
    def spoken_states(self, batch: Batch, spoken: Sequence[Sequence[int]]) -> list[Float[Tensor, "N D"]]:
        """States of the spoken tokens of each row, at their own position or the one before (`voice.states`)."""
        assert self.config.voice is not None
        back = 1 if self.config.voice.states == "pre" else 0
        hidden = self.hidden(batch)
        return [hidden[row, torch.tensor(at, dtype=torch.long) - back] for row, at in enumerate(spoken)]

    def speaker(
        self, rows: int, max_seconds: float | None = None, vocoder: Callable[[], StreamDecoder] | None = None
    ) -> "Speaker":
        """Something that says scripts aloud, row by row; each row ends at max_seconds (default: the voice's limit).

        `vocoder` gives the decoder of each row, where the codec's own does not live here.
        """
        return Speaker(self, rows, max_seconds, vocoder)


class Speaker:
    """Voice and codec joined: language states in, sound out, every row at its own pace."""

    def __init__(
        self,
        model: OmniModel,
        rows: int,
        max_seconds: float | None,
        vocoder: Callable[[], StreamDecoder] | None,
    ) -> None:
        codec = model.config.codec
        assert model.voice is not None and codec is not None, "this model has no voice"
        if vocoder is None:
            if model.codec is None:
                raise NexusError(
                    f"this model's speech tokens ({codec.type}) become sound elsewhere: give a vocoder "
                    "(nexus.load(folder, vocoder=...), nexus chat --vocoder URL)"
                )
            vocoder = model.codec.decoder
        self._voice = model.voice
        self._state = model.voice.start(rows)
        self._decoders = [vocoder() for _ in range(rows)]
        self._columns: list[list[Tensor]] = [[] for _ in range(rows)]
        self._sent = [0] * rows
        seconds = model.voice.config.max_seconds if max_seconds is None else max_seconds
        self._limit = round(seconds * codec.frame_rate_hz)

    def say(
        self, row: int, states: Float[Tensor, "N D"], embeds: Float[Tensor, "N D"], letters: Int[Tensor, "N Z"]
    ) -> None:
        """More tokens for a row; `letters` as in `Script`."""
        with torch.no_grad():
            self._voice.hear(self._state, row, states, embeds, letters)

    def end(self, row: int) -> None:
        """No more tokens will come for a row."""
        self._voice.end(self._state, row)

    def done(self, row: int) -> bool:
        """Whether a row has said everything."""
        return self._voice.is_done(self._state, row)

    def over_limit(self, row: int) -> bool:
        """Whether a row has reached its limit in seconds without ending."""
        return self._voice.frames(self._state, row) >= self._limit

    def step(self) -> bool:
        """One frame for every row that can speak now; False when there is none."""
        rows = [r for r in range(len(self._sent)) if self._voice.ready(self._state, r) and not self.over_limit(r)]
        if not rows:
            return False
        for row, column in zip(rows, self._voice.step(self._state, rows), strict=True):
            self._columns[row].append(column)
        return True

    def codes(self, row: int) -> Int[Tensor, "K S"]:
        """All complete frames of a row so far."""
        frames, books = self._voice.frames(self._state, row), self._voice.config.books
        if not frames:
            return torch.zeros(books, 0, dtype=torch.long)
        delayed = torch.stack(self._columns[row][: frames + books - 1], dim=1)
        return undelay(nn.functional.pad(delayed, (0, 1))[None])[0]  # the column in which the first book would end

    @torch.no_grad()
    def sound(self, row: int) -> Float[Tensor, "W"]:
        """The sound of the frames completed since the last call (samples at the codec's rate)."""
        codes = self.codes(row)[:, self._sent[row] :]
        self._sent[row] += codes.shape[1]
        if not codes.shape[1]:
            return torch.zeros(0)
        return self._decoders[row].push(codes)

    @torch.no_grad()
    def rest(self, row: int) -> Float[Tensor, "W"]:
        """The sound still to come once a row takes no more steps: frames not fetched, and what its decoder held."""
        return torch.cat([self.sound(row).cpu(), self._decoders[row].flush().cpu()])


def _alike(batch: Batch) -> int:
    """How many positions all rows begin with alike, before the first of them holds media."""
    same = (batch.tokens == batch.tokens[0]).all(0) & batch.mask.all(0)
    return min([int(same.long().cumprod(0).sum()), *(span.start for span in batch.spans)])


def _vision(config: VisionConfig | InternViTConfig, width: int) -> Vision | InternViT:
    match config:
        case InternViTConfig():
            return InternViT(config, width)
        case VisionConfig():
            return Vision(config, width)


def _codec(config: RVQConfig | FireFlyConfig | CosyVoice2Config) -> RVQCodec | FireFlyCodec | None:
    match config:
        case RVQConfig():
            return RVQCodec(config)
        case FireFlyConfig():
            return FireFlyCodec(config)
        case CosyVoice2Config():
            return None  # its tokens become sound elsewhere
