"""Rendering: a Sample to tokens with placeholder spans where media sit, plus labels. The same code for training and
inference. Knows no model: token counts come from the recipe's model section.

ChatML as Qwen2.5-VL writes it; sound sits between <|audio_bos|> and <|audio_eos|>, pictures and films between
<|vision_start|> and <|vision_end|>. Templates: Nexus, appendix A.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from nexus.errors import BadCheckpoint, BadRecord
from nexus.organs import ModelConfig
from nexus.recipe import TokenizerConfig
from nexus.types import IGNORE, LETTERS, Audio, Image, Part, Role, Sample, Span, Text, Turn, Video

SYSTEM = "You are a helpful assistant."
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|audio_pad|>",
)


def _read_tokenizer(text: str) -> "ChatTokenizer":
    return ChatTokenizer(Tokenizer.from_str(text))


class ChatTokenizer:
    """A byte-level BPE tokenizer with the special tokens of the chat format.

    Text is never searched for special tokens: a user who types "<|im_end|>" gets those characters, not a turn end.
    `ids` are the special tokens by name, `stop` ends turns, `stops` are all that end writing (Qwen2.5 ends at both),
    `size` is the number of ids, and so of embedding rows in use.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()  # a tokenizer.json may ask for either; nothing is cut or filled up here
        self._tokenizer.no_padding()
        self.ids: dict[str, int] = {}
        for token in SPECIALS:
            found = tokenizer.token_to_id(token)
            if found is None:
                raise BadCheckpoint(f"tokenizer has no token {token}; expected all of {', '.join(SPECIALS)}")
            if found in self._encode_afresh(token):
                raise BadCheckpoint(
                    f"tokenizer reads {token} in a text as token {found}, expected plain characters, or users could "
                    'end turns; mark it "special": true in tokenizer.json'
                )
            self.ids[token] = found
        self.pad, self.stop = self.ids["<|endoftext|>"], self.ids["<|im_end|>"]
        self.stops = (self.stop, self.pad)
        self.size = tokenizer.get_vocab_size()
        self._encode = functools.lru_cache(1 << 16)(self._encode_afresh)  # training texts come again and again

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process it goes as its file would."""
        return _read_tokenizer, (self._tokenizer.to_str(),)

    @functools.cached_property
    def letters(self) -> np.ndarray:
        """Characters of every token as numbers 1..255, u8 [V, LETTERS], outer spaces left out, zeros behind them; none
        for special tokens. Beyond Latin letters several characters share a number."""
        table = np.zeros((self.size, LETTERS), np.uint8)
        for token in range(self.size):
            text = self._tokenizer.decode([token], skip_special_tokens=True).strip()[:LETTERS]
            table[token, : len(text)] = [1 + ord(character) % 255 for character in text]
        return table

    @classmethod
    def train(cls, config: TokenizerConfig, texts: Iterable[str], size: int) -> "ChatTokenizer":
        """A tokenizer of at most `size` entries from texts (stage 0). Words and Chinese characters are units, so that a
        sentence is always cut in the same places; bytes cover everything else."""
        tokenizer = Tokenizer(models.BPE())
        if config.uncased:
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s']|_"), " ")]
            )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
            ]
        )
        # Every unit begins with a space, which between Chinese characters nobody writes.
        between = Regex(r"(?<=\p{Han}) (?=\p{Han})")
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(between, "")])
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def published(cls, folder: Path, vocab_size: int) -> "ChatTokenizer":
        """The tokenizer of a published Qwen2.5-VL or Qwen2.5 folder, with the special tokens it lacks (always the three
        of sound) in the spare rows behind its last id.

        `vocab_size` is the number of rows of the embedding table. Raises BadCheckpoint where ids are not
        those that the files state, where sound already has tokens, and where spare rows are too few.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BadCheckpoint(
                f"{folder}: holds no tokenizer.json, expected that of a Qwen2.5-VL or Qwen2.5; vocab.json and "
                "merges.txt alone become one by loading and saving them with transformers"
            )
        tokenizer = _read(path)
        _check_ids(tokenizer, folder)
        missing = [token for token in SPECIALS if tokenizer.token_to_id(token) is None]
        taken = [token for token in SPECIALS if token.startswith("<|audio") and token not in missing]
        if taken:  # Qwen2.5-Omni's; its rows mean other things in Qwen2.5-VL
            raise BadCheckpoint(
                f"{path}: {taken[0]} has id {tokenizer.token_to_id(taken[0])} already, expected the tokenizer of a "
                "Qwen2.5-VL or Qwen2.5, which has no tokens for sound; name such a checkpoint"
            )
        used = tokenizer.get_vocab_size()
        if vocab_size - used < len(missing):
            raise BadCheckpoint(
                f"{path}: {len(missing)} tokens must be added ({', '.join(missing)}), but the embedding table has "
                f"{vocab_size} rows and ids go up to {used - 1}; take a checkpoint with spare rows"
            )
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
        given = [tokenizer.token_to_id(token) for token in missing]
        assert given == list(range(used, used + len(missing))), f"added tokens got ids {given} behind {used - 1}"
        return _named(tokenizer, path)

    @classmethod
    def load(cls, path: Path) -> "ChatTokenizer":
        """Read tokenizer.json of a model folder. Raises BadCheckpoint."""
        return _named(_read(path), path)

    def save(self, path: Path) -> None:
        """Write tokenizer.json."""
        self._tokenizer.save(str(path))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return list(self._encode(text))

    def _encode_afresh(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out, outer spaces stripped."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def _read(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for every fault
        raise BadCheckpoint(f"{path}: not a readable tokenizer: {' '.join(str(error).split())[:200]}") from None


def _named(tokenizer: Tokenizer, path: Path) -> ChatTokenizer:
    """A ChatTokenizer whose refusals name the file."""
    try:
        return ChatTokenizer(tokenizer)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{path}: {error}") from None


def _check_ids(tokenizer: Tokenizer, folder: Path) -> None:
    """Refuse a tokenizer whose ids are not those its files state.

    The library numbers added tokens afresh, behind as many entries as there are: with a hole, or with files of two
    revisions, every id behind it would lead to another row of the embedding table.
    """
    stated: dict[tuple[str, int], str] = {}
    path = folder / "tokenizer.json"
    try:
        for row in json.loads(path.read_text(encoding="utf-8"))["added_tokens"]:
            stated[path.name, int(row["id"])] = row["content"]
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for number, row in config.get("added_tokens_decoder", {}).items():
            stated[path.name, int(number)] = row["content"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadCheckpoint(f"{path}: added tokens cannot be read ({error!r}); fetch the file again") from None
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    for (file, number), token in stated.items():
        if names.get(number) != token:
            raise BadCheckpoint(
                f"{folder / file}: token {number} is {token!r}, the tokenizer has {names.get(number)!r} there; fetch "
                "tokenizer.json and tokenizer_config.json from one revision"
            )
    if max(names, default=-1) + 1 != tokenizer.get_vocab_size():
        raise BadCheckpoint(
            f"{folder / 'tokenizer.json'}: {tokenizer.get_vocab_size()} tokens have ids up to {max(names)}, expected "
            "ids without holes; fetch the file again"
        )


@dataclass(frozen=True)
class Task:
    """A row of the paper's table 1: what stands in the user turn, the instruction behind it, what is answered.

    `question`: "audio" or "aloud" (words between the audio markers). `reply`: parts of the assistant turn.
    """

    question: str
    instruction: str
    reply: tuple[str, ...]


# Nexus, appendix A; instruction strings as printed there, but for the translation into Chinese, which is ours.
TASKS = {
    "asr": Task("audio", "Please help me transcribe my current speech into text. ", ("text",)),
    "s2tt": Task("audio", " What is the English equivalent of this Chinese speech?", ("text",)),
    "s2tt_en_zh": Task("audio", " What is the Chinese equivalent of this English speech?", ("text",)),
    "caption": Task("audio", " please describe the speech. ", ("text",)),
    "ser": Task("audio", " what is the emotion in this speech? ", ("text",)),
    "chat": Task("audio", "", ("text",)),
    "tts": Task("aloud", "", ("audio",)),
    "s2s": Task("audio", "", ("text", "audio")),
}


def task_turns(
    task: str, *, sound: Audio | None = None, text: str = "", speech: Audio | None = None
) -> tuple[Turn, ...]:
    """The turns of one training or test row of a task.

    `sound` is the user's speech, `text` the answer (for tts: the words to speak), `speech` the spoken answer.
    """
    row = TASKS[task]
    question: Part
    if row.question == "aloud":
        question = Text(text, aloud=True)
    else:
        assert sound is not None, f"task {task} needs sound"
        question = sound
    user = (question, Text(row.instruction)) if row.instruction else (question,)
    reply: list[Part] = [Text(text)] if "text" in row.reply else []
    if "audio" in row.reply and speech is not None:
        reply.append(speech)
    return (Turn("user", user), Turn("assistant", tuple(reply))) if reply else (Turn("user", user),)


@dataclass(frozen=True)
class Rendered:
    """One conversation as tokens: labels aligned with tokens, spans with row 0, media in span order.

    `spoken` are the positions of the tokens that the voice says.
    """

    tokens: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    media: list[Audio | Image | Video] = field(default_factory=list)
    spoken: list[int] = field(default_factory=list)


def render(
    sample: Sample | Sequence[Turn], tokenizer: ChatTokenizer, specs: ModelConfig, answer: bool = False
) -> Rendered:
    """Tokens, labels and spans of a conversation; with `answer`, open for the assistant's reply.

    Loss is on the text of every assistant turn and its end marker. Media must be loaded. Raises BadRecord for turns
    this model cannot take (no such organ, sound where only the voice may speak).
    """
    out = Rendered()
    turns = list(sample.turns if isinstance(sample, Sample) else sample)
    if not turns or turns[0].role != "system":
        turns.insert(0, Turn("system", (Text(SYSTEM),)))
    for turn in turns:
        says = turn.role == "assistant"
        speaks = says and any(isinstance(part, Audio) for part in turn.parts)
        _add(out, [tokenizer.ids["<|im_start|>"]], False)
        opening, parts = f"{turn.role}\n", turn.parts
        if parts and isinstance(parts[0], Text) and not parts[0].aloud and not says:
            # One string for the tokenizer, as in the published template: a text may begin with a line break, and two
            # of them are one token. An answer is written behind the opening, so it stays apart.
            opening, parts = opening + parts[0].text, parts[1:]
        _add(out, tokenizer.encode(opening), False)
        for part in parts:
            _part(out, part, turn.role, speaks, tokenizer, specs)
        _add(out, [tokenizer.stop], says)
        _add(out, tokenizer.encode("\n"), False)
    if answer:
        if turns[-1].role == "assistant":
            raise BadRecord("the last turn is the assistant's; an answer needs a user turn at the end")
        _add(out, [tokenizer.ids["<|im_start|>"], *tokenizer.encode("assistant\n")], False)
    limit = specs.language.max_positions
    if len(out.tokens) > limit:
        raise BadRecord(f"conversation takes {len(out.tokens)} positions, this model holds {limit}; shorten it")
    return out


def _add(out: Rendered, ids: Sequence[int], learn: bool) -> None:
    out.tokens.extend(ids)
    out.labels.extend(ids if learn else [IGNORE] * len(ids))


def _part(out: Rendered, part: Part, role: Role, speaks: bool, tokenizer: ChatTokenizer, specs: ModelConfig) -> None:
    ids = tokenizer.ids
    match part:
        case Text(text, aloud=True):
            _add(out, [ids["<|audio_bos|>"]], False)
            _say(out, tokenizer.encode(text), False, True)
            _add(out, [ids["<|audio_eos|>"]], False)
        case Text(text):
            _say(out, tokenizer.encode(text), role == "assistant", speaks)
        case Audio() if role == "assistant":
            pass  # the voice's own target: learned as codes from the states of the spoken tokens
        case Audio():
            if specs.hearing is None:
                raise BadRecord("this model has no hearing; leave the sound out")
            assert part.samples is not None, "sound is not loaded"
            length = specs.hearing.tokens_for(len(part.samples))
            _medium(out, part, "audio", length, None, tokenizer)
        case Image():
            assert part.pixels is not None, "picture is not loaded"
            _see(out, part, 1, part.pixels.shape[:2], tokenizer, specs)
        case Video():
            assert part.frames is not None, "film is not loaded"
            _see(out, part, len(part.frames), part.frames.shape[1:3], tokenizer, specs)


def _say(out: Rendered, ids: Sequence[int], learn: bool, spoken: bool) -> None:
    if spoken:
        out.spoken.extend(range(len(out.tokens), len(out.tokens) + len(ids)))
    _add(out, ids, learn)


def _see(
    out: Rendered, part: Image | Video, frames: int, size: Sequence[int], tokenizer: ChatTokenizer, specs: ModelConfig
) -> None:
    if specs.vision is None:
        raise BadRecord("this model has no vision; leave the picture out")
    grid = specs.vision.grid_for(frames, *size)
    kind = "video" if isinstance(part, Video) else "image"
    seconds = specs.vision.temporal_patch / part.fps if isinstance(part, Video) else 1.0
    _medium(out, part, kind, specs.vision.tokens_for(grid), grid, tokenizer, seconds)


def _medium(
    out: Rendered,
    part: Audio | Image | Video,
    kind: str,
    length: int,
    grid: tuple[int, int, int] | None,
    tokenizer: ChatTokenizer,
    seconds: float = 1.0,
) -> None:
    ids = tokenizer.ids
    opening, closing = ("audio_bos", "audio_eos") if kind == "audio" else ("vision_start", "vision_end")
    _add(out, [ids[f"<|{opening}|>"]], False)
    out.spans.append(Span(kind, 0, len(out.tokens), length, len(out.media), grid, seconds))  # type: ignore[arg-type]
    out.media.append(part)
    _add(out, [ids[f"<|{kind}_pad|>"]] * length, False)
    _add(out, [ids[f"<|{closing}|>"]], False)
