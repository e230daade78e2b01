"""Real digits as training rows: every recording as it is and in many ways, mixed with what the model knows."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from lab import PLAIN_WORLD
from suites import digits, sound
from tiny import tiny_model, tiny_recipe, tiny_tokenizer

from nexus.data.chat import TASKS, render
from nexus.data.folders import recordings
from nexus.data.mixture import Mixture
from nexus.data.stream import Budget
from nexus.demo.digits import VARIATIONS, VariedDigits, digit_sources
from nexus.errors import BadConfig, BadMedia
from nexus.model.folder import save_model
from nexus.model.omni import OmniModel
from nexus.progress import Progress
from nexus.recipe import Recipe
from nexus.synth.noise import surroundings
from nexus.train.stage import trainable_names
from nexus.training import DataConfig
from nexus.types import Audio, Sample, Text

MIXTURES = ("stages.align.mixture={asr: 2, chat: 1}", "stages.sft.mixture={chat: 5, asr: 3, picture: 2, text: 2}")
SPECS = tiny_recipe().model


def varied(folder: Path, seed: int = 0, noise: Path | None = None) -> VariedDigits:
    around = None if noise is None else surroundings(noise)
    return VariedDigits(recordings(folder), tiny_tokenizer(), SPECS, seed, around)


def wave(sample: Sample) -> np.ndarray:
    part = sample.turns[0].parts[0]
    assert isinstance(part, Audio) and part.samples is not None
    return part.samples


def answer(sample: Sample) -> str:
    (part,) = sample.turns[1].parts
    assert isinstance(part, Text)
    return part.text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Digits 0, 1 and 2 of two speakers, two recordings each."""
    return digits(tmp_path / "digits")


def test_the_first_rows_are_the_recordings_themselves(folder: Path) -> None:
    rows, members = varied(folder), recordings(folder).members
    for row, member in enumerate(members):
        sample = rows[row]
        np.testing.assert_array_equal(wave(sample), member.sound().samples)
        assert (sample.id, answer(sample)) == (f"{member.id}/0", member.word)
        assert sample.turns[0].parts[1] == Text(TASKS["asr"].instruction)


def test_variations_of_a_recording_differ_and_each_stays_the_same(folder: Path) -> None:
    rows, again = varied(folder), varied(folder)
    same_recording = range(3, len(rows), 12)
    waves = [wave(rows[row]) for row in same_recording]
    assert len({each.tobytes() for each in waves}) == VARIATIONS
    assert [each.tobytes() for each in waves] == [wave(again[row]).tobytes() for row in same_recording]
    other = [wave(varied(folder, seed=1)[row]).tobytes() for row in same_recording]
    assert sum(a.tobytes() == b for a, b in zip(waves, other, strict=True)) == 1  # the recording itself
    assert all(np.abs(each).max() <= 1 and each.dtype == np.float32 for each in waves)


def test_what_is_read_out_is_one_speakers_and_answered_word_for_word(folder: Path) -> None:
    rows = varied(folder)
    words = [answer(rows[row]).split() for row in range(len(rows))]
    assert {len(said) for said in words} == {1, 2, 3, 4}
    assert sum(len(said) == 1 for said in words) > len(rows) / 3
    first = [member.word for member in recordings(folder).members]
    assert [said[0] for said in words] == first * VARIATIONS


def test_every_recording_is_heard_in_its_row(tmp_path: Path) -> None:
    """Without noise in between, as many stretches of sound as words."""
    for index in range(4):
        sound(tmp_path / f"{index}_ann_0.wav", 0.3, index)
    rows = varied(tmp_path)
    for row in range(4, 60):
        seconds = len(wave(rows[row])) / 16_000
        words = len(answer(rows[row]).split())
        assert words * (0.3 * 3 / 4) / 1.5 - 0.01 < seconds < words * 0.3 / 0.75 + (words + 1) * 0.25 + 0.01


def test_some_variations_are_cut_where_the_word_ends_and_others_keep_what_surrounds_it(tmp_path: Path) -> None:
    """A word of 0.3 s amid half a second of silence: alone, it is never bitten by more than a quarter."""
    sound(tmp_path / "0_ann_0.wav", 0.3, 0)
    word = recordings(tmp_path).members[0].sound().samples
    assert word is not None
    amid = np.concatenate([np.zeros(4000, np.float32), word, np.zeros(4000, np.float32)])
    sf.write(tmp_path / "0_ann_0.wav", amid, 16_000)
    rows = varied(tmp_path)
    alone = [rows[row] for row in range(1, len(rows)) if len(answer(rows[row]).split()) == 1]
    seconds = [len(wave(sample)) / 16_000 for sample in alone]
    whole = [each for each in seconds if each > 0.8 / 1.5 - 0.01]
    assert 0 < len(whole) < len(seconds)
    assert min(seconds) > 0.3 * 3 / 4 / 1.5 - 0.01


def test_lengths_are_those_of_the_rendered_rows(folder: Path) -> None:
    rows = varied(folder)
    assert len(rows.lengths) == len(rows) == 12 * VARIATIONS
    for row in range(0, len(rows), 7):
        sample = rows[row]
        assert rows.lengths.tokens[row] == len(render(sample, tiny_tokenizer(), SPECS).tokens)
        assert rows.lengths.audio_seconds[row] == pytest.approx(len(wave(sample)) / 16_000, abs=0.011)


def test_real_noise_and_rooms_are_heard_and_belong_to_the_identity(folder: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("hum1.wav", "hum2.wav", "rir1.wav")):
        sound(tmp_path / "noise" / name, 0.4, number)
    plain, noisy = varied(folder), varied(folder, noise=tmp_path / "noise")
    assert plain.fingerprint != noisy.fingerprint == varied(folder, noise=tmp_path / "noise").fingerprint
    np.testing.assert_array_equal(wave(plain[0]), wave(noisy[0]))
    differ = [not np.array_equal(wave(plain[row]), wave(noisy[row])) for row in range(12, 60)]
    assert sum(differ) > len(differ) / 2
    assert all(len(wave(plain[row])) == len(wave(noisy[row])) for row in range(12, 60))


def test_a_recording_that_cannot_be_decoded_stops_before_training(folder: Path) -> None:
    (folder / "9_ann_0.wav").write_bytes(b"RIFF, or so")
    with pytest.raises(BadMedia, match=r"9_ann_0\.wav"):
        varied(folder)


def test_rows_travel_to_other_processes(folder: Path) -> None:
    rows = varied(folder)
    sent = pickle.loads(pickle.dumps(rows))
    np.testing.assert_array_equal(wave(sent[77]), wave(rows[77]))


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    init = tmp_path_factory.mktemp("demo") / "model"
    save_model(init, tiny_model(0), {"recipe": tiny_recipe(PLAIN_WORLD, *MIXTURES).model_dump(mode="json")})
    tiny_tokenizer().save(init / "tokenizer.json")
    return init


def test_a_stage_sees_digits_and_what_the_model_knew_in_the_shares_asked_for(
    folder: Path, demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = DataConfig(root=str(folder), holdout=("ann",), replay=0.5)
    sources = digit_sources(data, "sft", demo_model, tmp_path / "out", None, 1, Progress())
    mixture = Mixture(sources, Budget(1500, 30.0), seed=0)
    rows = [row for step in range(mixture.batches_per_epoch) for row in mixture.at(step)]
    replayed = sum(row.id.startswith("replay-") for row in rows)
    assert replayed / len(rows) == pytest.approx(0.5, abs=0.02)
    assert {row.task for row in rows} == {"asr", "chat", "picture", "text"}
    assert {row.meta.get("speaker") for row in rows} == {"bo_b", None}
    assert "6 recordings (bo_b 6); held out: ann 6" in capsys.readouterr().err


def test_without_replay_nothing_is_spoken_and_any_model_will_do(folder: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model", tiny_model(0), {})
    tiny_tokenizer().save(tmp_path / "model" / "tokenizer.json")
    data = DataConfig(root=str(folder))
    (source,) = digit_sources(data, "sft", tmp_path / "model", tmp_path / "out", None, 1, Progress())
    assert len(source) == 12 * VARIATIONS
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadConfig, match="its config says no recipe"):
        with_replay = data.model_copy(update={"replay": 0.5})
        digit_sources(with_replay, "sft", tmp_path / "model", tmp_path / "out", None, 1, Progress())


def test_the_recipe_trains_what_the_two_stages_of_hearing_train() -> None:
    recipe = Recipe.load("digits", ["data.root=sounds", "data.holdout=[ann]"])
    with torch.device("meta"):
        model = OmniModel(recipe.model)
    trained = {stage.name: set(trainable_names(model, stage.trainable)) for stage in recipe.stages}
    assert list(trained) == ["align", "sft"]
    assert {name.split(".")[0] for name in trained["align"]} == {"hearing"}
    assert not any(name.startswith(("hearing.encoder", "vision", "voice", "codec")) for name in trained["sft"])
    assert sum(stage.seconds for stage in recipe.stages) <= 600
    assert 0 < recipe.data.replay < 1


def test_real_recordings_are_read_whole() -> None:
    root = Path(os.environ.get("NEXUS_DATA", "/nowhere")) / "fsdd"
    if not root.is_dir():
        pytest.skip("set NEXUS_DATA to a folder that holds fsdd, the Free Spoken Digit Dataset")
    whole = recordings(root)
    assert whole.speakers == {"george": 500, "jackson": 500, "lucas": 500, "nicolas": 500}
    left = recordings(root, ["lucas"])
    assert len(left.members) == 1500
    assert all(0.1 < member.sound().seconds < 2.5 for member in left.members[:40])
