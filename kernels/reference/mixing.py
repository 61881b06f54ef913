"""Steps that mix the parts of a row, in NumPy and float64. Each row is computed independently."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llamaclust.kernels.backend import Batch, Float32
from llamaclust.kernels.reference.kv import Float64
from llamaclust.model import program as ir


def mix(step: ir.Mix, buffers: Mapping[str, Float32]) -> Float64:
    x, y = buffers[step.x.name], buffers[step.y.name]
    coefficients = None if step.coefficients is None else buffers[step.coefficients.name]
    parts, out = (rows.reshape(len(rows), -1, step.width).astype(np.float64) for rows in (x, y))
    shape = len(x), out.shape[1], parts.shape[1]
    factors = np.ones(shape) if coefficients is None else coefficients.reshape(shape).astype(np.float64) + step.offset
    added: Float64 = np.einsum("rij,rjc->ric", factors, parts)
    out[:, step.first :] += added[:, step.first :]
    return out.reshape(y.shape)


def match_magnitude(step: ir.MatchMagnitude, x: Float32, y: Float32) -> Float64:
    parts = x.reshape(len(x), -1, step.y.width).astype(np.float64)
    wanted = np.mean(y.astype(np.float64) ** 2, axis=1)[:, None, None]
    found = np.maximum(np.mean(parts**2, axis=2, keepdims=True), np.float32(step.epsilon))
    return np.asarray(parts * np.sqrt(wanted / found)).reshape(x.shape)


def gaussian_top_k(x: Float32, factor: float) -> Float64:
    wide = x.astype(np.float64)
    centred: Float64 = wide - np.mean(wide, axis=1, keepdims=True)
    deviation = np.sqrt(np.mean(centred**2, axis=1, keepdims=True))
    return np.asarray(np.maximum(centred - np.float32(factor) * deviation, 0))


def with_given_rows(step: ir.GivenRows, x: Float32, batch: Batch) -> Float32:
    if batch.given is None:
        return x
    out, rows, width = x.copy(), batch.given.rows, step.out.width
    values = batch.given.values[:, step.level * width : (step.level + 1) * width]
    out[rows] = out[rows] + values if step.adds else values
    return out
