"""Mixtures of experts: one step for a whole mixture, and several steps for a mixture that workers divide."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from llamaclust.model.shard_names import rows_name, shard_name
from llamaclust.model.steps.options import USUAL_EXPERTS, ExpertOptions
from llamaclust.model.steps.step import Buffer, DivisionRule, StepFacts, StepWeight, Units, WeightKind, optional_weight


@dataclass(frozen=True, slots=True)
class Moe(StepFacts):
    """A mixture of experts. weights = gating(router @ x + router_bias). The `used` experts with the greatest weights
    are chosen, and the lower id wins ties. If `normalized`, the chosen weights are divided by their sum (or by
    LEAST_WEIGHT_SUM if that is greater). Then they are multiplied by `scale` and by `expert_scales` [experts]. out =
    the sum of weight * down_e(activation(gate_e(x), up_e(x))), best expert e first, with the experts' biases. Without a
    gate, the activation is a function of up_e(x) only. If `routed` is given, the router reads `routed` instead of x.

    If there is a `selection_bias`, experts are chosen by weights + `selection_bias`. With several `groups`, only
    experts in the best `used_groups` groups are candidates. The best groups have the greatest sums of their two best
    experts. The lower group wins ties.

    router is [experts, width of x or routed]. gate and up are [experts, ffn, x.width]. down is [experts, out.width,
    ffn]. Biases are [experts], and [experts, ffn or out.width]. If `fused`, up is [experts, 2 * ffn, x.width], with the
    rows of gate first."""

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
    def reads(self) -> tuple[Buffer, ...]:
        return (self.x,) if self.routed is None else (self.x, self.routed)

    @property
    def mixture(self) -> Moe:
        return self

    @property
    def layer(self) -> int:
        return int(self.router.split(".")[1])

    @property
    def inner_width(self) -> int:
        return 2 * self.ffn_width if self.fused else self.ffn_width

    @property
    def inner(self) -> tuple[str, ...]:
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def inner_biases(self) -> tuple[str | None, ...]:
        return (self.up_bias,) if self.gate is None else (self.gate_bias, self.up_bias)

    @property
    def biases(self) -> tuple[str, ...]:
        return tuple(name for name in (self.gate_bias, self.up_bias, self.down_bias) if name is not None)

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        return *self.choice_weights, *self.inner_weights, *self.down_weights

    @property
    def choice_weights(self) -> tuple[StepWeight, ...]:
        router = StepWeight(self.router, (self.experts, (self.routed or self.x).width), WeightKind.ROUTER)
        vectors = self.router_bias, self.selection_bias, self.expert_scales
        return router, *(weight for name in vectors for weight in optional_weight(name, self.experts))

    @property
    def inner_weights(self) -> tuple[StepWeight, ...]:
        found: list[StepWeight] = []
        for name, bias in zip(self.inner, self.inner_biases, strict=True):
            found.append(self._matrix(name, self.inner_width, self.x.width))
            found += optional_weight(bias, self.experts, self.ffn_width)
        return tuple(found)

    @property
    def down_weights(self) -> tuple[StepWeight, ...]:
        matrix = self._matrix(self.down, self.out.width, self.ffn_width)
        return matrix, *optional_weight(self.down_bias, self.experts, self.out.width)

    def _matrix(self, name: str, rows: int, columns: int) -> StepWeight:
        return StepWeight(name, (self.experts, rows, columns), WeightKind.EXPERTS, self.used, self.experts)

    def portion_of_inner(self, own: Units) -> Moe:
        rows, ffn_width = own.of(self.ffn_width), self.ffn_width
        up, gate = rows, None if self.gate is None else rows_name(self.gate, rows)
        if self.fused:
            assert self.up_bias is None
            up, gate = range(rows.start + ffn_width, rows.stop + ffn_width), rows_name(self.up, rows)
        return replace(
            self,
            ffn_width=len(rows),
            gate=gate,
            up=rows_name(self.up, up),
            fused=False,
            gate_bias=_rows_of(self.gate_bias, rows),
            up_bias=_rows_of(self.up_bias, rows),
        )

    def portion_of_down(self, own: Units) -> Moe:
        rows = own.of(self.out.width)
        bias = _rows_of(self.down_bias, rows)
        return replace(self, out=own.own(self.out), down=rows_name(self.down, rows), down_bias=bias)


def _rows_of(name: str | None, rows: range) -> str | None:
    return None if name is None else rows_name(name, rows)


@dataclass(frozen=True, slots=True)
class ExpertChoice(StepFacts):
    """Chooses experts. out [2 * used] has the ids of the chosen experts, best first, followed by their weights."""

    mixture: Moe
    out: Buffer

    @property
    def x(self) -> Buffer:
        return self.mixture.routed or self.mixture.x

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return (self.x,)

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        return self.mixture.choice_weights


@dataclass(frozen=True, slots=True)
class ExpertShards(StepFacts):
    """Computes those chosen experts whose ids are in `shards` (consecutive ranges). out has the unweighted results of
    all `used` chosen experts, best first. Results of experts outside `shards` are copied from the last channels of
    `given`, or are 0 without `given`. If `carried` is set, out has the `carried` buffers, `choice` and the results, for
    the next stage."""

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
        return range(self.shards[0].start, self.shards[-1].stop)

    @property
    def results_width(self) -> int:
        return self.mixture.used * self.mixture.out.width

    @property
    def reads(self) -> tuple[Buffer, ...]:
        given = () if self.given is None else (self.given,)
        return self.x, self.choice, *given, *(self.carried or ())

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        return tuple(
            replace(weight, name=shard_name(weight.name, shard), shape=(len(shard), *weight.shape[1:]))
            for weight in (*self.mixture.inner_weights, *self.mixture.down_weights)
            for shard in self.shards
        )


@dataclass(frozen=True, slots=True)
class ExpertInner(StepFacts):
    """Computes out [used * ffn_width] = activation(gate_e(x), up_e(x)) of the chosen experts e, best first."""

    mixture: Moe
    choice: Buffer
    out: Buffer

    @property
    def x(self) -> Buffer:
        return self.mixture.x

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return self.x, self.choice

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        return self.mixture.inner_weights

    @property
    def division(self) -> DivisionRule:
        return DivisionRule(rows=self.mixture.ffn_width, lines=self.mixture.used, has_part=True)

    def portion(self, own: Units) -> Self:
        return replace(self, mixture=self.mixture.portion_of_inner(own))


@dataclass(frozen=True, slots=True)
class ExpertDown(StepFacts):
    """Computes the down projections of the chosen experts, best first: out [used * width] = down_e(x_e), where
    width is the width of `mixture.out`. x [used * ffn_width] is the result of `ExpertInner`. `ExpertSum` applies the
    weights."""

    mixture: Moe
    choice: Buffer
    x: Buffer
    out: Buffer

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return self.x, self.choice

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        return self.mixture.down_weights

    @property
    def sent_format(self) -> str:
        return self.mixture.down

    @property
    def division(self) -> DivisionRule:
        return DivisionRule(rows=self.mixture.out.width, lines=self.mixture.used, has_part=True)

    def portion(self, own: Units) -> Self:
        return replace(self, mixture=self.mixture.portion_of_down(own))


@dataclass(frozen=True, slots=True)
class ExpertSum(StepFacts):
    """Adds the chosen experts' results, best first: out = the sum of weight * result."""

    mixture: Moe
    choice: Buffer
    x: Buffer

    @property
    def out(self) -> Buffer:
        return self.mixture.out

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return self.x, self.choice

    @property
    def division(self) -> DivisionRule:
        return DivisionRule((self.x,))

    def portion(self, own: Units) -> Self:
        return replace(self, mixture=self.mixture.portion_of_down(own))
