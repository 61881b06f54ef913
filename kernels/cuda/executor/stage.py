"""A loaded program on a GPU: numbers in, launches or a captured graph, hidden states or logits out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from weakref import finalize

import numpy as np

from llamaclust.kernels.backend import Batch, Float32
from llamaclust.kernels.cuda.executor.plan import Plan, kv_bytes
from llamaclust.kernels.cuda.executor.shapes import Shape
from llamaclust.kernels.cuda.runtime.device import Buffer, Device, Graph, Launch
from llamaclust.kernels.cuda.runtime.gpu_lock import GpuLock
from llamaclust.kernels.cuda.weights.device_weights import LayerMemory

_FLOAT = 4
_MOST_SHAPES = 64
"""Graphs take some memory of the driver's, lists of launches some of the host's: those that were used last are kept."""


class CudaStage:
    """See `kernels.backend.Stage`. A batch that is out of bounds is a ValueError."""

    def __init__(
        self,
        device: Device,
        gpu_lock: GpuLock,
        plan: Plan,
        weights: Sequence[LayerMemory],
        kv: Buffer,
        buffers: Buffer,
        graphs: bool,
    ) -> None:
        """`plan` has its place; `graphs`: whether launches are captured. `kv` and `buffers` are freed with the stage,
        however it ends."""
        for buffer in (kv, buffers):
            finalize(self, buffer.close)
        program, limits = plan.program, plan.limits
        self._device = device
        self._gpu_lock = gpu_lock
        self._plan = plan
        self._kv, self._buffers = kv, buffers
        self._captures = graphs
        self._graphs: dict[Shape, Graph] = {}  # the last used at the end
        self._launches: dict[Shape, tuple[Launch, ...]] = {}  # likewise, of shapes without a graph
        self.weights: object = tuple(weights)
        self.weight_bytes = plan.weight_bytes
        self.kv_bytes = kv_bytes(program, limits)
        self.workspace_bytes = kv.n_bytes + buffers.n_bytes - self.kv_bytes
        self.workspace_bytes += sum(memory.buffer.n_bytes for memory in weights) - self.weight_bytes
        lines = limits.max_outputs if program.is_last else limits.max_batch_tokens
        with gpu_lock.driver_errors():
            self._numbers = device.pinned(plan.inputs.n_bytes)
            self._hidden = device.pinned(_FLOAT * limits.max_batch_tokens * program.hidden.width)
            self._result = device.pinned(_FLOAT * lines * program.out.width)

    def run(self, batch: Batch, hidden: Float32 | None) -> Float32:
        with self._gpu_lock.exclusive():
            return self._run(batch, hidden)

    def _run(self, batch: Batch, hidden: Float32 | None) -> Float32:
        plan, device = self._plan, self._device
        n_bytes = plan.inputs.fill(self._numbers, batch)
        device.copy_in(self._buffers, plan.inputs_offset, self._numbers[:n_bytes])
        if not plan.program.is_first:
            assert hidden is not None and hidden.shape == (batch.rows, plan.program.hidden.width)
            staged = self._hidden[: hidden.nbytes]
            np.copyto(staged.view(np.float32).reshape(hidden.shape), hidden)
            device.copy_in(self._buffers, plan.hidden_offset, staged)
        self._compute(Shape.of(batch, plan.limits))
        lines = len(batch.output_rows) if plan.program.is_last else batch.rows
        width = plan.program.out.width
        result = self._result[: _FLOAT * lines * width]
        if lines:
            device.copy_out(result, self._buffers, plan.out_offset)
        device.synchronize()
        return result.view(np.float32).reshape(lines, width)

    def _compute(self, shape: Shape) -> None:
        """Captured at the second time: a shape that comes once costs no more than its launches."""
        graph, launches = self._graphs.pop(shape, None), self._launches.pop(shape, None)
        if launches is not None and self._captures:
            graph = self._device.capture(partial(self._launch, launches))
        if graph is not None:
            if len(self._graphs) == _MOST_SHAPES:
                self._graphs.pop(next(iter(self._graphs))).close()
            self._graphs[shape] = graph
            graph.launch()
            return
        if len(self._launches) == _MOST_SHAPES:
            del self._launches[next(iter(self._launches))]
        self._launches[shape] = launches or self._plan.launches(shape)
        self._launch(self._launches[shape])

    def _launch(self, launches: Sequence[Launch]) -> None:
        for launch in launches:
            self._device.launch(launch)

    def close(self) -> None:
        with self._gpu_lock.exclusive():
            for graph in self._graphs.values():
                graph.close()
            self._graphs, self._launches = {}, {}
            self._kv.close()
            self._buffers.close()
        self.weights = ()
