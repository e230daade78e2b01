"""lhotse's manifests of cuts as rows of recognition: what is said in a cut is the answer to the transcription question.

lhotse (extra `corpora`) reads and slices the recordings; its recipes prepare the public corpora. Only recordings in
files are taken: a manifest may also name commands to run and addresses to fetch, and these are refused.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nexus.data.chat import ChatTokenizer, task_turns
from nexus.data.headers import RATE_HZ, RowLength, lengths_of, row_length
from nexus.data.jsonl import file_digest, naming
from nexus.data.records import write_record
from nexus.errors import BadConfig, BadMedia, BadRecord, NexusError
from nexus.media import write_wav
from nexus.organs import ModelConfig
from nexus.recipe import fingerprint
from nexus.types import Audio, Sample

ENDING = ".jsonl.gz"  # how lhotse names manifests
_END = object()


class Cuts:
    """The cuts of a manifest, at most `limit` of them, for one model. Descriptions of cuts stay in memory, sound does
    not. `told(n)` is called with the number of cuts measured so far. Raises BadRecord naming file and line."""

    def __init__(
        self,
        path: Path,
        tokenizer: ChatTokenizer,
        specs: ModelConfig,
        *,
        weight: float = 1.0,
        limit: int | None = None,
        told: Callable[[int], None] | None = None,
    ) -> None:
        self.name, self.weight = str(path), weight
        self._cuts: list[Any] = []
        self.fingerprint = fingerprint([file_digest(path), limit])

        def measured() -> Iterator[RowLength]:
            for number, cut in read_cuts(path):
                if len(self._cuts) == limit:
                    return
                silence = np.broadcast_to(np.float32(0), round(cut.num_samples * RATE_HZ / cut.sampling_rate))
                with naming(f"{path}:{number}"):
                    yield row_length(_sample(cut, Audio(samples=silence, rate_hz=RATE_HZ)), tokenizer, specs)
                self._cuts.append(cut)
                if told is not None:
                    told(len(self._cuts))

        self.lengths = lengths_of(measured())
        if not self._cuts:
            raise BadRecord(f"{path}: holds no cuts, expected at least one; name another manifest")

    def __len__(self) -> int:
        return len(self._cuts)

    def __getitem__(self, index: int) -> Sample:
        """The sample of a cut, its sound loaded at the recording's rate. Raises BadMedia naming manifest and cut."""
        with naming(f"{self.name}: cut {self._cuts[index].id}"):
            return _sample(self._cuts[index], _sound(self._cuts[index]))


def read_cuts(path: Path) -> Iterator[tuple[int, Any]]:
    """Line and cut of every cut in a manifest, one at a time.

    Raises BadConfig where lhotse is not installed, BadRecord for a line that is no cut of one recorded channel in a
    file with words.
    """
    try:
        from lhotse.serialization import deserialize_item, load_jsonl
    except ImportError as error:
        raise BadConfig(f"{path}: reading cuts needs lhotse ({error}); pip install 'nexus-omni[corpora]'") from None
    if not path.is_file():
        raise BadRecord(f"{path}: no such file, expected a manifest of cuts (*{ENDING}); check the path")
    number, items = 0, load_jsonl(path)
    while True:
        number += 1
        with _understood(f"{path}:{number}"):
            item = next(items, _END)
            if item is _END:
                return
            _check_item(item)
            cut = deserialize_item(item)
            _check(cut)
        yield number, cut


def import_cuts(path: Path, folder: Path, root: Path, bad: Callable[[int, str], None]) -> Iterator[tuple[str, float]]:
    """A canonical row and its seconds for every cut, its sound written to `folder` as wav; paths relative to `root`.

    `bad(line, reason)` is called for a cut whose sound cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, cut in read_cuts(path):
        try:
            sound = _sound(cut)
        except BadMedia as error:
            bad(number, str(error))
            continue
        assert sound.samples is not None
        target = folder / f"{number:07}.wav"
        write_wav(target, sound.samples, sound.rate_hz)
        yield write_record(_sample(cut, Audio(path=target)), root), sound.seconds


@contextmanager
def _understood(where: str) -> Iterator[None]:
    """Names the line before what is wrong with it; the library raises what its parts do: of gzip, JSON, its types."""
    try:
        with naming(where):
            yield
    except NexusError:
        raise
    except Exception as error:
        raise BadRecord(f"{where}: is no cut of lhotse ({repr(error)[:200]}); write the manifest again") from None


def _check_item(item: Any) -> None:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind != "MonoCut":
        raise BadRecord(f"expected a MonoCut, given {kind!r}; cut the recordings into single channels")
    if not item.get("recording"):
        raise BadRecord(f"cut {item.get('id')} has no recording, expected sound; leave it out")


def _check(cut: Any) -> None:
    for source in cut.recording.sources:
        address = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", str(source.source))
        if source.type != "file" or address:
            given = f"the address {source.source!r:.80}" if source.type == "file" else f"a {source.type}"
            raise BadRecord(
                f"the sound of cut {cut.id} is given by {given}, expected a file: nothing is run or fetched; save the "
                "recordings as files"
            )
    if not _words(cut):
        raise BadRecord(f"cut {cut.id} has no words in its supervisions, expected a transcript; leave it out")
    if cut.num_samples < 1:
        raise BadRecord(f"cut {cut.id} lasts {cut.duration} s, expected some sound; leave it out")


def _words(cut: Any) -> str:
    said = sorted(cut.supervisions, key=lambda supervision: float(supervision.start))
    return " ".join(supervision.text.strip() for supervision in said if supervision.text and supervision.text.strip())


def _sample(cut: Any, sound: Audio) -> Sample:
    speakers = sorted({supervision.speaker for supervision in cut.supervisions if supervision.speaker})
    return Sample(cut.id, "asr", task_turns("asr", sound=sound, text=_words(cut)), {"speakers": speakers})


def _sound(cut: Any) -> Audio:
    try:
        samples = cut.load_audio()
    except Exception as error:  # its audio backends raise what they like
        raise BadMedia(
            f"{cut.recording.sources[0].source}: cannot be read ({' '.join(str(error).split())[:200]})"
        ) from None
    return Audio(samples=np.ascontiguousarray(samples[0], np.float32), rate_hz=int(cut.sampling_rate))
