"""Tests how a pipeline ends when one of its streams breaks."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.control.remote.kv_disks import remote_kv_disks
from llamaclust.cluster.control.remote.pipeline import RemotePipeline
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch
from llamaclust.core.errors import WorkerError
from llamaclust.core.limits import GROUP_ID_BYTES, StageLimits
from llamaclust.wire.control.groups import GroupMember, GroupOrder
from llamaclust.wire.control.messages import Load, Loaded, Register
from llamaclust.wire.security.credentials import Insecure
from support.clusters.real_cluster import microbatches


class Stream:
    """A stream whose reads end with the error `read` and writes with `write`; None: they do not end."""

    def __init__(self, read: BaseException | None = None, write: BaseException | None = None) -> None:
        self._ends = {"read": read, "write": write}
        self.cancelled = False
        self.has_message = False

    async def _end(self, which: str) -> None:
        try:
            await asyncio.sleep(0)
            error = self._ends[which]
            if error is not None:
                raise error
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    async def read(self) -> bytes | None:
        await self._end("read")
        return None

    def try_write(self, *_: bytes) -> bool:
        return False

    async def write(self, *_: bytes) -> None:
        await self._end("write")


REGISTER = Register("a", 1, "host", "unix:/a.sock", "cpu", 1, "generic", 1, 1, "nothing")
ORDER = Load(1, "m", "m", 0, 2, StageLimits(8, 8, 8, 64, 8), None)


def _worker(register: Register, order: Load) -> WorkerHandle:
    nothing: Any = None
    worker = WorkerHandle(register, nothing, lambda: "", Insecure())
    worker.stages[1] = order, Loaded(1, 1, 1, 1)
    return worker


def _pipeline(forward: Stream, sample: Stream) -> RemotePipeline:
    worker = _worker(REGISTER, ORDER)
    peer: Any = SimpleNamespace(close=lambda: asyncio.sleep(0))
    ends: Any = (forward, sample, None)
    return RemotePipeline(1, [worker], (peer, peer), *ends)


async def test_nothing_writes_on_after_a_write_that_failed() -> None:
    sample = Stream()
    pipeline = _pipeline(Stream(write=WorkerError("gone")), sample)
    pipeline.submit(ScheduledMicrobatch(*microbatches("m", 1, 1)[0]))
    async with asyncio.timeout(60):
        with pytest.raises(WorkerError, match="gone"):
            await pipeline.run(lambda result: None)
    assert sample.cancelled
    await pipeline.close()


async def test_a_network_that_takes_nothing_ends_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamaclust.cluster.control.remote.pipeline._WRITE_S", 0.02)
    pipeline = _pipeline(Stream(), Stream())
    pipeline.submit(ScheduledMicrobatch(*microbatches("m", 1, 1)[0]))
    async with asyncio.timeout(60):
        with pytest.raises(WorkerError, match=r"sending a microbatch to the first stage took longer than 0\.02 s"):
            await pipeline.run(lambda result: None)
    await pipeline.close()


@pytest.mark.parametrize("error", [RuntimeError("a mistake of ours"), asyncio.CancelledError()], ids=str)
async def test_a_reader_that_ends_otherwise_is_heard_of(error: BaseException) -> None:
    pipeline = _pipeline(Stream(), Stream(read=error))
    async with asyncio.timeout(60):
        with pytest.raises(
            WorkerError, match=r"workers a \[0, 2\) broke: (RuntimeError: a mistake|a stream was cancel)"
        ):
            await pipeline.run(lambda result: None)
    await pipeline.close()


def test_kv_memory_of_a_group_is_not_kept_on_disk(caplog: pytest.LogCaptureFixture) -> None:
    """Files of blocks do not tell which member's part they hold, and after a new plan another member would read it."""
    with_disk = replace(REGISTER, kv_disk_bytes=1 << 20)
    members = GroupMember("a", "unix:/a"), GroupMember("b", "unix:/b")
    group = [GroupOrder(bytes(GROUP_ID_BYTES), members, member) for member in range(2)]
    alone = [_worker(with_disk, ORDER), *(_worker(with_disk, replace(ORDER, group=order)) for order in group)]
    with caplog.at_level(logging.WARNING):
        assert remote_kv_disks(1, alone[:1]) is not None
        assert not caplog.messages
        assert remote_kv_disks(1, alone) is None
    assert caplog.messages == [
        "KV memory is not kept on disk: the plan has a group; give each worker layers of its own"
    ]
