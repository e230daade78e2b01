"""`nexus synth` as a user meets it: a recipe in, a folder of rows, rejects, sounds, report and page out."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nexus.data.records import read_record
from nexus.engines.speak import Espeak, Voice
from nexus.errors import BadConfig
from nexus.factory import regate, synth
from nexus.media import load_audio, write_wav
from nexus.synth.recipe import RECIPES, SynthRecipe
from nexus.types import Audio

QUESTIONS = [
    "What is the capital of France?",
    "Which river is the longest in South America?",
    "Who wrote the book about the white whale?",
    "see http://example.org/page for more",
    "What is the capital of France?",
    "",
]


def recipe_file(folder: Path, **sections: Any) -> Path:
    tree: dict[str, Any] = {
        "name": "small",
        "sources": [{"format": "tsv", "columns": {"text": "question", "reply": "answer"}, "licence": "CC0-1.0"}],
        "speak": {"pools": {"en": {"type": "espeak", "voices": 3, "accents": ["en-us"]}}},
        "assemble": {"tasks": ["asr", "chat"]},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree | sections))
    return path


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "questions.tsv"
    path.write_text("question\tanswer\n" + "".join(f"{text}\tParis\n" for text in QUESTIONS))
    return f"source={path}"


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_rows_that_training_reads_rejects_with_reasons_a_report_and_a_page(
    tmp_path: Path, source: str
) -> None:
    out = tmp_path / "out"
    report = synth(str(recipe_file(tmp_path)), out, [source])
    assert report == json.loads((out / "report.json").read_text())
    assert (report["read"], report["kept"]) == (6, 3)
    assert report["dropped"] == {"url": 1, "duplicate": 1, "empty": 1}
    assert report["read"] == report["kept"] + sum(report["dropped"].values())
    assert 1 <= report["voices"] <= 3
    assert report["hours"] > 0 and report["engine_seconds"] > 0 and report["samples_per_second"] > 0
    lines = (out / "rows.jsonl").read_text().splitlines()
    samples = [read_record(line, f"rows.jsonl:{n}", out) for n, line in enumerate(lines, 1)]
    assert [sample.task for sample in samples] == ["asr", "chat"] * 3
    sound = samples[0].turns[0].parts[0]
    assert isinstance(sound, Audio) and sound.path is not None
    assert load_audio(sound.path).seconds * 3600 > 0
    assert samples[0].meta["licence"] == "CC0-1.0"
    rejects = jsonl(out / "rejects.jsonl")
    assert [(row["reason"], row["step"]) for row in rejects] == [
        ("url", "rules"),
        ("duplicate", "rules"),
        ("empty", "read"),
    ]
    page = (out / "report.html").read_text()
    assert "<audio" in page and "duplicate" in page
    run = json.loads((out / "run.json").read_text())
    assert set(run["identity"]["steps"]) == {"rules", "speak"}
    assert run["finished"] >= run["began"]


def test_the_same_command_again_changes_nothing_and_another_is_refused_with_what_differs(
    tmp_path: Path, source: str
) -> None:
    out, recipe = tmp_path / "out", str(recipe_file(tmp_path))
    synth(recipe, out, [source])
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != "run.json"}
    synth(recipe, out, [source])
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name in before} == before
    with pytest.raises(BadConfig, match=r"holds another run; different: recipe\.seed \(there 0, now 1\)"):
        synth(recipe, out, [source, "seed=1"])


def test_a_limit_takes_the_first_rows_and_can_be_raised(tmp_path: Path, source: str) -> None:
    out, recipe = tmp_path / "out", str(recipe_file(tmp_path))
    assert synth(recipe, out, [source], 2)["read"] == 2
    assert synth(recipe, out, [source], 4)["read"] == 4


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, source: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(BadConfig, match="holds something else"):
        synth(str(recipe_file(tmp_path)), out, [source])
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_the_gate_is_moved_from_stored_scores_and_back(tmp_path: Path, source: str) -> None:
    out = tmp_path / "out"
    verify = {"audition": {"texts": 0, "passed": 0}, "max_wer": 0.0, "retries": 1}
    report = synth(str(recipe_file(tmp_path, verify=verify)), out, [source])
    assert report["gate"]["attempts"] >= report["gate"]["passed"] == report["kept"]
    sounds = {path: path.read_bytes() for path in (out / "audio").rglob("*.flac")}
    assert len(sounds) == report["gate"]["attempts"]
    rows = (out / "rows.jsonl").read_text()
    loose = regate(out, ["verify.max_wer=9.0", "verify.length_ratio=[0.01, 90.0]"])
    assert loose["kept"] == 3
    assert len(jsonl(out / "rows.jsonl")) == 6
    shut = regate(out, ["verify.length_ratio=[80.0, 90.0]"])
    assert (shut["kept"], shut["read"]) == (0, 6)
    assert shut["dropped"]["length_ratio"] + shut["dropped"].get("not_heard", 0) == 3
    assert regate(out, ["verify.max_wer=0.0"])["kept"] == report["kept"]
    assert (out / "rows.jsonl").read_text() == rows
    assert {path: path.read_bytes() for path in (out / "audio").rglob("*.flac")} == sounds


def test_a_voice_is_auditioned_once(tmp_path: Path, source: str) -> None:
    out, recipe = tmp_path / "out", str(recipe_file(tmp_path, verify={"audition": {"texts": 1, "passed": 1}}))
    synth(recipe, out, [source])
    heard = (out / ".audition.jsonl").read_text().splitlines(keepends=True)
    assert len(heard) == 3
    (out / ".audition.jsonl").write_text("".join(heard[:1]) + heard[1][:10])
    report = synth(recipe, out, [source])
    assert sorted((out / ".audition.jsonl").read_text().splitlines(keepends=True)) == sorted(heard)
    deaf = [json.loads(line)["voice"] for line in heard if json.loads(line)["deaf"]]
    assert sorted(report["card"]["voices_left_out"]) == sorted(deaf)


def test_regate_moves_nothing_that_needs_another_run(tmp_path: Path, source: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(BadConfig, match="holds no run of synth"):
        regate(tmp_path, ["verify.max_wer=0.1"])
    synth(str(recipe_file(tmp_path)), out, [source], 1)
    with pytest.raises(BadConfig, match="has no `verify`"):
        regate(out, ["verify.max_wer=0.1"])


def test_texts_in_a_language_without_a_recogniser_are_counted_apart(tmp_path: Path) -> None:
    path = tmp_path / "zh.txt"
    path.write_text("今天天气怎么样\n你叫什么名字\n")
    pools = {"pools": {"zh": {"type": "espeak", "voices": 2}}}
    recipe = recipe_file(tmp_path, sources=[{}], speak=pools, verify={"recognisers": {}}, assemble={"tasks": ["asr"]})
    report = synth(str(recipe), tmp_path / "out", [f"source={path}"])
    assert (report["kept"], report["unverified"], report["gate"]["attempts"]) == (2, 2, 0)
    assert report["gate"]["mismatched_pairs_passed"] is None
    assert report["gate"]["reason"]


def test_replies_are_spoken_where_speech_to_speech_is_wanted(tmp_path: Path, source: str) -> None:
    recipe = recipe_file(tmp_path, assemble={"tasks": ["s2s"]})
    report = synth(str(recipe), tmp_path / "out", [source], 1)
    (row,) = jsonl(tmp_path / "out" / "rows.jsonl")
    kinds = [[part["type"] for part in message["content"]] for message in row["messages"]]
    assert kinds == [["audio"], ["text", "audio"]]
    assert report["by"]["task"]["s2s"]["samples"] == 1


def test_recordings_are_heard_by_the_same_recogniser_into_a_folder_of_their_own(tmp_path: Path, source: str) -> None:
    (tmp_path / "sounds").mkdir()
    lines = ["text\tfile"]
    for number, text in enumerate(QUESTIONS[:2]):
        said = Espeak().speak(text, Voice("en-us+f2"))
        assert said.samples is not None
        write_wav(tmp_path / "sounds" / f"{number}.wav", said.samples, said.rate_hz)
        lines.append(f"{text}\t{number}.wav")
    (tmp_path / "sounds" / "broken.wav").write_text("no sound")
    (tmp_path / "sounds" / "list.tsv").write_text("\n".join([*lines, "Who?\tbroken.wav"]) + "\n")
    manifest = {"path": str(tmp_path / "sounds" / "list.tsv"), "columns": {"text": "text", "audio": "file"}}
    recordings = {"manifest": {**manifest, "name": "recorded"}, "language": "en"}
    verify = {"audition": {"texts": 0, "passed": 0}, "retries": 0}
    out = tmp_path / "out"
    report = synth(str(recipe_file(tmp_path, verify=verify, recordings=recordings)), out, [source])
    heard = json.loads((out / "recordings" / "report.json").read_text())
    assert (report["read"], heard["read"]) == (6, 3)
    assert heard["dropped"]["unreadable"] == 1
    assert heard["errors"]["recordings"] == 2
    assert heard["errors"]["rate"] < 0.5
    assert report["recordings"]["errors"] == heard["errors"]
    assert (out / "recordings" / "report.html").is_file()
    queue = [row for row in jsonl(out / "recordings" / "rejects.jsonl") if row["reason"] == "to_review"]
    assert len(queue) + heard["kept"] + 1 == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "give --set source=FILE"),
        (["source=/nowhere.tsv"], "no such file"),
        (["speek.seed=1"], "unknown key 'speek'"),
        (["output.form=zip"], "output.form"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_folder(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(BadConfig, match=message) as caught:
        synth(str(recipe_file(tmp_path)), tmp_path / "out", overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_every_shipped_recipe_is_one() -> None:
    names = [path.stem for path in sorted(RECIPES.glob("*.yaml"))]
    assert {"llama-questions", "table-1"} <= set(names)
    for name in names:
        assert SynthRecipe.load(name.replace("-", "_")).name == name
    with pytest.raises(BadConfig, match="shipped: llama-questions, table-1"):
        SynthRecipe.load("nothing")
