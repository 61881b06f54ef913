"""Emits scans and norms, which may have a row of weights for each head or group."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llamaclust.kernels._native import Plan
from llamaclust.kernels.packed.weights import Weight
from llamaclust.model.program import RmsNorm, Scan


def add_scan(plan: Plan, step: Scan, buffers: tuple[int, int, int], layer: int, weights: Mapping[str, Weight]) -> None:
    bias, decay, skip = (weights[name] for name in (step.bias, step.decay, step.skip))
    plan.scan(*buffers, layer, step.groups, step.state_size, bias.vector, decay.matrix, skip.matrix)


def add_norm(plan: Plan, step: RmsNorm, x: int, out: int, weights: Mapping[str, Weight]) -> None:
    if step.weight is None:
        plan.rms_norm(x, out, np.ones(step.width, np.float32), step.epsilon)
    elif step.own_weights:
        plan.group_norm(x, out, weights[step.weight].matrix, step.epsilon)
    else:
        plan.rms_norm(x, out, weights[step.weight].vector, step.epsilon)
