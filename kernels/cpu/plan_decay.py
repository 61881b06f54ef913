"""Decays of states in a plan of the native executor: a number for each head becomes one for each channel."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llamaclust.kernels._native import Plan, dequantize
from llamaclust.kernels.backend import Float32
from llamaclust.kernels.packed.weights import Weight
from llamaclust.model.steps.states import Decay


def add_decay(plan: Plan, step: Decay, buffers: tuple[int, int], weights: Mapping[str, Weight]) -> None:
    """`buffers`: of x and out. The weight is a vector, or a matrix of one column; zeros of one that is a shape only."""
    weight = weights[step.weight]
    if weight.is_shape_only:
        values: Float32 = np.zeros(step.heads, np.float32)
    else:
        values = dequantize("generic", weight.matrix).reshape(-1) if step.column else weight.vector
    plan.decay(*buffers, values.repeat(step.x.width // step.heads), weights[step.bias].vector)
