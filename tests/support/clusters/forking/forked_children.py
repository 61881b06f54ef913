"""Forks this process's child processes for templates, grammars and images. Tests of these child processes start them
without forks, as users do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llamaclust.model.child_process import BoundedChild
from support.clusters.forking.fork_server import CHILDREN
from support.clusters.forking.forks import ForkedCommand, fork_server, kept_variables


class ForkedChild(ForkedCommand):
    """The part of a `subprocess.Popen` with pipes that `BoundedChild` uses."""

    def __init__(self, module: str, pid: int, stdin: int, stdout: int) -> None:
        super().__init__([sys.executable, "-P", "-m", module], pid)
        self.stdin, self.stdout = os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb")

    def communicate(self) -> None:
        with suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()
        self.wait()


def _forked(module: str) -> ForkedChild | None:
    server, environment = fork_server(module), kept_variables(os.environ)
    if server is None or not server.serves(environment):
        return None
    (reading, stdin), (stdout, writing), nowhere = os.pipe(), os.pipe(), os.open(os.devnull, os.O_WRONLY)
    try:
        pid = server.fork((), environment, Path.cwd(), (reading, writing, nowhere))
    finally:
        for descriptor in (reading, writing, nowhere):
            os.close(descriptor)
    return ForkedChild(module, pid, stdin, stdout)


@contextmanager
def forked_children() -> Iterator[None]:
    start = BoundedChild._popen

    def popen(child: BoundedChild) -> subprocess.Popen[bytes]:
        module = child._program.module
        forked = _forked(module) if module in CHILDREN else None
        return start(child) if forked is None else forked  # type: ignore[return-value]

    BoundedChild._popen = popen  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        BoundedChild._popen = start  # type: ignore[method-assign]
