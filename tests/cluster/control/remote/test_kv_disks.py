"""Tests of requests to the disks of workers that do not answer in time."""

from __future__ import annotations

import pytest

from llamaclust.cluster.control.remote.kv_disks import RemoteKvDisks
from llamaclust.core.errors import DeadlineError, LlamaclustError, WorkerError
from support.wire.worker_handles import handle_of

KEYS, BLOCKS = [bytes(32), bytes([1] * 32)], [4, 5]


@pytest.mark.parametrize(("work", "kind"), [("find", WorkerError), ("restore", DeadlineError), ("save", DeadlineError)])
async def test_only_late_transfers_may_still_use_kv_memory(
    work: str, kind: type[LlamaclustError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine ends the pipeline after a DeadlineError."""
    monkeypatch.setattr("llamaclust.cluster.control.remote.kv_disks._DISK_S", 0.01)
    disks = RemoteKvDisks(1, [handle_of("a")])
    arguments = (KEYS,) if work == "find" else (KEYS, BLOCKS)
    with pytest.raises(
        kind, match=r"^worker a: .* KV blocks on its disk \(kv_disk\) took longer than 0\.01 s$"
    ) as late:
        await getattr(disks, work)(*arguments)
    assert type(late.value) is kind and late.value.worker == "a"
