"""Makes local launchers in this process fork their workers; tests of launchers start theirs without forks."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from support.clusters.forking.forks import first_environment, fork_server

_WORKER = "llamaclust.worker"

Spawn = Callable[..., Coroutine[Any, Any, Process]]


class ForkedWorkers:
    """Replaces asyncio.create_subprocess_exec: forks workers of the local launcher, and starts others as before."""

    def __init__(self, spawn: Spawn) -> None:
        self.spawn = spawn

    async def __call__(self, program: str, *arguments: str, **options: Any) -> Process:
        words = (program, *arguments)
        if words[:4] == (sys.executable, "-P", "-m", _WORKER) and _is_launchers(options):
            server = fork_server(_WORKER)
            if server is not None and server.serves(options["env"]):
                log = options["stdout"]
                reading, writing = os.pipe()
                try:
                    pid = server.fork(words[4:], options["env"], Path.cwd(), (reading, log, log))
                finally:
                    os.close(reading)
                return ForkedWorker(pid, writing)  # type: ignore[return-value]
        return await self.spawn(*words, **options)


class ForkedWorker:
    """The part of asyncio's `Process` that the local launcher uses."""

    def __init__(self, pid: int, stdin: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdin = _Input(stdin)
        self._ended = asyncio.get_running_loop().create_future()
        self._watch = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._watch, self._reap)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._watch)
        os.close(self._watch)
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._ended.set_result(self.returncode)

    async def wait(self) -> int:
        code: int = await asyncio.shield(self._ended)
        return code


class _Input:
    """A standard input of a few KiB, which fit into a pipe."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def write(self, data: bytes) -> None:
        os.write(self._pipe, data)

    def close(self) -> None:
        os.close(self._pipe)


def _is_launchers(options: dict[str, Any]) -> bool:
    known = {"stdin": PIPE, "stderr": STDOUT, "start_new_session": True}
    return options.keys() == {*known, "stdout", "env"} and all(options[name] == known[name] for name in known)


def fork_workers() -> None:
    """Makes all local launchers in this process fork their workers."""
    first_environment()
    asyncio.create_subprocess_exec = ForkedWorkers(asyncio.create_subprocess_exec)  # type: ignore[assignment]
