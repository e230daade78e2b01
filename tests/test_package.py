"""What a user installs: pinned dependencies, and a wheel with everything in it."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nexus

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    groups = PROJECT["optional-dependencies"]
    extras = [line for name in ("dev", "corpora", "parquet", "ray") for line in groups[name]]
    needed = [Requirement(line) for line in [*PROJECT["dependencies"], *extras]]
    needed = [need for need in needed if need.name != PROJECT["name"]]  # the extras that dev consists of
    assert needed
    assert [str(need) for need in needed if canonicalize_name(need.name) not in pins()] == []
    assert [str(need) for need in needed if not need.specifier.contains(pins()[canonicalize_name(need.name)])] == []


@pytest.mark.slow
def test_the_wheel_holds_every_module_recipe_and_page_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copytree(ROOT / "nexus", source / "nexus", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("nexus_omni-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "nexus = nexus.cli:main" in archive.read(points).decode()
    wanted = {str(path.relative_to(source)) for path in (source / "nexus").rglob("*") if path.is_file()}
    assert "nexus/recipes/nexus-tiny.yaml" in wanted
    assert held == wanted


def test_a_module_in_the_current_folder_is_never_imported(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise SystemExit('code from the current folder ran')")
    done = subprocess.run(
        [sys.executable, "-m", "nexus", "show", "nexus-tiny"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(nexus.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
