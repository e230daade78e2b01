"""Speech in rooms, in noise, faster, over lines, under a second speaker: what was drawn is what is heard."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from files import tone
from hypothesis import given
from hypothesis import strategies as st

from nexus.errors import BadConfig, BadMedia, BadRecord
from nexus.recipe import validate
from nexus.synth.augment import AugmentConfig, NoiseConfig, active_rms, at_speed, build, over, overlapped
from nexus.synth.records import Record, Rejected
from nexus.types import Audio

RATE = 16_000
LINES = ("telephone", "opus", "mp3")


def speech(seconds: float = 1.5, rate_hz: int = RATE, seed: int = 0) -> np.ndarray:
    """Syllables: noise of the band of speech, loud and quiet in turns."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    carrier = sum(np.sin(2 * np.pi * hz * time + rng.uniform(0, 6)) for hz in (220, 700, 1200, 1900, 2600))
    return (0.08 * carrier * (0.55 - 0.45 * np.cos(2 * np.pi * 4 * time))).astype(np.float32)


def record(index: int = 0, wave: np.ndarray | None = None, rate_hz: int = RATE) -> Record:
    sound = Audio(samples=speech(0.4, rate_hz) if wave is None else wave, rate_hz=rate_hz)
    return Record(f"r{index}", "hello", "en", sound=sound, meta={"row": f"r{index}", "attempt": 0})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three noises in two categories and two rooms."""
    rng = np.random.default_rng(1)
    for name in ("street1", "street2", "babble1"):
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * rng.standard_normal(RATE), RATE)
    for name, place in (("rir1", 40), ("rir2", 90)):
        impulse = rng.standard_normal(3000) * np.exp(-np.arange(3000) / 400)
        impulse[place] = 20
        soundfile.write(tmp_path / f"{name}.wav", impulse / 25, RATE)
    return tmp_path


def everything(folder: Path, **changes: object) -> AugmentConfig:
    noises = {"street": NoiseConfig(snr_db=(5.0, 10.0)), "babble": NoiseConfig(snr_db=(15.0, 20.0), weight=3.0)}
    settings = {"folder": str(folder), "noises": noises, "noise_share": 0.5, "room_share": 0.5, "speed_share": 0.5}
    return AugmentConfig(**{**settings, "lines": {"telephone": 0.25, "mp3": 0.25}, **changes})


def test_the_same_record_gets_the_same_surroundings_in_any_order_and_process(folder: Path) -> None:
    step = build(everything(folder))
    step.setup()
    records = [record(index) for index in range(12)]
    there = [made.sound.samples for made in step(records)]
    other = pickle.loads(pickle.dumps(build(everything(folder))))
    other.setup()
    back = [made.sound.samples for made in other(records[::-1])][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(there, back, strict=True))
    assert any(not np.array_equal(a, there[0]) for a in there[1:])


def test_shares_are_kept_and_what_was_drawn_is_written_down(folder: Path) -> None:
    step = build(everything(folder, lines={}))
    drawn = [step([record(index)])[0].meta["augment"] for index in range(300)]
    for key in ("room", "noise"):
        assert 110 < sum(each[key] is not None for each in drawn) < 190
    assert 110 < sum(each["speed"] != 1.0 for each in drawn) < 190
    noises = [each["noise"] for each in drawn if each["noise"]]
    categories = Counter(noise["category"] for noise in noises)
    assert 1.8 < categories["babble"] / categories["street"] < 5  # three to one
    for noise in noises:
        low, high = {"street": (5, 10), "babble": (15, 20)}[noise["category"]]
        assert low <= noise["snr_db"] <= high and noise["file"].startswith(noise["category"])
    assert {each["room"] for each in drawn} == {None, "rir1.wav", "rir2.wav"}
    assert all(0.9 <= each["speed"] <= 1.1 for each in drawn)


def test_noise_is_as_loud_as_the_meta_says_at_any_rate(folder: Path) -> None:
    step = build(everything(folder, noise_share=1.0, room_share=0.0, speed_share=0.0, lines={}))
    for rate_hz in (16_000, 22_050):
        clean = speech(rate_hz=rate_hz)
        (made,) = step([record(7, clean, rate_hz)])
        assert len(made.sound.samples) == len(clean) and made.sound.rate_hz == rate_hz
        noise = made.sound.samples - clean
        snr_db = 10 * np.log10(np.square(clean).mean() / np.square(noise).mean())
        assert snr_db == pytest.approx(made.meta["augment"]["noise"]["snr_db"], abs=0.3)


def test_a_share_that_moves_leaves_the_other_draws_alone(folder: Path) -> None:
    before, after = build(everything(folder, room_share=0.0)), build(everything(folder, room_share=1.0))
    for index in range(20):
        (a,), (b,) = before([record(index)]), after([record(index)])
        one, two = a.meta["augment"], b.meta["augment"]
        assert (one["noise"], one["speed"], one["line"]) == (two["noise"], two["speed"], two["line"])


def test_nothing_passes_full_scale_and_nothing_is_clipped(folder: Path) -> None:
    loud = (speech() / np.abs(speech()).max()).astype(np.float32)
    step = build(everything(folder, noise_share=1.0, lines={}))
    for made in step([record(index, loud) for index in range(10)]):
        peaks = np.abs(made.sound.samples)
        assert peaks.max() <= 1.0 and (peaks > 0.999).sum() < 3


def test_silent_and_unreadable_records_are_rejected_and_others_go_on(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.wav").write_bytes(b"RIFF no sound at all")
    broken = record(1).with_(sound=Audio(path=tmp_path / "broken.wav"))
    (tmp_path / "broken.wav").rename(tmp_path / "broken.bin")
    broken = broken.with_(sound=Audio(path=tmp_path / "broken.bin"))
    silent, unreadable, fine = build(everything(folder))([record(0, np.zeros(RATE, np.float32)), broken, record(2)])
    assert isinstance(silent, Rejected) and silent.reason == "silent"
    assert isinstance(unreadable, Rejected) and unreadable.reason == "unreadable" and "broken.bin" in str(unreadable)
    assert isinstance(fine, Record)


def test_the_fingerprint_follows_settings_and_content_but_not_the_place(folder: Path, tmp_path_factory) -> None:
    moved = tmp_path_factory.mktemp("elsewhere")
    for path in folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    first = build(everything(folder)).fingerprint
    assert build(everything(moved)).fingerprint == first
    assert build(everything(folder, seed=1)).fingerprint != first
    soundfile.write(moved / "street1.wav", speech(), RATE)
    assert build(everything(moved)).fingerprint != first


def test_folders_that_do_not_fit_the_recipe_are_refused(folder: Path) -> None:
    with pytest.raises(BadConfig, match="'rain'; has babble, street"):
        build(everything(folder, noises={"rain": NoiseConfig(snr_db=(0.0, 1.0))}))
    with pytest.raises(BadRecord, match="nowhere"):
        build(everything(folder / "nowhere"))


def test_rooms_that_are_not_there_and_silent_noise_are_refused(folder: Path) -> None:
    for path in folder.glob("rir*"):
        path.unlink()
    with pytest.raises(BadConfig, match="room_share"):
        build(everything(folder))
    soundfile.write(folder / "street2.wav", np.zeros(RATE), RATE)
    with pytest.raises(BadMedia, match=r"street2\.wav"):
        build(everything(folder, room_share=0.0))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"noise_share": 0.5}, "noise_share"),
        ({"room_share": 0.5}, "folder"),
        ({"lines": {"opus": 0.7, "mp3": 0.7}}, "1.4"),
        ({"lines": {"radio": 0.7}}, "radio"),
        ({"speed": [1.1, 0.9]}, "slowest"),
        ({"folder": "a", "noise_share": 0.1, "noises": {"street": {"snr_db": [9, 3]}}}, "lowest"),
    ],
)
def test_sections_that_contradict_themselves_are_refused(section: dict, words: str) -> None:
    with pytest.raises(BadConfig, match=words):
        validate(AugmentConfig, section, "here.yaml")


def test_held_out_clips_never_sound_in_training(folder: Path) -> None:
    heard = {}
    for clips in ("train", "held_out"):
        noises = {"street": NoiseConfig(snr_db=(5.0, 10.0))}
        step = build(everything(folder, clips=clips, noises=noises, noise_share=1.0, room_share=0.0))
        heard[clips] = {step([record(index)])[0].meta["augment"]["noise"]["file"] for index in range(20)}
    assert heard["train"] and heard["held_out"] and not heard["train"] & heard["held_out"]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("rate_hz", [16_000, 22_050])
def test_a_line_keeps_length_and_place_and_loses_sound(line: str, rate_hz: int) -> None:
    clean = speech(rate_hz=rate_hz)
    made = over(clean, rate_hz, line)
    assert made.shape == clean.shape and made.dtype == np.float32 and np.isfinite(made).all()
    lags = np.arange(-200, 201)
    likeness = [float(np.dot(np.roll(made, -lag), clean)) for lag in lags]
    assert abs(lags[int(np.argmax(likeness))]) <= 2
    assert 0.5 < float(np.dot(made, clean) / np.dot(clean, clean)) < 1.5
    assert np.square(made - clean).mean() > 1e-6 * np.square(clean).mean()


def test_a_telephone_takes_away_what_it_cannot_carry() -> None:
    low, middle, high = (over(tone(1.0, RATE, hz), RATE, "telephone").std() for hz in (80.0, 1000.0, 5000.0))
    assert low < 0.05 * middle and high < 0.05 * middle
    assert middle == pytest.approx(tone(1.0, RATE, 1000.0).std(), rel=0.1)


@given(st.floats(0.5, 2.0), st.integers(2000, 20_000))
def test_speed_changes_the_length_by_its_factor(speed: float, length: int) -> None:
    assert abs(len(at_speed(tone(length / RATE, RATE), RATE, speed)) - length / speed) <= 2


@given(st.floats(-20, 20), st.floats(0.05, 1.0), st.integers(0, 3))
def test_a_second_speaker_is_as_loud_and_as_long_as_asked(gain_db: float, share: float, seed: int) -> None:
    one, two = speech(1.0), speech(2.0, seed=seed + 1)
    added = overlapped(one, two, gain_db, share) - one
    start = len(one) - round(share * len(one))
    assert not added[:start].any()
    expected = two[: len(one) - start] * (active_rms(one) / active_rms(two) * 10 ** (gain_db / 20))
    assert np.allclose(added[start:], expected, atol=1e-4 * max(1.0, float(np.abs(expected).max())))


def test_a_short_second_speaker_just_ends_and_a_silent_one_is_refused() -> None:
    one, two = speech(1.0), speech(0.25, seed=1)
    added = overlapped(one, two, 0.0, 0.5) - one
    assert added[8000:12_000].any() and not added[12_000:].any()
    for pair in ((one, np.zeros(100, np.float32)), (np.zeros(100, np.float32), one)):
        with pytest.raises(BadMedia, match="silent"):
            overlapped(*pair, 0.0, 0.5)


def test_pauses_do_not_make_a_speaker_softer() -> None:
    wave = speech(2.0)
    pauses = np.concatenate([wave, np.zeros(5 * RATE, np.float32)])
    assert active_rms(pauses) == pytest.approx(active_rms(wave), rel=1e-3)
    assert active_rms(np.zeros(0, np.float32)) == active_rms(np.zeros(5, np.float32)) == 0.0


def test_real_noise_and_rooms_are_mixed_in(real_data: Path) -> None:
    config = AugmentConfig(
        folder=str(real_data / "noise"),
        noises={"noise": NoiseConfig(snr_db=(0.0, 20.0))},
        noise_share=1.0,
        room_share=1.0,
    )
    made = build(config)([record(index) for index in range(20)])
    assert len({each.meta["augment"]["noise"]["file"] for each in made}) > 2
    assert len({each.meta["augment"]["room"] for each in made}) > 2
    assert all(np.isfinite(each.sound.samples).all() for each in made)
