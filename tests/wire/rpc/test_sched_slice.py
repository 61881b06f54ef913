"""Threads that hand messages on have short time slices, those that compute usual ones, where the system knows them."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from llamaclust.wire.rpc import sched_slice
from llamaclust.wire.rpc.sched_slice import SHORT_SLICE_NS, short_slices
from support.clusters.real_cluster import real_cluster


def time_slice_ns(thread_id: int = 0) -> int | None:
    """That a thread has requested, 0 being this one; None where that cannot be known, or it is no ordinary thread."""
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


async def test_a_worker_computes_in_usual_slices_and_talks_in_short_ones(tmp_path: Path) -> None:
    async with real_cluster(tmp_path, 1) as cluster:
        pid = cluster.pids["a"]
        threads = [thread.id for thread in psutil.Process(pid).threads()]
        assert time_slice_ns(pid) == time_slice_ns()
        assert SHORT_SLICE_NS in map(time_slice_ns, threads)
