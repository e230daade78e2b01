"""The test set builder: which clips, in which scenario, with what around them, and what stands in the manifest."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from loopback import failure

from nexus.errors import BadConfig, BadRecord, NexusError
from nexus.eval.suites.corpora import manifest as read_manifest
from nexus.media import load_audio
from nexus.synth.assemble import row_line
from nexus.synth.records import Record
from nexus.synth.testset import SCENARIOS, AsrSetConfig, ScenarioConfig, build
from nexus.types import Audio

RATE_HZ = 16_000


def wave(seed: int, seconds: float = 0.5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    length = round(seconds * RATE_HZ)
    return (0.2 * np.sin(np.arange(length) * rng.uniform(0.05, 0.3)) + 0.01 * rng.standard_normal(length)).astype("f4")


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    folder = tmp_path / "noise"
    for name in ("street/one.wav", "street/two.wav", "office/one.wav", "rirs/rir1.wav"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        room = np.exp(-np.arange(800) / 100) * np.random.default_rng(1).standard_normal(800) * 0.1
        samples = room if "rir" in name else np.random.default_rng(len(name)).standard_normal(RATE_HZ) * 0.1
        soundfile.write(folder / name, samples.astype("f4"), RATE_HZ)
    return folder


def run_folder(root: Path, num_clips: dict[str, int], **meta: Any) -> Path:
    """What `nexus synth` leaves: rows.jsonl and sounds."""
    folder, lines = root / "run", []
    (folder / "audio").mkdir(parents=True)
    for language, number in num_clips.items():
        for n in range(number):
            name, text = f"{language}{n}", f"clip number {n} of many" if language == "en" else f"第{'好' * (n + 1)}句话"
            path = folder / "audio" / f"{name}.wav"
            soundfile.write(path, wave(n), RATE_HZ)
            about = {"split": "test", "voice_group": f"v{n % 3}", "source": "tests", "licence": "CC0"} | meta
            row = Record(f"{name}-asr", text, language, "asr", Audio(path=path), about)
            lines.append(row_line(row, folder))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def made(run: Path, noise: Path, out: Path, **config: Any) -> list[dict[str, Any]]:
    build(AsrSetConfig(source=str(run), noise=str(noise), **config), out)
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def how_made(out: Path) -> dict[str, dict[str, Any]]:
    lines = (out / "about" / "making.jsonl").read_text(encoding="utf-8").splitlines()
    return {how["id"]: how for how in map(json.loads, lines)}


def test_the_default_set_is_that_of_the_paper() -> None:
    config = AsrSetConfig()
    assert config.sizes == {"zh": 8100, "en": 2800}
    assert set(config.scenarios) == {"meeting", "live_stream", "customer_service", "conversation"}
    assert config.scenarios == SCENARIOS


def test_settings_come_from_the_paper_or_a_file_and_are_changed_one_by_one(tmp_path: Path) -> None:
    changed = AsrSetConfig.load(None, ["sizes={en: 20}", "scenarios.meeting.snr_db=[0, 5]", "source=somewhere"])
    assert (changed.sizes, changed.source) == ({"en": 20}, "somewhere")
    assert changed.scenarios["meeting"] == SCENARIOS["meeting"].model_copy(update={"snr_db": (0.0, 5.0)})
    assert changed.scenarios["conversation"] == SCENARIOS["conversation"]
    (tmp_path / "set.yaml").write_text("sizes: {zh: 3}\nscenarios:\n  car: {snr_db: [0, 1]}\n")
    from_file = AsrSetConfig.load(tmp_path / "set.yaml", ["seed=4"])
    assert (from_file.sizes, list(from_file.scenarios), from_file.seed) == ({"zh": 3}, ["car"], 4)
    assert "missing.yaml" in failure(lambda: AsrSetConfig.load(tmp_path / "missing.yaml"), BadConfig)


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("sizes.fr", "sizes.fr=3"),
        ("scenarios.meeting", "scenarios.meeting.snr_db=[9, 1]"),
        ("unknown key 'scenarios.meeting.loudness'", "scenarios.meeting.loudness=3"),
        ("scenario 'a b'", "scenarios={a b: {snr_db: [0, 1]}}"),
        ("at least one", "sizes={}"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_in_one_line(said: str, wrong: str) -> None:
    assert said in failure(lambda: AsrSetConfig.load(None, [wrong]), BadConfig)


def test_every_clip_has_its_line_its_sound_and_its_scenario(tmp_path: Path, noise: Path) -> None:
    lines = made(run_folder(tmp_path, {"zh": 12, "en": 9}), noise, tmp_path / "set", sizes={"zh": 8, "en": 6})
    assert Counter(line["language"] for line in lines) == {"zh": 8, "en": 6}
    assert Counter((line["language"], line["scenario"]) for line in lines if line["language"] == "zh") == {
        ("zh", scenario): 2 for scenario in SCENARIOS
    }
    assert len({line["id"] for line in lines}) == len({line["text"] for line in lines}) == 14
    for line in lines:
        assert set(line) == {
            *("id", "audio", "text", "language", "scenario", "duration", "speaker", "snr", "source", "licence")
        }
        sound = load_audio(tmp_path / "set" / line["audio"])
        assert abs(sound.seconds - line["duration"]) < 0.01
        low, high = SCENARIOS[line["scenario"]].snr_db
        assert low <= line["snr"] <= high
        assert (line["source"], line["licence"], line["speaker"][0]) == ("tests", "CC0", "v")
    card = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    assert "14 clips" in card and "| zh | meeting | 2 |" in card and "tests: CC0, 14 clips" in card
    report = json.loads((tmp_path / "set" / "testset.json").read_text())
    assert report["clips"] == 14 and report["by"]["en"]["meeting"]["clips"] in (1, 2)


def test_the_same_seed_makes_the_same_bytes_and_another_seed_others(tmp_path: Path, noise: Path) -> None:
    run = run_folder(tmp_path, {"en": 9})
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        made(run, noise, tmp_path / name, sizes={"en": 5}, seed=seed)
    a, b, c = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in "abc"
    )
    assert a == b
    assert a[Path("manifest.jsonl")] != c[Path("manifest.jsonl")]


def test_the_noise_has_the_level_that_the_manifest_says(tmp_path: Path, noise: Path) -> None:
    run = run_folder(tmp_path, {"en": 4})
    for snr_db in (0.0, 20.0):
        scenario = {"street": ScenarioConfig(snr_db=(snr_db, snr_db), noises=("street",))}
        out = tmp_path / f"set{snr_db}"
        for line in made(run, noise, out, sizes={"en": 4}, scenarios=scenario):
            how = how_made(out)[line["id"]]
            clean = load_audio(run / "audio" / f"{how['row'].removesuffix('-asr')}.wav").samples
            noisy = load_audio(out / line["audio"]).samples
            assert clean is not None and noisy is not None and how["category"] == "street"
            scale = (clean @ noisy) / (clean @ clean)
            rest = noisy / scale - clean
            measured = 10 * np.log10(np.square(clean).mean() / np.square(rest).mean())
            assert abs(measured - snr_db) < 0.7


def test_a_second_speaker_is_another_one_and_is_heard_at_the_end(tmp_path: Path, noise: Path) -> None:
    run, out = run_folder(tmp_path, {"en": 6}), tmp_path / "set"
    crowded = {"two": ScenarioConfig(snr_db=(90.0, 90.0), overlap_share=1.0, overlap=(0.3, 0.3))}
    for line in made(run, noise, out, sizes={"en": 6}, scenarios=crowded):
        how = how_made(out)[line["id"]]
        assert how["overlap"]["speaker"] != line["speaker"] and how["overlap"]["share"] == 0.3
        clean = load_audio(run / "audio" / f"{how['row'].removesuffix('-asr')}.wav").samples
        mixed = load_audio(out / line["audio"]).samples
        assert clean is not None and mixed is not None
        begins = len(clean) - round(0.3 * len(clean))
        differs = np.abs(mixed - clean)
        assert differs[: begins - 1].max() < 1e-3 < 0.01 < differs[begins:].max()


def test_rooms_and_lines_are_noted_where_they_were_used(tmp_path: Path, noise: Path) -> None:
    out = tmp_path / "set"
    scenarios = {"call": ScenarioConfig(snr_db=(20.0, 20.0), room_share=1.0, line="telephone")}
    made(run_folder(tmp_path, {"en": 3}), noise, out, sizes={"en": 3}, scenarios=scenarios)
    assert {(how["room"], how["line"]) for how in how_made(out).values()} == {("rirs/rir1.wav", "telephone")}


def test_a_clip_recorded_in_its_scenario_stays_as_it_is(tmp_path: Path, noise: Path) -> None:
    run, out = run_folder(tmp_path, {"en": 3}, scenario="street_interview"), tmp_path / "set"
    for line in made(run, noise, out, sizes={"en": 3}):
        assert (line["scenario"], line["snr"]) == ("street_interview", None)
        row = how_made(out)[line["id"]]["row"].removesuffix("-asr")
        clean, kept = (load_audio(path).samples for path in (run / "audio" / f"{row}.wav", out / line["audio"]))
        assert clean is not None and kept is not None
        assert np.abs(clean - kept).max() < 1e-3


def test_a_source_that_is_too_small_is_said_and_makes_no_smaller_set(tmp_path: Path, noise: Path) -> None:
    run = run_folder(tmp_path, {"en": 3})
    said = failure(lambda: made(run, noise, tmp_path / "set", sizes={"en": 4}), BadRecord)
    assert "expected 4 en" in said and "given 3" in said
    assert not (tmp_path / "set").exists()


def test_rows_of_training_are_not_taken_unless_asked_for(tmp_path: Path, noise: Path) -> None:
    run = run_folder(tmp_path, {"en": 3}, split="train")
    assert "'test'" in failure(lambda: made(run, noise, tmp_path / "set", sizes={"en": 3}), BadRecord)
    assert len(made(run, noise, tmp_path / "set", sizes={"en": 3}, split="any")) == 3


def test_one_text_is_one_clip(tmp_path: Path, noise: Path) -> None:
    run = run_folder(tmp_path, {"en": 3})
    text = (run / "rows.jsonl").read_text().replace("number 1", "NUMBER 0!")
    (run / "rows.jsonl").write_text(text)
    assert "given 2" in failure(lambda: made(run, noise, tmp_path / "set", sizes={"en": 3}), BadRecord)


def test_rows_of_a_run_that_was_not_assembled_serve_as_well(tmp_path: Path, noise: Path) -> None:
    run = run_folder(tmp_path, {"en": 3})
    whole = made(run, noise, tmp_path / "a", sizes={"en": 3})
    plain = [
        {"id": f"en{n}-asr", "text": f"clip number {n} of many", "language": "en", "audio": f"audio/en{n}.wav"}
        | {"meta": {"split": "test", "voice_group": f"v{n}", "source": "tests", "licence": "CC0"}}
        for n in range(3)
    ]
    (run / "rows.jsonl").write_text("\n".join(map(json.dumps, plain)))
    assert made(run, noise, tmp_path / "b", sizes={"en": 3}) == whole
    (run / "rows.jsonl").write_text(json.dumps(plain[0] | {"audio": "audio/00000.tar/en0.flac"}))
    assert "files" in failure(lambda: made(run, noise, tmp_path / "c", sizes={"en": 1}), BadConfig)
    (run / "rows.jsonl").write_text('{"id": 1}\n')
    assert "rows.jsonl:1" in failure(lambda: made(run, noise, tmp_path / "c", sizes={"en": 1}), BadRecord)


def test_another_set_is_not_written_over_and_the_same_one_is(tmp_path: Path, noise: Path) -> None:
    run, out = run_folder(tmp_path, {"en": 6}), tmp_path / "set"
    first = made(run, noise, out, sizes={"en": 4})
    (out / "testset.json").unlink()  # as a kill leaves it
    (out / first[0]["audio"]).unlink()
    assert made(run, noise, out, sizes={"en": 4}) == first
    assert "another" in failure(lambda: made(run, noise, out, sizes={"en": 5}), BadConfig)
    assert "other files" in failure(lambda: made(run, noise, run, sizes={"en": 4}), BadConfig)


@pytest.mark.parametrize(
    ("error", "said", "scenario"),
    [
        (BadConfig, "no category 'sea'", ScenarioConfig(snr_db=(0.0, 1.0), noises=("sea",))),
        (BadRecord, "two speakers", ScenarioConfig(snr_db=(0.0, 1.0), overlap_share=1.0)),
    ],
)
def test_a_scenario_that_cannot_be_made_is_said(
    error: type[NexusError], said: str, scenario: ScenarioConfig, tmp_path: Path, noise: Path
) -> None:
    run = run_folder(tmp_path, {"en": 3}, voice_group="the only one")
    assert said in failure(
        lambda: made(run, noise, tmp_path / "set", sizes={"en": 3}, scenarios={"s": scenario}), error
    )


def test_the_manifest_is_one_that_the_examination_reads(tmp_path: Path, noise: Path) -> None:
    lines = made(run_folder(tmp_path, {"zh": 3, "en": 3}), noise, tmp_path / "set", sizes={"zh": 2, "en": 2})
    clips = read_manifest(tmp_path / "set", None)
    assert [(clip.id, clip.group, clip.language) for clip in clips] == [
        (line["id"], line["scenario"], line["language"]) for line in lines
    ]
