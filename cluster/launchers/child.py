"""A worker as the child of whoever places it on a machine: it enrols and joins by itself, as a static one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import IO

from llamaclust.cluster.config import environment
from llamaclust.cluster.launchers.base import WorkerSpec
from llamaclust.cluster.launchers.local import worker_environment

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
        arguments = list(_arguments(spec, join))
        threading.Thread(target=self._live, args=(arguments, token, ended), name=spec.name, daemon=True).start()
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

    def _live(self, arguments: list[str], token: str, ended: Ended) -> None:
        """In a thread that lives as long as the worker: the kernel ends it with the thread that started it."""
        try:
            self._process = process = _spawn(arguments, self._log)
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


def _spawn(arguments: list[str], log: IO[bytes] | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "llamaclust.worker", *arguments],
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
        prepared_dir=variables.prepared_dir if variables.prepared_bytes else None,
        prepared_bytes=variables.prepared_bytes,
        weights_dir=variables.weights_dir if variables.weights_bytes else None,
        weights_bytes=variables.weights_bytes,
    )


def _arguments(spec: WorkerSpec, join: str) -> Iterator[str]:
    options = {
        "--name": spec.name,
        "--join": join,
        "--join-s": _JOIN_S,
        "--token-file": "/dev/stdin",
        "--device": spec.device,
        "--threads": spec.threads,
        "--memory-bytes": spec.memory_bytes,
        "--feature-level": spec.feature_level or None,
        "--prepared-dir": spec.prepared_dir,
        "--prepared-bytes": spec.prepared_bytes if spec.prepared_dir else None,
        "--weights-dir": spec.weights_dir,
        "--weights-bytes": spec.weights_bytes if spec.weights_dir else None,
        "--parent-pid": os.getpid(),
        "--log-format": spec.log_format,
        "--cluster": spec.cluster or None,
    }
    yield "--static"
    for option, value in options.items():
        if value is not None:
            yield from (option, str(value))
