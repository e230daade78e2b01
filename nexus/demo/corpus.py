"""The demo's corpus as it is planned: which sentence is spoken by which voice with which noise.

Everything that is decided here follows from the seed. Waveforms are never part of an identity: a sample's id is a hash
of text, voice, parameters and step versions.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nexus.demo.mandarin import Pair, pairs
from nexus.demo.manner import Delivery, Emotion, Manner, emotions, groups, manners, speakers
from nexus.demo.phrases import Item
from nexus.demo.talks import follow_up_texts, picture_question_texts, spoken_asks, spoken_follow_ups
from nexus.demo.world import SPLITS, Split, World
from nexus.engines.speak import Voice, voice_pool
from nexus.errors import BadConfig
from nexus.recipe import WorldConfig, fingerprint

READINGS = 2  # stream of the world's sentences that are read aloud
STEPS = {"espeakng-loader": "0.2.4", "trim": 1, "resample": 1, "shape": 1, "noise": 1}  # a change here is a new corpus


@dataclass(frozen=True)
class Utterance:
    """One sentence to be spoken, and how."""

    text: str
    delivery: Delivery

    @functools.cached_property
    def id(self) -> str:
        """Sixteen hex digits over text, voice, parameters and step versions; never over the sound."""
        return fingerprint([asdict(self), STEPS])


@dataclass(frozen=True)
class Plan:
    """Every utterance of the demo by set, and what those of a set mean, place by place."""

    sets: dict[str, list[Utterance]]
    questions: list[Item]  # of the first utterances of "heard"
    test_questions: list[Item]  # of "test_questions"
    replies: list[int]  # for each of the first `questions`, the index of its answer in "spoken"
    pairs: dict[str, list[Pair]]  # of "mandarin", "english" and their tests
    manners: dict[str, list[Manner]]  # of "captioned" and its test
    emotions: dict[str, list[Emotion]]  # of "felt" and its test

    @property
    def fingerprint(self) -> str:
        return fingerprint({name: [u.id for u in members] for name, members in self.sets.items()})

    def spelling(self, name: str) -> list[str]:
        """What an ear that spells should write down of a set: its words in Latin letters."""
        if name.endswith("mandarin"):
            return [pair.pinyin for pair in self.pairs[name]]
        return [utterance.text for utterance in self.sets[name]]


def plan(world: World, config: WorldConfig) -> Plan:
    """All texts, splits, voices, parameters and noise levels, from the seed alone.

    Raises BadConfig for numbers that the world cannot fill, that leave a training question without a recording, or
    that would leave a test recording unused.
    """
    _check(config)
    kinds = groups() if config.captioned or config.felt else ()
    voices = dict(zip(SPLITS, world.split_voices(voice_pool("en"), kinds), strict=True))
    rng = random.Random(f"voices {config.seed}")
    target = Voice(config.target_voice, config.target_rate_wpm)

    def heard(texts: Sequence[str], split: Split) -> list[Utterance]:
        return [_anyone(text, voices[split], config, rng) for text in texts]

    asked = config.heard * 6 // 10
    questions = world.questions("train", asked)
    told = config.captioned + config.felt
    sentences = world.sentences("train", config.heard - asked + told)
    mannered, others = sentences[:told], sentences[told:]
    # In an order of their own: what is left behind those is of the largest families alone, and a voice that read only
    # that reads the others badly.
    readings = world.sentences("train", config.spoken, stream=READINGS)
    # Answers are few kinds of sentences, which are soon said well; what is read aloud is anything.
    answers = list(dict.fromkeys(item.answer for item in questions))[: config.spoken // 3]
    spoken = list(dict.fromkeys([*answers, *readings]))[: config.spoken]
    place = {text: index for index, text in enumerate(spoken)}
    test_questions = world.questions("test", config.test_questions)
    test_sentences = world.sentences("test", config.test_heard + config.test_spoken)
    sets = {
        "heard": heard([*(item.question for item in questions), *others], "train"),
        "spoken": [Utterance(text, Delivery(target)) for text in spoken],
        "test_heard": heard(test_sentences[: config.test_heard], "test"),
        "test_questions": heard([item.question for item in test_questions], "test"),
        "test_spoken": [Utterance(text, Delivery(target)) for text in test_sentences[config.test_heard :]],
        "test_answers": [Utterance(item.answer, Delivery(target)) for item in test_questions[: config.test_spoken]],
    }
    plan = Plan(sets, questions, test_questions, [place.get(item.answer, -1) for item in questions], {}, {}, {})
    if config.looked:
        plan.sets["looked"] = heard(spoken_asks("train", config.looked, world), "train")
        plan.sets["test_looked"] = heard(spoken_asks("test", config.test_looked, world), "test")
    if config.followed:
        plan.sets["followed"] = heard(spoken_follow_ups("train", config.followed, world), "train")
        plan.sets["test_followed"] = heard(spoken_follow_ups("test", config.test_followed, world), "test")
    _translate(plan, world, config, voices, rng)
    _manner(plan, config, voices, mannered, test_sentences)
    return plan


def _check(config: WorldConfig) -> None:
    for name, given, texts, what in (
        ("looked", config.looked, picture_question_texts(), "question about a picture"),
        ("followed", config.followed, follow_up_texts(), "follow-up"),
    ):
        if 0 < given < len(texts):
            raise BadConfig(
                f"world.{name}: {given} recordings, expected at least {len(texts)}, so that every {what} is heard in "
                f"training; raise it to {len(texts)} or more"
            )
    if config.test_looked % 2:
        raise BadConfig(
            f"world.test_looked: {config.test_looked} recordings, expected an even number, because every two are asked "
            f"about the same two pictures; take {config.test_looked + 1}"
        )


def _anyone(text: str, voices: Sequence[str], config: WorldConfig, rng: random.Random) -> Utterance:
    voice = Voice(rng.choice(voices), rng.randint(130, 220), rng.randint(20, 80), rng.randint(25, 75))
    return Utterance(text, Delivery(voice, round(rng.uniform(-9, 3), 1), round(rng.uniform(*config.noise_db), 1)))


def _translate(
    plan: Plan, world: World, config: WorldConfig, voices: dict[Split, list[str]], rng: random.Random
) -> None:
    """Mandarin and English sentences that mean the same, each spoken in one of the two languages."""
    if not (config.mandarin or config.english):
        return
    chinese = dict(zip(SPLITS, world.split_voices(voice_pool("cmn"), groups()), strict=True))
    numbers = {
        "train": (config.mandarin, config.english),
        "test": (config.test_mandarin, config.test_english),
    }
    for split in SPLITS:
        mandarin, english = numbers[split]
        told = pairs(split, mandarin + english, config.seed)
        head = "test_" if split == "test" else ""
        if config.mandarin:
            plan.pairs[f"{head}mandarin"] = told[:mandarin]
            plan.sets[f"{head}mandarin"] = [_anyone(pair.zh, chinese[split], config, rng) for pair in told[:mandarin]]
        if config.english:
            plan.pairs[f"{head}english"] = told[mandarin:]
            plan.sets[f"{head}english"] = [_anyone(pair.en, voices[split], config, rng) for pair in told[mandarin:]]


def _manner(
    plan: Plan, config: WorldConfig, voices: dict[Split, list[str]], texts: Sequence[str], test_texts: Sequence[str]
) -> None:
    """Sentences of which matters who says them how."""
    if not (config.captioned or config.felt):
        return
    for split in SPLITS:
        head = "test_" if split == "test" else ""
        said = test_texts if split == "test" else texts
        captioned = config.test_captioned if split == "test" else config.captioned
        felt = config.test_felt if split == "test" else config.felt
        people = speakers(voices[split])
        described = manners(split, captioned, config.seed, people)
        moved = emotions(split, felt, config.seed, people)
        if config.captioned:
            plan.manners[f"{head}captioned"] = [manner for manner, _ in described]
            plan.sets[f"{head}captioned"] = [
                Utterance(said[i % len(said)], delivery) for i, (_, delivery) in enumerate(described)
            ]
        if config.felt:
            plan.emotions[f"{head}felt"] = [emotion for emotion, _ in moved]
            plan.sets[f"{head}felt"] = [
                Utterance(said[-1 - i % len(said)], delivery) for i, (_, delivery) in enumerate(moved)
            ]
