"""Speech to learn from, made beforehand: language states and codec codes in shards, and which of them a step sees.

A folder of `nexus prepare` holds numbered safetensors shards and `index.json`, which is written last: where it lies,
the folder is whole. Rows are read from their shard when they are asked for; nothing but the index stays in memory.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nexus.data.chat import ChatTokenizer, Rendered
from nexus.data.stream import Budget, Lengths, cut
from nexus.errors import BadCheckpoint, BadConfig
from nexus.recipe import fingerprint
from nexus.types import Audio, Script, SpeechBatch, Text, Turn

FORMAT = "nexus-prepared/2"
INDEX = "index.json"
FRAME_GRAIN = 8  # batches are padded to multiples of so many frames, and of so many words: few shapes, as packs have
OPEN_SHARDS = 64  # kept open at a time by a process


@dataclass(frozen=True)
class Line:
    """One thing the voice learns to say: language states and input embeddings of its tokens, their letters, and its
    codes."""

    states: Float[Tensor, "N D"]
    embeds: Float[Tensor, "N D"]
    letters: Int[Tensor, "N Z"]
    codes: Int[Tensor, "K S"]


def speech_batch(lines: Sequence[Line]) -> SpeechBatch:
    """Lines side by side, padded with zeros."""

    def pad(tensors: list[Tensor]) -> Tensor:
        padded = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        return nn.functional.pad(padded, (0, 0, 0, -padded.shape[1] % FRAME_GRAIN))

    script = Script(
        pad([line.states for line in lines]),
        pad([line.embeds for line in lines]),
        pad([line.letters for line in lines]).long(),
        torch.tensor([len(line.letters) for line in lines]),
    )
    codes = pad([line.codes.T for line in lines]).transpose(1, 2).long()
    return SpeechBatch(script, codes, torch.tensor([line.codes.shape[1] for line in lines]))


def words_said(turns: Sequence[Turn], rendered: Rendered, tokenizer: ChatTokenizer) -> list[list[int]]:
    """Positions of the tokens that each turn says in its rendering: the words of a spoken answer, and words to be read
    aloud, which are what an answer without words of its own says."""
    places, start = [], 0
    for turn in turns:
        speaks = turn.role == "assistant" and any(isinstance(part, Audio) for part in turn.parts)
        texts = [part for part in turn.parts if isinstance(part, Text) and (speaks or part.aloud)]
        end = start + sum(len(tokenizer.encode(part.text)) for part in texts)
        places.append(rendered.spoken[start:end])
        start = end
    assert start == len(rendered.spoken), (start, len(rendered.spoken))
    return places


def mistaken(
    codes: Int[Tensor, "B K S"], wrong_codes: float, wrong_frames: float, generator: torch.Generator
) -> Int[Tensor, "B K S"]:
    """Codes with a share of them replaced by others, and of a share of the frames all: in use the voice's past is its
    own, with mistakes in it."""
    rows, _, frames = codes.shape
    wrong: Bool[Tensor, "B K S"] = torch.rand(codes.shape, generator=generator) < wrong_codes
    wrong |= torch.rand((rows, 1, frames), generator=generator) < wrong_frames
    others = torch.randint(0, int(codes.max()) + 1, codes.shape, generator=generator)
    return torch.where(wrong, others, codes)


class Prepared:
    """The lines of a folder of `nexus prepare`, by number.

    `frames` and `tokens` i64 [N] are the lengths of the lines, `seconds` f64 [N] their durations, `fingerprint` sixteen
    hex digits over what they were made of, `identity` the parts of it by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _read_index(folder)
        self.identity: dict[str, Any] = index["identity"]
        self.fingerprint = fingerprint(self.identity)
        self._files = [folder / shard["file"] for shard in index["shards"]]
        self._starts = [_starts(shard["tokens"], shard["frames"]) for shard in index["shards"]]
        counts = [len(shard["frames"]) for shard in index["shards"]]
        self._ends = np.cumsum(counts)
        self.frames = np.concatenate([np.asarray(shard["frames"], np.int64) for shard in index["shards"]])
        self.tokens = np.concatenate([np.asarray(shard["tokens"], np.int64) for shard in index["shards"]])
        self.seconds = self.frames / self.identity["voice"]["frame_rate_hz"]
        if not len(self.frames):
            raise BadConfig(f"{folder}: holds no line to learn, all rows were rejected; see its rejects.jsonl")

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, number: int) -> Line:
        """Line `number`; states and embeddings in the type of numbers they were stored in. Raises BadCheckpoint where
        its shard is damaged."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        place = number - (int(self._ends[shard - 1]) if shard else 0)
        tokens, frames = self._starts[shard]
        path = self._files[shard]
        try:
            file = _opened(path)
            said = slice(int(tokens[place]), int(tokens[place + 1]))
            entries = file.get_slice("entries")[said].long()
            return Line(
                file.get_slice("states")[said],
                _table(path)[entries],
                file.get_slice("letters")[said].long(),
                file.get_slice("codes")[:, int(frames[place]) : int(frames[place + 1])].long(),
            )
        except (SafetensorError, OSError) as error:
            raise BadCheckpoint(
                f"{path}: damaged or gone ({' '.join(str(error).split())}); remove it and {INDEX}, and run the same "
                "nexus prepare command again"
            ) from None

    def check(self, made_of: Mapping[str, Any], model: Path) -> None:
        """Raises BadConfig unless the lines were made of the model whose parts have the fingerprints `made_of`."""
        for part, wanted in made_of.items():
            given = self.identity["model"].get(part)
            if given != wanted:
                raise BadConfig(
                    f"{self.folder} was prepared with {part} {given}, {model} has {part} {wanted}; prepare anew: nexus "
                    f"prepare {model} DATA.jsonl --out ANOTHER"
                )


class SpeechBatches:
    """Batches of one rank: lines of similar length under a budget of seconds (padding counted), in a seeded order.

    `at` is a pure function of the step. Over an epoch, which ends in the midst of a step where ranks do not divide it,
    every line is seen once. `wrong_codes` and `wrong_frames` are those of the stage. Raises BadConfig for a line that
    is longer than the budget.
    """

    def __init__(
        self,
        lines: Prepared,
        seconds_per_batch: float,
        seed: int,
        wrong_codes: float = 0.0,
        wrong_frames: float = 0.0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        longest = int(lines.seconds.argmax())
        if lines.seconds[longest] > seconds_per_batch:
            raise BadConfig(
                f"{lines.folder}: line {longest} has {lines.seconds[longest]:.1f} s, a batch may hold "
                f"{seconds_per_batch:g} s (data.audio_seconds_per_batch); raise it"
            )
        self._lines, self._seed, self._rank, self._world = lines, seed, rank, world
        self._wrong = wrong_codes, wrong_frames
        self._seconds = seconds_per_batch
        self._cuts = _cuts(np.sort(lines.frames), seconds_per_batch * lines.identity["voice"]["frame_rate_hz"])
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over what decides on the batch of every step, except rank and world."""
        return fingerprint([self._lines.fingerprint, self._seconds, self._seed, self._wrong])

    @property
    def batches_per_epoch(self) -> int:
        """Steps until every line has been seen by some rank."""
        return -(-self._count // self._world)

    @property
    def _count(self) -> int:
        return len(self._cuts) - 1

    @property
    def padding(self) -> float:
        """Share of frames in the batches of an epoch that are padding."""
        lengths = np.sort(self._lines.frames)
        padded = sum((end - start) * lengths[end - 1] for start, end in zip(self._cuts, self._cuts[1:], strict=False))
        return 1.0 - float(lengths.sum() / padded)

    def chosen(self, step: int) -> list[int]:
        """Numbers of the lines this rank sees at `step`."""
        epoch, place = divmod(step * self._world + self._rank, self._count)
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self._seed, epoch])
            shuffled = rng.permutation(len(self._lines))  # lines of one length meet others in every epoch
            order = shuffled[np.argsort(self._lines.frames[shuffled], kind="stable")]
            self._epoch = epoch, order, rng.permutation(self._count)
        _, order, places = self._epoch
        start, end = self._cuts[places[place]], self._cuts[places[place] + 1]
        return order[start:end].tolist()

    def at(self, step: int) -> SpeechBatch:
        """The batch of a step, with mistakes in the past it shows where the stage asks for them."""
        batch = speech_batch([self._lines[number] for number in self.chosen(step)])
        if not any(self._wrong):
            return batch
        draw = np.random.SeedSequence([self._seed, step, self._rank, self._world]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(draw[0] >> np.uint64(1)))
        return replace(batch, previous=mistaken(batch.codes, *self._wrong, generator))


def _cuts(lengths: np.ndarray, budget: float) -> list[int]:
    """Where batches of ascending lengths begin, and the end: as many rows each as the budget holds when padded."""
    nothing = np.zeros(len(lengths))
    return [*cut(Lengths(lengths, nothing, nothing, nothing), Budget(int(budget), 0.0)), len(lengths)]


def _starts(tokens: Sequence[int], frames: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.cumsum([0, *tokens]), np.cumsum([0, *frames])


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise BadConfig(
            f"{folder}: holds no {INDEX}, expected a folder that nexus prepare has finished; run that command (again)"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        found = index["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadConfig(f"{path}: is no index of prepared speech: {error!r}; run nexus prepare again") from None
    if found != FORMAT:
        raise BadConfig(f"{path}: expected format {FORMAT!r}, found {found!r}; run nexus prepare again")
    for shard in index["shards"]:
        if not (folder / Path(shard["file"]).name).is_file():
            raise BadConfig(f"{folder}: {shard['file']} is missing; remove {INDEX} and run nexus prepare again")
    return dict(index)


@functools.lru_cache(OPEN_SHARDS)
def _opened(path: Path) -> Any:
    return safe_open(path, framework="pt")


@functools.lru_cache(OPEN_SHARDS)
def _table(path: Path) -> Tensor:
    """The embeddings of a shard's vocabulary."""
    return _opened(path).get_tensor("embeds")
