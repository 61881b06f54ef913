"""Steps that weigh the channels of a row or mix its parts, as steps of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llamaclust.kernels._native import Plan
from llamaclust.kernels.packed.weights import Weight
from llamaclust.model import program as ir
from llamaclust.model.row_steps import MixingStep


def add_mixing(plan: Plan, step: MixingStep, reads: Sequence[int], out: int, weights: Mapping[str, Weight]) -> None:
    """`reads`: the numbers of the buffers that it reads (`kernels.fuse.reads_of`)."""
    x, *others = reads
    match step:
        case ir.ScaleByWeight(by_channel=True):
            plan.scale_channels(x, out, weights[step.weight].vector)
        case ir.ScaleByWeight():
            plan.elementwise("scale", x, x, out, float(weights[step.weight].vector[0]))
        case ir.Mix():
            y, *coefficients = others
            plan.mix(x, y, out, coefficients[0] if coefficients else None, step.width, step.first, step.offset)
        case ir.MatchMagnitude():
            plan.match_magnitude(x, others[0], out, step.epsilon)
        case ir.GaussianTopK():
            plan.gaussian_top_k(x, out, step.factor)
