"""Talks that need more than their last sentence: spoken questions about pictures, and conversations of several turns.

A spoken question is answered by the picture and the question together, a follow-up by what was said before it. So that
no habit can pass for understanding, tests are balanced: in a `Quadruple` two questions are asked about two pictures
and all four answers differ; of dialogues every two share the picture and the spoken words, and only what was typed
before makes their answers differ.

What is held out is what `World` holds out: scenes, second sums, things told of; chains of facts by their own hash. The
spoken texts are few and belong to both splits, their voices do not.
"""

import functools
import operator
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, cycle, islice, product
from typing import Literal

from nexus.demo.phrases import CELLS, COLOURS, FAMILIES, ROOMS, SHAPES, Family, Item, Topic, key_of, number_words
from nexus.demo.pictures import (
    Scene,
    Thing,
    count_questions,
    existence_questions,
    picture_questions,
    picture_talk,
    questions_about,
)
from nexus.demo.world import SPLITS, Split, World
from nexus.errors import BadConfig

Kind = Literal["told", "sum", "fact", "picture"]

_FAMILIES = {family.name: family for family in FAMILIES}
_PICTURE_FAMILIES = ("colour", "shape", "position", "cell", "exists", "count")
# Every two families in turn, so colour, shape, position, cell and exists are 7 of 40 questions each and count 5 of 40:
# asked twice, it would be answered twice alike.
_MIXES = tuple(mix for mix in combinations_with_replacement(_PICTURE_FAMILIES, 2) if mix != ("count", "count"))

_WHERE_ASKS = ("where is {0}", "tell me where {0} is")
_COLOUR_ASKS = ("what colour is {0}", "tell me what colour {0} is")
_CONTENT_ASKS = ("what is in {0}", "tell me what is in {0}")
_STEP_ASKS = ("and {0} {1}", "now {0} {1}", "what is that {0} {1}")
_FACT_ASKS = ("and of {0}", "and what of {0}")
_OTHER_ASKS = ("and the {0}", "and what of the {0}")
_CHECK_ASKS = ("is {0} the {1} of {2}", "is it true that {0} is the {1} of {2}")
_MAX_STEP = 12  # of larger ones too few differences are left that end at 0 or above
FURTHER = 3  # questions after the last one of a training dialogue: as many lessons for what was told once
MAX_TEST_DIALOGUES = 2_000  # a quarter of each kind; a world has some thousands of the rarest, "sum"


@functools.lru_cache(maxsize=256)
def _answers(scene: Scene, family: str) -> dict[str, str]:
    """Every question of a family that can be asked about a scene, with its answer."""
    if family == "count":
        return dict(count_questions(len(scene.things)))
    if family != "exists":
        return {question: answer for thing in scene.things for question, answer in questions_about(thing)[family]}
    names = {thing.name for thing in scene.things}
    return {question: answer for name in _names() for question, answer in existence_questions(name, name in names)}


def _names() -> list[str]:
    return [f"{colour} {shape}" for shape, colour in product(SHAPES, COLOURS)]


@functools.cache
def _picture_questions() -> tuple[str, ...]:
    talks = (picture_talk(topic) for topic in product(SHAPES, COLOURS, range(len(CELLS))))
    return tuple(dict.fromkeys(question for talk in talks for question, _ in talk.asks))


def picture_question_texts() -> list[str]:
    """Every question that `pictures` asks, once, in a fixed order that depends on no seed."""
    return list(_picture_questions())


def answer_to(scene: Scene, question: str) -> str | None:
    """The right answer to one of `picture_question_texts`; None where the scene does not hold what it presumes."""
    assert question in _picture_questions(), question
    told = (_answers(scene, family) for family in _PICTURE_FAMILIES)
    return next((answers[question] for answers in told if question in answers), None)


@dataclass(frozen=True)
class Quadruple:
    """Two pictures and two questions about each of them, with four different answers.

    `answers[i][j]` answers `questions[j]`, which is of family `families[j]`, about `scenes[i]`.
    """

    scenes: tuple[Scene, Scene]
    families: tuple[str, str]
    questions: tuple[str, str]
    answers: tuple[tuple[str, str], tuple[str, str]]

    @property
    def items(self) -> list[tuple[Scene, Item]]:
        """The four test items: both questions about the first picture, then both about the second."""
        return [
            (scene, Item(self.families[j], scene.key, self.questions[j], answers[j]))
            for scene, answers in zip(self.scenes, self.answers, strict=True)
            for j in (0, 1)
        ]


def quadruples(world: World, n: int, stream: int = 0) -> list[Quadruple]:
    """n distinct quadruples about pictures of the test split; the first n do not depend on n.

    All pairs of families (but twice `count`) take turns: of 20 quadruples colour, shape, position, cell and exists
    make 7/40 of the questions each, count 5/40. Half the negative answers to `exists` are about a thing of which the
    picture shows the colour or the shape.
    """
    return list(islice(_quadruple_stream(world, stream), n))


def _quadruple_stream(world: World, stream: int) -> Iterator[Quadruple]:
    rng = world.rng("quadruples", "test", stream)
    scenes = world.scene_stream("test", rng)
    seen: set[tuple[str, ...]] = set()
    for families in cycle(_MIXES):
        likes = (rng.random() < 0.5, rng.random() < 0.5)  # before any scene is looked at, which could shift them
        found = None
        while found is None or _content(found) in seen:
            found = _quadruple((next(scenes), next(scenes)), families, likes, rng)
        seen.add(_content(found))
        yield found


def _content(found: Quadruple) -> tuple[str, ...]:
    return (*sorted(scene.key for scene in found.scenes), *sorted(found.questions))


def _quadruple(
    scenes: tuple[Scene, Scene], families: tuple[str, str], likes: tuple[bool, bool], rng: random.Random
) -> Quadruple | None:
    """A quadruple about the scenes, or None where the questions drawn do not give four different answers."""
    asks = [_telling(scenes, family, like) for family, like in zip(families, likes, strict=True)]
    if not all(asks):
        return None
    first, second = map(rng.choice, asks)
    (a, b), (c, d) = told = [(_answers(s, families[0])[first], _answers(s, families[1])[second]) for s in scenes]
    if len({a, b, c, d}) < 4:
        return None
    if families == ("exists", "exists") and _verdict(a) == _verdict(b):
        return None  # each picture gets a yes and a no, as each question does
    return Quadruple(scenes, families, (first, second), (told[0], told[1]))


def _verdict(answer: str) -> str:
    return answer.partition(" ")[0]


def _telling(scenes: tuple[Scene, Scene], family: str, like: bool) -> list[str]:
    """The questions of a family that can be asked about both scenes and have another answer for each.

    `exists`: of things that the scene without them does or does not show a `like` of.
    """
    left, right = (_answers(scene, family) for scene in scenes)
    asks = [ask for ask in left if ask in right and left[ask] != right[ask]]
    if family != "exists":
        return asks
    return [ask for ask in asks if _shows_like(scenes[_verdict(left[ask]) == "yes"], ask) == like]


def _shows_like(scene: Scene, ask: str) -> bool:
    """Whether the colour or the shape of the thing asked for is in the scene."""
    colour, shape = ask.split()[-2:]
    return any(thing.colour == colour or thing.shape == shape for thing in scene.things)


def spoken_asks(split: Split, n: int, world: World, stream: int = 0) -> list[str]:
    """What each of n recordings asks; the first n do not depend on n.

    Training: every text of `picture_question_texts` equally often. Test: the questions of the quadruples, two each,
    so that item j of quadruple i is heard from recording 2i + j % 2: the same sound about both pictures.
    """
    if split == "train":
        return _balanced(_picture_questions(), n, world.rng("spoken asks", split, stream))
    asked = (question for found in _quadruple_stream(world, stream) for question in found.questions)
    return list(islice(asked, n))


def _balanced(texts: Sequence[str], n: int, rng: random.Random) -> list[str]:
    """All texts in a random order, again and again."""
    rounds = (rng.sample(texts, len(texts)) for _ in range(-(-n // len(texts))))
    return [text for texts in rounds for text in texts][:n]


@dataclass(frozen=True)
class Dialogue:
    """A conversation whose last question, the spoken one, cannot be answered without what was said before.

    `turns` are the typed (question, answer) before it, one or two; `scene` is the picture of the first, if any; `about`
    the commands that were told or the facts that were asked. `key` names what is held out. Kinds: "told", where a
    thing is and what it is like; "sum", the next step of a calculation; "fact", the same about another country or
    word; "picture", more about a picture.
    """

    kind: Kind
    key: str
    turns: tuple[tuple[str, str], ...]
    question: str
    answer: str
    scene: Scene | None = None
    about: tuple[Topic, ...] = ()


_Pair = tuple[Dialogue, Dialogue]


def dialogues(split: Split, n: int, world: World, stream: int = 0) -> list[Dialogue]:
    """n dialogues, the kinds in turn, two of each; the first n do not depend on n.

    Dialogues 2i and 2i + 1 share picture and spoken question, but neither what was typed before nor the answer. No
    `key` of one split is one of the other; test dialogues are distinct. Raises BadConfig for more than
    MAX_TEST_DIALOGUES of the test.
    """
    assert split in SPLITS, split
    if split == "test" and n > MAX_TEST_DIALOGUES:
        raise BadConfig(f"{n} test dialogues wanted, expected at most {MAX_TEST_DIALOGUES}; ask for fewer")
    rng = world.rng("dialogues", split, stream)
    draws: tuple[Callable[[], _Pair], ...] = (
        functools.partial(_told, world, split, rng),
        functools.partial(_sum, world, split, rng),
        functools.partial(_fact, world, rng),
        functools.partial(_picture, world.scene_stream(split, rng), rng),
    )
    seen: set[Dialogue] = set()
    drawn: list[Dialogue] = []
    for draw in islice(cycle(draws), -(-n // 2)):
        pair = draw()
        while not _is_fit(pair, world, split, seen):
            pair = draw()
        drawn += pair
        if split == "test":
            seen.update(pair)
    return drawn[:n]


def _is_fit(pair: _Pair, world: World, split: Split, seen: set[Dialogue]) -> bool:
    """Whether the answers of a pair differ, and both are new and of the split."""
    first, second = pair
    if first.answer == second.answer or not seen.isdisjoint(pair):
        return False
    return first.kind != "fact" or all(world.holds_out_by_hash(one.key) == (split == "test") for one in pair)


@functools.lru_cache(maxsize=4)
def _tellable(world: World, split: Split) -> list[Topic]:
    """Commands of the split. Training leaves out what stands in a test command of any action: the red lamp of the
    kitchen that is turned on in the test is not turned off in training."""
    held = {topic[1:] for topic in world.topics["command", "test"]}
    return [topic for topic in world.topics["command", split] if (topic[1:] in held) == (split == "test")]


def _told(world: World, split: Split, rng: random.Random) -> _Pair:
    """One thing is told of, and asked for as "it"; or two in any order, and one is asked for by its name or room."""
    topics = _tellable(world, split)
    asks, place = rng.choice(((_WHERE_ASKS, 2), (_COLOUR_ASKS, 2), (_CONTENT_ASKS, 3)))
    by_name = place == 3 or rng.random() < 0.5
    name = rng.choice(topics)[place]
    question = rng.choice(asks).format(f"the {name}" if by_name else "it")
    meant = [topic for topic in topics if topic[place] == name] if by_name else topics

    def draw() -> Dialogue:
        told = [rng.choice(meant)]
        if by_name:
            told.append(rng.choice([topic for topic in topics if all(map(operator.ne, topic[1:], told[0][1:]))]))
        answers = _told_of(told[0])
        rng.shuffle(told)
        items = [rng.choice(world.items(_FAMILIES["command"], topic, split)) for topic in told]
        turns = tuple((item.question, item.answer) for item in items)
        key = "|".join(("told", *(str(value) for topic in told for value in topic[1:])))
        return Dialogue("told", key, turns, question, answers[asks], about=tuple(told))

    return draw(), draw()


def _told_of(topic: Topic) -> dict[tuple[str, ...], str]:
    """What can be asked of a command, with its answers."""
    _, colour, thing, room = topic
    return {
        _WHERE_ASKS: f"the {thing} is in the {room}",
        _COLOUR_ASKS: f"the {thing} is {colour}",
        _CONTENT_ASKS: f"the {colour} {thing} is in the {room}",
    }


@functools.lru_cache(maxsize=4)
def _first_sums(world: World) -> dict[int, list[tuple[Family, Topic]]]:
    """Training sums by their result: those of the test are never told, in neither split."""
    sums: dict[int, list[tuple[Family, Topic]]] = defaultdict(list)
    for name in ("plus", "minus", "times"):
        for topic in world.topics[name, "train"]:
            left, right = map(int, topic)
            result = {"plus": left + right, "minus": left - right, "times": left * right}[name]
            sums[result].append((_FAMILIES[name], topic))
    return sums


@functools.lru_cache(maxsize=4)
def _second_sums(world: World, split: Split) -> list[tuple[Family, int, list[int]]]:
    """(family, right side, left sides) of the sums of a split in which a right side has two left ones at least."""
    lefts: dict[tuple[str, int], list[int]] = defaultdict(list)
    for name in ("plus", "minus", "times"):
        for left, right in world.topics[name, split]:
            if int(right) <= _MAX_STEP and int(left) in _first_sums(world):
                lefts[name, int(right)].append(int(left))
    return [(_FAMILIES[name], right, left) for (name, right), left in lefts.items() if len(left) > 1]


def _sum(world: World, split: Split, rng: random.Random) -> _Pair:
    """A sum, then a step from its result; for both dialogues the same step from different results."""
    sums = _second_sums(world, split)
    ((family, right, lefts),) = rng.choices(sums, [len(lefts) for _, _, lefts in sums])
    question = rng.choice(_STEP_ASKS).format(family.name, number_words(right))

    def draw(left: int) -> Dialogue:
        first, topic = rng.choice(_first_sums(world)[left])
        item = rng.choice(world.items(first, topic, "train"))
        _, answer = family.talk((left, right)).asks[0]
        key = f"{key_of(first, topic)}|{key_of(family, (left, right))}"
        return Dialogue("sum", key, ((item.question, item.answer),), question, answer)

    one, other = rng.sample(lefts, 2)
    return draw(one), draw(other)


def _fact(world: World, rng: random.Random) -> _Pair:
    """A fact is asked for, or whether one is true; then the same of another country or word.

    Two of three answers, in equal shares: the fact, yes or no. A no follows a yes as often as another no.
    """
    family = _FAMILIES[rng.choice(("capital", "opposite"))]
    subject, right_value = rng.choice(family.topics)
    question = rng.choice(_FACT_ASKS).format(subject)
    others = [topic for topic in family.topics if not {subject, right_value} & set(topic)]

    def draw(wanted: str) -> Dialogue:
        before = rng.choice(others)
        if wanted == "fact":
            item = rng.choice(world.items(family, before, "train"))
            key, turn = f"fact|{key_of(family, before)}|{subject}", (item.question, item.answer)
            answer = family.talk((subject, right_value)).asks[0][1]
            return Dialogue("fact", key, (turn,), question, answer, about=(before, (subject, right_value)))
        value = right_value
        if wanted == "no":
            wrong = [topic[1] for topic in others if not set(topic) & set(before)]
            value = before[1] if rng.random() < 0.5 else rng.choice(wrong)
        ask = rng.choice(_CHECK_ASKS).format(value, family.name, before[0])
        turn = (ask, _check(value, family, before))
        answer = _check(value, family, (subject, right_value))
        key = f"check|{family.name}|{value}|{before[0]}|{subject}"
        return Dialogue("fact", key, (turn,), question, answer, about=(before, (subject, right_value)))

    one, other = rng.sample(("fact", "yes", "no"), 2)
    return draw(one), draw(other)


def _check(value: str | int, family: Family, fact: Topic) -> str:
    verdict, verb = ("yes", "is") if value == fact[1] else ("no", "is not")
    return f"{verdict} {value} {verb} the {family.name} of {fact[0]}"


def _picture(scenes: Iterator[Scene], rng: random.Random) -> _Pair:
    """One of two or three shapes is asked for; then where it is, what colour it has, or the same of another shape."""
    scene = next(scene for scene in scenes if len(scene.things) > 1)
    asks = rng.choice((_WHERE_ASKS, _COLOUR_ASKS, _OTHER_ASKS))
    one, other = rng.sample(scene.things, 2)

    def draw(family: str, named: Thing, answer: str) -> Dialogue:
        return Dialogue("picture", scene.key, (rng.choice(questions_about(named)[family]),), question, answer, scene)

    if asks == _OTHER_ASKS:
        question = rng.choice(asks).format(other.shape)
        before = [rng.choice([thing for thing in scene.things if thing != other]) for _ in range(2)]
        families = rng.sample(("position", "colour"), 2)
        first, second = (
            draw(f, named, questions_about(other)[f][0][1]) for f, named in zip(families, before, strict=True)
        )
        return first, second
    question = rng.choice(asks).format("it")
    # Nothing that is asked for later may have been said: a question about the place does not name the colour.
    names, wanted = (("colour", "shape"), "position") if asks == _WHERE_ASKS else (("position",), "colour")
    first, second = (draw(rng.choice(names), thing, questions_about(thing)[wanted][0][1]) for thing in (one, other))
    return first, second


def further_asks(dialogue: Dialogue, rng: random.Random) -> list[tuple[str, str]]:
    """Up to FURTHER more questions with which a conversation may go on, and their answers.

    Of two things told of, what else can be asked; of facts, whether some are true, every other time; of a picture, its
    questions. After sums and after one thing told of, nothing: what is left to ask there is no harder than what was.
    """
    match dialogue.kind:
        case "told" if len(dialogue.about) > 1:
            left = [ask for ask in _all_told(dialogue.about, rng) if ask[1] != dialogue.answer]
            return rng.sample(left, FURTHER)
        case "fact":
            family = next(_FAMILIES[n] for n in ("capital", "opposite") if dialogue.about[0] in _FAMILIES[n].topics)
            return [_checked(family, rng) for _ in range(FURTHER)]
        case "picture" if dialogue.scene:
            asks = [(item.question, item.answer) for item in picture_questions(dialogue.scene, rng)]
            return rng.sample([ask for ask in asks if ask not in dialogue.turns], FURTHER)
    return []


def told_many(world: World, rng: random.Random, things: int = 4, asks: int = 8) -> list[tuple[str, str]]:
    """A training conversation in which several things are told of, no word of them twice, and much is asked after.

    Of two things half of all guesses are right; of four it pays to look up which was meant.
    """
    topics, told = _tellable(world, "train"), list[Topic]()
    while len(told) < things:
        topic = rng.choice(topics)
        if all(map(operator.ne, (value for other in told for value in other[1:]), cycle(topic[1:]))):
            told.append(topic)
    items = [rng.choice(world.items(_FAMILIES["command"], topic, "train")) for topic in told]
    return [*((item.question, item.answer) for item in items), *rng.sample(_all_told(told, rng), asks)]


def _all_told(told: Sequence[Topic], rng: random.Random) -> list[tuple[str, str]]:
    """One wording of all that can be asked of things told of, no two of which share a word."""
    return [
        (rng.choice(asks).format(f"the {topic[3 if asks == _CONTENT_ASKS else 2]}"), answer)
        for topic in told
        for asks, answer in _told_of(topic).items()
    ]


def _checked(family: Family, rng: random.Random) -> tuple[str, str]:
    """Whether a fact is true, which it is every other time."""
    fact = rng.choice(family.topics)
    wrong = [topic[1] for topic in family.topics if not set(topic) & set(fact)]
    value = fact[1] if rng.random() < 0.5 else rng.choice(wrong)
    return rng.choice(_CHECK_ASKS).format(value, family.name, fact[0]), _check(value, family, fact)


def follow_up_texts() -> list[str]:
    """Every last question a dialogue of any seed can have, once, in a fixed order."""
    things = dict.fromkeys(str(topic[2]) for topic in _FAMILIES["command"].topics)
    asked: list[tuple[tuple[str, ...], Sequence[tuple[str, ...]]]] = [
        (_WHERE_ASKS + _COLOUR_ASKS, [("it",), *((f"the {thing}",) for thing in things)]),
        (_CONTENT_ASKS, [(f"the {room}",) for room in ROOMS]),
        (_FACT_ASKS, [(str(topic[0]),) for name in ("capital", "opposite") for topic in _FAMILIES[name].topics]),
        (_OTHER_ASKS, [(shape,) for shape in SHAPES]),
    ]
    for name in ("plus", "minus", "times"):
        steps = dict.fromkeys(int(right) for _, right in _FAMILIES[name].topics if int(right) <= _MAX_STEP)
        asked.append((_STEP_ASKS, [(name, number_words(step)) for step in steps]))
    return list(dict.fromkeys(ask.format(*about) for asks, abouts in asked for about in abouts for ask in asks))


def spoken_follow_ups(split: Split, n: int, world: World, stream: int = 0) -> list[str]:
    """What each of n recordings says; the first n do not depend on n.

    Training: every text of `follow_up_texts` equally often. Test: the last questions of every two dialogues, so that
    dialogue i is heard from recording i // 2. Raises BadConfig as `dialogues` does.
    """
    if split == "train":
        return _balanced(follow_up_texts(), n, world.rng("spoken follow ups", split, stream))
    return [first.question for first in dialogues(split, 2 * n, world, stream)[::2]]
