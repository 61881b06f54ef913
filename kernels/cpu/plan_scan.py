"""Scans and norms of groups in a plan of the native executor: their small weights, which are rows of a matrix in the
file, as vectors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llamaclust.kernels._native import Plan, dequantize
from llamaclust.kernels.backend import Float32
from llamaclust.kernels.packed.weights import Weight
from llamaclust.model.program import RmsNorm, Scan


def add_scan(plan: Plan, step: Scan, buffers: tuple[int, int, int], layer: int, weights: Mapping[str, Weight]) -> None:
    """`buffers`: of x, dt and out; `layer`: the plan's number of the state's memory."""
    bias, *others = (weights[name] for name in (step.bias, step.decay, step.skip))
    decay, skip = (_values(weight, step.heads) for weight in others)
    plan.scan(*buffers, layer, step.groups, step.state_size, bias.vector, decay, skip)


def norm_weight(step: RmsNorm, weights: Mapping[str, Weight]) -> Float32:
    """One number for each channel that is normed together, or for each channel of a row."""
    if step.weight is None:
        return np.ones(step.width, np.float32)
    return _values(weights[step.weight], step.x.width if step.own_weights else step.width)


def _values(weight: Weight, count: int) -> Float32:
    """Rows one after the other; zeros of a weight that is a shape only."""
    if not weight.matrices:
        return weight.vector
    if not weight.matrix.bytes:
        return np.zeros(count, np.float32)
    values = dequantize("generic", weight.matrix).reshape(-1)
    assert len(values) == count, (len(values), count)
    return values
