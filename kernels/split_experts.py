"""Splits a program between a GPU and the CPU, which computes the experts of some layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import (
    Batch,
    ExchangingBackend,
    ExchangingStage,
    Experts,
    ExpertsBackend,
    ExpertsCache,
    ExpertsStage,
    Float32,
    Int32,
    Progress,
    RankedLogits,
    Stage,
)
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.program import Buffer, Exchange, Moe, Program, Slice, Step

MOST_CACHED_ROWS = 64
"""The maximum number of rows in a microbatch that uses the experts cache. Larger microbatches use most experts."""


def without_experts(program: Program, layers: Collection[int]) -> Program:
    return replace(program, steps=tuple(_exchanged(step) if _is_of(step, layers) else step for step in program.steps))


def experts_of(program: Program, layers: Collection[int]) -> Program | None:
    """Returns a program that has only the mixtures of experts of `layers`, or None if there are none."""
    mixtures = [step for step in mixtures_of(program) if _is_of(step, layers)]
    if not mixtures:
        return None
    hidden = Buffer("experts in", sum(buffer.width for buffer in mixtures[0].reads))
    out = Buffer("experts out", mixtures[0].out.width)
    steps = tuple(step for mixture in mixtures for step in _from_hidden(mixture, hidden, out))
    return replace(program, hidden=hidden, out=out, normed=None, steps=steps)


def mixtures_of(program: Program) -> tuple[Moe, ...]:
    return tuple(step for step in program.steps if isinstance(step, Moe))


def cached_lines(program: Program, limits: StageLimits) -> int:
    """Returns the maximum number of lines in a microbatch that uses the experts cache, or 0 if the kernels cannot
    compute single experts of the program. A line is a row together with one of its experts."""
    mixtures = mixtures_of(program)
    figures = {(step.used, step.experts, step.x.width, step.out.width) for step in mixtures}
    is_divisible = all((step.gate or step.fused) and not step.options.weighs_inputs for step in mixtures)
    rows = min(limits.max_batch_tokens, MOST_CACHED_ROWS)
    return rows * mixtures[0].used if is_divisible and len(figures) == 1 else 0


def lines_limits(lines: int) -> StageLimits:
    return StageLimits(lines, lines, 1, lines, 1)


def expert_parts(program: Program) -> Iterator[Program]:
    part: list[Step] = []
    for step in program.steps:
        part.append(step)
        if isinstance(step, Moe):
            yield replace(program, steps=tuple(part))
            part = []


def _is_of(step: Step, layers: Collection[int]) -> bool:
    return isinstance(step, Moe) and step.layer in layers


def _exchanged(step: Step) -> Exchange:
    assert isinstance(step, Moe)
    return Exchange(step.reads, step.out)


def _from_hidden(step: Moe, hidden: Buffer, out: Buffer) -> tuple[Step, ...]:
    reads = step.reads
    assert (sum(buffer.width for buffer in reads), step.out.width) == (hidden.width, out.width), "layers alike"
    if step.routed is None:
        return (replace(step, x=hidden, out=out),)
    x, routed = (Buffer(f"experts {name}", buffer.width) for name, buffer in zip(("x", "routed"), reads, strict=True))
    slices = Slice(hidden, x, 0), Slice(hidden, routed, x.width)
    return *slices, replace(step, x=x, routed=routed, out=out)


class SplitExpertsBackend:
    """Loads programs on two backends. `experts` computes the experts of `layers`, and `rest` all other steps."""

    def __init__(
        self, rest: ExchangingBackend, experts: ExpertsBackend, layers: Collection[int], cache_bytes: int = 0
    ) -> None:
        assert rest.numerics_version == experts.numerics_version
        self.numerics_version = rest.numerics_version
        self.name = f"{rest.name}+{experts.name}"
        self.feature_level = f"{rest.feature_level}+{experts.feature_level}"
        self.rest, self.experts, self.layers, self.cache_bytes = rest, experts, layers, cache_bytes

    def load(self, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress) -> Stage:
        rest, experts = self.divided(program)
        if experts is None:
            return self.rest.load(program, tensors, limits, progress)
        lines, cache = self._lines(experts, limits), None
        with ExitStack() as loaded:
            stage = self.rest.load(rest, _named(tensors, rest), limits, progress)
            loaded.callback(stage.close)
            own = _named(tensors, experts)
            mixtures = self.experts.load_experts(experts, own, limits, progress, lines)
            loaded.callback(mixtures.close)
            if lines:
                cache = self.rest.cache_experts(stage, mixtures, experts, own, limits, self.cache_bytes)
            loaded.pop_all()
        return SplitExpertsStage(stage, mixtures, cache)

    def _lines(self, experts: Program, limits: StageLimits) -> int:
        return cached_lines(experts, limits) if self.cache_bytes else 0

    def held_bytes(self, program: Program, tensors: Mapping[str, Tensor]) -> int:
        rest, experts = self.divided(program)
        return self.rest.held_bytes(rest, tensors) + (self.experts.held_bytes(experts, tensors) if experts else 0)

    def workspace_bytes(self, program: Program, tensors: Mapping[str, Tensor], limits: StageLimits) -> int:
        rest, experts = self.divided(program)
        n_bytes = self.rest.workspace_bytes(rest, _named(tensors, rest), limits)
        if experts is None:
            return n_bytes
        own = _named(tensors, experts)
        return n_bytes + self.experts.experts_workspace_bytes(experts, own, limits, self._lines(experts, limits))

    def divided(self, program: Program) -> tuple[Program, Program | None]:
        return without_experts(program, self.layers), experts_of(program, self.layers)


def _named(tensors: Mapping[str, Tensor], program: Program) -> dict[str, Tensor]:
    return {name: tensors[name] for name in program.weights}


class SplitExpertsStage:
    def __init__(self, rest: ExchangingStage, experts: ExpertsStage, cache: ExpertsCache | None = None) -> None:
        self.rest, self.experts, self.cache = rest, experts, cache
        self.weight_bytes = rest.weight_bytes + experts.weight_bytes
        self.kv_bytes = rest.kv_bytes
        self.workspace_bytes = rest.workspace_bytes + experts.workspace_bytes

    @property
    def weights(self) -> object:
        return self.rest.weights, self.experts.weights

    def run(self, batch: Batch, hidden: Float32 | None) -> Float32:
        with self._mixtures(batch) as experts:
            return self.rest.run(batch, hidden, experts)

    @property
    def ranks_logits(self) -> bool:
        return self.rest.ranks_logits

    def run_ranked(self, batch: Batch, hidden: Float32 | None) -> RankedLogits:
        with self._mixtures(batch) as experts:
            return self.rest.run_ranked(batch, hidden, experts)

    @contextmanager
    def _mixtures(self, batch: Batch) -> Iterator[Experts]:
        cache = self.cache
        if cache is None:
            yield lambda number, x: self.experts.run_mixture(number, batch, x)
            return
        with cache.step():
            yield lambda number, x: cache.run_mixture(number, batch, x)

    def normed(self, rows: Int32) -> Float32:
        return self.rest.normed(rows)

    def close(self) -> None:
        if self.cache is not None:
            self.cache.close()
        self.rest.close()
        self.experts.close()
