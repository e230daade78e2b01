"""The rows of the demo's training: what is typed, what is seen, what is heard, task by task.

Every draw is made by the random numbers it is given; what is heard comes in length buckets by the step's number.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from nexus.data.chat import SYSTEM, TASKS, Rendered, task_turns
from nexus.data.stream import Buckets
from nexus.demo.films import FPS, film_questions, film_talk, films
from nexus.demo.films import render as play
from nexus.demo.lab import Lab
from nexus.demo.manner import EMOTIONS, MANNERS, caption, draw, emotion_answer
from nexus.demo.phrases import FAR_SUMS, Item
from nexus.demo.pictures import describe, picture_questions
from nexus.demo.pictures import render as draw_picture
from nexus.demo.talks import Dialogue, further_asks, told_many
from nexus.errors import BadConfig
from nexus.recipe import WorldConfig
from nexus.types import Audio, Image, Text, Turn, Video

DESCRIBE = "please describe the picture"
COPY = TASKS["asr"].instruction
RECALLED = 0.5  # share of what is heard after whose answer the words are asked for as well: one sound, two lessons
SUMS = 10  # of a row that holds nothing else
ASKED_ALOUD = {"exists": 2}  # as often as the others: two words must be heard and found at one place
SEEN_AGAIN = 2  # typed questions that follow a spoken one about the same picture
# Sets from which the ears learn to spell, and those told in some manner, of which they may learn that as well.
EARS = ("heard", "mandarin", "english", "looked", "followed")
MANNERED = ("captioned", "felt")
HEARD_TASKS = ("asr", "chat", "s2tt", "ser", "caption", "avqa", "multiturn")


class Heard(NamedTuple):
    """A row with a sound: its turns, the words that are heard in it, and how an ear that spells writes them down."""

    turns: tuple[Turn, ...]
    words: str
    spelled: str


def tokenizer_texts(lab_sentences: Sequence[str], chinese: Sequence[str], instructions: int = 50) -> list[str]:
    """Texts from which the stand-in tokenizer learns its units: training sentences of both languages, templates."""
    fixed = (SYSTEM, DESCRIBE, *(task.instruction for task in TASKS.values()), "system", "user", "assistant")
    return [*lab_sentences, *chinese, *fixed * instructions]


def typed_row(lab: Lab, rng: random.Random, turns: int = 3) -> Rendered:
    """A typed conversation of several matters."""
    talk: list[Turn] = []
    for _ in range(turns):
        talk += _typed(lab, rng)
    if isinstance(asked := talk[-2].parts[0], Text) and len(talk[-2].parts) == 1 and rng.random() < RECALLED:
        talk += _turns((Text(COPY),), asked.text)
    return lab.render(talk)


def _typed(lab: Lab, rng: random.Random) -> tuple[Turn, Turn]:
    """A question; words to copy under the transcription instruction, or to translate under the translation's; or
    words told to be said in some manner, under the instructions of caption and emotion: so that a frozen language
    model already knows what it will be asked about sound."""
    config = lab.config
    bilingual, mannered = bool(config.mandarin or config.english), bool(config.captioned or config.felt)
    kinds = {"ask": 0.45, "copy": 0.3, "translate": 0.15 * bilingual, "manner": 0.1 * mannered}
    match rng.choices(list(kinds), list(kinds.values()))[0]:
        case "ask":
            question, answer = rng.choice(lab.talks)
            return _turns((Text(question),), answer)
        case "copy":
            text = rng.choice(lab.pairs).zh if bilingual and rng.random() < 0.2 else rng.choice(lab.sentences)
            return _turns((Text(text), Text(COPY)), text)
        case "translate":
            pair = rng.choice(lab.pairs)
            if rng.random() < 0.5:
                return _turns((Text(pair.zh), Text(TASKS["s2tt"].instruction)), pair.en)
            return _turns((Text(pair.en), Text(TASKS["s2tt_en_zh"].instruction)), pair.zh)
        case _:
            said = rng.choice(lab.sentences)
            if rng.random() < 0.5:
                emotion = rng.choice(EMOTIONS)
                return _turns((Text(f"{emotion} {said}"), Text(TASKS["ser"].instruction)), emotion_answer(emotion))
            manner = draw(rng)
            words = f"{manner.gender} {manner.pace} {manner.pitch} {'noisy' if manner.noisy else 'quiet'} {said}"
            return _turns((Text(words), Text(TASKS["caption"].instruction)), caption(manner))


def dialogue_row(lab: Lab, rng: random.Random) -> Rendered:
    """A conversation in writing that needs more than its last sentence, and goes on."""
    dialogue = rng.choice(lab.dialogues)
    if dialogue.kind == "told" and rng.random() < 0.5:
        return lab.render([turn for asked, said in told_many(lab.world, rng) for turn in _turns((Text(asked),), said)])
    return lab.render((*dialogue_turns(lab, dialogue, rng, aloud=False)[0], *_further(dialogue, rng)))


def _further(dialogue: Dialogue, rng: random.Random) -> list[Turn]:
    return [turn for asked, told in further_asks(dialogue, rng) for turn in _turns((Text(asked),), told)]


def picture_row(lab: Lab, rng: random.Random, turns: int = 4) -> Rendered:
    """A talk about one picture: some of its questions, sometimes its description, in any order."""
    index = rng.randrange(len(lab.scenes))
    scene = lab.scenes[index]
    asks = [(item.question, item.answer) for item in picture_questions(scene, rng)]
    asks.append((DESCRIBE, describe(scene)))
    return lab.render(_about(Image(pixels=lab.pictures[index]), rng.sample(asks, turns)))


def film_row(lab: Lab, rng: random.Random) -> Rendered:
    """A talk about one film: a question of every family of its kind, in any order."""
    film = rng.choice(lab.films)
    asks = [(item.question, item.answer) for item in film_questions(film, rng)]
    return lab.render(_about(Video(frames=play(film), fps=FPS), rng.sample(asks, len(asks))))


def sums_row(lab: Lab, rng: random.Random) -> Rendered:
    """Sums beyond those of the world's questions, one after the other."""
    talk: list[Turn] = []
    for family in rng.choices(FAR_SUMS, [family.asked for family in FAR_SUMS], k=SUMS):
        question, answer = rng.choice(family.talk(rng.choice(family.topics)).asks)
        talk += _turns((Text(question),), answer)
    return lab.render(talk)


# Task -> one row of it, for the tasks that hold no sound.
SILENT: dict[str, Callable[[Lab, random.Random], Rendered]] = {
    "text": typed_row,
    "dialogue": dialogue_row,
    "sums": sums_row,
    "picture": picture_row,
    "film": film_row,
}
SILENT_TASKS = tuple(SILENT)


def dialogue_turns(
    lab: Lab, dialogue: Dialogue, rng: random.Random, aloud: bool, answer: bool = True
) -> tuple[tuple[Turn, ...], str]:
    """The turns of a conversation of several, its last question spoken (`aloud`) or typed, and its words."""
    question: Audio | Text = Text(dialogue.question)
    if aloud:
        question = lab.waves["followed"][rng.choice(lab.recordings["followed"][dialogue.question])]
    talk: list[Turn] = []
    for number, (asked, told) in enumerate(dialogue.turns):
        seen = (Image(pixels=draw_picture(dialogue.scene)),) if dialogue.scene and number == 0 else ()
        talk += [Turn("user", (*seen, Text(asked))), Turn("assistant", (Text(told),))]
    talk.append(Turn("user", (question,)))
    return (*talk, *((Turn("assistant", (Text(dialogue.answer),)),) if answer else ())), dialogue.question


MADE_OF = {  # task -> the numbers of the world of which at least one must not be 0
    "s2tt": ("mandarin", "english"),
    "caption": ("captioned",),
    "ser": ("felt",),
    "avqa": ("looked",),
    "multiturn": ("followed",),
    "dialogue": ("followed",),
    "film": ("films",),
}


def check_mixture(stage: str, mixture: Mapping[str, int], known: Sequence[str], world: WorldConfig) -> None:
    """Raises BadConfig for a task that a stage does not know, or of which the world holds nothing."""
    for task in mixture:
        if task not in known:
            raise BadConfig(
                f"stages.{stage}.mixture: unknown task {task!r}, expected some of {', '.join(known)}; "
                "rename or remove it"
            )
        numbers = MADE_OF.get(task, ())
        if numbers and not any(getattr(world, number) for number in numbers):
            named = " and ".join(f"world.{number}" for number in numbers)
            raise BadConfig(f"stages.{stage}.mixture: task {task!r} has nothing to learn from, {named} is 0; raise it")


def heard_rows(lab: Lab, mixture: dict[str, int], stage: str) -> Callable[[int], list[Heard]]:
    """What is heard at a step: `mixture` rows of each task that has sound."""
    lessons = [_lesson(lab, task, rows, stage) for task, rows in mixture.items() if task in HEARD_TASKS]

    def rows(step: int) -> list[Heard]:
        return [row for lesson in lessons for row in lesson(step)]

    return rows


def _lesson(lab: Lab, task: str, rows: int, stage: str) -> Callable[[int], list[Heard]]:
    if task in ("avqa", "multiturn"):
        ask = _talk_about_picture if task == "avqa" else _follow_up

        def drawn(step: int) -> list[Heard]:
            rng = lab.rng(f"{stage} {task}", step)
            return [ask(lab, rng) for _ in range(rows)]

        return drawn
    places = _places(lab, task)
    buckets = Buckets([int(lab.waves[name].lengths[i]) for name, i in places], rows, lab.seed(f"{stage} {task}"))

    def bucket(step: int) -> list[Heard]:
        chosen = [places[index] for index in buckets.at(step)]
        rng = lab.rng(f"{stage} {task} recalled", step)
        rows = []
        for name, i in chosen:
            turns, words = heard_turns(lab, task, name, i), lab.plan.sets[name][i].text
            if task != "asr" and rng.random() < RECALLED:
                turns += _turns((Text(COPY),), words)
            rows.append(Heard(turns, words, lab.spelling[name][i]))
        return rows

    return bucket


def _places(lab: Lab, task: str) -> list[tuple[str, int]]:
    """(set, place) of every recording a task is learned from; places without sound are left out."""
    sets: tuple[str, ...]
    match task:
        case "asr":
            sets = tuple(name for name in ("heard", "mandarin", "english") if name in lab.plan.sets)
        case "chat":
            return [("heard", i) for i in lab.waves["heard"].places if i < len(lab.plan.questions)]
        case "s2tt":
            sets = tuple(name for name in ("mandarin", "english") if name in lab.plan.sets)
        case "caption":
            sets = ("captioned",)
        case "ser":
            sets = ("felt",)
        case _:
            raise AssertionError(task)
    return [(name, i) for name in sets for i in lab.waves[name].places]


def heard_turns(lab: Lab, task: str, name: str, i: int) -> tuple[Turn, ...]:
    """The turns of one recording under a task: its words, their answer, their translation, or how they are said."""
    plan, sound = lab.plan, lab.waves[name][i]
    match task:
        case "asr":
            return task_turns("asr", sound=sound, text=plan.sets[name][i].text)
        case "chat":
            return task_turns("chat", sound=sound, text=plan.questions[i].answer)
        case "s2tt" if name.endswith("mandarin"):
            return task_turns("s2tt", sound=sound, text=plan.pairs[name][i].en)
        case "s2tt":
            return task_turns("s2tt_en_zh", sound=sound, text=plan.pairs[name][i].zh)
        case "caption":
            return task_turns("caption", sound=sound, text=caption(plan.manners[name][i]))
        case _:
            return task_turns("ser", sound=sound, text=emotion_answer(plan.emotions[name][i]))


def _talk_about_picture(lab: Lab, rng: random.Random) -> Heard:
    """A picture and a spoken question about it, then sometimes its words, and typed questions about the picture."""
    index = rng.randrange(len(lab.scenes))
    asks = picture_questions(lab.scenes[index], rng)
    heard = [ask for ask in asks if ask.question in lab.recordings["looked"]]
    (item,) = rng.choices(heard, [ASKED_ALOUD.get(ask.family, 1) for ask in heard])
    more = rng.sample([ask for ask in asks if ask != item], SEEN_AGAIN)
    question = lab.waves["looked"][rng.choice(lab.recordings["looked"][item.question])]
    talk = seen_and_heard(Image(pixels=lab.pictures[index]), question, item)
    if rng.random() < RECALLED:
        talk += _turns((Text(COPY),), item.question)
    for other in more:
        talk += _turns((Text(other.question),), other.answer)
    return Heard(talk, item.question, item.question)


def seen_and_heard(picture: Image, question: Audio, item: Item) -> tuple[Turn, ...]:
    """A picture with a spoken question, and its answer."""
    return Turn("user", (picture, question)), Turn("assistant", (Text(item.answer),))


def _follow_up(lab: Lab, rng: random.Random) -> Heard:
    dialogue = rng.choice(lab.asked_aloud)
    turns, words = dialogue_turns(lab, dialogue, rng, aloud=True)
    return Heard((*turns, *_further(dialogue, rng)), words, words)


def film_words() -> list[str]:
    """Sentences about films in which all their words occur, for the vocabulary of the tokenizer."""
    told = [film_talk(film) for film in films("train", 200, 0)]
    return [text for talk in told for ask in talk.asks for text in ask]


def manner_words() -> list[str]:
    """Every answer about who speaks how, for the vocabulary of the tokenizer."""
    return [*(caption(manner) for manner in MANNERS), *(emotion_answer(emotion) for emotion in EMOTIONS)]


def _turns(asked: tuple[Text, ...], answer: str) -> tuple[Turn, Turn]:
    return Turn("user", asked), Turn("assistant", (Text(answer),))


def _about(seen: Image | Video, asks: Sequence[tuple[str, str]]) -> list[Turn]:
    """A talk whose first question shows the picture or film."""
    talk: list[Turn] = []
    for number, (question, answer) in enumerate(asks):
        words = Text(question)
        talk += [Turn("user", (seen, words) if number == 0 else (words,)), Turn("assistant", (Text(answer),))]
    return talk
