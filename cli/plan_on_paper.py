"""`plan --assume`: what machines would do that are described, not there."""

from __future__ import annotations

import json

from llamaclust.core.errors import UsageError
from llamaclust.tools.assume.answer import answer
from llamaclust.tools.assume.machines import EXAMPLE
from llamaclust.tools.assume.shapes import SHAPES


def show_plan_on_paper(machines: str | None, model: str | None, overrides: list[str], as_json: bool) -> None:
    """Prints the plan. Raises what `answer` does, and UsageError where one of both options lacks."""
    if machines is None:
        raise UsageError(f"--model: is for --assume MACHINES, for example --assume {EXAMPLE!r}")
    if model is None:
        raise UsageError(f"--assume: give the model too: --model PATH, or one of {', '.join(SHAPES)}")
    found = answer(machines, model, overrides)
    print(json.dumps(found.json()) if as_json else "\n".join(found.lines()))
