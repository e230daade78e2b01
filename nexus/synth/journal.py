"""What a run of the factory leaves while it runs: a journal line per source row, and the sounds the lines speak of.

The journal is in the order of the source and is the one truth: a row with a line is never worked on again, a row
without one is. Lines are written after their sounds. Sounds go into shards: folders of FLAC files, tar files in
WebDataset's layout, or files of bare 16-bit samples end to end, which are read by place without decoding. A shard and
the journal are brought to the disk together when the shard is full (a seal), never clip by clip. What stood behind the
last seal is looked at again before a run goes on: a torn line, half a sound or a sound without a line is taken away.
"""

import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from nexus.errors import BadRecord
from nexus.synth.pipeline import FULL, Outcome

Line = dict[str, Any]
Form = Literal["files", "tar", "i16"]
JOURNAL = ".journal.jsonl"
AUDIO = "audio"
REJECTED = "-rejected"  # shards of sounds that did not pass: kept, so that the gate can be moved
BLOCK = 512  # of a tar file


class Journal:
    """The journal and the shards of one result folder, held by one process.

    `num_rows` lines are there already when it is opened, `lost` were taken away because their sound was not whole.
    Raises BadRecord for a journal that is none.
    """

    def __init__(self, folder: Path, form: Form, shard_clips: int) -> None:
        self.folder, self._form, self._shard_clips = folder, form, shard_clips
        self._path = folder / JOURNAL
        self._path.touch()
        self.num_rows, self.lost = 0, 0
        self._shard, self._clips = 0, 0
        self._open: dict[str, BinaryIO] = {}
        tail = self._recover()
        self._sweep(tail)
        self._file = self._path.open("ab")

    def append(self, rows: Sequence[tuple[Mapping[str, Any], Sequence[Outcome]]], batch: Mapping[str, Any]) -> None:
        """Keep some rows: (what is said of the row, its outcomes) each; `batch` stands in the first line.

        Raises OSError in words of what to do where the disk is full.
        """
        lines: list[Line] = []
        try:
            for head, outcomes in rows:
                entries = [self._entry(outcome) for outcome in outcomes]
                lines.append({**head, "outcomes": entries, **({} if lines else {"batch": dict(batch)})})
            for file in self._open.values():
                file.flush()
            self._write(lines)
            self.num_rows += len(rows)
            if self._clips >= self._shard_clips:
                self._seal()
        except OSError as error:
            if error.errno not in FULL:
                raise
            said = f"no room left after {self.num_rows} rows; make room and run the same command again"
            raise OSError(error.errno, said, str(self.folder)) from None

    def close(self) -> None:
        """Bring everything to the disk."""
        if self._clips:
            self._seal()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Let go without a seal: an error is on its way."""
        for file in (*self._open.values(), self._file):
            try:
                file.close()
            except OSError as error:
                if error.errno not in FULL:  # what could not be written has no line in the journal
                    raise

    def _write(self, lines: Sequence[Line]) -> None:
        self._file.write(b"".join(_json(line) + b"\n" for line in lines))
        self._file.flush()

    def _entry(self, outcome: Outcome) -> Line:
        record = outcome.record
        entry: Line = {
            "id": record.id,
            "attempt": record.meta["attempt"],
            "decision": "again" if outcome.again else "rejected" if outcome.reason else "kept",
            "text": record.text,
            "language": record.language,
            "task": record.task,
            "meta": {key: value for key, value in record.meta.items() if key not in ("row", "attempt")},
        }
        if outcome.reason:
            entry |= {"step": outcome.step, "reason": outcome.reason, "numbers": dict(outcome.numbers)}
            entry |= {"failed": True} if outcome.failed else {}
        if outcome.data is not None:
            entry |= {"seconds": round(outcome.seconds, 4), "audio": self._keep(entry, outcome.data)}
        return entry

    # Sounds

    def _keep(self, entry: Line, data: bytes) -> Line:
        """Write one sound; returns where it is: shard, name, size, checksum, and within a file the offset of the data
        and where what was written ends."""
        shard = f"{self._shard:05d}{'' if entry['decision'] == 'kept' else REJECTED}"
        self._clips += 1
        name = f"{entry['id']}.{'i16' if self._form == 'i16' else 'flac'}"
        place: Line = {"shard": shard, "name": name, "bytes": len(data), "crc32": zlib.crc32(data)}
        match self._form:
            case "files":
                folder = self.folder / AUDIO / shard
                folder.mkdir(parents=True, exist_ok=True)
                part = folder / f".{name}.part"
                part.write_bytes(data)
                os.replace(part, folder / name)
                return place
            case "tar":
                file = self._stream(shard)
                place["offset"] = file.tell() + BLOCK
                _add(file, name, data)
                told = {key: entry[key] for key in ("id", "text", "language", "meta")}
                _add(file, f"{entry['id']}.json", _json(told))
            case "i16":
                file = self._stream(shard)
                place["offset"] = file.tell()
                file.write(data)
        return {**place, "end": file.tell()}

    def _stream(self, shard: str) -> BinaryIO:
        if shard not in self._open:
            path = self.folder / AUDIO / f"{shard}.{self._form}"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open[shard] = path.open("r+b" if path.exists() else "w+b")
            self._open[shard].seek(0, os.SEEK_END)
        return self._open[shard]

    def _seal(self) -> None:
        """The shard is complete: bring it, and then the journal, to the disk."""
        for file in self._open.values():
            if self._form == "tar":
                file.write(bytes(2 * BLOCK))  # its end
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._open.clear()
        if self._form == "files":
            os.sync()  # one call for a thousand files
        self._write([{"seal": self._shard}])
        os.fsync(self._file.fileno())
        self._shard, self._clips = self._shard + 1, 0

    # Going on

    def _recover(self) -> list[Line]:
        """Read the journal, cut it where it is torn or speaks of sounds that are not there; returns the places of the
        sounds behind the last seal."""
        tail: list[tuple[int, int, list[Line]]] = []  # of lines with sounds: their start, their number, the places
        size = 0
        for end, line in _read(self._path):
            if "seal" in line:
                self._shard, tail = line["seal"] + 1, []
            else:
                places = [entry["audio"] for entry in line["outcomes"] if "audio" in entry]
                if places:
                    tail.append((size, self.num_rows, places))
                self.num_rows += 1
            size = end
        kept: list[Line] = []
        for start, number, places in tail:
            if not all(self._is_whole(place) for place in places):
                size, self.lost, self.num_rows = start, self.num_rows - number, number
                break
            kept += places
        if size < self._path.stat().st_size:
            os.truncate(self._path, size)
        self._clips = len(kept)
        return kept

    def _is_whole(self, place: Line) -> bool:
        try:
            return zlib.crc32(read_sound(self.folder, place)) == place["crc32"]
        except BadRecord:
            return False

    def _sweep(self, tail: Sequence[Line]) -> None:
        """Take away what the open shard holds beyond the journal."""
        for shard in (f"{self._shard:05d}", f"{self._shard:05d}{REJECTED}"):
            mine = [place for place in tail if place["shard"] == shard]
            path = self.folder / AUDIO / shard
            if path.is_dir():
                names = {place["name"] for place in mine}
                for file in path.iterdir():
                    if file.name not in names:
                        file.unlink()
            for one in (path.with_name(f"{shard}.tar"), path.with_name(f"{shard}.i16")):
                if one.exists():
                    os.truncate(one, max((place["end"] for place in mine), default=0))


def _json(value: Line) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def _add(file: BinaryIO, name: str, data: bytes) -> None:
    """A member at the end of a tar, the same bytes whoever writes it and when."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    assert len(header) == BLOCK, f"a header of {len(header)} bytes for {name}"
    file.write(header + data + bytes(-len(data) % BLOCK))


def _read(path: Path) -> Iterator[tuple[int, Line]]:
    """(offset of its end, line) of every whole line."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                row = json.loads(line)
            except ValueError as error:
                raise BadRecord(f"{path}:{number}: is no JSON ({error}); this is no journal of a run") from None
            if not isinstance(row, dict) or not ("seal" in row or "outcomes" in row):
                raise BadRecord(f"{path}:{number}: is no line of a journal; give another --out")
            yield end, row


def lines_of(folder: Path) -> Iterator[Line]:
    """The line of every row that a run in `folder` has finished, in the order of the source."""
    for _, line in _read(folder / JOURNAL):
        if "seal" not in line:
            yield line


def sound_name(place: Mapping[str, Any]) -> str:
    """Where a sound is, as rows write it: audio/00000/ID.flac, or inside a shard audio/00000.tar/ID.flac and
    audio/00000.i16/ID.i16."""
    return f"{AUDIO}/{_shard_name(place)}/{place['name']}"


def _shard_name(place: Mapping[str, Any]) -> str:
    if "offset" not in place:
        return str(place["shard"])
    return f"{place['shard']}{'.i16' if place['name'].endswith('.i16') else '.tar'}"


def read_sound(folder: Path, place: Mapping[str, Any]) -> bytes:
    """The sound that a journal line speaks of, as it was stored. Raises BadRecord where it is not there as a whole."""
    path = folder / (f"{AUDIO}/{_shard_name(place)}" if "offset" in place else sound_name(place))
    try:
        with path.open("rb") as file:
            file.seek(place.get("offset", 0))
            data = file.read(place["bytes"])
    except OSError as error:
        raise BadRecord(f"{path}: cannot be read ({error.strerror}); run the same command again") from None
    if len(data) != place["bytes"]:
        raise BadRecord(
            f"{path}: {place['name']} has {len(data)} of {place['bytes']} bytes; run the same command again"
        )
    return data
