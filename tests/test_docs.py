"""README.md and docs/architecture.md stay true: trees, commands, code and numbers are compared with what is there.

Each rule is a function from text to what it names or complains of, and each has a test that it does complain.
"""

import ast
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

import nexus
from nexus.cli import _parser
from nexus.errors import NexusError

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()

# What the demo's report.json promises; the README quotes nothing else.
REPORT_KEYS = set(
    """
    asr.wer sqa.accuracy sqa.text_ceiling vqa.accuracy_before_audio vqa.accuracy_after codec.wer codec.wer_original
    tts.wer tts.wer_original s2s.answer_accuracy s2s.wer_own_text first_sound.seconds memory.peak_gib seconds.total
    model.parameters avqa.accuracy video.accuracy multiturn.accuracy s2tt.bleu_zh_en s2tt.bleu_en_zh ser.accuracy
    caption.accuracy
    """.split()
)
OPENING, CLOSING = "<!-- numbers -->", "<!-- /numbers -->"
FOREIGN = ("/work/", "/tmp/")  # folders of one machine, which mean nothing on another


def fenced(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language; "" is a block without any."""
    return [body for name, body in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.M | re.S) if name == language]


def under(page: str, heading: str) -> str:
    """The section below `## heading`, up to the next one."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    assert found, f"no section {heading!r}"
    return found[1]


def tree_of(page: str, heading: str) -> str:
    (tree,) = fenced(under(page, heading), "")
    return tree


def tree_paths(tree: str) -> list[str]:
    """The paths that a drawn tree names. A line is names, two spaces, words; folders end in / and hold what is indented
    below them."""
    paths, folders = [], [(-1, "")]
    for line in filter(str.strip, tree.splitlines()):
        indent = len(line) - len(line.lstrip())
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        for name in re.split(r"  +", line.strip())[0].split(" "):
            paths.append(folders[-1][1] + name)
        if paths[-1].endswith("/"):
            folders.append((indent, paths[-1]))
    return paths


def modules(root: Path) -> set[str]:
    """Every folder with code and every module below nexus/, as a tree names them; a folder stands for its __init__."""
    files = {path.relative_to(root).as_posix() for path in (root / "nexus").rglob("*.py")}
    folders = {f"{PurePosixPath(path).parent}/" for path in files}
    return folders | {path for path in files if not path.endswith("/__init__.py")}


def ranked(table: str) -> set[str]:
    """The rooms that the table of imports places: left of an arrow, or in a line without arrows."""
    rooms: set[str] = set()
    for line in table.splitlines():
        rest = line.partition(" ")[2]
        rooms |= set(re.findall(r"(\w+) ->", rest) if "->" in rest else rest.split())
    return rooms


def commands(page: str) -> Iterator[list[str]]:
    """The words of every `make` and `nexus` command in shell blocks and in code within a line, program name first."""
    lines = "\n".join(fenced(page, "sh")).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)
    lines += [span for span in re.findall(r"`([^`\n]+)`", prose) if span.startswith(("make ", "nexus "))]
    for line in lines:
        words = shlex.split(line, comments=True)
        if words and PurePosixPath(words[0]).name in ("make", "nexus"):
            yield [PurePosixPath(words[0]).name, *words[1:]]


def command_complaints(page: str, makefile: str) -> list[str]:
    targets = set(re.findall(r"^([\w-]+):", makefile, re.M))
    complaints = []
    for program, *words in commands(page):
        if program == "make":
            missing = [word for word in words if "=" not in word and word not in targets]
            complaints += [f"make {word}: the Makefile has no such target" for word in missing]
            continue
        try:
            if _parser().parse_args(words).verb is None:
                complaints.append(f"nexus {shlex.join(words)}: no verb")
        except NexusError as error:
            if not (len(words) == 1 and "arguments are required" in str(error)):  # a verb by its name
                complaints.append(f"nexus {shlex.join(words)}: {error}")
    return complaints


def unknown_names(code: str) -> set[str]:
    """What Python code takes from nexus that is not public. Raises SyntaxError."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Attribute(value=ast.Name(id="nexus"), attr=name):
                names.add(name)
            case ast.ImportFrom(module="nexus", names=aliases):
                names |= {alias.name for alias in aliases}
            case ast.ImportFrom(module=str(module)) if module.startswith("nexus."):
                names.add(module)
    return names - set(nexus.__all__)


def number_complaints(page: str) -> list[str]:
    """What is wrong with the table of measured numbers: a key in backticks, a value, then whatever explains them."""
    if page.count(OPENING) != 1 or page.count(CLOSING) != 1 or page.index(OPENING) > page.index(CLOSING):
        return [f"expected one table between {OPENING} and {CLOSING}; add it from report.json of a full demo"]
    lines = page.split(OPENING)[1].split(CLOSING)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines if line.startswith("|")]
    rule = next((index for index, row in enumerate(rows) if all(re.fullmatch(":?-+:?", cell) for cell in row)), None)
    if rule != 1 or len(rows) < 3:
        return [f"between {OPENING} and {CLOSING}: expected a table of a head, a rule and at least one row"]
    complaints, seen = [], set()
    for first, *others in rows[2:]:
        key = first.strip("`") if re.fullmatch(r"`[^`]+`", first) else None
        if key is None or key not in REPORT_KEYS:
            complaints.append(f"{first}: no key of the report in backticks; expected one of {sorted(REPORT_KEYS)}")
        elif key in seen:
            complaints.append(f"{first}: stands there twice")
        seen.add(key)
        if not others or not re.search(r"\d", others[0]):
            complaints.append(f"{first}: no number in the second column")
    return complaints


def foreign_paths(root: Path, names: list[str]) -> list[str]:
    """Lines of files outside tests/ that name a folder of one machine."""
    return [
        f"{name}:{number} holds {word}"
        for name in names
        if not name.startswith("tests/") and (root / name).is_file()
        for number, line in enumerate((root / name).read_bytes().split(b"\n"), 1)
        for word in FOREIGN
        if word.encode() in line
    ]


@pytest.mark.parametrize(("page", "heading"), [(README, "The tree"), (ARCHITECTURE, "Rooms")])
def test_every_path_in_the_trees_exists(page: str, heading: str) -> None:
    paths = tree_paths(tree_of(page, heading))
    assert "nexus/" in paths and len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists() or (ROOT / path).is_dir() != path.endswith("/")] == []


def test_the_architecture_names_every_room_and_module() -> None:
    assert modules(ROOT) - set(tree_paths(tree_of(ARCHITECTURE, "Rooms"))) == set()


def test_the_table_of_imports_places_every_room() -> None:
    (table,) = fenced(under(ARCHITECTURE, "Who may import whom"), "")
    top = {path.split("/")[1].removesuffix(".py") for path in modules(ROOT) if path != "nexus/"}
    assert ranked(table) == top - {"__main__"}


def test_a_tree_is_read_as_it_is_drawn() -> None:
    tree = "nexus/\n  a.py b.py  two of them\n  c/      a folder: d.py\n    e/f.py  deep\n\n  g.py\ndocs/h.md   apart\n"
    in_nexus = ["nexus/", "nexus/a.py", "nexus/b.py", "nexus/c/", "nexus/c/e/f.py", "nexus/g.py"]
    assert tree_paths(tree) == [*in_nexus, "docs/h.md"]
    assert ranked("L0  types mel\nL1  codec -> L0      engines -> L0 data\n") == {"types", "mel", "codec", "engines"}


def test_a_module_is_found_with_its_folder(tmp_path: Path) -> None:
    for name in ("nexus/__init__.py", "nexus/new/__init__.py", "nexus/new/thing.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    assert modules(tmp_path) == {"nexus/", "nexus/new/", "nexus/new/thing.py"}


@pytest.mark.parametrize("page", [README, ARCHITECTURE], ids=["README", "architecture"])
def test_the_commands_of_the_pages_exist(page: str) -> None:
    assert command_complaints(page, MAKEFILE) == []


def test_the_readme_shows_both_programs_at_work() -> None:
    given = list(commands(README))
    assert {"make", "nexus"} == {program for program, *_ in given}
    assert len(given) >= 4


@pytest.mark.parametrize(
    "page",
    [
        "```sh\nmake tests  # all of them\n```\n",
        "Say `make nothing PYTHON=python3.12`.",
        "```sh\n.venv/bin/nexus chat --loud\n```\n",
        "Say `nexus sing`.",
        "Say `nexus demo --minutes few`.",
    ],
)
def test_a_command_that_does_not_exist_is_found(page: str) -> None:
    assert len(command_complaints(page, MAKEFILE)) == 1


def test_the_python_of_the_readme_compiles_and_uses_public_names() -> None:
    blocks = fenced(README, "python")
    assert blocks
    assert [name for block in blocks for name in unknown_names(block)] == []


def test_names_that_are_not_public_are_found() -> None:
    code = (
        "import nexus\nfrom nexus import Turn, nothing\nfrom nexus.media import load\nnexus.Text('a')\nnexus.gone()\n"
    )
    assert unknown_names(code) == {"nothing", "nexus.media", "gone"}
    with pytest.raises(SyntaxError):
        unknown_names("for piece in:\n")


def test_the_numbers_of_the_readme_carry_keys_of_the_report() -> None:
    complaints = number_complaints(README)
    assert not complaints, "README.md: " + "; ".join(complaints)


HEAD = f"{OPENING}\n\n| key | value | |\n|---|--:|---|\n"


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (OPENING, "expected one table"),
        (f"{OPENING}\n{CLOSING}", "a head, a rule"),
        (f"{HEAD}{CLOSING}", "at least one row"),
        (f"{HEAD}| `asr.cer` | 0.1 | |\n{CLOSING}", "`asr.cer`: no key"),
        (f"{HEAD}| asr.wer | 0.1 | |\n{CLOSING}", "asr.wer: no key"),
        (f"{HEAD}| `asr.wer` | soon | |\n{CLOSING}", "no number"),
        (f"{HEAD}| `asr.wer` | 0.1 | |\n| `asr.wer` | 0.2 | |\n{CLOSING}", "twice"),
    ],
)
def test_a_table_of_numbers_that_is_not_right_is_found(page: str, words: str) -> None:
    (complaint,) = number_complaints(page)
    assert words in complaint


def test_a_right_table_of_numbers_is_left_alone() -> None:
    rows = "| `asr.wer` | 7.1 % | of words |\n| `model.parameters` | 11,234,567 | |\n"
    assert number_complaints(f"# Page\n{HEAD}{rows}\n{CLOSING}\nmore") == []


def test_no_file_names_a_folder_of_one_machine() -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is unknown")
    listing = subprocess.run(
        [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = listing.stdout.split("\0")
    assert "README.md" in names
    assert foreign_paths(ROOT, names) == []


def test_a_folder_of_one_machine_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("fine\nsee /tmp/x\n")
    assert foreign_paths(tmp_path, ["a.md", "gone.md", ""]) == ["a.md:2 holds /tmp/"]
