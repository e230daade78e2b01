"""The steps of the factory on a batch of records, within one worker: what became of every record, and its sound.

Nothing leaves a batch without an outcome. A record on which a step fails is rejected with the failure as its reason;
it is never replaced by another and never stops the batch.
"""

import errno
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import soundfile

from nexus.errors import NexusError
from nexus.media import load
from nexus.synth.records import Record, Rejected, Step, next_attempt
from nexus.types import Audio

SPEAK = "speak"  # the step to which a row goes back
NO_JUDGEMENT = ("no_answer",)  # reasons that say, besides `{step}_failed`, that a step could not do its work
Keep = Callable[[Audio], bytes]  # a loaded sound as it is stored; ValueError where there is nothing to store
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the machine's fault, which no other record would be spared


def flac_bytes(sound: Audio) -> bytes:
    """Loaded sound as a 16-bit FLAC file. Raises ValueError for samples that are not finite or not there."""
    buffer = io.BytesIO()
    soundfile.write(buffer, _clipped(sound), sound.rate_hz, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def i16_bytes(sound: Audio) -> bytes:
    """Loaded sound as bare 16-bit samples, full scale 32767. Raises as `flac_bytes`."""
    return np.round(_clipped(sound) * 32767).astype("<i2").tobytes()


def _clipped(sound: Audio) -> np.ndarray:
    assert sound.samples is not None, "sound is not loaded"
    if not len(sound.samples) or not np.isfinite(sound.samples).all():
        raise ValueError(f"{len(sound.samples)} samples, not all finite: no sound to keep")
    return np.clip(sound.samples, -1.0, 1.0)


@dataclass(frozen=True)
class Outcome:
    """What became of one record: passed where `reason` is empty. `again`: its row was spoken again after this.

    `data` is the sound that was judged, as the pipeline keeps sounds, None where there was none yet; `failed` tells a
    step that could not do its work from one that judged.
    """

    record: Record
    step: str = ""
    reason: str = ""
    numbers: Mapping[str, float | str] = field(default_factory=dict)
    again: bool = False
    failed: bool = False
    data: bytes | None = None
    seconds: float = 0.0  # of the sound


@dataclass(frozen=True)
class Worked:
    """A batch when it is done: the outcomes of every row that went in, in order, and seconds spent per step."""

    rows: list[list[Outcome]]
    step_seconds: dict[str, float]


class Pipeline:
    """Steps in order, as one picklable thing. `setup` once per worker, then batch after batch.

    `keep` makes the bytes of a sound that the journal's form wants: `flac_bytes`, or `i16_bytes` for form i16.
    """

    def __init__(self, steps: Sequence[Step], keep: Keep = flac_bytes) -> None:
        self.steps = tuple(steps)
        self._keep = keep
        names = [step.name for step in self.steps]
        assert len(set(names)) == len(names), f"two steps of one name among {names}"
        self._speak = names.index(SPEAK) if SPEAK in names else None

    def setup(self) -> None:
        """Load what the steps need."""
        for step in self.steps:
            step.setup()

    def __call__(self, records: Sequence[Record]) -> Worked:
        """Outcomes of first attempts at distinct rows, and of the attempts that followed them.

        Raises OSError where the disk is full and MemoryError; every other failure becomes an outcome.
        """
        outcomes: dict[str, list[Outcome]] = {record.meta["row"]: [] for record in records}
        assert len(outcomes) == len(records), "a batch holds a row twice"
        seconds = {step.name: 0.0 for step in self.steps}
        entry, going = 0, list(records)
        while going:
            going = self._once(going, entry, outcomes, seconds)
            entry = self._speak or 0
        return Worked([outcomes[record.meta["row"]] for record in records], seconds)

    def _once(
        self, going: list[Record], entry: int, outcomes: dict[str, list[Outcome]], seconds: dict[str, float]
    ) -> list[Record]:
        """Through all steps from `entry`; returns the records to be spoken again."""
        unspoken: dict[str, Record] = {}
        again: list[Record] = []
        for index, step in enumerate(self.steps[entry:], entry):
            if index == self._speak:
                unspoken = {record.id: record for record in going}
            began = time.perf_counter()
            results = judge(step, going, self._keep)
            seconds[step.name] += time.perf_counter() - began
            going = [result for result in results if isinstance(result, Record)]
            for result in results:
                if isinstance(result, Outcome):
                    before = unspoken.get(result.record.id)
                    may_again = before is not None and before.meta["attempt"] < getattr(step, "retries", 0)
                    if before is not None and may_again and not result.failed:
                        again.append(next_attempt(before))
                        result = replace(result, again=True)
                    outcomes[result.record.meta["row"]].append(result)
        for record in going:
            outcomes[record.meta["row"]].append(_passed(record, self._keep))
        return again


def judge(step: Step, records: Sequence[Record], keep: Keep = flac_bytes) -> list[Record | Outcome]:
    """What the step makes of the records: those that go on, and the outcome of those that do not, their sounds as
    `keep` makes them.

    Where the step raises, each record is tried alone, so that one cannot take others with it. Raises OSError where the
    disk is full, and MemoryError.
    """
    if not records:
        return []
    try:
        results = step(records)
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        if len(records) > 1:
            return [result for record in records for result in judge(step, [record], keep)]
        said = " ".join(str(error).split()) or "no message"
        kind = "" if isinstance(error, NexusError) else f"{type(error).__name__}: "
        return [Outcome(_mute(records[0]), step.name, f"{step.name}_failed", {"error": kind + said}, failed=True)]
    given = {record.meta["row"] for record in records}
    left = {(result.record if isinstance(result, Rejected) else result).meta["row"] for result in results}
    assert given == left, f"step {step.name}: {len(given)} rows went in, {len(left)} came out"
    return [result if isinstance(result, Record) else _rejected(result, step.name, keep) for result in results]


def _mute(record: Record) -> Record:
    return record.with_(sound=None)


def _rejected(rejected: Rejected, step: str, keep: Keep) -> Outcome:
    """A rejection with the sound that was rejected, where there was some that can be kept."""
    failed = rejected.reason == f"{step}_failed" or rejected.reason in NO_JUDGEMENT
    outcome = Outcome(rejected.record, step, rejected.reason, rejected.numbers, failed=failed)
    if rejected.record.sound is None or rejected.record.sound.samples is None:
        return outcome
    try:
        return _with_sound(outcome, keep)
    except ValueError:
        return replace(outcome, record=_mute(rejected.record))


def _passed(record: Record, keep: Keep) -> Outcome:
    try:
        return _with_sound(Outcome(record), keep)
    except (NexusError, ValueError) as error:
        numbers = {"error": " ".join(str(error).split())}
        return Outcome(_mute(record), "write", "write_failed", numbers, failed=True)


def _with_sound(outcome: Outcome, keep: Keep) -> Outcome:
    """The outcome with its sound as bytes instead of samples, read first where it is still a file."""
    sound = outcome.record.sound
    if sound is None:
        return outcome
    if sound.samples is None:
        loaded = load(sound)
        assert isinstance(loaded, Audio)
        sound = loaded
    return replace(outcome, record=_mute(outcome.record), data=keep(sound), seconds=sound.seconds)
