"""Small steps for tests of the factory, in a module of their own so that workers can import them; and, as a script, a
run of the factory that can be killed: `factory_steps.py SOURCE OUT LOG FORM`."""

import os
import signal
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nexus.progress import Progress
from nexus.synth.journal import Form, Journal
from nexus.synth.pipeline import Pipeline, flac_bytes, i16_bytes
from nexus.synth.produce import Patience, Workers, produce
from nexus.synth.read import SourceConfig, read
from nexus.synth.records import Record, Rejected, Step, first_attempt
from nexus.synth.rules import Rules, RulesConfig
from nexus.types import Audio

RATE_HZ = 8000
ALONE, PATIENT = Workers(), Patience()


@dataclass
class Speak:
    """Says a tone, never the same twice, and notes in `log` what it was asked to say."""

    log: Path | None = None
    seconds: float = 0.0  # of work per record
    name: str = "speak"
    fingerprint: str = "tone"

    def setup(self) -> None:
        self.rng = np.random.default_rng()

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        return [self._spoken(record) for record in records]

    def _spoken(self, record: Record) -> Record:
        if self.log is not None:
            with self.log.open("a") as log:
                log.write(record.id + "\n")
        time.sleep(self.seconds)
        wave = 0.1 * self.rng.standard_normal(400 + zlib.crc32(record.id.encode()) % 400)
        sound = Audio(samples=wave.astype(np.float32), rate_hz=RATE_HZ)
        return record.with_(sound=sound).noted(voice=f"tone{record.meta['attempt']}")


@dataclass
class Gate:
    """Passes about two in three attempts, by chance: another run would decide otherwise."""

    retries: int = 2
    name: str = "verify"
    fingerprint: str = "chance"

    def setup(self) -> None:
        self.rng = np.random.default_rng()

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        drawn = self.rng.random(len(records))
        return [
            record.noted(verify={"wer": float(score)})
            if score < 0.66
            else Rejected(record.noted(verify={"wer": float(score)}), "not_understood", {"limit": 0.66})
            for record, score in zip(records, drawn, strict=True)
        ]


@dataclass
class Trouble:
    """Does what a text says: `raise`, `die` (always), `die once FILE`, `full`; speaks every other text."""

    name: str = "trouble"
    fingerprint: str = "trouble"

    def setup(self) -> None: ...

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        for record in records:
            match record.text.split():
                case ["raise", *_]:
                    raise ValueError(f"cannot say {record.text}")
                case ["full", *_]:
                    raise OSError(28, "No space left on device")
                case ["die", "once", marker] if not Path(marker).exists():
                    Path(marker).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                case ["die"]:
                    os.kill(os.getpid(), signal.SIGKILL)
        return list(records)


def texts(*texts: str) -> Iterator[Record | Rejected]:
    """Rows of a source that is no file."""
    return iter([first_attempt(text, "en", {"source": "test", "line": line}) for line, text in enumerate(texts, 1)])


def run(
    rows: Iterator[Record | Rejected],
    out: Path,
    *steps: Step,
    front: Sequence[Step] = (),
    form: Form = "files",
    workers: Workers = ALONE,
    batch: int = 4,
    patience: Patience = PATIENT,
    shard_samples: int = 50,
) -> Journal:
    """The factory without a recipe; returns the journal, closed."""
    out.mkdir(exist_ok=True)
    journal = Journal(out, form, shard_samples)
    pipeline = Pipeline(steps, i16_bytes if form == "i16" else flac_bytes)
    with Progress(open(os.devnull, "w")) as progress, progress.stage("test", None, "rows") as stage:
        try:
            produce(rows, front, pipeline, journal, workers, batch=batch, patience=patience, stage=stage)
        except BaseException:
            journal.abandon()
            raise
    journal.close()
    return journal


if __name__ == "__main__":
    source, out, log, form = sys.argv[1:]
    run(
        read([SourceConfig(path=source)], 0, None),
        Path(out),
        Speak(Path(log), 0.005),
        Gate(),
        front=[Rules(RulesConfig(near_duplicates=None))],
        form=form,  # type: ignore[arg-type]
        workers=Workers("local", 2),
    )
