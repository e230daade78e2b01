"""What is done to synthesised speech before it is data: pure functions on waveforms f32 [W]."""

import functools

import numpy as np


def trimmed(wave: np.ndarray, rate_hz: int, margin_seconds: float = 0.04, threshold: float = 0.01) -> np.ndarray:
    """The wave without silence at its ends, but for a margin. Silence is below `threshold` of the peak; a silent wave
    stays as it is."""
    loud = np.flatnonzero(np.abs(wave) > threshold * np.abs(wave).max())
    if not len(loud):
        return wave
    margin = round(margin_seconds * rate_hz)
    return wave[max(0, loud[0] - margin) : loud[-1] + margin]


def at_level(wave: np.ndarray, gain_db: float) -> np.ndarray:
    """The wave louder (positive) or softer by gain_db."""
    return wave * np.float32(10 ** (gain_db / 20))


def with_noise(wave: np.ndarray, noise_db: float, seed: int) -> np.ndarray:
    """The wave in stationary noise between white and brown, noise_db below its power; `seed` chooses the noise."""
    rng, bank = np.random.default_rng(seed), _noise_bank()
    clip, start = rng.integers(len(bank)), rng.integers(bank.shape[1])
    noise = bank[clip].take(np.arange(start, start + len(wave)), mode="wrap")
    power = np.square(wave).mean() / np.square(noise).mean()
    return wave + noise * np.float32(np.sqrt(power / 10 ** (noise_db / 10)))


@functools.cache
def _noise_bank() -> np.ndarray:
    """Eight noises, f32 [8, 2 ** 17], made once per process from a fixed seed: a transform per clip would cost more
    than the speech itself."""
    rng = np.random.default_rng(8)
    spectra = np.fft.rfft(rng.standard_normal((8, 1 << 17)))
    slopes = np.linspace(0.0, 1.0, 8)[:, None]
    return np.fft.irfft(spectra / np.arange(1, spectra.shape[1] + 1) ** slopes).astype(np.float32)
