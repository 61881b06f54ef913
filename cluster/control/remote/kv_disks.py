from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.core.errors import DeadlineError, WorkerError
from llamaclust.wire.control.kv_disk import FindKv, KvDone, RestoreKv, SaveKv, joined
from llamaclust.wire.rpc.deadlines import deadline

_log = logging.getLogger(__name__)

_DISK_S = 60.0
"""Maximum seconds for reading or writing KV blocks on a worker's disk."""


class RemoteKvDisks:
    """Implements `KvDisks` for a pipeline's workers. A block is usable only if it is on the disks of all workers."""

    def __init__(self, epoch: int, workers: Sequence[WorkerHandle]) -> None:
        self._epoch = epoch
        self._workers = tuple(workers)

    async def find(self, keys: Sequence[bytes]) -> int:
        try:
            return await self._least(FindKv(self._epoch, joined(keys)), len(keys))
        except DeadlineError as late:  # The worker reads no KV memory, so the pipeline need not end.
            raise WorkerError(str(late), worker=late.worker) from late

    async def restore(self, keys: Sequence[bytes], blocks: Sequence[int]) -> int:
        return await self._least(RestoreKv(self._epoch, joined(keys), tuple(blocks)), len(blocks))

    async def save(self, keys: Sequence[bytes], blocks: Sequence[int]) -> int:
        return await self._least(SaveKv(self._epoch, joined(keys), tuple(blocks)), len(blocks))

    async def _least(self, request: FindKv | RestoreKv | SaveKv, most: int) -> int:
        """Sends the request to all workers, and returns the smallest number of blocks in their answers."""

        async def done(worker: WorkerHandle) -> int:
            what = f"worker {worker.name}: reading or writing KV blocks on its disk (kv_disk)"
            limit = deadline(what, _DISK_S, worker.name)
            answer: KvDone = await worker.channel.request(request, limit)
            return answer.blocks

        answers = await asyncio.gather(*map(done, self._workers), return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        for error in sorted(errors, key=lambda error: not isinstance(error, DeadlineError)):
            raise error
        return min(most, *(answer for answer in answers if isinstance(answer, int)))


def remote_kv_disks(epoch: int, workers: Sequence[WorkerHandle]) -> RemoteKvDisks | None:
    without = [worker.name for worker in workers if not worker.registration.kv_disk_bytes]
    if not without and any(worker.stages[epoch][0].group is not None for worker in workers):
        _log.warning("KV memory is not kept on disk: the plan has a group; give each worker layers of its own")
    elif not without:
        return RemoteKvDisks(epoch, workers)
    elif len(without) < len(workers):
        _log.warning("KV memory is not kept on disk: no kv_disk on worker %s", ", ".join(without))
    return None
