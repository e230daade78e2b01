"""Films of the micro-world: splits keep their word, answers are right, and only the order of the moments gives them."""

import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pocketsphinx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.demo.films import FRAMES_PER_MOMENT, Film, film_questions, film_talk, films, render, shuffled
from nexus.demo.phrases import CELLS, COLOURS, SHAPES, Item
from nexus.demo.pictures import Scene, Thing
from nexus.demo.pictures import render as render_scene
from nexus.demo.world import World
from nexus.eval.scores import most_frequent

NUM_FILMS = 3_000
ORDERED = {"goal", "origin", "first", "last"}
FAMILIES = ORDERED | {"moved"}
NEW_WORDS = {"moved", "came", "last", "did", "at", "was"}
RED, BLUE = Thing("circle", "red", 0, True), Thing("star", "blue", 4, False)


def family_of(question: str) -> str:
    words = question.split()
    for family, word in (("last", "last"), ("origin", "was"), ("first", "first"), ("goal", "where")):
        if word in words:
            return family
    assert "moved" in words, question
    return "moved"


def answers(film: Film) -> dict[str, str]:
    return dict(film_talk(film).asks)


def share_of(question: str) -> float:
    """How often a question is asked among those of its family: one of three phrasings, one of six choices."""
    return 1 / 18 if " or " in question else 1 / 3


def other_orders(film: Film) -> list[Film]:
    """The film in every other order in which it looks different."""
    orders = dict.fromkeys(permutations(film.moments))
    return [replace(film, moments=order) for order in orders if order != film.moments]


def could_be_drawn(film: Film) -> bool:
    return film.mover is None or film.moments[0] != film.moments[-1]


def best_rates(tallies: Iterable[tuple[float, str, str]]) -> dict[str, float]:
    """By family, the share of right answers of who knows just these (weight, question, answer)."""
    weights: dict[str, Counter[str]] = defaultdict(Counter)
    for weight, question, answer in tallies:
        weights[question][answer] += weight
    right, asked = Counter[str](), Counter[str]()
    for question, counts in weights.items():
        right[family_of(question)] += max(counts.values())
        asked[family_of(question)] += counts.total()
    return {family: right[family] / asked[family] for family in asked}


def films_showing(moment: tuple[Thing, ...], place: int) -> Iterator[tuple[float, Film]]:
    """Every film that shows a moment at a place, with its probability when that is all one knows of it."""
    if len(moment) == 1:
        others = [Thing(shape, "black", 8, True) for shape in SHAPES if shape != moment[0].shape]
        for pair in permutations(others, 2):
            yield 1.0, Film(tuple((thing,) for thing in (*pair[:place], *moment, *pair[place:])), 0)
        return
    free = [cell for cell in range(len(CELLS)) if cell not in {thing.cell for thing in moment}]
    for mover, share, path in ((i, *way) for i in range(len(moment)) for way in ((1, "abb"), (1, "aab"), (2, "abc"))):
        hidden = [stop for stop in dict.fromkeys(path) if stop != path[place]]
        orders = list(permutations(free, len(hidden)))
        for cells in orders:
            stops = {path[place]: moment[mover].cell, **dict(zip(hidden, cells, strict=True))}
            moments = [
                (*moment[:mover], replace(moment[mover], cell=stops[stop]), *moment[mover + 1 :]) for stop in path
            ]
            yield share / len(orders) / len(moment), Film(tuple(moments), 0)


def one_moment_rates(place: int) -> dict[str, float]:
    """By family, the best rate of who sees the moment at a place alone, over every film that shows it."""
    third = Thing("heart", "pink", 8, True)
    rates: dict[str, float] = Counter()
    for moment, share in (((RED,), 1.0), ((RED, BLUE), 0.5), ((RED, BLUE, third), 0.5)):
        tallies = (
            (weight * share_of(question), question, answer)
            for weight, film in films_showing(moment, place)
            for question, answer in answers(film).items()
        )
        for family, rate in best_rates(tallies).items():
            rates[family] += share * rate
    return rates


@pytest.fixture(scope="module")
def train() -> list[Film]:
    return films("train", NUM_FILMS, seed=0)


@pytest.fixture(scope="module")
def test() -> list[Film]:
    return films("test", NUM_FILMS, seed=0)


@pytest.fixture(scope="module")
def asked(train: list[Film]) -> list[tuple[Film, Item]]:
    rng = random.Random(1)
    return [(film, item) for film in train for item in film_questions(film, rng)]


def test_a_film_is_asked_what_it_shows():
    away, gone = replace(RED, cell=2), replace(RED, cell=6)
    told = answers(Film(((RED, BLUE), (away, BLUE), (gone, BLUE)), 0))
    assert told["what moved"] == "the red circle moved"
    assert told["where did the red circle move"] == told["what moved and where"]
    assert told["what moved and where"] == "the red circle moved into the bottom left"
    assert told["where was the circle at first"] == "the red circle was in the top left at first"
    told = answers(Film(((RED,), (BLUE,), (Thing("heart", "pink", 8, True),)), 0))
    assert told["what came first"] == "the circle came first" and told["what came last"] == "the heart came last"
    assert told["which came first the heart or the star"] == "the star came first"
    assert told["which came last the star or the circle"] == "the star came last"


def test_answers_agree_with_the_frames_read_moment_by_moment(asked: list[tuple[Film, Item]]):
    assert {item.family for _, item in asked} == FAMILIES
    for film, item in asked:
        words = item.answer.split()
        cells = [{thing.name: thing.cell for thing in moment} for moment in film.moments]
        shapes = [[thing.shape for thing in moment] for moment in film.moments]
        if item.family in ("first", "last"):
            named = item.question.split()[-4::3] if " or " in item.question else [shape for (shape,) in shapes]
            order = shapes if item.family == "first" else shapes[::-1]
            earliest = next(shape for (shape,) in order if shape in named)
            assert item.answer == f"the {earliest} came {item.family}"
            continue
        name = " ".join(words[1:3])
        assert [other for other in cells[0] if len({at[other] for at in cells}) > 1] == [name]
        place = {"moved": "", "goal": CELLS[cells[-1][name]], "origin": CELLS[cells[0][name]]}[item.family]
        assert item.answer.removesuffix(" at first").endswith(f"the {place}" if place else "moved")
        assert family_of(item.question) == item.family


def test_films_are_of_both_kinds_and_all_things_evenly(train: list[Film]):
    kinds = Counter((len(film.moments[0]), film.mover is None, len(set(film.moments))) for film in train)
    expected = {
        (1, True, 3): 0.5,
        (2, False, 2): 0.125,
        (2, False, 3): 0.125,
        (3, False, 2): 0.125,
        (3, False, 3): 0.125,
    }
    assert set(kinds) == set(expected)
    assert all(abs(kinds[kind] / NUM_FILMS - share) < 0.03 for kind, share in expected.items())
    for part, count in (("shape", 6), ("colour", 8), ("cell", 9), ("is_big", 2)):
        seen = Counter(getattr(thing, part) for film in train for moment in film.moments for thing in moment)
        assert len(seen) == count and max(seen.values()) / min(seen.values()) < 1.3
    for film in train:
        for part in ("shape", "colour", "cell"):
            assert all(len({getattr(thing, part) for thing in m}) == len(m) for m in film.moments)
        assert could_be_drawn(film)
    movers = Counter((len(film.moments[0]), film.mover) for film in train if film.mover is not None)
    assert max(movers.values()) / min(movers.values()) < 2


@pytest.mark.parametrize("seed", [0, 5])
def test_no_test_film_is_in_training_in_whatever_order(seed: int):
    def shown(some: list[Film]) -> set[frozenset[frozenset[tuple[str, int]]]]:
        return {frozenset(frozenset((t.name, t.cell) for t in m) for m in film.moments) for film in some}

    few = {split: shown(films(split, 1_000, seed)) for split in ("train", "test")}
    assert len(few["train"]) > 950 and len(few["test"]) > 950
    assert few["train"].isdisjoint(few["test"] | shown(films("test", 1_000, seed, stream=1)))


def test_no_moment_of_a_training_film_is_a_held_out_picture(train: list[Film]):
    held_out = {scene.key for scene in World(0).scenes("test", 4_000)}
    moments = [Scene(tuple(sorted(m, key=lambda thing: thing.cell)), 0).key for film in train for m in film.moments]
    pictures = {scene.key for scene in World(0).scenes("train", 4_000)}
    assert held_out.isdisjoint(moments)
    assert len(pictures & set(moments)) > 300  # the keys are of one form


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["train", "test"]), st.integers(0, 20), st.integers(0, 20), st.integers(0, 2**40))
def test_the_first_films_do_not_depend_on_how_many_are_wanted(split, few, more, stream):
    drawn = films(split, few + more, 5, stream)
    assert len(drawn) == few + more and films(split, few, 5, stream) == drawn[:few]


def test_streams_and_seeds_give_other_films(train: list[Film]):
    for others in (films("train", 50, 0, stream=1), films("train", 50, 1)):
        assert set(others).isdisjoint(train)


def test_what_seed_zero_holds_out_stays_the_same(test: list[Film]):
    """Scores of released models depend on it: a change here makes them incomparable and belongs in the changelog."""
    assert test[0].key == "film|scene|green star 0|yellow cross 5" + "|scene|yellow cross 5|green star 7" * 2


def test_reversal_changes_every_answer_about_order_and_none_about_what_moved(train: list[Film]):
    checked = Counter[str]()
    for film in train:
        reverse = answers(replace(film, moments=film.moments[::-1]))
        for question, answer in answers(film).items():
            assert (reverse[question] != answer) == (family_of(question) in ORDERED), (film, question)
            checked[family_of(question)] += 1
    assert set(checked) == FAMILIES and min(checked.values()) > 1_000


def test_most_other_orders_have_another_right_answer(train: list[Film]):
    """How well a perfect viewer of shuffled films does on the unshuffled answers: a control score near it is low."""
    kept, asked = Counter[str](), Counter[str]()
    for film in train:
        others = [answers(other) for other in other_orders(film)]
        assert others
        for question, answer in answers(film).items():
            asked[family_of(question)] += share_of(question)
            kept[family_of(question)] += share_of(question) * sum(o[question] == answer for o in others) / len(others)
    shares = {family: kept[family] / asked[family] for family in asked}
    assert shares["moved"] == pytest.approx(1)
    assert all(shares[family] == pytest.approx(0.225, abs=0.02) for family in ("goal", "origin"))
    assert all(shares[family] == pytest.approx(4 / 15) for family in ("first", "last"))


def test_moments_without_their_order_leave_a_guess(train: list[Film]):
    """The best that can be done with the moments in a bag: every order that could have been drawn is as likely."""
    right, asked = Counter[str](), Counter[str]()
    for film in train[:1_000]:
        orders = [film, *(other for other in other_orders(film) if could_be_drawn(other))]
        rates = best_rates((share_of(q), q, a) for order in orders for q, a in answers(order).items())
        for family, rate in rates.items():
            right[family] += rate
            asked[family] += 1
    shares = {family: right[family] / asked[family] for family in asked}
    assert shares["moved"] == pytest.approx(1)
    assert all(shares[family] == pytest.approx(5 / 12, abs=0.02) for family in ("goal", "origin"))
    assert all(shares[family] == pytest.approx(7 / 18) for family in ("first", "last"))


def test_one_moment_leaves_a_guess():
    """Exhaustively, over all films that show a moment: the best answers of who sees that moment and knows its place."""
    rates = [one_moment_rates(place) for place in range(3)]
    assert all(set(rate) == FAMILIES and rate["moved"] == pytest.approx(5 / 12) for rate in rates)
    for family, place in (("origin", 0), ("goal", 2)):  # the named third is certain, of the rest the mover is guessed
        assert rates[place][family] == pytest.approx((2 * 5 / 12 + 1) / 3)
    for family, place in (("first", 0), ("last", 2)):
        assert rates[place][family] == pytest.approx((2 + 5 / 6) / 3)
    overall = [sum(rate.values()) / len(rate) for rate in rates]  # every family makes a fifth of the questions
    assert max(overall) < 0.5 and min(overall) < 0.35


def test_the_most_frequent_answer_is_a_poor_one(asked: list[tuple[Film, Item]]):
    def majority_share(items: list[Item]) -> float:
        majority = most_frequent([item.answer for item in items])
        return sum(item.answer == majority for item in items) / len(items)

    by_family = {family: [item for _, item in asked if item.family == family] for family in FAMILIES}
    assert all(majority_share(by_family[family]) < 0.05 for family in ("moved", "goal", "origin"))
    assert all(majority_share(by_family[family]) < 0.22 for family in ("first", "last"))
    assert majority_share([item for _, item in asked]) < 0.06


def test_choices_name_the_right_one_first_half_of_the_time(asked: list[tuple[Film, Item]]):
    choices = [item for _, item in asked if " or " in item.question]
    named_first = sum(item.question.split()[-4] == item.answer.split()[1] for item in choices)
    assert 0.45 < named_first / len(choices) < 0.55


def test_every_family_has_three_phrasings(asked: list[tuple[Film, Item]]):
    phrasings = defaultdict(set)
    for _, item in asked:
        bare = [word for word in item.question.split() if word not in SHAPES + COLOURS]
        phrasings[item.family].add(" ".join(bare))
    assert {family: len(found) for family, found in phrasings.items()} == dict.fromkeys(FAMILIES, 3)


def test_few_words_are_new_and_none_sounds_like_another(train: list[Film]):
    words = {word for film in train[:300] for ask in film_talk(film).asks for text in ask for word in text.split(" ")}
    world = set(World(0).words())
    assert words - world <= NEW_WORDS and words >= NEW_WORDS
    pronunciations = {}
    dictionary = Path(pocketsphinx.get_model_path("en-us/cmudict-en-us.dict"))
    for line in dictionary.read_text(encoding="utf-8").splitlines():
        word, _, sounds = line.partition(" ")
        pronunciations[word.partition("(")[0], sounds] = word
    sounds_of = defaultdict(set)
    for word, sounds in pronunciations:
        if word in words | world:
            sounds_of[sounds].add(word)
    assert words <= set().union(*sounds_of.values())
    assert [alike for alike in sounds_of.values() if len(alike) > 1 and alike & NEW_WORDS] == []


def test_each_moment_is_its_picture_shown_for_two_frames(train: list[Film]):
    for film in train[:50]:
        frames = render(film)
        assert frames.shape == (6, 84, 84, 3) and frames.dtype == np.uint8
        assert np.array_equal(frames, render(film))
        for moment, first, second in zip(film.moments, frames[::2], frames[1::2], strict=True):
            assert np.array_equal(first, second)
            assert np.array_equal(first, render_scene(Scene(moment, film.look)))


def test_nothing_changes_but_the_cells_between_which_a_shape_moves(train: list[Film]):
    checked = 0
    for film in [film for film in train if film.mover is not None][:100]:
        first, _, last = render(film)[::FRAMES_PER_MOMENT].astype(int)
        cells = {moment[film.mover].cell for moment in (film.moments[0], film.moments[2])}
        changed = np.abs(last - first).max(-1).reshape(3, 28, 3, 28).max((1, 3)).ravel() > 0
        assert set(np.flatnonzero(changed)) == cells
        checked += 1
    assert checked == 100


def test_shuffled_frames_are_the_moments_in_another_order(train: list[Film]):
    rng = random.Random(2)
    orders = Counter[int]()
    for film in train[:200]:
        frames = render(film)
        other = shuffled(frames, rng)
        drawn = [render(order).tobytes() for order in other_orders(film)]
        assert other.tobytes() in drawn and other.shape == frames.shape and not np.array_equal(other, frames)
        orders[drawn.index(other.tobytes())] += 1
    assert set(orders) == set(range(5))  # every other order occurs


def test_frames_that_cannot_be_shuffled_are_refused():
    still = np.repeat(render_scene(Scene((RED,), 3))[None], 6, axis=0)
    with pytest.raises(AssertionError, match="no other order"):
        shuffled(still, random.Random(0))
    with pytest.raises(AssertionError):
        shuffled(still[:4], random.Random(0))


def test_films_are_rendered_fast(train: list[Film]):
    start = time.process_time()
    for film in train[:300]:
        render(film)
    assert time.process_time() - start < 300 * 10 / 3_000
