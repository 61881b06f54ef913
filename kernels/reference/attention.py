"""Attention of one row in float64. Keys and values are rounded as in KV memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llamaclust.kernels.backend import Float32, Int32
from llamaclust.kernels.reference.byte_attention import round_queries, weighted_values
from llamaclust.kernels.reference.kv import Float64, LayerKv
from llamaclust.model import program as ir
from llamaclust.model.kv_type import KvType


@dataclass(frozen=True, slots=True)
class Memory:
    """The keys [count, kv_heads, head_dim] and values [count, kv_heads, value_dim] of positions [0, count). `scales`
    [count, kv_heads, groups] has the scales of values, if weighted values are summed as integers."""

    keys: Float64
    values: Float64
    scales: Float64 | None

    @classmethod
    def of(cls, step: ir.Attention, kv: LayerKv, table: Int32, count: int) -> Memory:
        in_integers = step.kv_type is KvType.INT8 and step.v is not None
        return cls(*kv.load(table, count), kv.value_scales(table, count) if in_integers else None)

    def __len__(self) -> int:
        return len(self.keys)

    def sums(self, weights: Float64, first: int, end: int) -> Float64:
        values = self.values[first:end]
        if self.scales is not None:
            return weighted_values(weights, values, self.scales[first:end], first)
        out: Float64 = np.einsum("kgp,pkd->kgd", weights, values)
        return out


def attend(
    step: ir.Attention, query: Float32, memory: Memory, own: int, group: range, sinks: Float32 | None = None
) -> Float64:
    """Returns the result [heads * value_dim] for the row at position `own`. `query` is [heads * head_dim], and `sinks`
    is [heads]. `group` is the range of positions in the row's group."""
    first, end = seen_by(step, own, len(memory), group)
    grouped = query.reshape(step.kv_heads, -1, step.head_dim)
    rounded = round_queries(grouped) if step.kv_type is KvType.INT8 else grouped.astype(np.float64)
    scores = np.einsum("kgd,pkd->kgp", rounded, memory.keys[first:end]) * step.scale
    if step.soft_cap is not None:
        scores = soft_cap(scores, step.soft_cap)
    if step.slopes is not None:
        slopes = np.array(step.slopes).reshape(step.kv_heads, -1, 1)
        scores = scores - slopes * np.abs(np.arange(first, end) - own)
    if sinks is not None:
        scores = np.append(scores, sinks.reshape(step.kv_heads, -1, 1), axis=2)
    return memory.sums(softmax(scores)[:, :, : end - first], first, end).reshape(-1)


def seen_by(step: ir.Attention, own: int, length: int, group: range = range(0)) -> tuple[int, int]:
    if step.grouped:
        return group.start, group.stop
    end = max(own + 1, group.stop)
    if step.chunked and step.window is not None:
        return own // step.window * step.window, end
    if step.causal:
        return 0 if step.window is None else max(0, own + 1 - step.window), end
    if step.window is None:
        return 0, length
    return max(0, own - step.window // 2), min(length, own + step.window // 2 + 1)


def soft_cap(x: Float64, cap: float) -> Float64:
    return np.asarray(np.tanh(x / cap) * cap)


def softmax(x: Float64) -> Float64:
    powers: Float64 = np.exp(x - x.max(axis=-1, keepdims=True))
    total: Float64 = powers.sum(axis=-1, keepdims=True)
    return powers / total
