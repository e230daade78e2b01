"""Reading sources: every format row by row, what cannot be read with its reason and place, nothing as a whole."""

import csv
import gzip
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.errors import BadConfig, BadRecord
from nexus.synth.read import MAX_LINE_BYTES, SourceConfig, read
from nexus.synth.records import Record, Rejected


def rows_of(path: Path, **settings: Any) -> list[Record | Rejected]:
    return list(read([SourceConfig(path=str(path), **settings)], 0, None))


def texts_of(rows: list[Record | Rejected]) -> list[str]:
    return [row.text if isinstance(row, Record) else f"<{row.reason}>" for row in rows]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


TWO = {"text": "words", "reply": "answer"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"words": "hello", "answer": "hi", "more": 1}\n\n{"words": "你好", "answer": "嗨"}\n'),
        ("a.tsv", "words\tanswer\tmore\nhello\thi\t1\n你好\t嗨\t2\n"),
        ("a.csv", 'words,answer,more\n"hello",hi,1\n你好,嗨,"2"\n'),
        ("a.tsv", "\ufeffwords\tanswer\r\nhello\thi\r\n你好\t嗨"),
    ],
)
def test_columns_are_found_by_their_names(tmp_path: Path, name: str, content: str) -> None:
    rows = rows_of(write(tmp_path / name, content), columns=TWO, language="xx", licence="CC0")
    assert texts_of(rows) == ["hello", "你好"]
    for row, reply in zip(rows, ("hi", "嗨"), strict=True):
        assert isinstance(row, Record)
        assert row.language == "xx"
        assert {key: row.meta[key] for key in ("reply", "source", "licence", "attempt")} == {
            "reply": reply,
            "source": "a",
            "licence": "CC0",
            "attempt": 0,
        }


def test_plain_text_is_one_text_a_line(tmp_path: Path) -> None:
    assert texts_of(rows_of(write(tmp_path / "a.txt", "one\n\n  \ntwo, three\n"))) == ["one", "two, three"]


def test_compressed_sources_are_read_like_others(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "one"}\n'))
    assert texts_of(rows_of(path)) == ["one"]


def test_a_column_may_say_the_language_and_another_name_a_sound(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "text\tlang\tfile\nhello\ten\tx/1.wav\nhola\t\t2.wav\n")
    columns = {"text": "text", "language": "lang", "audio": "file"}
    first, second = rows_of(path, columns=columns, language="es")
    assert isinstance(first, Record) and first.sound is not None
    assert isinstance(second, Record) and second.sound is not None
    assert (first.language, second.language) == ("en", "es")
    assert (first.sound.path, second.sound.path) == (tmp_path / "x/1.wav", tmp_path / "2.wav")


def test_parquet_is_read_in_pieces(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    from pyarrow import parquet

    table = pyarrow.table({"words": [f"text {n}" for n in range(3000)], "answer": ["a"] * 3000, "other": [0] * 3000})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    rows = rows_of(tmp_path / "a.parquet", columns=TWO)
    assert texts_of(rows) == [f"text {n}" for n in range(3000)]
    with pytest.raises(BadRecord, match=r"has no column 'text', its columns are words, answer, other"):
        rows_of(tmp_path / "a.parquet")
    with pytest.raises(BadRecord, match="cannot be read as Parquet"):
        rows_of(write(tmp_path / "b.parquet", "hello"))


def test_lhotse_cuts_give_text_speaker_and_sound(tmp_path: Path) -> None:
    pytest.importorskip("lhotse", reason="the extra `corpora` is not installed")
    supervision = {"id": "s", "recording_id": "r", "start": 0, "duration": 1, "channel": 0}
    recording = {
        "id": "r",
        "sources": [{"type": "file", "channels": [0], "source": "/x/r.wav"}],
        "sampling_rate": 16000,
        "num_samples": 32000,
        "duration": 2.0,
    }
    cut = {"id": "c", "start": 0.5, "duration": 1, "channel": 0, "type": "MonoCut", "recording": recording}
    good = cut | {"supervisions": [supervision | {"text": "hello", "language": "en", "speaker": "ann"}]}
    lines = [good, cut | {"supervisions": []}, cut | {"supervisions": [supervision]}]
    path = write(tmp_path / "cuts.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    columns = {"text": "text", "speaker": "speaker", "audio": "audio", "start": "start", "seconds": "seconds"}
    rows = rows_of(path, format="lhotse", columns=columns)
    assert texts_of(rows) == ["hello", "<unreadable>", "<missing_column>"]
    first = rows[0]
    assert isinstance(first, Record) and first.sound is not None
    assert first.sound.path == Path("/x/r.wav")
    assert (first.meta["speaker"], first.meta["start"], first.meta["seconds"]) == ("ann", 0.5, 1)


# What cannot be read


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": \n{"text": "two"}\n', ["one", "<unreadable>", "two"]),
        (
            "a.jsonl",
            b'{"text": "one"}\n[1]\n"x"\n{"text": 5}\n{"t": "x"}\n',
            ["one", *["<unreadable>"] * 3, "<missing_column>"],
        ),
        ("a.jsonl", b'{"text": "one"}\n' + b"[" * 100_000 + b"\n", ["one", "<unreadable>"]),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\\ud800 half"}\n', ["one", "<control_characters>"]),
        ("a.tsv", b"text\nkeep\na\tb\n  \t \nlast\n", ["keep", "<unreadable>", "<unreadable>", "last"]),
        ("a.csv", b'text\none\n"a"b\ntwo\n', ["one", "<unreadable>", "two"]),
        ("a.csv", b'text\none\n"two\nlines"\nthree\n', ["one", "two\nlines", "three"]),
        ("a.csv", b'text\none\n"never closed\n', ["one", "<unreadable>"]),
        ("a.txt", b"one\n\xff\xfe\ntwo\n", ["one", "<not_utf8>", "two"]),
        ("a.txt", b"bell\x07\nnul\x00\ntab\tstays\n", ["<control_characters>", "<control_characters>", "tab\tstays"]),
        ("a.txt", b"one\n" + b"x" * (MAX_LINE_BYTES + 10) + b"\ntwo\n", ["one", "<line_too_long>", "two"]),
        ("a.txt", b"one\n" + b"x" * (3 * MAX_LINE_BYTES), ["one", "<line_too_long>"]),
        ("a.csv", b"text\none\n" + b"x" * (MAX_LINE_BYTES + 10) + b"\ntwo\n", ["one", "<line_too_long>", "two"]),
        ("a.jsonl", b'{"text": "one"}\n{"text": "  "}\n', ["one", "<empty>"]),
        ("a.txt", "مرحبا بالعالم\n😀 emoji\nмир and 世界\n".encode(), ["مرحبا بالعالم", "😀 emoji", "мир and 世界"]),
    ],
)
def test_a_row_that_cannot_be_read_is_rejected_and_the_others_are_not(
    tmp_path: Path, name: str, content: bytes, expected: list[str]
) -> None:
    rows = rows_of(write(tmp_path / name, content))
    assert texts_of(rows) == expected
    for row in rows:
        if isinstance(row, Rejected):
            assert row.record.meta["line"] >= 1
            assert row.record.meta["source"] == "a"


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("a.jsonl", "", {}, "holds no row"),
        ("a.tsv", "text\n", {}, "holds no row"),
        ("a.txt", "\n\n", {}, "holds no row"),
        ("a.tsv", "words\thi\n", {}, "has no column 'text', its columns are words, hi"),
        ("a.jsonl", '{"words": "x"}\n', {}, "has no column 'text', its columns are words"),
        ("a.docx", "x", {}, "suffix '.docx' says no format"),
        ("a.txt", "x", {"columns": {}}, "columns: expected at least text"),
    ],
)
def test_a_source_that_is_none_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((BadConfig, BadRecord), match=message) as caught:
        read([SourceConfig(path=str(write(tmp_path / name, content)), **settings)], 0, None)
    assert "\n" not in str(caught.value)


def test_a_missing_file_no_source_two_of_one_name_and_a_limit_of_nothing_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\n")
    for sources, limit, message in [
        ([SourceConfig(path=str(tmp_path / "b.txt"))], None, "no such file"),
        ([], None, "names no source"),
        ([SourceConfig(path=str(path)), SourceConfig(path=str(path))], None, "two of one name"),
        ([SourceConfig(path=str(path))], 0, "limit: expected at least 1"),
    ]:
        with pytest.raises(BadConfig, match=message):
            read(sources, 0, limit)


# Many sources


def mixed(tmp_path: Path, seed: int, limit: int | None) -> list[Record]:
    sources = [
        SourceConfig(
            path=str(write(tmp_path / f"{name}.txt", "".join(f"{name} {n}\n" for n in range(300)))), weight=weight
        )
        for name, weight in (("big", 3.0), ("small", 1.0))
    ]
    return [row for row in read(sources, seed, limit) if isinstance(row, Record)]


def test_weights_say_how_often_a_source_is_drawn_and_no_row_is_lost(tmp_path: Path) -> None:
    drawn = Counter(row.meta["source"] for row in mixed(tmp_path, 0, 200))
    assert drawn["big"] / 200 == pytest.approx(0.75, abs=0.1)
    everything = mixed(tmp_path, 0, None)
    assert len(everything) == len({row.id for row in everything}) == 600
    for name in ("big", "small"):
        assert [row.text for row in everything if row.meta["source"] == name] == [f"{name} {n}" for n in range(300)]


def test_the_order_is_that_of_the_seed_and_a_limit_cuts_it(tmp_path: Path) -> None:
    texts = [row.text for row in mixed(tmp_path, 0, None)]
    assert [row.text for row in mixed(tmp_path, 0, None)] == texts
    assert [row.text for row in mixed(tmp_path, 0, 50)] == texts[:50]
    assert [row.text for row in mixed(tmp_path, 1, 50)] != texts[:50]


def test_ids_follow_from_content_and_place_alone(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    here = rows_of(write(tmp_path / "a.txt", "one\none\n"))
    there = rows_of(write(tmp_path / "x" / "a.txt", "one\none\nmore\n"))
    ids = [row.id for row in here if isinstance(row, Record)]
    assert len(set(ids)) == 2
    assert ids == [row.id for row in there if isinstance(row, Record)][:2]


def test_a_long_file_is_never_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with path.open("w") as file:
        for number in range(6_000):
            file.write(f"{number} {'words ' * 40}\n")
    tracemalloc.start()
    number = sum(1 for _ in read([SourceConfig(path=str(path))], 0, None))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert number == 6_000
    assert path.stat().st_size > 1_400_000
    assert peak_bytes < 400_000


PRINTABLE = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20)


@given(st.lists(PRINTABLE, min_size=1, max_size=8))
def test_every_text_that_a_writer_writes_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    with (folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    lines = [json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0) for text in texts]
    (folder / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert texts_of(rows_of(folder / "a.csv")) == texts
    assert texts_of(rows_of(folder / "b.jsonl")) == texts
