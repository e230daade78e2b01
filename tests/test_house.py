"""The walls of the house, read from the source: who imports whom, what is nowhere allowed, how long things may be.

The rules stand in `docs/architecture.md`; the tables below are their working copy. Each rule is a function from
source to complaints, and each has a test that it does complain.
"""

import ast
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SHAPE_CHECKED

import nexus

ROOT = Path(__file__).resolve().parent.parent
L0 = "the bottom"
ALL = "everything below"

# Rooms and what they may import besides themselves. A file directly in nexus/ is at the bottom unless named here.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    L0: (),
    "nexus.codec": (L0,),
    "nexus.engines": (L0,),
    "nexus.model": (L0, "nexus.codec"),
    "nexus.data": (L0,),
    "nexus.synth": (L0, "nexus.engines", "nexus.data"),
    "nexus.train": (L0, "nexus.model", "nexus.data"),
    "nexus.build": (L0, "nexus.codec", "nexus.data", "nexus.model"),
    "nexus.lmms": (L0,),  # lives in lmms-eval's environment, which has nothing of ours
    "nexus.respond": (L0, "nexus.codec", "nexus.data", "nexus.model"),
    "nexus.eval": (L0, "nexus.data", "nexus.engines", "nexus.synth.noise", "nexus.respond"),
    "nexus.serve": (L0, "nexus.data.chat", "nexus.respond"),
    "nexus.factory": (ALL,),
    "nexus.demo": (ALL,),
    "nexus.findings": (ALL,),
    "nexus.bench": (ALL,),
    "nexus.learning": (ALL,),
    "nexus.verbs": (ALL,),
    "nexus.terminal": (ALL,),
    "nexus.cli": (ALL,),
    "nexus.__main__": (ALL,),
}
# Of these, each may import those to its left.
TOP = (
    "nexus.factory",
    "nexus.demo",
    "nexus.findings",
    "nexus.learning",
    "nexus.bench",
    "nexus.terminal",
    "nexus.verbs",
    "nexus.cli",
    "nexus.__main__",
)

# Packages from outside that are let in at one door only.
DOORS = {
    "transformers": ("nexus.model", "nexus.engines", "nexus.bench"),  # bench: the peers that we are timed against
    "lmms_eval": ("nexus.lmms",),
    "ray": ("nexus.synth.executor", "nexus.synth.executors"),
    **dict.fromkeys(
        ("fastapi", "starlette", "uvicorn", "aiohttp", "websockets", "flask", "gradio"),
        ("nexus.serve",),
    ),
}
UNPICKLES = "nexus.pickles"  # the one explicit conversion; torch.load there takes weights only
MAX_FILE_LINES = 600
MAX_P95_FUNCTION_LINES = 60


def read_modules(root: Path) -> dict[str, ast.Module]:
    """Every module of the package by its dotted name; packages under their own name, without `__init__`."""
    modules = {}
    for path in sorted((root / "nexus").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(), str(path))
    return modules


def is_within(module: str, *places: str) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)


def room_of(module: str) -> str:
    """The narrowest named room that holds the module."""
    named = [room for room in MAY_IMPORT if is_within(module, room)]
    if named:
        return max(named, key=len)
    return L0 if module.count(".") <= 1 else ".".join(module.split(".")[:2])


def imported_names(module: str, tree: ast.AST, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import anywhere in the file, also those by string. `from a import b` gives a.b."""
    here = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                base = [*here[: len(here) - level + 1], *([source] if source else [])] if level else [source or ""]
                yield from ((node.lineno, ".".join([*base, alias.name])) for alias in names)
            case ast.Call(args=[ast.Constant(value=str(name)), *_]) if called(node) in (
                "importlib.import_module",
                "import_module",
                "__import__",
            ):
                yield node.lineno, name


def called(call: ast.Call) -> str:
    """`a.b.c` of the call a.b.c(...), or "" where the function is an expression."""
    parts: list[str] = []
    function = call.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    return ".".join([function.id, *reversed(parts)]) if isinstance(function, ast.Name) else ""


def own_imports(modules: dict[str, ast.Module], module: str) -> Iterator[tuple[int, str]]:
    """(line, module) for each import of one of `modules`; `from nexus import OmniModel` leads to where it lives."""
    is_package = any(other.startswith(module + ".") for other in modules) or module == "nexus"
    for line, name in imported_names(module, modules[module], is_package):
        if name.startswith("nexus.") and name.count(".") == 1:
            name = nexus._HOMES.get(name.split(".")[1], name)
        while name and name not in modules:
            name = name.rpartition(".")[0]
        if name:
            yield line, name


def upward_imports(modules: dict[str, ast.Module]) -> list[str]:
    complaints = []
    for module in modules:
        if module == "nexus":  # the public surface: names from every room, resolved on first use
            continue
        room = room_of(module)
        if room not in MAY_IMPORT:
            complaints.append(f"{module}: {room} has no place in MAY_IMPORT")
            continue
        for line, imported in own_imports(modules, module):
            if imported != "nexus" and not may_import(room, imported):
                complaints.append(f"{module}:{line} imports {imported}: {room} may import {MAY_IMPORT[room]}")
    return complaints


def may_import(room: str, imported: str) -> bool:
    target, allowed = room_of(imported), MAY_IMPORT[room]
    if target == room:
        return True
    if ALL in allowed:
        return target not in TOP[TOP.index(room) :]
    return (target == L0 and L0 in allowed) or is_within(imported, *(place for place in allowed if place != L0))


def wrong_doors(modules: dict[str, ast.Module]) -> list[str]:
    return [
        f"{module}:{line} imports {name}: only {DOORS[name.split('.')[0]]} may"
        for module, tree in modules.items()
        for line, name in imported_names(module, tree, is_package=False)
        if name.split(".")[0] in DOORS and not is_within(module, *DOORS[name.split(".")[0]])
    ]


def way_to(modules: dict[str, ast.Module], start: str, place: str) -> list[str]:
    """A chain of imports from `start` into `place`, or [] where there is none. Packages run before their modules."""
    ways, reached = [[start]], {start}
    for way in ways:
        module = way[-1]
        if is_within(module, place):
            return way
        parent = module.rpartition(".")[0]
        nexts = {name for _, name in own_imports(modules, module)} | ({parent} if parent != "nexus" else set())
        for name in sorted(nexts - reached - {"nexus", ""}):
            reached.add(name)
            ways.append([*way, name])
    return []


def unsafe_code(module: str, tree: ast.AST) -> list[str]:
    """What is nowhere allowed: code from data, hidden errors, a shell."""
    complaints = [
        f"{module}:{line} imports {name}"
        for line, name in imported_names(module, tree, is_package=False)
        if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
    ]
    for node in ast.walk(tree):
        match node:
            case ast.ExceptHandler(type=None):
                complaints.append(f"{module}:{node.lineno} has a bare except")
            case ast.Call(keywords=keywords) if called(node) == "torch.load" and module == UNPICKLES:
                if not any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in keywords):
                    complaints.append(f"{module}:{node.lineno} loads more than weights")
            case ast.Call() if called(node) in ("torch.load", "os.system", "eval", "exec", "yaml.load"):
                complaints.append(f"{module}:{node.lineno} calls {called(node)}")
            case ast.keyword(arg="trust_remote_code" | "shell" | "allow_pickle" as name, value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    complaints.append(f"{module}:{node.lineno} sets {name}")
            case ast.Constant(value="trust_remote_code"):
                complaints.append(f"{module}:{node.lineno} names trust_remote_code")
    return complaints


Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(tree: ast.AST) -> Iterator[tuple[Function, bool]]:
    """(function, whether it is a method with self or cls) of a module and its classes, not of function bodies."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.ClassDef():
                for function, _ in public_functions(node):
                    names = {name.id for name in function.decorator_list if isinstance(name, ast.Name)}
                    yield function, "staticmethod" not in names
            case ast.FunctionDef() | ast.AsyncFunctionDef() if not node.name.startswith("_"):
                yield node, False


def untyped(module: str, tree: ast.AST) -> list[str]:
    complaints = []
    for function, is_method in public_functions(tree):
        given = function.args
        named = [*given.posonlyargs, *given.args][1 if is_method else 0 :]
        rest = [given.vararg] * bool(given.vararg) + [given.kwarg] * bool(given.kwarg)
        missing = [arg.arg for arg in [*named, *given.kwonlyargs, *rest] if arg is not None and arg.annotation is None]
        missing += ["return"] * (function.returns is None)
        if missing:
            complaints.append(f"{module}:{function.lineno} {function.name} lacks types of {', '.join(missing)}")
    return complaints


def function_lengths(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield (node.end_lineno or node.lineno) - node.lineno + 1, node.name


def p95(numbers: list[int]) -> int:
    return sorted(numbers)[math.ceil(0.95 * len(numbers)) - 1]


MODULES = read_modules(ROOT)


def sources(**files: str) -> dict[str, ast.Module]:
    """A small house out of module names (with __ for dots) and their source, beside the packages they need."""
    trees = {name.replace("__", "."): ast.parse(textwrap.dedent(text)) for name, text in files.items()}
    packages = {".".join(name.split(".")[:depth]) for name in trees for depth in range(1, name.count(".") + 1)}
    return {package: ast.parse("") for package in packages} | trees


def test_imports_point_down() -> None:
    assert upward_imports(MODULES) == []


@pytest.mark.parametrize(
    "house",
    [
        sources(nexus__train__loop="from nexus.eval.run import run", nexus__eval__run=""),
        sources(nexus__model__omni="import nexus.data.chat", nexus__data__chat=""),
        sources(nexus__codec__rvq="from ..model import layers", nexus__model__layers=""),
        sources(nexus__types="def late():\n    from nexus.codec import rvq", nexus__codec__rvq=""),
        sources(nexus__synth__steps="import importlib\nimportlib.import_module('nexus.cli')", nexus__cli=""),
        sources(nexus__respond="from nexus.train import loop", nexus__train__loop=""),
        sources(nexus__data__chat="from nexus import OmniModel", nexus__model__omni=""),
        sources(nexus__data__collate="from nexus.codec import rvq", nexus__codec__rvq=""),
        sources(nexus__demo__demo="from nexus.cli import main", nexus__cli=""),
        sources(nexus__attic__old=""),
    ],
)
def test_an_import_that_points_up_is_found(house: dict[str, ast.Module]) -> None:
    assert len(upward_imports(house)) >= 1


def test_imports_that_point_down_are_left_alone() -> None:
    house = sources(
        nexus__types="",
        nexus__codec__rvq="from nexus import types",
        nexus__data__chat="from nexus.types import Sample",
        nexus__eval__suites__noisy="from nexus.synth.noise import at_snr\nfrom nexus.data import chat",
        nexus__synth__noise="from nexus import types",
        nexus__respond="from nexus.data.chat import render",
        nexus__demo__demo="from nexus.respond import load\nfrom . import world",
        nexus__demo__world="import nexus",
        nexus__cli="from nexus.demo import demo",
    )
    assert upward_imports(house) == []


def test_transformers_ray_and_web_frameworks_enter_by_their_own_door() -> None:
    assert wrong_doors(MODULES) == []


def test_a_package_at_the_wrong_door_is_found() -> None:
    assert len(wrong_doors(sources(nexus__codec__rvq="from transformers.activations import GELU"))) == 1
    assert len(wrong_doors(sources(nexus__synth__steps="import ray.util"))) == 1
    assert wrong_doors(sources(nexus__model__vision="import transformers", nexus__synth__executor="import ray")) == []


def test_speech_of_the_model_cannot_come_from_an_engine() -> None:
    starts = [module for module in MODULES if is_within(module, "nexus.model", "nexus.respond")]
    assert "nexus.respond" in starts
    assert [way for start in starts if (way := way_to(MODULES, start, "nexus.engines"))] == []


def test_a_roundabout_way_to_an_engine_is_found() -> None:
    house = sources(
        nexus__respond="from nexus.model.voice import delayed",
        nexus__model__voice__delayed="",
        nexus__model__voice="def late():\n    import nexus.helper",
        nexus__helper="from nexus.engines import speak",
        nexus__engines__speak="",
    )
    assert way_to(house, "nexus.respond", "nexus.engines")[-1] == "nexus.engines.speak"


def run_and_list_modules(code: str, *arguments: str) -> set[str]:
    """Names in sys.modules after `code` ran in a fresh interpreter, which must exit with 0."""
    end = "\nimport sys\nprint('\\nMODULES', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code) + end, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("MODULES ")[2].split())


def test_importing_nexus_is_light() -> None:
    loaded = run_and_list_modules("import nexus")
    assert "nexus" in loaded
    assert not loaded & {"torch", "transformers"}


def test_asking_for_help_is_light() -> None:
    loaded = run_and_list_modules(
        """
        import sys
        from nexus.cli import main
        try:
            status = main()
        except SystemExit as stop:
            status = stop.code
        assert not status, f"exit code {status}"
        """,
        "--help",
    )
    assert "nexus.cli" in loaded
    assert not loaded & {"torch", "transformers"}


def test_loading_what_responds_loads_no_engine() -> None:
    organs = [module for module in MODULES if is_within(module, "nexus.model")]
    loaded = run_and_list_modules(f"import nexus.respond, {', '.join(organs)}")
    assert "nexus.respond" in loaded
    assert not [name for name in loaded if is_within(name, "nexus.engines")]


def test_no_module_unpickles_evaluates_or_hides_errors() -> None:
    assert [line for module, tree in MODULES.items() for line in unsafe_code(module, tree)] == []


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.load('x.pt')",
        "from pickle import loads",
        "model(trust_remote_code=True)",
        "model(**{'trust_remote_code': True})",
        "import subprocess; subprocess.run('ls', shell=True)",
        "import numpy as np; np.load('x.npy', allow_pickle=True)",
        "try:\n    f()\nexcept:\n    pass",
        "eval('1')",
    ],
)
def test_unsafe_code_is_found(line: str) -> None:
    assert len(unsafe_code("nexus.x", ast.parse(line))) == 1


def test_weights_alone_are_unpickled_and_in_one_place() -> None:
    safe, unsafe = (ast.parse(f"torch.load(f{more})") for more in (", weights_only=True", ""))
    assert unsafe_code(UNPICKLES, safe) == []
    assert len(unsafe_code(UNPICKLES, unsafe)) == len(unsafe_code("nexus.x", safe)) == 1


def test_safe_neighbours_of_unsafe_code_are_left_alone() -> None:
    code = "model.eval()\nsafetensors.torch.load(data)\nnp.load(f, allow_pickle=False)\nyaml.safe_load(f)"
    assert unsafe_code("nexus.x", ast.parse(code)) == []


def test_public_functions_are_fully_typed() -> None:
    assert [line for module, tree in MODULES.items() for line in untyped(module, tree)] == []


def test_a_missing_type_is_found() -> None:
    code = """
    def f(a: int, *rest, key=1) -> int: ...
    def _private(a): ...
    class C:
        def method(self, b): ...
        @staticmethod
        def static(c) -> int: ...
        def good(self, d: int) -> None:
            def inner(e): ...
    """
    found = untyped("m", ast.parse(textwrap.dedent(code)))
    assert [line.split(" ", 1)[1] for line in found] == [
        "f lacks types of key, rest",
        "method lacks types of b, return",
        "static lacks types of c",
    ]


def test_files_and_functions_stay_readable() -> None:
    files = [path for room in ("nexus", "tests", "benchmarks") for path in (ROOT / room).rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {path: n for path, n in lines.items() if n > MAX_FILE_LINES} == {}
    lengths = [length for tree in MODULES.values() for length, _ in function_lengths(tree)]
    assert p95(lengths) <= MAX_P95_FUNCTION_LINES


def test_the_length_of_functions_is_measured() -> None:
    tree = ast.parse("def short():\n    pass\n\nclass C:\n    async def long(self):\n        a = 1\n        return a\n")
    assert sorted(function_lengths(tree)) == [(2, "short"), (3, "long")]
    assert p95([*range(1, 101)]) == 95
    assert p95([7]) == 7


def test_every_module_with_shapes_is_checked_while_tests_run() -> None:
    shaped = [
        module
        for module, tree in MODULES.items()
        if any(name.startswith("jaxtyping") for _, name in imported_names(module, tree, is_package=False))
    ]
    assert "nexus.mel" in shaped
    assert [module for module in shaped if not is_within(module, *SHAPE_CHECKED)] == []


def test_modules_with_shapes_keep_their_annotations_checkable() -> None:
    """`from __future__ import annotations` would turn shapes into strings that nothing checks."""
    assert [
        module
        for module, tree in MODULES.items()
        if is_within(module, *SHAPE_CHECKED)
        and ("__future__.annotations" in {name for _, name in imported_names(module, tree, is_package=False)})
    ] == []
