"""Checks that signals are sent only to a cluster's own processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from llamaclust.cluster.state.directory import ClusterRecord
from llamaclust.core.this_machine import start_ticks
from llamaclust.tools.chaos import processes
from llamaclust.tools.chaos.targets import Permissions, find_targets

SLEEP = "import time; time.sleep(60)"


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", SLEEP, *words])
    try:
        end_s = time.monotonic() + 30
        while not psutil.Process(process.pid).cmdline():  # visible only some time after exec
            assert time.monotonic() < end_s
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_process_is_known_by_its_start_time() -> None:
    with started("-m", "llamaclust.worker", "--name", "a") as process:
        found = processes.local_worker({"name": "a", "pid": process.pid}, os.getpid())
        assert found is not None and found.pid == process.pid
        assert not replace(found, start_time=found.start_time - 1).send(signal.SIGKILL)
        assert process.poll() is None
        assert found.send(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
        assert found.send(signal.SIGCONT) and found.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not found.send(signal.SIGKILL)


def test_files_are_limited_until_the_limit_is_lifted() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        found = processes._own_process(parent.pid)
        assert found is not None
        end_s = time.monotonic() + 30
        while not (children := list(found.children())):
            assert time.monotonic() < end_s
        before = found.limit_files(0)
        assert before is not None and found.limit_files(before) == 0
        assert [child.limit_files(before) for child in children] == [before]
        parent.kill()
        assert children[0].send(signal.SIGKILL)
    assert found.limit_files(0) is None


def test_others_are_no_workers() -> None:
    with started("-m", "llamaclust.worker", "--name", "a") as process:
        assert processes.local_worker({"name": "b", "pid": process.pid}, os.getpid()) is None
        assert processes.local_worker({"name": "a", "pid": process.pid}, os.getpid() + 1) is None
        assert processes.joined_worker({"name": "a", "pid": process.pid, "address": "127.0.0.1:1"}) is None
        assert processes.coordinator(process.pid, start_ticks(process.pid) or 0) is None
    with started("something") as process:
        assert processes.local_worker({"name": "a", "pid": process.pid}, os.getpid()) is None
    assert processes.local_worker({"name": "a", "pid": 1}, 0) is None
    assert processes.coordinator(process.pid, 0) is None


def test_a_coordinator_of_another_container_is_not_that_of_its_id_here(tmp_path: Path) -> None:
    """Checks containers that share a state directory: the recorded process id may belong to another cluster here."""
    with started("llamaclust", "up", "theirs.yaml") as process:
        status, ticks = dict[str, Any](workers=[]), start_ticks(process.pid) or 0
        record = ClusterRecord("ours", process.pid, "http://127.0.0.1:1", "m", start_ticks=ticks)
        assert find_targets(record, status, Permissions(), has_standby=False).coordinator is not None
        elsewhere = replace(record, start_ticks=ticks - 1)
        assert find_targets(elsewhere, status, Permissions(), has_standby=False).coordinator is None


def test_a_joined_worker_listens_on_its_port(tmp_path: Path) -> None:
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    script = tmp_path / "llamaclust"
    script.write_text(code)
    words = [sys.executable, str(script), "worker", "--join", "x:1"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        found = processes.joined_worker({"name": "a", "pid": process.pid, "address": f"127.0.0.1:{port}"})
        assert found is not None and found.pid == process.pid
        elsewhere = ("192.0.2.7", "no-such-host.invalid")
        for address in ("/run/worker.sock", f"127.0.0.1:{port + 1}", *(f"{host}:{port}" for host in elsewhere)):
            assert processes.joined_worker({"name": "a", "pid": process.pid, "address": address}) is None
        process.kill()


def test_signals_without_a_handler_are_known() -> None:
    own = processes._own_process(os.getpid())
    assert own is not None
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        assert own.catches(signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        assert not own.catches(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert not replace(own, pid=1 << 30).catches(signal.SIGUSR2)
