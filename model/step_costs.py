"""What steps cost: bytes of their weights, those that a token does not read, and multiply-accumulates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from operator import attrgetter

from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.mixtures.steps import shard_name, whole_name
from llamaclust.model.program import (
    Adapt,
    Convolution,
    DeltaRule,
    ExpertChoice,
    ExpertShards,
    HeadMatMul,
    MatMul,
    MixtureStep,
    Moe,
    Scan,
    Step,
    weights_of,
)
from llamaclust.model.quant_types import ActivationFormat

resident_bytes = attrgetter("resident_bytes")
file_bytes = attrgetter("n_bytes")


def weight_bytes(
    tensors: Mapping[str, Tensor], steps: Iterable[Step], size: Callable[[Tensor], int] = resident_bytes
) -> int:
    return sum(size(tensors[name]) for name in weights_of(steps))


def idle_bytes(tensors: Mapping[str, Tensor], steps: Iterable[Step], size: Callable[[Tensor], int]) -> int:
    """Of the experts that a token does not choose."""
    idle = 0
    for step in steps:
        if isinstance(step, Moe | ExpertShards):
            mixture = step if isinstance(step, Moe) else step.mixture
            held = sum(size(tensors[name]) for name in _expert_matrices(step))
            idle += held * (mixture.experts - mixture.used) // mixture.experts
    return idle


def idle_share(steps: Iterable[Step]) -> float:
    """Of the layer's experts, those that a token does not choose. No layer has two mixtures."""
    return next((1 - step.used / step.experts for step in map(_mixture, steps) if step is not None), 0.0)


def _mixture(step: Step) -> Moe | None:
    return step.mixture if isinstance(step, MixtureStep) else step if isinstance(step, Moe) else None


def _expert_matrices(step: Moe | ExpertShards) -> Iterator[str]:
    for name in (*step.inner, step.down) if isinstance(step, Moe) else (*step.mixture.inner, step.mixture.down):
        yield from (name,) if isinstance(step, Moe) else (shard_name(name, shard) for shard in step.shards)


def float_macs(tensors: Mapping[str, Tensor], steps: Iterable[Step]) -> int:
    counts = (named for step in steps for named in macs(step))
    return sum(
        count
        for name, count in counts
        if name is None or tensors[name].quant_type.info.activation is ActivationFormat.F32
    )


def macs(step: Step) -> Sequence[tuple[str | None, int]]:
    """Multiply-accumulates of each of the step's weights for one row; None: those of a state, in float32."""
    match step:
        case MatMul():
            return [(step.weight, step.x.width * step.out.width)]
        case HeadMatMul():
            return [(step.weight, prod(step.shape))]
        case Adapt():
            return [(step.down, step.x.width * step.rank), (step.up, step.rank * step.out.width)]
        case Convolution():
            return [(step.weight, step.x.width * step.taps)]
        case DeltaRule():
            return [(None, 4 * prod(step.shape))]
        case Scan():
            return [(None, 3 * step.out.width * step.state_size)]
        case Moe():
            down = step.used * step.ffn_width * step.out.width
            inner = [(name, step.x.width * step.used * step.inner_width) for name in step.inner]
            return [(step.router, (step.routed or step.x).width * step.experts), *inner, (step.down, down)]
        case ExpertChoice():
            return [(step.mixture.router, step.x.width * step.mixture.experts)]
        case ExpertShards():
            return [(name, _shard_macs(step, name)) for name in _expert_matrices(step)]
        case _:
            return []


def _shard_macs(step: ExpertShards, name: str) -> int:
    """Of a token that chooses experts evenly."""
    mixture, (start, end) = step.mixture, map(int, re.findall(r"\d+", name.rpartition("[")[2]))
    is_down = whole_name(name) == mixture.down
    size = mixture.ffn_width * mixture.out.width if is_down else mixture.inner_width * mixture.x.width
    return mixture.used * size * (end - start) // mixture.experts


def all_macs(steps: Iterable[Step]) -> int:
    return sum(count for step in steps for _, count in macs(step))
