"""A small lab of the demo for tests of its rows and papers: the real plan, tokenizer and model with small numbers.

Only the recordings are doubles: speaking them takes seconds and is tested elsewhere. Each is a tone that tells which
recording it is.
"""

import functools

import numpy as np
import torch
from tiny import tiny_recipe

from nexus.data.chat import ChatTokenizer
from nexus.demo.corpus import Plan, plan
from nexus.demo.lab import Lab
from nexus.demo.mandarin import pairs
from nexus.demo.rows import film_words, tokenizer_texts
from nexus.demo.spoken import RATE_HZ, Waves
from nexus.demo.world import World
from nexus.model.omni import OmniModel
from nexus.recipe import Recipe, WorldConfig
from nexus.types import Audio

# As small as can be: every question about a picture and every follow-up has one recording, every manner one caption.
SMALL_WORLD = (
    "world={heard: 60, spoken: 30, mandarin: 20, english: 20, captioned: 36, felt: 20, looked: 234, followed: 317,"
    " pictures: 30, films: 10, test_heard: 20, test_questions: 20, test_spoken: 20, test_mandarin: 8, test_english: 8,"
    " test_captioned: 8, test_felt: 10, test_looked: 6, test_followed: 8, test_pictures: 12, test_films: 10}"
)


# What may be left out is.
PLAIN_WORLD = (
    "world={heard: 60, spoken: 30, pictures: 30, test_heard: 20, test_questions: 20, test_spoken: 20,"
    " test_pictures: 12}"
)


def small_world() -> WorldConfig:
    """`SMALL_WORLD` with seed 0."""
    world = Recipe.load("nexus-tiny", [SMALL_WORLD]).world
    assert world is not None
    return world


class Marked(Waves):
    """A set of tones whose first two samples are the numbers of the set and of the recording in it."""

    def __init__(self, number: int, texts: list[str]) -> None:
        self.number = number
        self.lengths = np.array([RATE_HZ // 2 + 400 * len(text) for text in texts])

    def __getitem__(self, index: int) -> Audio:
        at = np.arange(self.lengths[index]) / RATE_HZ
        pitch_hz = 110 + 3 * (index % 50)
        wave = np.sum([0.1 * np.sin(2 * np.pi * pitch_hz * overtone * at) for overtone in range(1, 7)], 0)
        wave[:2] = self.number / 1024, index / 1024  # exact in f32
        return Audio(samples=wave.astype(np.float32), rate_hz=RATE_HZ)


def recording(plans: Plan, sound: Audio) -> tuple[str, int]:
    """Which set and place a marked sound is of."""
    assert sound.samples is not None
    number, place = (sound.samples[:2] * 1024).astype(int).tolist()
    return list(plans.sets)[number], place


@functools.cache
def small_lab(seed: int = 0, numbers: str = SMALL_WORLD) -> Lab:
    """The lab of `SMALL_WORLD`, or another; its tokenizer is trained as the demo's is, from fewer texts."""
    recipe = tiny_recipe(numbers, f"world.seed={seed}", "model.language.max_positions=2048")
    assert recipe.world is not None
    world = World(seed)
    plans = plan(world, recipe.world)
    waves = {name: Marked(number, [u.text for u in said]) for number, (name, said) in enumerate(plans.sets.items())}
    texts = [*world.all_sentences_for_lm(2_000), *film_words()]
    chinese = [pair.zh for pair in pairs("train", 500, seed)]
    tokenizer = ChatTokenizer.train(recipe.tokenizer, tokenizer_texts(texts, chinese), 400)
    torch.manual_seed(seed)
    return Lab(recipe, world, plans, dict(waves), tokenizer, OmniModel(recipe.model).eval())
