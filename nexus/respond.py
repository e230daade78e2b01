"""One conversation in, a stream of text and sound out. The same rendering as training; speech comes from the trained
voice alone, nothing here can reach an engine of another make."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nexus import media
from nexus.codec import StreamDecoder
from nexus.data.chat import ChatTokenizer, Rendered, render
from nexus.data.collate import collate
from nexus.data.headers import frames_per_second, limits_for
from nexus.errors import BadCheckpoint, BadConfig, BadRecord
from nexus.model.adapters import load_adapter
from nexus.model.folder import load_model
from nexus.model.omni import OmniModel, Speaker, Written
from nexus.model.voice.delayed import DelayedVoice
from nexus.types import Batch, Delta, Part, Text, Turn

MAX_TOKENS = 256
UNFINISHED = "\ufffd"  # a character of several bytes whose last bytes are in the next token


@dataclass(frozen=True)
class Reply:
    """A whole answer: text, sound f32 [W] at the responder's rate (None when not asked for), and whether it ended by
    itself (False: it was stopped at max_tokens or at the voice's limit)."""

    text: str
    pcm: np.ndarray | None
    complete: bool


def load(
    folder: str | Path,
    device: str = "cpu",
    *,
    adapter: str | Path | None = None,
    vocoder: Callable[[], StreamDecoder] | None = None,
) -> "OmniResponder":
    """The responder of a model folder. Raises BadCheckpoint or BadConfig.

    `device` is torch's name of where to compute ("cpu", "cuda"); `adapter` a folder with a LoRA adapter in PEFT layout
    to merge in; `vocoder` makes the decoder of one utterance, for models whose speech tokens become sound elsewhere
    (`type: cosyvoice2`).
    """
    folder = Path(folder)
    model = load_model(folder, _usable(device))
    if adapter is not None:
        load_adapter(model, Path(adapter))
    return OmniResponder(model, ChatTokenizer.load(folder / "tokenizer.json"), vocoder)


def _usable(device: str) -> torch.device:
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(chr(10))[0]
        raise BadConfig(f"device {device!r} cannot be used here: {reason}; cpu always can") from None
    if place.type == "meta":
        raise BadConfig("device 'meta' holds no numbers; take cpu, or cuda")
    return place


class OmniResponder:
    """Answers with an OmniModel. Not thread-safe."""

    def __init__(
        self, model: OmniModel, tokenizer: ChatTokenizer, vocoder: Callable[[], StreamDecoder] | None = None
    ) -> None:
        if tokenizer.size > model.config.language.vocab_size:
            raise BadCheckpoint(
                f"tokenizer has {tokenizer.size} entries, the model's vocabulary {model.config.language.vocab_size}; "
                "they are not of one model"
            )
        self.model, self.tokenizer, self._vocoder = model, tokenizer, vocoder
        self.limits = limits_for(model.config)

    def quantise_voice(self) -> None:
        """Let the voice speak with weights in eight bits: about three times as fast on a CPU, scores within 2 %.

        Raises BadConfig on another device. Such a model cannot be trained or saved.
        """
        self._check(True)
        if isinstance(self.model.voice, DelayedVoice):
            self.model.voice = self.model.voice.quantised()

    @property
    def rate_hz(self) -> int:
        """Sample rate of the sound that is answered."""
        assert self.model.config.codec is not None, "this model has no voice"
        return self.model.config.codec.rate_hz

    def loaded(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns with every file read, checked and resampled. Raises BadMedia."""
        return [replace(turn, parts=tuple(self._load(part) for part in turn.parts)) for turn in turns]

    def _load(self, part: Part) -> Part:
        return media.load(part, self.limits, fps=frames_per_second(self.model.config))

    def respond(self, turns: Sequence[Turn], speak: bool = True, max_tokens: int = MAX_TOKENS) -> Iterator[Delta]:
        """Text and sound as they come: the first sound leaves before the text has ended.

        A user turn that is only `Text(aloud=True)` is read aloud word for word (speech synthesis). The last Delta
        says why the answer stopped when it did not end by itself.
        """
        self._check(speak)
        row = self._rendered(turns)
        speaker = self.model.speaker(1, vocoder=self._vocoder) if speak else None
        if _only_aloud(turns):
            yield from self._read_aloud(row, self._words(turns, row), speaker)
            return
        room = self._room(row, max_tokens)
        batch = collate([row], self.tokenizer.pad, self.model.config, "left")
        written: list[int] = []
        said = ""
        newest: Tensor | None = None  # state of the newest token, spoken once it is known whether another follows
        for step in self._steps(batch, room):
            token = int(step.tokens[0])
            if speaker is not None and newest is not None:
                self._say(speaker, 0, written[-1:], newest)
            if token in self.tokenizer.stops:
                break
            if speaker is not None:
                yield from _speech(speaker)
                newest = step.pre if self._pre else step.post
            written.append(token)
            text = self.tokenizer.decode(written)
            if text.startswith(said) and not text.endswith(UNFINISHED):
                yield Delta(text=text[len(said) :])
                said = text
        limit = "max_tokens" if room == max_tokens else "the model's language.max_positions"
        cut = "" if token in self.tokenizer.stops else f"stopped after {len(written)} tokens ({limit})"
        if speaker is not None:
            if cut and newest is not None:
                self._say(speaker, 0, written[-1:], newest)
            speaker.end(0)
            yield from _speech(speaker)
            yield from _rest(speaker)
            if not speaker.done(0):
                cut = self._voice_cut
        yield Delta(text=self.tokenizer.decode(written)[len(said) :], cut=cut)

    def answer_many(
        self,
        conversations: Sequence[Sequence[Turn]],
        speak: bool = False,
        max_tokens: int = MAX_TOKENS,
        max_seconds: float | None = None,
        rows: int = 64,
    ) -> list[Reply]:
        """Whole answers to many conversations, `rows` at a time. Same text as `respond`; media may be unloaded.

        Speech ends at max_seconds per reply (default: the voice's own limit); such replies are not `complete`.
        """
        self._check(speak)
        replies: list[Reply] = []
        for start in range(0, len(conversations), rows):
            replies.extend(self._answer(conversations[start : start + rows], speak, max_tokens, max_seconds))
        return replies

    def _answer(
        self, conversations: Sequence[Sequence[Turn]], speak: bool, max_tokens: int, max_seconds: float | None
    ) -> list[Reply]:
        rendered = [self._rendered(turns) for turns in conversations]
        aloud = [_only_aloud(turns) for turns in conversations]
        if any(aloud) and not all(aloud):
            raise BadRecord("a batch is either read aloud or answered, not both; ask in two calls")
        if all(aloud):
            spoken = [self._words(turns, row) for turns, row in zip(conversations, rendered, strict=True)]
            heard = self._states(rendered, spoken)
            scripts = [
                ([row.tokens[i] for i in at], state) for row, at, state in zip(rendered, spoken, heard, strict=True)
            ]
            texts, ended = [""] * len(rendered), [True] * len(rendered)
        else:
            scripts, ended = self._write(rendered, max_tokens)
            texts = [self.tokenizer.decode(tokens) for tokens, _ in scripts]
        if not speak:
            return [Reply(text, None, end) for text, end in zip(texts, ended, strict=True)]
        speaker = self.model.speaker(len(rendered), max_seconds, self._vocoder)
        for row, (tokens, states) in enumerate(scripts):
            if tokens:
                self._say(speaker, row, tokens, states)
            speaker.end(row)
        while speaker.step():
            pass
        return [
            Reply(text, speaker.rest(row).numpy(), end and speaker.done(row))
            for row, (text, end) in enumerate(zip(texts, ended, strict=True))
        ]

    def _write(
        self, rendered: Sequence[Rendered], max_tokens: int
    ) -> tuple[list[tuple[list[int], Tensor]], list[bool]]:
        """Tokens and their states for every prompt, and whether each ended by itself."""
        batch = collate(rendered, self.tokenizer.pad, self.model.config, "left")
        rooms = [self._room(row, max_tokens) for row in rendered]
        tokens: list[list[int]] = [[] for _ in rendered]
        states: list[list[Tensor]] = [[] for _ in rendered]
        ended = [False] * len(rendered)
        for step in self._steps(batch, max(rooms)):
            for row, (token, active) in enumerate(zip(step.tokens.tolist(), step.active.tolist(), strict=True)):
                if active and token in self.tokenizer.stops:
                    ended[row] = len(tokens[row]) < rooms[row]
                elif active and len(tokens[row]) < rooms[row]:
                    tokens[row].append(token)
                    states[row].append((step.pre if self._pre else step.post)[row])
        empty = torch.zeros(0, self.model.config.language.width)  # nothing was written: nothing is said
        return [(t, torch.stack(s) if s else empty) for t, s in zip(tokens, states, strict=True)], ended

    def _states(self, rendered: Sequence[Rendered], spoken: Sequence[Sequence[int]]) -> list[Tensor]:
        return self.model.spoken_states(collate(rendered, self.tokenizer.pad, self.model.config), spoken)

    def _read_aloud(self, row: Rendered, spoken: Sequence[int], speaker: Speaker | None) -> Iterator[Delta]:
        if speaker is None:
            raise BadRecord("words to be read aloud need speech; do not ask for text alone")
        self._say(speaker, 0, [row.tokens[i] for i in spoken], self._states([row], [spoken])[0])
        speaker.end(0)
        yield from _speech(speaker)
        yield from _rest(speaker)
        yield Delta(cut="" if speaker.done(0) else self._voice_cut)

    def _say(self, speaker: Speaker, row: int, tokens: list[int], states: Tensor) -> None:
        embeds = self.model.language.embed(torch.tensor(tokens, device=self.model.device))
        speaker.say(row, states, embeds, torch.from_numpy(self.tokenizer.letters[tokens]).long())

    def _steps(self, batch: Batch, max_tokens: int) -> Iterator[Written]:
        return self.model.write(batch, self.tokenizer.stops, max_tokens, self.tokenizer.size)

    def _rendered(self, turns: Sequence[Turn]) -> Rendered:
        if not turns:
            raise BadRecord("the conversation is empty; an answer needs a user turn at the end")
        if turns[-1].role != "user":
            raise BadRecord(f"the last turn is of role {turns[-1].role}; an answer needs a user turn at the end")
        if not turns[-1].parts:
            raise BadRecord("the last turn is empty; give it words, sound, a picture or a film")
        return render(self.loaded(turns), self.tokenizer, self.model.config, answer=True)

    def _words(self, turns: Sequence[Turn], row: Rendered) -> list[int]:
        """Positions of the words of the last turn, which is to be read aloud; what was said before stays said."""
        count = sum(len(self.tokenizer.encode(part.text)) for part in turns[-1].parts if isinstance(part, Text))
        if not count:
            raise BadRecord("there are no words to read aloud; give some text")
        return row.spoken[-count:]

    def _room(self, row: Rendered, max_tokens: int) -> int:
        """How many tokens the answer may have."""
        if max_tokens < 1:
            raise BadRecord(f"max_tokens is {max_tokens}; expected at least 1")
        taken, held = len(row.tokens), self.model.config.language.max_positions
        if taken >= held:
            raise BadRecord(
                f"conversation takes all {taken} positions this model holds and leaves none to answer; shorten it"
            )
        return min(max_tokens, held - taken)

    def _check(self, speak: bool) -> None:
        if speak and self.model.voice is None:
            raise BadRecord("this model has no voice; ask for text alone")

    @property
    def _pre(self) -> bool:
        return self.model.config.voice is not None and self.model.config.voice.states == "pre"

    @property
    def _voice_cut(self) -> str:
        assert self.model.config.voice is not None
        return f"speech stopped at the voice's limit of {self.model.config.voice.max_seconds:g} s (voice.max_seconds)"


def _only_aloud(turns: Sequence[Turn]) -> bool:
    """Whether the last turn is nothing but words to be read aloud."""
    return all(isinstance(part, Text) and part.aloud for part in turns[-1].parts)


def _speech(speaker: Speaker) -> Iterator[Delta]:
    """Sound of everything row 0 can say now, frame by frame."""
    while speaker.step():
        yield from _piece(speaker.sound(0))


def _rest(speaker: Speaker) -> Iterator[Delta]:
    """What row 0's decoder still holds after its last frame."""
    yield from _piece(speaker.rest(0))


def _piece(sound: Tensor) -> Iterator[Delta]:
    if len(sound):
        yield Delta(pcm=sound.cpu().numpy())
