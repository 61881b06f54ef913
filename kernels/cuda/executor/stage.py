"""A loaded program on a GPU. It runs microbatches as launches or as captured graphs, with host steps between them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.kernels.backend import Batch, Experts, Float32, Int32, RankedLogits, kv_bytes
from llamaclust.kernels.cuda.executor.gathers import gather_rows
from llamaclust.kernels.cuda.executor.host_steps import HostStep
from llamaclust.kernels.cuda.executor.plan import Plan
from llamaclust.kernels.cuda.executor.shapes import Shape
from llamaclust.kernels.cuda.launches.sampling import record_words, sums_of_row
from llamaclust.kernels.cuda.runtime.device import Buffer, Bytes, Device, Graph, Launch
from llamaclust.kernels.cuda.runtime.gpu_lock import GpuLock
from llamaclust.model.program import Exchange, Gather, GivenRows

if TYPE_CHECKING:
    from llamaclust.kernels._native import Gatherer
    from llamaclust.kernels.cuda.device_weights import LayerMemory

_log = logging.getLogger(__name__)

_FLOAT = 4
_MAX_SHAPES = 64
"""The maximum number of shapes that are kept. Graphs take driver memory, and launches take host memory."""
_LEAST_SHAPES = 4
"""The minimum number of shapes that are kept. Four are enough for prompts and for decode of a few sequences."""


class SegmentPlan(Protocol):
    @property
    def host_steps(self) -> Sequence[object]: ...

    def segments(self, shape: Shape) -> tuple[tuple[Launch, ...], ...]: ...


class LaunchCache:
    """Keeps the launches of recent shapes. When a shape is used again, its launches are captured as CUDA graphs."""

    def __init__(self, device: Device, plan: SegmentPlan, graphs: bool) -> None:
        self._device = device
        self._plan = plan
        self._captures = graphs
        self._graphs: dict[Shape, tuple[Graph, ...]] = {}  # The most recently used shape is last.
        # Shapes without graphs. The most recently used shape is last.
        self._launches: dict[Shape, tuple[tuple[Launch, ...], ...]] = {}
        self._most = max(min(_MAX_SHAPES, _LEAST_SHAPES), _MAX_SHAPES // (1 + len(plan.host_steps)))

    def segments(self, shape: Shape) -> Sequence[Callable[[], None]]:
        graphs, launches = self._graphs.pop(shape, None), self._launches.pop(shape, None)
        if launches is not None and self._captures:
            graphs = self._captured(launches)
        if graphs is not None:
            if len(self._graphs) == self._most:
                _close(self._graphs.pop(next(iter(self._graphs))))
            self._graphs[shape] = graphs
            return [graph.launch for graph in graphs]
        if len(self._launches) == self._most:
            del self._launches[next(iter(self._launches))]
        self._launches[shape] = launches or self._plan.segments(shape)
        return [partial(self._launch, segment) for segment in self._launches[shape]]

    def _captured(self, launches: Iterable[Sequence[Launch]]) -> tuple[Graph, ...] | None:
        """Returns the launches as graphs, or None if the GPU lacks memory. After None, no more graphs are captured."""
        graphs: list[Graph] = []
        try:
            for segment in launches:
                graphs.append(self._device.capture(partial(self._launch, segment)))
        except InsufficientMemoryError as error:
            _log.warning("%s: kernels are launched one by one, which is slower", error)
            _close(graphs)
            self._captures = False
            return None
        return tuple(graphs)

    def _launch(self, launches: Sequence[Launch]) -> None:
        for launch in launches:
            self._device.launch(launch)

    def close(self) -> None:
        for graphs in self._graphs.values():
            _close(graphs)
        self._graphs, self._launches = {}, {}


def _close(graphs: Iterable[Graph]) -> None:
    for graph in graphs:
        graph.close()


class CudaStage:
    """Implements `kernels.backend.Stage`. Raises ValueError for a batch that exceeds the limits."""

    def __init__(
        self, gpu_lock: GpuLock, plan: Plan, weights: Sequence[LayerMemory], kv: Buffer, buffers: Buffer, graphs: bool
    ) -> None:
        """`plan` must be bound to `kv` and `buffers`, which are freed with the stage."""
        for buffer in (kv, buffers):
            finalize(self, buffer.close)
        self._gpu_lock = gpu_lock
        self._plan = plan
        self._kv, self._buffers = kv, buffers
        self._launches = LaunchCache(gpu_lock.device, plan, graphs)
        self._inputs, self._hidden, self._result, self._host_rows = self._pinned()
        self._gatherer: Gatherer | None = None
        self._records, self._divisors, self._sums = self._pinned_ranks()
        self.weights: object = tuple(weights)
        self.weight_bytes = plan.weight_bytes
        self.kv_bytes = kv_bytes(plan.program, plan.limits)
        allocated_bytes = sum(memory.buffer.n_bytes for memory in weights) + kv.n_bytes + buffers.n_bytes
        self.workspace_bytes = allocated_bytes - self.kv_bytes - self.weight_bytes

    def _pinned_ranks(self) -> tuple[Bytes, Bytes, Bytes]:
        program, device = self._plan.program, self._gpu_lock.device
        rows = self._plan.limits.max_outputs if program.is_last else 1
        vocabulary = program.out.width if program.is_last else 1
        sizes = 8 * record_words(vocabulary), _FLOAT, 8 * sums_of_row(vocabulary)
        with self._gpu_lock.driver_errors():
            records, divisors, sums = (device.pinned(rows * n_bytes) for n_bytes in sizes)
        return records, divisors, sums

    def _pinned(self) -> tuple[Bytes, Bytes, Bytes, Bytes]:
        program, limits, device = self._plan.program, self._plan.limits, self._gpu_lock.device
        result_rows = limits.max_outputs if program.is_last else limits.max_batch_tokens
        rows = {False: limits.max_batch_tokens, True: limits.max_outputs}
        floats = max((rows[step.selected] * step.row_width for step in self._plan.host_steps), default=1)
        with self._gpu_lock.driver_errors():
            return (
                device.pinned(self._plan.inputs.n_bytes),
                device.pinned(_FLOAT * limits.max_batch_tokens * program.hidden.width),
                device.pinned(_FLOAT * result_rows * program.out.width),
                device.pinned(_FLOAT * floats),
            )

    def run(self, batch: Batch, hidden: Float32 | None, experts: Experts | None = None) -> Float32:
        """Runs the batch. Calls `experts` for each `Exchange` step. Other stages may use the GPU during these calls."""
        self._compute(batch, hidden, experts)
        with self._gpu_lock.exclusive():
            return self._fetch(batch)

    @property
    def ranks_logits(self) -> bool:
        return self._plan.program.is_last

    def run_ranked(self, batch: Batch, hidden: Float32 | None, experts: Experts | None = None) -> RankedLogits:
        self._compute(batch, hidden, experts)
        plan, device, rows = self._plan, self._gpu_lock.device, len(batch.output_rows)
        words = record_words(plan.program.out.width)
        records = self._records[: 8 * rows * words]
        with self._gpu_lock.exclusive():
            if rows:
                device.copy_out(records, self._buffers, plan.records_offset)
            device.synchronize()
        return RankedLogits(records.view(np.int64).reshape(rows, words), self._logits, self._totals)

    def _totals(self, divisors: Sequence[float]) -> NDArray[np.int64]:
        plan, device, rows = self._plan, self._gpu_lock.device, len(divisors)
        parts = sums_of_row(plan.program.out.width)
        by, found = self._divisors[: _FLOAT * rows], self._sums[: 8 * rows * parts]
        by.view(np.float32)[:] = divisors
        with self._gpu_lock.exclusive():
            device.copy_in(self._buffers, plan.divisors_offset, by)
            device.launch(plan.sum_weights(rows))
            device.copy_out(found, self._buffers, plan.totals_offset)
            device.synchronize()
        return found.view(np.int64).reshape(rows, parts)

    def _logits(self, rows: Sequence[int]) -> Float32:
        plan, device = self._plan, self._gpu_lock.device
        row_bytes = _FLOAT * plan.program.out.width
        with self._gpu_lock.exclusive():
            for at, run in _runs(np.array(rows, np.int32)):
                to = self._result[row_bytes * at : row_bytes * (at + len(run))]
                device.copy_out(to, self._buffers, plan.out_offset + row_bytes * run.start)
            device.synchronize()
        return self._result[: row_bytes * len(rows)].view(np.float32).reshape(len(rows), -1)

    def _compute(self, batch: Batch, hidden: Float32 | None, experts: Experts | None) -> None:
        shape = Shape.of(batch, self._plan.limits, self._plan.reads)
        with self._gpu_lock.exclusive():
            self._bring(batch, hidden, shape)
            first, *others = self._launches.segments(shape)
            first()
        for step, launch in zip(self._plan.host_steps_of(shape), others, strict=False):
            if isinstance(step.step, GivenRows):
                self._give(step, step.step, batch)
            else:
                self._on_host(step, batch, experts)
            with self._gpu_lock.exclusive():
                launch()

    def _bring(self, batch: Batch, hidden: Float32 | None, shape: Shape) -> None:
        plan, device = self._plan, self._gpu_lock.device
        n_bytes = plan.inputs.fill(self._inputs, batch)
        device.copy_in(self._buffers, plan.inputs_offset, self._inputs[:n_bytes])
        if shape.placed or shape.grouped:
            part = plan.inputs.fill_images(self._inputs, batch, shape)
            device.copy_in(self._buffers, plan.inputs_offset + part.start, self._inputs[part])
        if not plan.program.is_first:
            assert hidden is not None and hidden.shape == (batch.rows, plan.program.hidden.width)
            staged = self._hidden[: hidden.nbytes]
            np.copyto(staged.view(np.float32).reshape(hidden.shape), hidden)
            device.copy_in(self._buffers, plan.hidden_offset, staged)

    def _on_host(self, host: HostStep, batch: Batch, experts: Experts | None) -> None:
        plan, device = self._plan, self._gpu_lock.device
        rows = len(batch.output_rows) if host.selected else batch.rows
        *reads, out = places = [*self._host_places(host, rows)]
        with self._gpu_lock.exclusive():
            for buffer, place in zip(host.reads, reads, strict=True):
                device.copy_out(place, self._buffers, plan.offset(host, buffer.name))
            device.synchronize()
        *read, result = (place.view(np.float32).reshape(rows, -1) for place in places)
        if isinstance(host.step, Gather):
            if self._gatherer is None:
                raise ValueError("batch: this member of a group has no gatherer")
            own = read[0] if read else np.empty((rows, 0), np.float32)
            gather_rows(self._gatherer, plan.program, host, batch, own, result)
        elif not _exchanged(host, read, result, experts):
            return
        with self._gpu_lock.exclusive():
            device.copy_in(self._buffers, plan.offset(host, host.out.name), out)

    def _give(self, host: HostStep, step: GivenRows, batch: Batch) -> None:
        assert batch.given is not None, "the shape says so"
        device, width = self._gpu_lock.device, step.out.width
        row_bytes, offset = _FLOAT * width, self._plan.offset(host, step.out.name)
        rows, values = batch.given.rows, batch.given.values[:, step.level * width : (step.level + 1) * width]
        places = [
            (self._hidden[row_bytes * at : row_bytes * (at + len(run))], offset + row_bytes * run.start)
            for at, run in _runs(rows)
        ]
        staged = self._hidden[: row_bytes * len(rows)].view(np.float32).reshape(len(rows), width)
        with self._gpu_lock.exclusive():
            if step.adds:
                for part, at in places:
                    device.copy_out(part, self._buffers, at)
            device.synchronize()
            np.add(staged, values, out=staged) if step.adds else np.copyto(staged, values)
            for part, at in places:
                device.copy_in(self._buffers, at, part)

    def _host_places(self, host: HostStep, rows: int) -> Iterator[Bytes]:
        at = 0
        for buffer in (*host.reads, host.out):
            n_bytes = _FLOAT * rows * buffer.width
            yield self._host_rows[at : at + n_bytes]
            at += n_bytes

    def gather_by(self, gatherer: Gatherer) -> None:
        self._gatherer = gatherer

    def exchanged(self, number: int) -> tuple[np.uint64, np.uint64]:
        exchanges = [host for host in self._plan.host_steps if isinstance(host.step, Exchange)]
        host = exchanges[number]
        places = (self._buffers.at(self._plan.offset(host, buffer.name)) for buffer in (host.reads[0], host.out))
        return next(places), next(places)

    def _fetch(self, batch: Batch) -> Float32:
        plan, device = self._plan, self._gpu_lock.device
        rows = len(batch.output_rows) if plan.program.is_last else batch.rows // plan.program.rows_together
        width = plan.program.out.width
        result = self._result[: _FLOAT * rows * width]
        if rows:
            device.copy_out(result, self._buffers, plan.out_offset)
        device.synchronize()
        return result.view(np.float32).reshape(rows, width)

    def normed(self, rows: Int32) -> Float32:
        plan, device = self._plan, self._gpu_lock.device
        assert plan.program.normed is not None, "only a last stage has it"
        width = plan.program.normed.width
        row_bytes = _FLOAT * width
        out = np.empty((len(rows), width), np.float32)
        with self._gpu_lock.exclusive():
            for at, run in _runs(rows):
                staged = self._hidden[: row_bytes * len(run)]
                device.copy_out(staged, self._buffers, plan.normed_offset + row_bytes * run.start)
                device.synchronize()
                out[at : at + len(run)] = staged.view(np.float32).reshape(len(run), -1)
        return out

    def close(self) -> None:
        with self._gpu_lock.exclusive():
            self._launches.close()
            self._kv.close()
            self._buffers.close()
        self.weights = ()


def _exchanged(host: HostStep, read: Sequence[Float32], out: Float32, experts: Experts | None) -> bool:
    assert experts is not None, "a program with exchanges"
    result = experts(host.number, read[0] if len(read) == 1 else np.concatenate(read, axis=1))
    if result is not None:
        np.copyto(out, result)
    return result is not None


def _runs(rows: Int32) -> Iterator[tuple[int, range]]:
    """Splits the ascending `rows` into runs of consecutive numbers. Yields each run's index in `rows`, and the run."""
    starts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    for start, end in pairwise(starts):
        if start < end:
            yield start, range(int(rows[start]), int(rows[end - 1]) + 1)
