"""The rows of the demo's training: every kind renders, what is learned is the right answer, sound and words agree."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from lab import PLAIN_WORLD, Marked, recording, small_lab

from nexus.data.chat import TASKS, Rendered
from nexus.demo.films import film_talk
from nexus.demo.films import render as play
from nexus.demo.lab import Lab
from nexus.demo.manner import EMOTIONS, MANNERS, caption, emotion_answer
from nexus.demo.phrases import FAMILIES, FAR_SUMS, key_of, number_words
from nexus.demo.pictures import Scene, describe
from nexus.demo.pictures import render as draw_picture
from nexus.demo.rows import (
    COPY,
    DESCRIBE,
    EARS,
    HEARD_TASKS,
    SILENT,
    SILENT_TASKS,
    Heard,
    check_mixture,
    dialogue_row,
    film_row,
    heard_rows,
    picture_row,
    sums_row,
    typed_row,
)
from nexus.demo.spoken import RATE_HZ
from nexus.demo.stages import prepare_lines
from nexus.demo.talks import FURTHER, Dialogue, answer_to, follow_up_texts, picture_question_texts
from nexus.errors import BadConfig
from nexus.recipe import Recipe
from nexus.train.parallel import Ranks
from nexus.train.standins import CHARACTERS
from nexus.types import IGNORE, Audio, Image, Text, Turn, Video

EACH = dict.fromkeys(HEARD_TASKS, 2)
NUM_TYPED = 1_000


@pytest.fixture(scope="module")
def lab() -> Lab:
    return small_lab()


def spelled(lab: Lab, *texts: str) -> str:
    """Texts as the uncased tokenizer gives them back."""
    return " ".join(lab.tokenizer.decode(lab.tokenizer.encode(text)) for text in texts)


def read_back(lab: Lab, row: Rendered) -> list[tuple[str, str]]:
    """(question, what is learned as its answer) of a rendered conversation, from its tokens and labels alone."""
    asked: list[str] = []
    told: list[str] = []
    starts = [at for at, token in enumerate(row.tokens) if token == lab.tokenizer.ids["<|im_start|>"]]
    for start, end in zip(starts, [*starts[1:], len(row.tokens)], strict=True):
        role, _, words = lab.tokenizer.decode(row.tokens[start:end]).partition(" ")
        learned = [label for label in row.labels[start:end] if label != IGNORE]
        match role:
            case "user":
                asked.append(words)
                assert not learned
            case "assistant":
                assert learned[-1] == lab.tokenizer.stop
                told.append(lab.tokenizer.decode(learned[:-1]))
                assert told[-1] == words
            case _:
                assert role == "system" and not learned
    return list(zip(asked, told, strict=True))


def written(turns: tuple[Turn, ...]) -> list[str]:
    return [part.text for turn in turns if turn.role == "assistant" for part in turn.parts if isinstance(part, Text)]


@pytest.fixture(scope="module")
def heard(lab: Lab) -> list[Heard]:
    """What is heard in some steps: two rows of every task each."""
    return [row for step in range(12) for row in heard_rows(lab, EACH, "sft")(step)]


def sound_of(turns: tuple[Turn, ...]) -> Audio:
    (sound,) = (part for turn in turns for part in turn.parts if isinstance(part, Audio))
    return sound


def test_every_kind_of_row_is_learned_from_by_the_model(lab: Lab) -> None:
    rows = [row(lab, random.Random(0)) for row in SILENT.values()]
    rows += [lab.render(row.turns) for row in heard_rows(lab, dict.fromkeys(HEARD_TASKS, 1), "sft")(0)]
    assert len(rows) == len(SILENT) + len(HEARD_TASKS)
    assert {medium.__class__.__name__ for row in rows for medium in row.media} == {"Audio", "Image", "Video"}
    with torch.no_grad():
        losses = [float(lab.model(lab.batch([row]))["text"]) for row in rows]
        together = float(lab.model(lab.batch(rows))["text"])
    assert all(0 < loss < 20 for loss in losses) and min(losses) < together < max(losses)


def test_the_labels_of_what_is_heard_are_exactly_the_answers(lab: Lab, heard: list[Heard]) -> None:
    for turns, _, _ in heard:
        row = lab.render(turns)
        assert [answer for _, answer in read_back(lab, row)] == written(turns)
        assert len(row.media) == len([part for turn in turns for part in turn.parts if not isinstance(part, Text)])


def kind_of(lab: Lab, question: str, answer: str, known: dict[str, set[Any]]) -> str:
    """The kind of a typed question, by its instruction; its answer must be right."""
    tasks = ("asr", "s2tt", "s2tt_en_zh", "ser", "caption")
    instructed = {task: spelled(lab, TASKS[task].instruction) for task in tasks}
    task = next((task for task, words in instructed.items() if question.endswith(f" {words}")), "ask")
    words = question.removesuffix(instructed.get(task, "")).strip()
    match task:
        case "asr":
            assert answer == words and (words in known["sentences"] or words in {zh for zh, _ in known["pairs"]})
        case "s2tt":
            assert (words, answer) in known["pairs"]
        case "s2tt_en_zh":
            assert (answer, words) in known["pairs"]
        case "ser":
            emotion, _, said = words.partition(" ")
            assert emotion in EMOTIONS and answer == emotion_answer(emotion) and said in known["sentences"]
        case "caption":
            (manner,) = [manner for manner in MANNERS if caption(manner) == answer]
            place = "noisy" if manner.noisy else "quiet"
            assert words.split()[:4] == [manner.gender, manner.pace, manner.pitch, place]
        case _:
            assert (question, answer) in known["talks"]
    return task


def test_typed_rows_mix_their_kinds_by_their_shares_and_every_answer_is_right(lab: Lab) -> None:
    known: dict[str, set[Any]] = {
        "sentences": set(lab.sentences),
        "talks": set(lab.talks),
        "pairs": {(pair.zh, pair.en) for pair in lab.pairs},
    }
    recalled, kinds = 0, Counter[str]()
    rng = random.Random(1)
    for _ in range(NUM_TYPED):
        row = typed_row(lab, rng)
        talk = read_back(lab, row)
        assert not row.media
        if len(talk) == 4:
            assert talk.pop() == (spelled(lab, COPY), talk[2][0])
            recalled += 1
        assert len(talk) == 3
        kinds.update(kind_of(lab, *ask, known) for ask in talk)
    shares = {kind: count / kinds.total() for kind, count in kinds.items()}
    assert recalled / NUM_TYPED == pytest.approx(0.45 / 2, abs=0.03)
    assert shares == pytest.approx(
        {"ask": 0.45, "asr": 0.3, "s2tt": 0.075, "s2tt_en_zh": 0.075, "ser": 0.05, "caption": 0.05}, abs=0.03
    )


class Conversations:
    """Training dialogues by all that is said in them, and by the picture they are about."""

    def __init__(self, lab: Lab) -> None:
        self._known: dict[tuple[str, ...], list[Dialogue]] = defaultdict(list)
        for one in lab.dialogues:
            self._known[*(text for turn in one.turns for text in turn), one.question, one.answer].append(one)

    def find(self, texts: Sequence[str], media: Sequence[object]) -> Dialogue | None:
        shown = [medium.pixels for medium in media if isinstance(medium, Image)]
        found = (
            one
            for one in self._known.get((*texts,), [])
            if len(shown) == bool(one.scene)
            and all(one.scene and np.array_equal(draw_picture(one.scene), pixels) for pixels in shown)
        )
        return next(found, None)


def assert_right(told: list[str], asks: list[tuple[str, str]]) -> None:
    """The words of a question and of its answer are those of exactly one thing that was told."""
    for asked, answer in asks:
        of = [words for words in map(str.split, told) if {*answer.split()} - {"is"} <= {*words}]
        about = {*asked.split()} - {"tell", "me", "what", "colour", "where", "is", "in"}
        assert len(of) == 1 and about <= {*of[0]}, (asked, answer)


def assert_goes_on(dialogue: Dialogue, asks: list[tuple[str, str]]) -> None:
    """A training conversation is followed by the questions of its kind, rightly answered, none of them twice."""
    assert len(asks) in ({0, FURTHER} if dialogue.kind == "told" else {0} if dialogue.kind == "sum" else {FURTHER})
    match dialogue.kind:
        case "told":
            assert_right([told for _, told in dialogue.turns], asks)
            assert len({(dialogue.question, dialogue.answer), *asks}) == 1 + len(asks)
        case "fact":
            for asked, answer in asks:
                assert answer.split()[0] == ("yes" if is_true(asked) else "no"), (asked, answer)
        case "picture":
            assert dialogue.scene and len({*dialogue.turns, *asks}) == 1 + len(asks)
            assert all(answer_to(dialogue.scene, asked) == answer for asked, answer in asks)


def is_true(asked: str) -> bool:
    facts = [f for f in FAMILIES if f.name in ("capital", "opposite")]
    statements = {said for family in facts for topic in family.topics for said in family.talk(topic).statements}
    said = re.fullmatch(r"is (?:it true that )?(.+?) (?:is )?the (.+)", asked)
    return said is not None and f"{said[1]} is the {said[2]}" in statements


def test_conversations_in_writing_are_training_ones_and_go_on(lab: Lab) -> None:
    """Or four things are told of, no two of which share a word, and eight questions asked after that."""
    known, rng, met = Conversations(lab), random.Random(4), Counter[str]()
    for _ in range(200):
        row = dialogue_row(lab, rng)
        talk = read_back(lab, row)
        texts = [text for ask in talk for text in ask]
        dialogue = known.find(texts[:4], row.media) or known.find(texts[:6], row.media)
        if dialogue:
            assert_goes_on(dialogue, talk[len(dialogue.turns) + 1 :])
        else:
            assert len(talk) == 12 and {asked for asked, _ in talk[4:]} <= {*follow_up_texts()}
            assert_right([told for _, told in talk[:4]], talk[4:])
            assert len({*talk}) == 12
            assert not row.media
        met["many" if dialogue is None else dialogue.kind] += 1
    assert min(met.values()) > 10 and len(met) == 5


def test_a_row_of_sums_is_right_and_beyond_what_the_world_asks(lab: Lab) -> None:
    asked = {key_of(family, topic) for family in FAMILIES for topic in family.topics}
    assert asked.isdisjoint(key_of(family, topic) for family in FAR_SUMS for topic in family.topics)
    questions = {ask for family in FAR_SUMS for topic in family.topics for ask in family.talk(topic).asks}
    numbers = {number_words(number): number for number in range(100)}
    met = Counter[str]()
    for seed in range(30):
        talk = read_back(lab, sums_row(lab, random.Random(seed)))
        assert len(talk) == 10 and questions.issuperset(talk)
        for _, answer in talk:
            problem, result = answer.split(" is ")
            operation = "plus" if " plus " in problem else "minus"
            left, right = (numbers[side] for side in problem.split(f" {operation} "))
            assert numbers[result] == (left + right if operation == "plus" else left - right)
            met[operation] += 1
    assert met["minus"] / met.total() == pytest.approx(0.7, abs=0.1)


def test_talks_about_pictures_and_films_are_about_training_ones(lab: Lab) -> None:
    rng = random.Random(2)
    shown = {picture.tobytes() for picture in lab.pictures}
    for _ in range(40):
        row = picture_row(lab, rng)
        (picture,) = row.media
        assert isinstance(picture, Image) and picture.pixels is not None and picture.pixels.tobytes() in shown
        scene = lab.scenes[[p.tobytes() for p in lab.pictures].index(picture.pixels.tobytes())]
        talk = read_back(lab, row)
        assert len({question for question, _ in talk}) == 4
        for question, answer in talk:
            assert answer == (describe(scene) if question == DESCRIBE else answer_to(scene, question))
        row = film_row(lab, rng)
        (video,) = row.media
        assert isinstance(video, Video) and video.frames is not None
        (film,) = [film for film in lab.films if np.array_equal(play(film), video.frames)]
        assert set(read_back(lab, row)) <= set(film_talk(film).asks) and len(row.media) == 1


def recorded(lab: Lab, turns: tuple[Turn, ...]) -> tuple[str, int]:
    sound = sound_of(turns)
    name, place = recording(lab.plan, sound)
    assert sound.samples is not None and len(sound.samples) == lab.waves[name].lengths[place]
    return name, place


def test_what_is_heard_and_what_is_spelled_belong_together(lab: Lab, heard: list[Heard]) -> None:
    met = Counter[str]()
    for turns, words, spelled in heard:
        name, place = recorded(lab, turns)
        assert words == lab.plan.sets[name][place].text and spelled == lab.plan.spelling(name)[place]
        met[name] += 1
    assert set(met) == {*EARS, "captioned", "felt"}


def test_the_answer_is_right_for_what_was_heard(lab: Lab, heard: list[Heard]) -> None:
    """Each task's answer from the plan, by other ways than the rows take."""
    plans, met, known = lab.plan, Counter[str](), Conversations(lab)
    answers = {item.question: item.answer for item in plans.questions}
    for turns, _, _ in heard:
        name, place = recorded(lab, turns)
        said = plans.sets[name][place].text
        turns, recalled, again = split(turns)
        assert recalled in ([], [said]) and (name == "looked" or not again or name == "followed")
        (*_, answer) = written(turns)
        instruction = next((part.text for part in turns[0].parts if isinstance(part, Text)), "")
        task = next((task for task, row in TASKS.items() if row.instruction and row.instruction == instruction), name)
        match task:
            case "asr":
                assert answer == said
            case "s2tt":
                assert name == "mandarin" and (said, answer) in {(pair.zh, pair.en) for pair in plans.pairs[name]}
            case "s2tt_en_zh":
                assert name == "english" and (said, answer) in {(pair.en, pair.zh) for pair in plans.pairs[name]}
            case "ser":
                assert answer.split()[-1] == plans.emotions["felt"][place] and name == "felt"
            case "caption":
                manner = plans.manners["captioned"][place]
                assert name == "captioned" and {manner.gender, manner.pitch, manner.pace} < set(answer.split())
            case "heard":
                assert answer == answers[said]
            case "looked":
                assert answer == answer_to(seen(lab, turns), said) and again
                assert all(answer_to(seen(lab, turns), question) == told for question, told in again)
            case _:
                assert task == "followed"
                dialogue = known.find([*before(turns), said, answer], pictures(turns))
                assert dialogue is not None
                assert_goes_on(dialogue, again)
        met[task] += 1
    assert len(met) == 8 and sum(met.values()) == len(heard)


def typed(turn: Turn) -> str:
    (part,) = turn.parts
    assert isinstance(part, Text)
    return part.text


def split(turns: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], list[str], list[tuple[str, str]]]:
    """A talk up to the answer to what is heard; its words, where they are asked for next; typed questions after it."""
    (heard_at,) = (at for at, turn in enumerate(turns) if any(isinstance(part, Audio) for part in turn.parts))
    rest = turns[heard_at + 2 :]
    asks = [(typed(rest[at]), *written(rest[at : at + 2])) for at in range(0, len(rest), 2)]
    recalled = [told for asked, told in asks if asked == COPY]
    assert len(recalled) <= 1 and (not recalled or asks[0][0] == COPY)
    return turns[: heard_at + 2], recalled, [(asked, told) for asked, told in asks if asked != COPY]


def test_half_of_what_is_heard_is_asked_for_once_more(lab: Lab) -> None:
    for task in ("chat", "ser", "caption", "s2tt", "avqa"):
        rows = [row.turns for step in range(40) for row in heard_rows(lab, {task: 5}, "align")(step)]
        share = sum(bool(split(turns)[1]) for turns in rows) / len(rows)
        assert share == pytest.approx(0.5, abs=0.12), task


def seen(lab: Lab, turns: tuple[Turn, ...]) -> Scene:
    """The training scene whose picture is shown."""
    (picture,) = pictures(turns)
    assert picture.pixels is not None
    (scene,) = (scene for scene in lab.scenes if np.array_equal(draw_picture(scene), picture.pixels))
    return scene


def pictures(turns: tuple[Turn, ...]) -> list[Image]:
    return [part for turn in turns for part in turn.parts if isinstance(part, Image)]


def before(turns: tuple[Turn, ...]) -> list[str]:
    return [part.text for turn in turns[:-2] for part in turn.parts if isinstance(part, Text)]


def test_conversations_show_the_picture_they_are_about_once(lab: Lab) -> None:
    known, with_picture = Conversations(lab), 0
    for step in range(20):
        for turns, words, _ in heard_rows(lab, {"multiturn": 4}, "sft")(step):
            assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2) and len(turns) >= 4
            asked, _, _ = split(turns)
            dialogue = known.find([*before(asked), words, *written(asked)[-1:]], pictures(turns))
            assert dialogue is not None
            is_about_one = dialogue.kind == "picture"
            assert len(pictures(turns)) == is_about_one and [*turns[0].parts][:is_about_one] == pictures(turns)
            with_picture += is_about_one
    assert with_picture >= 5


@pytest.mark.parametrize("stage", ["align", "sft"])
def test_the_same_step_has_the_same_rows_and_another_step_has_others(stage: str, lab: Lab) -> None:
    def fingerprints(step: int) -> Iterator[tuple[object, ...]]:
        for turns, words, _ in heard_rows(lab, EACH, stage)(step):
            yield (*recorded(lab, turns), words, *written(turns), *before(turns))

    first = [*fingerprints(3)]
    assert first == [*fingerprints(3)] and len(first) == 2 * len(HEARD_TASKS)
    for step in (0, 4):
        assert len(set(first) & set(fingerprints(step))) < len(first) / 2
    for row in SILENT.values():
        one, same, other = (row(lab, lab.rng(stage, step)) for step in (3, 3, 4))
        assert one.tokens == same.tokens != other.tokens


def test_two_stages_hear_other_rows(lab: Lab) -> None:
    one, other = ({recorded(lab, row.turns) for row in heard_rows(lab, EACH, stage)(0)} for stage in ("align", "sft"))
    assert one != other


def test_an_epoch_hears_every_recording_of_a_task(lab: Lab) -> None:
    for task, sets in (("ser", ["felt"]), ("caption", ["captioned"]), ("s2tt", ["mandarin", "english"])):
        rows = heard_rows(lab, {task: 5}, "align")
        places = {(name, i) for name in sets for i in range(len(lab.plan.sets[name]))}
        steps = -(-len(places) // 5)
        assert {recorded(lab, row.turns) for step in range(steps) for row in rows(step)} == places


def test_nothing_is_learned_from_places_without_sound(lab: Lab) -> None:
    """Also not from questions and conversations whose only recording is missing."""
    waves = {name: Marked(number, [u.text for u in said]) for number, (name, said) in enumerate(lab.plan.sets.items())}
    for name, each in waves.items():
        each.lengths[:: 1 if name == "followed" else 5] = 0
    waves["followed"].lengths[7] = RATE_HZ
    holey = replace(lab, waves=dict(waves))
    rows_at, met = heard_rows(holey, EACH, "sft"), Counter[str]()
    for step in range(12):
        for turns, _, _ in rows_at(step):
            name, place = recorded(holey, turns)
            assert place in waves[name].places
            met[name] += 1
    assert set(met) == {*EARS, "captioned", "felt"}
    assert {dialogue.question for dialogue in holey.asked_aloud} == {lab.plan.sets["followed"][7].text}
    lines = prepare_lines(holey, holey.recipe.stage("speak"), False, Ranks(), lambda rows: None)
    said = [place for place in lab.plan.replies if place in waves["spoken"].places]
    assert len(waves["spoken"].places) <= len(lines) <= len(waves["spoken"].places) + len(said)


def test_a_mixture_gives_as_many_rows_of_each_task_and_no_silent_ones(lab: Lab) -> None:
    mixture = {"asr": 3, "ser": 1, "multiturn": 2, **dict.fromkeys(SILENT_TASKS, 4)}
    names = Counter(recorded(lab, row.turns)[0] for row in heard_rows(lab, mixture, "sft")(7))
    assert names["felt"] == 1 and names["followed"] == 2 and names.total() == 6


def test_an_unknown_task_is_refused_and_not_left_out(lab: Lab) -> None:
    with pytest.raises(BadConfig, match=r"stages\.sft\.mixture: unknown task 'vqa', expected some of asr, ") as refused:
        check_mixture("sft", {"asr": 1, "vqa": 8}, HEARD_TASKS, lab.config)
    assert "\n" not in str(refused.value)


def test_a_task_of_which_the_world_holds_nothing_is_refused() -> None:
    nothing = [f"world.{n}=0" for n in ("mandarin", "english", "captioned", "felt", "looked", "followed", "films")]
    world = Recipe.load("nexus-tiny", nothing).world
    assert world is not None
    check_mixture("sft", {"asr": 1, "picture": 1}, (*HEARD_TASKS, *SILENT_TASKS), world)
    for task in ("film", "ser", "avqa", "multiturn", "caption", "s2tt"):
        with pytest.raises(BadConfig, match=rf"task '{task}' has nothing to learn from, world\."):
            check_mixture("sft", {task: 1}, (*HEARD_TASKS, *SILENT_TASKS), world)


def test_typed_rows_tell_of_nothing_that_the_world_leaves_out() -> None:
    plain = small_lab(0, PLAIN_WORLD)
    rng = random.Random(0)
    texts = [plain.tokenizer.decode(typed_row(plain, rng).tokens) for _ in range(60)]
    told = " ".join(texts)
    assert not any(word in told for word in ("equivalent", "emotion in this speech", "describe the speech"))
    assert told.isascii()


def test_all_that_is_spelled_in_training_can_be_spelled(lab: Lab) -> None:
    for name in (*EARS, "captioned", "felt"):
        assert set("".join(lab.spelling[name])) <= set(CHARACTERS), name
    assert set("".join((*picture_question_texts(), *follow_up_texts()))) <= set(CHARACTERS)
    assert set(lab.spelling) == set(lab.plan.sets)
