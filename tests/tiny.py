"""Shared doubles: the shipped tiny recipe with everything narrow, a model, a tokenizer, sounds and pictures.

They are the real classes with small numbers: a test that runs on them runs the code a user runs.
"""

import functools
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from nexus.data.chat import SYSTEM, TASKS, ChatTokenizer
from nexus.model.omni import OmniModel
from nexus.recipe import Recipe, TokenizerConfig
from nexus.types import LETTERS, Audio, Image, Video

torch.set_num_threads(1)  # at these widths a second thread only waits for the first

RATE_HZ = 16_000
# Whole sections, so that no test depends on the sizes that are tuned in the shipped recipe.
NARROW = (
    "model.language={vocab_size: 400, width: 32, layers: 2, heads: 2, kv_heads: 1, ffn_width: 64,"
    " mrope_section: [2, 3, 3], rope_theta: 10000.0, max_positions: 1024}",
    "model.vision={width: 32, layers: 2, heads: 2, ffn_width: 64, window: 56, full_attention_layers: [1],"
    " min_pixels: 7056, max_pixels: 50176, max_frames: 32}",
    "model.hearing={encoder: {num_mels: 80, width: 32, layers: 2, heads: 2, ffn_width: 64, conv_strides: [2, 2],"
    " positions: rope, window_seconds: 3.0}, adapter: {stack: 5, width: 48}, max_seconds: 20.0}",
    "model.voice={width: 32, layers: 2, heads: 2, ffn_width: 64, books: 8, book_size: 16, max_seconds: 6.0,"
    " spelling: true}",
    "model.codec={num_fft: 1024, hop: 256, num_mels: 80, stack: 3, books: 8, book_size: 16, pca_dims: 8,"
    " vocoder_width: 16, vocoder_blocks: 1}",
)
WORDS = "what is two plus three five seven red circle blue square where the left right how many please say".split()


@functools.cache
def tiny_recipe(*overrides: str) -> Recipe:
    """nexus-tiny with the organs of `NARROW`, then with `overrides` (`a.b=value`)."""
    return Recipe.load("nexus-tiny", [*NARROW, *overrides])


def tiny_model(seed: int = 0, *overrides: str) -> OmniModel:
    """A fresh model of `tiny_recipe(*overrides)` in evaluation mode.

    Its vocoder speaks loudly enough for two sounds to be told apart.
    """
    torch.manual_seed(seed)
    model = OmniModel(tiny_recipe(*overrides).model)
    if model.codec is not None:
        nn.init.normal_(model.codec.vocoder.head.weight, std=0.1)
    return model.eval()


@functools.cache
def tiny_tokenizer(uncased: bool = True, texts: Iterable[str] = ()) -> ChatTokenizer:
    """A tokenizer of at most 400 entries that knows the templates and a few words."""
    known = [" ".join(WORDS), SYSTEM, "system", "user", "assistant", *(task.instruction for task in TASKS.values())]
    return ChatTokenizer.train(TokenizerConfig(uncased=uncased), [*known * 3, *texts], 400)


def spelled(counts: Tensor) -> Tensor:
    """Letters [..., LETTERS] of tokens with that many of them each, as a tokenizer would give them."""
    places = torch.arange(LETTERS)
    return (places % 26 + 97) * (places < counts[..., None])


def tiny_sound(seconds: float = 1.0, seed: int = 0) -> Audio:
    """A gliding tone with a little noise, f32 at 16 kHz, different for every seed."""
    rng = np.random.default_rng(seed)
    at = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    wave = 0.3 * np.sin(2 * np.pi * (rng.uniform(150, 900) * at + rng.uniform(-200, 800) * at**2))
    return Audio(samples=(wave + 0.02 * rng.standard_normal(len(at))).astype(np.float32), rate_hz=RATE_HZ)


def tiny_picture(height: int = 84, width: int = 84, seed: int = 0) -> Image:
    """Coarse coloured blocks, u8 RGB, different for every seed."""
    return Image(pixels=_blocks(height, width, np.random.default_rng(seed)))


def tiny_film(frames: int = 4, height: int = 84, width: int = 84, fps: float = 2.0, seed: int = 0) -> Video:
    """Coarse coloured blocks that change with every frame."""
    rng = np.random.default_rng(seed)
    return Video(frames=np.stack([_blocks(height, width, rng) for _ in range(frames)]), fps=fps)


def _blocks(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    coarse = rng.integers(0, 256, (height // 14 + 1, width // 14 + 1, 3), dtype=np.uint8)
    return coarse.repeat(14, 0).repeat(14, 1)[:height, :width]
