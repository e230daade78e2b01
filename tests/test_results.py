"""Result folders and files that are whole or not there."""

import subprocess
import sys
from pathlib import Path

import pytest

from nexus.errors import BadConfig, Busy
from nexus.results import hold, whole, write_json


def test_a_folder_is_held_by_one_and_taken_up_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with hold(out), pytest.raises(Busy, match="in use by another run"):
        hold(out)
    (out / "something").write_text("of this run")
    hold(out).close()


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from nexus.results import hold\nhold(Path(sys.argv[1]))\n"
    code += "os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], timeout=60).returncode == -9
    hold(tmp_path / "out").close()


def test_files_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out, said in ((tmp_path / "file", "given a file"), (tmp_path, "holds something else")):
        with pytest.raises(BadConfig, match=said):
            hold(out)
    with pytest.raises(BadConfig, match="cannot be used as a result folder"):
        hold(Path("/proc/nowhere/out"))


def test_a_file_is_what_it_was_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), whole(path) as file:
        file.write("half")
        raise RuntimeError
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert path.read_text() == '{\n "a": 1\n}\n' and [p.name for p in tmp_path.iterdir()] == ["a.json"]
