"""An ASR test set in the style of Nexus-audio: clean verified clips, set into scenarios with noise and other speakers.

Nexus-O, section 3.4: 8.1k Chinese and 2.8k English clips from meetings, live streams, customer service and everyday
conversation. Theirs are recordings; here clips of a `nexus synth` run (or recordings brought in through one) are set
into such surroundings, except those whose row names the `scenario` it was recorded in: they stay as they are.

Which clips, which scenario and every draw follow from the seed and the rows' ids. Left behind: audio/, manifest.jsonl
(which `nexus eval --suite nexus_audio` reads), about/making.jsonl (what was done to each clip), README.md (the data
card) and testset.json, which is written last.
"""

import hashlib
import heapq
import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import soundfile
from pydantic import Field, model_validator

from nexus.data.records import read_record
from nexus.errors import BadConfig, BadMedia, BadRecord
from nexus.media import load_audio
from nexus.organs import Count, Natural, Positive, Strict
from nexus.progress import Progress
from nexus.recipe import fingerprint, read_settings
from nexus.results import write_whole
from nexus.synth.augment import Line, over, overlapped
from nexus.synth.duplicates import comparable
from nexus.synth.noise import RATE_HZ, Clip, Surroundings, at_snr, excerpt, in_room, surroundings
from nexus.synth.records import content_id
from nexus.types import Audio, Sample, Text

Portion = Annotated[float, Field(ge=0, le=1)]
Range = tuple[float, float]
Language = Literal["zh", "en"]
RECORDED = "recorded"  # in manifests of how a clip was made: taken as it is


class ScenarioConfig(Strict):
    """What is around the speaker. Ranges are (lowest, highest), drawn evenly; shares are of the scenario's clips."""

    weight: Positive = 1.0  # of the clips, beside the other scenarios
    noises: tuple[str, ...] = ()  # categories of the noise folder; none: all
    snr_db: Range
    overlap_share: Portion = 0.0  # with a second speaker of the same language
    overlap: tuple[Portion, Portion] = (0.1, 0.4)  # of the clip, at its end
    overlap_gain_db: Range = (-12.0, -3.0)  # of the second speaker
    room_share: Portion = 0.0
    line: Line | None = None

    @model_validator(mode="after")
    def _ordered(self) -> "ScenarioConfig":
        for name in ("snr_db", "overlap", "overlap_gain_db"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} is (lowest, highest), given {[low, high]}")
        if self.overlap_share and self.overlap[0] <= 0:
            raise ValueError("overlap begins above 0: a second speaker is heard for some time")
        return self


SIZES: dict[Language, int] = {"zh": 8100, "en": 2800}
SCENARIOS = {
    "meeting": ScenarioConfig(snr_db=(10.0, 25.0), overlap_share=0.3, room_share=0.5),
    "live_stream": ScenarioConfig(snr_db=(5.0, 20.0), overlap_share=0.1),
    "customer_service": ScenarioConfig(snr_db=(10.0, 30.0), line="telephone"),
    "conversation": ScenarioConfig(snr_db=(0.0, 20.0), overlap_share=0.2, room_share=0.3),
}


class AsrSetConfig(Strict):
    """A test set. `source` is the folder of a run, or its rows.jsonl; `noise` a folder as augmentation reads it."""

    name: str = "nexus-audio"
    source: str = ""
    noise: str = ""
    sizes: dict[Language, Count] = Field(default_factory=SIZES.copy)
    scenarios: dict[str, ScenarioConfig] = Field(default_factory=SCENARIOS.copy)
    split: Literal["test", "train", "any"] = "test"  # rows of training would be tested on what was learned
    clips: Literal["all", "held_out"] = "all"  # of the noise folder
    seed: Natural = 0

    @model_validator(mode="after")
    def _fits(self) -> "AsrSetConfig":
        if not self.scenarios or not self.sizes:
            raise ValueError("scenarios and sizes: expected at least one of each")
        if bad := [name for name in self.scenarios if not name.isidentifier()]:
            raise ValueError(f"scenario {bad[0]!r}: expected letters, digits and _ alone, as a tag")
        return self

    @classmethod
    def load(cls, path: Path | None, overrides: Sequence[str] = ()) -> "AsrSetConfig":
        """The settings of a YAML file, or the published ones, with `a.b=value` overrides (`sizes={en: 200}`).

        Raises BadConfig naming file, key, expected and given.
        """
        return read_settings(cls, path, overrides, "testset" if path is None else "")


@dataclass(frozen=True)
class Spoken:
    """A clean clip of the source."""

    id: str
    text: str
    language: str
    sound: Path
    speaker: str
    source: str
    licence: str
    scenario: str  # in which it was recorded; "" where it is to be set into one


def build(config: AsrSetConfig, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Make the set in `out`; returns what testset.json holds. The same command goes on with, or repeats, what is there.

    Raises BadConfig for an `out` with another set, BadRecord for a source with too few clips (never a smaller set in
    silence), and as the readers do for sounds and noises.
    """
    if not config.source or not config.noise:
        missing = "source" if not config.source else "noise"
        raise BadConfig(f"testset: expected source (a run of nexus synth) and noise (a folder), given no {missing}")
    rows = Path(config.source) / "rows.jsonl" if Path(config.source).is_dir() else Path(config.source)
    chosen = _chosen(config, rows)
    around = surroundings(Path(config.noise))
    around = around.split()[1] if config.clips == "held_out" else around
    tags = _scenarios(config, chosen, around)
    card = fingerprint({**config.model_dump(mode="json", exclude={"noise", "source"}), "ids": [c.id for c in chosen]})
    _claim(out, card)
    shown = Progress() if progress is None else progress
    with shown as live, live.stage("testset", len(chosen), "clips") as stage:
        maker = _Maker(config, around, chosen, out)
        lines = []
        for clip, tag in zip(chosen, tags, strict=True):
            lines.append(maker.made(clip, tag))
            stage.advance(1)
    manifest = [line for line, _ in lines]
    report = {"schema": 1, "fingerprint": card, "name": config.name, **_counts(manifest)}
    _write(out / "manifest.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in manifest))
    _write(out / "about" / "making.jsonl", "".join(json.dumps(how, ensure_ascii=False) + "\n" for _, how in lines))
    _write(out / "README.md", _readme(config, manifest, [how for _, how in lines]))
    report["manifest_sha256"] = hashlib.sha256((out / "manifest.jsonl").read_bytes()).hexdigest()
    _write(out / "testset.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


# Which clips


def _chosen(config: AsrSetConfig, rows: Path) -> list[Spoken]:
    """The clips of each language with the least hashes, one per text; memory holds no others."""
    best: dict[str, list[tuple[int, str, Spoken]]] = {language: [] for language in config.sizes}
    sizes: dict[str, int] = dict(config.sizes.items())
    texts: set[bytes] = set()
    seen: Counter[str] = Counter()
    for clip in _spoken(rows, config.split):
        words = comparable(clip.text)
        if clip.language not in best or words in texts:
            continue
        texts.add(words)
        seen[clip.language] += 1
        entry = (-_draw(config.seed, clip.id), clip.id, clip)
        heap = best[clip.language]
        if len(heap) < sizes[clip.language]:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)
    for language, size in config.sizes.items():
        if seen[language] < size:
            of_split = "" if config.split == "any" else f" of split {config.split!r}"
            raise BadRecord(
                f"{rows}: expected {size} {language} clips{of_split} with distinct texts for task asr, given "
                f"{seen[language]}; synthesise more, or set sizes.{language}{' or split' if of_split else ''}"
            )
    return [clip for heap in best.values() for _, _, clip in sorted(heap, reverse=True)]


def _spoken(rows: Path, split: str) -> Iterator[Spoken]:
    """The asr rows of a run; of one that was not assembled, every row."""
    if not rows.is_file():
        raise BadConfig(f"{rows}: expected rows of a nexus synth run, given no such file; name the run's folder")
    with rows.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            where = f"{rows}:{number}"
            if not line.strip():
                continue
            if '"messages"' not in line:
                clip, side = _plain(line, rows.parent, where)
            else:
                sample = read_record(line, where, rows.parent)
                if sample.task != "asr":
                    continue
                clip, side = _assembled(sample, where), sample.meta.get("split")
            if split in ("any", side):
                yield clip


def _plain(line: str, root: Path, where: str) -> tuple[Spoken, Any]:
    """A row of a run that was not assembled, and its side of the split."""
    try:
        match json.loads(line):
            case {
                "id": str(name),
                "audio": str(sound),
                "text": str(text),
                "language": str(language),
                "meta": dict(meta),
            }:
                return _clip(name, text, language, root / sound, meta), meta.get("split")
    except ValueError:
        pass  # the same refusal
    raise BadRecord(f"{where}: expected id, audio, text, language and meta, given another row; name a run's rows")


def _assembled(sample: Sample, where: str) -> Spoken:
    parts = [part for turn in sample.turns for part in turn.parts]
    sounds = [part.path for part in parts if isinstance(part, Audio) and part.path is not None]
    said = [part.text for part in sample.turns[-1].parts if isinstance(part, Text)]
    language = sample.meta.get("language")
    if len(sounds) != 1 or len(said) != 1 or not isinstance(language, str):
        raise BadRecord(f"{where}: expected one sound, its text and meta language, given another row; run nexus synth")
    return _clip(sample.id, said[0], language, sounds[0], sample.meta)


def _clip(name: str, text: str, language: str, sound: Path, meta: Mapping[str, Any]) -> Spoken:
    if sound.parent.suffix == ".tar":
        raise BadConfig(f"{sound}: expected sounds as files, given a shard; synthesise with output.form=files")
    speaker = str(meta.get("voice_group") or meta.get("speaker") or "")
    source, licence = str(meta.get("source", "unknown")), str(meta.get("licence", "unknown"))
    return Spoken(name, text, language, sound, speaker, source, licence, str(meta.get("scenario") or ""))


def _scenarios(config: AsrSetConfig, chosen: Sequence[Spoken], around: Surroundings) -> list[str]:
    """The scenario of every clip: exact shares per language (largest remainders), in the order of the clips' hashes."""
    known = {clip.category for clip in around.noises}
    for name, scenario in config.scenarios.items():
        if unknown := sorted(set(scenario.noises) - known):
            there = ", ".join(sorted(known))
            raise BadConfig(f"scenarios.{name}.noises: {config.noise} has no category {unknown[0]!r}; has {there}")
        if scenario.room_share and not around.rooms:
            raise BadConfig(f"scenarios.{name}.room_share: {config.noise} has no room (rir*.wav); add one or set 0")
    tags: dict[str, str] = {}
    for language in config.sizes:
        free = [clip.id for clip in chosen if clip.language == language and not clip.scenario]
        tags |= zip(free, _shared_out(len(free), config.scenarios), strict=True)
    return [clip.scenario or tags[clip.id] for clip in chosen]


def _shared_out(total: int, scenarios: Mapping[str, ScenarioConfig]) -> list[str]:
    weight = sum(scenario.weight for scenario in scenarios.values())
    exact = {name: total * scenario.weight / weight for name, scenario in scenarios.items()}
    counts = {name: int(number) for name, number in exact.items()}
    rest = total - sum(counts.values())
    for name in sorted(exact, key=lambda name: counts[name] - exact[name])[:rest]:
        counts[name] += 1
    return [name for name, count in counts.items() for _ in range(count)]


# What is done to them


class _Maker:
    """Renders clips one by one; each draws from its own id."""

    def __init__(self, config: AsrSetConfig, around: Surroundings, chosen: Sequence[Spoken], out: Path) -> None:
        self._config, self._out = config, out
        self._rooms = around.rooms
        self._noises = {
            name: [clip for clip in around.noises if not scenario.noises or clip.category in scenario.noises]
            for name, scenario in config.scenarios.items()
        }
        self._by_language: dict[str, list[Spoken]] = defaultdict(list)
        for clip in chosen:
            self._by_language[clip.language].append(clip)

    def made(self, clip: Spoken, tag: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Write the sound; returns its lines in the manifest and in the account of how it was made."""
        name = content_id(self._config.name, self._config.seed, clip.id)
        if clip.scenario:
            wave, how = _loaded(clip.sound), {"made": RECORDED}
        else:
            wave, how = self._in_scenario(clip, tag)
        path = Path("audio", clip.language, f"{name}.flac")
        _write_flac(self._out / path, wave)
        line = {
            "id": name,
            "audio": path.as_posix(),
            "text": clip.text,
            "language": clip.language,
            "scenario": tag,
            "duration": round(len(wave) / RATE_HZ, 3),
            "speaker": clip.speaker,
            "snr": how.get("snr_db"),
            "source": clip.source,
            "licence": clip.licence,
        }
        return line, {"id": name, "row": clip.id, **how}

    def _in_scenario(self, clip: Spoken, tag: str) -> tuple[np.ndarray, dict[str, Any]]:
        """The order of the world: who speaks, the room, the noise, the line."""
        config, rng = self._config.scenarios[tag], random.Random(f"{self._config.seed} {clip.id}")
        wave, how = _loaded(clip.sound), dict[str, Any](made="set into scenario")
        if rng.random() < config.overlap_share:
            wave, how["overlap"] = self._overlapped(clip, wave, config, rng)
        if rng.random() < config.room_share:
            room = rng.choice(self._rooms)
            wave, how["room"] = in_room(wave, room.sound()), room.name
        noise: Clip = rng.choice(self._noises[tag])
        snr_db = round(rng.uniform(*config.snr_db), 2)
        wave = at_snr(wave, excerpt(noise.sound(), len(wave), rng), snr_db)
        how |= {"noise": noise.name, "category": noise.category, "snr_db": snr_db}
        if config.line is not None:
            wave, how["line"] = over(wave, RATE_HZ, config.line), config.line
        return wave, how

    def _overlapped(
        self, clip: Spoken, wave: np.ndarray, config: ScenarioConfig, rng: random.Random
    ) -> tuple[np.ndarray, dict[str, Any]]:
        others = self._by_language[clip.language]
        start = rng.randrange(len(others))
        order = (others[(start + step) % len(others)] for step in range(len(others)))
        other = next((other for other in order if other.speaker != clip.speaker), None)
        if other is None:
            raise BadRecord(
                f"overlap in {clip.language}: expected clips of two speakers, given only {clip.speaker!r}; set "
                "overlap_share=0 or give more speakers"
            )
        share, gain_db = round(rng.uniform(*config.overlap), 3), round(rng.uniform(*config.overlap_gain_db), 2)
        mixed = overlapped(wave, _loaded(other.sound), gain_db, share)
        return mixed, {"row": other.id, "speaker": other.speaker, "share": share, "gain_db": gain_db}


def _loaded(path: Path) -> np.ndarray:
    samples = load_audio(path, RATE_HZ).samples
    assert samples is not None
    if not samples.any():
        raise BadMedia(f"{path}: is silent, expected speech; take it out of the source")
    return samples


def _write_flac(path: Path, wave: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    # Softer as a whole where two speakers or a line went beyond full scale; the ratios stay.
    soundfile.write(part, wave / max(1.0, float(np.abs(wave).max())), RATE_HZ, format="FLAC", subtype="PCM_16")
    os.replace(part, path)


# What is left behind


def _claim(out: Path, card: str) -> None:
    """`out` is empty, or holds this very set, whole or begun."""
    mark = out / "about" / "fingerprint"
    if mark.is_file() and (found := mark.read_text(encoding="utf-8").strip()) != card:
        raise BadConfig(f"{out}: expected the set {card}, given another one ({found}); name another --out")
    if not mark.is_file() and out.is_dir() and any(out.iterdir()):
        raise BadConfig(f"{out}: expected an empty folder or a set begun there, given other files; name another --out")
    _write(mark, card + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def _counts(manifest: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by: dict[str, dict[str, dict[str, float]]] = {}
    for line in manifest:
        at = by.setdefault(line["language"], {}).setdefault(line["scenario"], {"clips": 0, "hours": 0.0})
        at["clips"] += 1
        at["hours"] += line["duration"] / 3600
    return {
        "clips": len(manifest),
        "hours": sum(line["duration"] for line in manifest) / 3600,
        "speakers": len({line["speaker"] for line in manifest}),
        "by": by,
    }


def _readme(config: AsrSetConfig, manifest: Sequence[Mapping[str, Any]], making: Sequence[Mapping[str, Any]]) -> str:
    """The data card."""
    counts, recorded = _counts(manifest), sum(how["made"] == RECORDED for how in making)
    table = ["| language | scenario | clips | hours | SNR in dB | second speaker |", "|---|---|---|---|---|---|"]
    for language, scenarios in counts["by"].items():
        for scenario, at in scenarios.items():
            rows = [
                (line, how)
                for line, how in zip(manifest, making, strict=True)
                if (line["language"], line["scenario"]) == (language, scenario)
            ]
            levels = [line["snr"] for line, _ in rows if line["snr"] is not None]
            snr = f"{min(levels):.1f} to {max(levels):.1f}" if levels else "as recorded"
            overlaps = sum("overlap" in how for _, how in rows)
            table.append(f"| {language} | {scenario} | {at['clips']} | {at['hours']:.2f} | {snr} | {overlaps} |")
    licences = Counter((line["source"], line["licence"]) for line in manifest)
    return "\n".join(
        [
            f"# {config.name}: a test set for speech recognition",
            "",
            f"{counts['clips']} clips, {counts['hours']:.2f} hours, {counts['speakers']} speakers. {recorded} clips "
            f"were recorded in their scenario; {len(manifest) - recorded} are clean clips set into one: scores on "
            "these tell how robust a model is to the noise that was added, not how it does in such places.",
            "",
            *table,
            "",
            "Sources and licences:",
            "",
            *(f"- {source}: {licence}, {number} clips" for (source, licence), number in sorted(licences.items())),
            "",
            "manifest.jsonl has one object per clip: id, audio (FLAC, 16 kHz mono, relative to this folder), text, "
            "language, scenario, duration in seconds, speaker, snr in dB (null where nothing was added), source, "
            "licence. about/making.jsonl says which noise, room, line and second speaker each clip was given.",
            "",
        ]
    )


def _draw(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")
