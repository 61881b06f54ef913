"""Gathers that identify a member that sends numbers that are not finite. A failed step is repeated with them."""

from __future__ import annotations

from collections.abc import Callable

from llamaclust.kernels._native import Gatherer, PythonGatherer
from llamaclust.kernels.backend import Float32
from llamaclust.kernels.gathers import bands_of, borders_in, finite_members
from llamaclust.model.program import Program
from llamaclust.model.steps.across import Gather


def checked_gathers(
    links: Gatherer, program: Program, rows: int, member: int, accuse: Callable[[int], None]
) -> PythonGatherer:
    """Returns a gatherer of member `member` that calls `accuse` with the index of a member that sent NaN or infinity,
    which may be `member` itself."""
    gathers = [step for step in program.steps if isinstance(step, Gather)]
    bands = bands_of(program, rows, links.bands)

    def gather(number: int, own: Float32, whole: Float32) -> None:
        step = gathers[number // bands]
        borders = borders_in(step, whole.shape[1])
        links.gather(number, own, whole, borders, step.to)
        if step.to not in (None, member):
            return
        are_finite = finite_members(step, whole)
        with_columns = [place for place in range(len(are_finite)) if borders[place] < borders[place + 1]]
        wrong = [place for place in with_columns if not are_finite[place]]
        # If all members sent such numbers, their common input may be wrong.
        if wrong and (len(wrong) < len(with_columns) or step.is_of_one):
            accuse(wrong[0])

    checking = PythonGatherer(gather)
    checking.bands = links.bands
    return checking
