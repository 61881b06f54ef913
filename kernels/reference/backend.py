"""The reference backend's executor. Weights are float32, and steps run one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from itertools import count

import numpy as np

from llamaclust.core.errors import ModelFileError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels._native import Gatherer
from llamaclust.kernels.backend import Batch, Float32, Int32, Progress, Stage
from llamaclust.kernels.reference.dequantize import SUPPORTED_TYPES, dequantize
from llamaclust.kernels.reference.kv import LayerKv
from llamaclust.kernels.reference.states import StateMemory
from llamaclust.kernels.reference.steps import State, run_step
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.program import Buffer, Program
from llamaclust.model.steps.across import Gather


class ReferenceStage:
    """Implements `kernels.backend.Stage`. Results stay valid after later runs."""

    def __init__(self, program: Program, weights: dict[str, Float32], limits: StageLimits) -> None:
        self.program = program
        self.weights = weights
        self._limits = limits
        self._normed: Float32 | None = None
        self._gatherer: Gatherer | None = None
        self._kv = {
            step.layer: LayerKv(step, limits.layer_blocks(step.window), windowed=limits.gives_up(step.window))
            for step in program.kv_layers
        }
        self._states = {state: StateMemory(state, limits) for state in program.states}
        self.weight_bytes = sum(weight.nbytes for weight in weights.values())
        self.kv_bytes = sum(layer.n_bytes for layer in self._kv.values())
        self.kv_bytes += sum(state.n_bytes for state in self._states.values())
        self.workspace_bytes = _workspace_bytes(program, limits)

    def run(self, batch: Batch, hidden: Float32 | None) -> Float32:
        state, gathers = self.begin(batch, hidden), count()
        for step in self.program.steps:
            if isinstance(step, Gather):
                self._gather(step, next(gathers), state)
            else:
                run_step(step, state)
        return self.end(state)

    def gather_by(self, gatherer: Gatherer) -> None:
        self._gatherer = gatherer

    def _gather(self, step: Gather, number: int, state: State) -> None:
        assert self._gatherer is not None, "the program of a group's member"
        given = np.empty((state.batch.rows, 0), np.float32) if step.x is None else state[step.x]
        own = np.ascontiguousarray(given).reshape(len(given) * step.lines, given.shape[1] // step.lines)
        whole = np.empty((len(own), step.out.width // step.lines), np.float32)
        if len(own):
            self._gatherer.gather(number, own, whole, step.borders, step.to)
        state[step.out] = whole.reshape(-1, step.out.width)

    def begin(self, batch: Batch, hidden: Float32 | None) -> State:
        self._check(batch)
        state = State(self.weights, self._kv, batch, self._states)
        assert (hidden is None) == self.program.is_first
        if hidden is not None:
            state[self.program.hidden] = hidden
        return state

    def end(self, state: State) -> Float32:
        self._normed = None if self.program.normed is None else state[self.program.normed]
        return state[self.program.out]

    def normed(self, rows: Int32) -> Float32:
        assert self._normed is not None, "only a last stage that ran has it"
        return self._normed[rows]

    def close(self) -> None:
        self.weights = {}
        self._kv.clear()
        self._states.clear()

    def _check(self, batch: Batch) -> None:
        limits = self._limits
        assert 0 < batch.rows <= limits.max_batch_tokens, batch.rows
        assert len(batch.output_rows) <= limits.max_outputs, len(batch.output_rows)
        assert len(batch.sequence_starts) - 1 <= limits.max_sequences, len(batch.sequence_starts)
        assert int(batch.positions.max()) < limits.max_context_tokens, batch.positions.max()
        assert int(batch.block_tables.max()) < limits.kv_blocks, batch.block_tables.max()
        if limits.window_blocks:
            assert batch.window_tables is not None and len(batch.window_tables) == len(batch.block_tables)
            assert int(batch.window_tables.max()) < limits.window_blocks, batch.window_tables.max()
        if self._states and limits.state_blocks:
            assert batch.states is not None and int(batch.states.blocks.max()) < limits.state_blocks

    def share_kv(self, stage: ReferenceStage) -> None:
        self._kv, self._states = stage._kv, stage._states


class ReferenceBackend:
    name = "reference"
    feature_level = "numpy"
    numerics_version = 0

    def load(
        self, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress
    ) -> ReferenceStage:
        weights: dict[str, Float32] = {}
        for name in program.weights:
            weights[name] = _load(tensors[name])
            progress(tensors[name].n_bytes)
        return ReferenceStage(program, weights, limits)

    def load_beside(
        self, stage: Stage, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress
    ) -> ReferenceStage:
        assert isinstance(stage, ReferenceStage)
        loaded = self.load(program, tensors, limits, progress)
        loaded.share_kv(stage)
        return loaded

    def held_bytes(self, program: Program, tensors: Mapping[str, Tensor]) -> int:
        return 0

    def workspace_bytes(self, program: Program, tensors: Mapping[str, Tensor], limits: StageLimits) -> int:
        return _workspace_bytes(program, limits)


def _workspace_bytes(program: Program, limits: StageLimits) -> int:
    values = (getattr(step, field.name) for step in program.steps for field in fields(step))
    buffers = {value for value in values if isinstance(value, Buffer)}
    return sum(buffer.width for buffer in buffers) * limits.max_batch_tokens * np.dtype(np.float32).itemsize


def _load(tensor: Tensor) -> Float32:
    if tensor.quant_type not in SUPPORTED_TYPES:
        known = ", ".join(sorted(kind.name for kind in SUPPORTED_TYPES))
        what = f"the reference backend does not support type {tensor.quant_type.name}; supported: {known}"
        raise ModelFileError(f"{tensor.path}: tensor {tensor.name}: {what}; use another GGUF file of this model")
    weights = dequantize(tensor.quant_type, tensor.read(), tensor.rows * tensor.shape[-1])
    return weights.reshape(tensor.shape)
