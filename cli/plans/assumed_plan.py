"""The option --assume of `plan`, which plans for machines that the user describes."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console

from llamaclust.cluster.planner.speculation import USUAL_ACCEPTANCES
from llamaclust.core.errors import UsageError
from llamaclust.tools.assume.assumed_plan import AssumedPlan, Survey, plan_assumed, plan_shapes
from llamaclust.tools.assume.machines import EXAMPLE


def show_assumed_plan(
    machines: str | None,
    model: str | None,
    overrides: list[str],
    as_json: bool,
    acceptances: Sequence[float] | None = None,
) -> None:
    """Prints the plan for a model, or a table of plans for all known models if `model` is None. The gain from drafts is
    predicted for each acceptance rate in `acceptances`. Raises UsageError if an argument is missing, and the errors of
    `plan_assumed`."""
    if machines is None:
        raise UsageError(f"--model needs --assume MACHINES, for example --assume {EXAMPLE!r}")
    if acceptances is not None and model is None:
        raise UsageError("--acceptance needs --model MODEL: the table of all models does not show the gain from drafts")
    found = _planned(machines, model, overrides, USUAL_ACCEPTANCES if acceptances is None else acceptances)
    print(json.dumps(found.json()) if as_json else "\n".join(found.lines()))


def _planned(
    machines: str, model: str | None, overrides: list[str], acceptances: Sequence[float]
) -> AssumedPlan | Survey:
    with Console(stderr=True, highlight=False).status("planning") as status:
        if model is not None:
            return plan_assumed(machines, model, overrides, acceptances)
        return plan_shapes(machines, overrides, lambda name: status.update(f"planning {name}"))
