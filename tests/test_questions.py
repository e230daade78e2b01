"""When a reply is right: the matching rule, letters, readers; on the real questions where they are at hand."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.errors import BadConfig, BadRecord
from nexus.eval.suites import questions as module
from nexus.eval.suites.questions import (
    Question,
    air_bench_foundation,
    is_right,
    letter,
    llama_questions,
    score,
    voicebench,
    words,
)
from nexus.text import ONES, TENS


@pytest.mark.parametrize(
    ("reference", "reply"),
    [
        ("Paris", "The capital of France is PARIS."),
        ("The lord of the rings", "It's in Lord of the Rings, I think"),
        ("Twenty-four", "There are 24 hours."),
        ("Twenty two", "twenty-two"),
        ("One hundred ninety three", "There are one hundred and ninety-three"),
        ("One hundred", "a hundred degrees"),
        ("Sixty thousands", "about 60,000 miles"),
        ("Sixty thousands", "60 thousand"),
        ("Two hundred fourty eight", "248 words"),
        ("São Paulo", "sao paulo"),
        ("Beyoncé", "Beyonce\u0301 Knowles"),
        ("Baha'u'llah", "Bahá’u’lláh"),
        ("Newton", "Newton's law"),
        ("United States", "the U.S."),
        ("United States", "The USA"),
        ("United States", "America"),
        ("shakespeare", "William Shakespeare"),
        ("Au", "The symbol is Au."),
        ("Pb", "It's P-b"),
        ("He", "HE"),
        ("He", "h e"),
        ("None", "zero"),
        ("Stapes", "The stirrup"),
    ],
)
def test_a_reply_that_holds_the_answer_is_right(reference: str, reply: str) -> None:
    assert score(reference, reply)


@pytest.mark.parametrize(
    ("reference", "reply"),
    [
        ("Paris", "Parisian"),
        ("Five", "twenty five"),
        ("Sixty", "sixty-five"),
        ("Two", "H2O or 2,000"),
        ("Twenty two", "twenty, two"),
        ("One hundred ninety three", "one hundred and two hundred ninety three"),
        ("Blue Whale", "whale, blue"),
        ("He", "I think he knows"),
        ("Be", "Maybe it could be"),
        ("United States", "Let us see"),
        ("Paris", ""),
    ],
)
def test_a_reply_that_holds_only_a_part_or_a_lookalike_is_wrong(reference: str, reply: str) -> None:
    assert not score(reference, reply)


def test_neither_negations_nor_alternatives_are_read() -> None:
    for reply in ("not Paris but London", "Paris or London", "Paris, no, London"):
        assert score("London", reply)
        assert score("Paris", reply)


@given(st.integers(0, 999_999_999))
def test_numbers_in_words_are_the_numbers_in_figures(number: int) -> None:
    def spelled(n: int) -> str:
        for size, name in ((10**6, "million"), (1000, "thousand"), (100, "hundred")):
            if n >= size:
                head, rest = divmod(n, size)
                joint = " and " if size == 100 else " "
                return f"{spelled(head)} {name}" + (f"{joint}{spelled(rest)}" if rest else "")
        return ONES[n] if n < 20 else "-".join([TENS[n // 10 - 2], *([ONES[n % 10]] if n % 10 else [])])

    assert words(spelled(number)) == words(str(number)) == words(f"{number:,}") == [str(number)]


@given(st.lists(st.sampled_from(["red", "4", "twenty", "the", "Brasília", "and", "hundred", "Au"]), min_size=1))
def test_every_reply_holds_itself(parts: list[str]) -> None:
    reply = " ".join(parts)
    assert score(reply, reply) or not words(reply)


@given(st.text(), st.text())
def test_any_text_can_be_scored(reference: str, reply: str) -> None:
    assert score(reference, reply) in (True, False)


def test_aliases_are_keyed_by_the_words_they_are_looked_up_with() -> None:
    table = module._aliases()
    assert [key for key in table if " ".join(words(key)) != key] == []
    needless = [form for key, forms in table.items() for form in forms if f" {key} " in f" {' '.join(words(form))} "]
    assert needless == []


def test_right_answers_of_the_real_questions_are_right_and_those_of_others_hardly_ever(real_data: Path) -> None:
    questions = llama_questions(real_data / "llama_questions")
    assert [question.id for question in questions] == [str(i) for i in range(1, 301)]
    assert all(question.audio.is_file() for question in questions)
    assert all(is_right(question, question.answer) for question in questions)
    known = {" ".join(words(question.answer)) for question in questions}
    assert [key for key in module._aliases() if key not in known] == []
    others = [question.answer for question in questions]
    shifted = [is_right(q, others[(i + by) % 300]) for by in (1, 2, 3) for i, q in enumerate(questions)]
    assert 0 < sum(shifted) < 0.03 * len(shifted)  # some answers occur twice, or hold one another


@pytest.mark.parametrize(
    ("reply", "air", "own"),
    [
        ("B", "B", "B"),
        ("B. the dog", "B", "B"),
        ("The answer is C.", "C", "C"),
        ("The answer is C", None, "C"),
        ("Because of D!", "B", "D"),
        ("(D) a cat", None, "D"),
        ("I would choose B because it rains", None, "B"),
        ("The answer is **A**, not B.", "B", "A"),
        ("Option A is the one", None, "A"),
        ("A dog barks", "A", None),
        ("the answer is b", None, "B"),
        ("It's not A, it is C", None, "C"),
        ("Dogs", "D", None),
        ("Yes", None, None),
        ("", None, None),
        ("None", None, None),
    ],
)
def test_letters_are_found_by_the_published_rule_and_by_ours(reply: str, air: str | None, own: str | None) -> None:
    assert letter("air-bench-foundation/1", reply) == air
    assert letter("choice/1", reply) == own


HEADER = "Questions\tAnswer\tWav Filename\n"


def test_llama_questions_are_read_as_published(tmp_path: Path) -> None:
    (tmp_path / "llama_questions_300.tsv").write_text(HEADER + 'Who painted "Mona Lisa"? \tLeonardo\t13.wav')
    (question,) = llama_questions(tmp_path)
    assert question == Question("13", 'Who painted "Mona Lisa"?', "Leonardo", tmp_path / "13.wav", "contains+aliases/1")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("Question\tAnswer\n", ":1: columns are"),
        (HEADER + "Who?\tMe\n", ":2: found 2 cells"),
        (HEADER + "Who?\t\t1.wav\n", ":2: found 3 cells"),
        (HEADER + "Who?\tThe\t1.wav\n", ":2: answer 'The' holds no word"),
    ],
)
def test_damaged_questions_are_refused_with_their_line(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "llama_questions_300.tsv").write_text(text)
    with pytest.raises(BadRecord, match=complaint):
        llama_questions(tmp_path)


def test_a_folder_without_the_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRecord, match="cannot be read"):
        llama_questions(tmp_path)


def test_voicebench_rows_become_questions_of_their_subsets_rule(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Who?", "reference": "B", "audio": "a/1.wav"},
        {"prompt": "?", "reference": "A", "audio": "2.wav"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert [(q.id, q.rule, q.answer) for q in voicebench(path, "mmsu")] == [
        ("1", "choice/1", "B"),
        ("2", "choice/1", "A"),
    ]
    assert voicebench(path, "openbookqa")[0].audio == tmp_path / "a" / "1.wav"
    with pytest.raises(BadRecord, match=r"jsonl:2: reference 'A' holds no word"):
        voicebench(path, "sd-qa")
    with pytest.raises(BadConfig, match="'alpacaeval' is not scored here"):
        voicebench(path, "alpacaeval")
    path.write_text('{"prompt": "Who?", "reference": "E", "audio": "1.wav"}')
    with pytest.raises(BadRecord, match="'E', expected one of A, B, C, D"):
        voicebench(path, "mmsu")
    path.write_text('{"prompt": "Who?", "reference": "red"}')
    with pytest.raises(BadRecord, match=":1: audio is None"):
        voicebench(path, "sd-qa")


AIR = {
    "path": "1.wav",
    "task_name": "Audio_Grounding",
    "dataset_name": "set",
    "question": "When?",
    "choice_a": "now",
    "choice_b": "then",
    "choice_c": "never",
    "answer_gt": "never",
    "uniq_id": 7,
}


def test_air_bench_items_become_questions_with_the_letter_of_the_right_choice(tmp_path: Path) -> None:
    path = tmp_path / "Foundation_meta.json"
    path.write_text(json.dumps([AIR, AIR | {"task_name": "Sound", "uniq_id": 8, "answer_gt": "now"}]))
    first, second = air_bench_foundation(path)
    assert (first.id, first.answer, first.choices) == ("7", "C", ("now", "then", "never"))
    assert first.audio == tmp_path / "Audio_Grounding_set" / "1.flac"
    assert (second.answer, second.task) == ("A", "Sound_set")
    assert second.audio == tmp_path / "Sound_set" / "1.wav"
    assert is_right(first, "C.") and not is_right(second, "B")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"answer_gt": "later"}, "'later' is none of its choices"),
        ({"task_name": None}, "task_name is None"),
        ({"uniq_id": None}, "no uniq_id"),
        ({"choice_c": None, "choice_d": "never"}, "choice_d without choice_c"),
    ],
)
def test_damaged_air_bench_items_are_refused_with_their_place(
    tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    path = tmp_path / "Foundation_meta.json"
    path.write_text(json.dumps([AIR, AIR | change]))
    with pytest.raises(BadRecord, match=rf"item 1: .*{complaint}"):
        air_bench_foundation(path)


def test_a_file_that_is_no_list_of_items_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "Foundation_meta.json"
    for text, complaint in (("{", "is no JSON"), ("{}", "holds a dict, expected a list")):
        path.write_text(text)
        with pytest.raises(BadRecord, match=complaint):
            air_bench_foundation(path)
