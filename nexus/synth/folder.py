"""The result folder of a run: held by one process, begun once, continued by the same recipe, steps and code alone."""

import json
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nexus
from nexus.errors import BadConfig
from nexus.results import hold, write_json

SHOWN = 60  # characters of a setting in a message


class Folder:
    """A result folder that this process holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._began = time.time()
        self._run: dict[str, Any] = {}

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raises BadConfig, and says what differs, where a run began the folder whose identity has other values."""
        if theirs := self.run().get("identity"):
            mine = json.loads(json.dumps(identity))
            self._refuse_others(mine, {key: theirs.get(key) for key in mine})

    def begin(self, identity: Mapping[str, Any], named: Mapping[str, Any]) -> None:
        """Say in run.json whose folder this is. Raises as `check`."""
        self.check(identity)
        host = {"name": platform.node(), "machine": platform.machine(), "python": platform.python_version()}
        self._run = {"identity": dict(identity), "named": dict(named), "version": nexus.__version__, "host": host}
        self._note(finished=None)

    def end(self, **more: Any) -> None:
        """Say in run.json when it was done."""
        self._note(finished=time.time(), **more)

    def run(self) -> dict[str, Any]:
        """What run.json says; empty where there is none."""
        path = self.path / "run.json"
        if not path.is_file():
            return {}
        try:
            run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadConfig(f"{path}: is no JSON ({error}); give another --out") from None
        return run

    def _note(self, finished: float | None, **more: Any) -> None:
        run = {**self._run, "began": self._began, "finished": finished, **more}
        write_json(self.path / "run.json", run)

    def _refuse_others(self, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
        new, old = _flat(mine), _flat(theirs)
        differing = [key for key in {**new, **old} if new.get(key) != old.get(key)]
        if differing:
            said = ", ".join(
                f"{key} (there {_brief(old.get(key))}, now {_brief(new.get(key))})" for key in differing[:6]
            )
            more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
            raise BadConfig(f"{self.path}: holds another run; different: {said}{more}; give another --out or remove it")


@contextmanager
def held(out: Path) -> Iterator[Folder]:
    """Hold a folder, new or begun by a run. Raises BadConfig for one that is neither, Busy for one in use."""
    with hold(out):
        yield Folder(out)


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    """Leaves by their dotted keys."""
    if isinstance(tree, Mapping) and tree:
        return {k: v for name, child in tree.items() for k, v in _flat(child, f"{key}.{name}" if key else name).items()}
    return {key: tree}


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
