"""A program of a test that workers run before they begin, whether they are forked or started."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from support.clusters.forking.fork_server import WORKER_PROGRAM
from support.paths import TESTS

_BEGINNING = """
import sys

sys.path.append({tests!r})
worker, words = {worker!r}, sys.orig_argv
if "--name" in words and worker in ("", words[words.index("--name") + 1]):
"""


def run_in_workers(monkeypatch: pytest.MonkeyPatch, folder: Path, program: str, worker: str = "") -> None:
    """Writes `program` into a file in `folder`. Workers that start from now on run it: the named one, or all."""
    file = folder / "worker_program.py"
    lines = dedent(program).strip().splitlines()
    file.write_text(_BEGINNING.format(tests=str(TESTS), worker=worker) + "".join(f"    {line}\n" for line in lines))
    monkeypatch.setenv(WORKER_PROGRAM, str(file))
