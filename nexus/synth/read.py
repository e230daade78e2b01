"""Reading sources: rows of files as records, one after the other, never a file as a whole.

A row that cannot be read is rejected with its reason and place. What is wrong with a whole source (no such file, no
such column, no row at all) is the user's mistake and raised before any work is done.
"""

import csv
import gzip
import json
import random
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from pydantic import Field

from nexus.errors import BadConfig, BadRecord
from nexus.organs import Positive, Strict
from nexus.synth.records import Record, Rejected, first_attempt
from nexus.types import Audio

Format = Literal["jsonl", "tsv", "csv", "parquet", "text", "lhotse"]
SUFFIXES: dict[str, Format] = {
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **{".tsv": "tsv", ".csv": "csv", ".parquet": "parquet", ".txt": "text"},
}
MAX_LINE_BYTES = 1 << 20
PARQUET_ROWS = 1024  # read at a time
FIELDS = ("text", "language", "audio")  # columns that are fields of a record; any other is kept in its meta


class SourceConfig(Strict):
    """One source of rows. `columns` says under which name the source keeps what: `text`, `language` and `audio` (a
    file, relative to `audio_root`), and whatever else is to be kept with the row (`reply`, `speaker`, `emotion`)."""

    path: str = ""  # empty: the recipe's `source`
    name: str = ""  # in the rows; empty: the file's stem
    format: Format | None = None  # None: by the file's suffix
    columns: dict[str, str] = Field(default_factory=lambda: {"text": "text"})
    language: str = ""  # of rows without a column for it; empty: the rules find it out
    licence: str = "unknown"
    weight: Positive = 1.0  # how often a row is drawn from here, beside the other sources
    audio_root: str = ""  # empty: the folder of the file


def read(sources: Sequence[SourceConfig], seed: int, limit: int | None) -> Iterator[Record | Rejected]:
    """Rows of all sources, mixed by their weights in an order that the seed fixes, `limit` of them at the most.

    A source that has ended leaves the others to go on. Raises BadConfig or BadRecord for a source that is not there,
    has no row or not the columns that were named; the first row of every source is read before the first is given.
    """
    if limit is not None and limit < 1:
        raise BadConfig(f"limit: expected at least 1, given {limit}")
    if not sources:
        raise BadConfig("the recipe names no source; give --set source=FILE")
    names = [source_name(source) for source in sources]
    if len(set(names)) < len(names):
        raise BadConfig(f"sources: two of one name among {', '.join(names)}; give each its own `name`")
    streams = [_begun(source) for source in sources]
    return islice(_mixed(streams, [source.weight for source in sources], seed), limit)


def source_name(source: SourceConfig) -> str:
    """What rows call the source."""
    return source.name or Path(source.path).name.split(".")[0]


def _begun(source: SourceConfig) -> Iterator[Record | Rejected]:
    """The source's rows; its first is read here."""
    rows = _rows(source)
    first = next(rows, None)
    if first is None:
        raise BadRecord(f"{source.path}: holds no row; expected at least one text")

    def all_rows() -> Iterator[Record | Rejected]:
        yield first
        yield from rows

    return all_rows()


def _mixed(
    streams: Sequence[Iterator[Record | Rejected]], weights: Sequence[float], seed: int
) -> Iterator[Record | Rejected]:
    draw = random.Random(seed)
    left = dict(enumerate(streams))
    while left:
        places = list(left)
        place = places[0] if len(places) == 1 else draw.choices(places, [weights[at] for at in places])[0]
        row = next(left[place], None)
        if row is None:
            del left[place]
        else:
            yield row


# One row: (line or row number, its columns), or what is wrong with it
Row = tuple[int, Mapping[str, Any] | Rejected]


def _rows(source: SourceConfig) -> Iterator[Record | Rejected]:
    path = Path(source.path)
    if not source.columns:
        raise BadConfig(f"{path}: columns: expected at least text, given none")
    if not path.is_file():
        raise BadConfig(f"{path}: no such file to read; check `source`")
    match _format(source, path):
        case "jsonl":
            rows = _jsonl(path, source)
        case "tsv":
            rows = _tsv(path, source)
        case "csv":
            rows = _csv(path, source)
        case "parquet":
            rows = _parquet(path, source)
        case "text":
            rows = _plain(path, source)
        case "lhotse":
            rows = _lhotse(path, source)
    for number, row in rows:
        yield row if isinstance(row, Rejected) else _record(source, number, row)


def _format(source: SourceConfig, path: Path) -> Format:
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    chosen = source.format or SUFFIXES.get(suffix.lower())
    if chosen is None:
        raise BadConfig(
            f"{path}: the suffix {path.suffix or '(none)'!r} says no format; expected {', '.join(SUFFIXES)}, or name "
            "`format` in the recipe"
        )
    return chosen


def _record(source: SourceConfig, number: int, row: Mapping[str, Any]) -> Record | Rejected:
    """A row as its record; `row` is by our names."""
    for key, value in row.items():
        if key in FIELDS and not isinstance(value, str):
            return _refused(source, number, "unreadable", f"{key}: expected a text, given {type(value).__name__}")
    text = row.get("text", "")
    if "text" in row and not text.strip():
        return _refused(source, number, "empty", "")
    if bad := _control(text):
        return _refused(source, number, "control_characters", f"U+{ord(bad):04X}", text)
    sound = None
    if "audio" in row:
        sound = Audio(path=Path(source.audio_root or Path(source.path).parent, row["audio"]))
    meta = {**_meta(source, number), **{key: value for key, value in row.items() if key not in ("text", "language")}}
    return first_attempt(text, row.get("language") or source.language, meta, sound)


def _control(text: str) -> str:
    """The first control character that is no white space, or a surrogate; empty where there is none."""
    if text.isprintable():
        return ""
    return next((c for c in text if c not in "\t\n\r" and unicodedata.category(c) in ("Cc", "Cs")), "")


def _meta(source: SourceConfig, number: int) -> dict[str, Any]:
    return {"source": source_name(source), "line": number, "licence": source.licence}


def _refused(source: SourceConfig, number: int, reason: str, said: str, text: str = "") -> Rejected:
    record = first_attempt(text[:200], source.language, _meta(source, number))
    return Rejected(record, reason, {"said": said} if said else {})


# Lines


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str | tuple[str, str]]]:
    """(number, text) of every line, or (number, (reason, what is wrong with it)); a byte order mark is dropped."""
    with _opened(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                yield number, ("line_too_long", f"more than {MAX_LINE_BYTES} bytes")
                continue
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield number, ("not_utf8", f"byte {error.start}")


def _plain(path: Path, source: SourceConfig) -> Iterator[Row]:
    for number, line in _lines(path):
        if isinstance(line, tuple):
            yield number, _refused(source, number, *line)
        elif line.strip():
            yield number, {"text": line}


def _jsonl(path: Path, source: SourceConfig) -> Iterator[Row]:
    first = True
    for number, line in _lines(path):
        if isinstance(line, tuple):
            yield number, _refused(source, number, *line)
            continue
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, _refused(source, number, "unreadable", f"is no JSON ({error})", line)
            continue
        if not isinstance(row, dict):
            yield (
                number,
                _refused(source, number, "unreadable", f"expected an object, given {type(row).__name__}", line),
            )
            continue
        missing = [name for name in source.columns.values() if name not in row]
        if missing and first:
            raise _no_column(path, missing, list(row))
        first = False
        if missing:
            yield number, _refused(source, number, "missing_column", ", ".join(missing))
        else:
            yield number, {ours: row[theirs] for ours, theirs in source.columns.items()}


def _no_column(path: Path, missing: Sequence[str], given: Sequence[str]) -> BadRecord:
    held = ", ".join(given) or "none"
    return BadRecord(f"{path}: has no column {missing[0]!r}, its columns are {held}; name them under `columns`")


# Tables


class _Feed:
    """The lines of a file for a CSV parser; those that are none are put aside."""

    def __init__(self, path: Path) -> None:
        self._lines = _lines(path)
        self.number = 0  # of the last line given
        self.refused: list[tuple[int, tuple[str, str]]] = []

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        for number, line in self._lines:
            self.number = number
            if isinstance(line, str):
                return line + "\n"
            self.refused.append((self.number, line))
        raise StopIteration


def _csv(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Comma-separated values; a quoted field may go over several lines. A field beyond 128 KiB is no field but a quote
    that was not closed."""
    feed = _Feed(path)
    parser = csv.reader(feed, strict=True)

    def rows() -> Iterator[tuple[int, list[str] | tuple[str, str]]]:
        while True:
            try:
                fields: list[str] | tuple[str, str] | None = next(parser, None)
            except csv.Error as error:
                fields = ("unreadable", f"is no CSV ({error})")
            yield from feed.refused
            feed.refused.clear()
            if fields is None:
                return
            yield feed.number, fields

    return _table(path, source, rows())


def _tsv(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Plain fields between tabs, one row per line; quotes are characters like others."""
    rows = ((number, line.split("\t") if isinstance(line, str) and line else line) for number, line in _lines(path))
    return _table(path, source, ((number, [] if row == "" else row) for number, row in rows))


def _table(path: Path, source: SourceConfig, rows: Iterator[tuple[int, Any]]) -> Iterator[Row]:
    """Rows under a header: a list is the fields, a tuple is (reason, what is wrong)."""
    header: list[str] | None = None
    for number, fields in rows:
        if isinstance(fields, tuple):
            yield number, _refused(source, number, *fields)
        elif not fields:
            continue  # a blank line
        elif header is None:
            header = fields
            missing = [name for name in source.columns.values() if name not in header]
            if missing:
                raise _no_column(path, missing, header)
        elif len(fields) != len(header):
            said = f"expected {len(header)} fields, given {len(fields)}"
            yield number, _refused(source, number, "unreadable", said, fields[0])
        else:
            row = dict(zip(header, fields, strict=True))
            yield number, {ours: row[theirs] for ours, theirs in source.columns.items()}


def _parquet(path: Path, source: SourceConfig) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise _not_installed(path, "pyarrow", "parquet") from None
    try:
        file = parquet.ParquetFile(path)
        held = file.schema_arrow.names
        missing = [name for name in source.columns.values() if name not in held]
        if missing:
            raise _no_column(path, missing, held)
        number = 0
        for batch in file.iter_batches(PARQUET_ROWS, columns=list(source.columns.values())):
            for row in batch.to_pylist():
                number += 1
                yield number, {ours: row[theirs] for ours, theirs in source.columns.items()}
    except (ArrowException, OSError) as error:
        raise BadRecord(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())}; write it again") from None


def _lhotse(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Cuts of one supervision each, with the columns text, language, speaker; `audio` is their recording's file."""
    try:
        from lhotse import CutSet
    except ImportError:
        raise _not_installed(path, "lhotse", "corpora") from None
    for number, cut in enumerate(CutSet.from_jsonl_lazy(path), 1):
        if len(cut.supervisions) != 1:
            said = f"expected a cut with one supervision, given {len(cut.supervisions)}"
            yield number, _refused(source, number, "unreadable", said, cut.id)
            continue
        said_of = cut.supervisions[0]
        held = {"text": said_of.text, "language": said_of.language, "speaker": said_of.speaker, "id": cut.id}
        if cut.has_recording and cut.recording.sources[0].type == "file":
            held |= {"audio": cut.recording.sources[0].source, "start": cut.start, "seconds": cut.duration}
        missing = [name for name in source.columns.values() if held.get(name) is None]
        if missing:
            yield number, _refused(source, number, "missing_column", ", ".join(missing))
        else:
            yield number, {ours: held[theirs] for ours, theirs in source.columns.items()}


def _not_installed(path: Path, package: str, extra: str) -> BadConfig:
    return BadConfig(f"{path}: needs the package {package}, which is not installed; pip install 'nexus-omni[{extra}]'")
