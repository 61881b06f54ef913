"""Layers of the gated delta net (Yang et al. 2024). A short convolution and the delta rule replace attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from llamaclust.model import program as ir
from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.model_keys import ModelKeys
from llamaclust.model.program import Buffer
from llamaclust.model.steps.options import ActivationFunction
from llamaclust.model.steps.states import MAX_HEADS, MAX_KEY_CHANNELS, MAX_TAPS, VALUE_CHANNELS, Decay, DeltaRule


@dataclass(frozen=True, slots=True)
class DeltaNet:
    heads: int
    key_heads: int
    head_dim: int
    taps: int
    tiled: bool

    @property
    def key_width(self) -> int:
        return self.key_heads * self.head_dim

    @property
    def value_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def heads_per_key(self) -> int:
        return self.heads // self.key_heads


def read_delta_net(keys: ModelKeys, *, tiled: bool) -> DeltaNet:
    heads = keys.count("ssm.time_step_rank", maximum=MAX_HEADS)
    net = DeltaNet(
        heads,
        keys.count("ssm.group_count", maximum=heads),
        keys.count("ssm.state_size", maximum=MAX_KEY_CHANNELS),
        keys.count("ssm.conv_kernel", minimum=2, maximum=MAX_TAPS),
        tiled,
    )
    if net.head_dim % VALUE_CHANNELS:
        raise keys.error("ssm.state_size", f"expected a multiple of {VALUE_CHANNELS}, found {net.head_dim}")
    if heads % net.key_heads:
        raise keys.error("ssm.group_count", f"{net.key_heads} key heads do not divide {heads} heads")
    inner = keys.count("ssm.inner_size", maximum=MAX_HEADS * MAX_KEY_CHANNELS)
    if inner != net.value_width:
        raise keys.error("ssm.inner_size", f"expected {heads} heads of {net.head_dim} channels, found {inner} channels")
    return net


def delta_net(builder: ProgramBuilder, layer: int, net: DeltaNet) -> Iterator[ir.Step]:
    """Yields the steps of hidden += output(norm(delta rule) * silu(z)). z and the inputs of the delta rule are
    projections of the normed hidden state."""
    prefix, width, epsilon = f"blk.{layer}", builder.hyperparameters.embedding_length, builder.rms_epsilon
    hidden, normed, projected = (Buffer(name, width) for name in ("hidden", "normed", "projected"))
    q, k = (Buffer(f"delta {name}", net.key_width) for name in ("q", "k"))
    v, z, out = (Buffer(f"delta {name}", net.value_width) for name in ("v", "z", "out"))
    mixed, convolved = (Buffer(f"delta {name}", 2 * q.width + v.width) for name in ("q+k+v", "convolved"))
    alpha, beta = (Buffer(f"delta {name}", net.heads) for name in ("alpha", "beta"))
    yield ir.RmsNorm(hidden, normed, builder.vector(f"{prefix}.attn_norm.weight", width), epsilon)
    yield from _products(builder, prefix, net, (normed, mixed, z))
    yield from _gates(builder, prefix, net, (normed, alpha, beta))
    weight = builder.weight(f"{prefix}.ssm_conv1d.weight", (mixed.width, net.taps))
    yield ir.Convolution(mixed, convolved, weight, net.taps, layer)
    yield ir.Activate(convolved, convolved, ActivationFunction.SILU)
    for part, start in ((q, 0), (k, q.width), (v, 2 * q.width)):
        yield ir.Slice(convolved, part, start)
    yield from unit_lengths(q, k, net.key_heads, epsilon)
    yield DeltaRule(q, k, v, alpha, beta, out, layer, net.heads, net.key_heads, net.tiled)
    yield ir.RmsNorm(out, out, builder.vector(f"{prefix}.ssm_norm.weight", net.head_dim), epsilon, net.heads)
    yield ir.SiluMul(z, out, out)
    yield builder.product(f"{prefix}.ssm_out", out, projected)
    yield ir.Add(hidden, projected, hidden)


def unit_lengths(q: Buffer, k: Buffer, heads: int, epsilon: float) -> Iterator[ir.Step]:
    """Yields the steps that scale each head of q and k to length 1, and then divide q by sqrt(channels of a head)."""
    channels = k.width // heads
    for x, factor in ((q, 1 / channels), (k, 1 / math.sqrt(channels))):
        yield ir.RmsNorm(x, x, None, epsilon / channels, heads)
        yield ir.Scale(x, x, factor)


def _products(
    builder: ProgramBuilder, prefix: str, net: DeltaNet, buffers: tuple[Buffer, Buffer, Buffer]
) -> Iterator[ir.Step]:
    """Yields the steps that compute q, k and v (written to the second buffer) and the gate z (third buffer)."""
    x, mixed, z = buffers
    if not builder.has(f"{prefix}.ssm_in.weight"):
        yield builder.product(f"{prefix}.attn_qkv", x, mixed)
        yield builder.product(f"{prefix}.attn_gate", x, z)
        return
    whole, keys = Buffer("delta q+k+v+z", mixed.width + z.width), Buffer("delta q+k", 2 * net.key_width)
    q, k = (Buffer(f"delta {name}", net.key_width) for name in ("q", "k"))
    v, start = Buffer("delta v", net.value_width), 0
    yield builder.product(f"{prefix}.ssm_in", x, whole)
    for part in (q, k, v, z):
        yield ir.Slice(whole, part, start, net.key_heads)
        start += part.width // net.key_heads
    yield ir.Join(q, k, keys)
    yield ir.Join(keys, v, mixed)


def _gates(
    builder: ProgramBuilder, prefix: str, net: DeltaNet, buffers: tuple[Buffer, Buffer, Buffer]
) -> Iterator[ir.Step]:
    x, alpha, beta = buffers
    if builder.has(f"{prefix}.ssm_ba.weight"):
        both = Buffer("delta beta+alpha", 2 * net.heads)
        yield builder.product(f"{prefix}.ssm_ba", x, both)
        yield ir.Slice(both, beta, 0, net.key_heads)
        yield ir.Slice(both, alpha, net.heads_per_key, net.key_heads)
    else:
        yield builder.product(f"{prefix}.ssm_beta", x, beta)
        yield builder.product(f"{prefix}.ssm_alpha", x, alpha)
    weight, bias = (builder.vector(f"{prefix}.{name}", net.heads) for name in ("ssm_a", "ssm_dt.bias"))
    yield Decay(alpha, alpha, weight, bias, net.heads)
    yield ir.Activate(beta, beta, ActivationFunction.SIGMOID)
