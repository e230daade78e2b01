"""Rows of a user's file: every format gives the same conversation, what is written is read back, bad rows are named."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.data.records import media_files, read_record, with_media, write_record
from nexus.errors import BadRecord
from nexus.types import Audio, Image, Part, Sample, Text, Turn, Video

ROOT = Path("/data/set")
WHERE = "train.jsonl:812"


def read(row: Any) -> Sample:
    return read_record(row if isinstance(row, str) else json.dumps(row), WHERE, ROOT)


def plain(sample: Sample) -> list[tuple[str, list[Any]]]:
    """Turns as values that can be compared: media are equal by kind and file."""

    def value(part: Part) -> Any:
        return part if isinstance(part, Text) else (type(part).__name__, part.path)

    return [(turn.role, [value(part) for part in turn.parts]) for turn in sample.turns]


def refused(row: Any, *words: str) -> str:
    with pytest.raises(BadRecord) as caught:
        read(row)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: ") and "\n" not in message
    for word in words:
        assert word in message, message
    return message


SHOWN = [
    ("system", [Text("be brief")]),
    ("user", [("Image", ROOT / "a.png"), Text("and "), ("Audio", ROOT / "b/c.wav"), Text("what?")]),
    ("assistant", [Text("a cat")]),
]
SAID = "<image>and <audio>what?"
PARTS = [
    {"type": "image", "path": "a.png"},
    {"type": "text", "text": "and "},
    {"type": "audio", "path": "b/c.wav"},
    {"type": "text", "text": "what?"},
]
OPENAI = [
    {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
    {"type": "text", "text": "and "},
    {"type": "audio_url", "audio_url": {"url": "b/c.wav"}},
    {"type": "text", "text": "what?"},
]
TEMPLATE = [
    {"type": "image", "image": "a.png"},
    {"type": "text", "text": "and "},
    {"type": "audio", "audio": "b/c.wav"},
    {"type": "text", "text": "what?"},
]


def messages(content: Any) -> list[dict[str, Any]]:
    turns = [("system", "be brief"), ("user", content), ("assistant", "a cat")]
    return [{"role": role, "content": said} for role, said in turns]


MEDIA = {"images": ["a.png"], "audios": ["b/c.wav"]}
SAME = {
    "canonical": {"messages": messages(PARTS)},
    "OpenAI's parts": {"messages": messages(OPENAI)},
    "parts of chat templates": {"messages": messages(TEMPLATE)},
    "ms-swift": {"messages": messages(SAID), **MEDIA},
    "ms-swift with objects": {
        "messages": messages(SAID),
        "images": [{"path": "a.png"}],
        "audios": [{"path": "b/c.wav"}],
    },
    "ms-swift query": {"system": "be brief", "query": SAID, "response": "a cat", **MEDIA},
    "ms-swift conversation": {
        "system": "be brief",
        "conversation": [{"human": SAID, "assistant": "a cat"}],
        **MEDIA,
    },
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": SAID}, {"from": "gpt", "value": "a cat"}],
        "system": "be brief",
        **MEDIA,
    },
    "one picture under its singular": {
        "conversations": [
            {"from": "system", "value": "be brief"},
            {"from": "human", "value": SAID},
            {"from": "gpt", "value": "a cat"},
        ],
        "image": "a.png",
        "audio": ["b/c.wav"],
    },
    "alpaca": {"system": "be brief", "instruction": SAID, "output": "a cat", **MEDIA},
}


@pytest.mark.parametrize("name", SAME)
def test_every_format_gives_the_same_conversation(name: str) -> None:
    sample = read(SAME[name])
    assert plain(sample) == SHOWN
    assert (sample.id, sample.task, sample.meta) == (WHERE, "chat", {})


def test_history_comes_before_the_question_and_input_behind_the_instruction() -> None:
    row = {"instruction": "add", "input": "2 and 3", "output": "5", "history": [["hello", "good day"]]}
    said = [part.text for turn in read(row).turns for part in turn.parts if isinstance(part, Text)]
    assert said == ["hello", "good day", "add\n2 and 3", "5"]


def test_media_without_marks_stand_before_the_first_question() -> None:
    row = {"query": "what?", "response": "a cat", "history": [["hello", "good day"]], "videos": ["f.mp4"], **MEDIA}
    (role, parts), *rest = plain(read(row))
    assert role == "user" and parts[-1] == Text("hello")
    assert {part[0] for part in parts[:-1]} == {"Audio", "Image", "Video"}
    assert all(isinstance(part, Text) for _, others in rest for part in others)


def test_an_answer_may_carry_sound_as_a_mark_or_as_a_part() -> None:
    marked = read(
        {
            "messages": [
                {"role": "user", "content": "<audio>"},
                {"role": "assistant", "content": "good day<audio>"},
            ],
            "audios": ["asked.wav", "said.wav"],
        }
    )
    assert plain(marked)[1] == ("assistant", [Text("good day"), ("Audio", ROOT / "said.wav")])
    assert [path.name for _, path in media_files(marked)] == ["asked.wav", "said.wav"]


def test_marks_in_the_texts_of_parts_are_plain_words() -> None:
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "the tag <audio> in html"}]}]}
    assert plain(read(row)) == [("user", [Text("the tag <audio> in html")])]


def test_keys_of_ones_own_are_kept_and_identity_is_read() -> None:
    sample = read({"id": 7, "task": "asr", "query": "a", "response": "b", "lang": "en", "meta": {"speaker": "ann"}})
    assert (sample.id, sample.task, sample.meta) == ("7", "asr", {"speaker": "ann", "lang": "en"})


WORDS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
NAMES = st.text("abcäß字 -_09", min_size=1, max_size=8).filter(lambda name: name.strip())
PATHS = st.builds(
    lambda folder, *names: folder.joinpath(*names), st.sampled_from([ROOT, Path("/else/where")]), NAMES, NAMES
)
TEXTS = st.builds(Text, WORDS, st.booleans())
SHOWABLE = TEXTS | st.builds(lambda kind, path: kind(path=path), st.sampled_from([Audio, Image, Video]), PATHS)
ASKED = st.builds(lambda parts: Turn("user", tuple(parts)), st.lists(SHOWABLE, min_size=1, max_size=4))
ANSWERED = st.builds(
    lambda text, path: Turn("assistant", (Text(text), *([Audio(path=path)] if path else []))),
    WORDS,
    st.none() | PATHS,
)
SAMPLES = st.builds(
    lambda turns, meta, task: Sample("row", task, tuple(turns), meta),
    st.lists(ASKED | ANSWERED, min_size=1, max_size=5),
    st.dictionaries(st.text("mnopq", min_size=3), st.none() | st.integers() | WORDS, max_size=2),
    st.text("abc", min_size=1),
)


@given(SAMPLES)
def test_what_is_written_is_read_back(sample: Sample) -> None:
    line = write_record(sample, ROOT)
    again = read(line)
    assert "\n" not in line
    assert plain(again) == plain(sample)
    assert (again.id, again.task, dict(again.meta)) == (sample.id, sample.task, dict(sample.meta))
    assert write_record(again, ROOT) == line


@given(SAMPLES)
def test_media_can_be_laid_elsewhere(sample: Sample) -> None:
    files = [path for _, path in media_files(sample)]
    moved = with_media(sample, [Path("/new") / str(n) for n in range(len(files))])
    assert [path for _, path in media_files(moved)] == [Path("/new") / str(n) for n in range(len(files))]
    assert plain(with_media(moved, files)) == plain(sample)


def test_media_in_memory_cannot_be_written() -> None:
    sample = Sample("row 3", "chat", (Turn("user", (Audio(rate_hz=16_000),)),))
    with pytest.raises(BadRecord, match=r"row 3: audio in memory.*file"):
        write_record(sample, ROOT)


def ask(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}], **more}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", ("no JSON",)),
        ("[" * 100_000, ("nested too deeply",)),
        ('{"query": NaN, "response": "b"}', ("NaN",)),
        ('{"query": "a", "query": "b", "response": "c"}', ("'query' stands twice",)),
        ('{"query": "\\ud800", "response": "b"}', ("surrogates",)),
        (["a"], ("expected an object", "list")),
        ({}, ("messages", "no key")),
        ({"text": "a"}, ("messages, conversations", "text")),
        ({"messages": [], "query": "a"}, ("found messages and query",)),
        ({"messages": []}, ("at least one turn",)),
        ({"messages": "hi"}, ("messages", "list")),
        ({"messages": ["hi"]}, ("turn 0", "object")),
        ({"messages": [{"role": "tool", "content": "a"}]}, ("turn 0: role", "'tool'")),
        ({"messages": [{"role": "user", "content": None}]}, ("turn 0: content", "null")),
        ({"messages": [{"role": "user", "content": "a", "name": "x"}]}, ("turn 0", "'name'")),
        ({"messages": [{"role": "user", "content": ""}]}, ("turn 0: holds nothing",)),
        (ask([{"type": "text"}]), ("turn 0 part 0", "text")),
        (ask([{"type": "text", "text": "a"}, {"type": "smell", "path": "x"}]), ("turn 0 part 1", "'smell'")),
        (ask([{"type": "image", "path": "a", "url": "b"}]), ("turn 0 part 0", "nothing else")),
        (ask([{"type": "image", "path": 3}]), ("turn 0 part 0", "name of a file")),
        (ask("<image><image>", images=["a.png"]), ("2 <image>", "1 given")),
        (ask("<audio>what?"), ("1 <audio>", "0 given")),
        (ask([{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}]), ("https", "nothing is fetched")),
        (ask("a", images=["file:///etc/passwd"]), ("images 0", "address of file")),
        (ask("a", images=["../secret.png"]), ("images 0", "leaves the folder", "absolute")),
        (ask("a", images=["b/../../secret.png"]), ("leaves the folder",)),
        (ask("a", images=["a\0.png"]), ("characters",)),
        (ask("a", tools=[]), ("'tools'",)),
        (ask("a", audois=["a.wav"]), ("'audois'", "'audios'")),
        (ask("a", meta=3), ("meta",)),
        (ask("a", id=[1]), ("id",)),
        ({"messages": [{"role": "assistant", "content": "<image>"}], "images": ["a"]}, ("turn 0", "at most one sound")),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, ("turn 1", "system")),
        (
            {"messages": [{"role": "assistant", "content": "<audio>"}], "audios": ["a.wav"]},
            ("turn 0", "needs its words"),
        ),
        ({"instruction": "a"}, ("output is missing",)),
        ({"query": "a", "history": [["only one"]]}, ("history 0",)),
    ],
)
def test_a_bad_row_is_named_with_both_sides(row: Any, words: tuple[str, ...]) -> None:
    refused(row, *words)


def test_a_sound_read_aloud_needs_no_words_of_its_own() -> None:
    asked = [{"type": "text", "text": "good day", "aloud": True}]
    said = [{"type": "audio", "path": "said.wav"}]
    row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
    assert plain(read(row)) == [("user", [Text("good day", True)]), ("assistant", [("Audio", ROOT / "said.wav")])]


def test_an_absolute_path_may_lie_anywhere() -> None:
    assert plain(read(ask("<image>", images=["/else/a.png"])))[0][1] == [("Image", Path("/else/a.png"))]


EMBEDDED = base64.b64encode(b"RIFF....").decode()


@pytest.mark.parametrize(
    ("part", "ending"),
    [
        ({"type": "input_audio", "input_audio": {"data": EMBEDDED, "format": "wav"}}, "wav"),
        ({"type": "audio_url", "audio_url": {"url": f"data:audio/x-wav;base64,{EMBEDDED}"}}, "xwav"),
    ],
)
def test_media_inside_a_row_are_handed_over_or_refused(part: dict[str, Any], ending: str) -> None:
    kept = []

    def keep(kind: str, content: bytes, ending: str) -> Path:
        kept.append((kind, content, ending))
        return Path("/kept/0")

    sample = read_record(json.dumps(ask([part])), WHERE, ROOT, keep)
    assert kept == [("audio", b"RIFF....", ending)]
    assert plain(sample)[0][1] == [("Audio", Path("/kept/0"))]
    refused(ask([part]), "turn 0 part 0", "nexus data import")


@pytest.mark.parametrize("url", ["data:audio/wav;base64,@@@", "data:audio/wav,abc", "data:"])
def test_data_that_is_no_base64_is_refused(url: str) -> None:
    with pytest.raises(BadRecord, match="base64"):
        read_record(json.dumps(ask("<audio>", audios=[url])), WHERE, ROOT, lambda *_: Path("/kept"))


@settings(max_examples=40)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | WORDS,
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    ["messages", "role", "content", "type", "text", "path", "audios", "query", "from", "value"]
                ),
                inner,
            )
        ),
    )
)
def test_any_json_is_read_or_refused_in_one_line(value: Any) -> None:
    try:
        read(value if isinstance(value, dict) else {"messages": value})
    except BadRecord as error:
        assert "\n" not in str(error) and str(error).startswith(WHERE)
