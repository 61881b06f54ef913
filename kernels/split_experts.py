"""Experts of some layers on another device than the rest of them: a GPU computes attention, norms, shared experts and
products, a processor the routers and the experts that they choose.

At each mixture of experts, its normed input goes to the processor, and the weighted sum of the experts comes back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import (
    Batch,
    ExchangingBackend,
    ExchangingStage,
    ExpertsBackend,
    ExpertsStage,
    Float32,
    Int32,
    Progress,
    Stage,
)
from llamaclust.model.dataflow import reads_of
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.program import Buffer, Exchange, Moe, Program, Slice, Step


def layer_of(step: Moe) -> int:
    """A step's layer, by the name of its router."""
    return int(step.router.split(".")[1])


def without_experts(program: Program, layers: Collection[int]) -> Program:
    """The program with exchanges in place of the mixtures of these layers."""
    return replace(program, steps=tuple(_exchanged(step) if _is_of(step, layers) else step for step in program.steps))


def experts_of(program: Program, layers: Collection[int]) -> Program | None:
    """The mixtures of these layers alone, each from the hidden state to the result; None where there are none. What
    one reads beside its input stands behind it in the hidden state."""
    mixtures = [step for step in program.steps if isinstance(step, Moe) and _is_of(step, layers)]
    if not mixtures:
        return None
    hidden = Buffer("experts in", sum(buffer.width for buffer in reads_of(mixtures[0])))
    out = Buffer("experts out", mixtures[0].out.width)
    steps = tuple(step for mixture in mixtures for step in _from_hidden(mixture, hidden, out))
    return replace(program, hidden=hidden, out=out, normed=None, steps=steps)


def expert_parts(program: Program) -> Iterator[Program]:
    """Each mixture of such a program, with the steps before it."""
    part: list[Step] = []
    for step in program.steps:
        part.append(step)
        if isinstance(step, Moe):
            yield replace(program, steps=tuple(part))
            part = []


def _is_of(step: Step, layers: Collection[int]) -> bool:
    return isinstance(step, Moe) and layer_of(step) in layers


def _exchanged(step: Step) -> Exchange:
    assert isinstance(step, Moe)
    return Exchange(reads_of(step), step.out)


def _from_hidden(step: Moe, hidden: Buffer, out: Buffer) -> tuple[Step, ...]:
    reads = reads_of(step)
    assert (sum(buffer.width for buffer in reads), step.out.width) == (hidden.width, out.width), "layers alike"
    if step.routed is None:
        return (replace(step, x=hidden, out=out),)
    x, routed = (Buffer(f"experts {name}", buffer.width) for name, buffer in zip(("x", "routed"), reads, strict=True))
    slices = Slice(hidden, x, 0), Slice(hidden, routed, x.width)
    return *slices, replace(step, x=x, routed=routed, out=out)


class SplitExpertsBackend:
    """See `kernels.backend.Backend`. Loads programs on `rest` but for the experts of `layers`, which `experts`
    computes."""

    def __init__(self, rest: ExchangingBackend, experts: ExpertsBackend, layers: Collection[int]) -> None:
        assert rest.numerics_version == experts.numerics_version
        self.numerics_version = rest.numerics_version
        self.name = f"{rest.name}+{experts.name}"
        self.feature_level = f"{rest.feature_level}+{experts.feature_level}"
        self.rest, self.experts, self.layers = rest, experts, layers

    def load(self, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress) -> Stage:
        """What was loaded is freed again where the experts cannot be."""
        rest, experts = self.divided(program)
        if experts is None:
            return self.rest.load(program, tensors, limits, progress)
        with ExitStack() as loaded:
            stage = self.rest.load(rest, _named(tensors, rest), limits, progress)
            loaded.callback(stage.close)
            mixtures = self.experts.load_experts(experts, _named(tensors, experts), limits, progress)
            loaded.pop_all()
        return SplitExpertsStage(stage, mixtures)

    def held_bytes(self, program: Program, tensors: Mapping[str, Tensor]) -> int:
        rest, experts = self.divided(program)
        return self.rest.held_bytes(rest, tensors) + (self.experts.held_bytes(experts, tensors) if experts else 0)

    def workspace_bytes(self, program: Program, tensors: Mapping[str, Tensor], limits: StageLimits) -> int:
        rest, experts = self.divided(program)
        in_ram = self.experts.experts_workspace_bytes(experts, _named(tensors, experts), limits) if experts else 0
        return in_ram + self.rest.workspace_bytes(rest, _named(tensors, rest), limits)

    def divided(self, program: Program) -> tuple[Program, Program | None]:
        """What either device computes."""
        return without_experts(program, self.layers), experts_of(program, self.layers)


def _named(tensors: Mapping[str, Tensor], program: Program) -> dict[str, Tensor]:
    return {name: tensors[name] for name in program.weights}


class SplitExpertsStage:
    """See `kernels.backend.Stage`."""

    def __init__(self, rest: ExchangingStage, experts: ExpertsStage) -> None:
        self.rest, self.experts = rest, experts
        self.weight_bytes = rest.weight_bytes + experts.weight_bytes
        self.kv_bytes = rest.kv_bytes
        self.workspace_bytes = rest.workspace_bytes + experts.workspace_bytes

    @property
    def weights(self) -> object:
        return self.rest.weights, self.experts.weights

    def run(self, batch: Batch, hidden: Float32 | None) -> Float32:
        return self.rest.run(batch, hidden, lambda number, x: self.experts.run_mixture(number, batch, x))

    def normed(self, rows: Int32) -> Float32:
        return self.rest.normed(rows)

    def close(self) -> None:
        self.rest.close()
        self.experts.close()
