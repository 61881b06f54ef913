"""The CPU backend. One native call runs a whole program on a thread pool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import InsufficientMemoryError, ModelFileError, UsageError
from llamaclust.core.limits import NUMERICS_VERSION, StageLimits
from llamaclust.core.process_settings import lower_priority
from llamaclust.core.sizes import needed
from llamaclust.kernels import _native
from llamaclust.kernels.backend import Batch, Float32, Int32, Progress, Stage, kv_bytes
from llamaclust.kernels.cpu.compile import Compiled, InputCopy, compile_program
from llamaclust.kernels.cpu.compile_experts import compile_experts, compile_lines
from llamaclust.kernels.cpu.experts import CpuExperts, ExpertLines
from llamaclust.kernels.cpu.weight_store import WeightStore
from llamaclust.kernels.packed.cache import PackedCache
from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
from llamaclust.kernels.packed.weights import Weight, shapes_only
from llamaclust.kernels.split_experts import lines_limits, mixtures_of
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.program import Program


@dataclass(frozen=True, slots=True)
class Inputs:
    """The rows x [rows, width] that the last run multiplied by the matrices named in `weights`. The next run overwrites
    x. If each expert or head has its own matrix, `chosen` [rows, used] has the ids of each row's experts or heads. If
    each expert or head also has its own input, x is [rows * used, width]."""

    weights: tuple[str, ...]
    x: Float32
    chosen: Int32 | None


class CpuStage:
    """Implements `kernels.backend.Stage`. Raises ValueError for a batch that exceeds the limits."""

    def __init__(
        self,
        native: _native.Stage,
        weights: dict[str, Weight],
        compiled: Compiled,
        observed: Sequence[InputCopy] = (),
    ) -> None:
        self._observed = observed
        self._normed = compiled.normed
        self._scales = compiled.scales
        self._kv_layers = compiled.kv_layers
        self._native: _native.Stage | None = native
        self._result: Float32 = native.result
        self.weights = weights
        self.weight_bytes = sum(weight.n_bytes for weight in weights.values())
        self.kv_bytes = native.kv_bytes
        self.workspace_bytes = native.workspace_bytes

    @property
    def native(self) -> _native.Stage:
        assert self._native is not None, "the stage was closed"
        return self._native

    def run(self, batch: Batch, hidden: Float32 | None) -> Float32:
        assert self._native is not None, "the stage was closed"
        if self._scales:
            self._choose_adapters(batch.adapter_scales)
        lines = self._native.run(
            batch.tokens,
            batch.positions,
            batch.sequence_starts,
            batch.table_starts,
            batch.block_tables,
            batch.output_rows,
            hidden,
            batch.window_tables,
            None if (states := batch.states) is None else (states.before, states.starts, states.rows, states.blocks),
            batch.rope_positions,
            batch.groups,
            None if (given := batch.given) is None else (given.rows, given.values),
        )
        return self._result[:lines]

    def gather_by(self, gatherer: _native.Gatherer) -> None:
        assert self._native is not None, "the stage was closed"
        self._native.set_gatherer(gatherer)

    def run_frame(self, frame: _native.MicrobatchFrame) -> Float32:
        assert self._native is not None, "the stage was closed"
        if self._scales:
            self._choose_adapters(frame.adapter_scales)
        return self._result[: self._native.run_frame(frame)]

    def _choose_adapters(self, scales: Float32 | None) -> None:
        assert self._native is not None
        chosen = () if scales is None else np.flatnonzero(scales.any(axis=0)).tolist()
        self._native.set_adapters(sum(1 << adapter for adapter in chosen))
        for target in self._scales:
            if scales is not None and target.adapter in chosen:
                column = scales[:, target.adapter, None] * np.float32(target.factor)
                self._native.contents(target.buffer)[: len(scales)] = column

    def normed(self, rows: Int32) -> Float32:
        assert self._native is not None, "the stage was closed"
        assert self._normed is not None, "only a last stage has it"
        return self._native.contents(self._normed)[rows]

    def inputs(self, rows: int) -> Iterator[Inputs]:
        """Yields the inputs of the last run, which had `rows` rows. The stage must be loaded with `observed=True`."""
        assert self._native is not None, "the stage was closed"
        for seen in self._observed:
            ids = None if seen.choice is None else self._native.contents(seen.choice)[:rows]
            chosen = None if ids is None else ids[:, : ids.shape[1] // 2].astype(np.int32)
            x = self._native.contents(seen.buffer)[: rows * seen.used]
            if seen.heads > 1:
                x = x.reshape(rows * seen.heads, -1)
                chosen = np.tile(np.arange(seen.heads, dtype=np.int32), (rows, 1))
            yield Inputs(seen.weights, x, chosen)

    def run_mixture(self, number: int, batch: Batch, hidden: Float32) -> Float32:
        assert self._native is not None, "the stage was closed"
        self._native.set_part(number)
        return self.run(batch, hidden)

    def kv_layers(self) -> tuple[tuple[NDArray[np.uint8], ...], ...]:
        assert self._native is not None, "the stage was closed"
        return tuple(tuple(map(self._native.kv_layer, numbers)) for numbers in self._kv_layers)

    def close(self) -> None:
        self._native = None
        self._result = np.empty((0, self._result.shape[1]), np.float32)
        self.weights = {}


def workspace_bytes(program: Program, tensors: Mapping[str, Tensor], limits: StageLimits, threads: int) -> int:
    with _explained(program):
        return _native.workspace_bytes(compile_program(program, shapes_only(program, tensors), limits).plan, threads)


def experts_workspace_bytes(
    program: Program, tensors: Mapping[str, Tensor], limits: StageLimits, threads: int, lines: int = 0
) -> int:
    weights = shapes_only(program, tensors)
    with _explained(program):
        n_bytes = _native.workspace_bytes(compile_experts(program, weights, limits).plan, threads)
        if lines == 0:
            return n_bytes
        compiled = compile_lines(program, weights, lines_limits(lines))
        input_bytes = 4 * lines * (compiled.read + mixtures_of(program)[0].experts)
        return n_bytes + _native.workspace_bytes(compiled.plan, threads) + input_bytes


@contextmanager
def _explained(program: Program) -> Iterator[None]:
    """Turns ValueError into ModelFileError. A TypeError is not caught: it means a bug or an outdated native module."""
    try:
        yield
    except ValueError as error:
        raise ModelFileError(f"layers {program.start} to {program.end} cannot be computed: {error}") from error


class CpuBackend:
    """Implements `kernels.backend.Backend` on the CPU. `feature_level` is by default the best of this machine. If
    `yields` is True, stages compute with fewer threads while other programs keep the cores busy. `mlock` locks packed
    weights in RAM."""

    name = "cpu"
    numerics_version = NUMERICS_VERSION

    def __init__(
        self,
        threads: int,
        feature_level: str | None = None,
        *,
        yields: bool = True,
        packed_cache: PackedCacheFolder | None = None,
        mlock: bool = False,
    ) -> None:
        """Raises UsageError if this machine lacks the feature level, or if it cannot start this many threads."""
        levels = _native.available_levels()
        self.feature_level = feature_level or levels[-1]
        if self.feature_level not in levels:
            there = ", ".join(levels)
            raise UsageError(
                f"feature level {self.feature_level!r} is not available on this machine; available: {there}"
            )
        self.threads = threads
        self._yields = yields
        self._pool = self._new_pool()
        self.packed_cache = None if packed_cache is None else PackedCache(packed_cache)
        self._weights = WeightStore(threads, self.packed_cache, mlock=mlock)

    def _new_pool(self, niceness: int = 0) -> _native.ThreadPool:
        try:
            with ThreadPoolExecutor(1, initializer=partial(lower_priority, niceness)) as starter:
                return starter.submit(_native.ThreadPool, self.threads, self._yields).result()
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"{self.threads} threads cannot be started: {error}; choose another number") from error

    def apart(self, niceness: int = 0) -> CpuBackend:
        twin = copy(self)
        twin._pool = self._new_pool(niceness)
        return twin

    def load(
        self,
        program: Program,
        tensors: dict[str, Tensor],
        limits: StageLimits,
        progress: Progress,
        *,
        observed: bool = False,
    ) -> CpuStage:
        """Each run keeps its `inputs` if `observed`. Raises ModelFileError if there are no kernels for the program."""
        found: list[InputCopy] = []
        with self._loading(program, tensors, limits):
            weights = self._weights.load(program, tensors, progress)
            compiled = compile_program(program, weights, limits, found if observed else None)
            return self._stage(weights, compiled, found)

    def load_beside(
        self, stage: Stage, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress
    ) -> CpuStage:
        assert isinstance(stage, CpuStage)
        with self._loading(program, tensors, limits):
            weights = self._weights.load(program, tensors, progress)
            return self._stage(weights, compile_program(program, weights, limits), shares_kv=stage.native)

    def load_experts(
        self, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress, lines: int = 0
    ) -> CpuExperts:
        with self._loading(program, tensors, limits):
            weights = self._weights.load(program, tensors, progress)
            mixtures = self._stage(weights, compile_experts(program, weights, limits))
            return CpuExperts(mixtures, program, weights, self._lines(program, weights, lines) if lines else None)

    def _lines(self, program: Program, weights: dict[str, Weight], lines: int) -> ExpertLines:
        compiled = compile_lines(program, weights, lines_limits(lines))
        native = _native.Stage(compiled.plan, self.feature_level, self._pool)
        native.prepare()
        return ExpertLines(native, compiled, lines, mixtures_of(program)[0].experts)

    def _stage(
        self,
        weights: dict[str, Weight],
        compiled: Compiled,
        observed: Sequence[InputCopy] = (),
        shares_kv: _native.Stage | None = None,
    ) -> CpuStage:
        native = _native.Stage(compiled.plan, self.feature_level, self._pool, shares_kv)
        native.prepare()
        return CpuStage(native, weights, compiled, observed)

    @contextmanager
    def _loading(self, program: Program, tensors: dict[str, Tensor], limits: StageLimits) -> Iterator[None]:
        try:
            with _explained(program):
                yield
        except MemoryError as error:
            raise InsufficientMemoryError(self._memory_error_text(program, tensors, limits)) from error

    def held_bytes(self, program: Program, tensors: Mapping[str, Tensor]) -> int:
        return self._weights.held_bytes(tensors[name] for name in program.weights)

    def workspace_bytes(self, program: Program, tensors: Mapping[str, Tensor], limits: StageLimits) -> int:
        return workspace_bytes(program, tensors, limits, self.threads)

    def experts_workspace_bytes(
        self, program: Program, tensors: Mapping[str, Tensor], limits: StageLimits, lines: int = 0
    ) -> int:
        return experts_workspace_bytes(program, tensors, limits, self.threads, lines)

    def _memory_error_text(self, program: Program, tensors: dict[str, Tensor], limits: StageLimits) -> str:
        parts = {
            "weights": sum(tensors[name].resident_bytes for name in program.weights),
            "KV memory": kv_bytes(program, limits),
        }
        what = f"layers [{program.start}, {program.end}) need {needed(parts)}"
        return f"{what}, which the system refuses; take fewer layers or a shorter context"
