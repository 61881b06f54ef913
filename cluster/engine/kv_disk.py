"""Saves KV blocks of prompts to disk, and restores them before a prompt is computed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from collections.abc import Sequence as Items
from time import monotonic
from typing import TYPE_CHECKING

from llamaclust.cluster.engine.pipeline import KvDisks
from llamaclust.cluster.scheduler.kv.memory import RESERVE_BLOCKS
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.core.errors import DeadlineError, LlamaclustError
from llamaclust.model.program import KV_BLOCK_TOKENS

if TYPE_CHECKING:
    from llamaclust.cluster.engine.lane import Lane

_log = logging.getLogger(__name__)

_LEAST_BLOCKS = 8
"""Minimum number of blocks to restore. Computing fewer blocks takes about the same time."""
_MOST_BLOCKS = 4096
"""Maximum number of blocks of a prompt to save or restore. It must not exceed wire.control.kv_disk.MAX_KEYS."""
_RESTORED_TOGETHER = 128
"""Number of blocks that each stage reads within one deadline."""
_RESTORE_S = 60.0
"""Time after which no further blocks of a prompt are read. It includes the wait for other prompts."""
_SAVED_TOGETHER = 32
"""Number of blocks that each stage writes into one file. The blocks stay allocated until they are written."""
_MOST_SAVES = 8
"""Maximum number of prompts that wait to be saved. Further prompts are not saved."""


class KvDisk:
    """Saves KV blocks of a pipeline's prompts to disk, and restores them. Does nothing if `disks` is None."""

    def __init__(
        self, disks: KvDisks | None, scheduler: Scheduler, lane: Lane, count_restored: Callable[[int], None]
    ) -> None:
        """Calls `count_restored` with the number of tokens after each restore."""
        settings = scheduler.settings
        self._disks = disks if settings.prefix_cache and settings.window is None else None
        self._scheduler = scheduler
        self._transfers = scheduler.queues.memory.transfers
        self._lane = lane
        self._count_restored = count_restored
        self._tasks: set[asyncio.Task[None]] = set()
        # Pairs of a microbatch number and a future that ends when this microbatch has returned.
        self._returns: list[tuple[int, asyncio.Future[None]]] = []
        self._saves: asyncio.Queue[list[bytes]] = asyncio.Queue(_MOST_SAVES)
        self._reading = asyncio.Lock()
        self._is_running = False

    def start(self) -> None:
        if self._disks is not None:
            self._is_running = True
            self._begin(self._save_prompts(self._disks))
            for sequence in self._scheduler.sequences:
                self.arrived(sequence)

    def stop(self) -> None:
        self._is_running = False
        for task in self._tasks:
            task.cancel()
        for sequence in tuple(self._scheduler.queues.restoring):
            self._scheduler.queues.end_restore(sequence)

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def arrived(self, sequence: Sequence) -> None:
        if self._disks is None or not self._is_running or self._scheduler.strikes.isolated is not None:
            return
        is_ready = sequence in self._scheduler.queues.waiting
        if is_ready and len(self._transfers.missing(sequence)) >= _LEAST_BLOCKS:
            self._scheduler.queues.begin_restore(sequence)
            self._begin(self._restore_prompt(self._disks, sequence))

    def completed(self, number: int, sequences: Iterable[Sequence]) -> None:
        if not self._is_running:
            return
        for awaited, returned in self._returns:
            if awaited <= number and not returned.done():
                returned.set_result(None)
        self._returns = [entry for entry in self._returns if not entry[1].done()]
        for sequence in sequences:
            keys = sequence.kv.keys[: min(sequence.prompt_length // KV_BLOCK_TOKENS, _MOST_BLOCKS)]
            if sequence.generated == 1 and len(keys) >= _LEAST_BLOCKS and not self._saves.full():
                self._saves.put_nowait(keys)

    # -- read ------------------------------------------------------------------------------------------------------

    async def _restore_prompt(self, disks: KvDisks, sequence: Sequence) -> None:
        try:
            await self._restore(disks, sequence)
        except LlamaclustError as error:
            self._failed(error)
        finally:
            if self._is_running:
                self._scheduler.queues.end_restore(sequence)
                self._lane.launch_soon()

    async def _restore(self, disks: KvDisks, sequence: Sequence) -> None:
        missing = self._transfers.missing(sequence)[:_MOST_BLOCKS]
        if len(missing) < _LEAST_BLOCKS:  # Others have computed blocks since `arrived`.
            return
        count = await disks.find(sequence.kv.keys[missing.start : missing.stop])
        if count < _LEAST_BLOCKS:
            return
        end_s = monotonic() + _RESTORE_S
        try:
            # Prompts are restored one after another, because several prompts may begin with the same blocks.
            async with asyncio.timeout(_RESTORE_S):
                await self._reading.acquire()
        except TimeoutError:
            return
        try:
            if sequence not in self._scheduler.queues.restoring:
                return
            # Some blocks before these may have left the cache, so more are missing than were looked for.
            end = min(missing.start + count, self._transfers.missing(sequence).start + _MOST_BLOCKS)
            await self._restore_until(disks, sequence, end, end_s)
        finally:
            self._reading.release()

    async def _restore_until(self, disks: KvDisks, sequence: Sequence, end: int, end_s: float) -> None:
        reserve = RESERVE_BLOCKS * len(self._scheduler.queues.running)
        transfer = self._transfers.begin_restore(sequence, end, reserve)
        if transfer is None:
            return
        restored, keys, blocks = 0, transfer.keys[transfer.found :], transfer.blocks[transfer.found :]
        try:
            await self._in_flight_returned()
            for start in range(0, len(blocks), _RESTORED_TOGETHER):
                is_awaited = sequence in self._scheduler.queues.restoring and monotonic() < end_s
                if restored < start or not is_awaited:
                    break
                piece = slice(start, start + _RESTORED_TOGETHER)
                restored += await disks.restore(keys[piece], blocks[piece])
        finally:
            self._transfers.end(transfer, restored)
            if self._is_running:
                self._count_restored(restored * KV_BLOCK_TOKENS)

    async def _in_flight_returned(self) -> None:
        newest = self._scheduler.in_flight.newest
        if newest is not None:
            returned: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._returns.append((newest, returned))
            await returned

    def _failed(self, error: LlamaclustError) -> None:
        _log.warning("KV blocks could not be saved to disk or restored: %s", error)
        if isinstance(error, DeadlineError):
            self._lane.disk_hangs(error)

    # -- write -----------------------------------------------------------------------------------------------------

    async def _save_prompts(self, disks: KvDisks) -> None:
        while True:
            keys = await self._saves.get()
            try:
                await self._save(disks, keys)
            except LlamaclustError as error:
                self._failed(error)
            finally:
                self._saves.task_done()

    async def _save(self, disks: KvDisks, keys: Items[bytes]) -> None:
        start = await disks.find(keys)
        while start < len(keys) and self._scheduler.strikes.isolated is None:
            saved = await self._saved(disks, keys[: start + _SAVED_TOGETHER], start)
            if not saved:
                return
            start += saved

    async def _saved(self, disks: KvDisks, keys: Items[bytes], start: int) -> int:
        """Saves the cached blocks of keys[start:]. Returns their number, or 0 if a stage did not save all of them."""
        transfer = self._transfers.begin_save(keys, start)
        if transfer is None:
            return 0
        saved = 0
        try:
            await self._in_flight_returned()
            if self._transfers.are_shared(transfer):
                saved = await disks.save(transfer.keys, transfer.blocks)
        finally:
            self._transfers.end(transfer)
            self._lane.launch_soon()
        return saved if saved == len(transfer.blocks) else 0
