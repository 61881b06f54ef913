"""Compiles a program to launches over buffers at fixed addresses. Microbatches of similar size share their launches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.cuda.executor.emit import Emitter, fused_steps
from llamaclust.kernels.cuda.executor.host_steps import HostStep
from llamaclust.kernels.cuda.executor.inputs import InputBuffer
from llamaclust.kernels.cuda.executor.operands import BufferLayout, Operands, kv_name
from llamaclust.kernels.cuda.executor.shapes import ImageReads, Shape
from llamaclust.kernels.cuda.launches import sampling
from llamaclust.kernels.cuda.launches.gpu_properties import ANY_GPU, LaunchLimits
from llamaclust.kernels.cuda.launches.inputs import RowCount
from llamaclust.kernels.cuda.launches.matmul import Weights
from llamaclust.kernels.cuda.runtime.device import Buffer, Device, Launch
from llamaclust.kernels.cuda.runtime.memory import allocated
from llamaclust.model.program import KV_BLOCK_TOKENS, KvLayer, Program, SequenceState

_LAYER_ALIGNMENT_BYTES = 256


class Plan:
    def __init__(
        self, program: Program, weights: Mapping[str, Weights], limits: StageLimits, gpu: LaunchLimits = ANY_GPU
    ) -> None:
        """The weights have no addresses until `bind`. Raises ValueError if the program is inconsistent."""
        self.program = program
        self.weights = weights
        self.limits = limits
        self.inputs = InputBuffer(program, limits)
        self._layout = BufferLayout()
        self._layout.at("inputs", self.inputs.n_bytes)
        *offsets, self._kv_end = layer_offsets(program.kv_memory, limits)
        self._kv_offsets = dict(zip(map(kv_name, program.kv_memory), offsets, strict=True))
        self._kv_base, self._gpu = 0, gpu
        self.reads = ImageReads.of(program)
        types = {name: weight.quant_type for name, weight in weights.items()}
        self._steps = {given: fused_steps(program, types, given=given) for given in (False, True)}
        largest, *others = Shape.all(limits, looks_ahead=self.reads.looks_ahead)
        self.host_steps = self._host_steps(largest)
        for shape in others:
            self.launches(shape)
        self._with_given = self._host_steps(Shape.with_images(limits, self.reads))
        self._layout.lay_out()

    @property
    def weight_bytes(self) -> int:
        return sum(weight.n_bytes for weight in self.weights.values())

    @property
    def kv_allocated_bytes(self) -> int:
        return allocated(self._kv_end)

    @property
    def buffers_allocated_bytes(self) -> int:
        return allocated(self._layout.n_bytes)

    @property
    def kernels(self) -> frozenset[str]:
        # A kernel that is compiled in a step delays the step so long that the worker counts as hung.
        with_images = Shape.with_images(self.limits, self.reads)
        shapes = [*Shape.all(self.limits, looks_ahead=self.reads.looks_ahead), with_images]
        found = {launch.kernel for shape in shapes for launch in self.launches(shape)}
        return frozenset({*found, sampling.TOTALS} if self.program.is_last else found)

    @property
    def inputs_offset(self) -> int:
        return self._layout.offset("inputs")

    @property
    def hidden_offset(self) -> int:
        return self._layout.offset((self.program.hidden.name, False))

    @property
    def out_offset(self) -> int:
        return self._layout.offset((self.program.out.name, self.program.is_last))

    @property
    def records_offset(self) -> int:
        return self._layout.offset("records")

    @property
    def divisors_offset(self) -> int:
        return self._layout.offset("divisors")

    @property
    def totals_offset(self) -> int:
        return self._layout.offset("totals")

    def sum_weights(self, rows: int) -> Launch:
        base, vocabulary = self._layout.base, self.program.out.width
        offsets = self.out_offset, self.records_offset, self.divisors_offset, self.totals_offset
        logits, records, divisors, totals = (np.uint64(base + offset) for offset in offsets)
        outputs = self.inputs.addresses(base + self.inputs_offset).outputs
        return sampling.sum_weights(logits, vocabulary, records, divisors, totals, RowCount(rows, outputs))

    @property
    def normed_offset(self) -> int:
        assert self.program.normed is not None, "only a last stage has it"
        return self._layout.offset((self.program.normed.name, False))

    def bind(self, device: Device, weights: Mapping[str, Weights], buffers: Buffer, kv: Buffer) -> None:
        self.weights = weights
        self._layout.base, self._kv_base = buffers.address, kv.address
        for offset, data in self._layout.constants:
            device.upload(buffers, offset, np.frombuffer(data, np.uint8))

    def offset(self, host_step: HostStep, name: str) -> int:
        return self._layout.offset((name, host_step.selected))

    def host_steps_of(self, shape: Shape) -> tuple[HostStep, ...]:
        return self._with_given if shape.given else self.host_steps

    def _host_steps(self, shape: Shape) -> tuple[HostStep, ...]:
        return tuple(step for step in self._emitted(shape) if isinstance(step, HostStep))

    def launches(self, shape: Shape) -> tuple[Launch, ...]:
        return tuple(launch for segment in self.segments(shape) for launch in segment)

    def segments(self, shape: Shape) -> tuple[tuple[Launch, ...], ...]:
        """Returns the launches in segments. Between two segments, the host computes a step."""
        segments: list[list[Launch]] = [[]]
        for launch in self._emitted(shape):
            if isinstance(launch, HostStep):
                segments.append([])
            else:
                segments[-1].append(launch)
        return tuple(map(tuple, segments))

    def _emitted(self, shape: Shape) -> Iterator[Launch | HostStep]:
        inputs = self.inputs.addresses(int(self._layout.at("inputs", self.inputs.n_bytes)))
        kv = {name: np.uint64(self._kv_base + offset) for name, offset in self._kv_offsets.items()}
        operands = Operands(self.program, self.weights, self.limits, self._layout, inputs, kv, self._gpu, shape)
        return Emitter(operands, self._steps[shape.given]).launches()


def block_bytes(kept: KvLayer) -> int:
    return kept.n_bytes if isinstance(kept, SequenceState) else KV_BLOCK_TOKENS * kept.kv_token_bytes


def layer_offsets(memory: Sequence[KvLayer], limits: StageLimits) -> list[int]:
    """Returns the offset of each layer's block 0 in one allocation, and then the allocation's size."""
    offsets = [0]
    for kept in memory:
        if isinstance(kept, SequenceState):
            blocks = limits.state_blocks or limits.kv_blocks
        else:
            blocks = limits.layer_blocks(kept.window)
        end = offsets[-1] + block_bytes(kept) * blocks
        offsets.append(-(-end // _LAYER_ALIGNMENT_BYTES) * _LAYER_ALIGNMENT_BYTES)
    return offsets
