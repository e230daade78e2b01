"""Spoken questions with one right answer: the item files of published benchmarks, and when a reply is right.

Every rule has an id that belongs to the score: `contains+aliases/1` for free answers, `air-bench-foundation/1` and
`choice/1` for one letter out of several. No rule asks a model; none understands what a reply means.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any, Literal, assert_never

from nexus.errors import BadConfig, BadRecord
from nexus.eval.suites.rows import excerpt, read_jsonl, read_lines
from nexus.text import ONES, TENS

Rule = Literal["contains+aliases/1", "air-bench-foundation/1", "choice/1"]
LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """One item. `question` is what is said in `audio`, or asked in text beside it; `answer` is the reference, for a
    choice its letter. `choices` are the options in the order of their letters, empty where the question names them."""

    id: str
    question: str
    answer: str
    audio: Path
    rule: Rule
    task: str = ""
    choices: tuple[str, ...] = ()


# Scores


def is_right(question: Question, reply: str) -> bool:
    """Whether a reply answers the question, by the question's own rule."""
    match question.rule:
        case "contains+aliases/1":
            return score(question.answer, reply)
        case "air-bench-foundation/1" | "choice/1":
            return letter(question.rule, reply) == question.answer
        case _:
            assert_never(question.rule)


# contains+aliases/1


def score(reference: str, reply: str) -> bool:
    """Whether the reply holds the reference or one of its aliases, as whole words side by side.

    Both are compared in lower case, without accents, punctuation, articles and possessive 's; numbers in words and in
    digits are equal and indivisible ("twenty-five" does not hold "five"). A reference of one or two letters with a
    capital is a symbol: it must stand in its own case ("He", not "he"), in capitals, or spelled ("H-E"); a reply
    without any capital is read regardless of case. The order of words counts, what stands around them does not: the
    rule reads no negation and no alternative, so "not Paris but London" and "Paris or London" are right for either
    city. Aliases are in aliases.json.
    """
    held = " ".join(["", *words(reply), ""])
    return any(_holds(held, reply, form) for form in (reference, *_aliases().get(" ".join(words(reference)), ())))


def _holds(held: str, reply: str, form: str) -> bool:
    if len(form) <= 2 and form.isalpha() and form != form.lower():
        spelled = r"[ .\-]+".join(f"[{c}{c.lower()}]" for c in form.upper())
        shapes = [re.escape(form), re.escape(form.upper()), *([spelled] if len(form) == 2 else [])]
        flags = re.IGNORECASE if reply == reply.lower() else re.NOFLAG
        return re.search(rf"(?<![\w'’])(?:{'|'.join(shapes)})(?![\w'’])", reply, flags) is not None
    wanted = words(form)
    return bool(wanted) and f" {' '.join(wanted)} " in held


@functools.cache
def _aliases() -> dict[str, tuple[str, ...]]:
    table = json.loads((resources.files("nexus.eval.suites") / "aliases.json").read_text("utf-8"))
    return {reference: tuple(forms) for reference, forms in table.items()}


_APOSTROPHE = str.maketrans(dict.fromkeys("\u2019\u2018\u02bc\u02bb`\u00b4", "'"))
# Letters whose stroke or ligature is no combining mark.
_PLAIN = str.maketrans({"ø": "o", "đ": "d", "ł": "l", "ð": "d", "þ": "th", "ß": "ss", "æ": "ae", "œ": "oe", "ı": "i"})
# A number with its commas, a word, or a sign that keeps the numbers around it apart; hyphens and spaces do not.
_TOKEN = re.compile(r"(?<!\w)(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w)|[^\W_]+|[^\s\-‐‑–]")
_SMALL = {word: number for number, word in enumerate(ONES)} | {word: 20 + 10 * i for i, word in enumerate(TENS)}
_SMALL["fourty"] = 40  # so misspelled in the references of LLaMA Questions
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES |= {f"{word}s": size for word, size in _SCALES.items()}


def words(text: str) -> list[str]:
    """The words that `score` compares: folded, without articles, each number as one word of digits."""
    folded = unicodedata.normalize("NFKD", text.translate(_APOSTROPHE).lower().translate(_PLAIN))
    folded = folded if folded.isascii() else "".join(c for c in folded if not unicodedata.combining(c))
    folded = re.sub(r"(?<=\w)'s(?!\w)", "", folded).replace("'", "")
    return [
        word for word in _with_digits(_TOKEN.findall(folded)) if word[0].isalnum() and word not in ("a", "an", "the")
    ]


def _with_digits(tokens: list[str]) -> Iterator[str]:
    place = 0
    while place < len(tokens):
        token = tokens[place]
        begins = token in _SMALL or token in _SCALES or token == "hundred" or token[0].isdecimal()
        number, used = _number_at(tokens, place) if begins else ("", 0)
        yield number if used else token
        place += used or 1


def _number_at(tokens: list[str], start: int) -> tuple[str, int]:
    """The longest number in words that begins here, in digits, and how many tokens it takes (0: none begins)."""
    if tokens[start][0].isdecimal():
        return _digits_at(tokens, start)
    total, part, place, limit = 0, None, start, 10**15
    while place < len(tokens):
        token = tokens[place]
        if (value := _SMALL.get(token)) is not None and _fits(part, value):
            part = (part or 0) + value
        elif token == "hundred" and _begins_hundred(part, place == start):
            part = (part or 1) * 100
        elif (size := _SCALES.get(token, limit)) < limit and (part or (place == start and token[-1] != "s")):
            total, part, limit = total + (part or 1) * size, None, size
        elif token != "and" or not _goes_on(tokens, place, part, total):
            break
        place += 1
    return str(total + (part or 0)), place - start


def _fits(part: int | None, value: int) -> bool:
    """Whether a number word may follow what was read since the last thousand: "twenty" + "four", not "four" + "two"."""
    if part is None:
        return True
    is_tens = part % 100 >= 20 and part % 10 == 0
    return part > 0 and (part % 100 == 0 or (is_tens and 0 < value < 10))


def _begins_hundred(part: int | None, is_first: bool) -> bool:
    """Whether "hundred" multiplies what was read: "two hundred", and "hundred" alone as in "a hundred"."""
    return is_first if part is None else 0 < part < 100


def _goes_on(tokens: list[str], place: int, part: int | None, total: int) -> bool:
    """Whether "and" joins: "two hundred and five", but not "one hundred and two hundred"."""
    after = tokens[place + 1 : place + 3]
    is_round = total > 0 if part is None else part > 0 and part % 100 == 0
    return is_round and bool(after) and after[0] in _SMALL and after[1:] != ["hundred"]


def _digits_at(tokens: list[str], start: int) -> tuple[str, int]:
    """Digits without commas, times the thousand or million that follows them ("1.5 million": 1500000)."""
    number = tokens[start].replace(",", "")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", number):
        return tokens[start], 1
    size = _SCALES.get(tokens[start + 1], 1) if start + 1 < len(tokens) else 1
    return f"{(Decimal(number) * size).normalize():f}", 1 + (size > 1)


# One letter out of several


def letter(rule: Rule, reply: str) -> str | None:
    """The letter A .. D that a reply chooses, None where it names none.

    `air-bench-foundation/1`, as published: the first character of the stripped reply, else the last but one ("The
    answer is A."); "Because" is B. `choice/1`: a letter that the reply begins with and that a sign or the end follows;
    else the first one right after "answer", "option" or "choice", or soon after one of these, "choose", "select" or
    "pick", without "not" between; else the last one alone. "A" counts as alone only before a sign or the end, being a
    word too. No letter is guessed, so `choice/1` is not VoiceBench's published extraction.
    """
    match rule:
        case "air-bench-foundation/1":
            flat = reply.strip().replace("\n", "")
            if flat[:1] in tuple(LETTERS):
                return flat[0]
            return flat[-2] if len(flat) > 1 and flat[-2] in LETTERS else None
        case "choice/1":
            return _chosen(reply if reply != reply.lower() else reply.upper())
        case "contains+aliases/1":
            raise AssertionError(f"{rule} chooses no letter")
        case _:
            assert_never(rule)


_SIGN = r"(?=\s*(?:[.:,;)\]*\"'!?]|$))"
_LETTER = rf"(?:([B-D])(?![\w'’])|(A){_SIGN})"
_FIRST = re.compile(rf"[\s*(\"'\[]*([A-D]){_SIGN}")
_OPTION = re.compile(r"(?i:answer|option|choice)\W+([A-D])(?![\w'’])")
_NAMED = re.compile(rf"(?i:(?:answer|option|choice|choose|select|pick)\b\W+(?:(?!not\b)[a-z]+\W+){{0,5}}?){_LETTER}")
_ALONE = re.compile(rf"(?<![\w'’]){_LETTER}")


def _chosen(reply: str) -> str | None:
    if match := _FIRST.match(reply) or _OPTION.search(reply):
        return match[1]
    if match := _NAMED.search(reply):
        return match[1] or match[2]
    alone = [match[1] or match[2] for match in _ALONE.finditer(reply)]
    return alone[-1] if alone else None


# Readers


def llama_questions(folder: Path) -> list[Question]:
    """The questions of `folder`/llama_questions_300.tsv; ids are the wav names without their ending ("1" .. "300").

    The question is spoken in `audio` alone; wavs lie in the same folder and are not opened. Raises BadRecord naming
    file and line.
    """
    path = folder / "llama_questions_300.tsv"
    header, *lines = read_lines(path)
    expected = ["Questions", "Answer", "Wav Filename"]
    if header.split("\t") != expected:
        raise BadRecord(f"{path}:1: columns are {header.split(chr(9))}, expected {expected}; is it LLaMA Questions?")
    questions = []
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != 3 or not all(cells):
            raise BadRecord(f"{path}:{number}: found {len(cells)} cells, expected 3 with text; repair the line")
        question, answer, wav = cells
        if not words(answer):
            raise BadRecord(f"{path}:{number}: answer {answer!r} holds no word to look for; repair the line")
        questions.append(Question(Path(wav).stem, question, answer, folder / wav, "contains+aliases/1"))
    return questions


def voicebench(path: Path, subset: str) -> list[Question]:
    """Questions of a VoiceBench subset, exported as JSON lines {"prompt", "reference", "audio": file beside `path`}.

    `sd-qa` is scored by containment (its published score asks PEDANT and a judge: not comparable), `openbookqa` and
    `mmsu` by letter. The data has no ids: they are the row numbers "1" .. "n". Raises BadRecord naming file and line,
    BadConfig for another subset.
    """
    match subset:
        case "sd-qa":
            rule: Rule = "contains+aliases/1"
        case "openbookqa" | "mmsu":
            rule = "choice/1"
        case _:
            raise BadConfig(
                f"VoiceBench subset {subset!r} is not scored here, expected sd-qa, openbookqa or mmsu; the others need "
                "a judge or their own checkers"
            )
    questions = []
    for index, (number, row) in enumerate(read_jsonl(path), 1):
        where = f"{path}:{number}"
        prompt, reference, audio = (_field(row, name, where) for name in ("prompt", "reference", "audio"))
        if rule == "choice/1" and reference not in tuple(LETTERS):
            raise BadRecord(f"{where}: reference is {reference!r}, expected one of {', '.join(LETTERS)}")
        if not words(reference) and rule == "contains+aliases/1":
            raise BadRecord(f"{where}: reference {reference!r} holds no word to look for; repair the row")
        questions.append(Question(str(index), prompt, reference, path.parent / audio, rule, subset))
    return questions


def air_bench_foundation(path: Path) -> list[Question]:
    """Questions of AIR-Bench's Foundation_meta.json; sounds lie beside it in {task}_{dataset}/.

    `answer` is the letter of the choice that equals `answer_gt`; `task` is {task}_{dataset}, the published unit of its
    scores. Sounds of Audio_Grounding are flac whatever their listed ending. Raises BadRecord naming the item.
    """
    try:
        rows = json.loads("\n".join(read_lines(path)))
    except ValueError as error:
        raise BadRecord(f"{path}: is no JSON ({error}); give Foundation_meta.json as published") from None
    if not isinstance(rows, list):
        raise BadRecord(f"{path}: holds a {type(rows).__name__}, expected a list of items; give Foundation_meta.json")
    return [_air_item(path.parent, row, f"{path}: item {index}") for index, row in enumerate(rows)]


def _air_item(folder: Path, row: Any, where: str) -> Question:
    names = ("task_name", "dataset_name", "path", "question", "answer_gt", "choice_a", "choice_b")
    task, dataset, sound, question, answer, *first = (_field(row, name, where) for name in names)
    if row.get("choice_c") is None and row.get("choice_d") is not None:
        raise BadRecord(f"{where}: has choice_d without choice_c, so that no letter fits; repair the item")
    more = [name for name in ("choice_c", "choice_d") if row.get(name) is not None]
    choices = (*first, *(_field(row, name, where) for name in more))
    if answer not in choices:
        raise BadRecord(f"{where}: answer_gt {answer!r} is none of its choices {list(choices)}; repair the item")
    if row.get("uniq_id") is None:
        raise BadRecord(f"{where}: has no uniq_id, expected a number; repair the item")
    sound = f"{sound[:-3]}flac" if task == "Audio_Grounding" else sound
    name = f"{task}_{dataset}"
    right = LETTERS[choices.index(answer)]
    return Question(
        str(row["uniq_id"]), question, right, folder / name / sound, "air-bench-foundation/1", name, choices
    )


def _field(row: Any, name: str, where: str) -> str:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(f"{where}: {name} is {excerpt(repr(value))}, expected a text; repair it")
    return value
