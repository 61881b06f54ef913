from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.cuda.executor.shapes import Shape
from llamaclust.kernels.cuda.launches.gpu_properties import LaunchLimits
from llamaclust.kernels.cuda.launches.inputs import Inputs, RowCount
from llamaclust.kernels.cuda.launches.matmul import Weights, activation_bytes, quantize
from llamaclust.kernels.cuda.runtime.device import NULL, Launch
from llamaclust.kernels.cuda.runtime.memory import aligned
from llamaclust.model.program import Buffer, KvLayer, Program, RmsNorm, Rope, SequenceState, StatePart
from llamaclust.model.quant_types import ActivationFormat, QuantType

_FLOAT = 4


KvName = tuple[int, StatePart | None]


def kv_name(kept: KvLayer) -> KvName:
    return kept.layer, kept.part if isinstance(kept, SequenceState) else None


@dataclass(slots=True)
class BufferLayout:
    """Named buffers in one allocation. Before `lay_out`, `at` records sizes. After `lay_out`, it returns addresses."""

    n_bytes: int = 0
    base: int = 0
    _sizes: dict[object, int] = field(default_factory=dict)
    _offsets: dict[object, int] = field(default_factory=dict)

    def at(self, name: object, n_bytes: int) -> np.uint64:
        if not self._offsets:
            self._sizes[name] = max(n_bytes, self._sizes.get(name, 0))
            return np.uint64(0)
        assert n_bytes <= self._sizes[name], (name, n_bytes, self._sizes[name])
        return np.uint64(self.base + self._offsets[name])

    def constant(self, numbers: NDArray[Any]) -> np.uint64:
        data = numbers.tobytes()
        return self.at(data, len(data))

    @property
    def constants(self) -> Iterator[tuple[int, bytes]]:
        return ((offset, name) for name, offset in self._offsets.items() if isinstance(name, bytes))

    def lay_out(self) -> None:
        for name, n_bytes in self._sizes.items():
            self._offsets[name] = self.n_bytes
            self.n_bytes = aligned(self.n_bytes + n_bytes)

    def offset(self, name: object) -> int:
        return self._offsets[name]


@dataclass(slots=True)
class Operands:
    program: Program
    weights: Mapping[str, Weights]
    limits: StageLimits
    layout: BufferLayout
    inputs: Inputs
    kv: Mapping[KvName, np.uint64]
    gpu: LaunchLimits
    shape: Shape
    selected: bool = False
    merges: int = 0  # Number of steps so far that merged rows.
    together: int = 1  # Number of original rows that are one row now.
    current: dict[str, np.uint64] = field(default_factory=dict)  # Address of a buffer's newest values, by buffer name.
    # Name of the buffer whose values were last quantized, by format.
    quantized: dict[ActivationFormat, str] = field(default_factory=dict)

    @property
    def rows(self) -> RowCount:
        if self.selected:
            return RowCount(self.shape.outputs, self.inputs.outputs)
        if self.merges:
            return RowCount(-(-self.shape.rows // self.together), self.inputs.merged[self.merges - 1])
        return RowCount(self.shape.rows, self.inputs.rows)

    @property
    def room(self) -> int:
        return self.limits.max_outputs if self.selected else self.limits.max_batch_tokens

    def out(self, buffer: Buffer) -> np.uint64:
        self.current[buffer.name] = self.scratch(buffer.name, buffer.width)
        return self.current[buffer.name]

    def scratch(self, name: str, width: int, multiple: int = 1) -> np.uint64:
        self.is_written(name)
        return self.layout.at((name, self.selected), _FLOAT * width * multiple * self.room)

    def is_written(self, name: str) -> None:
        self.quantized = {kind: owner for kind, owner in self.quantized.items() if owner != name}

    def vector(self, name: str | None) -> np.uint64:
        if name is None:
            return NULL
        weight = self.weights[name]
        assert len(weight.shape) == 1 or weight.quant_type is QuantType.F32, (name, weight.quant_type)
        return weight.address

    def norm_weight(self, step: RmsNorm) -> np.uint64:
        if step.weight is not None:
            return self.vector(step.weight)
        return self.layout.constant(np.ones(step.width, np.float32))

    def angles(self, rope: Rope) -> np.uint64:
        n_bytes = _FLOAT * 2 * len(rope.table.frequencies) * self.limits.max_batch_tokens
        return self.layout.at(("rotation", rope.table, rope.sections), n_bytes)

    def merge(self, factor: int) -> None:
        self.merges, self.together = self.merges + 1, self.together * factor
        self.quantized.clear()

    def activations(self, kind: ActivationFormat, name: str, width: int, multiple: int = 1) -> np.uint64:
        self.quantized[kind] = name
        n_bytes = activation_bytes(kind, self.room * multiple, width)
        return self.layout.at(("activations", kind), n_bytes)

    def quantize(self, x: Buffer, weights: Sequence[str]) -> Iterator[Launch]:
        for kind in dict.fromkeys(self.weights[weight].activation for weight in weights):
            if kind is not ActivationFormat.F32 and self.quantized.get(kind) != x.name:
                out = self.activations(kind, x.name, x.width)
                yield quantize(kind, self.current[x.name], x.width, self.rows, out)

    def activation_of(self, weight: Weights, x: np.uint64) -> np.uint64:
        kind = weight.activation
        return x if kind is ActivationFormat.F32 else self.layout.at(("activations", kind), 0)
