"""A worker as the child of whoever places it on a machine: it enrols and joins by itself, as a static one does."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import IO

from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.launchers.base import WorkerSpec
from llamaclust.cluster.launchers.worker_process import worker_command, worker_environment

_JOIN_S = 15.0

Ended = Callable[[int], None]
"""Called with a process's return code, as `subprocess` gives it."""


class Child:
    """One worker process. It ends with this process, however that ends."""

    def __init__(self, spec: WorkerSpec, join: str, token: str, ended: Ended, log: IO[bytes] | None = None) -> None:
        """Starts it. `join`: HOST:PORT of the enrolment port. `ended` is called from another thread. `log`: where it
        writes; None: where this process does."""
        self._started = threading.Event()
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        command = worker_command(spec, join, "--static", join_s=_JOIN_S, token_file="/dev/stdin")
        threading.Thread(target=self._live, args=(command, token, ended), name=spec.name, daemon=True).start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _live(self, command: list[str], token: str, ended: Ended) -> None:
        """In a thread that lives as long as the worker: the kernel ends it with the thread that started it."""
        try:
            self._process = process = _spawn(command, self._log)
        except OSError as error:
            self._error = error
            return
        finally:
            self._started.set()
        assert process.stdin is not None
        try:
            process.stdin.write(token.encode())
            process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended, which is told in a moment
        ended(process.wait())


def _spawn(command: list[str], log: IO[bytes] | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # for the token: it is on no command line, in no environment, on no disk
        stdout=log,
        stderr=log,
        env=worker_environment(os.environ),
        start_new_session=True,
    )


def adapted(spec: WorkerSpec) -> WorkerSpec:
    """The same worker with what this machine's environment says of its disk."""
    variables = environment()
    return replace(
        spec,
        packed_cache_dir=variables.packed_cache_dir if variables.packed_cache_bytes else None,
        packed_cache_bytes=variables.packed_cache_bytes,
        weights_dir=variables.weights_dir if variables.weights_bytes else None,
        weights_bytes=variables.weights_bytes,
        kernels_dir=variables.kernels_dir,
    )
