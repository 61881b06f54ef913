"""Costs of the members of a group: each layer's divided parts, and the gathers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, takewhile

from llamaclust.model.costs import (
    LayerCost,
    ModelCosts,
    TypedWeights,
    is_before_head,
    steps_cost,
    weight_bytes,
)
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.groups.formats import format_of_readers
from llamaclust.model.groups.portions import Division, Gathered, borders
from llamaclust.model.program import Embed, Program, Step
from llamaclust.model.quant_types import ActivationFormat, QuantType

TensorsFor = Callable[[Program], Mapping[str, Tensor]]

_SUMS = (
    *("weight_bytes", "macs_per_token", "kv_bytes_per_token", "idle_bytes", "float_macs_per_token", "used_file_bytes"),
    *("state_bytes", "window_bytes_per_token", "expert_bytes", "expert_macs_per_token", "state_macs_per_token"),
)


@dataclass(frozen=True, slots=True)
class GatherCost:
    """An exchange in which the members of a group send each other the channels that they computed. A row consists of
    `lines` parts of `width` channels, and members divide each part into `units` equal units. Values are sent in the
    quantized format `form` if each member has whole blocks of this format, and otherwise as float32. If `to_leader`,
    only the leader receives. If `from_leader`, only the leader sends."""

    width: int
    units: int
    lines: int = 1
    form: ActivationFormat | None = None
    to_leader: bool = False
    from_leader: bool = False

    def sent_bytes(self, shares: Sequence[float]) -> tuple[int, ...]:
        if self.from_leader:
            return self.lines * _bytes(self.width, None), *(0 for _ in shares[1:])
        places = [self.width // self.units * place for place in borders(self.units, shares)]
        form = None if self.form is None or any(place % self.form for place in places) else self.form
        return tuple(self.lines * _bytes(end - begin, form) for begin, end in pairwise(places))


@dataclass(frozen=True, slots=True)
class PortionCost:
    """A part of a layer that members of a group divide into `units`. `cost` is the total cost of all units."""

    units: int
    cost: LayerCost

    def of(self, count: int) -> LayerCost:
        cost = self.cost
        sums = {name: getattr(cost, name) * count // self.units for name in _SUMS}
        return replace(
            cost,
            weights=self._typed(cost.weights, count),
            expert_weights=self._typed(cost.expert_weights, count),
            **sums,
        )

    def _typed(self, weights: Sequence[TypedWeights], count: int) -> tuple[TypedWeights, ...]:
        return tuple(
            TypedWeights(each.quant_type, each.n_bytes * count // self.units, each.macs * count // self.units)
            for each in weights
        )


@dataclass(frozen=True, slots=True)
class DividedLayer:
    """The costs of a layer or of the head. Each member has the cost `whole` and its share of all `portions`."""

    whole: LayerCost
    portions: tuple[PortionCost, ...]
    gathers: tuple[GatherCost, ...]

    def member(self, shares: Sequence[float], member: int) -> LayerCost:
        found = [self.whole]
        for portion in self.portions:
            places = borders(portion.units, shares)
            found.append(portion.of(places[member + 1] - places[member]))
        return _total(found)


@dataclass(frozen=True, slots=True)
class EmbeddingCost:
    """The costs before the first layer. The leader has the token embeddings and sends rows to the other members. Every
    member has the other tables, such as position embeddings, which take `whole_bytes`."""

    whole_bytes: int
    gathers: tuple[GatherCost, ...]


@dataclass(frozen=True, slots=True)
class GroupCosts:
    """The costs of a model that a group of `members` workers divides. The head is listed separately from the layers."""

    members: int
    model: ModelCosts
    layers: tuple[DividedLayer, ...]
    head: DividedLayer
    embedding: EmbeddingCost

    @classmethod
    def of(cls, model: ModelCosts, layers: Sequence[Program], tensors_for: TensorsFor, members: int) -> GroupCosts:
        alike: dict[DividedLayer, DividedLayer] = {}
        divided = [_DividedProgram.of(program, tensors_for, members) for program in layers]
        costs = [layer.layer_cost() for layer in divided]
        shared = tuple(alike.setdefault(cost, cost) for cost in costs)
        return cls(members, model, shared, divided[-1].head_cost(), divided[0].embedding_cost())

    @property
    def kinds(self) -> dict[int, DividedLayer]:
        """The distinct layers, by their Python `id`."""
        return {id(layer): layer for layer in self.layers}

    def member(self, shares: Sequence[float], member: int) -> ModelCosts:
        assert len(shares) == self.members
        costs = {kind: layer.member(shares, member) for kind, layer in self.kinds.items()}
        head = self.head.member(shares, member)
        found = replace(
            self.model,
            layers=tuple(costs[id(layer)] for layer in self.layers),
            head_bytes=head.weight_bytes,
            head_macs=head.macs_per_token,
            float_head_macs=head.float_macs_per_token,
            head_file_bytes=head.used_file_bytes,
            head_weights=head.weights,
            tied_bytes=0 if self.head.portions else self.model.tied_bytes,
        )
        return self.of_follower(found) if member else found

    def of_follower(self, leader: ModelCosts) -> ModelCosts:
        return replace(leader, embedding_bytes=self.embedding.whole_bytes, tied_bytes=0)


@dataclass(frozen=True, slots=True)
class _DividedProgram:
    division: Division
    tensors: Mapping[str, Tensor]
    head: int

    @classmethod
    def of(cls, program: Program, tensors_for: TensorsFor, members: int) -> _DividedProgram:
        division = Division.of(program, members)
        steps = tuple(divided.step for divided in division.steps)
        head = sum(1 for _ in takewhile(partial(is_before_head, program), steps))
        return cls(division, tensors_for(replace(program, steps=steps)), head)

    def layer_cost(self) -> DividedLayer:
        return self._costs(range(self.head), () if self.program.is_last else self.division.gathered)

    def embedding_cost(self) -> EmbeddingCost:
        embedding = [divided.step for divided in self.division.steps if divided.step.is_embedding]
        tables = [step for step in embedding if isinstance(step, Embed)]
        whole = [step for step in embedding if not isinstance(step, Embed)]
        gathers = (GatherCost(step.out.width, 1, from_leader=True) for step in tables)
        return EmbeddingCost(weight_bytes(self.tensors, whole), tuple(gathers))

    def head_cost(self) -> DividedLayer:
        return self._costs(range(self.head, len(self.division.steps)), self.division.gathered)

    @property
    def program(self) -> Program:
        return self.division.program

    def _costs(self, numbers: range, results: Sequence[Gathered]) -> DividedLayer:
        steps: dict[int, list[Step]] = {0: []}
        gathers: list[GatherCost] = []
        for number in numbers:
            divided = self.division.steps[number]
            units = divided.units if divided.step.division.has_part else 0
            if not divided.step.is_embedding:
                steps.setdefault(units, []).append(divided.step)
            gathers += (self._gather(gathered, number) for gathered in divided.gathered)
        gathers += (self._gather(gathered, len(self.division.steps)) for gathered in results)
        whole, *portions = (PortionCost(units, self._cost(found)) for units, found in sorted(steps.items()))
        alike: dict[GatherCost, GatherCost] = {}
        return DividedLayer(whole.cost, tuple(portions), tuple(alike.setdefault(each, each) for each in gathers))

    def _cost(self, steps: Sequence[Step]) -> LayerCost:
        return steps_cost(self.tensors, replace(self.program, steps=tuple(steps)))

    def _gather(self, gathered: Gathered, number: int) -> GatherCost:
        buffer, lines = gathered.buffer, gathered.lines
        is_logits = self.program.has_logits and buffer == self.program.out
        form = format_of_readers(
            [divided.step for divided in self.division.steps[number:]],
            buffer,
            (self.program.out, self.program.normed),
            lambda name: self.tensors[name].quant_type,
        )
        return GatherCost(buffer.width // lines, gathered.units, lines, form, is_logits)


def _bytes(channels: int, form: ActivationFormat | None) -> int:
    return 4 * channels if form is None else channels + 4 * (channels // form)


def _total(costs: Sequence[LayerCost]) -> LayerCost:
    first = costs[0]
    windows = [cost.window for cost in costs if cost.window is not None]
    return replace(
        first,
        idle_share=max(cost.idle_share for cost in costs),
        window=max(windows, default=None),
        kv_source=next((cost.kv_source for cost in costs if cost.kv_source is not None), None),
        weights=_merged(weights for cost in costs for weights in cost.weights),
        expert_weights=_merged(weights for cost in costs for weights in cost.expert_weights),
        **{name: sum(getattr(cost, name) for cost in costs) for name in _SUMS},
    )


def _merged(weights: Iterable[TypedWeights]) -> tuple[TypedWeights, ...]:
    n_bytes, products = Counter[QuantType](), Counter[QuantType]()
    for each in weights:
        n_bytes[each.quant_type] += each.n_bytes
        products[each.quant_type] += each.macs
    return tuple(TypedWeights(kind, n_bytes[kind], products[kind]) for kind in sorted(products))
