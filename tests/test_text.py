"""Normalisers and error rates against cases worked out by hand, and the laws they must keep."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.text import character_errors, is_chinese, normalise_en, normalise_zh, word_errors

WORDS = st.lists(st.sampled_from(["a", "b", "c", "dd", "e's"]), max_size=8).map(" ".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is 40 + 2?  It's forty-two.", "what is forty two it's forty two"),
        ("105 and 110, 19, 20, 0", "one hundred five and one hundred ten nineteen twenty zero"),
        ("1,105 or 1105", "one thousand one hundred five or one thousand one hundred five"),
        ("999999", "nine hundred ninety nine thousand nine hundred ninety nine"),
        ("300000 12000", "three hundred thousand twelve thousand"),
        ("1234567 007", "one two three four five six seven zero zero seven"),
        ("1,2 1,0000", "one two one zero zero zero zero"),
        ("3.14, 0.5. 7.", "three point one four zero point five seven"),
        ("2nd mp3", "two nd mp three"),
        ("Don\u2019t 'quote' rock \u2018n\u2019 roll, the dogs\u2019 _own_", "don't quote rock n roll the dogs own"),
        ("\uff28\uff49 \uff14\uff12 \ufb01ve CAF\u00c9", "hi forty two five caf\u00e9"),
        (" \n\t ...!? ", ""),
    ],
)
def test_english_becomes_plain_spoken_words(text: str, expected: str) -> None:
    assert normalise_en(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("你好,世界!", "你好世界"),
        ("今天 天气 很好。", "今天天气很好"),
        ("Hello World 你好 AI 时代", "hello world你好ai时代"),
        ("我有3.5个,第007号", "我有三点五个第零零七号"),
        ("2023年有365天", "二零二三年有三百六十五天"),
        ("0度", "零度"),
    ],
)
def test_chinese_becomes_plain_characters(text: str, expected: str) -> None:
    assert normalise_zh(text) == expected


@pytest.mark.parametrize(
    ("numbers", "readings"),
    [
        ("10 11 20 42 105 110 112", "十 十一 二十 四十二 一百零五 一百一十 一百一十二"),
        ("1000 1001 1010 2300 10000", "一千 一千零一 一千零一十 二千三百 一万"),
        ("10005 120000 305060 999999", "一万零五 十二万 三十万五千零六十 九十九万九千九百九十九"),
    ],
)
def test_numbers_are_written_as_they_are_read_in_chinese(numbers: str, readings: str) -> None:
    assert [normalise_zh(number) for number in numbers.split()] == readings.split()


@pytest.mark.parametrize(
    ("text", "chinese"),
    [("你好", True), ("what is 你", False), ("我喜欢 Python", True), ("hello", False), ("", False), ("42!", False)],
)
def test_the_script_of_a_text_is_told_by_its_words(text: str, chinese: bool) -> None:
    assert is_chinese(text) is chinese


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise_en(normalise_en(text)) == normalise_en(text)
    assert normalise_zh(normalise_zh(text)) == normalise_zh(text)


@given(st.integers(0, 999_999), st.integers(0, 999_999))
def test_different_numbers_are_spelled_differently(first: int, second: int) -> None:
    for normalise in (normalise_en, normalise_zh):
        assert (normalise(str(first)) == normalise(str(second))) == (first == second)
        assert not any(character.isdigit() and character.isascii() for character in normalise(str(first)))
    assert normalise_en(f"{first:,}") == normalise_en(str(first))


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors", "words"),
    [
        ("the cat sat", "the cat sat", 0, 3),
        ("the cat sat", "the hat sat", 1, 3),
        ("the cat sat", "the sat", 1, 3),
        ("the cat sat", "oh the cat has sat", 2, 3),
        ("the cat sat", "", 3, 3),
        ("", "oh no", 2, 0),
        ("", "", 0, 0),
        ("  the   cat ", "the cat", 0, 2),
        ("a b c d", "b c d e", 2, 4),
    ],
)
def test_word_errors_worked_out_by_hand(reference: str, hypothesis: str, errors: int, words: int) -> None:
    assert word_errors(reference, hypothesis) == (errors, words)


def test_character_errors_worked_out_by_hand() -> None:
    assert character_errors("今天天气", "今天空气") == (1, 4)
    assert character_errors("a b", "ab") == (1, 3)
    assert character_errors("kitten", "sitting") == (3, 6)
    assert character_errors("ab", "") == (2, 2)
    assert character_errors("", "ab") == (2, 0)


@given(WORDS, WORDS)
def test_errors_keep_the_laws_of_a_distance(first: str, second: str) -> None:
    errors = word_errors(first, second)[0]
    assert errors == word_errors(second, first)[0]
    assert (errors == 0) == (first == second)
    lengths = len(first.split()), len(second.split())
    assert abs(lengths[0] - lengths[1]) <= errors <= max(lengths)
