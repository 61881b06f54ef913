"""Layers of one stage on several devices of a worker: each backend computes its layers in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Backend, Batch, Float32, Int32, Progress, Stage
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.program import Attention, Program, Step


@dataclass(frozen=True, slots=True)
class BackendLayers:
    """Layers [start, end) on a backend."""

    backend: Backend
    start: int
    end: int


class MultiDeviceBackend:
    """See `kernels.backend.Backend`. Loads one program, divided into `parts` in order of layers. KV memory is on
    the device of its layer."""

    def __init__(self, parts: Sequence[BackendLayers]) -> None:
        assert parts and all(part.end == after.start for part, after in pairwise(parts)), parts
        (self.numerics_version,) = {part.backend.numerics_version for part in parts}
        self.name = "+".join(part.backend.name for part in parts)
        self.feature_level = "+".join(part.backend.feature_level for part in parts)
        self.parts = tuple(parts)

    def load(
        self, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress
    ) -> MultiDeviceStage:
        """What was loaded is freed again where a later part cannot be."""
        stages: list[Stage] = []
        with ExitStack() as loaded:
            for part, own in self._programs(program):
                stages.append(part.backend.load(own, tensors, limits, progress))
                loaded.callback(stages[-1].close)
            loaded.pop_all()
        return MultiDeviceStage(stages)

    def held_bytes(self, program: Program, tensors: Mapping[str, Tensor]) -> int:
        return sum(part.backend.held_bytes(own, tensors) for part, own in self._programs(program))

    def workspace_bytes(self, program: Program, tensors: Mapping[str, Tensor], limits: StageLimits) -> int:
        return sum(part.backend.workspace_bytes(own, tensors, limits) for part, own in self._programs(program))

    def _programs(self, program: Program) -> Iterator[tuple[BackendLayers, Program]]:
        assert (program.start, program.end) == (self.parts[0].start, self.parts[-1].end), "another stage's parts"
        for part in self.parts:
            yield part, layers_of(program, part.start, part.end)


class MultiDeviceStage:
    """See `kernels.backend.Stage`."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self.weight_bytes = sum(stage.weight_bytes for stage in stages)
        self.kv_bytes = sum(stage.kv_bytes for stage in stages)
        self.workspace_bytes = sum(stage.workspace_bytes for stage in stages)

    @property
    def weights(self) -> object:
        return [stage.weights for stage in self.stages]

    def run(self, batch: Batch, hidden: Float32 | None) -> Float32:
        for stage in self.stages:
            hidden = stage.run(batch, hidden)
        assert hidden is not None
        return hidden

    def normed(self, rows: Int32) -> Float32:
        return self.stages[-1].normed(rows)

    def close(self) -> None:
        for stage in self.stages:
            stage.close()
        self.stages = ()


def layers_of(program: Program, start: int, end: int) -> Program:
    """The steps of layers [start, end). A layer begins with the first step that names it; steps before the first layer
    are the embedding, steps after the last one the head."""
    assert program.start <= start < end <= program.end, (start, end)
    bounds = {program.start: 0, program.end: len(program.steps)}
    for at, step in enumerate(program.steps):
        layer = _layer(step)
        if layer is not None and layer > program.start:
            bounds.setdefault(layer, at)
    is_last = end == program.end
    steps = program.steps[bounds[start] : bounds[end]]
    out, normed = (program.out, program.normed) if is_last else (program.hidden, None)
    return replace(program, start=start, end=end, out=out, steps=steps, normed=normed)


def _layer(step: Step) -> int | None:
    """The layer of a step's KV memory or weight."""
    if isinstance(step, Attention):
        return step.layer
    parts = str(getattr(step, "weight", None) or getattr(step, "router", "")).split(".")
    return int(parts[1]) if parts[0] == "blk" else None
