"""Gemma 4. Layers with a sliding window have another head size and another RoPE. Experts are parallel to a feed-forward
network. The E models have per-layer inputs, and layers that read other layers' keys and values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from llamaclust.model import program as ir
from llamaclust.model.architectures.experts import ExpertsVariant, expert_step, read_experts
from llamaclust.model.architectures.gemma.attention import LayerKind, attention, shared_kv_sources
from llamaclust.model.architectures.gemma.layer_inputs import LayerInputs
from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.architectures.positions import rope_table
from llamaclust.model.hyperparameters import RopeScaling
from llamaclust.model.program import Buffer
from llamaclust.model.steps.options import ActivationFunction, GatedActivation, Gating

_PERIOD = 6
_MAX_CAP = 1e6
_MAX_HEAD = 1 << 12


def gemma4(builder: ProgramBuilder) -> None:
    """Builds Gemma 4. Values are normed without weights. A layer may use its keys as values. A layer's output may be
    scaled."""
    hp, keys = builder.hyperparameters, builder.keys
    if hp.sliding_window is None:
        raise keys.error("attention.sliding_window", "missing")
    final_cap = keys.real("final_logit_softcapping", 0.0, minimum=0.0, maximum=_MAX_CAP)
    windowed = keys.windowed_layers(hp.block_count, _PERIOD)
    full, part = _kinds(builder, hp.sliding_window)
    experts, inputs = _experts(builder), LayerInputs.of(builder, builder.given)
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
    """Returns the kinds of layers without and with a sliding window."""
    hp, keys = builder.hyperparameters, builder.keys
    head_dim = keys.count("attention.key_length_swa", hp.key_length, maximum=_MAX_HEAD)
    value_length = keys.count("attention.value_length_swa", head_dim, maximum=_MAX_HEAD)
    if value_length != head_dim:
        raise keys.error("attention.value_length_swa", f"expected {head_dim}, the length of keys, found {value_length}")
    rope = replace(
        hp.rope,
        dimension_count=keys.count("rope.dimension_count_swa", head_dim, maximum=head_dim),
        frequency_base=keys.real("rope.freq_base_swa", 10000.0, minimum=1.0, maximum=1e12),
        scaling=RopeScaling.NONE,
        factor=1.0,
    )
    if rope.dimension_count % 2:
        raise keys.error("rope.dimension_count_swa", f"expected an even number, found {rope.dimension_count}")
    return LayerKind(hp.key_length, builder.rope_table()), LayerKind(head_dim, rope_table(rope), window)


def _experts(builder: ProgramBuilder) -> ExpertsVariant:
    return read_experts(
        builder.keys, builder.hyperparameters, gating=Gating.SOFTMAX, activation=GatedActivation.GELU_MUL
    )


@dataclass(frozen=True, slots=True)
class _Layer:
    builder: ProgramBuilder
    layer: int
    kind: LayerKind
    experts: ExpertsVariant
    source: int  # Number of the layer whose keys and values this layer reads.
    inputs: LayerInputs | None

    @property
    def _prefix(self) -> str:
        return f"blk.{self.layer}"

    def _buffer(self, name: str) -> Buffer:
        return Buffer(name, self.builder.hyperparameters.embedding_length)

    def steps(self) -> Iterator[ir.Step]:
        hidden, projected = self._buffer("hidden"), self._buffer("projected")
        normed = self._buffer("normed")
        yield self._norm("attn_norm", hidden, normed)
        yield from attention(self.builder, self.layer, self.source, self.kind, (normed, projected))
        yield self._norm("post_attention_norm", projected, projected)
        yield ir.Add(hidden, projected, hidden)
        if self.builder.hyperparameters.expert_count:
            yield from self._mixture(hidden, projected)
        else:
            yield from self._feed_forward(hidden, projected)
        yield self._norm("post_ffw_norm", projected, projected)
        yield ir.Add(hidden, projected, hidden)
        if self.inputs is not None:
            yield from self.inputs.project(self.layer, hidden, projected)
            yield ir.Add(hidden, projected, hidden)
        scale = f"{self._prefix}.layer_output_scale.weight"
        if self.builder.has(scale):
            yield ir.ScaleByWeight(hidden, hidden, self.builder.vector(scale, 1))

    def _feed_forward(self, hidden: Buffer, projected: Buffer) -> Iterator[ir.Step]:
        normed, width = self._buffer("normed"), self.builder.hyperparameters.feed_forward_lengths[self.layer]
        gate, up = Buffer("gate", width), Buffer("up", width)
        yield self._norm("ffn_norm", hidden, normed)
        yield self.builder.product(f"{self._prefix}.ffn_gate", normed, gate)
        yield self.builder.product(f"{self._prefix}.ffn_up", normed, up)
        yield ir.Activate(gate, gate, ActivationFunction.GELU_TANH)
        yield ir.Mul(gate, up, gate)
        yield self.builder.product(f"{self._prefix}.ffn_down", gate, projected)

    def _mixture(self, hidden: Buffer, projected: Buffer) -> Iterator[ir.Step]:
        """Yields the steps of a feed-forward network plus a mixture of experts, each with its own norms."""
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

    def _norm(self, name: str, x: Buffer, out: Buffer) -> ir.RmsNorm:
        weight = self.builder.vector(f"{self._prefix}.{name}.weight", x.width)
        return ir.RmsNorm(x, out, weight, self.builder.rms_epsilon)
