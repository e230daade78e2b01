"""`nexus prepare`: what stage 3 learns from, made once. The frozen language model reads every row with a spoken answer,
the codec codes the answer's sound; states and codes are kept in shards (`nexus.data.prepared` reads them).

The rows of a shard follow from its number alone, and a shard appears under its name when it is whole: several processes
share the shards without talking to each other, and a killed run goes on behind its last whole shard.
"""

import functools
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nexus import media
from nexus.data.chat import ChatTokenizer, Rendered, render
from nexus.data.collate import collate
from nexus.data.headers import frames_per_second, limits_for
from nexus.data.jsonl import file_digest, lines_of, read_row
from nexus.data.prepared import FORMAT, INDEX, Line, Prepared, words_said
from nexus.errors import BadConfig, BadMedia, BadRecord
from nexus.model.folder import load_model, read_config
from nexus.model.omni import OmniModel
from nexus.organs import ModelConfig
from nexus.progress import Progress
from nexus.recipe import code_digest, fingerprint
from nexus.results import write_whole
from nexus.source import Limits
from nexus.train.voice import weight_fingerprints
from nexus.types import LETTERS, Audio, Part, Sample, Turn

PLAN, REJECTS = "plan.json", "rejects.jsonl"
ABOUT = "nexus"  # the entry of a shard's header that says what is in it
HEARD_RATE_HZ = 16_000


@runtime_checkable
class Rows(Protocol):
    """Conversations by number; a row that cannot be read raises BadRecord or BadMedia when it is asked for."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Sample: ...

    def where(self, row: int) -> str:
        """How messages call a row."""
        ...


class Lines:
    """The rows of a JSONL file, good and bad (`nexus.data.records`). Raises BadRecord for a file that is none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.fingerprint = file_digest(path)[:16]
        self._places = np.array([(number, start, len(line)) for number, start, line in lines_of(path)], np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> Sample:
        """Row `row`, its media still files. Raises BadRecord naming file and line."""
        _, start, size = self._places[row].tolist()
        with open(self._path, "rb") as file:
            file.seek(start)
            return read_row(file.read(size), self.where(row), self._path.parent)

    def where(self, row: int) -> str:
        """File and line, from 1."""
        return f"{self._path}:{self._places[row][0]}"


@dataclass(frozen=True)
class Sizes:
    """Rows per shard, and rows that the language model reads at a time. Both belong to what a folder is: the last bits
    of a state depend on the rows beside it."""

    rows_per_shard: int = 128
    rows_per_batch: int = 16


@dataclass(frozen=True)
class Rejected:
    """A row, or one of its turns, from which nothing is learned, and why."""

    where: str
    id: str
    turn: int | None  # None: the whole row
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What a process has found: whether the folder is whole, and how many lines and rejections it then has."""

    whole: bool
    lines: int
    rejected: int
    shards_made: int
    shards_found: int


@dataclass(frozen=True)
class _Spoken:
    """One turn to learn: the row it is in, the tokens that are said, its codes."""

    row: int
    id: str
    turn: int
    at: Sequence[int]  # positions in `rendered`
    rendered: Rendered
    codes: Tensor  # i64 [K, S]


def fingerprints(folder: Path) -> dict[str, str]:
    """Sixteen hex digits over each part of a model that prepared speech depends on: the weights of language, vision,
    hearing and codec, the tokenizer, and the position of the states. Raises BadCheckpoint."""
    config, _ = read_config(folder)
    if config.voice is None:
        raise BadConfig(f"{folder}: this model has no voice, so there is no speech to prepare; add voice and codec")
    tokenizer = ChatTokenizer.load(folder / "tokenizer.json")
    specials = {"letters": hashlib.sha256(tokenizer.letters.tobytes()).hexdigest(), "ids": tokenizer.ids}
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    shape = config.model_dump(mode="json", include={"language", "vision", "hearing", "codec"})
    return {
        **weight_fingerprints(folder, ("language", "vision", "hearing", "codec")),
        "tokenizer": fingerprint([text, specials]),
        "config": fingerprint(shape),
        "states": config.voice.states,
    }


def open_prepared(folder: Path, model: Path) -> Prepared:
    """Prepared speech, once it is certain that it was made of this model folder. Raises BadConfig naming both
    fingerprints where it was not."""
    lines = Prepared(folder)
    lines.check(fingerprints(model), model)
    return lines


def prepare(
    folder: Path,
    rows: Rows,
    out: Path,
    *,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    sizes: Sizes | None = None,
    device: str = "cpu",
    rank: int = 0,
    world: int = 1,
    tell: Callable[[int], None] = lambda rows: None,
) -> Outcome:
    """Make this rank's shards of `rows` with the model in `folder`; the rank that finds all of them whole writes
    index.json and rejects.jsonl.

    `dtype` is that of the stored states and embeddings; `tell` hears of the rows that are done. Raises BadConfig for a
    folder that was begun otherwise, a model without a voice, and a codec whose tokens are made elsewhere.
    """
    sizes = sizes or Sizes()
    config, _ = read_config(folder)
    identity = _identity(folder, config, rows, dtype, sizes)
    _begin(out, identity)
    count = -(-len(rows) // sizes.rows_per_shard)
    mine = [number for number in range(count) if number % world == rank]
    missing = [number for number in mine if not _is_whole(out / _name(number), identity)]
    tell(sum(len(_rows_of(number, rows, sizes)) for number in mine if number not in missing))
    if missing:
        maker = _Maker(folder, config, rows, device, dtype, sizes)
        for number in missing:
            lines, rejected = maker.shard(_rows_of(number, rows, sizes))
            _write_shard(out / _name(number), lines, rejected, identity)
            tell(len(_rows_of(number, rows, sizes)))
    return _finish(out, identity, count, len(missing), len(mine) - len(missing))


def prepare_file(
    folder: Path,
    data: Path,
    out: Path,
    *,
    dtype: Literal["bfloat16", "float32"],
    device: str,
    progress: Progress,
) -> Outcome:
    """`prepare` of a JSONL file by this process, alone or as one of several that torchrun started: these need not hear
    of each other. `device` cuda is this process's own GPU."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    rows = Lines(data)
    with progress.stage("prepare", len(rows) if world == 1 else None, "rows") as watch:
        outcome = prepare(folder, rows, out, dtype=dtype, device=device, rank=rank, world=world, tell=watch.advance)
    if outcome.whole:
        progress.say(f"{out}: {outcome.lines} spoken answers, {outcome.rejected} rejected ({out / REJECTS})")
    else:
        progress.say(f"{out}: the shards of rank {rank} are there, those of other ranks are not yet")
    return outcome


def _identity(folder: Path, config: ModelConfig, rows: Rows, dtype: str, sizes: Sizes) -> dict[str, Any]:
    """What a folder is made of: nothing else may be added to it."""
    model = fingerprints(folder)
    assert config.voice is not None and config.codec is not None
    if config.codec.type == "cosyvoice2":
        raise BadConfig(
            f"{folder}: the codes of codec {config.codec.type} are made elsewhere, expected rvq or firefly; prepare "
            "speech with a model whose codec is its own"
        )
    if not len(rows):
        raise BadConfig("the data hold no row, expected conversations with spoken answers; name another file")
    voice = {"books": config.voice.books, "width": config.language.width, "frame_rate_hz": config.codec.frame_rate_hz}
    data = {"fingerprint": rows.fingerprint, "rows": len(rows)}
    return {"model": model, "voice": voice, "data": data, "dtype": dtype, **asdict(sizes), "code": _code()}


@functools.cache
def _code() -> str:
    """The code that runs in this process, whatever happens to its files meanwhile."""
    return code_digest()


def _begin(out: Path, identity: dict[str, Any]) -> None:
    """Claim a folder for `identity`, or go on in one claimed for the same. Of several ranks one comes first."""
    path = out / PLAN
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            strange = [item.name for item in out.iterdir() if not item.name.startswith((PLAN, f".{PLAN}"))]
            if strange and not path.exists():  # looked at again: another rank may have begun meanwhile
                raise BadConfig(f"{out} holds {strange[0]} and no {PLAN}, expected a new folder; give another --out")
            unfinished = out / f".{PLAN}.{secrets.token_hex(4)}"
            unfinished.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
            try:
                os.link(unfinished, path)  # unlike a rename, this leaves the plan of a faster rank alone
            except FileExistsError:
                pass
            finally:
                unfinished.unlink()
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadConfig(f"{out}: cannot be used as a result folder ({error}); give another --out") from None
    differs = list(_differences(theirs, identity))
    if differs:
        raise BadConfig(f"{out} holds other prepared speech; different: {', '.join(differs)}; give another --out")


def _differences(theirs: dict[str, Any], mine: dict[str, Any], above: str = "") -> Iterator[str]:
    for key in sorted(theirs.keys() | mine.keys()):
        there, here = theirs.get(key), mine.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _differences(there, here, f"{above}{key}.")
        elif there != here:
            yield f"{above}{key} (there {there}, now {here})"


def _rows_of(number: int, rows: Rows, sizes: Sizes) -> range:
    start = number * sizes.rows_per_shard
    return range(start, min(start + sizes.rows_per_shard, len(rows)))


def _name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


class _Maker:
    """The model, and what turns rows into lines."""

    def __init__(self, folder: Path, config: ModelConfig, rows: Rows, device: str, dtype: str, sizes: Sizes) -> None:
        self._rows, self._sizes, self._dtype = rows, sizes, getattr(torch, dtype)
        self._model: OmniModel = load_model(folder, device)
        self._tokenizer = ChatTokenizer.load(folder / "tokenizer.json")
        assert config.voice is not None and config.codec is not None
        self._config, self._answer_rate_hz, self._max_seconds = config, config.codec.rate_hz, config.voice.max_seconds
        self._heard = limits_for(config)
        self._said = replace(Limits(), max_audio_seconds=config.voice.max_seconds)
        self._frames_per_second = frames_per_second(config)

    def shard(self, numbers: Sequence[int]) -> tuple[list[tuple[_Spoken, Line]], list[Rejected]]:
        """The lines of some rows in order, and what is left out of them."""
        spoken: list[_Spoken] = []
        rejected: list[Rejected] = []
        for row in numbers:
            name = ""
            try:
                sample = self._rows[row]
                name = sample.id
                spoken += self._turns(row, sample, rejected)
            except (BadRecord, BadMedia) as error:
                rejected.append(Rejected(self._rows.where(row), name, None, str(error)))
        by_length = sorted(range(len(spoken)), key=lambda i: len(spoken[i].rendered.tokens))
        lines: dict[int, Line] = {}
        for start in range(0, len(by_length), self._sizes.rows_per_batch):
            some = by_length[start : start + self._sizes.rows_per_batch]
            lines.update(zip(some, self._lines([spoken[i] for i in some]), strict=True))
        return [(turn, lines[i]) for i, turn in enumerate(spoken)], rejected

    def _turns(self, row: int, sample: Sample, rejected: list[Rejected]) -> Iterator[_Spoken]:
        """The spoken turns of a conversation. Raises BadRecord or BadMedia where nothing of it can be used."""
        aloud = [n for n, turn in enumerate(sample.turns) if turn.role == "assistant" and _sounds(turn)]
        if not aloud:
            raise BadRecord("no spoken answer: no assistant turn holds sound; give the answer's recording")
        turns = [self._loaded(turn) for turn in sample.turns]
        rendered = render(turns, self._tokenizer, self._config)
        places = words_said(turns, rendered, self._tokenizer)
        for number in aloud:
            try:
                codes = self._codes(sample.turns[number])
                at = places[number] or (places[number - 1] if number else [])
                if not at:
                    raise BadRecord("no words: the turn has sound and no text that it says; give its transcript")
            except (BadRecord, BadMedia) as error:
                rejected.append(Rejected(self._rows.where(row), sample.id, number, str(error)))
                continue
            yield _Spoken(row, sample.id, number, at, rendered, codes)

    def _loaded(self, turn: Turn) -> Turn:
        """A turn with its media read; the answer's own sound is read where it is coded."""

        def load(part: Part) -> Part:
            if isinstance(part, Audio) and turn.role == "assistant":
                return part
            return media.load(part, self._heard, HEARD_RATE_HZ, self._frames_per_second)

        return replace(turn, parts=tuple(load(part) for part in turn.parts))

    @torch.no_grad()
    def _codes(self, turn: Turn) -> Tensor:
        """Codes i64 [K, S] of what a turn sounds like."""
        sounds = _sounds(turn)
        if len(sounds) > 1:
            raise BadRecord(f"{len(sounds)} sounds in one answer, expected 1; join them")
        sound = media.load(sounds[0], self._said, self._answer_rate_hz)
        assert isinstance(sound, Audio) and sound.samples is not None and self._model.codec is not None
        if sound.seconds > self._max_seconds:
            raise BadMedia(
                f"answer of {sound.seconds:.1f} s is longer than the voice's limit of {self._max_seconds:g} s "
                "(voice.max_seconds); cut it into turns"
            )
        wave = torch.from_numpy(sound.samples).to(self._model.device)
        return self._model.codec.encode(wave[None, None])[0].cpu()

    @torch.no_grad()
    def _lines(self, turns: Sequence[_Spoken]) -> list[Line]:
        batch = collate([turn.rendered for turn in turns], self._tokenizer.pad, self._config)
        states = self._model.spoken_states(batch, [turn.at for turn in turns])
        made = []
        for turn, state in zip(turns, states, strict=True):
            tokens = [turn.rendered.tokens[at] for at in turn.at]
            embeds = self._model.language.embed(torch.tensor(tokens, device=self._model.device))
            letters = torch.from_numpy(self._tokenizer.letters[tokens]).long()
            made.append(Line(state.to(self._dtype).cpu(), embeds.to(self._dtype).cpu(), letters, turn.codes))
        return made


def _sounds(turn: Turn) -> list[Audio]:
    return [part for part in turn.parts if isinstance(part, Audio)]


def _write_shard(
    path: Path, made: Sequence[tuple[_Spoken, Line]], rejected: Sequence[Rejected], identity: dict[str, Any]
) -> None:
    """Whole or not at all. Embeddings are kept once per different token: `entries` says which each token has."""
    books, width = identity["voice"]["books"], identity["voice"]["width"]
    lines = [line for _, line in made]
    none = torch.zeros(0, width, dtype=getattr(torch, identity["dtype"]))
    said = torch.tensor([turn.rendered.tokens[at] for turn, _ in made for at in turn.at], dtype=torch.long)
    vocabulary, entries = said.unique(return_inverse=True)
    embeds = torch.cat([none, *(line.embeds for line in lines)])
    first = torch.full((len(vocabulary),), len(said)).scatter_reduce(0, entries, torch.arange(len(said)), "amin")
    tensors = {
        "states": torch.cat([none, *(line.states for line in lines)]),
        "entries": entries.int(),
        "embeds": embeds[first],
        "letters": torch.cat([torch.zeros(0, LETTERS).long(), *(line.letters for line in lines)]).to(torch.uint8),
        "codes": torch.cat([torch.zeros(books, 0, dtype=torch.long), *(line.codes for line in lines)], dim=1).int(),
    }
    about = {
        "identity": fingerprint(identity),
        "rows": [{"row": turn.row, "id": turn.id, "turn": turn.turn} for turn, _ in made],
        "tokens": [len(line.letters) for line in lines],
        "frames": [line.codes.shape[1] for line in lines],
        "rejected": [asdict(one) for one in rejected],
    }
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        # One entry, because the library writes several in no order: the same rows are to give the same bytes.
        notes = {ABOUT: json.dumps(about)}
        with open(partial, "wb") as file:  # a file that the library makes could be read by its owner alone
            file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, notes))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise BadConfig(
            f"{path}: cannot be written ({' '.join(str(error).split())}); free space and run again"
        ) from None


def _about(path: Path) -> dict[str, Any]:
    """What a shard says of itself; nothing where it is not there, cut off or damaged in its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {}).get(ABOUT, "{}")))
    except (SafetensorError, OSError, ValueError):
        return {}


def _is_whole(path: Path, identity: dict[str, Any]) -> bool:
    return _about(path).get("identity") == fingerprint(identity)


def _finish(out: Path, identity: dict[str, Any], count: int, made: int, found: int) -> Outcome:
    """Write index and rejects once every shard is there; whoever comes last writes what the others would have."""
    shards: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    for number in range(count):
        about = _about(out / _name(number))
        if about.get("identity") != fingerprint(identity):
            return Outcome(False, 0, 0, made, found)
        shards.append({"file": _name(number), "tokens": about["tokens"], "frames": about["frames"]})
        rejected += about["rejected"]
    lines = sum(len(shard["frames"]) for shard in shards)
    for left in out.glob(".shard-*"):  # of processes that were killed while they wrote
        left.unlink(missing_ok=True)
    write_whole(out / REJECTS, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rejected))
    index = {"format": FORMAT, "identity": identity, "lines": lines, "rejected": len(rejected), "shards": shards}
    write_whole(out / INDEX, json.dumps(index) + "\n")
    return Outcome(True, lines, len(rejected), made, found)
