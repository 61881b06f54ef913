"""Gemma 4: layers of two kinds, whose heads, rotations and windows differ; experts beside a feed-forward network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from llamaclust.model import program as ir
from llamaclust.model.architectures.experts import ExpertsVariant, expert_step, read_experts
from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.architectures.positions import rope_table
from llamaclust.model.hyperparameters import RopeScaling
from llamaclust.model.program import Buffer, RopeTable
from llamaclust.model.step_options import ActivationFunction, GatedActivation, Gating, RopeStyle

_PERIOD = 6
_MAX_CAP = 1e6
_MAX_HEAD = 1 << 12


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Channels of a head, rotation and window of windowed layers, or of the others."""

    head_dim: int
    table: RopeTable
    window: int | None = None


def gemma4(builder: ProgramBuilder) -> None:
    """26B-A4B, 31B and others without inputs per layer. Scores are not scaled; values are normed without a weight, and
    are the keys of layers that have none; each layer's result is multiplied by a number of the file."""
    hp, keys = builder.hyperparameters, builder.keys
    if hp.sliding_window is None:
        raise keys.error("attention.sliding_window", "missing")
    inputs = "embedding_length_per_layer_input"
    if keys.count(inputs, 0, minimum=0, maximum=1 << 20):
        raise keys.error(inputs, "inputs per layer (E2B, E4B), which are not supported")
    final_cap = keys.real("final_logit_softcapping", 0.0, minimum=0.0, maximum=_MAX_CAP)
    windowed = keys.windowed_layers(hp.block_count, _PERIOD)
    full, part = _kinds(builder, hp.sliding_window)
    experts = _experts(builder)
    for layer in builder.layers(math.sqrt(hp.embedding_length), soft_cap=final_cap or None):
        builder.append(_Layer(builder, layer, part if windowed[layer] else full, experts).steps())


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


@dataclass(frozen=True, slots=True)
class _Layer:
    """The steps of one layer, in the order of computation."""

    builder: ProgramBuilder
    layer: int
    kind: LayerKind
    experts: ExpertsVariant

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
        scale = f"{self._prefix}.layer_output_scale.weight"
        if self.builder.has(scale):
            yield ir.ScaleByWeight(hidden, hidden, self.builder.vector(scale, 1))

    def _attention(self, hidden: Buffer, projected: Buffer) -> Iterator[ir.Step]:
        hp, kind, normed = self.builder.hyperparameters, self.kind, self._buffer("normed")
        kv_heads = self.builder.kv_heads(self.layer)
        query, out = (Buffer(name, hp.head_count * kind.head_dim) for name in ("query", "attended"))
        key, value = (Buffer(name, kv_heads * kind.head_dim) for name in ("key", "value"))
        yield self._norm("attn_norm", hidden, normed)
        yield from self._products(normed, query, key, value)
        yield self._norm("attn_q_norm", query, query, hp.head_count)
        yield self._norm("attn_k_norm", key, key, kv_heads)
        for x, heads in ((query, hp.head_count), (key, kv_heads)):
            yield ir.Rope(x, heads, kind.head_dim, RopeStyle.NEOX, kind.table)
        yield ir.Attention(
            *(query, key, value, out, self.layer),
            heads=hp.head_count,
            kv_heads=kv_heads,
            head_dim=kind.head_dim,
            scale=1.0,
            kv_type=self.builder.kv_type,
            window=kind.window,
        )
        yield self.builder.product(f"{self._prefix}.attn_output", out, projected)

    def _products(self, normed: Buffer, query: Buffer, key: Buffer, value: Buffer) -> Iterator[ir.Step]:
        """Queries, keys and values; where values have no weight, they are the keys before those are normed."""
        yield self.builder.product(f"{self._prefix}.attn_q", normed, query)
        yield self.builder.product(f"{self._prefix}.attn_k", normed, key)
        is_apart = self.builder.has(f"{self._prefix}.attn_v.weight")
        if is_apart:
            yield self.builder.product(f"{self._prefix}.attn_v", normed, value)
        heads = value.width // self.kind.head_dim
        yield ir.RmsNorm(value if is_apart else key, value, None, self.builder.rms_epsilon, heads)

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
        step = expert_step(self.builder, self._prefix, self.builder.hyperparameters, self.experts, (normed, mixed))
        yield replace(step, routed=routed)
        yield self._norm("post_ffw_norm_2", mixed, mixed)
        yield ir.Add(projected, mixed, projected)

    def _norm(self, name: str, x: Buffer, out: Buffer, heads: int = 1) -> ir.RmsNorm:
        weight = self.builder.vector(f"{self._prefix}.{name}.weight", x.width // heads)
        return ir.RmsNorm(x, out, weight, self.builder.rms_epsilon, heads)
