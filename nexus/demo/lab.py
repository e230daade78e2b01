"""What all training stages of the demo share: recipe, world, waveforms, tokenizer, the model under training, and the
draws of a step, which follow from the seed, the stage's name and the step number alone."""

import functools
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nexus.data.chat import ChatTokenizer, Rendered, render
from nexus.data.collate import collate
from nexus.demo.corpus import Plan
from nexus.demo.films import Film, films
from nexus.demo.mandarin import Pair, pairs
from nexus.demo.pictures import Scene
from nexus.demo.pictures import render as draw
from nexus.demo.spoken import Waves
from nexus.demo.talks import Dialogue, dialogues
from nexus.demo.world import World
from nexus.model.omni import OmniModel
from nexus.recipe import Recipe, WorldConfig
from nexus.types import Batch, Turn

LEARNED_DIALOGUES = 12_000
LEARNED_PAIRS = 12_000  # all sentences but most comparisons, of which there are too many


@dataclass
class Lab:
    """Everything the stages share."""

    recipe: Recipe
    world: World
    plan: Plan
    waves: dict[str, Waves]
    tokenizer: ChatTokenizer
    model: OmniModel

    @property
    def config(self) -> WorldConfig:
        """The numbers of the world."""
        assert self.recipe.world is not None
        return self.recipe.world

    @functools.cached_property
    def scenes(self) -> list[Scene]:
        """Training scenes."""
        return self.world.scenes("train", self.config.pictures)

    @functools.cached_property
    def pictures(self) -> np.ndarray:
        """Their pictures, u8 [N, 84, 84, 3]."""
        return np.stack([draw(scene) for scene in self.scenes])

    @functools.cached_property
    def films(self) -> list[Film]:
        """Training films."""
        return films("train", self.config.films, self.world.seed)

    @functools.cached_property
    def sentences(self) -> list[str]:
        """Training sentences to copy."""
        return self.world.sentences("train", 30_000, stream=1)

    @functools.cached_property
    def talks(self) -> list[tuple[str, str]]:
        """Typed training questions with their answers."""
        return self.world.plain_texts("train", 60_000, stream=1)

    @functools.cached_property
    def pairs(self) -> list[Pair]:
        """Sentences in both languages."""
        return pairs("train", LEARNED_PAIRS, self.world.seed, stream=1)

    @functools.cached_property
    def dialogues(self) -> list[Dialogue]:
        """Training conversations of several turns."""
        return dialogues("train", LEARNED_DIALOGUES, self.world, stream=1)

    @functools.cached_property
    def asked_aloud(self) -> list[Dialogue]:
        """Those of the conversations whose last question has a recording."""
        return [dialogue for dialogue in self.dialogues if dialogue.question in self.recordings["followed"]]

    @functools.cached_property
    def spelling(self) -> dict[str, list[str]]:
        """Set -> what an ear that spells should write down."""
        return {name: self.plan.spelling(name) for name in self.plan.sets}

    @functools.cached_property
    def recordings(self) -> dict[str, dict[str, list[int]]]:
        """Set -> text -> its places that have sound, of the sets whose few texts are drawn by their words."""
        found: dict[str, dict[str, list[int]]] = {}
        for name in ("looked", "followed"):
            places = found.setdefault(name, defaultdict(list))
            for place in self.waves[name].places if name in self.waves else ():
                places[self.plan.sets[name][place].text].append(place)
        return found

    def seed(self, stage: str) -> int:
        """A number for a stage, from the world's seed and its name."""
        return random.Random(f"{self.world.seed} {stage}").getrandbits(31)

    def rng(self, stage: str, step: int) -> random.Random:
        """The draw of one step."""
        return random.Random(f"{self.world.seed} {stage} {step}")

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """Turns as tokens and labels."""
        return render(turns, self.tokenizer, self.recipe.model)

    def batch(self, rows: Sequence[Rendered]) -> Batch:
        """Rows side by side."""
        return collate(rows, self.tokenizer.pad, self.recipe.model)
