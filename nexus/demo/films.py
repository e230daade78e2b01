"""What happens in the micro-world: films of three moments, and questions that only the order of the moments answers.

There are two kinds. In one, two or three shapes stand on the 3 x 3 grid of `pictures` and one of them moves, once or
twice. In the other, three shapes come one at a time, each alone: were they to stay, their number would tell the order
of the moments, and no shuffled film could show whether a model heeds it.
"""

import hashlib
import random
from dataclasses import dataclass
from itertools import islice, permutations, product
from typing import Literal

import numpy as np

from nexus.demo.phrases import CELLS, COLOURS, SHAPES, Item, Talk
from nexus.demo.pictures import Scene, Thing
from nexus.demo.pictures import render as render_scene

Moments = tuple[tuple[Thing, ...], ...]

NUM_MOMENTS = 3
FRAMES_PER_MOMENT = 2  # what the vision tower takes together as one step of time
FPS = 2.0
TEST_SHARE = 10  # one in ten is held out, as of pictures
# Where the moving shape stands at each moment, as the index of one of its cells. Never there and back again: such a
# film reads the same in reverse.
_MOVED_ONCE = ((0, 0, 1), (0, 1, 1))
_MOVED_TWICE = ((0, 1, 2),)

_MOVED_ASKS = ("what moved", "tell me what moved", "which shape moved")
# Two of three name no shape: with the name, the first or the last moment alone would hold the answer.
_GOAL_ASKS = ("what moved and where", "tell me what moved and where", "where did the {0} move")
_ORIGIN_ASKS = (
    "what moved and where was it at first",
    "tell me what moved and where it was at first",
    "where was the {1} at first",
)
_CAME_ASKS = ("what came {0}", "tell me what came {0}")
_CHOICE_ASK = "which came {0} the {1} or the {2}"


@dataclass(frozen=True)
class Film:
    """Three moments, no shape, colour or cell twice within one; `look` seeds jitter, tint and noise of all of them.

    A shape that stays keeps its place in the tuples of all moments, because its jitter goes by that place.
    """

    moments: Moments
    look: int

    @property
    def key(self) -> str:
        """The combination that is held out: what is where, whatever the order of the moments, the sizes and the look.

        Without the order, so that no shuffled test film is a training film either.
        """
        return "|".join(("film", *sorted(_scene(moment).key for moment in self.moments)))

    @property
    def mover(self) -> int | None:
        """The place, within each moment, of the shape that moves; None where shapes come one at a time."""
        if any(len({thing.name for thing in same}) > 1 for same in zip(*self.moments, strict=True)):
            return None
        (mover,) = [i for i, same in enumerate(zip(*self.moments, strict=True)) if len(set(same)) > 1]
        return mover


def _scene(moment: tuple[Thing, ...], look: int = 0) -> Scene:
    return Scene(tuple(sorted(moment, key=lambda thing: thing.cell)), look)


@dataclass(frozen=True)
class _Plot:
    """What happens in a film, whoever plays in it: the number of shapes, the index of the mover and its path, which
    is empty when shapes come one at a time."""

    num_things: int
    mover: int = 0
    path: tuple[int, ...] = ()


def _draw_plot(rng: random.Random) -> _Plot:
    if rng.random() < 0.5:
        return _Plot(NUM_MOMENTS)
    num_things = rng.randint(2, 3)
    return _Plot(num_things, rng.randrange(num_things), rng.choice(rng.choice((_MOVED_ONCE, _MOVED_TWICE))))


def _play(plot: _Plot, rng: random.Random) -> Film:
    """A film of the plot with shapes, colours, cells, sizes and look by `rng`."""
    shapes, colours = rng.sample(SHAPES, plot.num_things), rng.sample(COLOURS, plot.num_things)
    sizes = [rng.random() < 0.5 for _ in shapes]
    cells = rng.sample(range(len(CELLS)), plot.num_things + max(plot.path, default=0))
    things = [Thing(*thing) for thing in zip(shapes, colours, cells, sizes, strict=False)]
    if not plot.path:
        return Film(tuple((thing,) for thing in things), rng.getrandbits(32))
    shape, colour, size = shapes[plot.mover], colours[plot.mover], sizes[plot.mover]
    stops = [cells[plot.mover], *cells[plot.num_things :]]
    moments = []
    for stop in plot.path:
        moved = Thing(shape, colour, stops[stop], size)
        moments.append((*things[: plot.mover], moved, *things[plot.mover + 1 :]))
    return Film(tuple(moments), rng.getrandbits(32))


def films(split: Literal["train", "test"], n: int, seed: int, stream: int = 0) -> list[Film]:
    """n films of a split of the world with that seed; the first n do not depend on n.

    No combination of one split stands in the other, in whatever order of its moments, and no moment of a training film
    is a picture of the world's test split. Test films may show any moment.
    """
    assert split in ("train", "test"), split
    rng = random.Random(_digest(seed, f"films|{split}|{stream}"))
    drawn = []
    for _ in range(n):
        plot = _draw_plot(rng)  # drawn before the split is looked at, which therefore cannot shift it
        film = _play(plot, rng)
        while not _belongs(film, split, seed):
            film = _play(plot, rng)
        drawn.append(film)
    return drawn


def _belongs(film: Film, split: str, seed: int) -> bool:
    is_test = _is_held_out(seed, film.key)
    if split == "test":
        return is_test
    return not is_test and not any(_is_held_out(seed, _scene(moment).key) for moment in film.moments)


def _is_held_out(seed: int, key: str) -> bool:
    return _digest(seed, key) % TEST_SHARE == 0


def _digest(seed: int, name: str) -> int:
    """The world's own hash: films must know which pictures it holds out."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{name}".encode()).digest()[:8], "big")


def render(film: Film) -> np.ndarray:
    """The frames u8 [6, 84, 84, 3] of a film at `FPS`: its moments in order, each for two equal frames.

    The camera stands still and the light does not change: jitter, tint and noise are the same in all frames, so that
    nothing but shapes tells the moments apart.
    """
    seen = {moment: render_scene(Scene(moment, film.look)) for moment in dict.fromkeys(film.moments)}
    return np.repeat(np.stack([seen[moment] for moment in film.moments]), FRAMES_PER_MOMENT, axis=0)


def shuffled(frames: np.ndarray, rng: random.Random) -> np.ndarray:
    """The frames u8 [6, H, W, 3] of a film with its moments in another order, by `rng`, in which it looks different.

    For the control score: a model that heeds the order answers shuffled films worse.
    """
    assert len(frames) == NUM_MOMENTS * FRAMES_PER_MOMENT, frames.shape
    moments = frames.reshape(NUM_MOMENTS, FRAMES_PER_MOMENT, *frames.shape[1:])
    others = [moments[list(order)] for order in islice(permutations(range(NUM_MOMENTS)), 1, None)]
    others = [other for other in others if not np.array_equal(other, moments)]
    assert others, "the moments are all alike, so there is no other order"
    return rng.choice(others).reshape(frames.shape)


def _asks(film: Film) -> dict[str, list[list[tuple[str, str]]]]:
    """By family and then by phrasing, every (question, answer)."""
    if film.mover is None:
        shapes = [thing.shape for (thing,) in film.moments]
        return {when: _came(when, shapes) for when in ("first", "last")}
    first, *_, last = (moment[film.mover] for moment in film.moments)
    said = {
        "moved": (_MOVED_ASKS, f"the {last.name} moved"),
        "goal": (_GOAL_ASKS, f"the {last.name} moved into the {CELLS[last.cell]}"),
        "origin": (_ORIGIN_ASKS, f"the {first.name} was in the {CELLS[first.cell]} at first"),
    }
    names = (last.name, last.shape)
    return {family: [[(ask.format(*names), answer)] for ask in asks] for family, (asks, answer) in said.items()}


def _came(when: str, shapes: list[str]) -> list[list[tuple[str, str]]]:
    """What came first or last of all, and of every two in both orders of naming."""
    in_order = shapes if when == "first" else shapes[::-1]
    choices = [
        (_CHOICE_ASK.format(when, *pair), f"the {min(pair, key=in_order.index)} came {when}")
        for pair in product(shapes, repeat=2)
        if pair[0] != pair[1]
    ]
    return [*([(ask.format(when), f"the {in_order[0]} came {when}")] for ask in _CAME_ASKS), choices]


def film_talk(film: Film) -> Talk:
    """All that is asked and answered about a film."""
    return Talk(tuple(ask for phrasings in _asks(film).values() for asks in phrasings for ask in asks))


def film_questions(film: Film, rng: random.Random) -> list[Item]:
    """One question of each family, phrasings by `rng`: moved, goal, origin when a shape moves, first, last when shapes
    come. `key` is the film's: films are held out, their questions' words are not."""
    drawn = {family: rng.choice(rng.choice(phrasings)) for family, phrasings in _asks(film).items()}
    return [Item(family, film.key, question, answer) for family, (question, answer) in drawn.items()]
