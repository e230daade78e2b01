"""The factory's pipeline: nothing lost, nothing twice, failures with their reasons, and going on behind the journal."""

import json
import os
import resource
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import soundfile
from factory_steps import RATE_HZ, Gate, Speak, Trouble, run, texts

from nexus.engines.speak import Espeak, Voice
from nexus.errors import BadConfig, BadRecord, NexusError
from nexus.synth.executors import in_order
from nexus.synth.journal import Journal, read_sound, sound_name
from nexus.synth.pipeline import Pipeline, Worked, judge
from nexus.synth.produce import Patience, Workers
from nexus.synth.records import Record, Rejected, first_attempt
from nexus.synth.rules import Rules, RulesConfig

WORDS = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo", "lima")


def sentences(number: int) -> list[str]:
    """Different sentences, alike enough to be one corpus and not enough to be near duplicates."""
    pairs = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS if a != b != c]
    return pairs[:number]


def lines_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / ".journal.jsonl").read_bytes().splitlines()]
    return [line for line in lines if "seal" not in line]


def entries_of(out: Path) -> list[dict[str, Any]]:
    return [entry for line in lines_of(out) for entry in line["outcomes"]]


def test_every_row_has_one_line_in_the_order_of_the_source(tmp_path: Path) -> None:
    rows = sentences(60)
    run(texts(*rows), tmp_path / "out", Speak(), Gate(), workers=Workers("local", 2))
    lines = lines_of(tmp_path / "out")
    assert [line["outcomes"][0]["text"] for line in lines] == rows
    for line in lines:
        decisions = [entry["decision"] for entry in line["outcomes"]]
        assert decisions[:-1] == ["again"] * (len(decisions) - 1)
        assert decisions[-1] in ("kept", "rejected")
        assert len(decisions) == 3 or decisions[-1] == "kept"


def test_each_attempt_has_its_own_id_and_voice(tmp_path: Path) -> None:
    run(texts(*sentences(60)), tmp_path / "out", Speak(), Gate())
    entries = entries_of(tmp_path / "out")
    assert len({entry["id"] for entry in entries}) == len(entries) > 60
    assert {entry["meta"]["voice"] for entry in entries} == {"tone0", "tone1", "tone2"}
    assert all(entry["meta"]["voice"] == f"tone{entry['attempt']}" for entry in entries)


@pytest.mark.parametrize("form", ["files", "tar", "i16"])
def test_the_sound_of_every_attempt_is_whole_and_where_the_journal_says(tmp_path: Path, form: Any) -> None:
    out = tmp_path / "out"
    journal = run(texts(*sentences(60)), out, Speak(), Gate(), form=form, shard_samples=20)
    for entry in entries_of(out):
        data = read_sound(out, entry["audio"])
        if form == "i16":
            assert len(data) == round(entry["seconds"] * RATE_HZ) * 2
            assert sound_name(entry["audio"]).startswith(f"audio/{entry['audio']['shard']}.i16/")
        else:
            assert data[:4] == b"fLaC"
    shards = {entry["audio"]["shard"] for entry in entries_of(out)}
    assert {"00000", "00000-rejected", "00001"} <= shards
    assert journal.num_rows == 60


def test_shards_are_readable_tars_of_sound_and_text(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(texts(*sentences(12)), out, Speak(), form="tar", shard_samples=100)
    with tarfile.open(out / "audio" / "00000.tar") as tar:
        names = tar.getnames()
        assert names == [name for e in entries_of(out) for name in (f"{e['id']}.flac", f"{e['id']}.json")]
        file = tar.extractfile(names[1])
        assert file is not None
        assert json.loads(file.read())["text"] == sentences(12)[0]
        sound = tar.extractfile(names[0])
        assert sound is not None
        samples, rate_hz = soundfile.read(sound)
    assert rate_hz == 8000
    assert len(samples) == pytest.approx(entries_of(out)[0]["seconds"] * 8000, abs=1)
    assert sound_name(entries_of(out)[0]["audio"]) == f"audio/00000.tar/{names[0]}"


def test_espeak_in_two_processes_says_what_espeak_says_here(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(texts(*sentences(8)), out, Say(), workers=Workers("local", 2))
    engine = Espeak()
    for entry in entries_of(out):
        samples, rate_hz = soundfile.read(out / sound_name(entry["audio"]), dtype="int16")
        expected = engine.speak(entry["text"], Voice("en-us+f2"))
        assert rate_hz == expected.rate_hz
        assert expected.samples is not None
        assert samples.tolist() == pytest.approx((expected.samples * 32768).tolist(), abs=1)


@dataclass
class Say:
    """Speech from espeak-ng."""

    name: str = "speak"
    fingerprint: str = "espeak"

    def setup(self) -> None:
        self.engine = Espeak()

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        return [record.with_(sound=self.engine.speak(record.text, Voice("en-us+f2"))) for record in records]


# Failures


def test_a_step_that_raises_costs_the_one_sample_its_place_and_says_why(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(texts("alpha", "raise the roof", "bravo", "charlie"), out, Trouble(), Speak())
    decisions = {entry["text"]: entry for entry in entries_of(out)}
    assert decisions["raise the roof"]["decision"] == "rejected"
    assert decisions["raise the roof"]["reason"] == "trouble_failed"
    assert decisions["raise the roof"]["numbers"] == {"error": "ValueError: cannot say raise the roof"}
    assert [entry["decision"] for text, entry in decisions.items() if text != "raise the roof"] == ["kept"] * 3


def test_the_batch_of_a_dead_worker_is_done_again_by_another(tmp_path: Path) -> None:
    rows = [*sentences(20), f"die once {tmp_path / 'died'}", *reversed(sentences(40)[20:])]
    out = tmp_path / "out"
    run(texts(*rows), out, Trouble(), Speak(), workers=Workers("local", 2))
    assert (tmp_path / "died").exists()
    assert [entry["text"] for entry in entries_of(out)] == rows
    assert {entry["decision"] for entry in entries_of(out)} == {"kept"}


def test_a_sample_that_kills_its_worker_every_time_is_rejected_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(texts("alpha", "bravo", "die", "charlie"), out, Trouble(), Speak())
    decisions = {entry["text"]: (entry["decision"], entry.get("reason")) for entry in entries_of(out)}
    assert decisions.pop("die") == ("rejected", "worker_died")
    assert set(decisions.values()) == {("kept", None)}


def test_too_many_failures_of_one_kind_stop_the_run_and_what_was_finished_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = [*sentences(20), *(f"raise {text}" for text in sentences(100))]
    with pytest.raises(NexusError, match=r"stopped: \d+ of \d+ rows failed with trouble_failed, the limit is 20%"):
        run(texts(*rows), out, Trouble(), patience=Patience(0.2, 8))
    kept = [entry["text"] for entry in entries_of(out) if entry["decision"] == "kept"]
    assert kept == sentences(20)
    assert len(lines_of(out)) < 120


def test_a_judgement_is_no_failure_however_often_it_falls(tmp_path: Path) -> None:
    run(texts(*sentences(60)), tmp_path / "out", Speak(), Gate(retries=0), patience=Patience(0.01, 1))
    assert Counter(entry["decision"] for entry in entries_of(tmp_path / "out"))["rejected"] > 5


def test_a_worker_that_cannot_load_its_models_ends_the_run_with_its_message(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no such model"):
        run(texts("alpha"), tmp_path / "out", Unloadable())


@dataclass
class Unloadable:
    name: str = "model"
    fingerprint: str = "none"

    def setup(self) -> None:
        raise BadConfig("no such model")

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        return list(records)


def test_a_full_disk_in_a_worker_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        run(texts("alpha", "full", "bravo"), tmp_path / "out", Trouble())


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the first shard of the first run runs into it."""
    out = tmp_path / "out"
    code = """
    import signal, sys
    from pathlib import Path
    from factory_steps import Speak, run, texts
    from test_synth_pipeline import sentences
    if __name__ == "__main__":
        try:
            run(texts(*sentences(60)), Path(sys.argv[1]), Speak(), form="tar", shard_samples=1000)
        except OSError as error:
            print(error)
    """
    script = tmp_path / "fill.py"
    script.write_text("\n".join(line[4:] for line in code.splitlines()))

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))

    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, str(Path(here).parent)])
    command = [sys.executable, str(script), str(out)]
    done = subprocess.run(
        command, preexec_fn=small_files, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert "make room and run the same command again" in done.stdout, done.stderr
    before = lines_of(out)
    assert 0 < len(before) < 60
    run(texts(*sentences(60)), out, Speak(), form="tar", shard_samples=1000)
    assert lines_of(out)[: len(before)] == before
    assert [line["outcomes"][0]["text"] for line in lines_of(out)] == sentences(60)
    with tarfile.open(out / "audio" / "00000.tar") as tar:
        assert len(tar.getnames()) == 120


# Going on


def test_a_finished_run_is_not_worked_on_again(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    run(texts(*sentences(20)), out, Speak(log), Gate())
    before, spoken = lines_of(out), log.read_text()
    run(texts(*sentences(20)), out, Speak(log), Gate())
    assert lines_of(out) == before
    assert log.read_text() == spoken


@pytest.mark.parametrize("form", ["files", "tar", "i16"])
def test_a_run_cut_off_anywhere_in_its_journal_goes_on_behind_the_last_whole_line(tmp_path: Path, form: Any) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    run(texts(*sentences(30)), out, Speak(), Gate(), form=form, shard_samples=1000)
    whole = (out / ".journal.jsonl").read_bytes()
    for cut in (1, len(whole) // 3, len(whole) // 2, len(whole) - 20):
        (out / ".journal.jsonl").write_bytes(whole[:cut])
        left = [line for line in whole[:cut].rpartition(b"\n")[0].splitlines() if b'"seal"' not in line]
        log.write_text("")
        run(texts(*sentences(30)), out, Speak(log), Gate(), form=form, shard_samples=1000)
        lines = lines_of(out)
        assert [json.dumps(line) for line in lines[: len(left)]] == [json.dumps(json.loads(line)) for line in left]
        assert [line["outcomes"][0]["text"] for line in lines] == sentences(30)
        done_before = {entry["id"] for line in left for entry in json.loads(line)["outcomes"]}
        assert not done_before & set(log.read_text().split())
        for entry in entries_of(out):
            read_sound(out, entry["audio"])
        whole = (out / ".journal.jsonl").read_bytes()
    if form == "files":
        held = {path.name for path in (out / "audio").rglob("*.flac")}
        assert held == {entry["audio"]["name"] for entry in entries_of(out)}


def test_a_sound_that_did_not_reach_the_disk_is_made_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(texts(*sentences(20)), out, Speak(), shard_samples=1000)
    lines = (out / ".journal.jsonl").read_bytes().splitlines(keepends=True)
    (out / ".journal.jsonl").write_bytes(b"".join(line for line in lines if b'"seal"' not in line))
    lost = out / sound_name(lines_of(out)[12]["outcomes"][0]["audio"])
    lost.write_bytes(lost.read_bytes()[:-1])
    journal = Journal(out, "files", 1000)
    assert (journal.num_rows, journal.lost) == (12, 8)
    journal.abandon()
    run(texts(*sentences(20)), out, Speak(), shard_samples=1000)
    assert [line["outcomes"][0]["text"] for line in lines_of(out)] == sentences(20)
    assert soundfile.info(lost).frames > 0


def test_rows_that_are_not_those_of_the_journal_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(texts(*sentences(20)), out, Speak())
    changed = [*sentences(10), "something else", *sentences(20)[11:]]
    with pytest.raises(BadConfig, match="row 11 of the sources was done, and is another one now"):
        run(texts(*changed), out, Speak())
    with pytest.raises(BadConfig, match="row 16 of the sources was done, and is not there any more"):
        run(texts(*sentences(15)), out, Speak())


def test_more_rows_of_the_same_source_are_added(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    run(texts(*sentences(10)), out, Speak())
    run(texts(*sentences(25)), out, Speak(log))
    assert [line["outcomes"][0]["text"] for line in lines_of(out)] == sentences(25)
    assert len(log.read_text().split()) == 15


def test_duplicates_are_found_across_an_interruption(tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = [*sentences(20), sentences(20)[3]]
    run(texts(*rows[:10]), out, Speak(), front=[Rules(RulesConfig())])
    run(texts(*rows), out, Speak(), front=[Rules(RulesConfig())])
    assert [entry["reason"] for entry in entries_of(out) if entry["decision"] == "rejected"] == ["duplicate"]


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".journal.jsonl").write_text("hello\n")
    with pytest.raises(BadRecord, match="is no JSON"):
        Journal(tmp_path, "files", 10)


# Workers


class Slow:
    """A crew of one whose work is done when it is asked for: everything that is given waits."""

    size = 1

    def __init__(self) -> None:
        self.given: list[Sequence[Record]] = []
        self.ready = False

    def hire(self) -> int:
        return 1

    def give(self, worker: int, records: Sequence[Record]) -> None:
        self.given.append(records)

    def next_event(self) -> tuple[int, Any]:
        if not self.ready:
            self.ready = True
            return 1, "ready"
        return 1, Worked([[] for _ in self.given[-1]], {})

    def close(self) -> None: ...


def test_no_more_batches_are_read_than_are_under_way() -> None:
    taken = 0

    def batches() -> Any:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield [first_attempt("alpha", "en", {"line": taken})]

    done = in_order(Slow(), batches())
    for finished in range(1, 100):
        next(done)
        assert taken <= finished + 4


def test_batches_without_a_record_need_no_worker() -> None:
    crew = Slow()
    assert len(list(in_order(crew, iter([[], [], []])))) == 3
    assert crew.given == []


def test_a_number_of_workers_below_one_and_an_address_without_ray_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="workers: expected at least 1, given 0"):
        run(texts("alpha"), tmp_path / "out", Speak(), workers=Workers("local", 0))
    with pytest.raises(BadConfig, match="--executor ray"):
        run(texts("alpha"), tmp_path / "out", Speak(), workers=Workers("local", 1, "127.0.0.1:6379"))


def test_a_step_that_loses_a_row_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="2 rows went in, 1 came out"):
        judge(Loser(), [first_attempt(text, "en", {}) for text in ("alpha", "bravo")])


class Loser:
    name = "loser"
    fingerprint = ""

    def setup(self) -> None: ...

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        return list(records[:1])


def test_a_step_that_splits_its_records_gives_every_piece_an_outcome() -> None:
    pipeline = Pipeline([Splitter()])
    pipeline.setup()
    worked = pipeline([first_attempt(text, "en", {}) for text in ("one two", "three")])
    assert [[outcome.record.text for outcome in row] for row in worked.rows] == [["one", "two"], ["three"]]


class Splitter:
    name = "split"
    fingerprint = ""

    def setup(self) -> None: ...

    def __call__(self, records: Sequence[Record]) -> list[Record | Rejected]:
        return [record.with_(id=record.id + word, text=word) for record in records for word in record.text.split()]
