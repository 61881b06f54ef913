"""Tests of `make` without required programs, and of `make clean`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT

TOOLS = ("make", "sh", "find", "rm", "touch")


def make(folder: Path, *arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    """Runs make in a folder that contains only the Makefile and constraints.txt."""
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "constraints.txt").touch()
    environment = {"PATH": path, "HOME": str(folder)}
    command = [str(shutil.which("make")), *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60.0, check=False
    )


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the line before make's own error line."""
    assert done.returncode != 0
    ours, makes = done.stderr.splitlines()
    assert makes.startswith("make: ***")
    return ours


def test_an_old_python_is_named(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\necho no such syntax >&2\nexit 1\n")
    old.chmod(0o755)
    assert error_of(make(tmp_path, "build", f"PYTHON={old}")).startswith(f"error: {old} is not Python 3.11 or later")
    assert "PYTHON=python3.12" in error_of(make(tmp_path, "build", "PYTHON=nowhere-to-be-found"))
    assert not (tmp_path / ".venv").exists()


def test_a_missing_compiler_is_named_before_anything_is_fetched(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(str(shutil.which(tool)))
    done = make(tmp_path, "build", f"PYTHON={sys.executable}", path=str(tools))
    assert "no C++ compiler found: install g++ or clang++" in error_of(done)
    assert not (tmp_path / ".venv").exists()


def test_clean_leaves_no_caches(tmp_path: Path) -> None:
    kept = tmp_path / "tests" / "data"
    kept.mkdir(parents=True)
    for name in (".venv", "build", "dist", ".hypothesis", ".mypy_cache", ".ruff_cache", ".pytest_cache"):
        (tmp_path / name / "deep").mkdir(parents=True)
    for name in (".import_linter_cache", "tests/.mypy_cache", "tests/__pycache__"):
        (tmp_path / name).mkdir()
    assert make(tmp_path, "clean").returncode == 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["Makefile", "constraints.txt", "data", "tests"]
