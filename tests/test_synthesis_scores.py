"""Seed-TTS-eval: the list of sentences, the published mean beside the corpus rate, outputs that are missing."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.errors import BadRecord
from nexus.eval.suites.synthesis import Utterance, read_meta, score_synthesis, speaker_similarity


def sentences(*texts: str) -> list[Utterance]:
    return [Utterance(str(i), text) for i, text in enumerate(texts, 1)]


def test_every_published_form_of_a_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "en" / "meta.lst"
    path.parent.mkdir()
    path.write_text("a|Said.|p/a.wav|Text a.|t/a.wav\nb|Said.|/x/b.wav|Text b.\nc.wav|Text c.|p/c.wav\nd|Text d.\n")
    folder = path.parent
    assert read_meta(path) == [
        Utterance("a", "Text a.", "Said.", folder / "p/a.wav", folder / "t/a.wav"),
        Utterance("b", "Text b.", "Said.", Path("/x/b.wav")),
        Utterance("c", "Text c.", None, folder / "p/c.wav"),
        Utterance("d", "Text d."),
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a|b\nc\n", ":2: has 1 fields"),
        ("a|b|c|d|e|f", ":1: has 6 fields"),
        ("a|b\na.wav|c|p.wav", ":2: id 'a' occurs twice"),
        ("a|", ":1: has an empty field"),
    ],
)
def test_damaged_lines_are_refused_with_their_place(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "meta.lst").write_text(text)
    with pytest.raises(BadRecord, match=complaint):
        read_meta(tmp_path / "meta.lst")


def test_the_mean_of_the_rates_stands_beside_the_rate_of_the_corpus() -> None:
    score = score_synthesis(
        sentences("One two three four!", "Five, six."), {"1": "one two three four", "2": "five"}, "en"
    )
    assert score["mean_wer_percent"] == score["mean_wer_percent_of_given"] == 25.0
    assert score["wer"] == 1 / 6
    assert (score["n"], score["missing"], score["protocol"]) == (2, [], "seedtts-en")


def test_the_published_score_has_three_decimals_and_may_pass_a_hundred() -> None:
    score = score_synthesis(sentences("a b c"), {"1": "a b x"}, "en")
    assert score["mean_wer_percent"] == 33.333
    assert score_synthesis(sentences("a"), {"1": "x y z"}, "en")["mean_wer_percent"] == 300.0


def test_missing_outputs_are_all_wrong_and_listed() -> None:
    score = score_synthesis(sentences("a b", "c d e f"), {"1": "a b"}, "en")
    assert score["mean_wer_percent"] == 50.0
    assert score["mean_wer_percent_of_given"] == 0.0
    assert score["wer"] == 4 / 6
    assert score["missing"] == ["2"]
    assert score_synthesis(sentences("a"), {}, "en")["mean_wer_percent_of_given"] is None


def test_chinese_is_scored_by_simplified_characters() -> None:
    score = score_synthesis(sentences("今天，天气。"), {"1": "今天天氣好"}, "zh")
    assert (score["mean_cer_percent"], score["cer"], score["protocol"]) == (25.0, 0.25, "seedtts-zh+opencc")


@given(
    st.lists(st.tuples(st.sampled_from(["a", "a b", "a b c"]), st.sampled_from(["a", "b", "", "a b c"])), min_size=1)
)
def test_intervals_hold_their_scores(pairs: list[tuple[str, str]]) -> None:
    utterances = sentences(*(text for text, _ in pairs))
    heard = {utterance.id: said for utterance, (_, said) in zip(utterances, pairs, strict=True)}
    score = score_synthesis(utterances, heard, "en")
    for low, high, value in (
        (*cast(list[float], score["mean_ci95"]), cast(float, score["mean_wer_percent"]) / 100),
        (*cast(list[float], score["ci95"]), cast(float, score["wer"])),
    ):
        assert low - 1e-4 <= value <= high + 1e-4


def test_what_has_no_score_is_refused() -> None:
    with pytest.raises(BadRecord, match="0 utterances"):
        score_synthesis([], {}, "en")
    with pytest.raises(BadRecord, match="first '9'"):
        score_synthesis(sentences("a"), {"9": "a"}, "en")
    with pytest.raises(BadRecord, match=r"utterance '2': text '\.\.\.' holds no word"):
        score_synthesis(sentences("a", "..."), {}, "en")
    with pytest.raises(BadRecord, match="another script"):
        score_synthesis(sentences("hello"), {}, "zh")


def test_similarity_is_the_mean_cosine_whatever_the_lengths() -> None:
    prompts = np.array([[1.0, 0.0], [3.0, 4.0], [1e-200, 0.0]])
    spoken = np.array([[5.0, 0.0], [4.0, -3.0], [-1e200, 0.0]])
    score = speaker_similarity(prompts, spoken)
    assert score["similarity"] == pytest.approx(0.0)
    assert score["n"] == 3
    alone = speaker_similarity(prompts[:1], spoken[:1])
    assert alone == {"similarity": 1.0, "similarity_of_given": 1.0, "n": 1, "ci95": [1.0, 1.0]}
    with_missing = speaker_similarity(prompts[:1], spoken[:1], missing=3)
    assert with_missing["similarity"] == 0.25 and with_missing["n"] == 4


@pytest.mark.parametrize(
    ("prompts", "spoken", "complaint"),
    [
        ([[1.0, 0.0]], [[0.0, 0.0]], "what was spoken: row 0 is all zero"),
        ([[1.0], [np.nan]], [[1.0], [1.0]], "prompts: row 1 is not finite"),
        ([[1.0]], [[1.0], [1.0]], r"\[1, 1\] for prompts and \[2, 1\]"),
        (np.zeros((0, 2)), np.zeros((0, 2)), r"\[0, 2\]"),
    ],
)
def test_embeddings_without_a_direction_are_refused(
    prompts: list[list[float]], spoken: list[list[float]], complaint: str
) -> None:
    with pytest.raises(BadRecord, match=complaint):
        speaker_similarity(np.asarray(prompts), np.asarray(spoken))
