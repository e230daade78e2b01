"""The queue for people: what recognisers were not sure of, out to Label Studio and back in.

`export_queue` writes a folder `review/` beside the rows of a run's recordings: the sounds, `tasks.json` to import (the
worst first, the words heard as the prediction to correct) and `labels.xml`, the project's labelling configuration.
`import_reviews` takes Label Studio's JSON export, keeps every decision in `review/decisions.jsonl` and writes what was
corrected as training rows, `reviewed.jsonl`. Both may be repeated: a later decision about an utterance replaces an
earlier one, the same file twice changes nothing, and what was decided is not exported again.
"""

import base64
import json
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote

from nexus.data.chat import task_turns
from nexus.data.records import write_record
from nexus.errors import BadRecord
from nexus.synth.recordings import TO_REVIEW
from nexus.types import Audio, Sample

MAX_EMBEDDED_BYTES = 150 * 2**20  # of tasks.json: Label Studio takes 200 MB at a time
MAX_TEXT = 10_000  # characters of a transcription
UNUSABLE = "unusable"  # what a person chooses where nothing is to be learned from the sound
LABELS = f"""<View>
  <Header value="Correct the words; choose {UNUSABLE} where they cannot be made out"/>
  <Text name="why" value="$why"/>
  <Audio name="audio" value="$audio"/>
  <TextArea name="transcription" toName="audio" rows="3" editable="true" maxSubmissions="1"/>
  <Choices name="use" toName="audio" choice="single"><Choice value="{UNUSABLE}"/></Choices>
</View>
"""

Playing = Literal["embedded", "local"]
Json = dict[str, Any]
Answer = str | Literal[False] | None  # the words; False: unusable; None: nothing was entered


@dataclass(frozen=True)
class Decision:
    """What a person decided about an utterance: `text` is what is said in it, None where it is unusable. `made` is
    Label Studio's time stamp."""

    id: str
    text: str | None
    made: str
    language: str
    by: str = ""


def export_queue(folder: Path, playing: Playing = "embedded", root: Path | None = None) -> int:
    """Write `review/` for the run in `folder`; returns the number of tasks, those decided left out.

    `embedded` puts every sound into tasks.json, up to 150 MiB; `local` names files below `root` (default: `folder`),
    Label Studio's LOCAL_FILES_DOCUMENT_ROOT. Raises BadRecord for a folder without rejects.jsonl, a queue without
    utterances, one too large to embed, and a `root` that does not hold the folder.
    """
    folder = _heard(folder)
    queue = _queue(folder)
    if not queue:
        raise BadRecord(f"{folder}: no utterance is {TO_REVIEW}; there is nothing to review")
    root = (root or folder).resolve()
    review = folder / "review"
    (review / "audio").mkdir(parents=True, exist_ok=True)
    _copy_sounds(folder, queue)
    decided = _decisions(folder)
    tasks, size = [], 0
    for row in queue:
        if row["id"] in decided:
            continue
        path = _sound(folder, row["id"])
        if playing == "embedded":
            size += path.stat().st_size * 4 // 3
            if size > MAX_EMBEDDED_BYTES:
                said = f"more than {MAX_EMBEDDED_BYTES >> 20} MiB of sound for one file; serve the sounds (local)"
                raise BadRecord(f"{folder}: {said}")
        tasks.append(_task(row, _address(path, playing, root)))
    _write(review / "tasks.json", json.dumps(tasks, ensure_ascii=False, indent=1))
    _write(review / "labels.xml", LABELS)
    return len(tasks)


def import_reviews(folder: Path, export: Path) -> Mapping[str, int]:
    """Take Label Studio's JSON export of tasks of this run; returns how many are corrected, unusable, left `open` (no
    annotation, or a skipped or an empty one) and in `conflict` (annotators differ: decide by marking a ground truth).

    Raises BadRecord, before anything is changed, for a file that is no such export, an utterance that is not in the
    queue, and one that stands in it twice.
    """
    folder = _heard(folder)
    queue = {row["id"]: row for row in _queue(folder)}
    made: dict[str, Decision] = {}
    counts = Counter(corrected=0, unusable=0, open=0, conflict=0)
    seen: set[str] = set()
    for number, task in enumerate(_exported(export), 1):
        where = f"{export}: task {number}"
        name = _id_of(task, where)
        if name not in queue:
            raise BadRecord(
                f"{where}: utterance {name!r} is not in the queue of {folder}; import it where it came from"
            )
        if name in seen:
            raise BadRecord(f"{where}: utterance {name!r} stands here twice; export the project again")
        seen.add(name)
        decision = _decided(task, queue[name], where)
        if isinstance(decision, Decision):
            made[name] = decision
            counts["unusable" if decision.text is None else "corrected"] += 1
        else:
            counts[decision] += 1
    _keep(folder, queue, made)
    return dict(counts)


def _keep(folder: Path, queue: Mapping[str, Json], made: Mapping[str, Decision]) -> None:
    """Decisions and rows as they now stand; each file whole or as it was. An utterance that has left the queue since (a
    gate was moved, and it is in rows.jsonl now) keeps its decision and gets no second row."""
    decisions = _decisions(folder)
    for name, decision in made.items():
        if name not in decisions or decisions[name].made <= decision.made:
            decisions[name] = decision
    ordered = [decisions[name] for name in sorted(decisions)]
    (folder / "review" / "audio").mkdir(parents=True, exist_ok=True)
    queued = [each for each in ordered if each.id in queue]
    _copy_sounds(folder, [queue[each.id] for each in queued])
    lines = (json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in ordered)
    _write(folder / "review" / "decisions.jsonl", "".join(lines))
    rows = (_row(folder, queue[each.id], each) for each in queued if each.text is not None)
    _write(folder / "reviewed.jsonl", "".join(row + "\n" for row in rows))


def _row(folder: Path, row: Json, decision: Decision) -> str:
    """A training row of recognition in the words of the person."""
    assert decision.text is not None
    turns = task_turns("asr", sound=Audio(path=_sound(folder, decision.id)), text=decision.text)
    reviewed = {"heard": row["text"], "by": decision.by, "at": decision.made}
    meta = {**row["meta"], "language": row["language"], "reviewed": reviewed}
    return write_record(Sample(decision.id, "asr", turns, meta), folder)


# The queue


def _heard(folder: Path) -> Path:
    """Where the recordings of a run are: inside its folder, where it has spoken texts as well."""
    inner = folder / "recordings"
    return inner if (inner / "rejects.jsonl").is_file() else folder


def _queue(folder: Path) -> list[Json]:
    """The rows of rejects.jsonl that wait for a person, the worst first."""
    path = folder / "rejects.jsonl"
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if row["reason"] == TO_REVIEW:
                    rows.append(row)
    except OSError as error:
        raise BadRecord(f"{path}: cannot be read ({error.strerror}); name the folder of a finished run") from None
    except (ValueError, TypeError, KeyError) as error:
        raise BadRecord(f"{path}: holds a line that is no rejected row ({error}); run the recipe again") from None
    silent = [row["id"] for row in rows if "audio" not in row]
    if silent:
        raise BadRecord(
            f"{path}: {silent[0]} has no sound to listen to ({len(silent)} such rows); run the recipe again"
        )
    return sorted(rows, key=lambda row: (-row["numbers"]["badness"], row["id"]))


def _sound(folder: Path, name: str) -> Path:
    return folder / "review" / "audio" / f"{name}.flac"


def _copy_sounds(folder: Path, rows: Sequence[Json]) -> None:
    """The sounds of rows out of their shards; each tar is read once. What is there already stays."""
    in_tars: dict[Path, dict[str, Path]] = defaultdict(dict)
    for row in rows:
        target, place = _sound(folder, row["id"]), PurePosixPath(row["audio"])
        if target.is_file():
            continue
        if place.parent.suffix == ".tar":
            in_tars[folder / place.parent][place.name] = target
        else:
            _write(target, _bytes(folder / place))
    for path, members in in_tars.items():
        for name, data in _members(path, set(members)):
            _write(members.pop(name), data)
        if members:
            raise BadRecord(f"{path}: {next(iter(members))} is not in it; run the same command again")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadRecord(f"{path}: cannot be read ({error.strerror}); run the same command again") from None


def _members(path: Path, names: set[str]) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.name in names and (file := tar.extractfile(member)):
                    yield member.name, file.read()
    except (OSError, tarfile.TarError) as error:
        raise BadRecord(f"{path}: cannot be read ({error}); run the same command again") from None


# Label Studio


def _task(row: Json, address: str) -> Json:
    numbers = ", ".join(f"{key} {value:.3g}" for key, value in row["numbers"].items() if not isinstance(value, str))
    data = {"audio": address, "utterance": row["id"], "why": f"{row['numbers'].get('cause', '')} ({numbers})"}
    data |= {"heard": row["text"], "language": row["language"]}
    result = {"from_name": "transcription", "to_name": "audio", "type": "textarea", "value": {"text": [row["text"]]}}
    prediction = {"model_version": ", ".join(row["meta"].get("heard", {})) or "recogniser", "result": [result]}
    return {"data": data, "predictions": [prediction]} if row["text"] else {"data": data}


def _address(path: Path, playing: Playing, root: Path) -> str:
    if playing == "embedded":
        return "data:audio/flac;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
    if not path.resolve().is_relative_to(root):
        raise BadRecord(f"{root}: does not hold {path}; name a folder above it, which Label Studio may serve")
    return "/data/local-files/?d=" + quote(path.resolve().relative_to(root).as_posix())


def _exported(path: Path) -> list[Json]:
    try:
        tasks = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BadRecord(f"{path}: cannot be read ({error.strerror}); name Label Studio's export") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{path}: is no JSON ({error}); export the project from Label Studio as JSON") from None
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise BadRecord(f"{path}: expected a list of tasks; export the project from Label Studio as JSON")
    if any("annotations" not in task for task in tasks):
        raise BadRecord(f"{path}: tasks without annotations (JSON-MIN, CSV?); export the project as plain JSON")
    return tasks


def _id_of(task: Json, where: str) -> str:
    data = task.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("utterance"), str):
        raise BadRecord(f"{where}: has no data.utterance; it was not made by an export of this queue")
    name: str = data["utterance"]
    return name


def _decided(task: Json, row: Json, where: str) -> Decision | Literal["open", "conflict"]:
    """What the annotators of a task decided together."""
    annotations = task["annotations"]
    if not isinstance(annotations, list) or not all(isinstance(each, dict) for each in annotations):
        raise BadRecord(f"{where}: annotations are no list of objects; export the project as plain JSON")
    finished = [each for each in annotations if not each.get("was_cancelled")]
    truths = [each for each in finished if each.get("ground_truth")]
    answers = [(_answer(each, where), each) for each in truths or finished]
    given = [(answer, each) for answer, each in answers if answer is not None]
    if not given:
        return "open"
    if len({answer for answer, _ in given}) > 1:
        return "conflict"
    text, last = max(given, key=lambda pair: _stamp(pair[1]))
    by = last.get("completed_by", "")
    by = by.get("email", by.get("id", "")) if isinstance(by, dict) else by
    return Decision(row["id"], text or None, _stamp(last), row["language"], str(by))


def _stamp(annotation: Json) -> str:
    return str(annotation.get("updated_at") or annotation.get("created_at") or "")


def _answer(annotation: Json, where: str) -> Answer:
    try:
        results = annotation["result"]
        given = [each["value"]["text"] for each in results if each.get("from_name") == "transcription"]
        texts = [text for each in given for text in ([each] if isinstance(each, str) else each)]
        choices = [name for each in results if each.get("from_name") == "use" for name in each["value"]["choices"]]
        text = " ".join(" ".join(texts).split())
    except (KeyError, TypeError, AttributeError):
        raise BadRecord(
            f"{where}: an annotation is not of review/labels.xml; use that labelling configuration"
        ) from None
    if len(texts) > 1 or len(text) > MAX_TEXT or not text.isprintable():
        limit = f"expected one printable text of at most {MAX_TEXT} characters"
        raise BadRecord(f"{where}: {len(texts)} texts of {len(text)} characters, {limit}; correct it in Label Studio")
    return False if UNUSABLE in choices else text or None


# Files


def _decisions(folder: Path) -> dict[str, Decision]:
    path = folder / "review" / "decisions.jsonl"
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8") as file:
            made = [Decision(**json.loads(line)) for line in file]
    except (ValueError, TypeError) as error:
        raise BadRecord(f"{path}: holds a line that is no decision ({error}); restore it") from None
    return {decision.id: decision for decision in made}


def _write(path: Path, data: str | bytes) -> None:
    """Whole, or as it was."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    os.replace(part, path)
