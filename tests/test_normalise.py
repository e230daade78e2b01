"""Normalisers against texts worked out by hand and the laws of error rates."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.errors import BadConfig, BadRecord
from nexus.eval.scores import rate_interval, word_error_rate
from nexus.eval.suites.normalise import NORMALISERS, error_counts, error_rate, normaliser, speechio_zh

WORDS = st.lists(st.sampled_from(["a", "b", "c", "dd"]), max_size=6).map(" ".join)
PAIRS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8).filter(lambda pairs: any(r for r, _ in pairs))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|en|>Mr. Smith's colour, um, is twenty-one dollars!", "mister smith is color is 21"),
        ("I won't  pay 1,105 ... you know", "i will not pay 1105 you know"),
        ("[noise] Café (laughs) - gonna", "cafe going to"),
        ("...", ""),
    ],
)
def test_english_recognition_goes_through_both_of_whispers_normalisers(text: str, expected: str) -> None:
    assert normaliser("whisper-en+basic")(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("日期：1999年2月20日或09年3月15号。", "日期一九九九年二月二十日或零九年三月十五号"),
        ("金钱：12块5，34.5元，20.1万", "金钱十二块五三十四点五元二十点一万"),
        ("有62％的概率，80.03%。", "有百分之六十二的概率百分之八十点零三"),
        ("分数：32477/76391", "分数七万六千三百九十一分之三万两千四百七十七"),
        ("手机：+86 19859213959。", "手机八六一九八五九二一三九五九"),
        ("固话0595-23865596", "固话零五九五二三八六五五九六"),
        ("编号31520181154418", "编号三一五二零一八一一五四四一八"),
        ("2938个，938，200个，12000块", "两千九百三十八个九百三十八两百个一万两千块"),
        ("110条22000块22000米10500年", "一百一十条两万两千块二二零零零米一万零五百年"),
        ("特殊：O2O或B2C", "特殊o2o或b2c"),
        ("第007号20000000000元", "第零七号两百亿元"),
        ("<|zh|> 今天 天气《很好》！ Hello", "今天天气很好hello"),
        ("现在12:05，-5℃", "现在十二零五五℃"),
    ],
)
def test_chinese_is_written_as_it_is_read_character_by_character(text: str, expected: str) -> None:
    assert speechio_zh(text) == " ".join(expected)


def test_equal_numbers_are_read_each_at_its_own_place() -> None:
    assert speechio_zh("共2/第0.5和第2/4") == " ".join("共二第零点五和第四分之二")


@given(st.text(st.sampled_from("0123456789.%/年月日元个万-B我,"), max_size=16))
def test_no_figure_is_left_in_read_chinese_but_between_letters(text: str) -> None:
    read = speechio_zh(text)
    assert not re.search(r"\d", re.sub("(?<=b) 2 (?=b)", "", read))
    assert all(len(unit) == 1 for unit in read.split())


@pytest.mark.parametrize(
    ("id", "text", "expected"),
    [
        ("seedtts-en", "Don't  stop, it's twenty-one!", "don't stop it's twentyone"),
        ("seedtts-en", "No. 21 «x»", "no 21 «x»"),
        ("seedtts-zh+opencc", "臺灣，電腦 2。", "台 湾 电 脑 2"),
        ("none", " As   It is. ", "As It is."),
    ],
)
def test_other_normalisers_do_what_their_protocol_says(id: str, text: str, expected: str) -> None:
    assert normaliser(id)(text) == expected


@given(st.sampled_from(NORMALISERS), st.text(max_size=30))
def test_every_normaliser_gives_units_between_single_spaces(id: str, text: str) -> None:
    assert normaliser(id)(text) == " ".join(normaliser(id)(text).split())


def test_an_unknown_normaliser_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(BadConfig, match="did you mean 'whisper-en"):
        normaliser("whisper-en")


def test_error_rates_are_of_the_corpus_and_carry_what_makes_them_honest() -> None:
    english = error_rate(["The, cat sat.", "Red"], ["the cat sits", "red hat"], "en", "whisper-en+basic")
    assert (english["wer"], english["n"], english["protocol"]) == (2 / 4, 2, "whisper-en+basic")
    chinese = error_rate(["今天3个", "好"], ["今天三个", "不好"], "zh", "speechio-zh")
    assert (chinese["cer"], chinese["n"]) == (1 / 5, 2)
    assert error_rate(["今天 OK"], ["今天OK"], "zh", "none")["cer"] == 0


def test_an_empty_reference_counts_every_added_word() -> None:
    assert error_counts(["", "a b", "..."], ["x y", "", "z"], "en", "seedtts-en").tolist() == [[2, 0], [2, 2], [1, 0]]
    assert error_rate(["", "a b"], ["x y z", "a b"], "en", "none")["wer"] == 1.5


@pytest.mark.parametrize("references", [[], [""], ["", "..."]])
def test_references_without_a_word_have_no_rate(references: list[str]) -> None:
    with pytest.raises(BadRecord, match=rf"{len(references)} references hold no word"):
        error_rate(references, ["x"] * len(references), "en", "seedtts-en")


@given(PAIRS)
def test_the_rate_and_its_interval_are_those_of_the_other_scores(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = map(list, zip(*pairs, strict=True))
    ours = error_rate(references, hypotheses, "en", "none")
    theirs = word_error_rate(references, hypotheses)
    assert ours["wer"] == pytest.approx(theirs["wer"])
    if all(references):  # the other one divides by 0 in a draw of empty references
        assert ours["ci95"] == pytest.approx(theirs["ci95"])


@given(PAIRS)
def test_a_reference_repeated_makes_no_error(pairs: list[tuple[str, str]]) -> None:
    references = [reference for reference, _ in pairs]
    assert error_rate(references, references, "en", "none")["wer"] == 0


def test_an_interval_leaves_out_draws_without_a_unit_and_refuses_when_all_are() -> None:
    low, high = rate_interval(np.array([1, 1]), np.array([0, 2]))
    assert 0 < low <= 1 <= high
    with pytest.raises(BadRecord, match="nothing to divide by"):
        rate_interval(np.array([1]), np.array([0]))


@pytest.mark.parametrize(
    ("references", "language", "protocol", "row"),
    [
        (["hello", "你好吗"], "en", "whisper-en+basic", 1),
        (["привет"], "en", "none", 0),
        (["你好", "好 2", "hello"], "zh", "speechio-zh", 2),
        (["こんにちは"], "zh", "seedtts-zh+opencc", 0),
    ],
)
def test_a_reference_in_another_script_is_refused_with_its_row(
    references: list[str], language: str, protocol: str, row: int
) -> None:
    with pytest.raises(BadRecord, match=rf"^row {row}: .*another script"):
        error_counts(references, references, language, protocol)  # type: ignore[arg-type]


def test_figures_and_silence_have_no_script() -> None:
    assert (
        error_counts(["42", "", "你好 Python"], ["42", "", "你好python"], "zh", "speechio-zh")[:, 0].tolist() == [0] * 3
    )
    assert error_counts(["42", "naïve"], ["42", "naive"], "en", "whisper-en+basic")[:, 0].tolist() == [0, 0]


def test_lists_that_do_not_fit_and_protocols_of_another_language_are_refused() -> None:
    with pytest.raises(BadRecord, match="2 references, 1 hypotheses"):
        error_counts(["a", "b"], ["a"], "en", "none")
    with pytest.raises(BadConfig, match=r"for zh.*'en'.*whisper-en"):
        error_counts(["a"], ["a"], "en", "speechio-zh")
