"""Runs the command below a minimal init process if the command is the first process of a container."""

from __future__ import annotations

import os
import signal
from typing import Final

_SENT_BY_PROCESSES: Final = 0
"""Signals that processes send have `si_code` values up to this one. A terminal signals the child process itself."""
_ABOUT_THIS_PROCESS: Final = frozenset({signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})


def adopt_orphans() -> None:
    """Continues in a child process if this process has the id 1. The parent forwards signals to the child, reaps the
    processes that lose their own parent, and ends with the child's exit code."""
    if os.getpid() != 1:
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    while True:
        info = signal.sigwaitinfo(signal.valid_signals() - _ABOUT_THIS_PROCESS)
        if info.si_signo == signal.SIGCHLD:
            _reap(child)
        elif info.si_code <= _SENT_BY_PROCESSES:
            os.kill(child, info.si_signo)


def _reap(child: int) -> None:
    """Reaps all processes that have ended. If `child` has, ends this process in the same way."""
    while True:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
        if process == 0:
            return
