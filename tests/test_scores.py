"""Scores: known values, intervals that hold them, the same numbers every time."""

import random
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.eval.scores import accuracy, exact, others, paired_drop, word_error_rate


def interval(score: dict[str, object]) -> tuple[float, float]:
    low, high = cast(list[float], score["ci95"])
    return low, high


RIGHT = st.lists(st.booleans(), min_size=1, max_size=50)


def test_accuracy_is_the_share_of_right_answers_with_its_count_and_interval() -> None:
    score = accuracy([True] * 30 + [False] * 10)
    assert (score["accuracy"], score["n"]) == (0.75, 40)
    assert score["ci95"] == pytest.approx([0.61, 0.89], abs=0.035)  # 0.75 -+ 1.96 sqrt(0.75 * 0.25 / 40)


def test_word_error_rate_counts_errors_over_all_words_and_not_the_mean_of_rates() -> None:
    score = word_error_rate(["one two three four five six", "red"], ["one two free four five six seven", "blue"])
    assert score["wer"] == pytest.approx(3 / 7)
    assert score["n"] == 2


def test_word_error_rate_of_equal_texts_is_nought_and_of_silence_one() -> None:
    texts = ["red circle", "blue square left"]
    assert word_error_rate(texts, texts) == {"wer": 0.0, "n": 2, "ci95": [0.0, 0.0]}
    assert word_error_rate(texts, ["", ""])["wer"] == 1.0


@given(RIGHT)
def test_the_interval_of_an_accuracy_contains_it_and_stays_within_nought_and_one(right: list[bool]) -> None:
    score = accuracy(right)
    low, high = interval(score)
    assert 0 <= low <= cast(float, score["accuracy"]) <= high <= 1


@given(st.lists(st.tuples(st.sampled_from(["a b", "a b c d", "a"]), st.sampled_from(["a b", "c", ""])), min_size=1))
def test_the_interval_of_a_word_error_rate_contains_it(pairs: list[tuple[str, str]]) -> None:
    score = word_error_rate(*map(list, zip(*pairs, strict=True)))
    low, high = interval(score)
    assert low - 1e-9 <= cast(float, score["wer"]) <= high + 1e-9


def test_the_interval_narrows_with_more_items() -> None:
    def width(n: int) -> float:
        low, high = interval(accuracy([i % 4 != 0 for i in range(n)]))
        return high - low

    assert width(400) < 0.6 * width(100)


def test_a_paired_drop_sees_what_two_separate_intervals_would_hide() -> None:
    before = [random.Random(0).random() < 0.5 for _ in range(200)]
    after = [b and i % 20 != 0 for i, b in enumerate(before)]  # everything lost was lost on the same items
    drop = paired_drop(before, after)
    assert drop["drop"] == pytest.approx(sum(before) / 200 - sum(after) / 200)
    low, high = interval(drop)
    assert high - low < 0.1
    assert paired_drop(before, before) == {"drop": 0.0, "ci95": [0.0, 0.0]}
    assert paired_drop([False], [True])["drop"] == -1.0


def test_scores_are_the_same_in_every_run_and_leave_other_randomness_alone() -> None:
    random.seed(5)
    state = random.getstate()
    assert accuracy([True, False, True]) == accuracy([True, False, True])
    assert random.getstate() == state


def test_exact_answers_are_compared_letter_by_letter() -> None:
    assert exact(["four", "red"], ["four", "red "]) == [True, False]
    with pytest.raises(ValueError, match="zip"):
        exact(["four"], [])


@given(st.integers(2, 60))
def test_everybody_gets_somebody_elses_item_and_none_is_lost(n: int) -> None:
    items = [str(i) for i in range(n)]
    shuffled = others(items)
    assert sorted(shuffled) == sorted(items)
    assert all(a != b for a, b in zip(items, shuffled, strict=True))
