"""Runs a command whose processes end at a time limit, at a signal, or when this process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

OUT_OF_TIME = 124
GRACE_S, _POLL_S = 5.0, 0.05
_WITH_GUARD = '{ read -r _; kill -KILL 0; } <&0 & exec bash -c "$0" </dev/null'
"""Kills all processes of the command when standard input ends, as it does when the process that holds it is killed."""
_UNBLOCKED = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_SETMASK, ())
os.execvp("bash", ["bash", "-c", *sys.argv[1:]])
"""
"""Runs a command without blocked signals. `preexec_fn` would run gRPC's fork handlers, which can abort the child."""


def run_script(script: str, folder: Path, log: Path, limit_s: float, variables: Mapping[str, str]) -> int:
    """Returns the exit status, or OUT_OF_TIME if the limit was reached."""
    with log.open("w") as file:
        _signals(signal.SIG_BLOCK)  # A signal during Popen would leave a process that nobody ends.
        try:
            process = subprocess.Popen(
                [sys.executable, "-ISc", _UNBLOCKED, _WITH_GUARD, script],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                cwd=folder,
                env={**os.environ, **variables},
                process_group=0,
            )
            assert process.stdin is not None
            with process.stdin:
                try:
                    _signals(signal.SIG_UNBLOCK)
                    return process.wait(limit_s)
                except subprocess.TimeoutExpired:
                    return OUT_OF_TIME
                finally:
                    if process.poll() is None:
                        _end(process)
        finally:
            _signals(signal.SIG_UNBLOCK)


def _signals(how: int) -> None:
    signal.pthread_sigmask(how, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends all processes of a command with SIGTERM and, after some seconds or at another Ctrl-C, with SIGKILL."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        end_s = time.monotonic() + GRACE_S
        while _is_running(process.pid) and time.monotonic() < end_s:
            time.sleep(_POLL_S)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # The first process is not reaped yet, so no other process has this id.
        process.wait()


def _is_running(group: int) -> bool:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # The process has ended meanwhile.
            state, _, its_group = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False
