"""Attention of Gemma 3n and 4, with unscaled scores. The last layers use the keys and values of earlier layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llamaclust.model import program as ir
from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.model_keys import SHARED_KV_KEY, ModelKeys
from llamaclust.model.program import Buffer, RopeTable
from llamaclust.model.steps.options import RopeStyle


@dataclass(frozen=True, slots=True)
class LayerKind:
    head_dim: int
    table: RopeTable
    window: int | None = None


def shared_kv_sources(keys: ModelKeys, windowed: Sequence[bool]) -> list[int]:
    """Returns, for each layer, the number of the layer whose keys and values it uses. Raises ModelFileError if a layer
    has no keys and values, and no earlier layer with the same kind of window has them."""
    layers = len(windowed)
    first = layers - keys.count(SHARED_KV_KEY, 0, minimum=0, maximum=layers - 1)
    last = {windowed[layer]: layer for layer in range(first)}
    for layer in range(first, layers):
        if windowed[layer] not in last:
            what = f"{layers - first} layers read other layers' keys and values"
            raise keys.error(SHARED_KV_KEY, f"{what}, but no layer before layer {layer} has the same kind of window")
    return [layer if layer < first else last[windowed[layer]] for layer in range(layers)]


def attention(
    builder: ProgramBuilder, layer: int, source: int, kind: LayerKind, buffers: tuple[Buffer, Buffer]
) -> Iterator[ir.Step]:
    """Yields the steps of attention in layer `layer`, with the keys and values of layer `source`. The steps read the
    first of `buffers` and write the second."""
    hp, prefix, (normed, projected) = builder.hyperparameters, f"blk.{layer}", buffers
    kv_heads, shares_kv = builder.kv_heads(layer), source != layer
    query, out = (Buffer(name, hp.head_count * kind.head_dim) for name in ("query", "attended"))
    key, value = (Buffer(name, kv_heads * kind.head_dim) for name in ("key", "value"))
    yield builder.product(f"{prefix}.attn_q", normed, query)
    if not shares_kv:
        yield from _keys_and_values(builder, prefix, kind, normed, (key, value))
    yield _norm(builder, f"{prefix}.attn_q_norm", query, kind)
    for x, heads in ((query, hp.head_count), (key, kv_heads))[: 1 if shares_kv else 2]:
        yield ir.Rope(x, heads, kind.head_dim, RopeStyle.NEOX, kind.table)
    yield ir.Attention(
        *(query, key, value, out, source),
        heads=hp.head_count,
        kv_heads=kv_heads,
        head_dim=kind.head_dim,
        scale=1.0,
        kv_type=builder.kv_type,
        window=kind.window,
        shares_kv=shares_kv,
    )
    yield builder.product(f"{prefix}.attn_output", out, projected)


def _keys_and_values(
    builder: ProgramBuilder, prefix: str, kind: LayerKind, normed: Buffer, stored: tuple[Buffer, Buffer]
) -> Iterator[ir.Step]:
    key, value = stored
    yield builder.product(f"{prefix}.attn_k", normed, key)
    is_apart = builder.has(f"{prefix}.attn_v.weight")
    if is_apart:
        yield builder.product(f"{prefix}.attn_v", normed, value)
    heads = value.width // kind.head_dim
    yield ir.RmsNorm(value if is_apart else key, value, None, builder.rms_epsilon, heads)
    yield _norm(builder, f"{prefix}.attn_k_norm", key, kind)


def _norm(builder: ProgramBuilder, name: str, x: Buffer, kind: LayerKind) -> ir.RmsNorm:
    weight = builder.vector(f"{name}.weight", kind.head_dim)
    return ir.RmsNorm(x, x, weight, builder.rms_epsilon, x.width // kind.head_dim)
