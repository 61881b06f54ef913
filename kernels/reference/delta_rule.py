"""The gated delta rule in NumPy: the formulas of `DeltaRule` and `Decay` in float64, row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from llamaclust.kernels.backend import Float32
from llamaclust.kernels.reference.kv import Float64
from llamaclust.kernels.reference.states import SequenceRows
from llamaclust.model.program import Buffer
from llamaclust.model.steps.states import Decay, DeltaRule


def decay(step: Decay, x: Float32, weights: Mapping[str, Float32]) -> Float64:
    exponent = np.logaddexp(0, x.astype(np.float64) + weights[step.bias])
    return np.asarray(np.exp(exponent * weights[step.weight].repeat(x.shape[1] // step.heads)))


def delta_rule(step: DeltaRule, buffers: Mapping[str, Float32], sequences: Iterator[SequenceRows]) -> Float64:
    heads, keys, values = step.shape
    key_of = [h % step.key_heads if step.tiled else h * step.key_heads // heads for h in range(heads)]

    def parts_of(buffer: Buffer, *shape: int) -> Float64:
        return buffers[buffer.name].reshape(-1, *shape).astype(np.float64)

    q, k = (parts_of(buffer, step.key_heads, keys)[:, key_of] for buffer in (step.q, step.k))
    v, betas = parts_of(step.v, heads, values), parts_of(step.beta, heads, 1)
    decays = parts_of(step.decay, heads, step.decay.width // heads, 1)
    out = np.empty(v.shape)
    for sequence in sequences:
        state = sequence.before().reshape(step.shape)
        for row in sequence.rows:
            decayed = state * decays[row]
            delta = (v[row] - np.einsum("hkv,hk->hv", decayed, k[row])) * betas[row]
            state = (decayed + k[row][:, :, None] * delta[:, None]).astype(np.float32)
            out[row] = np.einsum("hkv,hk->hv", state.astype(np.float64), q[row])
            sequence.store(row, state)
    return out.reshape(len(v), -1)
