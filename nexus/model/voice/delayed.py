"""The voice of Nexus: an autoregressive decoder of delayed codebooks, fused with language states (section 3.1).

Codes c[k, t] of K books and T frames are laid out as d[k, s] with book k delayed by k steps (MusicGen, Copet et al.
2023): PAD while s < k, c[k, s - k] for T steps, EOS once, PAD after; T + K steps in all. At step s the decoder sees
the mean of the K embeddings of d[:, s - 1] (a learned start vector at s = 0) and the language state u_s of that
step, and predicts d[:, s]. Text runs at 2 to 4 tokens a second, frames at 21: which state is u_s, and how state and
codes are averaged, are the switches of `VoiceConfig`. With one book there is no delay, with layer norm, GELU, fixed
positions and codes alone this is MusicGen's decoder.

Here stand the equations and the loss; how a voice speaks, step by step, is `Speaking`.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nexus.model.fused import RMSNorm
from nexus.model.layers import Block, BlockConfig, causal_bias, rotary, sinusoids
from nexus.model.voice.decoder import Decoder
from nexus.model.voice.matrices import Matrix, dense, int8
from nexus.model.voice.speaking import Speaking, Speech, shares
from nexus.organs import VoiceConfig
from nexus.types import LETTERS, Script


def delay(codes: Int[Tensor, "B K S"], lengths: Int[Tensor, "B"], pad: int, eos: int) -> Int[Tensor, "B K S2"]:
    """Codes to the delayed layout, S2 = S + K. Frames at and after `lengths` are replaced by one EOS, then PAD."""
    rows, books, frames = codes.shape
    step = torch.arange(frames + books, device=codes.device)
    frame = step[None] - torch.arange(books, device=codes.device)[:, None]  # [K, S2] frame a book shows at a step
    shown = nn.functional.pad(codes, (0, books), value=pad).gather(2, frame.clamp_min(0).expand(rows, -1, -1))
    end = lengths[:, None, None]
    shown = torch.where(frame < end, shown, torch.where(frame == end, eos, pad))
    return torch.where(frame >= 0, shown, pad)


def undelay(delayed: Int[Tensor, "B K S2"]) -> Int[Tensor, "B K S"]:
    """The inverse: column t of the result is complete at step t + K - 1, S = S2 - K."""
    frames = delayed.shape[2] - delayed.shape[1]
    return torch.stack([delayed[:, k, k : k + frames] for k in range(delayed.shape[1])], dim=1)


class DelayedVoice(Speaking):
    """The organ: fusion, causal blocks, one head per book."""

    def __init__(self, config: VoiceConfig, language_width: int) -> None:
        super().__init__(config)
        width, size = config.width, config.book_size
        self.codes = nn.Embedding(config.books * (size + 2), width)  # one table per book, stacked
        self.start_vector = nn.Parameter(torch.zeros(width))
        terms = []
        if config.fusion != "codes":
            self.silence = nn.Parameter(torch.zeros(width))  # stands for the language state once the text has ended
            self.state_norm = RMSNorm(language_width)
            self.state = nn.Linear(language_width, width, bias=False)
            terms.append(self.state.weight)
            if config.source == "state+embedding":
                self.embed_norm = RMSNorm(language_width)
                self.embed = nn.Linear(language_width, width, bias=False)
                terms.append(self.embed.weight)
            if config.spelling:
                self.letters = nn.Embedding(256, width)
                self.places = nn.Embedding(LETTERS + 1, width)
                nn.init.normal_(self.letters.weight, std=(config.books / 2) ** 0.5)
                nn.init.zeros_(self.places.weight)
        rope = config.positions == "rope"
        block = BlockConfig(width, config.heads, config.ffn_width, config.norm, config.feed_forward, rope=rope)
        self.blocks = nn.ModuleList(Block(block) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width) if config.norm == "layer" else RMSNorm(width)
        self.heads = nn.Linear(width, config.books * (size + 2), bias=False)
        # Words and codes start equally loud: the sum of K code embeddings has size sqrt(K), and so have the words.
        for weight in terms:
            nn.init.normal_(weight, std=(config.books / len(terms) / language_width) ** 0.5)
        nn.init.normal_(self.codes.weight, std=1.0)
        nn.init.normal_(self.heads.weight, std=0.02)
        self._spoken: tuple[list[tuple[int, int]], Speech] | None = None

    def _embed(self, column: Int[Tensor, "*B K"]) -> Float[Tensor, "*B W"]:
        """Sum of the embeddings of one delayed column."""
        offsets = torch.arange(self.config.books, device=column.device) * (self.config.book_size + 2)
        return self.codes(column + offsets).sum(-2)

    def timeline(self, script: Script, steps: int) -> Float[Tensor, "B steps W"]:
        """u_s for s = 0 .. steps - 1: the projected state each decoder step is given."""
        said = self.project(script.states, script.embeds)
        rows, _, width = said.shape
        last = (script.lengths - 1).clamp_min(0)
        step = torch.arange(steps, device=said.device).expand(rows, -1)
        match self.config.conditioning:
            case "last":
                index, silent = last[:, None].expand(-1, steps), torch.zeros_like(step, dtype=torch.bool)
            case "hold":
                index, silent = torch.minimum(step, last[:, None]), torch.zeros_like(step, dtype=torch.bool)
            case "clock":
                counts = (script.letters > 0).sum(-1)
                held = (self.config.frames_per_character * (counts + 1)).int().clamp_min(1)
                spoken = torch.arange(counts.shape[1], device=said.device) < script.lengths[:, None]
                ends = (held * spoken).cumsum(1)  # [B, N] first step after each token
                index = (step[:, :, None] >= ends[:, None, :]).sum(-1)
                silent = index > last[:, None]
                index = torch.minimum(index, last[:, None])
        timeline = said.gather(1, index.long()[..., None].expand(-1, -1, width))
        if self.config.spelling:
            frame = step - (ends - held).gather(1, index)  # of those its token is held for
            letters = script.letters.gather(1, index[..., None].expand(-1, -1, LETTERS))
            timeline = timeline + self.spelled(letters, frame).to(timeline.dtype)
        return torch.where(silent[..., None], self.silence.to(said.dtype), timeline)

    def logits(self, script: Script, delayed: Int[Tensor, "B K S2"]) -> Float[Tensor, "B S2 K C2"]:
        """Teacher-forced scores over book_size codes, PAD (never allowed) and EOS for every step."""
        rows, books, steps = delayed.shape
        before = self._embed(delayed[:, :, :-1].transpose(1, 2))
        start = (books * self.start_vector).expand(rows, 1, -1).to(before.dtype)
        by_code, by_state = shares(self.config)
        x = torch.cat([start, before], dim=1) * by_code
        if self.config.fusion != "codes":
            x = x + self.timeline(script, steps) * by_state
        positions, turns = torch.arange(steps, device=x.device), None
        if self.config.positions == "sinusoidal":
            x = x + sinusoids(positions, self.config.width).to(x.dtype)
        else:
            turns = rotary(positions[None], self.config.width // self.config.heads)
        bias = causal_bias(steps, x.device)
        for block in self.blocks:
            x = block(x, bias, turns)
        return self._score(self.norm(x))

    def _score(self, x: Float[Tensor, "*B W"]) -> Float[Tensor, "*B K C2"]:
        scores = self.heads(x).unflatten(-1, (self.config.books, self.config.book_size + 2)).float()
        never = torch.zeros(self.config.book_size + 2, device=x.device)
        never[self.pad] = float("-inf")
        return scores + never

    def loss(
        self,
        script: Script,
        codes: Int[Tensor, "B K S"],
        lengths: Int[Tensor, "B"],
        previous: Int[Tensor, "B K S"] | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Cross entropy over the T + 1 steps of every book (its codes and EOS), weighted per book.

        `codes` [B, K, S] padded, `lengths` frames per row; `previous` what is shown as the past, if not the codes
        themselves. Also gives the plain mean of the first book.
        """
        delayed = delay(codes, lengths, self.pad, self.eos)
        shown = delayed if previous is None else delay(previous, lengths, self.pad, self.eos)
        scores = self.logits(script, shown)  # [B, S2, K, C2]
        targets = delayed.transpose(1, 2)
        losses = nn.functional.cross_entropy(
            scores.flatten(0, 2), targets.flatten(), ignore_index=self.pad, reduction="none"
        ).view(targets.shape)
        per_book = losses.sum((0, 1)) / (targets != self.pad).sum((0, 1))
        weights = torch.tensor(self.config.book_weights or (1.0,) * self.config.books, device=losses.device)
        return {"speech": (per_book * weights).sum() / weights.sum(), "first_book": per_book[0].detach()}

    def speech(self) -> Speech:
        """The frozen weights to speak with, made again only when a weight has changed since.

        Weights that were made in inference mode count no changes and are taken as final.
        """
        now = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in self.parameters()]
        if self._spoken is None or self._spoken[0] != now:
            self._spoken = now, _freeze(self, dense, self.codes.weight.dtype)
        return self._spoken[1]

    def _apply(self, *change: Any, **options: Any) -> "DelayedVoice":
        self._spoken = None  # a weight that moves away and comes back may lie where it lay before
        return super()._apply(*change, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_spoken": None}  # packed weights cannot be copied

    def quantised(self) -> "Int8Voice":
        """This voice with int8 matrices, to speak with alone. Raises BadConfig off the CPU."""
        return Int8Voice(self)


class Int8Voice(Speaking):
    """A voice that speaks with int8 matrices and float32 for the rest; language states are projected as they were.
    It cannot be trained, and a model that holds it is no model to save."""

    def __init__(self, voice: DelayedVoice) -> None:
        super().__init__(voice.config)
        for name in ("state_norm", "state", "embed_norm", "embed", "letters", "places"):
            if hasattr(voice, name):
                setattr(self, name, getattr(voice, name))
        self._speech = _freeze(voice, int8, torch.float32)

    def speech(self) -> Speech:
        """The weights as they were rounded."""
        return self._speech


@torch.no_grad()
def _freeze(voice: DelayedVoice, matrix: Callable[[Tensor], Matrix], dtype: torch.dtype) -> Speech:
    config = voice.config
    by_code, by_state = shares(config)
    blocks = [cast(Block, block) for block in voice.blocks]
    table = torch.cat([voice.codes.weight, voice.start_vector[None]]) * by_code
    silence = voice.start_vector * 0 if config.fusion == "codes" else voice.silence * by_state
    ending = torch.zeros(config.books, config.book_size + 2, device=table.device)
    ending[:, voice.pad] = float("-inf")
    ending[1:, voice.eos] = float("-inf")
    going = ending.clone()
    going[0, voice.eos] = float("-inf")
    return Speech(
        Decoder(config, blocks, voice.norm, voice.heads.weight, matrix, dtype),
        table.to(dtype),
        torch.arange(config.books, device=table.device) * (config.book_size + 2),
        silence.to(dtype),
        going,
        ending,
    )
