"""Tests of time slices: threads that only forward messages have short slices, and computing threads have normal
ones."""

from __future__ import annotations

import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from llamaclust.wire.rpc import sched_slice
from llamaclust.wire.rpc.sched_slice import SHORT_SLICE_NS, short_slices


def time_slice_ns(thread_id: int = 0) -> int | None:
    """Returns the time slice that a thread has requested (0: this thread), or None if it is unknown or the thread is
    not an ordinary one."""
    attributes = sched_slice._attributes(thread_id)
    return None if attributes is None else attributes[5]


def _obeys() -> bool:
    version = platform.release().split(".")
    return time_slice_ns() is not None and (int(version[0]), int(version[1])) >= (6, 12)


pytestmark = pytest.mark.skipif(not _obeys(), reason="time slices of one's own are of Linux 6.12 on x86-64 and aarch64")


def test_threads_inherit_short_slices_and_the_usual_ones_come_back() -> None:
    usual = time_slice_ns()
    with short_slices():
        assert time_slice_ns() == SHORT_SLICE_NS
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(time_slice_ns).result() == SHORT_SLICE_NS
    assert time_slice_ns() == usual != SHORT_SLICE_NS
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(time_slice_ns).result() == usual


_WORKER = """
from llamaclust.wire.rpc import sched_slice
from llamaclust.worker import main
from llamaclust.worker.settings import WorkerSettings

async def show(settings):
    print(sched_slice._attributes(0)[5])
    return 0

main._until_signal = show
main.run_worker(WorkerSettings(name="w"))
"""


def test_a_worker_computes_in_usual_slices_although_its_coordinator_has_short_ones() -> None:
    """Child processes inherit slices."""
    command = [sys.executable, "-c", _WORKER]
    with short_slices():
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) == time_slice_ns() != SHORT_SLICE_NS


_PROGRAM = """
import asyncio, psutil
from llamaclust.wire.rpc import sched_slice
from llamaclust.wire.rpc.client import Peer
from llamaclust.wire.rpc.methods import ECHO
from llamaclust.wire.rpc.link_probe import serve_echo
from llamaclust.wire.rpc.server import Server
from llamaclust.wire.security.credentials import Insecure

async def main():
    with sched_slice.short_slices():
        server = await Server.start("127.0.0.1:0", Insecure(), {ECHO: serve_echo})
        peer = Peer(server.address, Insecure())
    await peer.open(ECHO).opened()
    threads = {thread.id for thread in psutil.Process().threads()} - {psutil.Process().pid}
    print(sched_slice._attributes(0)[5], *{sched_slice._attributes(thread)[5] for thread in threads})
    await peer.close()
    await server.stop(0.0)

asyncio.run(main())
"""


def test_threads_of_grpc_have_short_slices_and_its_caller_the_usual_one() -> None:
    """The test needs its own process, because gRPC creates its threads only once."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    own, *others = map(int, done.stdout.split())
    assert own == time_slice_ns()
    assert SHORT_SLICE_NS in others
