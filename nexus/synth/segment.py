"""From a long recording to utterances: where somebody speaks, cut out at pauses, in flat memory.

A recording is read twice. The first reading understands it whole or refuses it, and keeps one level per 10 ms (4 MB
for three hours); where speech is follows from these levels alone; the second reading cuts it out, one piece in memory
at a time. Speech is what rises and falls above the noise of its neighbourhood: levels of the band of speech against a
floor that follows the recording. This needs no weights and no second library; it does not tell speech from music.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import model_validator

from nexus.errors import BadMedia
from nexus.media import StreamResampler, check_declared_sound, check_values, open_sound
from nexus.organs import Positive, Share, Strict
from nexus.source import MISSING_SECONDS, Limits, open_source, refuse_cut, refuse_long
from nexus.synth.records import Record, Rejected, content_id
from nexus.types import Audio

RATE_HZ = 16_000
HOP = 160  # samples: 10 ms
WINDOW = 400  # 25 ms, in a transform of NUM_FFT
NUM_FFT = 512
BAND_HZ = (200.0, 3800.0)  # where speech is loud and hum, rumble and hiss are not
SMOOTH_FRAMES = 5  # a syllable is longer, a click shorter
NEIGHBOURHOOD_FRAMES = 500  # floor and top are taken over three of these: 15 s, within which everybody breathes
FLOOR_QUANTILE, TOP_QUANTILE = 0.1, 0.95
RISE_SHARE = 0.3  # of the way from floor to top: where speech begins
HYSTERESIS_DB = 2.0
FLAT_TOP = 0.95  # of full scale: equal neighbours above it are a wave that was cut off


class SegmentConfig(Strict):
    """Where recordings are cut, and which pieces are of no use."""

    whole_seconds: Positive = 15.0  # a recording up to this long is one utterance already and stays whole
    min_rise_db: Positive = 5.0  # of speech above the noise around it
    silence_db: float = -65.0  # of full scale, in the band of speech: below it there is nothing to hear
    min_speech_seconds: Positive = 0.15  # shorter rises are clicks
    min_pause_seconds: Positive = 0.5  # shorter pauses do not separate utterances
    pad_seconds: Positive = 0.2  # kept on both sides of an utterance
    max_seconds: Positive = 20.0  # longer utterances are cut where they are quietest
    max_clipped_share: Share = 0.01  # of a piece's samples
    max_hours: Positive = 12.0  # of one recording
    max_file_gib: Positive = 64.0

    @model_validator(mode="after")
    def _fits(self) -> "SegmentConfig":
        if self.max_seconds < 1.0 or self.max_seconds < 4 * self.pad_seconds:
            raise ValueError(f"max_seconds {self.max_seconds:g} must be at least 1 and four times pad_seconds")
        return self


@dataclass(frozen=True)
class Survey:
    """What the first reading of a recording finds: its length in samples at 16 kHz, rate and channels as recorded, and
    per 10 ms the level in dB of full scale and the share of samples that are cut off, f32 [frames] each."""

    num_samples: int
    rate_hz: int
    channels: int
    levels_db: np.ndarray
    clipped: np.ndarray


class Segmenter:
    """Cuts recordings into utterances; one object for many recordings, nothing is kept between them."""

    def __init__(self, config: SegmentConfig) -> None:
        self._config = config
        self._limits = Limits(
            max_file_bytes=int(config.max_file_gib * 2**30), max_audio_seconds=config.max_hours * 3600
        )

    def pieces(self, recording: Record) -> Iterator[Record | Rejected]:
        """The utterances of a recording (`sound` is a path) in their order, mono f32 [W] at 16 kHz, one at a time.

        The meta of each has `segment`: {start_seconds, end_seconds, of_seconds, snr_db, clipped_share, rate_hz,
        channels}. Rejected: the recording as a whole when it is `unreadable`, `silent` or has `no_speech`; a piece
        that is `clipped`.
        """
        assert recording.sound is not None and recording.sound.path is not None, "a recording is a file"
        path = recording.sound.path
        try:
            about = survey(path, self._limits)
            if not np.any(about.levels_db > self._config.silence_db):
                loudest = float(about.levels_db.max())
                yield Rejected(recording, "silent", {"seconds": about.num_samples / RATE_HZ, "loudest_db": loudest})
                return
            floors, spans = speech_spans(about, self._config)
            if not spans:
                yield Rejected(recording, "no_speech", {"seconds": about.num_samples / RATE_HZ})
                return
            for (start, end), samples in zip(spans, _cut(path, spans, self._limits), strict=True):
                yield self._piece(recording, about, floors, start, end, samples)
        except BadMedia as error:
            yield Rejected(recording, "unreadable", {"error": str(error)})

    def cuts(self, path: Path, rows: Sequence[Record]) -> Iterator[Record | Rejected]:
        """The stretches of one file that rows name in their meta (`start`, `seconds`), in the order of their starts.
        The meta and the reasons are those of `pieces`; a stretch outside the file is `outside`."""
        try:
            about = survey(path, self._limits)
            floors, _ = speech_spans(about, self._config)
            ordered = sorted(rows, key=lambda row: float(row.meta["start"]))
            placed = [(row, *_stretch(row)) for row in ordered]
            inside = [row for row, start, end in placed if 0 <= start < end <= about.num_samples + HOP]
            found = {row.id for row in inside}
            for row in ordered:
                if row.id not in found:
                    yield Rejected(row, "outside", {"of_seconds": about.num_samples / RATE_HZ})
            spans = [(a, min(b, about.num_samples)) for a, b in map(_stretch, inside)]
            for row, (start, end), samples in zip(inside, spans, _cut(path, spans, self._limits), strict=True):
                yield self._piece(row, about, floors, start, end, samples)
        except BadMedia as error:
            for row in rows:
                yield Rejected(row, "unreadable", {"error": str(error)})

    def _piece(
        self, recording: Record, about: Survey, floors: np.ndarray, start: int, end: int, samples: np.ndarray
    ) -> Record | Rejected:
        frames = slice(start // HOP, max(start // HOP + 1, end // HOP))
        clipped = float(about.clipped[frames].mean())
        segment = {
            "start_seconds": start / RATE_HZ,
            "end_seconds": end / RATE_HZ,
            "of_seconds": about.num_samples / RATE_HZ,
            "snr_db": _snr_db(about.levels_db[frames], floors[frames]),
            "clipped_share": clipped,
            "rate_hz": about.rate_hz,
            "channels": about.channels,
        }
        row = content_id(recording.id, start, end, hashlib.sha256(samples.tobytes()).hexdigest())
        piece = recording.with_(id=content_id(row, 0), sound=Audio(samples=samples, rate_hz=RATE_HZ))
        piece = piece.noted(row=row, attempt=0, recording=recording.id, segment=segment)
        if clipped > self._config.max_clipped_share:
            return Rejected(piece, "clipped", {"share": clipped, "limit": self._config.max_clipped_share})
        return piece


def _stretch(row: Record) -> tuple[int, int]:
    start, seconds = float(row.meta["start"]), float(row.meta["seconds"])
    return round(start * RATE_HZ), round((start + seconds) * RATE_HZ)


def survey(path: Path, limits: Limits) -> Survey:
    """Read a recording once, whole, in blocks. Raises BadMedia as `nexus.media.load_audio` does."""
    levels, clipped, rest, held, about = [], [], np.zeros(0, np.float32), 0, (0, 0)
    flat = _FlatTops()
    for block, native, rate_hz in _blocks(path, limits):
        if native is not None:
            about = (rate_hz, native.shape[1])
            clipped.append(flat.push(native, rate_hz))
        held += len(block)
        rest = np.concatenate([rest, block])
        levels.append(_levels_db(rest))
        rest = rest[len(levels[-1]) * HOP :]
    levels.append(_levels_db(np.pad(rest, (0, WINDOW - HOP + -len(rest) % HOP))))
    levels_db = np.concatenate(levels)
    clips = np.concatenate([*clipped, flat.finish()])
    # Resampling rounds the number of samples: the last frame may be there on one side only.
    clips = np.pad(clips[: len(levels_db)], (0, max(0, len(levels_db) - len(clips))))
    return Survey(held, *about, levels_db, clips)


def speech_spans(about: Survey, config: SegmentConfig) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The noise floor in dB per 10 ms, f32 [frames], and the spans [start, end) in samples at 16 kHz to cut out: in
    order, apart from each other, none longer than `max_seconds` but a recording that stays whole."""
    levels = np.convolve(np.pad(about.levels_db, SMOOTH_FRAMES // 2, mode="edge"), np.ones(SMOOTH_FRAMES), "valid")
    levels = (levels / SMOOTH_FRAMES).astype(np.float32)
    floor, top = _floor_and_top(levels)
    begins = np.maximum(floor + np.maximum(config.min_rise_db, RISE_SHARE * (top - floor)), config.silence_db)
    runs = _runs(levels > begins - HYSTERESIS_DB)
    runs = [(a, b) for a, b in runs if np.any(levels[a:b] > begins[a:b])]
    runs = [(a, b) for a, b in runs if b - a >= config.min_speech_seconds * 100]
    if not runs:
        return floor, []
    if about.num_samples <= config.whole_seconds * RATE_HZ:
        return floor, [(0, about.num_samples)]
    joined: list[tuple[int, int]] = []
    for a, b in runs:
        if joined and a - joined[-1][1] < config.min_pause_seconds * 100:
            joined[-1] = (joined[-1][0], b)
        else:
            joined.append((a, b))
    padded = _padded(joined, len(levels), round(config.pad_seconds * 100))
    pieces = [piece for run in padded for piece in _short_enough(run, levels, round(config.max_seconds * 100))]
    return floor, [(a * HOP, min(b * HOP, about.num_samples)) for a, b in pieces]


def _padded(runs: list[tuple[int, int]], num_frames: int, pad: int) -> list[tuple[int, int]]:
    """Runs with `pad` frames of what surrounds them; neighbours share a pause that is too short for both."""
    starts, ends = [a for a, _ in runs], [b for _, b in runs]
    before = [0, *((a + b) // 2 for a, b in zip(ends, starts[1:], strict=False))]
    after = [*before[1:], num_frames]
    return [(max(a - pad, low), min(b + pad, high)) for (a, b), low, high in zip(runs, before, after, strict=True)]


def _short_enough(run: tuple[int, int], levels: np.ndarray, longest: int) -> Iterator[tuple[int, int]]:
    """The run in pieces of at most `longest` frames, cut at the quietest frame of the later half of each."""
    start, end = run
    while end - start > longest:
        half = start + longest // 2
        cut = half + int(np.argmin(levels[half : start + longest]))
        yield start, cut
        start = cut
    yield start, end


def _floor_and_top(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quiet and loud quantiles of the neighbourhood of every frame, f32 [frames] each; straight lines between them."""
    centres = np.arange(NEIGHBOURHOOD_FRAMES // 2, len(levels) + NEIGHBOURHOOD_FRAMES // 2, NEIGHBOURHOOD_FRAMES)
    reach = NEIGHBOURHOOD_FRAMES * 3 // 2
    around = [levels[max(0, c - reach) : c + reach] for c in centres]
    quantiles = np.array([np.quantile(part, (FLOOR_QUANTILE, TOP_QUANTILE)) for part in around])
    frames = np.arange(len(levels))
    floor, top = (np.interp(frames, centres, quantiles[:, k]).astype(np.float32) for k in (0, 1))
    return floor, top


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _snr_db(levels: np.ndarray, floor: np.ndarray) -> float:
    """Speech over floor of a piece, both as powers of the band of speech."""
    noise = float(np.mean(10 ** (floor / 10)))
    speech = max(float(np.mean(10 ** (levels / 10))) - noise, 1e-3 * noise)
    return 10 * float(np.log10(speech / noise))


def _levels_db(samples: np.ndarray) -> np.ndarray:
    """Level in the band of speech, dB of full scale, of every window of 25 ms that f32 [W] holds, 10 ms apart."""
    if len(samples) < WINDOW:
        return np.zeros(0, np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP]
    spectra = np.abs(np.fft.rfft(frames * np.hanning(WINDOW).astype(np.float32), NUM_FFT)) ** 2
    low, high = (round(hz * NUM_FFT / RATE_HZ) for hz in BAND_HZ)
    # A sine at full scale is 0 dB: its power in the spectrum is (sum of the window / 2)^2, spread by the window.
    full_scale = NUM_FFT * float(np.square(np.hanning(WINDOW)).sum()) / 4
    return (10 * np.log10(spectra[:, low:high].sum(1) / full_scale + 1e-12)).astype(np.float32)


class _FlatTops:
    """Share of cut-off samples per 10 ms, from blocks at the recording's own rate."""

    def __init__(self) -> None:
        self._count, self._frames = 0, np.zeros(0, np.float64)
        self._last: np.ndarray | None = None

    def push(self, native: np.ndarray, rate_hz: int) -> np.ndarray:
        """Take f32 [W, channels], give the frames that are complete."""
        before = native[:1] * 0 if self._last is None else self._last
        flat = (np.diff(native, axis=0, prepend=before) == 0) & (np.abs(native) >= FLAT_TOP)
        self._last = native[-1:]
        frame = (self._count + np.arange(len(native))) * 100 // rate_hz
        first = self._count * 100 // rate_hz
        self._count += len(native)
        counts = np.bincount(frame - first, flat.mean(1) / (rate_hz / 100))
        merged = np.zeros(max(len(counts), len(self._frames)))
        merged[: len(counts)] += counts
        merged[: len(self._frames)] += self._frames
        self._frames = merged[-1:]
        return merged[:-1].astype(np.float32)

    def finish(self) -> np.ndarray:
        """The last frame."""
        return self._frames.astype(np.float32)


def _blocks(path: Path, limits: Limits) -> Iterator[tuple[np.ndarray, np.ndarray | None, int]]:
    """(mono f32 [W] at 16 kHz, the same as recorded f32 [W', channels] and its rate) block by block; the last is what
    the resampler held back. Refuses what `load_audio` refuses, but a recording may be as short as one sample."""
    with open_source(path, "sound", limits) as (file, name):
        sound = open_sound(file, name)
        check_declared_sound(sound, name, limits)
        resampler, frames = StreamResampler(sound.rate_hz, RATE_HZ), 0
        for block in _joined(sound.blocks, sound.rate_hz):
            frames += len(block)
            if frames > limits.max_audio_seconds * sound.rate_hz:
                refuse_long(name, "sound", f"more than {frames / sound.rate_hz:.1f} s", limits.max_audio_seconds)
            check_values(block, name, limits)
            yield resampler.push(block.mean(axis=1, dtype=np.float32)), block, sound.rate_hz
        yield resampler.finish(), None, sound.rate_hz
    if frames == 0:
        raise BadMedia(f"{name}: holds no samples; record it again")
    if sound.seconds is not None and frames / sound.rate_hz < sound.seconds - MISSING_SECONDS:
        refuse_cut(name, sound.seconds, frames / sound.rate_hz)


def _joined(blocks: Iterator[np.ndarray], num_frames: int) -> Iterator[np.ndarray]:
    """The same blocks, joined to at least num_frames each: FFmpeg's are 20 ms, and every block costs an append."""
    waiting: list[np.ndarray] = []
    for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) >= num_frames:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def _cut(path: Path, spans: list[tuple[int, int]], limits: Limits) -> Iterator[np.ndarray]:
    """The samples of each span, f32, in order; no more than one span and one block are in memory."""
    held, begin = np.zeros(0, np.float32), 0
    waiting = iter(spans)
    span = next(waiting, None)
    for block, _, _ in _blocks(path, limits):
        held = np.concatenate([held, block])
        while span is not None and begin + len(held) >= span[1]:
            yield held[span[0] - begin : span[1] - begin].copy()
            span = next(waiting, None)
        keep = max(0, (span[0] if span else begin + len(held)) - begin)
        held, begin = held[keep:], begin + min(keep, len(held))
    assert span is None, f"{path} changed between two readings"
