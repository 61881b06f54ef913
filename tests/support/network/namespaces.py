"""Network namespaces of tests: their names identify the process that owns them, and they are removed when it ends.

    python namespaces.py PREFIX

waits until its standard input ends, because its owner has ended in any way, and then removes what is left.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

NAMESPACES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_NAME = re.compile(r"lcbox-(\d+)-(\d+)-\d+-\w+")
_serial = count(1)


class BoxError(Exception):
    """An error of a network in a box, described in a line."""


def run(*command: str, text: str | None = None) -> str:
    """Runs a command and returns its standard output; raises with its message if it fails."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30.0, check=False)
    if done.returncode != 0:
        raise BoxError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def new_prefix() -> str:
    """Returns the prefix of a box's names: the owner's pid, its start time, since pids are reused, and a number."""
    return f"lcbox-{os.getpid()}-{_started(os.getpid())}-{next(_serial)}-"


def _started(pid: int) -> int:
    """Returns the start time of a process in clock ticks since boot; 0 if there is no such process."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(after_name.split()[19])


def named(prefix: str) -> list[str]:
    return [path.name for path in NAMESPACES.glob(f"{prefix}*")]


def stale() -> list[str]:
    """Returns the namespaces of boxes whose owner has ended."""
    found = [(name, _NAME.fullmatch(name)) for name in named("lcbox-")]
    return [name for name, owner in found if owner is not None and _started(int(owner[1])) != int(owner[2])]


def remove(names: Iterable[str]) -> None:
    """Kills all processes in the namespaces and removes the namespaces; ignores those already removed."""
    for name in names:
        while pids := _pids(name):  # again, since a process may have started another one
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        with suppress(BoxError):
            run("ip", "netns", "delete", name)


def _pids(namespace: str) -> list[int]:
    with suppress(BoxError):
        return [int(pid) for pid in run("ip", "netns", "pids", namespace).split()]
    return []


def inside(namespace: str, function: Callable[[], T]) -> T:
    """Runs a function in a thread in the namespace and returns its result; its sockets remain in the namespace."""
    results: list[T] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            enter(namespace)
            results.append(function())
        except BaseException as error:  # noqa: BLE001  raised again in the thread that asked
            failures.append(error)

    thread = threading.Thread(target=work, name=namespace)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def enter(namespace: str) -> None:
    """Moves this thread, and threads that it starts later, into the namespace."""
    _enter(NAMESPACES / namespace)


@contextmanager
def entered(namespace: str) -> Iterator[None]:
    """Moves this thread into the namespace within the context; threads that it starts there remain. `remove` kills a
    process whose main thread is in the namespace."""
    with Path("/proc/thread-self/ns/net").open("rb") as before:
        enter(namespace)
        try:
            yield
        finally:
            _enter(Path(f"/proc/self/fd/{before.fileno()}"))


def _enter(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns into {path}")
    finally:
        os.close(descriptor)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # signals are for the owner; this process ends after it
    sys.stdin.read()
    remove(named(sys.argv[1]))


if __name__ == "__main__":
    main()
