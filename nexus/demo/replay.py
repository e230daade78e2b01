"""What a demo model was trained on, made again in a smaller number from its folder alone, so that a model that learns
something new goes on with what it knows.

The folder's config carries the recipe with the numbers of the world; the rest follows from the seed. Noise is made,
also where the demo had real noise: its folder may not be there. Voices are those of training, and test sentences stay
apart: the world splits by hash, never by number.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from nexus.data.chat import ChatTokenizer, Rendered, task_turns
from nexus.data.headers import lengths_of, row_length
from nexus.data.stream import Lengths
from nexus.demo.corpus import plan
from nexus.demo.lab import Lab
from nexus.demo.papers import papers
from nexus.demo.rows import HEARD_TASKS, SILENT, SILENT_TASKS, Heard, check_mixture, heard_rows
from nexus.demo.spoken import speak
from nexus.demo.talks import follow_up_texts, picture_question_texts
from nexus.demo.world import World
from nexus.errors import BadConfig
from nexus.model.folder import read_config
from nexus.model.omni import OmniModel
from nexus.progress import Progress
from nexus.recipe import Recipe, WorldConfig, fingerprint, validate
from nexus.types import Sample, Text, Turn

UTTERANCES = 2000  # spoken again, at most; three seconds of work
ROWS_PER_UTTERANCE = 2  # one recording serves several tasks, and much of what is replayed is silent
FEWEST = 40  # recordings of a set that is there at all
SPOKEN_SETS = ("heard", "mandarin", "english", "captioned", "felt", "looked", "followed")
EXAM_SETS = (
    *("test_heard", "test_questions", "test_mandarin", "test_english"),
    *("test_captioned", "test_felt", "test_looked", "test_followed"),
)
_SCALED = ("heard", "mandarin", "english", "captioned", "felt")


@dataclass
class Retold(Lab):
    """A demo's lab that was made again from `origin`, the arguments of `retold` but the last.

    It notes a row's turns down where the demo makes tokens of them at once. Another process gets it by its origin.
    """

    origin: tuple[Path, Path, int, int] | None = None
    written: tuple[Turn, ...] = ()

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """Nothing; the turns are `written` afterwards."""
        self.written = tuple(turns)
        return Rendered()

    def __reduce__(self) -> tuple[Any, ...]:
        assert self.origin is not None
        return _retold_once, self.origin


def retold(init: Path, spoken_in: Path, utterances: int, processes: int, progress: Progress) -> Retold:
    """The world of the model in folder `init` with at most about `utterances` recordings, spoken now by so many
    processes or found in `spoken_in`, where a killed run finds what it had.

    Its model has no weights: rows are made from texts, scenes and waveforms alone. Raises BadConfig for a model that
    was not made by a demo, and what `read_config` and the tokenizer raise.
    """
    recipe = _recipe_of(init)
    assert recipe.world is not None
    recipe = recipe.model_copy(update={"world": smaller(recipe.world, utterances)})
    lab = _spoken(recipe, SPOKEN_SETS, init, spoken_in / "learned", processes, progress)
    lab.origin = (init, spoken_in, utterances, processes)
    return lab


def exam_rows(init: Path, spoken_in: Path, processes: int, progress: Progress) -> list[Sample]:
    """The demo's written examination with its right answers, every task in turn: what nothing was learned from, so
    that it can be measured before and after. Spoken now or found in `spoken_in`. Raises as `retold` does.
    """
    lab = _spoken(_recipe_of(init), EXAM_SETS, init, spoken_in / "exam", processes, progress)
    asked = [
        [
            Sample(f"{name}-{number}", name, (*ask, Turn("assistant", (Text(wanted),))))
            for number, (ask, wanted) in enumerate(zip(paper.asks, paper.wanted, strict=True))
        ]
        for name, paper in papers(lab).items()
        if not name.endswith(".other")  # controls: the same questions with the wrong input
    ]
    return [row for rows in zip_longest(*asked) for row in rows if row is not None]


def _spoken(
    recipe: Recipe, sets: Sequence[str], init: Path, spoken_in: Path, processes: int, progress: Progress
) -> Retold:
    """The lab of a recipe with those of its sets spoken that are named."""
    assert recipe.world is not None
    world = World(recipe.world.seed)
    plans = plan(world, recipe.world)
    names = [name for name in sets if name in plans.sets]
    said = {name: plans.sets[name] for name in names}
    waves = speak(spoken_in, said, recipe.world.verified, processes, progress)
    with torch.device("meta"):
        model = OmniModel(recipe.model)
    return Retold(recipe, world, plans, waves, ChatTokenizer.load(init / "tokenizer.json"), model)


@cache
def _retold_once(init: Path, spoken_in: Path, utterances: int, processes: int) -> Retold:
    """In another process of the run that spoke it: all is found, and nothing needs to be shown."""
    return retold(init, spoken_in, utterances, processes, Progress(io.StringIO()))


def smaller(world: WorldConfig, utterances: int) -> WorldConfig:
    """The world's numbers scaled down to about `utterances` recordings; a set that is there keeps some.

    Spoken questions about pictures and follow-ups keep one recording of each text, and nothing is kept of what the
    voice alone learns from.
    """
    factor = min(1.0, utterances / sum(getattr(world, name) for name in _SCALED))

    def scaled(count: int, fewest: int) -> int:
        return min(count, max(fewest, round(count * factor)))

    return world.model_copy(
        update={
            **{name: scaled(getattr(world, name), FEWEST) for name in _SCALED},
            "looked": scaled(world.looked, len(picture_question_texts())),
            "followed": scaled(world.followed, len(follow_up_texts())),
            "pictures": scaled(world.pictures, FEWEST),
            "films": scaled(world.films, FEWEST),
            "spoken": 1,
        }
    )


class Replay:
    """Rows of a demo's stage, without end in principle and `len` of them here: what the model that is trained on saw in
    that stage, in the proportions of its own recipe.

    Row i is a pure function of the world's seed and i. Recordings of a task come once each before one comes again.
    `weight` is this source's share of the rows of a mixture. Raises BadConfig for a stage that the recipe lacks, or
    that learns to speak, which takes prepared rows.
    """

    def __init__(self, lab: Retold, stage: str, rows: int, weight: float = 1.0) -> None:
        self.name, self.weight = f"replay of {lab.recipe.name}, stage {stage}", weight
        self._lab, self._stage, self._rows = lab, stage, rows
        self._mixture = lab.recipe.stage(stage).mixture
        check_mixture(stage, self._mixture, (*HEARD_TASKS, *SILENT_TASKS), lab.config)
        self._order = [task for task, count in self._mixture.items() for _ in range(count)]
        columns = (row_length(self[row], lab.tokenizer, lab.recipe.model) for row in range(rows))
        self.lengths: Lengths = lengths_of(columns)

    @cached_property
    def _lessons(self) -> dict[str, Callable[[int], list[Heard]]]:
        """Task -> its recordings one by one, of the tasks that have sound."""
        heard = [task for task in self._mixture if task in HEARD_TASKS]
        return {task: heard_rows(self._lab, {task: 1}, f"replay {self._stage}") for task in heard}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lessons"}

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> Sample:
        """The sample with its media loaded."""
        assert 0 <= row < self._rows, (row, self._rows)
        task, number = self._place(row)
        return Sample(f"replay-{self._stage}-{task}-{number}", task, self._turns(task, number))

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over what the rows follow from."""
        lab = self._lab
        return fingerprint([lab.config.model_dump(mode="json"), lab.plan.fingerprint, self._mixture, self._rows])

    def _place(self, row: int) -> tuple[str, int]:
        """Task of a row, and the how manieth of its task it is."""
        block, place = divmod(row, len(self._order))
        task = self._order[place]
        return task, block * self._mixture[task] + place - self._order.index(task)

    def _turns(self, task: str, number: int) -> tuple[Turn, ...]:
        if task in self._lessons:
            ((turns, _, _),) = self._lessons[task](number)
            return turns
        SILENT[task](self._lab, self._lab.rng(f"replay {self._stage} {task}", number))
        return self._lab.written


class ReplayedSpeech:
    """Sentences read aloud in the voice that the model in folder `init` speaks with, as many as `sentences`: what its
    voice learned from, spoken now or found in `spoken_in`. Raises as `retold` does."""

    def __init__(self, init: Path, spoken_in: Path, sentences: int, processes: int, progress: Progress) -> None:
        recipe = _recipe_of(init)
        assert recipe.world is not None
        world = smaller(recipe.world, FEWEST).model_copy(update={"spoken": min(sentences, recipe.world.spoken)})
        recipe = recipe.model_copy(update={"world": world})
        lab = _spoken(recipe, ("spoken",), init, spoken_in / "voice", processes, progress)
        self._said, self._waves = lab.plan.sets["spoken"], lab.waves["spoken"]

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over the sentences and their voice."""
        return fingerprint([utterance.id for utterance in self._said])

    def __len__(self) -> int:
        return len(self._waves.places)

    def __getitem__(self, row: int) -> Sample:
        """A sentence to be read aloud, and its sound as the answer, loaded."""
        place = self._waves.places[row]
        turns = task_turns("tts", text=self._said[place].text, speech=self._waves[place])
        return Sample(f"replay-tts-{row}", "tts", turns)


def _recipe_of(init: Path) -> Recipe:
    """The recipe a demo model was made by. Raises BadConfig where there is no world to make rows of."""
    _, about = read_config(init)
    next_step = (
        "data.replay: set it to 0 and name rows that keep what the model knows in data.train, or train a model that "
        "`nexus demo` made"
    )
    if "recipe" not in about:
        raise BadConfig(f"{init}: its config says no recipe, so its training data cannot be made again; {next_step}")
    recipe = validate(Recipe, about["recipe"], f"{init / 'config.json'}: about.recipe")
    if recipe.world is None:
        raise BadConfig(
            f"{init}: its recipe {recipe.name} has no world, so its training data cannot be made again; {next_step}"
        )
    return recipe
