from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import UsageError
from llamaclust.core.limits import layer_span, shard_position


@dataclass(frozen=True, slots=True)
class Assignment:
    """Layers (or expert shards) [start, end) of one worker, or of a group that divides them by `shares`."""

    workers: tuple[str, ...]
    start: int
    end: int
    shares: tuple[int, ...] = ()  # Shares of a group's members, starting with the leader.

    @property
    def text(self) -> str:
        names = " and ".join(filter(None, (", ".join(map(repr, self.workers[:-1])), repr(self.workers[-1]))))
        return f"worker {names}" if len(self.workers) == 1 else f"workers {names}"


def checked(
    plan: Sequence[Assignment], workers: Collection[str], layers: int, expert_shards: int = 1
) -> tuple[Assignment, ...]:
    """Returns the plan sorted by layers. Raises UsageError if a worker is unknown or used twice, or if a layer is not
    assigned exactly once."""
    span = partial(layer_span, expert_shards=expert_shards)
    for entry in plan:
        if unknown := [worker for worker in entry.workers if worker not in workers]:
            raise UsageError(f"plan: unknown worker {unknown[0]!r}; the workers are {', '.join(workers)}")
        if not 0 <= entry.start < entry.end <= layers:
            what = "the range is empty" if entry.start == entry.end else f"the model has layers {span(0, layers)}"
            raise UsageError(f"plan: {entry.text} cannot have layers {span(entry.start, entry.end)}, because {what}")
    _check_once(plan, span)
    ordered = sorted(plan, key=lambda entry: entry.start)
    _check_covered(ordered, layers, span)
    return tuple(ordered)


def check_possible(plan: Sequence[Assignment], possible: NDArray[np.bool_], expert_shards: int = 1) -> None:
    """Raises UsageError if a bound divides layers that share KV memory, or is inside an indivisible layer."""
    borders = np.flatnonzero(possible.diagonal())
    for entry in plan:
        if not possible[entry.start, entry.end]:
            known = ", ".join(str(shard_position(int(border), expert_shards)) for border in borders)
            why = "a bound divides layers that share keys and values"
            if expert_shards > 1:
                why += ", or is inside a layer that cannot be divided"
            layers = layer_span(entry.start, entry.end, expert_shards)
            raise UsageError(f"plan: {entry.text} cannot have layers {layers}: {why}; allowed bounds are {known}")


_Span = Callable[[int, int], str]


def _check_once(plan: Sequence[Assignment], span: _Span) -> None:
    ranges: dict[str, tuple[int, int]] = {}
    for entry in plan:
        for worker in entry.workers:
            if worker in ranges:
                two = f"{span(*ranges[worker])} and {span(entry.start, entry.end)}"
                raise UsageError(f"plan: worker {worker!r} has layers {two}; give each worker one range")
            ranges[worker] = entry.start, entry.end


def _check_covered(ordered: Sequence[Assignment], layers: int, span: _Span) -> None:
    covered, before = 0, ""
    for entry in ordered:
        start, end = entry.start, entry.end
        if start > covered:
            raise UsageError(
                f"plan: layers {span(covered, start)} are on no worker; the model has layers {span(0, layers)}"
            )
        if start < covered:
            twice = span(start, min(covered, end))
            raise UsageError(f"plan: layers {twice} of {entry.text} are assigned twice; {before}")
        covered, before = end, f"{entry.text} {'has' if len(entry.workers) == 1 else 'have'} {span(start, end)}"
    if covered < layers:
        raise UsageError(
            f"plan: layers {span(covered, layers)} are on no worker; the model has layers {span(0, layers)}"
        )
