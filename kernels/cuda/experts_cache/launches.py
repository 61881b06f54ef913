"""Launches for an experts cache: first the matrix products of lines whose experts are cached, then the weighted sums of
all lines. A line is a row together with one of its experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Float32, Int32
from llamaclust.kernels.cuda.executor.experts import ExpertsEmitter
from llamaclust.kernels.cuda.executor.operands import BufferLayout, Operands
from llamaclust.kernels.cuda.executor.shapes import Shape
from llamaclust.kernels.cuda.experts_cache.slots import SlotLayout
from llamaclust.kernels.cuda.launches import elementwise, experts, matmul
from llamaclust.kernels.cuda.launches.gpu_properties import LaunchLimits
from llamaclust.kernels.cuda.launches.inputs import Inputs, RowCount
from llamaclust.kernels.cuda.launches.matmul import Weights
from llamaclust.kernels.cuda.runtime.device import NULL, Launch
from llamaclust.kernels.cuda.runtime.memory import aligned
from llamaclust.model.program import Moe, Program

_INT = _FLOAT = 4
_HEADER = 64  # int32 counts: rows, lines, items. The rest is unused.
_ITEM = 3


@dataclass(frozen=True, slots=True)
class SlotWeights(Weights):
    stride_bytes: int = 0

    @property
    def matrix_bytes(self) -> int:
        return self.stride_bytes


@dataclass(frozen=True, slots=True)
class PoolPlace:
    layout: SlotLayout
    slots: int = 1
    address: np.uint64 = NULL


@dataclass(frozen=True, slots=True)
class LineInputs:
    lines: int  # Number of lines of the largest step.

    @property
    def offsets(self) -> tuple[int, int, int, int, int]:
        """Byte offsets of four arrays (weights, lines of cached experts, items, places of results), and total size."""
        each = aligned(_INT * self.lines)
        items = aligned(_INT * _ITEM * (self.lines + self.lines // matmul.LEAST_PIECE + 1))
        first = _INT * _HEADER
        return first, first + each, first + 2 * each, first + 2 * each + items, first + 3 * each + items

    def fill(self, pinned: NDArray[np.uint8], weights: Float32, slots: Int32, piece: int) -> None:
        """Writes the arrays of `offsets` to `pinned`. `slots` [rows, used] is -1 for experts that the host computes."""
        numbers, floats = pinned.view(np.int32), pinned.view(np.float32)
        at_weights, at_lines, at_items, at_sources, _ = (offset // _INT for offset in self.offsets)
        flat = slots.reshape(-1)
        there, missing = np.flatnonzero(flat >= 0), np.flatnonzero(flat < 0)
        ordered = there[np.argsort(flat[there], kind="stable")]
        items = _items(flat[ordered], piece)
        numbers[:3] = len(slots), len(flat), len(items)
        floats[at_weights : at_weights + len(flat)] = weights.reshape(-1)
        numbers[at_lines : at_lines + len(ordered)] = ordered
        numbers[at_items : at_items + items.size] = items.reshape(-1)
        sources = np.arange(len(flat), dtype=np.int32)
        sources[missing] = self.lines + np.arange(len(missing), dtype=np.int32)
        numbers[at_sources : at_sources + len(flat)] = sources


def _items(slots: Int32, piece: int) -> Int32:
    found = []
    starts = np.flatnonzero(np.diff(slots, prepend=-1))
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(slots)], strict=True):
        found += [(slots[start], at, min(piece, end - at)) for at in range(start, end, piece)]
    return np.array(found, np.int32).reshape(-1, _ITEM)


@dataclass(frozen=True, slots=True)
class _LinesEmitter(ExpertsEmitter):
    buffers: experts.ExpertBuffers
    biases: Mapping[str, np.uint64]

    @property
    def _chosen(self) -> experts.ExpertBuffers:
        return self.buffers

    @property
    def _bias_rows(self) -> int:
        return 1

    def _bias(self, name: str | None) -> np.uint64:
        return NULL if name is None else self.biases[name]


@dataclass(slots=True)
class CachePlan:
    program: Program
    mixtures: Sequence[Moe]
    weights: Mapping[str, Weights]  # Weights of all experts, without addresses.
    rows: int  # Number of rows of the largest step.
    gpu: LaunchLimits
    pools: Sequence[PoolPlace]  # One pool for each mixture.
    exchanged: Sequence[tuple[np.uint64, np.uint64]] = ()  # Addresses of each mixture's input and result.
    _layout: BufferLayout = field(default_factory=BufferLayout)

    def __post_init__(self) -> None:
        for shape in self.shapes:
            self.segments(shape)
        self._layout.lay_out()

    @property
    def used(self) -> int:
        return self.mixtures[0].used

    @property
    def inputs(self) -> LineInputs:
        return LineInputs(self.rows * self.used)

    @property
    def line_bytes(self) -> int:
        return _FLOAT * self.mixtures[0].out.width

    @property
    def n_bytes(self) -> int:
        return self._layout.n_bytes

    @property
    def inputs_offset(self) -> int:
        return self._layout.offset("line inputs")

    @property
    def brought_offset(self) -> int:
        return self._layout.offset("lines") + self.inputs.lines * self.line_bytes

    @property
    def host_steps(self) -> Sequence[Moe]:
        return self.mixtures

    @property
    def shapes(self) -> Sequence[Shape]:
        return tuple(
            {shape.rows: replace(shape, outputs=0, decode=False) for shape in Shape.all(self._limits)}.values()
        )

    @property
    def kernels(self) -> frozenset[str]:
        return frozenset(
            launch.kernel for shape in self.shapes for segment in self.segments(shape) for launch in segment
        )

    def shape(self, rows: int) -> Shape:
        return next(shape for shape in sorted(self.shapes, key=lambda shape: shape.rows) if shape.rows >= rows)

    def piece(self, number: int, shape: Shape) -> int:
        return matmul.expert_piece(shape.rows * self.used, max(1, self.pools[number].slots))

    def bind(self, base: int, pools: Sequence[PoolPlace], exchanged: Sequence[tuple[np.uint64, np.uint64]]) -> None:
        self._layout.base, self.pools, self.exchanged = base, pools, exchanged

    def segments(self, shape: Shape) -> tuple[tuple[Launch, ...], ...]:
        return tuple(segment for number in range(len(self.mixtures)) for segment in self._of_mixture(number, shape))

    @property
    def _limits(self) -> StageLimits:
        return StageLimits(self.rows, self.rows, 1, self.rows, 1)

    def _of_mixture(self, number: int, shape: Shape) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
        step, pool, at = self.mixtures[number], self.pools[number], self._layout.at
        lines, width = self.inputs.lines, step.out.width
        x, out = self.exchanged[number] if self.exchanged else (NULL, NULL)
        numbers = int(at("line inputs", self.inputs.offsets[-1]))
        weights, ordered, items, sources = (np.uint64(numbers + offset) for offset in self.inputs.offsets[:-1])
        rows, all_lines, count = (np.uint64(numbers + _INT * index) for index in range(3))
        buffers = experts.ExpertBuffers(NULL, weights, ordered, items, count)
        named = _slot_weights(step, pool, self.weights)
        ops = Operands(self.program, named, self._limits, self._layout, _inputs(rows), {}, self.gpu, shape)
        ops.current[step.x.name] = x
        by_slot = replace(step, experts=max(1, pool.slots))
        emitter = _LinesEmitter(ops, by_slot, buffers, _bias_addresses(step, pool))
        results = at("lines", 2 * lines * self.line_bytes)
        products = tuple(emitter.line_products(self.piece(number, shape), results))
        ranked = at("lines by rank", lines * self.line_bytes)
        gathered = elementwise.select_rows(results, sources, ranked, width, RowCount(shape.rows * self.used, all_lines))
        return products, (gathered, experts.combine(step, ranked, buffers, out, ops.rows))


def _inputs(rows: np.uint64) -> Inputs:
    return Inputs(rows, *(NULL,) * 8)


def _slot_weights(step: Moe, pool: PoolPlace, weights: Mapping[str, Weights]) -> dict[str, Weights]:
    offsets = zip((*step.inner, step.down), pool.layout.matrix_offsets, strict=True)
    return {
        name: SlotWeights(
            weights[name].quant_type,
            (pool.slots, weights[name].rows, weights[name].cols),
            pool.address + np.uint64(offset),
            pool.layout.stride_bytes,
        )
        for name, offset in offsets
    }


def _bias_addresses(step: Moe, pool: PoolPlace) -> dict[str, np.uint64]:
    offsets = pool.layout.bias_offsets(pool.slots)
    return {name: pool.address + np.uint64(offset) for name, offset in zip(step.biases, offsets, strict=True)}
