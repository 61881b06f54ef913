"""Runs commands that end by themselves, in processes forked from one that has imported their modules. Every command
imports this module, so it imports little."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory

_IMPORTED = [
    "llamaclust.cli.app",
    "llamaclust.cli.up",
    "llamaclust.cli.generate",
    "llamaclust.cli.status",
    "llamaclust.cli.up",
    "llamaclust.cli.status",
    "llamaclust.cluster.front.app",
    "llamaclust.kernels.cpu.backend",
]
"""Modules that the server imports. None of them imports gRPC, which reads environment variables at its import."""

_PIPE_BYTES = 1 << 16
"""The capacity of a pipe."""


def run_forked(
    arguments: Sequence[str],
    environment: dict[str, str],
    folder: Path,
    out: Path,
    err: Path,
    within_s: float,
    piped: bytes = b"",
) -> int:
    """Runs `llamaclust` or a Python script, as `arguments[0]` says, in `folder` with `piped` on standard input, and
    returns its exit code; raises subprocess.TimeoutExpired if it does not end in time."""
    process = _server().Process(target=_become, args=(list(arguments), environment, folder, out, err, piped))
    process.start()
    process.join(within_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(arguments, within_s)
    return process.exitcode


def forked_script(
    script: Path, *arguments: str, folder: Path | None = None, within_s: float = 60.0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a Python script to its end in `folder`, or in the current folder, with `variables` added to the
    environment."""
    with TemporaryDirectory() as outputs:
        out, err = Path(outputs, "out"), Path(outputs, "err")
        code = run_forked(
            [str(script), *arguments], {**os.environ, **variables}, folder or Path.cwd(), out, err, within_s
        )
        return subprocess.CompletedProcess([script, *arguments], code, out.read_text(), err.read_text())


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


def _become(
    arguments: list[str], environment: dict[str, str], folder: Path, out: Path, err: Path, piped: bytes
) -> None:
    assert "grpc" not in sys.modules and len(piped) < _PIPE_BYTES
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    reading, writing = os.pipe()
    os.write(writing, piped)
    os.close(writing)
    os.dup2(reading, 0)
    sys.stdin = os.fdopen(0)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    sys.argv = arguments
    try:
        if arguments[0] == "llamaclust":
            runpy.run_module("llamaclust", run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # such a process does not run these functions itself
