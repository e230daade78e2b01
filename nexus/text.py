"""Text for comparing what was said: normalisers for English and Chinese, word and character errors.

A score is only as good as its normaliser: normalise reference and hypothesis with the same function first. What is
counted here compares what it is given, letter by letter.
"""

import re
import unicodedata
from collections.abc import Callable

import jiwer

ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
DIGITS_ZH = "零一二三四五六七八九"
UNITS_ZH = ("千", "百", "十", "")

_NUMBER = re.compile(r"(?:(?<![0-9])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
# Folded before NFKC, which would turn the acute accent into a space and a mark.
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2019\u2018\u02bc`\u00b4", "'"))
_HAN = re.compile("[〇㐀-䶿一-鿿豈-﫿\U00020000-\U000323af]")


def is_chinese(text: str) -> bool:
    """Whether Chinese characters are at least as many as the words in other letters, and at least one."""
    num_han = len(_HAN.findall(text))
    return num_han > 0 and num_han >= len(_HAN.sub(" ", _words_only(text)).split())


def normalise_en(text: str) -> str:
    """Lower-case words, single spaces, no punctuation but apostrophes inside words ("don't").

    Numbers up to 999999 are spelled out ("1,105": "one thousand one hundred five"; "3.14": "three point one four"),
    longer ones and those with a leading zero are read digit by digit. Accents stay; symbols ("%", "-") go as
    punctuation does.
    """
    return _words_only(_NUMBER.sub(lambda match: f" {_spell(match[0], _number_en, 'point', ' ')} ", _folded(text)))


def normalise_zh(text: str) -> str:
    """Characters without punctuation; spaces only between two words in other letters ("hello world你好").

    Numbers are written as they are read, by the rules of `normalise_en` ("105": "一百零五", "3.14": "三点一四"), four
    digits before 年 one by one. Simplified and traditional characters are not unified.
    """
    text = re.sub(r"(?<![0-9.,])[0-9]{4}(?=\s*年)", lambda match: _digits_zh(match[0]), _folded(text))
    text = _words_only(_NUMBER.sub(lambda match: _spell(match[0], _number_zh, "点", ""), text))
    return re.sub(rf"(?<={_HAN.pattern}) | (?={_HAN.pattern})", "", text)


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Substituted, left-out and added words of the hypothesis, and the number of words in the reference.

    Words are what spaces separate. An empty reference is legal: each word of the hypothesis is an error; an empty
    hypothesis leaves all words out.
    """
    expected, given = reference.split(), hypothesis.split()
    if not expected or not given:
        return len(expected) + len(given), len(expected)
    counts = jiwer.process_words(" ".join(expected), " ".join(given))
    return counts.substitutions + counts.deletions + counts.insertions, len(expected)


def character_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """`word_errors` of characters: single spaces between words count as characters, others do not."""
    expected, given = " ".join(reference.split()), " ".join(hypothesis.split())
    if not expected or not given:
        return len(expected) + len(given), len(expected)
    counts = jiwer.process_characters(expected, given)
    return counts.substitutions + counts.deletions + counts.insertions, len(expected)


def _folded(text: str) -> str:
    """Compatible forms made one (full-width letters and digits, ligatures), in lower case."""
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).lower()
    return unicodedata.normalize("NFKC", text)


def _words_only(text: str) -> str:
    """Letters, marks and digits stay, an apostrophe between two letters too; all else becomes a single space."""
    kept = "".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    kept = re.sub(r"(?<![^\W_])'|'(?![^\W_])", " ", kept)
    return " ".join(kept.split())


def _spell(number: str, whole: Callable[[str], str], point: str, joint: str) -> str:
    before, _, after = number.replace(",", "").partition(".")
    if not after:
        return whole(before)
    return joint.join([whole(before), point, *(whole(digit) for digit in after)])


def _number_en(digits: str) -> str:
    if len(digits) > 6 or (digits[0] == "0" and len(digits) > 1):
        return " ".join(ONES[int(digit)] for digit in digits)
    number = int(digits)
    if number < 20:
        return ONES[number]
    for size, word in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            head, rest = divmod(number, size)
            spelled = f"{_number_en(str(head))} {word}"
            return f"{spelled} {_number_en(str(rest))}" if rest else spelled
    tens, ones = divmod(number, 10)
    return f"{TENS[tens - 2]} {ONES[ones]}" if ones else TENS[tens - 2]


def _digits_zh(digits: str) -> str:
    return "".join(DIGITS_ZH[int(digit)] for digit in digits)


def _number_zh(digits: str) -> str:
    if len(digits) > 6 or (digits[0] == "0" and len(digits) > 1):
        return _digits_zh(digits)
    if digits == "0":
        return "零"
    myriads, rest = divmod(int(digits), 10_000)
    spelled = f"{_below_myriad(myriads)}万" if myriads else ""
    if rest:
        spelled += ("零" if myriads and rest < 1000 else "") + _below_myriad(rest)
    return spelled.removeprefix("一") if spelled.startswith("一十") else spelled


def _below_myriad(number: int) -> str:
    """1..9999; a run of zeros inside is read once, at the end not at all."""
    spelled = "".join(
        DIGITS_ZH[int(digit)] + (unit if digit != "0" else "")
        for digit, unit in zip(f"{number:04d}", UNITS_ZH, strict=True)
    )
    return re.sub("零+", "零", spelled).strip("零")
