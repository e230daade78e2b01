"""Which texts are fit to be spoken: the published pre-processing rules, made exact.

Nexus, section 3.2, lists three: at most 200 Chinese characters or 200 English words, at most a fifth of non-text
characters, no URLs, file paths or LaTeX. `verdict` applies them to one text and remembers nothing; what it repeats is
`duplicates`. Each rejection says which rule and the number that broke it.

How the rules are read here:

* Counting is done on the compatible form (NFKC), so that full-width letters are letters.
* Chinese characters are Han code points, neither punctuation nor kana. A word is a run of Latin letters with inner
  apostrophes and hyphens; a number alone is no word. Exactly 200 stays. Mixed text must not hold more than 200 of both
  together.
* The share of non-text leaves white space out of the count and takes capitals and accented letters for letters: read
  literally, [a-z] over all characters, the rule would drop 63 % of the ordinary questions of LLaMA Questions. Digits,
  symbols, emoji and other scripts are non-text, as published. Exactly 0.2 stays.
* E-mail addresses and program code are dropped too; they cannot be said either.
"""

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from nexus.organs import Count, Share, Strict
from nexus.recipe import fingerprint
from nexus.synth.duplicates import PLAIN_CHINESE, Seen
from nexus.synth.records import Record, Rejected

Verdict = tuple[str, Mapping[str, float | str]]  # reason, numbers


class RulesConfig(Strict):
    """Limits on texts; what is above a limit is dropped, what equals it stays."""

    languages: tuple[Literal["en", "zh"], ...] = ("en", "zh")
    max_characters: Count = 10_000  # of the raw line, only to bound the work: 200 words have never so many
    max_han: Count = 200
    max_words: Count = 200
    max_mixed: Count = 200  # Chinese characters and words together
    max_non_text: Share = 0.2
    max_other_script: Share = 0.1  # of all letters: neither Latin nor Han
    patterns: tuple[Literal["url", "email", "path", "latex", "code"], ...] = ("url", "email", "path", "latex", "code")
    # Similarity of words from which a text repeats an earlier one; null: only equal words.
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = 0.9


# Invisible characters that come with copied text and change nothing that is said.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufe0e\ufe0f\ufeff]")
# Control characters but white space; marks that turn the direction of what follows; halves of a surrogate pair.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffd]")
_HAN = re.compile("[㐀-䶿一-鿿豈-﫿\U00020000-\U0002fa1f]")
_HAN_RUN = re.compile(f"{_HAN.pattern}+")
_KANA_HANGUL = re.compile("[ぁ-ヿㇰ-ㇿ가-힣ᄀ-ᇿ]")
_SPACE = b" \t\n\r\x0b\x0c"


def tidy(text: str) -> str:
    """The text without invisible characters, white space as single spaces, none at its ends."""
    if not text.isascii():
        text = _INVISIBLE.sub("", text)
    return " ".join(text.split())


def verdict(text: str, language: str, config: RulesConfig) -> Verdict | None:
    """Why a tidy text is dropped, or None. `language`: "en", "zh", or "" where the source does not say.

    Pure: reason and numbers follow from the arguments alone. Reasons: too_long, control_characters, no_words,
    other_script, unknown_language, wrong_language, non_text, url, email, path, latex, code.
    """
    if len(text) > config.max_characters:
        return "too_long", {"characters": len(text), "limit": config.max_characters}
    if control := _CONTROL.search(text):
        return "control_characters", {"character": f"U+{ord(control[0]):04X}", "at": control.start()}
    if len(text) <= min(config.max_han, config.max_mixed) and PLAIN_CHINESE.fullmatch(text):
        return _wrong_language(language_of(text), language, config)
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return (
        _wrong_script(plain, language, config)
        or _too_long(plain, config)
        or _non_text(plain, config)
        or _pattern(plain, config)
    )


def language_of(text: str) -> str:
    """ "zh" where Chinese characters are at least as many as words in Latin letters, "en" where the latter are more.

    By script alone: another language in Latin letters reads as "en". "" where neither script occurs, and for text with
    kana or hangul.
    """
    if text.isascii():
        return "en" if _ASCII_LETTER.search(text) else ""
    if PLAIN_CHINESE.fullmatch(text):
        return "zh" if _HAN.search(text) else ""
    text = unicodedata.normalize("NFKC", text)
    if _KANA_HANGUL.search(text):
        return ""
    num_han = _num_han(text)
    num_words = len(_words().findall(text))
    return "" if not num_han + num_words else "zh" if num_han >= num_words else "en"


_ASCII_LETTER = re.compile("[A-Za-z]")
_ASCII_TEXT = bytes(c for c in range(128) if unicodedata.category(chr(c))[0] in "LP")


def _num_han(text: str) -> int:
    return len(text) - len(_HAN_RUN.sub("", text))


def _wrong_script(text: str, stated: str, config: RulesConfig) -> Verdict | None:
    if not text.isascii():
        num_letters = len(_letters().findall(text)) + _num_han(text)
        num_other = len(_other_letters().findall(text))
        if num_other > config.max_other_script * (num_letters + num_other):
            share = num_other / (num_letters + num_other)
            return "other_script", {"share": round(share, 4), "limit": config.max_other_script}
    return _wrong_language(language_of(text), stated, config)


def _wrong_language(found: str, stated: str, config: RulesConfig) -> Verdict | None:
    if stated and stated not in config.languages:
        return "unknown_language", {"language": stated, "expected": ", ".join(config.languages)}
    if not found:
        return "no_words", {"words": 0}
    if found != stated if stated else found not in config.languages:
        return "wrong_language", {"found": found, "expected": stated or ", ".join(config.languages)}
    return None


def _too_long(text: str, config: RulesConfig) -> Verdict | None:
    # Most texts are too short to need counting: a word takes two characters with its space, a Chinese one a character.
    shortest = min(config.max_han, config.max_mixed, config.max_words)
    if len(text) <= (2 * min(config.max_words, config.max_mixed) if text.isascii() else shortest):
        return None
    num_han = 0 if text.isascii() else _num_han(text)
    num_words = len((_ASCII_WORD if text.isascii() else _words()).findall(text))
    for unit, number, limit in (
        ("han", num_han, config.max_han),
        ("words", num_words, config.max_words),
        ("han_and_words", num_han + num_words, config.max_mixed),
    ):
        if number > limit:
            return "too_long", {unit: number, "limit": limit}
    return None


def _non_text(text: str, config: RulesConfig) -> Verdict | None:
    if text.isascii():
        visible = text.encode().translate(None, _SPACE)
        num_visible, num_non_text = len(visible), len(visible.translate(None, _ASCII_TEXT))
    else:
        num_visible = len(text) - text.count(" ")
        num_non_text = len(_text_or_space().sub("", text))
    if num_non_text > config.max_non_text * num_visible:
        return "non_text", {"share": round(num_non_text / num_visible, 4), "limit": config.max_non_text}
    return None


_ASCII_WORD = re.compile(r"[A-Za-z]+(?:['\-][A-Za-z]+)*")
_LATIN_BLOCKS = ((0x41, 0x250), (0x250, 0x2B0), (0x1D00, 0x1DC0), (0x1E00, 0x1F00), (0x2C60, 0x2C80), (0xA720, 0xA800))


@functools.cache
def _latin() -> str:
    """The Latin letters, as the inside of a character class."""
    letters = (chr(c) for start, stop in _LATIN_BLOCKS for c in range(start, stop))
    return "".join(c for c in letters if unicodedata.category(c)[0] == "L" and c not in "ªº")


@functools.cache
def _letters() -> re.Pattern[str]:
    return re.compile(f"[{_latin()}]")


@functools.cache
def _words() -> re.Pattern[str]:
    return re.compile(f"[{_latin()}]+(?:['’\\-][{_latin()}]+)*")


@functools.cache
def _other_letters() -> re.Pattern[str]:
    return re.compile(rf"[^\W\d_{_latin()}{_HAN.pattern[1:-1]}]")


@functools.cache
def _text_or_space() -> re.Pattern[str]:
    marks = "".join(re.escape(chr(c)) for c in range(0x10000) if unicodedata.category(chr(c))[0] == "P")
    return re.compile(f"[{_latin()}{marks}{_HAN.pattern[1:-1]} ]+")


_ENDINGS = "py js ts c h cpp rs go java json jsonl yaml yml txt csv tsv md html css xml png jpg jpeg gif svg pdf docx? "
_ENDINGS += "xlsx? pptx? zip tar gz exe dll so sh bat wav flac mp3 mp4 log ini cfg conf toml"
_DOMAINS = "com|org|net|edu|gov|mil|int|info|biz|io|cn|uk|de|fr|jp|ru|eu"
# ASCII classes: a Chinese character next to an address ends it. Every repetition is bounded or cannot overlap with
# what follows it, so that no text takes more than linear time.
_PATTERNS = {
    "url": rf"(?<![a-z0-9])[a-z][a-z0-9+.\-]{{1,15}}://\S|(?<![a-z0-9])www\.[a-z0-9]"
    rf"|(?<![a-z0-9@.\-])(?:[a-z0-9\-]{{1,63}}\.){{1,5}}(?:{_DOMAINS})(?![a-z0-9\-])(?!\.[a-z0-9])"
    r"|(?<![a-z0-9@.\-])(?:[a-z0-9\-]{1,63}\.){1,5}[a-z]{2,15}/[a-z0-9]",
    "email": r"[^\s@]@[a-z0-9\-]{1,63}\.[a-z]{2}|[a-z0-9]@[^\s@.]{1,63}\.[^\s@.]",
    "path": r"(?<![a-z0-9])[a-z]:[\\/](?!/)[^\s\\/]|\\\\[a-z0-9._\-]{1,63}\\"
    r"|(?<![a-z0-9_./])~/[a-z0-9._]|(?<![a-z0-9_./])\.{1,2}/[a-z0-9._]"
    r"|(?<![a-z0-9_./~<])/[a-z_.][a-z0-9_.+\-]{0,63}/[a-z0-9_.+\-]"
    rf"|[a-z0-9_\-]/[a-z0-9_.\-]{{1,63}}\.(?:{'|'.join(_ENDINGS.split())})(?![a-z0-9])"
    r"|[a-z0-9_.\-]\\[a-z0-9_.\-]{1,63}\\",
    "latex": r"\$\$|\\[()\[\]{}]|\\[a-z]{2,}|\$[^$\n]{0,200}?[\\^_{}][^$\n]{0,200}\$"
    r"|[a-z0-9)\]}]\^\{?[a-z0-9(\-]|[a-z0-9]_\{",
    "code": r"```"
    r"|`[^`\n]{1,200}`|</?[a-z][a-z0-9]{0,15}(?:\s[^<>]{0,200})?/?>|[a-z0-9_)\]]\s?(?:===?|!==?|&&|\|\||[+\-*/]=)"
    r"\s?\S|=>\s?[{(a-z]|[a-z0-9_]\([^()]{0,200}\)\s?(?:\{|;\s?(?:\}|[a-z_.]{1,40}\(|$))|[a-z0-9_]\.[a-z_]{1,40}\(|#include\s?<"
    r"|(?<![a-z0-9_])(?:def|function|class|fn|func)\s[a-z_][a-z0-9_]{0,60}\s?\([^()]{0,200}\)\s?(?:->[^:]{1,40})?[:{]"
    r"|(?<![a-z0-9_])[a-z]{1,30}_[a-z0-9_]{1,60}\(|\{\s?[\"'][^\"']{1,60}[\"']\s?:|;\s?\}",
}
# No pattern matches a text without one of these; a full stop counts where a character follows it.
_TRIGGER = re.compile(r"[\\/@$^`{}<>=&|#(~;]|\.[^\s.]")


@functools.cache
def _compiled(name: str) -> re.Pattern[str]:
    return re.compile(_PATTERNS[name], re.ASCII | re.IGNORECASE)


def _pattern(text: str, config: RulesConfig) -> Verdict | None:
    if not _TRIGGER.search(text):
        return None
    for name in config.patterns:
        if found := _compiled(name).search(text):
            return name, {"found": found[0][:80], "at": found.start()}
    return None


class Rules:
    """The rules as a step. Remembers what it has kept, so one process must see all texts, in the order of reading;
    reading the same again gives the same verdicts.

    A kept record has its tidy text (the text as it was stands in meta `text_given` where it differs) and a language.
    """

    name = "rules"

    def __init__(self, config: RulesConfig) -> None:
        self._config = config

    @property
    def fingerprint(self) -> str:
        """Over every limit."""
        return fingerprint({"rules": 1, **self._config.model_dump(mode="json")})

    def setup(self) -> None:
        """Forget all texts."""
        self._seen = Seen(self._config.near_duplicates)

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        """One result per record, in order. Rejections by `verdict`, and duplicate, near_duplicate (numbers: the id
        of the record that came first, the similarity)."""
        results = [self._checked(record) for record in records]
        good = [record for record in results if isinstance(record, Record)]
        matches = iter(self._seen.add([record.text for record in good], [record.id for record in good]))
        for place, record in enumerate(results):
            if isinstance(record, Rejected) or (match := next(matches)) is None:
                continue
            reason = "duplicate" if match.exact else "near_duplicate"
            results[place] = Rejected(record, reason, {"of": match.id, "similarity": round(match.similarity, 4)})
        return results

    def _checked(self, record: Record) -> Record | Rejected:
        text = record.text
        if len(text) > self._config.max_characters:  # before anything that reads all of it
            return Rejected(record, "too_long", {"characters": len(text), "limit": self._config.max_characters})
        clean = tidy(text)
        if broken := verdict(clean, record.language, self._config):
            return Rejected(record, *broken)
        if clean != text:
            record = record.with_(text=clean).noted(text_given=text)
        return record if record.language else record.with_(language=language_of(clean))


def build(config: RulesConfig) -> Rules:
    """The step that applies the rules."""
    return Rules(config)
