"""Plans one model, or all known shapes, on described machines. Adds predicted speed, advice and missing memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamaclust.cluster.planner.format import plan_json, plan_lines
from llamaclust.cluster.planner.plan import Plan, Prediction
from llamaclust.cluster.planner.speculation import USUAL_ACCEPTANCES
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.sizes import gigabytes, mib
from llamaclust.tools.assume import rates
from llamaclust.tools.assume.advice import Alone, fastest_alone, shown_speed, what_fits, what_helps
from llamaclust.tools.assume.assumed_model import AssumedModel, assumed_model
from llamaclust.tools.assume.description import parse_machines
from llamaclust.tools.assume.machines import AssumedMachines
from llamaclust.tools.assume.planning import AssumedCluster, prediction_of
from llamaclust.tools.assume.shapes import SHAPES

_HEADINGS = ("model", "file", "fits", "tok/s", "first token", "what would help")
_RIGHT = (1, 3, 4)


@dataclass(frozen=True, slots=True)
class AssumedPlan:
    model: AssumedModel
    assumed: AssumedMachines
    plan: Plan
    alone: Alone | None  # The fastest machine that could hold the model alone, if the plan has several stages.
    helps: tuple[str, ...]
    acceptances: tuple[float, ...]  # Shares of accepted drafts for which the gain from drafts is predicted.

    def json(self) -> dict[str, Any]:
        return plan_json(self.plan, self.acceptances) | {
            "model": self.model.title,
            "quantization": self.model.shown_mix,
            "file_bytes": self.model.file.size_bytes,
            "machines": len(self.assumed.machines),
            "alone": self._alone_json(),
            "helps": list(self.helps),
            "assumptions": list(self._assumptions()),
        }

    def _assumptions(self) -> Iterator[str]:
        yield from rates.assumptions(self.assumed)
        if self.model.lacks_encoder and not any(stage.encoder_bytes for stage in self.plan.stages):
            yield "text only; the encoder of images is counted once the model is downloaded"

    def lines(self) -> Iterator[str]:
        prediction = prediction_of(self.plan)
        used = len(self.plan.stages)
        yield (
            f"{_named(self.model)} on {used} of {_machines(len(self.assumed.machines))}: it fits, "
            f"{shown_speed(1 / prediction.token_s)} tok/s for one request"
        )
        yield from plan_lines(self.plan, self.acceptances)
        if self.alone is not None:
            yield f"  {_alone_text(self.alone, prediction)}"
        yield from (f"  what would help: {text}" for text in self.helps)
        yield from (f"  assumed: {text}" for text in self._assumptions())

    def _alone_json(self) -> dict[str, Any] | None:
        if self.alone is None:
            return None
        prediction = self.alone.prediction
        return {
            "worker": self.alone.machine,
            "token_ms": 1e3 * prediction.token_s,
            "ttft_ms": 1e3 * prediction.ttft_s,
            "tokens_per_s": prediction.tokens_per_s,
        }


def _alone_text(alone: Alone, together: Prediction) -> str:
    speeds = f"{alone.machine} alone: {_speeds(alone.prediction)}"
    if not alone.is_better(together):
        return speeds
    return f"for one request at a time use {speeds}; all of them are for long prompts and many requests"


def _speeds(prediction: Prediction) -> str:
    return (
        f"{shown_speed(1 / prediction.token_s)} tok/s for one request, first token after "
        f"{1e3 * prediction.ttft_s:.0f} ms, {prediction.tokens_per_s:.0f} tok/s for many requests"
    )


def plan_assumed(
    machines: str, spec: str, overrides: Sequence[str], acceptances: Sequence[float] = USUAL_ACCEPTANCES
) -> AssumedPlan:
    """Plans a model on described machines. Raises UsageError if an argument is wrong, and InsufficientMemoryError with
    advice if the model does not fit."""
    cluster = AssumedCluster.of(parse_machines(machines), overrides)
    model = assumed_model(spec)
    try:
        plan = cluster.plan(model)
    except InsufficientMemoryError as error:
        ways = [*what_fits(cluster, model, error)]
        if error.fitting_context is not None:
            ways.append(f"--set context_length={error.fitting_context}")
        told = error if error.problem is None or not ways else f"{error.problem}. What would fit: {'; or '.join(ways)}"
        explained = InsufficientMemoryError(f"{_named(model)}: {told}")
        explained.missing_bytes = error.missing_bytes
        raise explained from error
    alone = fastest_alone(cluster, model) if len(plan.stages) > 1 else None
    helps = tuple(what_helps(cluster, model, plan))
    return AssumedPlan(model, cluster.assumed, plan, alone, helps, tuple(acceptances))


@dataclass(frozen=True, slots=True)
class ShapePlan:
    name: str
    model: AssumedModel
    plan: Plan | None
    problem: str
    helps: tuple[str, ...]
    alone: Alone | None = None  # The fastest machine that could hold the model alone, if the plan has several stages.

    @property
    def fits_alone(self) -> bool:
        return self.alone is not None or (self.plan is not None and len(self.plan.stages) == 1)

    def cells(self) -> tuple[str, ...]:
        title = f"{self.name}: {self.model.title} {self.model.shown_mix}"
        size = gigabytes(self.model.file.size_bytes)
        if self.plan is None:
            return title, size, self.problem, "-", "-", "; or ".join(self.helps)
        prediction, used = prediction_of(self.plan), len(self.plan.stages)
        speeds = shown_speed(1 / prediction.token_s), f"{prediction.ttft_s:.1f} s"
        alone = "; one would do" if self.fits_alone and used > 1 else ""
        return title, size, f"yes, on {_machines(used)}{alone}", *speeds, self._best_help()

    def _best_help(self) -> str:
        if self.alone is not None and self.plan is not None and self.alone.is_better(prediction_of(self.plan)):
            return f"use {self.alone.machine} alone: {shown_speed(1 / self.alone.prediction.token_s)} tok/s"
        return next((text for text in self.helps if "tok/s" in text), "".join(self.helps[:1]))

    def json(self) -> dict[str, Any]:
        values: Mapping[str, Any] = {} if self.plan is None else plan_json(self.plan)
        return {
            **values,
            "name": self.name,
            "model": self.model.title,
            "quantization": self.model.shown_mix,
            "file_bytes": self.model.file.size_bytes,
            "fits": self.plan is not None,
            "fits_alone": self.fits_alone,
            "problem": self.problem or None,
            "helps": list(self.helps),
        }


@dataclass(frozen=True, slots=True)
class Survey:
    assumed: AssumedMachines
    plans: tuple[ShapePlan, ...]

    def json(self) -> dict[str, Any]:
        return {
            "machines": len(self.assumed.machines),
            "models": [plan.json() for plan in self.plans],
            "assumptions": list(rates.assumptions(self.assumed)),
        }

    def lines(self) -> Iterator[str]:
        rows = [_HEADINGS, *(plan.cells() for plan in self.plans)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = zip(row, widths, strict=True)
            aligned = (cell.rjust(w) if at in _RIGHT else cell.ljust(w) for at, (cell, w) in enumerate(cells))
            yield "  ".join(aligned).rstrip()
        prompts = {plan.plan.prompt_tokens for plan in self.plans if plan.plan is not None}
        yield from (f"  first token: after a prompt of {tokens} tokens" for tokens in sorted(prompts))
        yield "  for a whole plan, add --model NAME[:QUANTIZATION]; NAME may be in `llamaclust model list`, or a file"
        yield from (f"  assumed: {text}" for text in rates.assumptions(self.assumed))


def plan_shapes(machines: str, overrides: Sequence[str], planned: Callable[[str], None]) -> Survey:
    """Plans each known model. First calls `planned` with its name. Raises UsageError if no model can be planned."""
    cluster = AssumedCluster.of(parse_machines(machines), overrides)
    plans, errors = list[ShapePlan](), list[UsageError]()
    for name in SHAPES:
        planned(name)
        model = assumed_model(name)
        try:
            plans.append(_shape_plan(cluster, name, model))
        except UsageError as error:  # The fault concerns this model, unless all models have it.
            errors.append(error)
            plans.append(ShapePlan(name, model, None, "no", (str(error),)))
    if len(errors) == len(plans):
        raise errors[0]
    return Survey(cluster.assumed, tuple(plans))


def _shape_plan(cluster: AssumedCluster, name: str, model: AssumedModel) -> ShapePlan:
    try:
        plan = cluster.plan(model)
    except InsufficientMemoryError as error:
        missing = "" if error.missing_bytes is None else f": {mib(error.missing_bytes)} MiB missing"
        helps = tuple(what_fits(cluster, model, error))
        return ShapePlan(name, model, None, f"no{missing}", helps)
    alone = fastest_alone(cluster, model) if len(plan.stages) > 1 else None
    return ShapePlan(name, model, plan, "", tuple(what_helps(cluster, model, plan)), alone)


def _named(model: AssumedModel) -> str:
    kind = "" if model.shown_mix is None else f" {model.shown_mix}"
    return f"{model.title}{kind} ({gigabytes(model.file.size_bytes)})"


def _machines(count: int) -> str:
    return "1 machine" if count == 1 else f"{count} machines"
