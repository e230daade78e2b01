"""A run's result folder: held by one process at a time. Files in it are whole or not there."""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from nexus.errors import BadConfig, Busy


def hold(out: Path) -> TextIO:
    """Make the folder if need be and hold it until the returned file is closed.

    Raises Busy when another process holds it, BadConfig for a file, a folder that no run began, and one that cannot be
    written.
    """
    if out.exists() and not out.is_dir():
        raise BadConfig(f"{out}: expected a result folder, given a file; give another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / ".lock").is_file():
        raise BadConfig(f"{out}: exists and holds something else; give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise BadConfig(f"{out}: cannot be used as a result folder: {error.strerror}; give another --out") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise Busy(f"{out} is in use by another run; wait for it or give another --out") from None
    return lock


@contextmanager
def whole(path: Path) -> Iterator[TextIO]:
    """A text file to write that takes its place when it is whole; what was there stays until then."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """A text file, whole or as it was."""
    with whole(path) as file:
        file.write(text)


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """A JSON file, whole or as it was. Raises ValueError for NaN and infinity."""
    write_whole(path, json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
