"""Kimi Linear: kimi-linear. It has delta nets with a decay for each channel, and latent attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType

from llamaclust.model import program as ir
from llamaclust.model.architectures.experts import read_experts
from llamaclust.model.architectures.latent.attention import LatentAttention
from llamaclust.model.architectures.latent.deepseek import latent_variant
from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.architectures.recurrent.delta_net import unit_lengths
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.program import Buffer
from llamaclust.model.steps.options import ActivationFunction, Gating
from llamaclust.model.steps.states import (
    MAX_KEY_CHANNELS,
    MAX_TAPS,
    VALUE_CHANNELS,
    Decay,
    DeltaRule,
    StatePart,
    excess_of_heads,
)

_MAX_COUNT = 1 << 10


_CONVOLUTIONS = (".ssm_conv1d_q.weight", ".ssm_conv1d_k.weight", ".ssm_conv1d_v.weight")


def without_ones(file: ModelFile) -> ModelFile:
    """Removes tensor dimensions of size 1. Shapes become [channels, taps] for convolutions, and [heads] for decay."""
    reshaped = {}
    for name, tensor in file.tensors.items():
        if name.endswith((*_CONVOLUTIONS, ".ssm_a")):
            channels = tensor.shape[: -1 if name.endswith(_CONVOLUTIONS) else None]
            if len(channels) > 1 and sum(size > 1 for size in channels) < 2:
                shape = math.prod(channels), *tensor.shape[len(channels) :]
                reshaped[name] = replace(tensor, shape=shape)
    return replace(file, tensors=MappingProxyType({**file.tensors, **reshaped})) if reshaped else file


def kimi_linear(builder: ProgramBuilder) -> None:
    """Builds Kimi Linear. Layers with KV heads have latent attention, and the others have delta nets. Dense layers come
    first, and all later layers have experts."""
    hp, keys = builder.hyperparameters, builder.keys
    latent = latent_variant(builder, 0.0, 0.0)
    latent = replace(latent, table=None, scale=1 / math.sqrt(latent.query))
    head_dim = keys.count("kda.head_dim", maximum=MAX_KEY_CHANNELS)
    if head_dim % VALUE_CHANNELS:
        raise keys.error("kda.head_dim", f"expected a multiple of {VALUE_CHANNELS}, found {head_dim}")
    if (excess := excess_of_heads(hp.head_count, head_dim)) is not None:
        raise keys.error("kda.head_dim", excess)
    taps = keys.count("ssm.conv_kernel", minimum=2, maximum=MAX_TAPS)
    shared = hp.expert_feed_forward_length * keys.count("expert_shared_count", maximum=_MAX_COUNT)
    experts = read_experts(keys, hp, gating=Gating.SIGMOID, shared_width=shared)
    dense = keys.count("leading_dense_block_count", 0, minimum=0, maximum=_MAX_COUNT)
    for layer in builder.layers():
        if hp.head_counts_kv[layer]:
            attention = LatentAttention(builder, layer, hp.head_count, latent, builder.kv_type)
            builder.append(attention.steps(hp.embedding_length))
        else:
            builder.append(_KimiDelta(builder, layer, head_dim, taps).steps())
        if layer < dense:
            builder.feed_forward(layer)
        else:
            builder.require(layer, "exp_probs_b.bias")
            builder.experts(layer, experts)


@dataclass(frozen=True, slots=True)
class _KimiDelta:
    """A gated delta net: hidden += output(norm(delta rule) * sigmoid(gate)). Inputs are projections of norm(hidden)."""

    builder: ProgramBuilder
    layer: int
    head_dim: int
    taps: int

    def steps(self) -> Iterator[ir.Step]:
        builder, heads, epsilon = self.builder, self.builder.hyperparameters.head_count, self.builder.rms_epsilon
        width, inner = builder.hyperparameters.embedding_length, heads * self.head_dim
        hidden, normed, projected = (Buffer(name, width) for name in ("hidden", "normed", "projected"))
        q, k, v, decay, gate, out = (Buffer(f"delta {name}", inner) for name in ("q", "k", "v", "decay", "gate", "out"))
        beta = Buffer("delta beta", heads)
        yield ir.RmsNorm(hidden, normed, builder.vector(self._name("attn_norm.weight"), width), epsilon)
        yield from self._convolved(normed, (q, k, v))
        yield builder.product(self._name("ssm_beta"), normed, beta)
        yield ir.Activate(beta, beta, ActivationFunction.SIGMOID)
        yield from self._low_rank("f", normed, decay)
        yield self._decay(decay, heads)
        yield from unit_lengths(q, k, heads, epsilon)
        yield DeltaRule(q, k, v, decay, beta, out, self.layer, heads, heads)
        yield ir.RmsNorm(out, out, builder.vector(self._name("ssm_norm.weight"), self.head_dim), epsilon, heads)
        yield from self._low_rank("g", normed, gate)
        yield ir.Activate(gate, gate, ActivationFunction.SIGMOID)
        yield ir.Mul(out, gate, out)
        yield builder.product(self._name("attn_output"), out, projected)
        yield ir.Add(hidden, projected, hidden)

    def _convolved(self, x: Buffer, outs: tuple[Buffer, Buffer, Buffer]) -> Iterator[ir.Step]:
        plain = [Buffer(f"{out.name} before", out.width) for out in outs]
        for name, product in zip("qkv", plain, strict=True):
            yield self.builder.product(self._name(f"attn_{name}"), x, product)
        parts = (StatePart.CONVOLUTION, StatePart.CONVOLUTION_OF_KEYS, StatePart.CONVOLUTION_OF_VALUES)
        for name, product, out, part in zip("qkv", plain, outs, parts, strict=True):
            weight = self.builder.weight(self._name(f"ssm_conv1d_{name}.weight"), (out.width, self.taps))
            yield ir.Convolution(product, out, weight, self.taps, self.layer, part=part)
            yield ir.Activate(out, out, ActivationFunction.SILU)

    def _low_rank(self, name: str, x: Buffer, out: Buffer) -> Iterator[ir.Step]:
        between = Buffer(f"delta {name}", self.head_dim)
        yield self.builder.product(self._name(f"ssm_{name}_a"), x, between)
        yield self.builder.product(self._name(f"ssm_{name}_b"), between, out)

    def _decay(self, x: Buffer, heads: int) -> ir.Step:
        weight = self.builder.vector(self._name("ssm_a"), heads)
        return Decay(x, x, weight, self.builder.vector(self._name("ssm_dt.bias"), x.width), heads)

    def _name(self, name: str) -> str:
        return f"blk.{self.layer}.{name}"
