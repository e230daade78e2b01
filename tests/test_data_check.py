"""A user's own file: lengths from headers, an index that is kept, `data check` and `data import`."""

import base64
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files import compressed_sound, film_file, picture_file, sound_file, tone
from PIL import Image as Pillow
from tiny import tiny_recipe, tiny_tokenizer

from nexus import media
from nexus.data.chat import render
from nexus.data.headers import limits_for, row_length
from nexus.data.importing import Checked, check, import_
from nexus.data.jsonl import JsonLines
from nexus.data.records import media_files, read_record
from nexus.errors import BadConfig, BadMedia, BadRecord
from nexus.types import Audio, Image, Part, Sample, Text, Turn, Video

SPECS = tiny_recipe().model
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "own-data"


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    tiny_tokenizer().save(path)
    return path


def row(*shown: dict[str, Any], answer: Any = "two", **more: Any) -> str:
    turns = [{"role": "user", "content": [*shown, {"type": "text", "text": "what is"}]}]
    return json.dumps({"messages": [*turns, {"role": "assistant", "content": answer}], **more})


def medium(kind: str, path: Path | str) -> dict[str, str]:
    return {"type": kind, "path": str(path)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a sound, a picture and a film."""
    made = tmp_path / "set"
    made.mkdir()
    (made / "a.wav").write_bytes(sound_file(tone(1.5, 8000), 8000))
    (made / "b.png").write_bytes(picture_file(Pillow.new("RGB", (120, 90))))
    (made / "c.mp4").write_bytes(film_file(30, 10))
    return made


GOOD = (
    row(medium("audio", "a.wav")),
    row(medium("image", "b.png"), id="seen"),
    row(medium("video", "c.mp4")),
    row(answer=[{"type": "text", "text": "two"}, medium("audio", "a.wav")]),
)


def lines(path: Path, *rows: str) -> Path:
    path.write_text("".join(row + "\n" for row in rows))
    return path


def checked(file: Path, **options: Any) -> tuple[Checked, list[tuple[int, str]]]:
    found: list[tuple[int, str]] = []
    return check(file, lambda line, reason: found.append((line, reason)), **options), found


def decoded_length(part: Part) -> int:
    """Positions of a row with this medium, decoded."""
    loaded = media.load(part, limits_for(SPECS), fps=2.0)
    return len(render([Turn("user", (loaded,))], tiny_tokenizer(), SPECS).tokens)


SOUNDS = {
    "8 kHz.wav": sound_file(tone(1.234, 8000), 8000),
    "stereo 44.1 kHz.wav": sound_file(np.stack([tone(2.345, 44_100)] * 2, 1), 44_100),
    "lossless.flac": sound_file(tone(1.777, 22_050), 22_050, "FLAC"),
    "vorbis.ogg": sound_file(tone(1.9, 16_000), 16_000, "OGG", "VORBIS"),
    "two windows.wav": sound_file(tone(4.3, 16_000), 16_000),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_a_sound_is_as_long_as_its_header_says(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(SOUNDS[name])
    measured = row_length(Sample("", "", (Turn("user", (Audio(path=path),)),)), tiny_tokenizer(), SPECS)
    assert measured.tokens == decoded_length(Audio(path=path))
    samples = media.load_audio(path).samples
    assert samples is not None
    windows = [n // 160 / 100 for n in SPECS.hearing.windows_for(len(samples))]  # type: ignore[union-attr]
    assert measured[1:] == (sum(windows), len(windows), max(windows))


@pytest.mark.parametrize(
    ("format", "codec"), [("mp3", "libmp3lame"), ("mp4", "aac"), ("adts", "aac"), ("webm", "libopus")]
)
def test_a_compressed_sound_is_as_long_as_its_container_says_within_a_position(
    format: str, codec: str, tmp_path: Path
) -> None:
    path = tmp_path / "sound"
    path.write_bytes(compressed_sound(format, codec))
    measured = row_length(Sample("", "", (Turn("user", (Audio(path=path),)),)), tiny_tokenizer(), SPECS)
    assert abs(measured.tokens - decoded_length(Audio(path=path))) <= 1
    assert measured.audio_seconds == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_as_large_as_it_is_shown(format: str, orientation: int, tmp_path: Path) -> None:
    exif = Pillow.Exif()
    exif[274] = orientation
    path = tmp_path / "picture"
    path.write_bytes(picture_file(Pillow.new("RGB", (300, 60)), format, exif=exif))
    measured = row_length(Sample("", "", (Turn("user", (Image(path=path),)),)), tiny_tokenizer(), SPECS)
    assert measured.tokens == decoded_length(Image(path=path)) and measured.windows == 0


@pytest.mark.parametrize("frames", [1, 9, 10, 26, 30])
def test_a_film_has_as_many_frames_as_its_duration_asks_for(frames: int, tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(film_file(frames, 10))
    measured = row_length(Sample("", "", (Turn("user", (Video(path=path),)),)), tiny_tokenizer(), SPECS)
    assert measured.tokens == decoded_length(Video(path=path))


@pytest.mark.parametrize(
    ("kind", "content", "word"),
    [
        (Audio, b"RIFF1234WAVEfmt nonsense", "header"),
        (Audio, sound_file(tone(21.0, 8000), 8000), "the limit is 20 s"),
        (Audio, sound_file(tone(0.0, 8000), 8000), "no samples"),
        (Image, b"\x89PNG\r\n\x1a\nnonsense", "header"),
        (Image, b"nonsense", "convert it"),
        (Video, b"nonsense", "known format"),
        (Video, film_file(200, 10), "32 frames"),
    ],
)
def test_a_header_that_cannot_be_used_is_refused(kind: Any, content: bytes, word: str, tmp_path: Path) -> None:
    path = tmp_path / "medium"
    path.write_bytes(content)
    with pytest.raises(BadMedia, match=word):
        row_length(Sample("", "", (Turn("user", (kind(path=path),)),)), tiny_tokenizer(), SPECS)


def test_rows_of_a_file_have_the_lengths_of_their_batches(folder: Path, tmp_path: Path) -> None:
    file = lines(folder / "train.jsonl", GOOD[0], "", *GOOD[1:])
    source = JsonLines(file, tiny_tokenizer(), SPECS, tmp_path / "index")
    assert len(source) == len(source.lengths) == 4
    assert [source[n].id for n in range(4)] == [f"{file}:1", "seen", f"{file}:4", f"{file}:5"]
    for n in range(4):
        turns = [Turn(t.role, tuple(media.load(p, fps=2.0) for p in t.parts)) for t in source[n].turns]
        assert len(render(turns, tiny_tokenizer(), SPECS).tokens) == source.lengths.tokens[n]
    assert source.lengths.audio_seconds.tolist() == [1.5, 0.0, 0.0, 0.0]  # an answer's sound is not heard
    again = pickle.loads(pickle.dumps(source))
    assert [path for _, path in media_files(again[0])] == [folder / "a.wav"]
    first = JsonLines(file, tiny_tokenizer(), SPECS, tmp_path / "index", limit=2)
    assert len(first) == len(first.lengths) == 2 and first.fingerprint != source.fingerprint


def test_an_index_is_made_once_for_a_file_a_tokenizer_and_a_model(folder: Path, tmp_path: Path) -> None:
    file, told = lines(folder / "train.jsonl", *GOOD), []

    def indexed(tokenizer: Any = None, specs: Any = SPECS) -> int:
        told.clear()
        JsonLines(file, tokenizer or tiny_tokenizer(), specs, tmp_path / "index", told=told.append)
        return len(told)

    assert indexed() == 4 and indexed() == 0
    assert indexed(tiny_tokenizer(False)) == 4
    longer = SPECS.model_copy(update={"hearing": SPECS.hearing.model_copy(update={"max_seconds": 30.0})})  # type: ignore[union-attr]
    assert indexed(specs=longer) == 4
    for index in (tmp_path / "index").iterdir():
        index.write_bytes(index.read_bytes()[:100])
    assert indexed() == 4 and indexed() == 0
    lines(file, *GOOD, GOOD[0])
    assert indexed() == 5


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", "no JSON"),
        (row(medium("audio", "gone.wav")), "gone.wav: no such file"),
        (json.dumps({"messages": [{"role": "user", "content": "a"}]}), "last turn is the user's"),
        (row({"type": "text", "text": "what is " * 2000}), "model holds 1024"),
    ],
)
def test_a_row_that_cannot_be_learned_is_named_by_file_and_line(
    folder: Path, tmp_path: Path, bad: str, words: str
) -> None:
    file = lines(folder / "train.jsonl", GOOD[0], "", bad, GOOD[1])
    with pytest.raises((BadRecord, BadMedia)) as caught:
        JsonLines(file, tiny_tokenizer(), SPECS, tmp_path / "index")
    assert str(caught.value).startswith(f"{file}:3: ") and words in str(caught.value)


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    for content in ("", "\n\n"):
        (tmp_path / "empty.jsonl").write_text(content)
        with pytest.raises(BadRecord, match="no rows"):
            JsonLines(tmp_path / "empty.jsonl", tiny_tokenizer(), SPECS, tmp_path / "index")
        with pytest.raises(BadRecord, match="no rows"):
            checked(tmp_path / "empty.jsonl")
    for call in (checked, lambda path: JsonLines(path, tiny_tokenizer(), SPECS, tmp_path / "index")):
        with pytest.raises(BadRecord, match="No such file"):
            call(tmp_path / "none.jsonl")


BAD = {
    2: ("{", "no JSON"),
    3: (row(medium("audio", "gone.wav")), "gone.wav: no such file"),
    5: (row(medium("audio", "cut.wav")), "cut off"),
    6: (row(medium("image", "a.wav")), "no PNG"),
    7: (row(medium("audio", "long.wav")), "lasts 21.0 s"),
    9: (row({"type": "text", "text": "what is " * 2000}), "model holds 1024"),
    10: (row(answer=[{"type": "text", "text": "a"}, medium("audio", "said.wav")]), "lasts 7.0 s"),
    11: ("\udcff", "not UTF-8"),
}


def mixed(folder: Path) -> Path:
    """Eleven lines, of which 1, 4 and 8 are good."""
    (folder / "cut.wav").write_bytes(sound_file(tone(1.0, 8000), 8000)[:-4000])
    (folder / "long.wav").write_bytes(sound_file(tone(21.0, 8000), 8000))
    (folder / "said.wav").write_bytes(sound_file(tone(7.0, 8000), 8000))
    rows = {1: GOOD[0], 4: GOOD[1], 8: GOOD[3], **{number: bad for number, (bad, _) in BAD.items()}}
    file = folder / "train.jsonl"
    file.write_bytes(b"".join(rows[n].encode(errors="surrogateescape") + b"\n" for n in sorted(rows)))
    return file


def test_every_bad_line_is_listed_and_the_good_ones_are_written(folder: Path, tokenizer_file: Path) -> None:
    file = mixed(folder)
    result, bad = checked(file, specs=SPECS, tokenizer=tokenizer_file, good=folder / "good.jsonl")
    assert (result.rows, result.good, result.bad) == (11, 3, 8)
    assert [line for line, _ in bad] == sorted(BAD)
    for line, reason in bad:
        assert str(file) not in reason and BAD[line][1] in reason and "\n" not in reason
    assert result.heard_seconds == pytest.approx(1.5) and result.spoken_seconds == pytest.approx(1.5)
    again, none = checked(folder / "good.jsonl", specs=SPECS, tokenizer=tokenizer_file)
    assert again == Checked(3, 3, 0, result.heard_seconds, result.spoken_seconds, result.longest_tokens) and not none
    ids = [json.loads(line)["id"] for line in (folder / "good.jsonl").read_text().splitlines()]
    assert ids == [f"{file}:1", "seen", f"{file}:8"]


def test_the_model_that_is_named_decides_what_is_too_long(folder: Path, tokenizer_file: Path) -> None:
    result, bad = checked(mixed(folder))
    assert result.longest_tokens is None and [line for line, _ in bad] == sorted(BAD.keys() - {7, 9, 10})
    few = lines(folder / "few.jsonl", *GOOD)
    narrow = SPECS.model_copy(update={"language": SPECS.language.model_copy(update={"max_positions": 45})})
    tokens = JsonLines(few, tiny_tokenizer(), SPECS, folder / "index").lengths.tokens
    _, bad = checked(few, specs=narrow, tokenizer=tokenizer_file)
    assert [line for line, _ in bad] == [n for n, length in enumerate(tokens, 1) if length > 45] != []
    assert "holds 45" in bad[0][1]
    deaf = SPECS.model_copy(update={"hearing": None})
    _, bad = checked(few, specs=deaf, tokenizer=tokenizer_file)
    assert [line for line, _ in bad] == [1] and "no hearing" in bad[0][1]


def test_several_processes_find_the_same_in_the_same_order(folder: Path, tokenizer_file: Path) -> None:
    content = mixed(folder).read_bytes()
    file = folder / "many.jsonl"
    file.write_bytes(content * 7)  # several pieces of work
    one = checked(file, specs=SPECS, tokenizer=tokenizer_file, good=folder / "one.jsonl")
    two = checked(file, specs=SPECS, tokenizer=tokenizer_file, good=folder / "two.jsonl", processes=2)
    assert one == two and one[0].bad == 56
    assert (folder / "one.jsonl").read_bytes() == (folder / "two.jsonl").read_bytes()


def converted(file: Path, out: Path, **options: Any) -> tuple[list[Sample], list[tuple[int, str]]]:
    bad: list[tuple[int, str]] = []
    import_(file, out, lambda line, reason: bad.append((line, reason)), **options)
    rows = enumerate(out.read_text().splitlines(), 1)
    return [read_record(line, f"{out}:{n}", out.parent) for n, line in rows], bad


def test_a_list_of_another_format_becomes_canonical_rows_with_copied_media(folder: Path, tmp_path: Path) -> None:
    sharegpt = {"conversations": [{"from": "human", "value": "<audio>what is"}, {"from": "gpt", "value": "two"}]}
    file = folder / "train.json"
    file.write_text(json.dumps([{**sharegpt, "audios": ["a.wav"]}, {**sharegpt, "audios": ["gone.wav"]}], indent=1))
    out = tmp_path / "elsewhere" / "own.jsonl"
    out.parent.mkdir()
    (sample,), bad = converted(file, out, copy=True)
    ((kind, path),) = media_files(sample)
    assert kind == "audio" and path.parent == out.parent / "own-media"
    assert path.read_bytes() == (folder / "a.wav").read_bytes()
    assert [line for line, _ in bad] == [2] and "gone.wav" in bad[0][1]
    shutil.move(out.parent, tmp_path / "moved")
    assert not checked(tmp_path / "moved" / "own.jsonl")[1]


def test_without_copying_media_stay_where_they_are(folder: Path, tmp_path: Path) -> None:
    file = lines(folder / "train.jsonl", GOOD[0])
    (inside,), _ = converted(file, folder / "own.jsonl")
    assert json.loads((folder / "own.jsonl").read_text())["messages"][0]["content"][0]["path"] == "a.wav"
    (outside,), _ = converted(file, tmp_path / "own.jsonl")
    assert [*media_files(inside)] == [*media_files(outside)] == [("audio", folder / "a.wav")]


def test_media_inside_rows_are_written_beside_the_new_file(folder: Path, tmp_path: Path) -> None:
    sound = (folder / "a.wav").read_bytes()
    data = base64.b64encode(sound).decode()
    embedded = row({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}})
    file = lines(folder / "train.jsonl", embedded, embedded, row(medium("audio", "data:audio/wav;base64,AAAA")))
    result, bad = checked(file, good=tmp_path / "good.jsonl")
    assert (result.good, [line for line, _ in bad]) == (2, [3])
    assert bad[0][1].startswith("the audio in the row: ")
    (made,) = (tmp_path / "good-media").iterdir()  # one file for two rows of one content, none for the bad row
    assert made.read_bytes() == sound and made.suffix == ".wav"
    assert not checked(tmp_path / "good.jsonl")[1]
    with pytest.raises(BadRecord, match=r"train\.jsonl:1: .*nexus data import"):
        JsonLines(file, tiny_tokenizer(), SPECS, tmp_path / "index")


def test_what_exists_is_not_written_over_and_nothing_is_left_behind(folder: Path, tmp_path: Path) -> None:
    file = lines(folder / "train.jsonl", *GOOD)
    with pytest.raises(BadConfig, match="exists already"):
        converted(file, file)
    with pytest.raises(BadConfig, match="existing folder"):
        converted(file, tmp_path / "none" / "own.jsonl")
    (folder / "half.json").write_text('[{"query": "a"')
    with pytest.raises(BadRecord, match="JSON list"):
        converted(folder / "half.json", tmp_path / "own.jsonl")
    assert not [path for path in tmp_path.iterdir() if path != folder]


def test_the_example_of_own_rows_is_whole(tokenizer_file: Path, tmp_path: Path) -> None:
    file = EXAMPLE / "train.jsonl"
    result, bad = checked(file, specs=tiny_recipe().model, tokenizer=tokenizer_file)
    assert not bad and result.rows == 20 and result.spoken_seconds > 5 and result.heard_seconds > 5
    source = JsonLines(file, tiny_tokenizer(), SPECS, tmp_path)
    kinds = [{(turn.role, type(part)) for turn in source[n].turns for part in turn.parts} for n in range(20)]
    for shown in (("user", Image), ("user", Audio), ("user", Text), ("assistant", Audio), ("assistant", Text)):
        assert any(shown in kind for kind in kinds), shown
    assert sum(path.stat().st_size for path in EXAMPLE.rglob("*") if path.is_file()) < 400_000


PEAK = r"""
import re, sys
from pathlib import Path
from nexus.data.importing import check
result = check(Path(sys.argv[1]), lambda line, reason: None, good=Path(sys.argv[1] + ".good"))
# Not getrusage: its peak begins with that of the process that started this one.
print(result.rows, re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    peaks = {}
    for rows in (2_000, 100_000):
        file = lines(
            tmp_path / f"{rows}.jsonl", *[row({"type": "text", "text": f"{n} and " * 20}) for n in range(rows)]
        )
        done = subprocess.run([sys.executable, "-c", PEAK, str(file)], capture_output=True, text=True, check=True)
        read, peak = map(int, done.stdout.split())
        assert read == rows
        peaks[rows] = peak / 1024
    assert peaks[100_000] - peaks[2_000] < 25, peaks  # MiB; the file itself has 20
