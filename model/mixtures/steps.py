"""Mixtures of experts: the step of a whole one, and the steps of one whose experts are on several stages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.row_steps import Buffer
from llamaclust.model.step_options import USUAL_EXPERTS, ExpertOptions

_SHARD = re.compile(r"(?P<whole>.+)\[(?P<inner>:,)?(?P<start>\d+):(?P<end>\d+)\]")


@dataclass(frozen=True, slots=True)
class Moe:
    """Mixture of experts by its `options`. weights = gating(router @ x + router_bias), of which the `used` best are
    chosen (ties to the lower id); they are divided by their sum where `normalized` (at least LEAST_WEIGHT_SUM), then
    multiplied by `scale`. out = sum in rank order of weight * (down_e(activation(gate_e(x), up_e(x))) with the experts'
    biases); without a gate, the activation is a function of up_e(x) alone.

    The choice goes by weights + `selection_bias`, and with more `groups` than one only by experts of the `used_groups`
    groups whose two best of these have the greatest sums (ties to the lower group). `expert_scales` [experts] multiply
    the weights of the chosen experts last. With `routed`, the router reads it instead of x.

    router [experts, x.width, or that of routed]; gate, up [experts, ffn, x.width]; down [experts, x.width, ffn]; biases
    [experts] and [experts, ffn or x.width]. `fused`: up [experts, 2 * ffn, x.width] has the rows of gate, then its own.
    """

    x: Buffer
    out: Buffer
    router: str
    gate: str | None
    up: str
    down: str
    experts: int
    used: int
    ffn_width: int
    options: ExpertOptions = USUAL_EXPERTS
    router_bias: str | None = None
    selection_bias: str | None = None
    gate_bias: str | None = None
    up_bias: str | None = None
    down_bias: str | None = None
    expert_scales: str | None = None
    routed: Buffer | None = None
    fused: bool = False

    @property
    def inner_width(self) -> int:
        """Channels of the products with each of `inner`."""
        return 2 * self.ffn_width if self.fused else self.ffn_width

    @property
    def inner(self) -> tuple[str, ...]:
        """The experts' weights that multiply x."""
        return (self.up,) if self.gate is None else (self.gate, self.up)


@dataclass(frozen=True, slots=True)
class ExpertChoice:
    """The part of a mixture that chooses: out [2 * used] = the ids of the best experts, then their weights."""

    mixture: Moe
    out: Buffer

    @property
    def x(self) -> Buffer:
        """What the router reads."""
        return self.mixture.routed or self.mixture.x

    @property
    def weights(self) -> Iterator[str | None]:
        mixture = self.mixture
        yield from (mixture.router, mixture.router_bias, mixture.selection_bias, mixture.expert_scales)


@dataclass(frozen=True, slots=True)
class ExpertShards:
    """The part of a mixture that computes experts, of which it has `shards`, ranges one behind the other: their
    results, not yet weighed, each at the rank that `choice` has for the expert. Those of other experts are taken from
    the end of `given`, or 0.

    out = the results [used * width of the mixture's out]; or, for another stage, `carried` buffers, the choice and the
    results, one behind the other.
    """

    mixture: Moe
    choice: Buffer
    out: Buffer
    shards: tuple[range, ...]
    given: Buffer | None = None
    carried: tuple[Buffer, ...] | None = None

    @property
    def x(self) -> Buffer:
        return self.mixture.x

    @property
    def experts(self) -> range:
        """All that it has."""
        return range(self.shards[0].start, self.shards[-1].stop)

    @property
    def results_width(self) -> int:
        return self.mixture.used * self.mixture.out.width

    @property
    def biases(self) -> tuple[str | None, ...]:
        """Of each of `inner`."""
        return (self.mixture.up_bias,) if self.mixture.gate is None else (self.mixture.gate_bias, self.mixture.up_bias)

    @property
    def weights(self) -> Iterator[str | None]:
        mixture = self.mixture
        for name in (*mixture.inner, mixture.down, *self.biases, mixture.down_bias):
            yield from () if name is None else (shard_name(name, shard) for shard in self.shards)


@dataclass(frozen=True, slots=True)
class ExpertInner:
    """The part of a mixture before its down products: out = activation(gate_e(x), up_e(x)) of each expert e of the
    choice, one behind the other by rank [used * ffn_width]."""

    mixture: Moe
    choice: Buffer
    out: Buffer

    @property
    def x(self) -> Buffer:
        return self.mixture.x

    @property
    def weights(self) -> Iterator[str | None]:
        mixture = self.mixture
        yield from (*mixture.inner, mixture.gate_bias, mixture.up_bias)


@dataclass(frozen=True, slots=True)
class ExpertDown:
    """The part of a mixture with its down products: out = down_e(x_e) of each expert of the choice by rank [used *
    width of the mixture's out], not yet weighed; x [used * ffn_width]."""

    mixture: Moe
    choice: Buffer
    x: Buffer
    out: Buffer

    @property
    def weights(self) -> tuple[str | None, ...]:
        return self.mixture.down, self.mixture.down_bias


@dataclass(frozen=True, slots=True)
class ExpertSum:
    """The part of a mixture that adds: out = sum in rank order of weight * result."""

    mixture: Moe
    choice: Buffer
    x: Buffer

    @property
    def out(self) -> Buffer:
        return self.mixture.out

    @property
    def weights(self) -> tuple[str, ...]:
        return ()


def shard_name(name: str, part: range) -> str:
    """Of a part of a tensor, or of a part of one, in its slowest dimension: experts, or rows of a matrix."""
    found = _SHARD.fullmatch(name)
    if found is not None:
        assert found["inner"] is None, name
        name, start = found["whole"], int(found["start"])
        part = range(start + part.start, start + part.stop)
    return f"{name}[{part.start}:{part.stop}]"


def rows_name(name: str, rows: range) -> str:
    """Of some rows of each expert's matrix, or channels of each expert's bias."""
    assert _SHARD.fullmatch(name) is None, name
    return f"{name}[:,{rows.start}:{rows.stop}]"


def whole_name(name: str) -> str:
    """Of the tensor that a name is a part of, or itself."""
    found = _SHARD.fullmatch(name)
    return name if found is None else found["whole"]


def shard_of(tensor: Tensor, name: str) -> Tensor:
    """The part of a tensor that has this name, or all of it."""
    found = _SHARD.fullmatch(name)
    if found is None:
        return tensor
    outer, inner = tensor.shape[: found["inner"] is not None], tensor.shape[found["inner"] is not None :]
    start, end, count = int(found["start"]), int(found["end"]), inner[0]
    head_rows = count // tensor.paired_heads if tensor.paired_heads else 1
    assert 0 <= start < end <= count and start % head_rows == end % head_rows == 0, (name, tensor.shape)
    stride = tensor.n_bytes // prod(outer)
    each = stride // count
    return replace(
        tensor,
        name=name,
        shape=(*outer, end - start, *inner[1:]),
        offset=tensor.offset + start * each,
        n_bytes=prod(outer) * (end - start) * each,
        stride_bytes=stride if outer else 0,
        paired_heads=(end - start) // head_rows if tensor.paired_heads else 0,
        content=None,
    )
