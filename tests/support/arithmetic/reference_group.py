"""Groups of reference stages, for comparisons with divided programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from llamaclust.kernels.backend import Batch, Float32
from llamaclust.kernels.reference.backend import ReferenceStage
from llamaclust.kernels.reference.steps import State, of_heads, run_step
from llamaclust.model.program import Program
from llamaclust.model.steps.across import Gather


class ReferenceGroup:
    """Runs all members of a group in one process, step by step."""

    def __init__(self, members: Sequence[ReferenceStage]) -> None:
        self.members = members

    def run(self, batch: Batch, hidden: Float32 | None) -> list[Float32]:
        """Returns each member's result. Rows that are gathered for one member only are NaN for the others."""
        states = [member.begin(batch, hidden) for member in self.members]
        runs = (_run(member.program, state) for member, state in zip(self.members, states, strict=True))
        for gathers in zip(*runs, strict=True):
            _gather(gathers, states)
        return [member.end(state) for member, state in zip(self.members, states, strict=True)]


def _run(program: Program, state: State) -> Iterator[Gather]:
    for step in program.steps:
        if isinstance(step, Gather):
            yield step
        else:
            run_step(step, state)


def _gather(gathers: Sequence[Gather], states: Sequence[State]) -> None:
    assert len(gathers) == len(states)
    assert len({(step.out, step.borders, step.lines, step.to) for step in gathers}) == 1
    given = zip(gathers, states, strict=True)
    parts = [of_heads(state[step.x], step.lines) for step, state in given if step.x is not None]
    whole = np.concatenate(parts, axis=2).reshape(-1, gathers[0].out.width)
    for member, (step, state) in enumerate(zip(gathers, states, strict=True)):
        state[step.out] = whole if step.to in (None, member) else np.full_like(whole, np.nan)
