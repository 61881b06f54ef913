"""The selective state space of Mamba 2, computed row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from llamaclust.kernels.backend import Float32
from llamaclust.kernels.reference.kv import Float64
from llamaclust.kernels.reference.states import SequenceRows
from llamaclust.model.steps.states import Scan


def scan(
    step: Scan, x: Float32, dt: Float32, weights: Mapping[str, Float32], sequences: Iterator[SequenceRows]
) -> Float64:
    bias, decay, skip = (weights[name].reshape(-1).astype(np.float64) for name in (step.bias, step.decay, step.skip))
    steps = np.logaddexp(0, dt + bias)
    inner, b, c = np.split(x.astype(np.float64), [step.out.width, (x.shape[1] + step.out.width) // 2], axis=1)
    inner = inner.reshape(len(x), step.heads, -1)
    b, c = (_of_heads(part, step) for part in (b, c))
    out = np.zeros(inner.shape)
    for sequence in sequences:
        state = sequence.before().reshape(step.heads, step.state_size, -1)
        for row in sequence.rows:
            kept = state * np.exp(steps[row] * decay)[:, None, None]
            added = b[row, :, :, None] * (inner[row] * steps[row, :, None])[:, None, :]
            state = (kept + added).astype(np.float32)
            out[row] = np.einsum("hnc,hn->hc", state, c[row]) + inner[row] * skip[:, None]
            sequence.store(row, state)
    return out.reshape(len(x), -1)


def _of_heads(parts: Float64, step: Scan) -> Float64:
    groups = parts.reshape(len(parts), step.groups, step.state_size)
    return np.repeat(groups, step.heads // step.groups, axis=1)
