"""Manual plans: every layer exactly once, every worker known."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import UsageError

Assignment = tuple[str, int, int]
"""(worker, start, end): layers [start, end)."""


def checked(plan: Sequence[Assignment], workers: Collection[str], layers: int) -> tuple[Assignment, ...]:
    """The plan in order of layers. UsageError names the layers or the worker that are wrong."""
    for worker, start, end in plan:
        if worker not in workers:
            raise UsageError(f"plan: unknown worker {worker!r}; known: {', '.join(workers)}")
        if not 0 <= start < end <= layers:
            what = "that is no layer" if start == end else f"the model has layers [0, {layers})"
            raise UsageError(f"plan: layers [{start}, {end}) of worker {worker!r}: {what}")
    _check_once(plan)
    ordered = sorted(plan, key=lambda entry: entry[1])
    _check_covered(ordered, layers)
    return tuple(ordered)


def check_possible(plan: Sequence[Assignment], possible: NDArray[np.bool_]) -> None:
    """UsageError for a border that divides layers which read the same keys and values; `possible`: by start and end."""
    borders = np.flatnonzero(possible.diagonal())
    for worker, start, end in plan:
        if not possible[start, end]:
            known = ", ".join(map(str, borders))
            what = "divides layers that read the same keys and values"
            raise UsageError(
                f"plan: layers [{start}, {end}) of worker {worker!r}: a border {what}; borders may be {known}"
            )


def _check_once(plan: Sequence[Assignment]) -> None:
    ranges: dict[str, tuple[int, int]] = {}
    for worker, start, end in plan:
        if worker in ranges:
            two = f"[{ranges[worker][0]}, {ranges[worker][1]}) and [{start}, {end})"
            raise UsageError(f"plan: worker {worker!r} has layers {two}; a worker holds one range")
        ranges[worker] = start, end


def _check_covered(ordered: Sequence[Assignment], layers: int) -> None:
    covered, before = 0, ""
    for worker, start, end in ordered:
        if start > covered:
            raise UsageError(f"plan: layers [{covered}, {start}) are on no worker; the model has layers [0, {layers})")
        if start < covered:
            twice = f"layers [{start}, {min(covered, end)}) of worker {worker!r} are on another one too"
            raise UsageError(f"plan: {twice}: {before}")
        covered, before = end, f"worker {worker!r} has [{start}, {end})"
    if covered < layers:
        raise UsageError(f"plan: layers [{covered}, {layers}) are on no worker; the model has layers [0, {layers})")
