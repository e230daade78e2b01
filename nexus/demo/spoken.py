"""The demo's corpus as it is spoken: the planned utterances through the data factory, and the waveforms on disk.

Every utterance is a row of the factory: spoken, for a share of them heard by a recogniser, put into its noise,
journalled with its sound. What the recogniser hears is the clean voice: the noise is meant to hide words. It also
follows only some of the synthesiser's voices, so that a clip it does not understand says little by itself. Such a clip
fails only where other texts of the corpus, said by the same voice in the same manner, are understood; else it counts
as unverified. A failed clip has no sound, and nothing is learned from its place. Sets of the examination are judged
and counted alike but never lose a clip: what is examined must not depend on a recogniser.
"""

import functools
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nexus.demo.corpus import STEPS, Utterance
from nexus.demo.manner import Delivery, shaped
from nexus.engines.speak import Espeak, Voice
from nexus.errors import BadConfig, BadRecord, NexusError
from nexus.media import resample
from nexus.progress import Progress
from nexus.recipe import fingerprint
from nexus.results import write_json
from nexus.synth.journal import AUDIO, Journal, Line, lines_of
from nexus.synth.noise import Surroundings, at_snr, excerpt, in_room, surroundings
from nexus.synth.pipeline import Pipeline, i16_bytes
from nexus.synth.produce import Patience, Workers, produce
from nexus.synth.records import Record, Rejected, Step
from nexus.synth.steps import at_level, trimmed, with_noise
from nexus.synth.verify import PocketSphinxEar, Verify, VerifyConfig, build
from nexus.types import Audio

RATE_HZ = 16_000
SHARD = 1000  # utterances that are brought to the disk together
BATCH = 32  # utterances that a worker takes at a time: about 100 ms of work
# One word in three may be wrong. Measured on 580 clips of the demo's corpus: 61 % pass, 97 % of the 122 in the voice
# that is learned, and 0.3 % of wrong pairs of clip and text. Many manners are slow or fast on purpose, so their pace is
# not judged.
MAX_WER = 0.34
CONTROLS = 3  # other texts that must all be understood before a clip can fail
CONTROL_TEXTS = 500  # of the corpus, from which they are drawn
IN_ROOM = 0.3  # share of the utterances that sound in a real room, where there are rooms
EARS, INDEX, COUNTS = ".ears", "index.npy", "corpus.json"
EXAMINED = "test_"  # how names of sets begin that are examined
UNDERSTOOD_NOT = ("not_heard", "wrong_language", "length_ratio", "word_errors")  # reasons that may be the recogniser's
Sets = Mapping[str, Sequence[Utterance]]


@dataclass(frozen=True)
class Around:
    """Real noises and rooms: those that training hears, and those of the examination."""

    learned: Surroundings
    examined: Surroundings


def around_of(root: str) -> Around:
    """What `world.noise` names. Raises BadRecord for a folder without noise, BadConfig where none is left for one of
    the two."""
    around = Around(*surroundings(Path(root)).split())
    if not (around.learned.noises and around.examined.noises):
        raise BadConfig(
            f"world.noise: {root} has {len(around.learned.noises)} noises for training and "
            f"{len(around.examined.noises)} for the examination, expected some of both; put two clips or more into a "
            "category"
        )
    return around


class Waves:
    """The waveforms of one set, read from their shards when they are asked for.

    `index` i64 [N, 4] holds shard, first sample, samples and checksum of every place; a place without sound has length
    0. Read, not mapped: mapped pages count as memory of the process, and training walks through all of them.
    """

    def __init__(self, shards: Sequence[BinaryIO], index: np.ndarray) -> None:
        self._shards, self._index = shards, index
        self.lengths: np.ndarray = index[:, 2]

    def __len__(self) -> int:
        return len(self.lengths)

    @functools.cached_property
    def places(self) -> list[int]:
        """The places that have sound, in order."""
        return [int(place) for place in np.flatnonzero(self.lengths)]

    def __getitem__(self, index: int) -> Audio:
        """Sound f32 [W] at 16 kHz. The place must have some."""
        shard, start, length, _ = self._index[index].tolist()
        assert length, f"place {index} has no sound"
        data = os.pread(self._shards[shard].fileno(), 2 * length, 2 * start)
        return Audio(samples=np.frombuffer(data, "<i2").astype(np.float32) / 32767, rate_hz=RATE_HZ)

    def digest(self) -> str:
        """Digest of lengths and checksums of the waveforms: what every later result may be compared on."""
        return hashlib.sha256(np.ascontiguousarray(self._index[:, 2:]).tobytes()).hexdigest()[:16]


def speak(
    folder: Path, sets: Sets, verified: float, processes: int, progress: Progress, around: Around | None = None
) -> dict[str, Waves]:
    """The waveforms of all sets, made now or found in `folder`, of which the factory heard the share `verified`; in the
    noises and rooms `around`, or else in noise that is made.

    A killed call goes on behind its journal. Raises BadConfig where the folder holds other utterances, BadRecord where
    it is damaged, NexusError where the synthesiser fails too often or on an utterance of an examination, OSError where
    the disk is full.
    """
    surround = Surround(around)
    if not _is_done(folder, sets, surround):
        folder.mkdir(parents=True, exist_ok=True)
        pipeline = Pipeline([*_steps(folder, sets, verified), surround], i16_bytes)
        journal = Journal(folder, "i16", SHARD)
        if journal.lost:
            progress.say(f"corpus: {journal.lost} utterances are spoken again: their sound did not reach the disk")
        total = sum(map(len, sets.values()))
        try:
            with progress.stage("corpus", total, "utterances", journal.num_rows) as stage:
                rows, workers = _rows(sets, surround.fingerprint), Workers("local", processes)
                produce(rows, (), pipeline, journal, workers, batch=BATCH, patience=Patience(), stage=stage)
        except BaseException:
            journal.abandon()
            raise
        journal.close()
        _conclude(folder, sets, surround)
    return open_waves(folder, sets)


def open_waves(folder: Path, sets: Sets) -> dict[str, Waves]:
    """The waveforms of sets that `speak` has finished in `folder`. Raises BadRecord for a damaged folder."""
    index = np.load(folder / INDEX)
    assert len(index) == sum(map(len, sets.values())), (folder, len(index))
    shards: list[BinaryIO] = []
    for number in range(int(index[:, 0].max(initial=-1)) + 1):
        path = _shard(folder, number)
        of_this = index[index[:, 0] == number]
        size, wanted = path.stat().st_size if path.is_file() else 0, 2 * int((of_this[:, 1] + of_this[:, 2]).max())
        if size < wanted:
            raise BadRecord(f"{path}: has {size} of {wanted} bytes; remove {folder} and run the same command again")
        shards.append(path.open("rb", buffering=0))
    ends = np.cumsum([len(members) for members in sets.values()])
    return {name: Waves(shards, index[end - len(sets[name]) : end]) for name, end in zip(sets, ends, strict=True)}


def counts(folder: Path) -> dict[str, dict[str, Any]]:
    """What became of every set that `speak` has finished in `folder`.

    `spoken` is all that was asked for: of it `verified`, `failed`, `unverified` (no recogniser follows the language or
    the voice) and `unchecked` (not drawn), beside those `rejected` by reason, which have no sound.
    """
    told: dict[str, dict[str, Any]] = json.loads((folder / COUNTS).read_text(encoding="utf-8"))["sets"]
    return told


def _is_done(folder: Path, sets: Sets, surround: "Surround") -> bool:
    path = folder / COUNTS
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["ids"] == _ids(sets, surround)


def _ids(sets: Sets, surround: "Surround") -> str:
    ids = {name: [utterance.id for utterance in members] for name, members in sets.items()}
    return fingerprint([ids, surround.fingerprint])


def _shard(folder: Path, number: int) -> Path:
    return folder / AUDIO / f"{number:05d}.i16"


def _language(name: str) -> str:
    return "zh" if name.endswith("mandarin") else "en"


def _rows(sets: Sets, surround: str) -> Iterator[Record | Rejected]:
    """A record per place, in order. An utterance that stands in several places has one id and several rows; in other
    surroundings a row is another one."""
    for name, members in sets.items():
        for place, said in enumerate(members):
            row = f"{name} {place} {said.id} {surround}"
            meta = {"row": row, "attempt": 0, "set": name, "delivery": asdict(said.delivery)}
            yield Record(said.id, said.text, _language(name), meta=meta)


def _steps(folder: Path, sets: Sets, verified: float) -> list[Step]:
    english = [said.text for name, members in sets.items() if _language(name) == "en" for said in members]
    texts = list(dict.fromkeys(english))
    if not verified or not texts:
        return [Say()]
    gate = VerifyConfig(
        recognisers={"en": PocketSphinxEar()}, fraction=verified, max_wer=MAX_WER, seconds_per_letter={}, retries=0
    )
    heard = build(gate, ((text, "en") for text in texts), folder / EARS)
    return [Say(), Listen(heard, tuple(random.Random(0).sample(texts, min(len(texts), CONTROL_TEXTS))))]


def _conclude(folder: Path, sets: Sets, surround: "Surround") -> None:
    """The index and the counts, from the journal. The note that declares all whole comes last."""
    index = np.zeros((sum(map(len, sets.values())), 4), np.int64)
    told = {name: Counter[str]() for name in sets}
    dropped = {name: Counter[str]() for name in sets}
    for place, line in enumerate(lines_of(folder)):
        (entry,) = line["outcomes"]
        name = line["row"].partition(" ")[0]
        told[name][_state(entry)] += 1
        if entry["decision"] == "kept":
            at = entry["audio"]
            index[place] = int(at["shard"]), at["offset"] // 2, at["bytes"] // 2, at["crc32"]
        elif name.startswith(EXAMINED):
            raise NexusError(
                f"{line['row']}: {entry['text']!r} is to be examined and could not be spoken: {entry['reason']} "
                f"{entry['numbers']}; remove {folder} and run the same command again"
            )
        else:
            dropped[name][entry["reason"]] += 1
    part = folder / f".{INDEX}.part"
    with part.open("wb") as file:
        np.save(file, index)
    os.replace(part, folder / INDEX)
    states = ("verified", "failed", "unverified", "unchecked")
    counted = {
        name: {
            **{"language": _language(name), "spoken": len(members)},
            **{state: told[name][state] for state in states},
            "rejected": dict(dropped[name]),
        }
        for name, members in sets.items()
    }
    write_json(folder / COUNTS, {"ids": _ids(sets, surround), "sets": counted})


def _state(entry: Line) -> str:
    if entry["decision"] != "kept":
        return "failed"
    return str(entry["meta"].get("verify", {"state": "unchecked"})["state"])


class Say:
    """The speaking step: the clean voice at 16 kHz, trimmed, in the manner of its delivery."""

    name = "speak"
    fingerprint = fingerprint(["say", STEPS])

    def setup(self) -> None:
        """Nothing to load."""
        self._espeak = Espeak()

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        """One record with sound for each, f32 [W]. Raises NexusError as the synthesiser does."""
        return [record.with_(sound=said(self._espeak, record.text, _delivery(record))) for record in records]


class Listen:
    """The verifying step on clean voices: `verify` hears those that its fraction draws by their ids, and those it does
    not understand are rejected only where it understands the same delivery on other texts (`controls`)."""

    name = "verify"

    def __init__(self, verify: Verify, controls: Sequence[str]) -> None:
        self._verify, self._gate, self._controls = verify, verify.for_all(), controls

    @property
    def fingerprint(self) -> str:
        """Over the gate and the texts of the controls."""
        return fingerprint([self._verify.fingerprint, CONTROLS, list(self._controls)])

    def setup(self) -> None:
        """Load the recogniser."""
        self._espeak = Espeak()
        self._gate.setup()

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        """One result per record, `meta["verify"]["state"]` in each. Raises NexusError where the recogniser fails."""
        return [self._judged(record) for record in records]

    def _judged(self, record: Record) -> Record | Rejected:
        if record.language not in self._gate.config.recognisers:
            return record.noted(verify={"state": "unverified"})
        if not self._verify.checks(record.id):
            return record.noted(verify={"state": "unchecked"})
        (result,) = self._gate([record])
        if isinstance(result, Record):
            return result
        scores = {**result.record.meta["verify"], "reason": result.reason}
        if result.reason in UNDERSTOOD_NOT and not self._understands(record):
            return record.noted(verify={**scores, "state": "unverified"})
        if record.meta["set"].startswith(EXAMINED):
            return record.noted(verify={**scores, "state": "failed"})
        return result

    def _understands(self, record: Record) -> bool:
        """Whether other texts are understood when they are said as this one was."""
        texts = random.Random(f"controls {record.id}").sample(self._controls, min(CONTROLS, len(self._controls)))
        for text in texts:
            sound = said(self._espeak, text, _delivery(record))
            if isinstance(self._gate([record.with_(text=text, sound=sound)])[0], Rejected):
                return False
        return True


class Surround:
    """The last step: the level of the delivery, its noise, and perhaps a room, all drawn by the utterance's id."""

    name = "surround"

    def __init__(self, around: Around | None) -> None:
        self._around = around

    @property
    def fingerprint(self) -> str:
        """Over what is done, and the bytes of all real noises and rooms."""
        around = self._around
        real = [] if around is None else [IN_ROOM, around.learned.fingerprint(), around.examined.fingerprint()]
        return fingerprint(["surround", STEPS, *real])

    def setup(self) -> None:
        """Nothing to load."""

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        """One record for each."""
        return [self._surrounded(record) for record in records]

    def _surrounded(self, record: Record) -> Record:
        how = _delivery(record)
        assert record.sound is not None and record.sound.samples is not None
        wave = at_level(record.sound.samples, how.gain_db)
        if self._around is not None:
            is_exam = record.meta["set"].startswith(EXAMINED)
            wave = _amid(wave, self._around.examined if is_exam else self._around.learned, how.noise_db, record.id)
        elif how.noise_db is not None:
            wave = with_noise(wave, how.noise_db, int(record.id, 16))
        return record.with_(sound=Audio(samples=wave, rate_hz=RATE_HZ))


def _amid(wave: np.ndarray, around: Surroundings, noise_db: float | None, seed: str) -> np.ndarray:
    rng = random.Random(f"around {seed}")
    if around.rooms and rng.random() < IN_ROOM:
        wave = in_room(wave, rng.choice(around.rooms).sound())
    if noise_db is None:
        return wave
    return at_snr(wave, excerpt(rng.choice(around.noises).sound(), len(wave), rng), noise_db)


def said(espeak: Espeak, text: str, how: Delivery) -> Audio:
    """`text` in the voice and manner of a delivery, without its level and noise: f32 [W] at 16 kHz."""
    sound = espeak.speak(text, how.voice)
    assert sound.samples is not None
    wave = resample(trimmed(sound.samples, sound.rate_hz), sound.rate_hz, RATE_HZ)
    return Audio(samples=shaped(wave, RATE_HZ, how), rate_hz=RATE_HZ)


def _delivery(record: Record) -> Delivery:
    given = record.meta["delivery"]
    return Delivery(**{**given, "voice": Voice(**given["voice"])})
