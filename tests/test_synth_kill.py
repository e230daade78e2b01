"""kill -9 at random moments, and the same command again: what was decided stays decided, and nothing is there twice."""

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import pytest
import soundfile
from test_synth_pipeline import entries_of, lines_of, sentences

from nexus.synth.journal import read_sound

HERE = Path(__file__).parent
ROWS, KILLS = 600, 20


def begin(tmp_path: Path, form: str) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    command = [sys.executable, str(HERE / "factory_steps.py")]
    arguments = [str(tmp_path / "texts.txt"), str(tmp_path / "out"), str(tmp_path / "log"), form]
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.Popen([*command, *arguments], env=environment, stderr=subprocess.PIPE)


def whole_lines(out: Path) -> list[str]:
    path = out / ".journal.jsonl"
    if not path.is_file():
        return []
    lines = path.read_bytes().rpartition(b"\n")[0].splitlines()
    return [line.decode() for line in lines if b'"seal"' not in line]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", ["files", "tar", "i16"])
def test_a_run_killed_at_twenty_moments_ends_as_if_it_had_not_been(tmp_path: Path, form: str) -> None:
    texts = [*sentences(ROWS - 2), sentences(1)[0], "http://example.org/a?b=c is a place"]
    (tmp_path / "texts.txt").write_text("".join(text + "\n" for text in texts))
    out, rng = tmp_path / "out", random.Random(form)
    before: list[str] = []
    (tmp_path / "log").touch()
    for _ in range(KILLS):
        spoken_before = spoken(tmp_path)
        process = begin(tmp_path, form)
        grows_from, deadline = len(before), time.monotonic() + 60
        while len(whole_lines(out)) <= grows_from and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = whole_lines(out)
        assert now[: len(before)] == before
        assert not ids_of(before) & set(spoken(tmp_path)[len(spoken_before) :])
        before = now
    assert 0 < len(before) < ROWS, "the kills came too late to show anything"
    spoken_before = spoken(tmp_path)
    process = begin(tmp_path, form)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said.decode()
    assert whole_lines(out)[: len(before)] == before
    assert [line["outcomes"][0]["text"] for line in lines_of(out)] == texts
    entries = entries_of(out)
    ids = [entry["id"] for entry in entries]
    assert len(set(ids)) == len(ids)
    assert [entry["reason"] for entry in entries if entry.get("step") == "rules"] == ["duplicate", "url"]
    check_sounds(out, form, {entry["id"] for entry in entries if "audio" in entry})
    assert not ids_of(before) & set(spoken(tmp_path)[len(spoken_before) :])
    assert set(ids) <= set(spoken(tmp_path)) | {entry["id"] for entry in entries if entry.get("step") == "rules"}


def ids_of(lines: list[str]) -> set[str]:
    return {entry["id"] for line in lines for entry in json.loads(line)["outcomes"]}


def spoken(folder: Path) -> list[str]:
    """Ids of all that was ever spoken, in order; a last one that the kill cut off counts as none."""
    return (folder / "log").read_text().rpartition("\n")[0].splitlines()


def check_sounds(out: Path, form: str, ids: set[str]) -> None:
    """Every sound is whole and there once, and there is no other."""
    names = []
    for path in (path for path in (out / "audio").rglob("*") if path.is_file()):
        match form:
            case "files":
                assert soundfile.info(path).frames > 0
                names.append(path.name)
            case "tar":
                with tarfile.open(path) as tar:
                    for member in tar:
                        if member.name.endswith(".flac"):
                            sound = tar.extractfile(member)
                            assert sound is not None
                            assert soundfile.info(sound).frames > 0
                            names.append(member.name)
            case _:
                places = [e["audio"] for e in entries_of(out) if e.get("audio", {}).get("shard") == path.stem]
                assert [0, *(place["end"] for place in places)] == [
                    *(place["offset"] for place in places),
                    path.stat().st_size,
                ]
                assert all(zlib.crc32(read_sound(out, place)) == place["crc32"] for place in places)
                names += [place["name"] for place in places]
    kind = "i16" if form == "i16" else "flac"
    assert sorted(names) == sorted(f"{name}.{kind}" for name in ids)
