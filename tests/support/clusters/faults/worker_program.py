"""Runs a test's Python program in workers, forked or started, before their own program."""

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
    """Writes `program` to a file in `folder`, which the named worker, or all workers, run when they start."""
    file = folder / "worker_program.py"
    lines = dedent(program).strip().splitlines()
    file.write_text(_BEGINNING.format(tests=str(TESTS), worker=worker) + "".join(f"    {line}\n" for line in lines))
    monkeypatch.setenv(WORKER_PROGRAM, str(file))
