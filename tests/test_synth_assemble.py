"""Training rows: which sample serves which task, how many, and that nothing stands on both sides of the split."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.data.records import read_record
from nexus.errors import BadConfig
from nexus.recipe import validate
from nexus.synth.assemble import TABLE_1, Assemble, AssembleConfig, build, row_line
from nexus.synth.duplicates import comparable
from nexus.synth.records import Record, Rejected
from nexus.types import Audio, Text


def sample(name: str, text: str = "", language: str = "en", **meta: Any) -> Record:
    sound = Audio(path=Path(f"/run/audio/{name}.flac"))
    return Record(name, text or f"the text of {name}", language, sound=sound, meta={"row": name, **meta})


def spoken(name: str, text: str = "", voice: str = "v1", **meta: Any) -> Record:
    return sample(name, text, voice_group=voice, **meta)


def assembled(samples: Sequence[Record], **config: Any) -> tuple[list[Record | Rejected], Assemble]:
    step = build(AssembleConfig(**config))
    step.setup()
    step.survey(lambda: samples)
    return [result for one in samples for result in step([one])], step


def rows(results: Sequence[Record | Rejected]) -> list[Record]:
    return [result for result in results if isinstance(result, Record)]


def test_a_sample_makes_a_row_of_every_task_it_has_what_is_needed_for() -> None:
    samples = [
        sample("a"),
        sample("b", language="zh", translation="hello"),
        sample("c", translation="你好"),
        sample("d", reply="fine", emotion="happy", caption="a woman speaks"),
    ]
    results, _ = assembled(samples, tasks=("asr", "s2tt", "chat", "caption", "ser", "tts", "s2s"))
    assert [(row.id, row.task) for row in rows(results)] == [
        *(("a-asr", "asr"), ("a-tts", "tts")),
        *(("b-asr", "asr"), ("b-s2tt", "s2tt"), ("b-tts", "tts")),
        *(("c-asr", "asr"), ("c-s2tt", "s2tt_en_zh"), ("c-tts", "tts")),
        *(("d-asr", "asr"), ("d-chat", "chat"), ("d-caption", "caption"), ("d-ser", "ser"), ("d-tts", "tts")),
    ]


def test_a_source_may_name_the_one_task_of_a_sample() -> None:
    results, _ = assembled([sample("a", task="asr", reply="fine")], tasks=("asr", "chat", "tts"))
    assert [row.task for row in rows(results)] == ["asr"]


def test_a_sample_that_serves_no_task_is_dropped_with_what_is_missing() -> None:
    results, _ = assembled([sample("a"), sample("b").with_(sound=None)], tasks=("chat", "s2s"))
    assert [r.numbers["missing"] for r in results if isinstance(r, Rejected)] == [
        "reply for chat; reply, spoken reply for s2s",
        "sound",
    ]
    assert {r.reason for r in results if isinstance(r, Rejected)} == {"no_task"}


def test_a_spoken_reply_finds_its_question_wherever_it_stands() -> None:
    answers = [spoken("r1", "it is paris", reply_to="q1"), spoken("r2", "it is rome", reply_to="q2")]
    questions = [spoken("q1", reply="It is Paris."), spoken("q2", reply="It is Rome."), spoken("q3", reply="Nobody.")]
    results, _ = assembled([answers[0], *questions, answers[1]], tasks=("s2s",))
    assert [(row.id, row.meta["reply"], row.meta["reply_audio"]) for row in rows(results)] == [
        ("q1-s2s", "it is paris", "/run/audio/r1.flac"),
        ("q2-s2s", "it is rome", "/run/audio/r2.flac"),
    ]
    assert [(r.record.id, r.reason) for r in results if isinstance(r, Rejected)] == [
        ("r1", "reply_of_another"),
        ("q3", "no_task"),
        ("r2", "reply_of_another"),
    ]


def test_the_rows_of_every_task_follow_the_published_template(tmp_path: Path) -> None:
    one = sample("a", translation="你好", reply="fine", emotion="happy", caption="a woman", licence="CC0")
    answer = sample("r", "fine", reply_to="a", task="tts")
    made, _ = assembled([one, answer], tasks=("asr", "s2tt", "chat", "caption", "ser", "tts", "s2s"))
    lines = [row_line(row, Path("/run")) for row in rows(made)[:7]]
    read = [read_record(line, "rows.jsonl:1", tmp_path) for line in lines]
    said = {}
    for row in read:
        assert row.meta["licence"] == "CC0" and row.meta["split"] == "train"
        assert not {"row", "attempt"} & set(row.meta)
        said[row.task] = [
            [part.text if isinstance(part, Text) else part.path and part.path.name for part in turn.parts]
            for turn in row.turns
        ]
    assert said == {
        "asr": [["a.flac", "Please help me transcribe my current speech into text. "], ["the text of a"]],
        "s2tt_en_zh": [["a.flac", " What is the Chinese equivalent of this English speech?"], ["你好"]],
        "chat": [["a.flac"], ["fine"]],
        "caption": [["a.flac", " please describe the speech. "], ["a woman"]],
        "ser": [["a.flac", " what is the emotion in this speech? "], ["happy"]],
        "tts": [["the text of a"], ["a.flac"]],
        "s2s": [["a.flac"], ["fine", "r.flac"]],
    }
    assert json.loads(lines[0])["messages"][0]["content"][0] == {"type": "audio", "path": "audio/a.flac"}


def test_stages_are_filled_one_after_the_other_and_what_is_beyond_is_dropped() -> None:
    sizes = {"1": {"asr": 3, "tts": 1}, "2": {"asr": 2}}
    results, step = assembled([sample(f"s{n}") for n in range(7)], tasks=("asr", "tts"), rows=sizes)
    assert [row.id for row in rows(results)] == ["s0-asr-1", "s0-tts-1", "s1-asr-1", "s2-asr-1", "s3-asr-2", "s4-asr-2"]
    assert [(r.record.id, r.reason) for r in results if isinstance(r, Rejected)] == [("s5", "enough"), ("s6", "enough")]
    counts = {(row["stage"], row["task"]): (row["made"], row["wanted"]) for row in step.report()["rows"]}
    assert counts == {("1", "asr"): (3, 3), ("1", "tts"): (1, 1), ("2", "asr"): (2, 2)}


def test_halves_are_as_large_as_the_shorter_kind_allows() -> None:
    samples = [spoken(f"s{n}") for n in range(9)] + [sample(f"r{n}", speaker="anna") for n in range(4)]
    results, _ = assembled(samples, tasks=("asr",), recorded_share=0.5)
    assert Counter(row.meta["origin"] for row in rows(results)) == {"synthetic": 4, "recorded": 4}
    assert Counter(r.reason for r in results if isinstance(r, Rejected)) == {"enough": 5}


def test_halves_of_a_stated_size_do_not_fill_up_with_the_other_kind_and_the_report_says_what_is_short() -> None:
    samples = [spoken(f"s{n}") for n in range(9)] + [sample("r", speaker="anna")]
    results, step = assembled(samples, tasks=("asr",), recorded_share=0.5, rows={"1": {"asr": 6}})
    assert Counter(row.meta["origin"] for row in rows(results)) == {"synthetic": 3, "recorded": 1}
    assert step.report()["rows"] == [
        {"stage": "1", "task": "asr", "origin": "recorded", "wanted": 3, "made": 1},
        {"stage": "1", "task": "asr", "origin": "synthetic", "wanted": 3, "made": 3},
    ]


def test_the_full_size_preset_is_table_1_of_the_paper() -> None:
    config = AssembleConfig(tasks=("asr", "s2tt", "chat", "caption", "ser", "tts", "s2s"), rows="table-1")
    assert config.sizes() == TABLE_1
    assert sum(TABLE_1["1"].values()) == 8_190_000  # "8 million bilingual speech-text pairs"
    assert TABLE_1["3"] == {"tts": 40_000_000, "s2s": 220_000}


def test_a_text_or_speaker_that_is_tested_is_not_trained_on_whatever_the_order() -> None:
    samples = [
        spoken("early", "Good morning!", "v1", split="train"),
        spoken("tested", "good morning", "v2", split="test"),
        spoken("mate", "another text", "v2", split="train"),
        spoken("free", "a third text", "v3", split="train"),
    ]
    results, step = assembled(samples, tasks=("asr", "tts"))
    dropped = {r.record.id: r.numbers["shares"] for r in results if isinstance(r, Rejected)}
    assert dropped == {"early": "text", "mate": "speaker"}
    assert {(row.id, row.meta["split"]) for row in rows(results)} == {
        *(("tested-asr", "test"), ("tested-tts", "test")),
        *(("free-asr", "train"), ("free-tts", "train")),
    }
    split = step.report()["split"]
    assert (split["texts"], split["speakers"]) == ({"train": 1, "test": 1}, {"train": 1, "test": 1})
    assert split["shared_texts"] == split["shared_speakers"] == 0


def test_a_speaker_nobody_knows_is_never_tested_and_counted_apart() -> None:
    results, step = assembled([sample(f"s{n}") for n in range(40)], tasks=("asr",), test_share=0.5)
    assert {row.meta["split"] for row in rows(results)} == {"train"}
    assert step.report()["split"]["unknown_speaker_rows"] == {"train": 40, "test": 0}


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 6), st.sampled_from(["", "train", "test"])), max_size=60),
    st.floats(0, 0.9),
)
def test_no_text_and_no_speaker_is_ever_on_both_sides_and_nothing_vanishes(
    drawn: list[tuple[int, int, str]], share: float
) -> None:
    samples = [
        sample(f"s{n}", f"text number {text}", speaker=f"p{speaker}", **({"split": split} if split else {}))
        for n, (text, speaker, split) in enumerate(drawn)
    ]
    results, step = assembled(samples, tasks=("asr",), test_share=share)
    sides: dict[str, set[object]] = {"train": set(), "test": set()}
    for row in rows(results):
        sides[row.meta["split"]] |= {comparable(row.text), row.meta["speaker"]}
    assert not sides["train"] & sides["test"]
    split = step.report()["split"]
    assert split["shared_texts"] == split["shared_speakers"] == 0
    assert [r.record.id if isinstance(r, Rejected) else r.id.removesuffix("-asr") for r in results] == [
        one.id for one in samples
    ]


def test_the_side_of_a_speaker_does_not_change_with_other_speakers() -> None:
    few = [sample(f"s{n}", speaker=f"p{n}") for n in range(50)]
    more = [*few, *(sample(f"t{n}", speaker=f"q{n}") for n in range(50))]
    sides = [
        {row.meta["speaker"]: row.meta["split"] for row in rows(assembled(some, tasks=("asr",), test_share=0.3)[0])}
        for some in (few, more)
    ]
    assert sides[0].items() <= sides[1].items()
    assert 5 <= list(sides[0].values()).count("test") <= 25


def test_the_digests_of_the_proof_do_not_depend_on_the_order() -> None:
    samples = [spoken(f"s{n}", voice=f"v{n % 5}", split="test" if n % 5 == 0 else "train") for n in range(20)]
    one, other = (assembled(some, tasks=("asr",))[1].report()["split"] for some in (samples, samples[::-1]))
    assert one == other
    assert one["texts_sha256"]["train"] != one["texts_sha256"]["test"]


@pytest.mark.parametrize(
    ("said", "section"),
    [
        ("chat", {"tasks": ["asr"], "rows": {"1": {"chat": 5}}}),
        ("tasks", {"tasks": []}),
        ("tasks.0", {"tasks": ["sing"]}),
        ("rows", {"rows": "table-2"}),
        ("recorded_share", {"recorded_share": 1.0}),
        ("unknown key 'task'", {"task": "asr"}),
    ],
)
def test_a_section_that_cannot_be_meant_is_refused_in_one_line(said: str, section: dict[str, Any]) -> None:
    with pytest.raises(BadConfig) as caught:
        validate(AssembleConfig, section, "recipe.yaml")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_fingerprint_changes_with_every_setting() -> None:
    configs = [{}, {"tasks": ("asr",)}, {"test_share": 0.1}, {"recorded_share": 0.5}, {"rows": {"1": {"asr": 1}}}]
    assert len({build(AssembleConfig(**config)).fingerprint for config in configs}) == len(configs)
