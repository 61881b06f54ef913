"""`plan --assume`: what machines would do that are described, not there."""

from __future__ import annotations

import json

from rich.console import Console

from llamaclust.core.errors import UsageError
from llamaclust.tools.assume.assumed_plan import AssumedPlan, Survey, plan_assumed, plan_shapes
from llamaclust.tools.assume.machines import EXAMPLE


def show_assumed_plan(machines: str | None, model: str | None, overrides: list[str], as_json: bool) -> None:
    """Prints the plan, or without a model a table of those of all named shapes. Raises what `plan_assumed` does, and
    UsageError where there are no machines."""
    if machines is None:
        raise UsageError(f"--model: is for --assume MACHINES, for example --assume {EXAMPLE!r}")
    found = _planned(machines, model, overrides)
    print(json.dumps(found.json()) if as_json else "\n".join(found.lines()))


def _planned(machines: str, model: str | None, overrides: list[str]) -> AssumedPlan | Survey:
    """A terminal shows meanwhile what is planned."""
    with Console(stderr=True, highlight=False).status("planning") as status:
        if model is not None:
            return plan_assumed(machines, model, overrides)
        return plan_shapes(machines, overrides, lambda name: status.update(f"planning {name}"))
