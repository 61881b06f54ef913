"""A cache of experts on a GPU, which computes them in small microbatches. The CPU computes the other experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from weakref import finalize

import numpy as np

from llamaclust.kernels.backend import Batch, CacheCounts, ExpertsStage, Float32, Int32
from llamaclust.kernels.cuda.executor.stage import LaunchCache
from llamaclust.kernels.cuda.experts_cache.copies import ExpertCopies
from llamaclust.kernels.cuda.experts_cache.launches import CachePlan
from llamaclust.kernels.cuda.experts_cache.table import ExpertTable
from llamaclust.kernels.cuda.runtime.device import Buffer
from llamaclust.kernels.cuda.runtime.gpu_lock import GpuLock


class CudaExpertsCache:
    def __init__(
        self,
        gpu_lock: GpuLock,
        plan: CachePlan,
        buffer: Buffer,
        copies: ExpertCopies,
        table: ExpertTable,
        experts: ExpertsStage,
        graphs: bool,
    ) -> None:
        """`plan` must be bound to `buffer`, which is freed with the cache."""
        finalize(self, copies.abandon)
        self._gpu_lock, self._plan, self._buffer = gpu_lock, plan, buffer
        self._copies, self._table, self._experts = copies, table, experts
        self._launches = LaunchCache(gpu_lock.device, plan, graphs)
        # Segments for the current step, by number of rows.
        self._segments: dict[int, Sequence[Callable[[], None]]] = {}
        self._running = Lock()
        self._is_closed = False
        self.n_bytes = buffer.n_bytes
        with gpu_lock.driver_errors():
            self._inputs = gpu_lock.device.pinned(plan.inputs.offsets[-1])
            self._brought = gpu_lock.device.pinned(plan.inputs.lines * plan.line_bytes)

    @property
    def counts(self) -> CacheCounts:
        with self._copies.lock:
            table, pools = self._table, self._copies.pools
            held = zip(pools, table.held, strict=True)
            used_bytes = 0 if self._is_closed else sum(pool.layout.expert_bytes * count for pool, count in held)
            return CacheCounts(table.hits, table.misses, self._copies.copied_bytes, used_bytes)

    @contextmanager
    def step(self) -> Iterator[None]:
        with self._running:
            if self._copies.error is not None:
                raise self._copies.error
            try:
                yield
            finally:
                self._segments = {}
                with self._copies.lock:
                    self._table.end_step()
                    self._copies.wake()

    def run_mixture(self, number: int, batch: Batch, x: Float32) -> Float32 | None:
        if self._is_closed or len(x) > self._plan.rows:
            return self._experts.run_mixture(number, batch, x)
        chosen, weights = self._experts.route(number, x)
        with self._copies.lock:
            slots = self._table.use(number, chosen)
        if (slots < 0).all():
            return self._experts.run_mixture(number, batch, x)
        self._compute(number, x, chosen, weights, slots)
        return None

    def _compute(self, number: int, x: Float32, chosen: Int32, weights: Float32, slots: Int32) -> None:
        """Computes a mixture. The stage must have waited for the GPU, because pinned memory is overwritten."""
        plan, device = self._plan, self._gpu_lock.device
        plan.inputs.fill(self._inputs, weights, slots, plan.piece(number, plan.shape(len(x))))
        with self._gpu_lock.exclusive():
            products, sums = self._of_mixture(number, len(x))
            device.copy_in(self._buffer, plan.inputs_offset, self._inputs)
            products()
        missing = np.flatnonzero(slots.reshape(-1) < 0)
        brought = self._brought[: len(missing) * plan.line_bytes]
        if len(missing):
            inputs = x[missing // plan.used, : plan.mixtures[number].x.width]
            lines = self._experts.run_lines(number, inputs, chosen.reshape(-1)[missing])
            np.copyto(brought.view(np.float32).reshape(lines.shape), lines)
        with self._gpu_lock.exclusive():
            if len(missing):
                device.copy_in(self._buffer, plan.brought_offset, brought)
            sums()

    def _of_mixture(self, number: int, rows: int) -> Sequence[Callable[[], None]]:
        if rows not in self._segments:
            self._segments[rows] = self._launches.segments(self._plan.shape(rows))
        return self._segments[rows][2 * number : 2 * number + 2]

    def settle(self, timeout_s: float) -> bool:
        return self._copies.settle(timeout_s)

    def close(self) -> None:
        with self._running:
            if self._is_closed:
                return
            self._is_closed, self.n_bytes = True, 0
            self._copies.close()
            with self._gpu_lock.exclusive():
                self._launches.close()
                self._buffer.close()
