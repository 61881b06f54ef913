"""Attention whose result is multiplied by the sigmoid of a gate. One linear layer computes the queries and the gate."""

from __future__ import annotations

import math
from collections.abc import Iterator

from llamaclust.model import program as ir
from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.program import Buffer, RopeTable
from llamaclust.model.steps.options import ActivationFunction, RopeStyle


def gated_attention(
    builder: ProgramBuilder, layer: int, table: RopeTable, sections: tuple[int, ...] | None = None
) -> Iterator[ir.Step]:
    """Yields the steps of hidden += output(attention(rope(norm(q)), rope(norm(k)), v) * sigmoid(gate)). q, k, v and
    gate are projections of norm(hidden)."""
    hp, prefix, kv_heads = builder.hyperparameters, f"blk.{layer}", builder.kv_heads(layer)
    hidden, normed, projected = (Buffer(name, hp.embedding_length) for name in ("hidden", "normed", "projected"))
    query, gate, out = (Buffer(name, hp.query_width) for name in ("query", "gate of attention", "attended"))
    key, value = (Buffer(name, kv_heads * hp.key_length) for name in ("key", "value"))
    both, parts = Buffer("query+gate", 2 * hp.query_width), (("q", query, hp.head_count), ("k", key, kv_heads))
    yield ir.RmsNorm(hidden, normed, builder.vector(f"{prefix}.attn_norm.weight", hidden.width), builder.rms_epsilon)
    for name, product in (("attn_q", both), ("attn_k", key), ("attn_v", value)):
        yield builder.product(f"{prefix}.{name}", normed, product)
    for number, half in enumerate((query, gate)):
        yield ir.Slice(both, half, number * hp.key_length, hp.head_count)
    for name, x, heads in parts:
        weight = builder.vector(f"{prefix}.attn_{name}_norm.weight", hp.key_length)
        yield ir.RmsNorm(x, x, weight, builder.rms_epsilon, heads)
    for _, x, heads in parts:
        yield ir.Rope(x, heads, hp.key_length, RopeStyle.NEOX, table, sections)
    yield ir.Attention(
        query,
        key,
        value,
        out,
        layer=layer,
        heads=hp.head_count,
        kv_heads=kv_heads,
        head_dim=hp.key_length,
        scale=1 / math.sqrt(hp.key_length),
        kv_type=builder.kv_type,
    )
    yield ir.Activate(gate, gate, ActivationFunction.SIGMOID)
    yield ir.Mul(out, gate, out)
    yield builder.product(f"{prefix}.attn_output", out, projected)
    yield ir.Add(hidden, projected, hidden)
