"""Steps on synthesised speech: trimming, level, noise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.synth.steps import at_level, trimmed, with_noise

RATE_HZ = 16_000


def tone(seconds: float = 1.0) -> np.ndarray:
    return (0.3 * np.sin(np.arange(int(seconds * RATE_HZ)) * 0.3)).astype(np.float32)


@given(st.integers(0, 9000), st.integers(0, 9000))
def test_silence_at_the_ends_goes_but_for_the_margin(before: int, after: int) -> None:
    wave = np.concatenate([np.zeros(before, np.float32), tone(), np.zeros(after, np.float32)])
    kept = trimmed(wave, RATE_HZ)
    margin = round(0.04 * RATE_HZ)
    expected = min(before, margin) + RATE_HZ + min(after, margin)
    assert abs(len(kept) - expected) <= 3  # the tone itself begins and ends near zero


def test_a_silent_wave_stays_as_it_is() -> None:
    silent = np.zeros(500, np.float32)
    assert np.array_equal(trimmed(silent, RATE_HZ), silent)


@pytest.mark.parametrize("noise_db", [0.0, 10.0, 30.0])
@pytest.mark.parametrize("seed", range(4))
def test_noise_stands_at_the_given_distance_below_the_wave(noise_db: float, seed: int) -> None:
    wave = tone(0.7)
    noise = with_noise(wave, noise_db, seed) - wave
    measured = 10 * np.log10(np.square(wave).mean() / np.square(noise).mean())
    assert measured == pytest.approx(noise_db, abs=0.1)


def test_the_seed_chooses_the_noise_and_nothing_else_does() -> None:
    wave = tone(0.5)
    assert np.array_equal(with_noise(wave, 10, 3), with_noise(wave, 10, 3))
    assert not np.array_equal(with_noise(wave, 10, 3), with_noise(wave, 10, 4))


def test_levels_are_decibels() -> None:
    assert np.abs(at_level(tone(), -6.0206)).max() == pytest.approx(0.15, rel=1e-3)
    assert at_level(tone(), 3.0).dtype == np.float32
