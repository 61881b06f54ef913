"""Computes mixtures of experts on the CPU for another device, either whole mixtures or single experts."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels import _native
from llamaclust.kernels.backend import Batch, Float32, Int32, Stage
from llamaclust.kernels.cpu.compile_experts import CompiledLines
from llamaclust.kernels.packed.weights import Weight
from llamaclust.kernels.split_experts import mixtures_of
from llamaclust.model.program import KV_BLOCK_TOKENS, Program

_GENERIC = "generic"


class ExpertLines:
    def __init__(self, native: _native.Stage, compiled: CompiledLines, lines: int, experts: int) -> None:
        self._native = native
        self._choice = native.contents(compiled.choice)
        self._result = native.contents(compiled.lines)
        self._read = compiled.read
        self._input = np.zeros((lines, compiled.read + experts), np.float32)
        self.workspace_bytes = native.workspace_bytes + self._input.nbytes

    def route(self, number: int, x: Float32) -> tuple[Int32, Float32]:
        rows = len(x)
        self._input[:rows, : self._read] = x
        self._run(2 * number, rows)
        ids, weights = np.split(self._choice[:rows], 2, axis=1)
        return ids.astype(np.int32), weights

    def run(self, number: int, x: Float32, experts: Int32) -> Float32:
        lines = len(experts)
        self._input[:lines, : x.shape[1]] = x
        chosen = np.arange(lines), self._read + experts
        self._input[chosen] = 1
        try:
            self._run(2 * number + 1, lines)
        finally:
            self._input[chosen] = 0
        return self._result[:lines]

    def _run(self, part: int, lines: int) -> None:
        self._native.set_part(part)
        numbers, none = np.arange(lines, dtype=np.int32), np.empty(0, np.int32)
        starts, blocks = np.array([0, lines], np.int32), -(-lines // KV_BLOCK_TOKENS)
        tables = np.array([0, blocks], np.int32), np.zeros(blocks, np.int32)
        self._native.run(none, numbers, starts, *tables, none, self._input[:lines])


class MixtureStage(Stage, Protocol):
    def run_mixture(self, number: int, batch: Batch, hidden: Float32) -> Float32: ...


class CpuExperts:
    def __init__(
        self, mixtures: MixtureStage, program: Program, weights: dict[str, Weight], lines: ExpertLines | None
    ) -> None:
        self._mixtures, self._lines = mixtures, lines
        self._steps = mixtures_of(program)
        self._biases: dict[str, Float32] = {}
        self._weights = weights
        self.weight_bytes = mixtures.weight_bytes
        self.workspace_bytes = mixtures.workspace_bytes + (lines.workspace_bytes if lines else 0)

    @property
    def weights(self) -> object:
        return self._weights

    def run_mixture(self, number: int, batch: Batch, hidden: Float32) -> Float32:
        return self._mixtures.run_mixture(number, batch, hidden)

    def route(self, number: int, hidden: Float32) -> tuple[Int32, Float32]:
        assert self._lines is not None, "the experts were loaded with lines=0"
        return self._lines.route(number, hidden)

    def run_lines(self, number: int, x: Float32, experts: Int32) -> Float32:
        assert self._lines is not None, "the experts were loaded with lines=0"
        return self._lines.run(number, x, experts)

    def expert_weights(self, number: int, expert: int) -> tuple[NDArray[np.uint8], ...]:
        step = self._steps[number]
        tiles = (self._weights[name].tiles for name in (*step.inner, step.down))
        biases = (self._bias(name)[expert] for name in step.biases)
        return (*(each.reshape(step.experts, -1)[expert] for each in tiles), *(bias.view(np.uint8) for bias in biases))

    def _bias(self, name: str) -> Float32:
        if name not in self._biases:
            self._biases[name] = _native.dequantize(_GENERIC, self._weights[name].matrix)
        return self._biases[name]

    def close(self) -> None:
        self._mixtures.close()
        self._lines = None
        self._weights = {}
