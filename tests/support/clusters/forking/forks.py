"""Starts commands and workers as children of this process, forked from one that has imported their modules. This saves
a second of processor time for a coordinator, and half a second for a worker."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from threading import Lock

from llamaclust.model.child_process import _KEPT_VARIABLES
from support.clusters.forking.fork_server import CHILDREN, ROOM_BYTES, STATE_DIR, WORKER_PROGRAM, Asked

_SERVER = Path(__file__).with_name("fork_server.py")
_ROOM = ROOM_BYTES * " "
_ANSWER_S = 60.0
_PR_SET_CHILD_SUBREAPER = 36
_READ_AT_START = ("PYTHON", "GRPC_", "LD_", "LC_", "LANG")
"""Prefixes of environment variables that Python or imported modules read once."""
_TURN = Lock()
"""A lock of all servers, since this process is a subreaper for one of them at a time."""


class ForkServer:
    """A process that runs `fork_server` and ends with this one."""

    def __init__(self, program: str, environment: Mapping[str, str]) -> None:
        self._read = _read_at_start(environment)
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._requests.settimeout(_ANSWER_S)
        own = {"OPENBLAS_NUM_THREADS": "1", STATE_DIR: _ROOM}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SERVER), f"of={program}", str(theirs.fileno()), _ROOM],
                env={**environment, **own},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def serves(self, environment: Mapping[str, str]) -> bool:
        """Tells whether a forked process would be like one that is started with this environment."""
        return _read_at_start(environment) == self._read

    def fork(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        descriptors: tuple[int, int, int],
        network: str | None = None,
    ) -> int:
        """Forks a child of this process, in a new session and in the named network namespace, if any; returns its
        process id. `descriptors`: its standard input, output and error."""
        asked = Asked(list(arguments), dict(environment), str(folder), network)
        with _TURN, _subreaper():
            socket.send_fds(self._requests, [json.dumps(asdict(asked)).encode()], list(descriptors))
            return int(self._requests.recv(100))


@cache
def first_environment() -> dict[str, str]:
    """Returns the environment at the first call, before any test changes it."""
    return dict(os.environ)


@cache
def fork_server(program: str) -> ForkServer | None:
    """Returns this process's server for a program, started by the first call; None on systems other than Linux."""
    if sys.platform != "linux":
        return None
    own = first_environment()
    return ForkServer(program, kept_variables(own) if program in CHILDREN else own)


def kept_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables that child processes for untrusted input get."""
    return {name: environment[name] for name in _KEPT_VARIABLES if name in environment}


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    names = [name for name in environment if name.startswith(_READ_AT_START) and name != WORKER_PROGRAM]
    return {name: environment[name] for name in names}


@contextmanager
def _subreaper() -> Iterator[None]:
    """Makes orphaned grandchildren become children of this process within the context."""
    prctl = ctypes.CDLL(None).prctl
    assert prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class ForkedCommand:
    """The part of a `subprocess.Popen` that tests use."""

    def __init__(self, words: Sequence[str], pid: int) -> None:
        self.args = list(words)
        self.pid = pid
        self.returncode: int | None = None
        self._turn = Lock()
        self._end = os.pidfd_open(pid)

    def __del__(self) -> None:
        os.close(self._end)

    def poll(self) -> int | None:
        with self._turn:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        ends = select.poll()
        ends.register(self._end, select.POLLIN)
        ends.poll(None if timeout is None else 1000 * timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
