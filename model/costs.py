"""Costs of steps, layers and models: bytes of weights, KV memory and states, and multiply-accumulates (MACs)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from operator import attrgetter

from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.program import Attention, MixtureStep, Moe, Program, SelectRows, Step, weights_of
from llamaclust.model.quant_types import ActivationFormat, QuantType
from llamaclust.model.steps.step import StepWeight, WeightKind

resident_bytes = attrgetter("resident_bytes")
file_bytes = attrgetter("n_bytes")


@dataclass(frozen=True, slots=True)
class TypedWeights:
    """The matrices of one quant type: their total bytes in memory, and their multiply-accumulates for one row."""

    quant_type: QuantType
    n_bytes: int
    macs: int


def typed_weights(tensors: Mapping[str, Tensor], steps: Iterable[Step], *, experts: bool) -> tuple[TypedWeights, ...]:
    """Returns totals by quant type. They cover the EXPERTS weights if `experts`, and otherwise the MATRIX weights."""
    n_bytes, products = Counter[QuantType](), Counter[QuantType]()
    kind = WeightKind.EXPERTS if experts else WeightKind.MATRIX
    seen = set[str]()
    for weight in _weights(steps, kind):
        quant_type = tensors[weight.name].tile_type
        n_bytes[quant_type] += 0 if weight.name in seen else tensors[weight.name].resident_bytes
        products[quant_type] += weight.macs
        seen.add(weight.name)
    return tuple(TypedWeights(kind, n_bytes[kind], products[kind]) for kind in sorted(products))


def _weights(steps: Iterable[Step], kind: WeightKind) -> Iterator[StepWeight]:
    return (weight for step in steps for weight in step.weights if weight.kind is kind)


def weight_bytes(
    tensors: Mapping[str, Tensor], steps: Iterable[Step], size: Callable[[Tensor], int] = resident_bytes
) -> int:
    return sum(size(tensors[name]) for name in weights_of(steps))


def idle_bytes(tensors: Mapping[str, Tensor], steps: Iterable[Step], size: Callable[[Tensor], int]) -> int:
    idle = 0
    for step in _of_mixtures(steps):
        held = sum(size(tensors[weight.name]) for weight in _weights([step], WeightKind.EXPERTS))
        idle += held * (step.mixture.experts - step.mixture.used) // step.mixture.experts
    return idle


def idle_share(steps: Iterable[Step]) -> float:
    return next((1 - step.mixture.used / step.mixture.experts for step in _of_mixtures(steps)), 0.0)


def _of_mixtures(steps: Iterable[Step]) -> Iterator[Moe | MixtureStep]:
    return (step for step in steps if isinstance(step, Moe | MixtureStep))


def float_macs(tensors: Mapping[str, Tensor], steps: Iterable[Step]) -> int:
    return sum(
        step.state_macs
        + sum(
            weight.macs
            for weight in step.weights
            if tensors[weight.name].quant_type.info.activation is ActivationFormat.F32
        )
        for step in steps
    )


def all_macs(steps: Iterable[Step]) -> int:
    return sum(step.state_macs + sum(weight.macs for weight in step.weights) for step in steps)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """The cost of a layer, or of a part of a layer. `idle_bytes` is the size of the experts that a token does not use.
    `idle_share` is the fraction of experts that a token does not use. `used_file_bytes` is the file size of the weights
    that a token uses. Multiply-accumulates (`macs`) exclude attention."""

    weight_bytes: int
    macs_per_token: int
    kv_bytes_per_token: int
    idle_bytes: int = 0
    idle_share: float = 0.0
    float_macs_per_token: int = 0
    used_file_bytes: int = 0
    state_bytes: int = 0  # Size of one sequence's state.
    window: int | None = None  # Window of the layer's attention in tokens. None means no window.
    window_bytes_per_token: int = 0  # The part of `kv_bytes_per_token` that is freed outside the window.
    kv_source: int | None = None  # Number of another layer whose keys and values this layer reads.
    expert_bytes: int = 0  # The part of `weight_bytes` for the router and the experts.
    expert_macs_per_token: int = 0
    is_joined: bool = False  # True if no stage may begin at this layer or part.
    # Bytes by which one stage with the whole layer is smaller than stages with its parts. Set in the first part.
    saved_bytes: int = 0
    state_macs_per_token: int = 0  # The part of `float_macs_per_token` that updates states.
    weights: tuple[TypedWeights, ...] = ()  # Matrices that multiply rows, without those of experts.
    expert_weights: tuple[TypedWeights, ...] = ()

    def moved_bytes(self, rows: int, sequences: int) -> float:
        return self.touched_bytes(rows) + 2 * sequences * self.state_bytes

    def touched_bytes(self, rows: int) -> float:
        """Returns the expected weight bytes that a step of `rows` rows reads if each row chooses experts at random."""
        return self.weight_bytes - self._idle_bytes(rows)

    def read_file_bytes(self, rows: int) -> float:
        """Returns the expected file size of the weights that a step of `rows` rows reads. For experts that the first
        row does not use, counts the size in memory instead."""
        return self.used_file_bytes + self.touched_bytes(rows) - self.touched_bytes(1)

    def touched_expert_bytes(self, rows: int) -> float:
        return self.expert_bytes - self._idle_bytes(rows)

    def touched_share(self, rows: int) -> float:
        return 1 - self.idle_share**rows

    def _idle_bytes(self, rows: int) -> float:
        return self.idle_bytes * self.idle_share ** (rows - 1)


JOINED = LayerCost(0, 0, 0, is_joined=True)
"""The cost of all but the first part of a layer that cannot be divided. The first part has the layer's whole cost."""


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """The costs of a model. The first stage has the embedding, and the last stage has the head. `tied_bytes` is the
    size of tensors that embedding and head share. A single stage holds these tensors only once."""

    embedding_bytes: int
    head_bytes: int
    head_macs: int
    layers: tuple[LayerCost, ...]
    float_head_macs: int = 0
    head_file_bytes: int = 0
    hidden_bytes: int = 0  # Bytes that a stage sends to the next stage for each token.
    cut_bytes: int = 0  # Maximum bytes per token that a stage sends if it ends inside a layer.
    expert_shards: int = 1  # Number of entries in `layers` for each layer.
    nextn_bytes: int = 0  # Size of the MTP head's weights outside its layer, in the last stage.
    nextn_embedding_bytes: int = 0  # Size of the embedding that an MTP head needs in a last stage that is not first.
    head_weights: tuple[TypedWeights, ...] = ()
    tied_bytes: int = 0

    @property
    def quant_types(self) -> tuple[QuantType, ...]:
        of_layers = (weights for layer in self.layers for weights in (*layer.weights, *layer.expert_weights))
        return tuple(sorted({weights.quant_type for weights in (*of_layers, *self.head_weights)}))

    @property
    def borders(self) -> tuple[int, ...]:
        """The layer numbers at which a stage may begin, followed by the layer count."""
        shared = [(layer.kv_source, number) for number, layer in enumerate(self.layers) if layer.kv_source is not None]
        sources = ((source * self.expert_shards, number) for source, number in shared)
        between = {border for source, number in sources for border in range(source + 1, number + 1)}
        between |= {number for number, layer in enumerate(self.layers) if layer.is_joined}
        return tuple(border for border in range(len(self.layers) + 1) if border not in between)

    @property
    def kv_token_bytes(self) -> int:
        return sum(layer.kv_bytes_per_token for layer in self.layers)

    @property
    def state_bytes(self) -> int:
        return sum(layer.state_bytes for layer in self.layers)

    @property
    def window(self) -> int | None:
        return max((layer.window for layer in self.layers if layer.window is not None), default=None)


def layer_cost(tensors: Mapping[str, Tensor], program: Program) -> LayerCost:
    before_head = takewhile(partial(is_before_head, program), program.steps)
    return steps_cost(tensors, replace(program, steps=tuple(step for step in before_head if not step.is_embedding)))


def steps_cost(tensors: Mapping[str, Tensor], program: Program) -> LayerCost:
    steps = program.steps
    mixtures = list(_of_mixtures(steps))
    return LayerCost(
        weight_bytes=weight_bytes(tensors, steps),
        macs_per_token=all_macs(steps),
        kv_bytes_per_token=sum(kept.kv_token_bytes for kept in program.kv_layers),
        idle_bytes=idle_bytes(tensors, steps, resident_bytes),
        idle_share=idle_share(steps),
        window=program.window,
        state_bytes=sum(kept.n_bytes for kept in program.states),
        window_bytes_per_token=sum(kept.kv_token_bytes for kept in program.kv_layers if kept.window is not None),
        float_macs_per_token=float_macs(tensors, steps),
        used_file_bytes=weight_bytes(tensors, steps, file_bytes) - idle_bytes(tensors, steps, file_bytes),
        kv_source=next((step.layer for step in steps if isinstance(step, Attention) and step.shares_kv), None),
        expert_bytes=weight_bytes(tensors, mixtures),
        expert_macs_per_token=all_macs(mixtures),
        state_macs_per_token=sum(step.state_macs for step in steps),
        weights=typed_weights(tensors, steps, experts=False),
        expert_weights=typed_weights(tensors, steps, experts=True),
    )


def is_before_head(program: Program, step: Step) -> bool:
    """Returns True for each step before the output head, and False for the head's first step."""
    has_norm = program.normed is not None and program.normed != program.hidden
    return not isinstance(step, SelectRows) and not (has_norm and step.out == program.normed)
