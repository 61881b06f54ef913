from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Condition, Thread

import numpy as np

from llamaclust.kernels.cuda.experts_cache.launches import PoolPlace
from llamaclust.kernels.cuda.experts_cache.table import Copy, ExpertTable
from llamaclust.kernels.cuda.runtime.device import Buffer, Bytes
from llamaclust.kernels.cuda.runtime.gpu_lock import GpuLock

Parts = Callable[[int, int], Sequence[Bytes]]


class ExpertCopies:
    """The thread that copies experts to the cache. Other threads must hold `lock` to use the table."""

    def __init__(
        self, gpu_lock: GpuLock, buffer: Buffer, pools: Sequence[PoolPlace], table: ExpertTable, parts: Parts
    ) -> None:
        self.lock = Condition()
        self.copied_bytes = 0
        self.error: Exception | None = None  # The error that ended the copies.
        self._gpu_lock, self._buffer, self.pools = gpu_lock, buffer, pools
        self._table, self._parts = table, parts
        with gpu_lock.driver_errors():
            self._staging = gpu_lock.device.pinned(max(pool.layout.expert_bytes for pool in pools))
        self._is_closed = self._is_awake = self._is_busy = False
        self._is_abandoned = self._has_ended = False
        self._thread = Thread(target=self._run, name="copy-experts", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        if not self._is_closed and self.error is None:
            self._is_awake = True
            self.lock.notify_all()

    def settle(self, timeout_s: float) -> bool:
        with self.lock:
            return self.lock.wait_for(lambda: not self._is_awake and not self._is_busy, timeout_s)

    def close(self) -> None:
        with self.lock:
            self._end()
        self._thread.join()

    def abandon(self) -> None:
        """Ends the copies without waiting for their thread. Garbage collection may call this on any thread."""
        with self.lock:
            self._end()
            self._is_abandoned = True
            is_free = self._has_ended
        if is_free:
            self._buffer.close()

    def _end(self) -> None:
        self._is_closed, self._is_awake = True, False
        self.lock.notify_all()

    def _run(self) -> None:
        self._copy_all()
        with self.lock:
            self._has_ended = True
            is_free = self._is_abandoned
        if is_free:
            self._buffer.close()

    def _copy_all(self) -> None:
        try:
            while (copy := self._next()) is not None:
                self._bring(copy)
        except Exception as error:  # noqa: BLE001  The thread's outermost function; the next step raises the error.
            with self.lock:
                self.error, self._is_awake, self._is_busy = error, False, False
                self.lock.notify_all()

    def _next(self) -> Copy | None:
        with self.lock:
            while not self._is_closed:
                copy = self._table.next_copy() if self._is_awake else None
                self._is_busy = copy is not None
                if copy is not None:
                    return copy
                self._is_awake = False
                self.lock.notify_all()
                self.lock.wait_for(lambda: self._is_awake or self._is_closed)
            self._is_busy = False
            self.lock.notify_all()
            return None

    def _bring(self, copy: Copy) -> None:
        pool, at = self.pools[copy.pool], 0
        places = pool.layout.places(pool.slots, copy.slot)
        staged: list[tuple[int, Bytes]] = []
        for place, part in zip(places, self._parts(copy.mixture, copy.expert), strict=True):
            staged.append((int(pool.address) - self._buffer.address + place, self._staging[at : at + part.nbytes]))
            np.copyto(staged[-1][1], part)
            at += part.nbytes
        with self._gpu_lock.exclusive():
            event = self._gpu_lock.device.copy_in_background(self._buffer, staged)
        with self._gpu_lock.driver_errors():
            event.synchronize()
        with self.lock:
            self._table.complete()
            self.copied_bytes += at
