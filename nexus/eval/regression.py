"""What the regression gate measures: held-out conversations, item by item, in one forward pass each.

An answer is right when the model would write it, token for token: behind the reference's own words so far the likeliest
token is always the reference's, which one pass over the reference tells. Spoken answers are scored by how well the
voice foretells the codes of their sound.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from nexus import media
from nexus.data.chat import Rendered, render
from nexus.data.collate import collate
from nexus.data.prepared import Line, speech_batch, words_said
from nexus.errors import BadRecord
from nexus.respond import OmniResponder
from nexus.types import IGNORE, Audio, Image, Sample, Text, Turn, Video

Score = Literal["exact", "likelihood"]
ROWS = 8  # read at a time


class Rows(Protocol):
    """Conversations by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Sample: ...


@dataclass
class HeldOut:
    """Held-out conversations, rendered once. `skills` says what the words of each answer count for, by what was asked:
    vision (a picture or film), hearing (sound), text (neither); None where an answer has no words of its own.

    `spoken` are answers with sound, which count for speech: row, positions of the words, codes i64 [K, S].
    """

    rows: list[Rendered] = field(default_factory=list)
    skills: list[str | None] = field(default_factory=list)
    spoken: list[tuple[int, list[int], Tensor]] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over everything that is asked and expected."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr((row.tokens, row.labels, row.spoken)).encode())
            for part in row.media:
                digest.update(_array_bytes(part))
        for number, at, codes in self.spoken:
            digest.update(repr((number, at, codes.tolist())).encode())
        return digest.hexdigest()[:16]


def held_out(responder: OmniResponder, rows: Rows, n: int) -> HeldOut:
    """At most `n` conversations, evenly spread over `rows`, ready to be measured with this model's tokenizer and codec.

    Raises BadRecord for one without an answer or with sound for an answer and no words, BadMedia for media that cannot
    be read.
    """
    items = HeldOut()
    count = min(n, len(rows))
    for place in range(count):
        _add(items, responder, rows[place * len(rows) // count])
    return items


def _add(items: HeldOut, responder: OmniResponder, sample: Sample) -> None:
    answers = [turn for turn in sample.turns if turn.role == "assistant"]
    if not answers:
        raise BadRecord(f"held-out row {sample.id}: has no answer, expected an assistant turn; add it")
    turns = [_loaded(responder, turn) for turn in sample.turns]
    row = render(turns, responder.tokenizer, responder.model.config)
    places = words_said(turns, row, responder.tokenizer)
    for number, turn in enumerate(turns):
        sounds = [part for part in turn.parts if isinstance(part, Audio)] if turn.role == "assistant" else []
        if not sounds:
            continue
        at = places[number] or (places[number - 1] if number else [])
        if len(sounds) > 1 or not at:
            what = f"{len(sounds)} sounds" if at else "a sound and no words"
            raise BadRecord(f"held-out row {sample.id}: an answer has {what}, expected one sound and its words")
        items.spoken.append((len(items.rows), at, _codes(responder, sounds[0])))
    items.rows.append(row)
    items.skills.append(_skill(turns))


def _loaded(responder: OmniResponder, turn: Turn) -> Turn:
    """A turn with its media read; the answer's own sound is read where it is coded."""
    if turn.role != "assistant":
        return responder.loaded([turn])[0]
    sounds = tuple(part for part in turn.parts if isinstance(part, Audio))
    rest = tuple(part for part in turn.parts if not isinstance(part, Audio))
    return replace(turn, parts=responder.loaded([replace(turn, parts=rest)])[0].parts + sounds)


def _skill(turns: Sequence[Turn]) -> str | None:
    asked = [part for turn in turns if turn.role == "user" for part in turn.parts]
    if not any(isinstance(part, Text) for turn in turns if turn.role == "assistant" for part in turn.parts):
        return None
    if any(isinstance(part, Image | Video) for part in asked):
        return "vision"
    return "hearing" if any(isinstance(part, Audio) for part in asked) else "text"


@torch.no_grad()
def _codes(responder: OmniResponder, sound: Audio) -> Tensor:
    codec = responder.model.codec
    if codec is None:
        raise BadRecord("held-out answers have sound, but this model has no codec of its own; leave their sound out")
    loaded = media.load(sound, responder.limits, responder.rate_hz)
    assert isinstance(loaded, Audio) and loaded.samples is not None
    return codec.encode(torch.from_numpy(loaded.samples).to(responder.model.device)[None, None])[0].cpu()


def measure(responder: OmniResponder, items: HeldOut, score: Score = "exact") -> dict[str, list[float]]:
    """Scores of the items by skill, higher is better, in the order of the items.

    text, vision, hearing: `exact` 1.0 where the model would write every answer of the conversation, else 0.0;
    `likelihood` the mean log-likelihood of the answers' tokens in nats. speech: minus the voice's loss, nats per code.
    """
    scores: dict[str, list[float]] = {}
    written = _written(responder, items.rows, score)
    for skill, value in zip(items.skills, written, strict=True):
        if skill is not None:
            scores.setdefault(skill, []).append(value)
    for number, at, codes in items.spoken:
        scores.setdefault("speech", []).append(-_code_loss(responder, items.rows[number], at, codes))
    return scores


@torch.no_grad()
def _written(responder: OmniResponder, rows: Sequence[Rendered], score: Score) -> list[float]:
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].tokens))
    found = [0.0] * len(rows)
    model = responder.model
    for start in range(0, len(order), ROWS):
        some = order[start : start + ROWS]
        batch = collate([rows[number] for number in some], responder.tokenizer.pad, model.config)
        targets = batch.labels[:, 1:]
        places, columns = (targets != IGNORE).nonzero(as_tuple=True)
        logits = model.language.logits(model.hidden(batch)[places, columns]).float().cpu()
        expected = targets[places, columns]
        if score == "exact":
            values = (logits[:, : responder.tokenizer.size].argmax(-1) == expected).float()
        else:
            values = -nn.functional.cross_entropy(logits, expected, reduction="none")
        for place, number in enumerate(some):
            own = values[places == place]
            found[number] = float(own.min() if score == "exact" else own.mean())
    return found


@torch.no_grad()
def _code_loss(responder: OmniResponder, row: Rendered, at: list[int], codes: Tensor) -> float:
    model = responder.model
    states = model.spoken_states(collate([row], responder.tokenizer.pad, model.config), [at])[0]
    tokens = [row.tokens[place] for place in at]
    embeds = model.language.embed(torch.tensor(tokens, device=model.device))
    letters = torch.from_numpy(responder.tokenizer.letters[tokens]).long()
    return float(model(speech_batch([Line(states.cpu(), embeds.cpu(), letters, codes)]))["speech"])


def _array_bytes(part: Audio | Image | Video) -> bytes:
    match part:
        case Audio():
            array = part.samples
        case Image():
            array = part.pixels
        case Video():
            array = part.frames
    assert array is not None, "media is not loaded"
    return array.tobytes()
