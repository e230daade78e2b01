"""Mel filter banks and Whisper's log-mel features. Knows no files and no models."""

import functools

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

WHISPER_RATE_HZ = 16_000
WHISPER_FFT = 400  # 25 ms window
WHISPER_HOP = 160  # 10 ms per mel frame


def _hz_to_mel(hz: np.ndarray) -> np.ndarray:
    """Slaney's scale: linear below 1 kHz, logarithmic above."""
    return np.where(hz < 1000.0, hz * 3 / 200, 15 + np.log(np.maximum(hz, 1e-9) / 1000.0) * 27 / np.log(6.4))


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000.0 * np.exp((mel - 15) * np.log(6.4) / 27))


@functools.cache
def mel_filters(
    num_mels: int, num_fft: int, rate_hz: int, low_hz: float = 0.0, high_hz: float | None = None
) -> Float[Tensor, "F bins"]:
    """Triangular Slaney-normalised filters for a one-sided spectrum of num_fft // 2 + 1 bins."""
    high_hz = rate_hz / 2 if high_hz is None else high_hz
    bins_hz = np.linspace(0, rate_hz / 2, num_fft // 2 + 1)
    mels = np.linspace(_hz_to_mel(np.array(low_hz)), _hz_to_mel(np.array(high_hz)), num_mels + 2)
    edges_hz = _mel_to_hz(mels)
    slopes = edges_hz[:, None] - bins_hz[None]
    widths = np.diff(edges_hz)
    rising, falling = -slopes[:-2] / widths[:-1, None], slopes[2:] / widths[1:, None]
    filters = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges_hz[2:] - edges_hz[:-2]))[:, None]
    return torch.from_numpy(filters.astype(np.float32))


def whisper_frames(num_samples: int) -> int:
    """Mel frames of `log_mel` for a waveform of num_samples at 16 kHz."""
    return num_samples // WHISPER_HOP


def log_mel(wave: Float[Tensor, "*N W"], num_mels: int = 128) -> Float[Tensor, "*N F L"]:
    """Whisper's features, not padded to 30 s: L = W // 160 (10 ms each). Needs W >= 201 for the reflection.

    Source: Whisper (Radford et al. 2022) section 2.2; the floor is 8 below the maximum of each item, so all
    items of a batch must be whole windows, never slices of one.
    """
    window = torch.hann_window(WHISPER_FFT, device=wave.device)
    spectrum = torch.stft(wave, WHISPER_FFT, WHISPER_HOP, window=window, return_complex=True)
    power = spectrum[..., :-1].real.square() + spectrum[..., :-1].imag.square()  # a quarter of the time of abs()
    filters = mel_filters(num_mels, WHISPER_FFT, WHISPER_RATE_HZ, 0.0, 8000.0).to(wave.device)
    logs = (filters @ power).clamp_min(1e-10).log10()
    floor = logs.amax(dim=(-2, -1), keepdim=True) - 8.0
    return (torch.maximum(logs, floor) + 4.0) / 4.0
