"""Tests of the command as the first process of a container, in a PID namespace."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

UNSHARE = shutil.which("unshare")
FIRST = """
import os, signal, subprocess, sys, time
from llamaclust.core.init_process import adopt_orphans
adopt_orphans()
"""
pytestmark = pytest.mark.skipif(os.geteuid() != 0 or UNSHARE is None, reason="PID namespaces need root and unshare")


@contextmanager
def first_process(program: str, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Runs Python code as the first process of a PID namespace with its own /proc."""
    command = [str(UNSHARE), "--pid", "--fork", "--mount-proc", *more, sys.executable, "-c", FIRST + program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def first_of(process: subprocess.Popen[str]) -> int:
    """Returns the host's id of the first process."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


ORPHANS = """
for _ in range({count}):
    if os.fork() == 0:  # This process loses its own child, which then belongs to PID 1.
        if os.fork() == 0:
            time.sleep(0.01)
        os._exit(0)
    os.wait()
def states():
    found = {{}}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{{name}}/stat") as stat:
                found[int(name)] = stat.read().rpartition(")")[2].split()[0]
        except OSError:
            pass
    return found
while set(states()) != {{1, os.getpid()}}:
    time.sleep(0.01)
print(os.getpid() != 1, os.getppid(), flush=True)
"""


@pytest.mark.parametrize("count", [1, 5, 40])
def test_orphans_are_reaped(count: int) -> None:
    with first_process(ORPHANS.format(count=count)) as process:
        assert process.communicate(timeout=60)[0] == "True 1\n" and process.returncode == 0


@pytest.mark.parametrize(
    ("program", "code"),
    [("sys.exit(0)", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137), ("os.abort()", 134)],
)
def test_the_exit_code_is_passed_on(program: str, code: int) -> None:
    with first_process(program) as process:
        assert process.wait(60) == code


WAITING = """
for number in {numbers}:
    signal.signal(number, lambda number, _: (print(number, flush=True), number == signal.SIGTERM and os._exit(7)))
print("ready", flush=True)
while True:
    signal.pause()
"""


def test_signals_are_passed_on_once() -> None:
    numbers: Sequence[int] = [signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM]
    with first_process(WAITING.format(numbers=[*map(int, numbers)])) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        first = first_of(process)
        for number in numbers:
            os.kill(first, number)
            assert process.stdout.readline() == f"{int(number)}\n"
        assert process.wait(60) == 7 and process.stdout.read() == ""


def test_the_command_itself_runs_below_the_init_process() -> None:
    command = [str(UNSHARE), "--pid", "--fork", "--mount-proc", sys.executable, "-m", "llamaclust", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and shown.stdout.strip() and not shown.stderr
