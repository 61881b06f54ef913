"""Rounds queries and attention weights, for attention with int8 keys and values."""

from __future__ import annotations

import numpy as np

from llamaclust.kernels.backend import Float32
from llamaclust.kernels.reference.kv import Float64
from llamaclust.model.kv_type import KV_GROUP_CHANNELS

WEIGHT_TOKENS = 64
"""The number of positions whose attention weights share a scale. Each group begins at a multiple of this number."""

_MOST_WEIGHT = 254
_LEAST_QUERY = _LEAST_TOP = 2.0**-100


def round_queries(queries: Float32) -> Float64:
    """Rounds each group of 32 channels in queries [..., channels] to 8 bits, in float32. If m is the largest magnitude
    in a group, x becomes round(x * (127 / m)) * (m / 127), with ties to even. All x become 0 if m < 2^-100."""
    channels = queries.shape[-1]
    padded = np.pad(queries, [(0, 0)] * (queries.ndim - 1) + [(0, -channels % KV_GROUP_CHANNELS)])
    groups = padded.reshape(*queries.shape[:-1], -1, KV_GROUP_CHANNELS)
    top = np.abs(groups).max(axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        quants = np.rint(groups * (np.float32(127) / top)).astype(np.float64)
        rounded = np.where(top < _LEAST_QUERY, 0, quants * (top / np.float32(127)))
    out: Float64 = rounded.reshape(padded.shape)[..., :channels]
    return out


def weighted_values(weights: Float64, values: Float64, scales: Float64, first: int) -> Float64:
    """Returns weighted sums [kv_heads, heads per KV head, channels] of `values` [positions, kv_heads, channels].
    Each product of `weights` [kv_heads, heads per KV head, positions] and `scales` [positions, kv_heads, groups] is
    rounded, and then multiplied by int8 values."""
    parts = []
    for group in range(scales.shape[2]):
        channels = slice(group * KV_GROUP_CHANNELS, (group + 1) * KV_GROUP_CHANNELS)
        scale = scales[:, :, group].T[:, np.newaxis]
        with np.errstate(all="ignore"):
            rounded = _round_weights(weights * scale, first)
            quants = np.where(scale > 0, values[:, :, channels].transpose(1, 2, 0) / scale, 0)
        parts.append(np.einsum("kgp,kcp->kgc", rounded, np.where(np.isnan(scale), np.nan, quants)))
    return np.concatenate(parts, axis=2)


def _round_weights(weights: Float64, first: int) -> Float64:
    before, after = first % WEIGHT_TOKENS, -(first + weights.shape[-1]) % WEIGHT_TOKENS
    padded = np.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(before, after)])
    groups = padded.reshape(*weights.shape[:-1], -1, WEIGHT_TOKENS)
    top = groups.max(axis=-1, keepdims=True)
    unit = np.where(top < _LEAST_TOP, 0, top / _MOST_WEIGHT)
    rounded = np.where(top < _LEAST_TOP, 0, np.rint(groups * (_MOST_WEIGHT / top))) * unit
    out: Float64 = rounded.reshape(padded.shape)[..., before : before + weights.shape[-1]]
    return out
