"""The queue for people, out to Label Studio and back: every sound playable, every decision counted, nothing twice."""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile

from nexus.data.records import read_record
from nexus.errors import BadRecord
from nexus.media import load_audio
from nexus.synth import review
from nexus.synth.review import export_queue, import_reviews

RATE = 16_000


def flac(index: int) -> bytes:
    buffer = io.BytesIO()
    wave = 0.1 * np.sin(2 * np.pi * 100 * (index + 1) * np.arange(RATE) / RATE)
    soundfile.write(buffer, wave, RATE, format="FLAC")
    return buffer.getvalue()


def rejected(index: int, badness: float, audio: str, text: str) -> dict[str, Any]:
    numbers = {"cause": "disagreement", "disagreement": badness / 2, "badness": badness}
    meta = {"source": "calls", "licence": "CC0", "heard": {"first": {"text": text, "confidence": 0.5}}}
    row = {"id": f"u{index}", "reason": "to_review", "step": "recognise", "numbers": numbers, "text": text}
    return {**row, "language": "en", "meta": meta, "audio": audio}


@pytest.fixture(params=["files", "tar"])
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The folder of a finished run with four utterances in the queue, and rows that are none of people's business."""
    out = tmp_path / "out"
    shard = out / "audio" / "00000-rejected"
    if request.param == "files":
        shard.mkdir(parents=True)
        for index in range(4):
            (shard / f"u{index}.flac").write_bytes(flac(index))
        places = [f"audio/00000-rejected/u{index}.flac" for index in range(4)]
    else:
        shard.parent.mkdir(parents=True)
        with tarfile.open(f"{shard}.tar", "w") as tar:
            for index in range(4):
                info = tarfile.TarInfo(f"u{index}.flac")
                info.size = len(flac(index))
                tar.addfile(info, io.BytesIO(flac(index)))
        places = [f"audio/00000-rejected.tar/u{index}.flac" for index in range(4)]
    texts = ["a line\u2028in two", "two", "three", ""]
    rows = [rejected(index, badness, places[index], texts[index]) for index, badness in enumerate((0.2, 0.9, 0.5, 1.5))]
    rows.insert(
        2, {"id": "x", "reason": "silent", "step": "read", "numbers": {}, "text": "", "language": "", "meta": {}}
    )
    (out / "rejects.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return out


def tasks(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "review" / "tasks.json").read_text())


def annotation(text: str | None = None, use: str | None = None, at: str = "2026-01-01T00:00:00Z", **more: Any) -> dict:
    """As Label Studio writes it."""
    result: list[dict[str, Any]] = []
    if text is not None:
        value = {"text": [text]}
        result.append({"id": "a", "type": "textarea", "value": value, "origin": "manual", "from_name": "transcription"})
    if use is not None:
        result.append({"id": "b", "type": "choices", "value": {"choices": [use]}, "from_name": "use"})
    for each in result:
        each["to_name"] = "audio"
    made = {"id": 1, "completed_by": 3, "result": result, "was_cancelled": False, "ground_truth": False}
    return {**made, "created_at": at, "updated_at": at, "lead_time": 4.2, **more}


def exported(run: Path, path: Path, answers: dict[str, list[dict]]) -> Path:
    """What Label Studio gives back of the tasks that were imported: the same data, its own numbers, annotations."""
    by_name = {task["data"]["utterance"]: task for task in tasks(run)}
    made = [
        {"id": number, "data": by_name[name]["data"], "annotations": given, "predictions": [], "project": 1}
        for number, (name, given) in enumerate(answers.items(), 1)
    ]
    path.write_text(json.dumps(made))
    return path


def reviewed(run: Path) -> dict[str, Any]:
    lines = (run / "reviewed.jsonl").read_text().split("\n")[:-1]
    return {row.id: row for row in (read_record(line, "reviewed.jsonl", run) for line in lines)}


def words(sample: Any) -> str:
    return sample.turns[-1].parts[0].text


def test_the_worst_comes_first_with_its_words_and_its_sound(run: Path) -> None:
    assert export_queue(run) == 4
    queue = tasks(run)
    assert [task["data"]["utterance"] for task in queue] == ["u3", "u1", "u2", "u0"]
    assert "predictions" not in queue[0]  # nothing was heard
    assert queue[1]["predictions"][0]["result"][0]["value"]["text"] == ["two"]
    assert queue[1]["predictions"][0]["model_version"] == "first"
    kind, data = queue[1]["data"]["audio"].split(",")
    assert kind == "data:audio/flac;base64" and base64.b64decode(data) == flac(1)
    assert queue[3]["data"]["heard"] == "a line\u2028in two" and "disagreement" in queue[1]["data"]["why"]


def test_the_labelling_configuration_names_what_tasks_and_answers_name(run: Path) -> None:
    export_queue(run)
    view = ElementTree.fromstring((run / "review" / "labels.xml").read_text())
    variables = {each.get("value", "")[1:] for each in view if each.get("value", "").startswith("$")}
    assert variables <= set(tasks(run)[0]["data"])
    result = tasks(run)[1]["predictions"][0]["result"][0]
    named = {each.get("name"): each for each in view}
    assert named[result["from_name"]].tag == "TextArea" and named[result["to_name"]].tag == "Audio"
    assert named["use"].find("Choice").get("value") == review.UNUSABLE


def test_sounds_can_be_served_from_a_folder(run: Path) -> None:
    export_queue(run, "local", run.parent)
    for task in tasks(run):
        head, path = task["data"]["audio"].split("?d=")
        assert head == "/data/local-files/"
        assert load_audio(run.parent / unquote(path)).seconds == 1.0
    with pytest.raises(BadRecord, match="does not hold"):
        export_queue(run, "local", run / "review" / "audio" / "deeper")


def test_corrected_rows_flow_back_and_decided_ones_do_not_come_again(run: Path, tmp_path: Path) -> None:
    export_queue(run)
    answers = {
        "u0": [annotation("  the right\nwords ")],
        "u1": [annotation(use="unusable")],
        "u2": [annotation("three", was_cancelled=True)],
        "u3": [annotation()],
    }
    counts = import_reviews(run, exported(run, tmp_path / "export.json", answers))
    assert counts == {"corrected": 1, "unusable": 1, "open": 2, "conflict": 0}
    (row,) = reviewed(run).values()
    assert row.task == "asr" and words(row) == "the right words"
    assert row.meta["reviewed"]["heard"] == "a line\u2028in two" and row.meta["source"] == "calls"
    sound = next(part for part in row.turns[0].parts if getattr(part, "path", None))
    assert sound.path.read_bytes() == flac(0)
    assert export_queue(run) == 2
    assert [task["data"]["utterance"] for task in tasks(run)] == ["u3", "u2"]


def test_the_same_export_twice_changes_nothing_and_a_later_decision_wins(run: Path, tmp_path: Path) -> None:
    export_queue(run)
    early = exported(run, tmp_path / "early.json", {"u0": [annotation("first words")], "u1": [annotation("two")]})
    late_answers = {"u0": [annotation("better words", at="2026-01-02T00:00:00Z")]}
    late = exported(run, tmp_path / "late.json", late_answers)
    import_reviews(run, early)
    before = (run / "reviewed.jsonl").read_bytes()
    import_reviews(run, early)
    assert (run / "reviewed.jsonl").read_bytes() == before
    import_reviews(run, late)
    import_reviews(run, early)
    assert {name: words(row) for name, row in reviewed(run).items()} == {"u0": "better words", "u1": "two"}


def test_annotators_who_differ_are_a_conflict_until_one_is_the_truth(run: Path, tmp_path: Path) -> None:
    export_queue(run)
    differ = [annotation("one thing"), annotation("another")]
    assert import_reviews(run, exported(run, tmp_path / "a.json", {"u0": differ}))["conflict"] == 1
    assert reviewed(run) == {}
    typed = [annotation("unusable"), annotation(use="unusable")]
    assert import_reviews(run, exported(run, tmp_path / "b.json", {"u0": typed}))["conflict"] == 1
    settled = [annotation("one thing"), annotation("another", ground_truth=True)]
    assert import_reviews(run, exported(run, tmp_path / "c.json", {"u0": settled}))["corrected"] == 1
    assert words(reviewed(run)["u0"]) == "another"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "no JSON"),
        ('{"a": 1}', "list of tasks"),
        ('[{"audio": "x", "transcription": "words"}]', "JSON-MIN"),
        ('[{"annotations": [], "data": {}}]', "task 1: has no data.utterance"),
        ('[{"annotations": [], "data": {"utterance": "../../u0"}}]', "not in the queue"),
        (
            '[{"annotations": [], "data": {"utterance": "u0"}}, {"annotations": [], "data": {"utterance": "u0"}}]',
            "twice",
        ),
        ('[{"annotations": 3, "data": {"utterance": "u0"}}]', "no list of objects"),
        ('[{"annotations": [{}], "data": {"utterance": "u0"}}]', "labels.xml"),
        ('[{"annotations": [{"result": [{"from_name": "use"}]}], "data": {"utterance": "u0"}}]', "labels.xml"),
        (json.dumps([{"annotations": [annotation("bell \x07")], "data": {"utterance": "u0"}}]), "printable"),
        (json.dumps([{"annotations": [annotation("a" * 10_001)], "data": {"utterance": "u0"}}]), "10000"),
    ],
)
def test_what_is_no_export_of_this_queue_is_refused_and_nothing_changes(
    run: Path, tmp_path: Path, content: str, said: str
) -> None:
    export_queue(run)
    import_reviews(run, exported(run, tmp_path / "good.json", {"u1": [annotation("fine")]}))
    before = (run / "reviewed.jsonl").read_bytes(), (run / "review" / "decisions.jsonl").read_bytes()
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(BadRecord, match=said) as caught:
        import_reviews(run, tmp_path / "bad.json")
    assert "\n" not in str(caught.value)
    assert before == ((run / "reviewed.jsonl").read_bytes(), (run / "review" / "decisions.jsonl").read_bytes())


def test_the_recordings_of_a_run_with_texts_are_found_inside_it(run: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    (outer / "rejects.jsonl").write_text("")
    run.rename(outer / "recordings")
    assert export_queue(outer) == 4
    answers = {"u0": [annotation("words")]}
    assert import_reviews(outer, exported(outer / "recordings", tmp_path / "a.json", answers))["corrected"] == 1
    assert words(reviewed(outer / "recordings")["u0"]) == "words"


def test_folders_without_a_queue_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRecord, match=r"rejects\.jsonl"):
        export_queue(tmp_path)
    (tmp_path / "rejects.jsonl").write_text('{"reason": "silent"}\n')
    with pytest.raises(BadRecord, match="nothing to review"):
        export_queue(tmp_path)
    (tmp_path / "rejects.jsonl").write_text("words\n")
    with pytest.raises(BadRecord, match="no rejected row"):
        export_queue(tmp_path)


def test_a_queue_too_large_to_embed_is_refused_with_the_way_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review, "MAX_EMBEDDED_BYTES", 1000)
    with pytest.raises(BadRecord, match="local"):
        export_queue(run)
    assert export_queue(run, "local") == 4


def test_a_sound_that_is_gone_is_named(run: Path) -> None:
    for path in (run / "audio").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(BadRecord, match="00000-rejected"):
        export_queue(run)
