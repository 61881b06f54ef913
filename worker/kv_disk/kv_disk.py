"""Answers the coordinator's requests for KV memory on disk, outside the computing thread."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from weakref import WeakKeyDictionary

from llamaclust.core.disk_cache.files import reason
from llamaclust.core.errors import DeadlineError, DeviceLostError, ProtocolError
from llamaclust.core.process_settings import lower_priority
from llamaclust.wire.control.kv_disk import FindKv, KvDone, RestoreKv, SaveKv, split_keys
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.worker.kv_disk.folder import KvFolder
from llamaclust.worker.kv_disk.stage_blocks import KvTraffic, StageBlocks
from llamaclust.worker.stage.stage_runner import StageRunner

_LOW_PRIORITY = 10

_log = logging.getLogger(__name__)


class KvDisk:
    """One process's KV memory on disk. One thread reads blocks, and another thread with low priority writes blocks."""

    def __init__(self, folder: KvFolder) -> None:
        self.folder = folder
        self.traffic = KvTraffic()
        self._is_reported = False  # True if the log has already reported that the folder cannot be used.
        self._stages: WeakKeyDictionary[StageRunner, StageBlocks] = WeakKeyDictionary()
        self._reader = ThreadPoolExecutor(1, "read-kv")
        self._writer = ThreadPoolExecutor(1, "write-kv", initializer=partial(lower_priority, _LOW_PRIORITY))

    async def answer(self, request: FindKv | RestoreKv | SaveKv, runner: StageRunner) -> KvDone:
        """Finds, restores or saves blocks as requested. Raises ProtocolError if the stage has no such block."""
        thread = self._writer if isinstance(request, SaveKv) else self._reader
        done = await asyncio.get_running_loop().run_in_executor(thread, self._done, request, runner)
        return KvDone(done, request.request_id)

    async def idle(self, deadline_s: float) -> None:
        """Waits until earlier jobs have ended. Raises DeviceLostError if the disk does not answer in time."""
        loop = asyncio.get_running_loop()
        try:
            async with deadline("the end of reading and writing KV memory on disk (kv_disk)", deadline_s):
                await asyncio.gather(*(loop.run_in_executor(each, _nothing) for each in (self._reader, self._writer)))
        except DeadlineError as error:
            raise DeviceLostError(f"{error}, so this worker process ends") from error

    def _done(self, request: FindKv | RestoreKv | SaveKv, runner: StageRunner) -> int:
        keys, kv, blocks = split_keys(request.keys), runner.kv_layers, self._blocks_of(runner)
        if blocks is None:
            return 0
        if isinstance(request, FindKv):
            return blocks.find(keys, kv)
        _check(request.blocks, runner.limits.kv_blocks)
        if isinstance(request, RestoreKv):
            return blocks.restore(keys, request.blocks, kv)
        return blocks.save(keys, request.blocks, kv)

    def _blocks_of(self, runner: StageRunner) -> StageBlocks | None:
        if runner.kv_content is None:
            return None
        if (known := self._stages.get(runner)) is None:
            try:
                self.folder.create()
            except OSError as error:
                if not self._is_reported:
                    _log.warning("KV memory is not kept on disk: %s", reason(error))
                self._is_reported = True
                return None
            self._is_reported = False
            known = self._stages.setdefault(
                runner, StageBlocks(self.folder, runner.kv_content, runner.program.start, self.traffic)
            )
        return known


def _check(blocks: tuple[int, ...], count: int) -> None:
    if max(blocks) >= count:
        raise ProtocolError(f"KV block {max(blocks)} does not exist: this stage has {count} KV blocks")


def _nothing() -> None:
    """Does nothing. When this job ends, all earlier jobs have ended."""
