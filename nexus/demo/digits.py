"""Real recordings of digits as they would sound from other people, microphones and rooms.

A few people's recordings teach a model these people. Each recording is therefore learned in many variations, drawn by
the number of the row alone; the first is the recording itself.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nexus.data.chat import ChatTokenizer, task_turns
from nexus.data.folders import Folder, recordings
from nexus.data.headers import lengths_of, row_length
from nexus.data.mixture import Source
from nexus.data.stream import Lengths
from nexus.demo.replay import ROWS_PER_UTTERANCE, UTTERANCES, Replay, retold
from nexus.media import resample
from nexus.model.folder import read_config
from nexus.organs import ModelConfig
from nexus.progress import Progress
from nexus.recipe import fingerprint
from nexus.synth.noise import RATE_HZ, Surroundings, at_snr, excerpt, in_room, surroundings
from nexus.synth.steps import at_level, with_noise
from nexus.training import DataConfig
from nexus.types import Audio, Sample

SEED = 0  # of the variations
VARIATIONS = 24
FOLLOWED_BY = (0, 0, 0, 1, 2, 3)  # more recordings in a row, one as likely as the other
SPEED = (0.75, 1.5)  # with pitch and formants: children to large men, and slow to fast
PAUSE_SECONDS = 0.25  # before, between and after, at most
IN_HASTE = 0.3  # share of the variations without any pause
CUT_CLOSE = 0.5  # share of the variations whose recordings end where the word does, or a little before, at both ends
LOUD = 0.05  # of the peak: where a word begins and ends
BITTEN_SECONDS = 0.03  # of the word itself, at most, at either end
GAIN_DB = (-12.0, 6.0)
BANDS_HZ = (60.0, 150.0, 350.0, 800.0, 1800.0, 4000.0, 8000.0)
BAND_DB = 7.0  # a microphone's unevenness, at most, up and down
NOISE_DB = (5.0, 35.0)
IN_NOISE, IN_ROOM = 0.8, 0.3  # shares of the variations
VERSION = 2  # a change of the numbers above, or of what is done with them, is other data


def digit_sources(
    data: DataConfig, stage: str, init: Path, out: Path, noise: Path | None, processes: int, progress: Progress
) -> list[Source]:
    """What a stage learns from: the recordings in `data.root`, and for a share of `data.replay` of the rows what the
    model in folder `init` learned in its own stage of that name. The world is spoken again in `out`.

    `noise` is a folder of real noises and rooms, of which those for tests are left alone. Raises BadConfig, BadRecord
    and BadMedia for what cannot be learned from.
    """
    assert data.root is not None
    folder = recordings(Path(data.root), data.holdout)
    progress.say(folder.summary())
    specs, _ = read_config(init)
    tokenizer = ChatTokenizer.load(init / "tokenizer.json")
    around = None if noise is None else surroundings(noise).split()[0]
    digits = VariedDigits(folder, tokenizer, specs, SEED, around, 1 - data.replay)
    if not data.replay:
        return [digits]
    lab = retold(init, out / "replay", UTTERANCES, processes, progress)
    return [digits, Replay(lab, stage, UTTERANCES * ROWS_PER_UTTERANCE, data.replay)]


class VariedDigits:
    """Rows of recognition from a folder of recordings: row i is variation i // n of recording i % n, of n.

    Variation 0 is the recording itself. In the others it is often followed by more of the same speaker's, as a number
    is read out: one row teaches several words. `around` are real noises and rooms; without them noise is made, and
    there are no rooms. `weight` is this source's share of the rows of a mixture. `lengths` are those a model of `specs`
    with this tokenizer sees; for them every recording is decoded once, so BadMedia names one that cannot be.
    """

    def __init__(
        self,
        folder: Folder,
        tokenizer: ChatTokenizer,
        specs: ModelConfig,
        seed: int,
        around: Surroundings | None = None,
        weight: float = 1.0,
    ) -> None:
        self.name, self.weight = str(folder.root), weight
        self._folder, self._seed, self._around = folder, seed, around
        self._of_speaker: dict[str, list[int]] = {}
        for place, member in enumerate(folder.members):
            self._of_speaker.setdefault(member.speaker, []).append(place)
        waves = (_samples(member.sound()) for member in folder.members)
        self._sizes, self._words = map(list, zip(*((len(wave), _word(wave)) for wave in waves), strict=True))
        rows = (self._row(row, _silence(self._length(row))) for row in range(len(self)))
        self.lengths: Lengths = lengths_of(row_length(row, tokenizer, specs) for row in rows)

    def __len__(self) -> int:
        return len(self._folder.members) * VARIATIONS

    def __getitem__(self, row: int) -> Sample:
        """The sample with its sound loaded, f32 at 16 kHz. Raises BadMedia naming a file that cannot be decoded."""
        said, manner = self._said(row), self._manner(row)
        waves = [_samples(self._folder.members[place].sound()) for place in said]
        wave = waves[0] if manner is None else manner.of(waves, self._around)
        return self._row(row, Audio(samples=wave, rate_hz=RATE_HZ))

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over recordings, noises and rooms, and what the variations follow from."""
        around = self._around.fingerprint() if self._around else None
        return fingerprint([self._folder.fingerprint, self._seed, around, VERSION])

    def _row(self, row: int, sound: Audio) -> Sample:
        said = [self._folder.members[place] for place in self._said(row)]
        variation = row // len(self._folder.members)
        turns = task_turns("asr", sound=sound, text=" ".join(member.word for member in said))
        return Sample(f"{said[0].id}/{variation}", "asr", turns, {"speaker": said[0].speaker})

    def _said(self, row: int) -> list[int]:
        """Which recordings are heard one after the other."""
        variation, first = divmod(row, len(self._folder.members))
        if not variation:
            return [first]
        rng, speaker = random.Random(f"{self._seed} said {row}"), self._folder.members[first].speaker
        return [first, *rng.choices(self._of_speaker[speaker], k=rng.choice(FOLLOWED_BY))]

    def _manner(self, row: int) -> "_Manner | None":
        if row < len(self._folder.members):
            return None
        rng, said = random.Random(f"{self._seed} manner {row}"), self._said(row)
        longest = 0.0 if rng.random() < IN_HASTE else PAUSE_SECONDS
        pauses = tuple(round(rng.uniform(0, longest) * RATE_HZ) for _ in range(len(said) + 1))
        close = rng.random() < CUT_CLOSE
        pieces = tuple(_bitten(self._words[place], rng) if close else (0, self._sizes[place]) for place in said)
        return _Manner(round(RATE_HZ * rng.uniform(*SPEED)), pieces, pauses, rng.getrandbits(48))

    def _length(self, row: int) -> int:
        manner = self._manner(row)
        return self._sizes[row] if manner is None else sum(manner.sizes) + sum(manner.pauses)


@dataclass(frozen=True)
class _Manner:
    """How recordings are varied: what decides their length is drawn, the rest is drawn from `seed`."""

    rate_hz: int  # that the samples are taken to have: fewer than they have is slower and deeper
    pieces: tuple[tuple[int, int], ...]  # first sample and the one after the last of each recording
    pauses: tuple[int, ...]  # samples before the first, between, and after the last
    seed: int

    @property
    def sizes(self) -> list[int]:
        """Samples of the pieces at the speed drawn."""
        return [round((end - begin) * RATE_HZ / self.rate_hz) for begin, end in self.pieces]

    def of(self, waves: Sequence[np.ndarray], around: Surroundings | None) -> np.ndarray:
        """Recordings f32 [W] at 16 kHz one after the other between pauses, at another speed and pitch, through an
        uneven microphone, in a room and amid noise: f32 [sum of sizes and pauses] within full scale."""
        rng, heard = random.Random(self.seed), [np.zeros(self.pauses[0], np.float32)]
        for wave, (begin, end), size, pause in zip(waves, self.pieces, self.sizes, self.pauses[1:], strict=True):
            piece = resample(wave[begin:end], self.rate_hz, RATE_HZ)[:size]
            heard.append(np.pad(piece, (0, size - len(piece) + pause)))
        wave = _uneven(np.concatenate(heard), rng)
        if around is not None and around.rooms and rng.random() < IN_ROOM:
            wave = in_room(wave, rng.choice(around.rooms).sound())
        if rng.random() < IN_NOISE:
            noise_db = rng.uniform(*NOISE_DB)
            if around is None:
                wave = with_noise(wave, noise_db, rng.getrandbits(32))
            else:
                wave = at_snr(wave, excerpt(rng.choice(around.noises).sound(), len(wave), rng), noise_db)
        return np.clip(at_level(wave, rng.uniform(*GAIN_DB)), -1, 1).astype(np.float32)


def _samples(sound: Audio) -> np.ndarray:
    assert sound.samples is not None
    return sound.samples


def _word(wave: np.ndarray) -> tuple[int, int]:
    """First sample of what is loud in a recording, and the one after the last; all of a silent one."""
    loud = np.flatnonzero(np.abs(wave) > LOUD * np.abs(wave).max())
    return (int(loud[0]), int(loud[-1]) + 1) if len(loud) else (0, len(wave))


def _bitten(word: tuple[int, int], rng: random.Random) -> tuple[int, int]:
    """A word cut a little short at both ends, by at most a quarter in all."""
    most = min(round(BITTEN_SECONDS * RATE_HZ), (word[1] - word[0]) // 8)
    return word[0] + rng.randint(0, most), word[1] - rng.randint(0, most)


def _silence(samples: int) -> Audio:
    """So much silence, which takes no memory."""
    return Audio(samples=np.broadcast_to(np.float32(0), samples), rate_hz=RATE_HZ)


def _uneven(wave: np.ndarray, rng: random.Random) -> np.ndarray:
    """The wave with drawn gains at `BANDS_HZ`, in between by the logarithm of the frequency."""
    gains_db = [rng.uniform(-BAND_DB, BAND_DB) for _ in BANDS_HZ]
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(wave), 1 / RATE_HZ), BANDS_HZ[0]))
    gains = 10 ** (np.interp(octaves, np.log2(BANDS_HZ), gains_db) / 20)
    return np.fft.irfft(np.fft.rfft(wave) * gains, len(wave)).astype(np.float32)
