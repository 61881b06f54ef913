"""Checks rules that linters do not: file sizes, file names, and the symbolic links of the package."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pathspec
import pytest

from support.paths import ROOT

pytestmark = pytest.mark.rule

SOURCES = {".py", ".cpp", ".h", ".cu", ".cuh", ".proto", ".cmake", ".sh"}
FOLDERS = ("cli", "tools", "cluster", "worker", "kernels", "model", "wire", "core", "proto")
VAGUE_NAMES = {"utils", "util", "helpers", "common", "misc"}


def tracked_sources() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in paths if path.suffix in SOURCES and path.is_file() and not path.is_symlink()]


def is_generated(path: Path) -> bool:
    return "_pb2" in path.name


def test_no_file_passes_400_lines() -> None:
    sources = [path for path in tracked_sources() if not is_generated(path)]
    assert len(sources) > 50
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in sources}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert [path for path in tracked_sources() if path.stem in VAGUE_NAMES] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_package_is_made_of_links(folder: str) -> None:
    link = ROOT / "src" / "llamaclust" / folder
    assert link.is_symlink()
    assert link.resolve() == ROOT / folder


def test_what_is_compiled_on_a_users_machine_is_packed() -> None:
    """The wheel contains CUDA sources, and headers of CPU kernels that they include."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]
    excluded = pathspec.GitIgnoreSpec.from_lines(settings["exclude"])
    needed = [path for path in tracked_sources() if path.suffix in (".cu", ".cuh", ".h") and "kernels" in path.parts]
    packed = [f"llamaclust/{path.relative_to(ROOT)}" for path in needed if "tests" not in path.parts]
    assert any(name.endswith(".cu") for name in packed) and any("native/level/quants" in name for name in packed)
    assert list(excluded.match_files(packed)) == []
    assert excluded.match_file("llamaclust/kernels/cpu/native/level/matmul/matmul.cpp")
