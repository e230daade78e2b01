"""How written text is read aloud, and what of it is compared: the same number in any reading is the same units.

A recogniser answers "nineteen ninety nine", "1999" or "one thousand nine hundred ninety-nine" to the same sound, and a
synthesiser chooses among them too. `comparable` makes all of them one: every number becomes its digits.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from nexus.text import DIGITS_ZH, ONES, TENS, normalise_en, normalise_zh

ORDINALS = {
    **{"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth"},
    **{"twelve": "twelfth"},
}
CURRENCIES = {"$": "dollars", "£": "pounds", "€": "euros", "¥": "yen"}
SIGNS = {"%": " percent", "&": " and ", "°C": " degrees Celsius", "°F": " degrees Fahrenheit", "°": " degrees"}
SMALL = {word: number for number, word in enumerate(ONES)} | {
    word: 10 * tens for tens, word in enumerate(TENS, start=2)
}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
DECADES = {f"{word[:-1]}ies": word for word in TENS}
NUMERALS_ZH = {letter: digit for digit, letter in enumerate(DIGITS_ZH)} | {"〇": 0, "两": 2}
UNITS_ZH = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}

_DECADE = re.compile(r"(?<![\w.,])(?:'(?=[0-9]0))?([0-9]{2}|[0-9]{4})'?s\b")
_ORDINAL = re.compile(r"(?<![\w.,])([0-9]{1,6})(?:st|nd|rd|th)\b")
_MONEY = re.compile(r"([$£€¥])\s?([0-9][0-9,]*(?:\.[0-9]+)?(?:\s(?:million|billion))?)(?![0-9])")
_YEAR = re.compile(r"(?<![\w.,])(1[1-9][0-9]{2}|20[1-9][0-9])(?![\w%]|[.,][0-9])")
_ROMAN = re.compile(r"(?<=[a-z] )(X{0,2}(?:IX|IV|V?I{1,3})|X{1,2}V)(?![\w'])")
_SLASH = re.compile(r"(?<=[0-9])/(?=[0-9])")
_SIGN = re.compile("|".join(map(re.escape, SIGNS)))
_NUMERAL_ZH = re.compile(f"[{''.join(NUMERALS_ZH)}{''.join(UNITS_ZH)}]+")


def spoken_en(text: str) -> str:
    """English as it is said where its spelling misleads: years in pairs ("1999": "nineteen ninety nine"), decades,
    ordinals, money, percent, "24/7", Roman numbers behind a word ("World War II"). All else stays as it is."""
    return _said(text, _in_pairs)


def wordings_en(text: str) -> list[str]:
    """The normalised word sequences in which a reader may say `text`, for a recogniser's language model: its years in
    pairs, in hundreds, as plain numbers."""
    readings = (_in_pairs, _in_hundreds, str)
    return list(dict.fromkeys(normalise_en(_said(text, reading)) for reading in readings))


def _said(text: str, year: Callable[[str], str]) -> str:
    text = _DECADE.sub(lambda match: _decade(match[1]), text)
    text = _ORDINAL.sub(lambda match: _ordinal(match[1]), text)
    text = _MONEY.sub(lambda match: f"{match[2]} {CURRENCIES[match[1]]}", text)
    text = _SLASH.sub(" ", text)
    text = _ROMAN.sub(lambda match: normalise_en(str(_roman(match[1]))), text)
    text = _YEAR.sub(lambda match: year(match[1]), text)
    return _SIGN.sub(lambda match: SIGNS[match[0]], text)


def comparable(text: str, language: str) -> str:
    """Units to be compared, single spaces between words: English words, or characters of Chinese ("zh", simplified),
    with every number as its digits one by one. Other languages: lower case without punctuation.

    "1999", "nineteen ninety nine" and "one nine nine nine" all give "1 9 9 9".
    """
    match language:
        case "en":
            return " ".join(_digits_en(normalise_en(spoken_en(text)).split()))
        case "zh":
            plain = normalise_zh(_simplifier().convert(text))
            return _NUMERAL_ZH.sub(lambda match: _digits_zh(match[0]), plain)
        case _:
            return normalise_en(text)


def num_letters(text: str, language: str) -> int:
    """Letters of `text` as it is said, numbers spelled out; the yardstick of durations."""
    said = normalise_zh(text) if language == "zh" else normalise_en(spoken_en(text) if language == "en" else text)
    return len(said.replace(" ", ""))


def _in_pairs(digits: str) -> str:
    head, tail = normalise_en(digits[:2]), digits[2:]
    if tail == "00":
        return f"{head} hundred"
    return f"{head} oh {normalise_en(tail[1])}" if tail[0] == "0" else f"{head} {normalise_en(tail)}"


def _in_hundreds(digits: str) -> str:
    rest = "" if digits[2:] == "00" else normalise_en(str(int(digits[2:])))
    return f"{normalise_en(digits[:2])} hundred {rest}".strip()


def _decade(digits: str) -> str:
    if digits[-1] != "0" or digits[-2] == "1" or digits == "00":
        return f"{normalise_en(digits)}s"
    head = "" if len(digits) == 2 else f"{normalise_en(digits[:2])} "
    return f"{head}hundreds" if digits[-2] == "0" else f"{head}{TENS[int(digits[-2]) - 2][:-1]}ies"


def _ordinal(digits: str) -> str:
    *head, last = normalise_en(str(int(digits))).split()
    if last not in ORDINALS:
        last = f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th"
    return " ".join([*head, ORDINALS.get(last, last)])


def _roman(letters: str) -> int:
    values = [{"I": 1, "V": 5, "X": 10}[letter] for letter in letters]
    return sum(-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True))


def _digits_en(words: list[str]) -> list[str]:
    """The words with every number word, alone or in a phrase, as digits."""
    words = [part for word in words for part in ((DECADES[word], "s") if word in DECADES else (word,))]
    out: list[str] = []
    at = 0
    while at < len(words):
        number, end = _number_at(words, at)
        if number is None:
            after_number = bool(out) and out[-1].isdigit()
            before_number = at + 1 < len(words) and words[at + 1] in SMALL
            if words[at] in ("oh", "o") and after_number and before_number:
                out.append("0")
            elif not (words[at] == "slash" and after_number and before_number):
                out.append(words[at])
            at += 1
        else:
            out += str(number)
            at = end
    return out


def _number_at(words: list[str], start: int) -> tuple[int | None, int]:
    """The longest number phrase at `start` and where it ends; (None, start) where there is none."""
    total, group, last, at = 0, 0, "", start
    limit = 10**12
    if words[start] == "a" and start + 1 < len(words) and words[start + 1] in ("hundred", *SCALES):
        group, last, at = 1, "ones", start + 1
    while at < len(words):
        word = words[at]
        if word in SMALL and _continues(SMALL[word], last, group):
            group += SMALL[word]
            last = "tens" if SMALL[word] >= 20 else "zero" if SMALL[word] == 0 else "ones"
        elif word == "hundred" and 0 < group < 100 and last in ("ones", "tens"):
            group, last = 100 * group, "hundred"
        elif word in SCALES and group and SCALES[word] < limit:
            limit = SCALES[word]
            total, group, last = total + group * limit, 0, "scale"
        elif not (word == "and" and last in ("hundred", "scale") and words[at + 1 : at + 2] and words[at + 1] in SMALL):
            break
        at += 1
    return (None, start) if not last else (total + group, at)


def _continues(value: int, last: str, group: int) -> bool:
    """Whether a small number goes on with the phrase: at its start, behind hundred or thousand, ones behind tens."""
    if last in ("", "hundred", "scale"):
        return value > 0 or last == ""
    return last == "tens" and group % 10 == 0 and 0 < value < 10


def _digits_zh(numeral: str) -> str:
    """A Chinese number in digits: by place value where it holds units, else digit by digit."""
    if not any(letter in UNITS_ZH for letter in numeral):
        return "".join(str(NUMERALS_ZH[letter]) for letter in numeral)
    total = section = digit = 0
    for letter in numeral:
        if letter in NUMERALS_ZH:
            digit = NUMERALS_ZH[letter]
        elif UNITS_ZH[letter] >= 10**4:
            total, section, digit = (total + section + digit) * UNITS_ZH[letter], 0, 0
        else:
            section, digit = section + max(digit, 1) * UNITS_ZH[letter], 0
    return str(total + section + digit)


@functools.cache
def _simplifier() -> Any:
    import opencc

    return opencc.OpenCC("t2s")
