"""Describes the plan of the running pipeline, and decides whether a new plan is worth a move of layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from llamaclust.cluster.control.observations import Incarnation
from llamaclust.cluster.planner.plan import Plan, Prediction
from llamaclust.core.gpus import DeviceLayers

_CLEARLY_BETTER = 0.95
"""A plan is clearly better than another if it takes at most this fraction of the other plan's time."""


@dataclass(frozen=True, slots=True)
class Serving:
    plan: Plan
    workers: tuple[Incarnation, ...]  # Workers in the order of their stages.

    def is_worth_keeping(self, plan: Plan) -> bool:
        """True if a move of layers to `plan` would bring no clear gain."""
        if self.plan.has_encoder != plan.has_encoder:
            return self.plan.has_encoder
        return self.has_layers_as(plan) or self.is_as_good_as(plan)

    def has_layers_as(self, plan: Plan) -> bool:
        return _layers(self.plan) == _layers(plan) and self.plan.wide_tiles == plan.wide_tiles

    def predicted(self, prediction: Prediction | None) -> Serving:
        """Returns a copy with a new prediction of the plan's speed."""
        return replace(self, plan=replace(self.plan, prediction=prediction))

    def is_as_good_as(self, plan: Plan) -> bool:
        """True if `plan` has the same stages and shares, and its prediction is not clearly better."""
        served, new = self.plan.prediction, plan.prediction
        if served is None or new is None or _parts(self.plan) != _parts(plan):
            return False
        return (
            new.token_s >= served.token_s * _CLEARLY_BETTER
            and served.tokens_per_s >= new.tokens_per_s * _CLEARLY_BETTER
            and self.plan.kv_blocks >= plan.kv_blocks * _CLEARLY_BETTER
        )


def is_clearly_faster(plan: Plan, other: Plan) -> bool:
    new, old = plan.prediction, other.prediction
    if new is None or old is None:
        return False
    return new.token_s < old.token_s * _CLEARLY_BETTER and new.tokens_per_s >= old.tokens_per_s


_Part = tuple[Fraction, Fraction, tuple[int, ...], int]
"""A stage's layer range (start and end), the shares of its group, and the index of the member in the group."""


def _parts(plan: Plan) -> list[_Part]:
    shards = plan.expert_shards
    return [
        (Fraction(stage.start, shards), Fraction(stage.end, shards), stage.shares, stage.member)
        for stage in plan.stages
    ]


def _layers(plan: Plan) -> list[tuple[str, _Part, tuple[DeviceLayers, ...]]]:
    parts = zip(plan.stages, _parts(plan), strict=True)
    return [(stage.worker, part, stage.device_layers) for stage, part in parts]
