"""`nexus data check` and `nexus data import`: every row of a file looked at by several processes, bad ones named, good
ones written in the canonical form.

Files are read in pieces, so memory does not grow with them. Bad rows end nothing: each is handed to the caller with its
number and reason, in order.
"""

import functools
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from nexus.data.chat import ChatTokenizer
from nexus.data.cuts import ENDING, import_cuts
from nexus.data.headers import DEFAULT_FPS, RATE_HZ, frames_per_second, limits_for, row_length
from nexus.data.jsonl import lines_of, naming, read_row
from nexus.data.records import media_files, with_media, without_twins, write_record
from nexus.errors import BadConfig, BadMedia, BadRecord, NexusError
from nexus.media import load
from nexus.organs import ModelConfig
from nexus.processes import in_processes
from nexus.results import whole
from nexus.source import DEFAULT, Limits
from nexus.types import Audio, MediaKind, Part, Sample, Turn

SPAN_LINES, SPAN_BYTES = 64, 8 * 2**20  # what a process takes at a time
TOLD = Callable[[int, str], None]


@dataclass(frozen=True)
class Checked:
    """What a file holds: rows and how many of them are good or bad; of the good ones, the seconds that are heard and
    those that are spoken, and the positions of the longest (None where no model was given)."""

    rows: int
    good: int
    bad: int
    heard_seconds: float
    spoken_seconds: float
    longest_tokens: int | None


@dataclass(frozen=True)
class _Span:
    """Lines of a file that one process looks at."""

    start: int
    size: int
    first_line: int


@dataclass(frozen=True)
class _Seen:
    """A row that was looked at: what is wrong with it, or what is written of it."""

    line: int
    reason: str = ""
    row: str = ""
    heard_seconds: float = 0.0
    spoken_seconds: float = 0.0
    tokens: int | None = None


def check(
    file: Path,
    bad: TOLD,
    *,
    specs: ModelConfig | None = None,
    tokenizer: Path | None = None,
    good: Path | None = None,
    processes: int = 1,
    told: Callable[[int], None] | None = None,
) -> Checked:
    """Look at every row of a file: whether it can be read, its media decoded within the limits, and its length fits.

    `specs` and `tokenizer` (its tokenizer.json) are of the model whose limits hold and with which positions are counted
    as in training; without them the general limits on media hold. `bad(line, reason)` is called for every bad row,
    `told(rows)` as work goes on. Good rows are written to `good` in the canonical form, media that stand in rows to a
    folder beside it.
    Raises BadRecord for a file that cannot be read, BadConfig for a `good` that exists.
    """
    assert (specs is None) == (tokenizer is None), "a model has both"
    return _run(_Look(file, good, specs, tokenizer, decode=True, copy=False), bad, processes, told)


def import_(
    file: Path,
    out: Path,
    bad: TOLD,
    *,
    copy: bool = False,
    processes: int = 1,
    told: Callable[[int], None] | None = None,
) -> Checked:
    """Write the rows of a file in a known format (JSONL, one JSON list, lhotse's cuts) to `out` in the canonical form.

    Media are named relative to `out` where they lie in its folder, else by absolute path; with `copy` they are copied
    to `OUT-media` beside it, as are media that stand in rows, and the stretches of sound of cuts. They must exist, but
    are not decoded: `check` does that. `bad`, `told` and errors as in `check`.
    """
    if file.name.endswith(ENDING):
        return _cuts(file, out, bad, told)
    return _run(_Look(file, out, None, None, decode=False, copy=copy), bad, processes, told)


def _cuts(file: Path, out: Path, bad: TOLD, told: Callable[[int], None] | None) -> Checked:
    _refuse_existing(out)
    good, heard, num_bad = 0, 0.0, 0

    def listed(line: int, reason: str) -> None:
        nonlocal num_bad
        num_bad += 1
        bad(line, reason)

    with _written(out) as written:
        for row, seconds in import_cuts(file, _media_folder(out), out.absolute().parent, listed):
            written.write(row + "\n")
            good, heard = good + 1, heard + seconds
            if told is not None:
                told(good + num_bad)
    return Checked(good + num_bad, good, num_bad, heard, 0.0, None)


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise BadConfig(f"{out}: exists already, expected a new file; remove it or name another")


def _media_folder(out: Path) -> Path:
    return out.absolute().with_name(f"{out.stem}-media")


def _run(look: "_Look", bad: TOLD, processes: int, told: Callable[[int], None] | None) -> Checked:
    if processes < 1:
        raise BadConfig(f"--jobs {processes}: expected at least 1 process")
    if look.out is not None:
        _refuse_existing(look.out)
    counts, heard, spoken, longest = {True: 0, False: 0}, 0.0, 0.0, None
    with ExitStack() as stack:
        lines = stack.enter_context(_as_lines(look.file))
        look = replace(look, lines=lines)
        spans = list(_spans(lines))
        if not spans:
            raise BadRecord(f"{look.file}: holds no rows, expected one JSON object a line; name another file")
        written = stack.enter_context(_written(look.out)) if look.out is not None else None
        several = processes > 1 and len(spans) > 1
        pieces: Iterable[list[_Seen]] = in_processes(look, spans, processes, 1) if several else map(look, spans)
        for piece in pieces:
            for seen in piece:
                counts[not seen.reason] += 1
                if seen.reason:
                    bad(seen.line, seen.reason)
                    continue
                heard, spoken = heard + seen.heard_seconds, spoken + seen.spoken_seconds
                longest = seen.tokens if longest is None else max(longest, seen.tokens or 0)
                if written is not None:
                    written.write(seen.row + "\n")
            if told is not None:
                told(sum(counts.values()))
    return Checked(sum(counts.values()), counts[True], counts[False], heard, spoken, longest)


@dataclass(frozen=True)
class _Look:
    """What is done with every row of `file`, whose rows stand in the JSONL file `lines`."""

    file: Path
    out: Path | None
    specs: ModelConfig | None
    tokenizer: Path | None
    decode: bool
    copy: bool
    lines: Path = Path()

    def __call__(self, span: _Span) -> list[_Seen]:
        with open(self.lines, "rb") as file:
            file.seek(span.start)
            lines = file.read(span.size).split(b"\n")
        numbered = ((span.first_line + n, line) for n, line in enumerate(lines) if line.strip())
        return [self._row(number, line) for number, line in numbered]

    def _row(self, number: int, line: bytes) -> _Seen:
        where, kept = f"{self.file}:{number}", set[Path]()
        with ExitStack() as stack:

            def keep(kind: MediaKind, content: bytes, ending: str) -> Path:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                path = Path(folder) / f"{kind}.{ending or 'bin'}"
                path.write_bytes(content)
                kept.add(path)
                return path

            try:
                sample = read_row(line, where, self.file.parent, keep)
                with naming(where):
                    return self._seen(number, sample, kept)
            except NexusError as error:
                reason = str(error).removeprefix(f"{where}: ")
                for path in kept:
                    reason = reason.replace(str(path), f"the {path.stem} in the row")
                return _Seen(number, reason)

    def _seen(self, number: int, sample: Sample, kept: Set[Path]) -> _Seen:
        heard = spoken = 0.0
        tokens = None
        if self.decode:
            shown, heard, spoken = self._decoded(sample)
            tokens = self._positions(shown)
        else:
            for _, path in media_files(sample):
                if not path.is_file():
                    raise BadMedia(f"{path}: no such file; check the path")
        row = ""
        if self.out is not None:
            moved = [
                self._settled(path) if self.copy or path in kept else path.absolute() for _, path in media_files(sample)
            ]
            row = write_record(with_media(sample, moved), self.out.absolute().parent)
        return _Seen(number, "", row, heard, spoken, tokens)

    def _decoded(self, sample: Sample) -> tuple[Sample, float, float]:
        """The sample with its media in memory, and how many seconds are heard and spoken in it."""
        limits, fps = (limits_for(self.specs), frames_per_second(self.specs)) if self.specs else (DEFAULT, DEFAULT_FPS)
        heard = spoken = 0.0
        turns = []
        for turn in sample.turns:
            parts: list[Part] = []
            for part in turn.parts:
                answers = turn.role == "assistant"
                opened = load(part, self._of_answers(limits) if answers else limits, RATE_HZ, fps)
                if isinstance(opened, Audio):
                    heard, spoken = heard + opened.seconds * (not answers), spoken + opened.seconds * answers
                parts.append(opened)
            turns.append(Turn(turn.role, tuple(parts)))
        return replace(sample, turns=tuple(turns)), heard, spoken

    def _of_answers(self, limits: Limits) -> Limits:
        voice = self.specs.voice if self.specs else None
        return replace(limits, max_audio_seconds=voice.max_seconds) if voice else limits

    def _positions(self, shown: Sample) -> int | None:
        """Positions of a row, None where no model is given. Raises BadRecord for what the model cannot take."""
        if self.specs is None or self.tokenizer is None:
            return None
        return row_length(shown, _tokenizer(self.tokenizer), self.specs).tokens

    def _settled(self, path: Path) -> Path:
        """A copy of a medium beside the new file, under a name that tells its content."""
        assert self.out is not None
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
        folder = _media_folder(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{path.stem}-{digest}{path.suffix}"
        if not target.exists():
            partial = folder / f".{secrets.token_hex(8)}"
            shutil.copyfile(path, partial)
            os.replace(partial, target)
        return target


@functools.lru_cache(1)
def _tokenizer(path: Path) -> ChatTokenizer:
    return ChatTokenizer.load(path)


def _spans(path: Path) -> Iterator[_Span]:
    begun: _Span | None = None
    for number, start, line in lines_of(path):
        end = start + len(line)
        if begun is not None and (number - begun.first_line >= SPAN_LINES or end - begun.start > SPAN_BYTES):
            yield begun
            begun = None
        begun = replace(begun, size=end - begun.start) if begun else _Span(start, len(line), number)
    if begun is not None:
        yield begun


@contextmanager
def _as_lines(path: Path) -> Iterator[Path]:
    """The file itself, or the items of one JSON list as lines of a temporary file: their numbers are the items'."""
    try:
        with open(path, "rb") as file:
            is_list = file.read(64).lstrip().startswith(b"[")
    except OSError as error:
        raise BadRecord(f"{path}: cannot be read ({error.strerror}); name an existing file of rows") from None
    if not is_list:
        yield path
        return
    if path.stat().st_size > DEFAULT.max_file_bytes:
        raise BadRecord(f"{path}: one JSON list of over {DEFAULT.max_file_bytes:,} bytes; write one object a line")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_twins)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{path}: begins as a JSON list but is none: {error}; write one object a line") from None
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "rows.jsonl"
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        yield lines


@contextmanager
def _written(path: Path) -> Iterator[TextIO]:
    """A text file that is there as a whole in the end, or not at all. Raises BadConfig where it cannot be written."""
    if not path.parent.is_dir():
        raise BadConfig(f"{path}: cannot be written, there is no {path.parent}; name a file in an existing folder")
    with whole(path) as file:
        yield file
