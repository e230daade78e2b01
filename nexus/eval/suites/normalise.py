"""Named text normalisers of published protocols, and the error rates of recognition under them.

A protocol's id is part of every score: numbers under different ids must not be compared. A normaliser takes one text
and gives its units, words or characters, separated by single spaces; reference and hypothesis go through the same one.
"""

import difflib
import functools
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal, assert_never

import jiwer
import numpy as np

from nexus.errors import BadConfig, BadRecord
from nexus.eval.scores import rate_interval
from nexus.text import DIGITS_ZH

Language = Literal["en", "zh"]
NORMALISERS = ("none", "whisper-en+basic", "speechio-zh", "seedtts-en", "seedtts-zh+opencc")
_LANGUAGES: dict[str, tuple[Language, ...]] = {
    "none": ("en", "zh"),
    "whisper-en+basic": ("en",),
    "speechio-zh": ("zh",),
    "seedtts-en": ("en",),
    "seedtts-zh+opencc": ("zh",),
}

_LATIN = re.compile(
    "[A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff\uff21-\uff3a\uff41-\uff5a]"
)
_HAN = re.compile("[〇㐀-䶿一-鿿豈-﫿\U00020000-\U000323af]")
_LETTER = re.compile(r"[^\W\d_]")


def normaliser(id: str) -> Callable[[str], str]:
    """The normaliser of a protocol; it keeps no state, and gives units separated by single spaces ("" for none).

    `none`: the text as it is. `whisper-en+basic`: what Qwen2-Audio's evaluation does to English: `<|..|>` goes,
    Whisper's English normaliser (numbers to digits, contractions spelled out, American spelling), then its basic one.
    `speechio-zh`: the same evaluation's Chinese, see `speechio_zh`. `seedtts-en`, `seedtts-zh+opencc`: Seed-TTS-eval,
    punctuation deleted but for apostrophes, English in lower case, Chinese in simplified characters (the published
    script converts hypotheses alone, with zhconv; OpenCC's t2s changes characters and no regional words).
    Raises BadConfig for an unknown id.
    """
    match id:
        case "none":
            return _spaced
        case "whisper-en+basic":
            return functools.partial(_whisper, _english())
        case "speechio-zh":
            return speechio_zh
        case "seedtts-en":
            return _seedtts_en
        case "seedtts-zh+opencc":
            return functools.partial(_seedtts_zh, _simplifier())
        case _:
            close = difflib.get_close_matches(id, NORMALISERS, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise BadConfig(f"normaliser {id!r} is unknown, expected one of {', '.join(NORMALISERS)}{hint}")


def error_rate(
    references: Sequence[str], hypotheses: Sequence[str], language: Language, protocol: str
) -> dict[str, object]:
    """Corpus error rate under a normaliser's id: all errors over all units of the references; may pass 1.

    Gives `wer` (English, words) or `cer` (Chinese, characters without spaces), `n` utterances, `ci95` from resampling
    whole utterances (seeded) and `protocol`. Raises what `error_counts` raises, and BadRecord where no reference holds
    a unit, which leaves the rate undefined.
    """
    counts = error_counts(references, hypotheses, language, protocol)
    errors, units = counts.sum(0).tolist()
    if not units:
        raise BadRecord(
            f"no error rate under {protocol}: the {len(references)} references hold no {_unit(language)}, expected at "
            "least 1; give references with text"
        )
    score = {rate_name(language): errors / units, "n": len(references), "ci95": rate_interval(*counts.T)}
    return score | {"protocol": protocol}


def error_counts(references: Sequence[str], hypotheses: Sequence[str], language: Language, protocol: str) -> np.ndarray:
    """Errors and reference units of each utterance, i64 [N, 2], in the given order.

    An empty reference is legal: each unit of its hypothesis is an error. Raises BadConfig for an unknown protocol or
    one for another language, BadRecord for lists of unequal lengths and for a reference in another script, with its
    row counted from 0.
    """
    normalise = normaliser(protocol)
    if language not in _LANGUAGES[protocol]:
        raise BadConfig(
            f"normaliser {protocol!r} is for {' and '.join(_LANGUAGES[protocol])}, the references are said to be "
            f"{language!r}; choose one of {', '.join(id for id in NORMALISERS if language in _LANGUAGES[id])}"
        )
    if len(references) != len(hypotheses):
        raise BadRecord(
            f"an error rate needs a hypothesis for each reference: {len(references)} references, {len(hypotheses)} "
            "hypotheses; give an empty hypothesis for a missing one"
        )
    for row, reference in enumerate(references):
        _check_script(reference, language, protocol, row)
    split = _spaced if language == "en" else _characters
    expected = [split(normalise(reference)) for reference in references]
    given = [split(normalise(hypothesis)) for hypothesis in hypotheses]
    if not expected:
        return np.zeros((0, 2), dtype=np.int64)
    alignments = jiwer.process_words(expected, given).alignments
    errors = [sum(_size(chunk) for chunk in chunks if chunk.type != "equal") for chunks in alignments]
    units = [text.count(" ") + 1 if text else 0 for text in expected]
    return np.array([errors, units], dtype=np.int64).T


def rate_name(language: Language) -> str:
    """Under which key an error rate stands: `wer` or `cer`."""
    return "wer" if language == "en" else "cer"


def _unit(language: Language) -> str:
    return "word" if language == "en" else "character"


def _size(chunk: jiwer.AlignmentChunk) -> int:
    return max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)


def _check_script(reference: str, language: Language, protocol: str, row: int) -> None:
    letters = len(_LETTER.findall(reference))
    match language:
        case "en":
            wrong, expected = letters > 2 * len(_LATIN.findall(reference)), "Latin letters"
        case "zh":
            wrong, expected = letters > 0 and not _HAN.search(reference), "Chinese characters"
        case _:
            assert_never(language)
    if wrong:
        raise BadRecord(
            f"row {row}: the reference {reference[:40]!r} is in another script, {protocol} for {language} expects "
            f"{expected}; name the right language or leave the row out"
        )


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _characters(text: str) -> str:
    return " ".join("".join(text.split()))


# What Qwen2-Audio's evaluation does before and after the normaliser proper


def _prepared(text: str) -> str:
    text = re.sub(r"\s+", " ", re.sub(r"<\|.*?\|>", " ", text))
    return re.sub(r" ?([!,.?;:])", r"\1", text).lstrip(" ")


def _without_bare_punctuation(text: str) -> str:
    words = text.split()
    return " ".join(word for word in words if not all(unicodedata.category(c)[0] == "P" for c in word)).lower()


def _whisper(english: Callable[[str], str], text: str) -> str:
    # Both normalisers, one after the other: the published evaluation runs the basic one for all but Chinese.
    return _without_bare_punctuation(english(_prepared(text)))


@functools.cache
def _english() -> Callable[[str], str]:
    # Imported where it is used: it reads its spelling list at once, and most commands score nothing.
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    english, basic = EnglishTextNormalizer(), BasicTextNormalizer()
    return lambda text: basic(english(text))


# Seed-TTS-eval. Its punctuation is zhon's and ASCII's.
_SEEDTTS_DELETED = (
    "＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､\u3000、〃〈〉《》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏﹑﹔·．！？｡。"
    + string.punctuation.replace("'", "")
)
_SEEDTTS_DELETE = str.maketrans("", "", _SEEDTTS_DELETED)


def _seedtts_en(text: str) -> str:
    return _spaced(text.translate(_SEEDTTS_DELETE).lower())


def _seedtts_zh(simplify: Callable[[str], str], text: str) -> str:
    return _characters(simplify(text).translate(_SEEDTTS_DELETE))


@functools.cache
def _simplifier() -> Callable[[str], str]:
    import opencc

    return opencc.OpenCC("t2s").convert


# Chinese text normalisation after SpeechIO's rules

_MONEY_UNIT = "(?:(?:亿|千万|百万|万|千|百)?[元块]|亿|千万|百万|万|千|百|角|毛|分)"
_MEASURE = (
    "(?:[匹张座回场尾条个首阙阵网炮顶丘棵只支袭辆挑担颗壳窠曲墙群腔砣客贯扎捆刀令打手罗坡山岭江溪钟队单双对出口头脚板跳枝件"
    "贴针线管名位身堂课本页家户层丝毫厘分钱两斤铢石钧锱忽寸尺丈里寻常铺程撮勺合升斗盘碗碟叠桶笼盆盒杯斛锅簋篮罐瓶壶卮盏箩箱煲"
    "啖袋钵年月日季刻时周天秒旬纪岁世更夜春夏秋冬代伏辈丸泡粒幢堆根道面片块]|[千毫微]克|[千分厘毫微]米)"
)
_DIGIT = re.compile(r"\d")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_DATE = re.compile(
    r"(?<!\d)(?:(?P<year>[089]\d|(?:19|20)\d\d)年(?:\d{1,2}月(?:\d{1,2}[日号])?)?|\d{1,2}月(?:\d{1,2}[日号])?)"
)
_MONEY = re.compile(rf"(?<!\d)\d+(?:\.\d+)?[多余几]?{_MONEY_UNIT}(?:\d{_MONEY_UNIT}?)?")
_MOBILE = re.compile(r"(?<!\d)\+?((?:86)?1(?:[38]\d|5[0-35-9]|7[678]|9[89])\d{8})(?!\d)")
_LANDLINE = re.compile(r"(?<!\d)((?:0(?:10|2[1-3]|[3-9]\d\d)-?)?[1-9]\d{6,7})(?!\d)")
_FRACTION = re.compile(r"(\d+)/(\d+)")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")
_MEASURED = re.compile(rf"(\d+(?:\.\d+)?)(?=[多余几]?{_MEASURE})")
_SERIAL = re.compile(r"\d{4,32}")
_LETTERED_TWO = re.compile("([a-zA-Z])二([a-zA-Z])")
_SPEECHIO_PUNCTUATION = str.maketrans(
    dict.fromkeys(
        "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃《》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏·〈〉"
        + string.punctuation,
        " ",
    )
)
_POWERS = {1: "十", 2: "百", 3: "千", 4: "万", **{8 + 4 * i: unit for i, unit in enumerate("亿兆京垓秭穰沟涧正载")}}


def speechio_zh(text: str) -> str:
    """Chinese as it is read, character by character; the rules and their order are those of SpeechIO's TextNorm with
    every option off, as Qwen2-Audio's evaluation uses it. Written anew from the rules.

    Read out are, in this order: dates with 年, 月, 日 or 号 (year digit by digit); amounts before 元, 块, 角, 毛, 分
    and 百 .. 亿 ("12块5": 十二块五); mobile and landline numbers; fractions with "/"; percentages; numbers before a
    measure word; any other four digits or more, digit by digit; what is left as a cardinal (两 before 百, 千, 万, 亿).
    "B2B" keeps its 2. ASCII and Chinese punctuation goes, Latin letters become lower case and single characters.

    Nothing else is read: clock times, ranges, negative numbers and ISO dates lose their signs and keep their numbers
    ("-5": 五), units such as ℃ and foreign signs stay as they are, decimals of four digits or more without a measure
    word lose their point, as in the published rules. Full-width letters and traditional characters are not unified,
    fillers and 儿 stay. Where several equal numbers stand in a text, each is read at its own place; the published
    replacement reads the first one instead.
    """
    text = re.sub(r"\s+", "", _prepared(text))
    text = _with_numbers_read(text) if _DIGIT.search(text) else text
    text = _LETTERED_TWO.sub(r"\g<1>2\2", text)
    return _characters(_without_bare_punctuation(text.translate(_SPEECHIO_PUNCTUATION)))


def _with_numbers_read(text: str) -> str:
    text = _DATE.sub(_read_date, text)
    text = _MONEY.sub(_read_numbers, text)
    text = _MOBILE.sub(lambda match: _digits(match[1]), text)
    text = _LANDLINE.sub(lambda match: _digits(match[1].replace("-", "")), text)
    text = _FRACTION.sub(lambda match: f"{_cardinal(match[2])}分之{_cardinal(match[1])}", text)
    text = _PERCENT.sub(lambda match: f"百分之{_cardinal(match[1])}", text.replace("％", "%"))
    text = _MEASURED.sub(_read_numbers, text)
    text = _SERIAL.sub(lambda match: _digits(match[0]), text)
    text = _NUMBER.sub(lambda match: _cardinal(match[0]), text)
    return text


def _read_date(match: re.Match[str]) -> str:
    year = match["year"]
    rest = match[0] if year is None else match[0][len(year) :]
    return _digits(year or "") + _NUMBER.sub(lambda number: _cardinal(number[0]), rest)


def _read_numbers(match: re.Match[str]) -> str:
    return _NUMBER.sub(lambda number: _cardinal(number[0]), match[0])


def _digits(number: str) -> str:
    return "".join(DIGITS_ZH[int(digit)] for digit in number)


def _cardinal(number: str) -> str:
    """A number such as "120" or "2.50" as it is read: 一百二十, 二点五零."""
    whole, _, after = number.partition(".")
    read = _digits(whole) if len(whole) == 1 else _grouped(whole)
    if after:
        read = f"{read or '零'}点{_digits(after)}"
    # 两 stands for 2 before a unit from 百 on, unless 十 or a digit goes before it.
    read = re.sub(r"(?<![十零一二三四五六七八九点])二(?=[百千万亿兆京垓秭穰沟涧正载])", "两", read)
    return read.removeprefix("一") if read.startswith("一十") else read


def _grouped(digits: str) -> str:
    """Digits with their units; a run of zeros inside is read once, at the end not at all ("00": nothing)."""
    bare = digits.lstrip("0")
    if not bare:
        return ""
    zero = "零" if len(bare) < len(digits) else ""
    if len(bare) == 1:
        return zero + DIGITS_ZH[int(bare)]
    power = max(power for power in _POWERS if power < len(bare))
    return zero + _grouped(bare[:-power]) + _POWERS[power] + _grouped(bare[-power:])
