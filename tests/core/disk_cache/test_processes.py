"""Tests that several processes share a disk cache of each kind and see only complete files."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from llamaclust.core.disk_cache import files
from llamaclust.core.disk_cache.files import BusyError, StoppedError, Writing
from support.disk_caches import BYTES, Make, User, data, main_file, there, unfinished
from support.paths import TESTS

pytestmark = pytest.mark.timeout(120)

HAMMER = """
import os, sys, time
from pathlib import Path
sys.path[:0] = {path!r}
from support.disk_caches import BYTES, USERS, data
user = USERS[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
type(user.cache).free_bytes = 0
user.cache.create()
n_bytes = int(sys.argv[5])
print("ready", flush=True)
sys.stdin.readline()
found = 0
for turn in range(int(sys.argv[4])):
    number = turn % 5
    if (there := user.get(number, n_bytes)) is None:
        user.put(number, n_bytes)
    else:
        assert there == data(number, n_bytes)
        found += 1
print(found)
"""


def start(kind: str, user: User, turns: int, n_bytes: int = BYTES) -> subprocess.Popen[str]:
    code = HAMMER.format(path=[str(TESTS)])
    given = [kind, str(user.cache.path), str(user.cache.most_bytes), str(turns), str(n_bytes)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("room", [None, 3], ids=["all fit", "some fit"])
def test_processes_that_write_the_same_files_at_once(make: Make, kind: str, room: int | None) -> None:
    user = make(room=room)
    processes = [start(kind, user, 100) for _ in range(3)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    found = [int(process.communicate(timeout=100)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert unfinished(user) == [] and user.cache.used_bytes <= user.cache.most_bytes
    if room is None:
        assert there(user, range(5)) == [*range(5)] and sum(found) >= 3 * 95
    else:
        assert 0 < len(there(user, range(5))) <= 3


def stopped(process: subprocess.Popen[str]) -> bool:
    """Stops the process with SIGSTOP. Returns False if it has ended."""
    process.send_signal(signal.SIGSTOP)
    if process.returncode is not None:  # `send_signal` has reaped the process.
        return False
    how = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    return how is not None and how.si_code == os.CLD_STOPPED


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_half_written(make: Make, kind: str) -> None:
    n_bytes, killed = 24 << 20, 0
    for attempt in range(4):
        user = make()
        process = start(kind, user, 5, n_bytes)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        while stopped(process) and sum(path.stat().st_size for path in unfinished(user)) <= attempt * n_bytes // 4:
            process.send_signal(signal.SIGCONT)
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL and bool(unfinished(user))
        for number in range(5):
            assert user.get(number, n_bytes) in (None, data(number, n_bytes))
        user.put(7)
        assert unfinished(user) == [] and user.get(7) == data(7)
        user.cache.clear()
    assert killed > 0


def test_readers_see_whole_files_or_none_while_others_delete(make: Make) -> None:
    user, ends, found = make(room=2), threading.Event(), 0

    def write() -> None:
        try:
            writer = make(room=2)
            for turn in range(60):
                writer.put(turn % 4)
        finally:
            ends.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not ends.is_set():
        for number in range(4):
            there = user.get(number)
            assert there in (None, data(number))
            found += there is not None
    thread.join()
    assert found > 0


def test_maps_and_open_files_outlive_what_they_are_of(make: Make) -> None:
    user = make(room=1)
    user.put(1)
    path = main_file(user)
    whole = path.read_bytes()
    opened = user.cache.open(path.name)
    assert opened is not None
    with opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        user.put(2)
        assert not path.exists()
        assert opened.read() == mapped[:] == whole
        user.cache.clear()
        assert mapped[:] == whole


def test_nobody_waits_long_for_the_lock(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LOCK_WAIT_S", 0.1)
    user, name = make(), "x.tmp"
    user.put(1)
    (user.cache.path / name).touch()
    with (user.cache.path / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match=r"another process has written there for 0\.1 s; try again later"):
            user.cache.write(f"x{user.suffix}", [b"x"])
        with pytest.raises(BusyError):
            user.cache.clear()
        assert user.get(1) == data(1), "readers do not wait"
        assert (user.cache.path / name).exists(), "it may be what the other one writes"
        monkeypatch.setattr(files, "_LOCK_WAIT_S", 60.0)
        stopped = Writing()
        stopped.is_stopped = True
        with pytest.raises(StoppedError):
            user.cache.write(f"x{user.suffix}", [b"x"], writing=stopped)
    user.put(2)
    assert unfinished(user) == [] and there(user, range(3)) == [1, 2]


def test_a_stopped_write_leaves_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    user, writing = make(), Writing()
    write = files._write_all

    def stop_then_write(descriptor: int, some: memoryview) -> None:
        assert writing.unfinished in unfinished(user)
        writing.is_stopped = True
        write(descriptor, some)

    monkeypatch.setattr(files, "_write_all", stop_then_write)
    with pytest.raises(StoppedError):
        user.cache.write(f"x{user.suffix}", [bytes(3 << 20)], writing=writing)
    assert user.cache.files() == [] == unfinished(user) and writing.unfinished is None
