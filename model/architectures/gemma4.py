"""Gemma 4: layers of two kinds, whose heads, rotations and windows differ; experts beside a feed-forward network; in
the E models inputs per layer, and layers that read the keys and values of others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from llamaclust.model import program as ir
from llamaclust.model.architectures.experts import ExpertsVariant, expert_step, read_experts
from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.architectures.positions import rope_table
from llamaclust.model.hyperparameters import SHARED_KV_KEY, ModelKeys, RopeScaling
from llamaclust.model.program import Buffer, RopeTable
from llamaclust.model.step_options import ActivationFunction, GatedActivation, Gating, RopeStyle

_PERIOD = 6
_MAX_CAP = 1e6
_MAX_HEAD = 1 << 12
_MAX_INPUT = 1 << 12


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Channels of a head, rotation and window of windowed layers, or of the others."""

    head_dim: int
    table: RopeTable
    window: int | None = None


def gemma4(builder: ProgramBuilder) -> None:
    """Scores are not scaled; values are normed without a weight, and are the keys of layers that have none; each
    layer's result is multiplied by a number of the file."""
    hp, keys = builder.hyperparameters, builder.keys
    if hp.sliding_window is None:
        raise keys.error("attention.sliding_window", "missing")
    final_cap = keys.real("final_logit_softcapping", 0.0, minimum=0.0, maximum=_MAX_CAP)
    windowed = keys.windowed_layers(hp.block_count, _PERIOD)
    full, part = _kinds(builder, hp.sliding_window)
    experts, inputs = _experts(builder), LayerInputs.of(builder)
    sources = shared_kv_sources(keys, windowed)
    if inputs is not None:
        builder.given = inputs.given
    for layer in builder.layers(math.sqrt(hp.embedding_length), soft_cap=final_cap or None):
        if inputs is not None and layer == inputs.first:
            builder.append(inputs.begin())
        kind = part if windowed[layer] else full
        builder.append(_Layer(builder, layer, kind, experts, sources[layer], inputs).steps())
        if inputs is not None and layer + 1 == inputs.end < hp.block_count:
            builder.append(inputs.join())
            builder.out = inputs.sent


def _kinds(builder: ProgramBuilder, window: int) -> tuple[LayerKind, LayerKind]:
    """Layers that see everything, whose rotation has the file's factors, and those with a window."""
    hp, keys = builder.hyperparameters, builder.keys
    head_dim = keys.count("attention.key_length_swa", hp.key_length, maximum=_MAX_HEAD)
    value_length = keys.count("attention.value_length_swa", head_dim, maximum=_MAX_HEAD)
    if value_length != head_dim:
        raise keys.error("attention.value_length_swa", f"{value_length}, keys have {head_dim}: not supported")
    rope = replace(
        hp.rope,
        dimension_count=keys.count("rope.dimension_count_swa", head_dim, maximum=head_dim),
        frequency_base=keys.real("rope.freq_base_swa", 10000.0, minimum=1.0, maximum=1e12),
        scaling=RopeScaling.NONE,
        factor=1.0,
    )
    if rope.dimension_count % 2:
        raise keys.error("rope.dimension_count_swa", f"{rope.dimension_count}, an even number expected")
    return LayerKind(hp.key_length, builder.rope_table()), LayerKind(head_dim, rope_table(rope), window)


def _experts(builder: ProgramBuilder) -> ExpertsVariant:
    """The weights of the chosen are normed in any case; the number of groups, and others, as files say."""
    return read_experts(
        builder.keys, builder.hyperparameters, gating=Gating.SOFTMAX, activation=GatedActivation.GELU_MUL
    )


def shared_kv_sources(keys: ModelKeys, windowed: Sequence[bool]) -> list[int]:
    """The layer whose keys and values each layer reads: its own, or of the last layers the last one of its kind before
    them."""
    layers = len(windowed)
    first = layers - keys.count(SHARED_KV_KEY, 0, minimum=0, maximum=layers - 1)
    last = {windowed[layer]: layer for layer in range(first)}
    for layer in range(first, layers):
        if windowed[layer] not in last:
            raise keys.error(SHARED_KV_KEY, f"{layers - first}, and no layer before has the window of layer {layer}")
    return [layer if layer < first else last[windowed[layer]] for layer in range(layers)]


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """Inputs per layer: of each layer `width` channels of a row, made of its token in the first stage. They go from
    stage to stage behind the hidden state, those of layers that are still to come."""

    builder: ProgramBuilder
    width: int
    first: int  # layer of the stage
    end: int

    @classmethod
    def of(cls, builder: ProgramBuilder) -> LayerInputs | None:
        """None for models without them."""
        width = builder.keys.count("embedding_length_per_layer_input", 0, minimum=0, maximum=_MAX_INPUT)
        return cls(builder, width, builder.stage.start, builder.stage.stop) if width else None

    @property
    def _layers(self) -> int:
        return self.builder.hyperparameters.block_count

    @property
    def _all(self) -> Buffer:
        """From the first layer of the stage on."""
        return Buffer("inputs", (self._layers - self.first) * self.width)

    @property
    def _hidden(self) -> Buffer:
        return Buffer("hidden", self.builder.hyperparameters.embedding_length)

    @property
    def given(self) -> Buffer:
        """What the stage is given."""
        return Buffer("given", self._hidden.width + self._all.width) if self.first else self._hidden

    @property
    def sent(self) -> Buffer:
        """What the next stage is given."""
        return Buffer("sent", self._hidden.width + (self._layers - self.end) * self.width)

    def begin(self) -> Iterator[ir.Step]:
        """What stands before the first layer of a stage."""
        if self.first:
            yield ir.Slice(self.given, self._hidden, 0)
            yield ir.Slice(self.given, self._all, self._hidden.width)
            return
        builder, inputs, projected = self.builder, self._all, Buffer("projected inputs", self._all.width)
        shape = (builder.hyperparameters.vocabulary_size, inputs.width)
        yield ir.Embed(inputs, builder.weight("per_layer_token_embd.weight", shape))
        yield ir.Scale(inputs, inputs, math.sqrt(self.width))
        yield builder.product("per_layer_model_proj", self._hidden, projected)
        yield ir.Scale(projected, projected, 1 / math.sqrt(self._hidden.width))
        weight = builder.vector("per_layer_proj_norm.weight", self.width)
        yield ir.RmsNorm(projected, projected, weight, builder.rms_epsilon, self._layers)
        yield ir.Add(inputs, projected, inputs)
        yield ir.Scale(inputs, inputs, 1 / math.sqrt(2))

    def add(self, layer: int, hidden: Buffer, projected: Buffer) -> Iterator[ir.Step]:
        """hidden += norm(proj(gelu(gate(hidden)) * the layer's input))."""
        builder, prefix = self.builder, f"blk.{layer}"
        gate, own = (Buffer(name, self.width) for name in ("input gate", "layer input"))
        yield builder.product(f"{prefix}.inp_gate", hidden, gate)
        yield ir.Activate(gate, gate, ActivationFunction.GELU_TANH)
        yield ir.Slice(self._all, own, (layer - self.first) * self.width)
        yield ir.Mul(gate, own, gate)
        yield builder.product(f"{prefix}.proj", gate, projected)
        weight = builder.vector(f"{prefix}.post_norm.weight", hidden.width)
        yield ir.RmsNorm(projected, projected, weight, builder.rms_epsilon)
        yield ir.Add(hidden, projected, hidden)

    def join(self) -> Iterator[ir.Step]:
        """What stands behind the last layer of a stage that is not the last one."""
        rest = Buffer("further inputs", self.sent.width - self._hidden.width)
        yield ir.Slice(self._all, rest, (self.end - self.first) * self.width)
        yield ir.Join(self._hidden, rest, self.sent)


@dataclass(frozen=True, slots=True)
class _Layer:
    """The steps of one layer, in the order of computation."""

    builder: ProgramBuilder
    layer: int
    kind: LayerKind
    experts: ExpertsVariant
    source: int  # the layer whose keys and values it reads
    inputs: LayerInputs | None

    @property
    def _prefix(self) -> str:
        return f"blk.{self.layer}"

    def _buffer(self, name: str) -> Buffer:
        return Buffer(name, self.builder.hyperparameters.embedding_length)

    def steps(self) -> Iterator[ir.Step]:
        hidden, projected = self._buffer("hidden"), self._buffer("projected")
        yield from self._attention(hidden, projected)
        yield self._norm("post_attention_norm", projected, projected)
        yield ir.Add(hidden, projected, hidden)
        if self.builder.hyperparameters.expert_count:
            yield from self._mixture(hidden, projected)
        else:
            yield from self._feed_forward(hidden, projected)
        yield self._norm("post_ffw_norm", projected, projected)
        yield ir.Add(hidden, projected, hidden)
        if self.inputs is not None:
            yield from self.inputs.add(self.layer, hidden, projected)
        scale = f"{self._prefix}.layer_output_scale.weight"
        if self.builder.has(scale):
            yield ir.ScaleByWeight(hidden, hidden, self.builder.vector(scale, 1))

    def _attention(self, hidden: Buffer, projected: Buffer) -> Iterator[ir.Step]:
        hp, kind, normed = self.builder.hyperparameters, self.kind, self._buffer("normed")
        kv_heads, shares_kv = self.builder.kv_heads(self.layer), self.source != self.layer
        query, out = (Buffer(name, hp.head_count * kind.head_dim) for name in ("query", "attended"))
        key, value = (Buffer(name, kv_heads * kind.head_dim) for name in ("key", "value"))
        yield self._norm("attn_norm", hidden, normed)
        yield self.builder.product(f"{self._prefix}.attn_q", normed, query)
        if not shares_kv:
            yield from self._keys_and_values(normed, key, value)
        yield self._norm("attn_q_norm", query, query, hp.head_count)
        for x, heads in ((query, hp.head_count), (key, kv_heads))[: 1 if shares_kv else 2]:
            yield ir.Rope(x, heads, kind.head_dim, RopeStyle.NEOX, kind.table)
        yield ir.Attention(
            *(query, key, value, out, self.source),
            heads=hp.head_count,
            kv_heads=kv_heads,
            head_dim=kind.head_dim,
            scale=1.0,
            kv_type=self.builder.kv_type,
            window=kind.window,
            shares_kv=shares_kv,
        )
        yield self.builder.product(f"{self._prefix}.attn_output", out, projected)

    def _keys_and_values(self, normed: Buffer, key: Buffer, value: Buffer) -> Iterator[ir.Step]:
        """Both normed; where values have no weight, they are the keys before those are normed."""
        yield self.builder.product(f"{self._prefix}.attn_k", normed, key)
        is_apart = self.builder.has(f"{self._prefix}.attn_v.weight")
        if is_apart:
            yield self.builder.product(f"{self._prefix}.attn_v", normed, value)
        heads = value.width // self.kind.head_dim
        yield ir.RmsNorm(value if is_apart else key, value, None, self.builder.rms_epsilon, heads)
        yield self._norm("attn_k_norm", key, key, heads)

    def _feed_forward(self, hidden: Buffer, projected: Buffer) -> Iterator[ir.Step]:
        """projected = down(gelu(gate) * up) of the normed hidden state."""
        normed, width = self._buffer("normed"), self.builder.hyperparameters.feed_forward_lengths[self.layer]
        gate, up = Buffer("gate", width), Buffer("up", width)
        yield self._norm("ffn_norm", hidden, normed)
        yield self.builder.product(f"{self._prefix}.ffn_gate", normed, gate)
        yield self.builder.product(f"{self._prefix}.ffn_up", normed, up)
        yield ir.Activate(gate, gate, ActivationFunction.GELU_TANH)
        yield ir.Mul(gate, up, gate)
        yield self.builder.product(f"{self._prefix}.ffn_down", gate, projected)

    def _mixture(self, hidden: Buffer, projected: Buffer) -> Iterator[ir.Step]:
        """The feed-forward network and experts beside it, each with norms of its own. The router reads a norm of the
        hidden state whose weight is divided by the square root of the width."""
        normed, mixed, routed = map(self._buffer, ("normed", "mixed", "routed"))
        yield from self._feed_forward(hidden, projected)
        yield self._norm("post_ffw_norm_1", projected, projected)
        yield self._norm("pre_ffw_norm_2", hidden, normed)
        scale = self.builder.vector(f"{self._prefix}.ffn_gate_inp.scale", hidden.width)
        yield ir.RmsNorm(hidden, routed, scale, self.builder.rms_epsilon)
        yield ir.Scale(routed, routed, 1 / math.sqrt(hidden.width))
        hp = self.builder.hyperparameters
        yield expert_step(self.builder, self._prefix, hp, self.experts, (normed, mixed), routed)
        yield self._norm("post_ffw_norm_2", mixed, mixed)
        yield ir.Add(projected, mixed, projected)

    def _norm(self, name: str, x: Buffer, out: Buffer, heads: int = 1) -> ir.RmsNorm:
        weight = self.builder.vector(f"{self._prefix}.{name}.weight", x.width // heads)
        return ir.RmsNorm(x, out, weight, self.builder.rms_epsilon, heads)
