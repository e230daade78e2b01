"""How a voice speaks: what each row has still to say, one delayed column after another, until its own end of speech.

`Speaking` is what a trained voice and its int8 form share. It yields codes; `OmniModel.speak` turns them into sound. It
knows neither texts nor tokenizers: how long a token is held follows from its letters, which the caller hands over.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nexus.model.voice.decoder import Decoder
from nexus.organs import VoiceConfig
from nexus.types import LETTERS


@dataclass
class Row:
    """One speaker. Everything the next step depends on but the past itself."""

    step: int = 0  # steps taken
    queue: deque[Tensor] = field(default_factory=deque)  # what is said in each frame still to come
    last: Tensor | None = None  # what was said last, held when the queue is empty
    tail: int = 0  # how many frames of the queue belong to its newest token
    ended: bool = False  # no more text will come
    finish: int | None = None  # step at which the first book said EOS


@dataclass
class VoiceState:
    """Rows that advance independently, and the weights of the moment they were started."""

    speech: "Speech"
    memory: Float[Tensor, "L 2 B H T d"]
    previous: Int[Tensor, "B K"]  # rows of `Speech.codes`: the column of the step before
    rows: list[Row]


@dataclass(frozen=True)
class Speech:
    """A decoder and what goes into it, with the fusion's factors folded in."""

    decoder: Decoder
    codes: Float[Tensor, "V W"]  # books stacked; behind them one row, the start vector
    offsets: Int[Tensor, "K"]  # where each book starts
    silence: Float[Tensor, "W"]  # said once the text has ended
    going: Float[Tensor, "K C2"]  # added to the scores of a row that may not end: no PAD and no EOS
    ending: Float[Tensor, "K C2"]  # of one that may: the first book may say EOS


def shares(config: VoiceConfig) -> tuple[float, float]:
    """What each code vector and the language state are multiplied with before they are summed."""
    match config.fusion:
        case "mean9":
            return 1 / (config.books + 1), 1 / (config.books + 1)
        case "half":
            return 0.5 / config.books, 0.5
        case "sum":
            return 1.0, 1.0
        case "codes":
            return 1.0, 0.0


class Speaking(nn.Module):
    """A voice that can speak. Its weights are the business of those who inherit, but for the projection."""

    state_norm: nn.Module
    state: nn.Linear
    embed_norm: nn.Module
    embed: nn.Linear
    letters: nn.Embedding
    places: nn.Embedding

    def __init__(self, config: VoiceConfig) -> None:
        super().__init__()
        self.config = config
        self.pad, self.eos = config.book_size, config.book_size + 1

    def speech(self) -> Speech:
        """The frozen weights to speak with."""
        raise NotImplementedError

    def project(self, states: Float[Tensor, "*B D"], embeds: Float[Tensor, "*B D"]) -> Float[Tensor, "*B W"]:
        """Language states (and embeddings), wherever and of whatever type they are, in the decoder's width; normed so
        that they cannot drown the codes."""
        weight = self.state.weight
        said = self.state(self.state_norm(states.to(weight)))
        if self.config.source == "state+embedding":
            said = said + self.embed(self.embed_norm(embeds.to(weight)))
        return said

    def spelled(self, letters: Int[Tensor, "*B Z"], frame: Int[Tensor, "*B"]) -> Float[Tensor, "*B W"]:
        """On which of the letters of its token a frame of it stands, and how far into the token that is."""
        place = (frame / self.config.frames_per_character).long().clamp(0, LETTERS)
        letter = nn.functional.pad(letters, (0, 1)).gather(-1, place[..., None])[..., 0]
        return self.letters(letter.to(self.letters.weight.device)) + self.places(place.to(self.places.weight.device))

    def frames_for(self, letters: int) -> int:
        """Frames a token of that many letters is held for under the clock."""
        return max(1, int(self.config.frames_per_character * (letters + 1)))

    @torch.no_grad()
    def start(self, rows: int) -> VoiceState:
        """An empty state for `rows` rows. It keeps the weights of now, whatever is trained later."""
        speech = self.speech()
        begin = torch.full((rows, self.config.books), len(speech.codes) - 1, device=speech.codes.device)
        return VoiceState(speech, speech.decoder.memory(rows), begin, [Row() for _ in range(rows)])

    @torch.no_grad()
    def hear(
        self,
        state: VoiceState,
        row: int,
        states: Float[Tensor, "N D"],
        embeds: Float[Tensor, "N D"],
        letters: Int[Tensor, "N Z"],
    ) -> None:
        """More text for a row: its language states, input embeddings and the letters of its tokens."""
        share, dtype = shares(self.config)[1], state.speech.codes.dtype
        if self.config.fusion == "codes":  # the text only says how long there is to speak
            said = state.speech.silence.expand(len(letters), -1)
        else:
            said = self.project(states, embeds) * share
        speaker = state.rows[row]
        for token, own, count in zip(said, letters, (letters > 0).sum(-1).tolist(), strict=True):
            held = self.frames_for(count) if self.config.conditioning == "clock" else 1
            frames = token.expand(held, -1)
            if self.config.spelling:
                frames = frames + self.spelled(own.expand(held, -1), torch.arange(held, device=own.device)) * share
            if self.config.conditioning != "last":
                speaker.queue.extend(frames.to(dtype))
            speaker.last, speaker.tail = token.to(dtype), held

    def end(self, state: VoiceState, row: int) -> None:
        """No more text will come for this row."""
        state.rows[row].ended = True

    def ready(self, state: VoiceState, row: int) -> bool:
        """Whether the row can take a step now without guessing what is said next."""
        if self.is_done(state, row):
            return False
        return state.rows[row].ended or bool(state.rows[row].queue)

    def is_done(self, state: VoiceState, row: int) -> bool:
        """Whether the row has emitted its last frame."""
        finish = state.rows[row].finish
        return finish is not None and state.rows[row].step >= finish + self.config.books - 1

    def frames(self, state: VoiceState, row: int) -> int:
        """Frames of the row that are complete in all books."""
        steps, finish = state.rows[row].step - self.config.books + 1, state.rows[row].finish
        return max(0, steps if finish is None else min(steps, finish))

    @torch.no_grad()
    def step(self, state: VoiceState, rows: list[int], generator: torch.Generator | None = None) -> Int[Tensor, "R K"]:
        """One step for `rows`; returns the new delayed column of each and advances `state`."""
        return self.take(state, rows, self._choose(self.scores(state, rows), generator))

    @torch.no_grad()
    def scores(self, state: VoiceState, rows: list[int]) -> Float[Tensor, "R K C2"]:
        """Scores of the next column of `rows`, -inf where it may not be; `take` must follow with what was chosen."""
        speech, speakers = state.speech, [state.rows[row] for row in rows]
        at = [speaker.step for speaker in speakers]
        if max(at) >= state.memory.shape[4]:
            state.memory = speech.decoder.grown(state.memory)
        said = [self._next(speaker, speech.silence) for speaker in speakers]
        previous = state.previous if rows == list(range(len(state.rows))) else state.previous[rows]
        x = nn.functional.embedding_bag(previous, speech.codes, mode="sum")
        if self.config.fusion != "codes":
            x = x + torch.stack(said)
        scores = speech.decoder.scores(x, state.memory, rows, at)
        may_end = [_may_end(speaker) for speaker in speakers]
        if len(set(may_end)) == 1:
            return scores.add_(speech.ending if may_end[0] else speech.going)
        return scores.add_(torch.stack([speech.ending if may else speech.going for may in may_end]))

    def take(self, state: VoiceState, rows: list[int], column: Int[Tensor, "R K"]) -> Int[Tensor, "R K"]:
        """Make `column` what was said in this step, after the delay pattern's fixed entries are put in."""
        speakers, forced = [state.rows[row] for row in rows], False
        for speaker, code in zip(speakers, column[:, 0].tolist(), strict=True):
            if speaker.finish is None and code == self.eos:
                speaker.finish = speaker.step
            forced |= speaker.finish is not None or speaker.step < self.config.books - 1
        if forced:
            fixed = [self._forced(speaker, codes) for speaker, codes in zip(speakers, column.tolist(), strict=True)]
            column = torch.tensor(fixed, device=column.device)
        stacked = column + state.speech.offsets
        if rows == list(range(len(state.rows))):
            state.previous = stacked
        else:
            state.previous[rows] = stacked
        for speaker in speakers:
            speaker.step += 1
        return column

    def _forced(self, speaker: Row, codes: list[int]) -> list[int]:
        """PAD before a book starts; all books end with the first one."""
        finish = speaker.finish
        for book in range(self.config.books):
            frame = speaker.step - book
            if frame < 0 or (finish is not None and frame > finish):
                codes[book] = self.pad
            elif frame == finish:
                codes[book] = self.eos
        return codes

    def _next(self, speaker: Row, silence: Tensor) -> Tensor:
        """What a row says in its next step."""
        if self.config.conditioning == "last" and speaker.last is not None:
            return speaker.last
        if speaker.queue:
            return speaker.queue.popleft()
        if self.config.conditioning == "clock" or speaker.last is None:
            return silence
        return speaker.last

    def _choose(self, scores: Float[Tensor, "R K C2"], generator: torch.Generator | None) -> Int[Tensor, "R K"]:
        """Greedy for the first `greedy_books`, sampled at `temperature` for the rest."""
        greedy = self.config.greedy_books
        if greedy is None or greedy >= self.config.books:
            return scores.argmax(-1)
        chances = (scores[:, greedy:] / self.config.temperature).softmax(-1)
        drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=generator).view(len(scores), -1)
        return torch.cat([scores[:, :greedy].argmax(-1), drawn], dim=1)


def _may_end(speaker: Row) -> bool:
    """Nobody stops before the last token. Whoever streams holds a token back until it is known to be the last or
    not: then streamed speech is the same as speech said at once."""
    return speaker.ended and len(speaker.queue) < max(1, speaker.tail)
