"""A JSONL file of a user as a source of rows: read line by line when they are asked for, lengths known beforehand.

The index (where each line begins, how long its row is) is made once, with memory that does not grow with the file's
lines but by a few numbers for each, and kept under the fingerprints of file, tokenizer and model section. Media are
taken to be those that the index was made of.
"""

import hashlib
import os
import secrets
import tempfile
import zipfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np

from nexus.data.chat import ChatTokenizer
from nexus.data.headers import RowLength, lengths_of, row_length
from nexus.data.records import MAX_LINE_BYTES, Keep, read_record
from nexus.data.stream import Lengths
from nexus.errors import BadRecord, NexusError
from nexus.organs import ModelConfig
from nexus.recipe import fingerprint
from nexus.types import Sample

INDEX_FORMAT = "nexus-index/1"


class JsonLines:
    """The rows of a JSONL file, at most `limit` of them, for one model. Empty lines are no rows.

    `cache` is the folder where the index is kept. `told(n)` is called with the number of rows indexed so far. Raises
    BadRecord naming file and line for the first row that cannot be used, and BadMedia likewise.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: ChatTokenizer,
        specs: ModelConfig,
        cache: Path,
        *,
        weight: float = 1.0,
        limit: int | None = None,
        told: Callable[[int], None] | None = None,
    ) -> None:
        self.name, self.path, self.weight = str(path), path, weight
        digest = file_digest(path)
        self.fingerprint = fingerprint([digest, limit])
        key = fingerprint([INDEX_FORMAT, digest, _digest_of(tokenizer), specs.model_dump(mode="json")])
        index = cache / f"{path.stem}-{key}.npz"
        found = _read_index(index)
        if found is None:
            found = _index(path, tokenizer, specs, told)
            _write_index(index, *found)
        rows, lengths = found
        if not len(rows):
            raise BadRecord(f"{path}: holds no rows, expected one JSON object a line; name another file")
        self._rows = rows[:limit]  # [N, 3]: line number, first byte, number of bytes
        self.lengths = lengths[np.arange(len(self._rows))]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Row `index`, its media files. Raises BadRecord naming file and line."""
        number, start, size = (int(value) for value in self._rows[index])
        where = f"{self.path}:{number}"
        with open(self.path, "rb") as file:  # opened afresh, so that loader processes share no file position
            file.seek(start)
            return read_row(file.read(size), where, self.path.parent)


def lines_of(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number (from 1), first byte and content of every line that is not empty. Raises BadRecord."""
    try:
        with open(path, "rb") as file:
            number, start = 0, 0
            while line := file.readline(4 * MAX_LINE_BYTES):
                number += 1
                if len(line) == 4 * MAX_LINE_BYTES:
                    raise BadRecord(f"{path}:{number}: longer than {len(line):,} bytes; put media into files")
                if line.strip():
                    yield number, start, line
                start += len(line)
    except OSError as error:
        raise BadRecord(f"{path}: cannot be read ({error.strerror}); name an existing JSONL file") from None


def read_row(line: bytes, where: str, root: Path, keep: Keep | None = None) -> Sample:
    """`read_record` of a line's bytes, for training: there must be something to learn. Raises BadRecord."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"{where}: is not UTF-8 at byte {error.start} of the line; save the file as UTF-8") from None
    sample = read_record(text, where, root, keep)
    if sample.turns[-1].role != "assistant":
        raise BadRecord(f"{where}: its last turn is the {sample.turns[-1].role}'s, expected an answer; add it")
    return sample


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts the place of a row before what is wrong with it."""
    try:
        yield
    except NexusError as error:
        raise type(error)(f"{where}: {error}") from None


def file_digest(path: Path) -> str:
    """Digest of a file's content. Raises BadRecord where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadRecord(f"{path}: cannot be read ({error.strerror}); name an existing JSONL file") from None


def _digest_of(tokenizer: ChatTokenizer) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer.save(path)
        return file_digest(path)


def _index(
    path: Path, tokenizer: ChatTokenizer, specs: ModelConfig, told: Callable[[int], None] | None
) -> tuple[np.ndarray, Lengths]:
    rows = array("q")

    def measured() -> Iterator[RowLength]:
        for number, start, line in lines_of(path):
            where = f"{path}:{number}"
            sample = read_row(line, where, path.parent)
            with naming(where):
                yield row_length(sample, tokenizer, specs)
            rows.extend((number, start, len(line)))
            if told is not None:
                told(len(rows) // 3)

    lengths = lengths_of(measured())
    return np.frombuffer(rows, np.int64).reshape(-1, 3), lengths


def _read_index(path: Path) -> tuple[np.ndarray, Lengths] | None:
    """An index made before; None where there is none, or none that is whole."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return found["rows"], Lengths(*(found[field.name] for field in fields(Lengths)))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write_index(path: Path, rows: np.ndarray, lengths: Lengths) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.npz")  # several ranks may write the same index
    try:
        np.savez(partial, rows=rows, **{field.name: getattr(lengths, field.name) for field in fields(Lengths)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
