"""Runs a worker as a child process of a Ray actor or MPI rank. The worker enrols and joins like a static worker."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import IO

from llamaclust.cluster.launchers.worker_process import worker_command, worker_environment, worker_input
from llamaclust.cluster.launchers.worker_settings import with_caches
from llamaclust.worker.settings import WorkerSettings

_JOIN_S = 15.0

Ended = Callable[[int], None]
"""A callback with the process's return code. A negative code is a signal, as in `subprocess`."""


class Child:
    """A worker process. The kernel ends it when this process ends."""

    def __init__(self, settings: WorkerSettings, ended: Ended, log: IO[bytes] | None = None) -> None:
        """Starts the worker. `settings` must have an enrolment address and a join token. `ended` is called on another
        thread. If `log` is None, the worker writes to the output of this process."""
        self._started = threading.Event()
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        own = replace(with_caches(settings), static=True, join_s=_JOIN_S)
        threading.Thread(target=self._live, args=(own, ended), name=own.name, daemon=True).start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _live(self, settings: WorkerSettings, ended: Ended) -> None:
        """Starts the worker and waits for its end. The kernel ends a worker when the thread that started it ends."""
        try:
            self._process = process = subprocess.Popen(
                worker_command(settings),
                # The settings contain the token. They are sent through a pipe, so that the token is on no command line,
                # in no environment and on no disk.
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                env=worker_environment(os.environ),
                start_new_session=True,
            )
        except OSError as error:
            self._error = error
            return
        finally:
            self._started.set()
        assert process.stdin is not None
        try:
            process.stdin.write(worker_input(settings))
            process.stdin.close()
        except BrokenPipeError:
            pass  # The worker has ended, and `wait` below returns its exit code.
        ended(process.wait())
