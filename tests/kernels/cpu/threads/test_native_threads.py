"""Tests of the native module's threads in a build with ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from support.paths import ROOT

NATIVE = ROOT / "kernels/cpu/native"
FLAGS = ("-std=c++20", "-O1", "-g", "-pthread", "-fsanitize=thread")


def build(program: Path, *sources: Path) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = ["c++", *FLAGS, "-I", NATIVE, *sources, "-o", program]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def require_thread_sanitizer(folder: Path) -> None:
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() {}\n")
    found = shutil.which("c++") and build(program, source).returncode == 0
    if not found or subprocess.run([program], capture_output=True, check=False).returncode != 0:
        pytest.skip("no C++ compiler with a thread sanitizer that runs here")


@pytest.mark.parametrize("name", ["pool_jobs", "core_sharing"])
def test_threads_have_no_data_races_and_wait_as_they_should(name: str, tmp_path: Path) -> None:
    require_thread_sanitizer(tmp_path)
    program = tmp_path / name
    sources = (NATIVE / "runtime" / name for name in ("thread_pool.cpp", "thread_speeds.cpp", "core_sharing.cpp"))
    built = build(program, ROOT / f"tests/kernels/native/{name}.cpp", *sources)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
