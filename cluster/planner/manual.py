"""Manual plans: every layer exactly once, every worker known."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import UsageError
from llamaclust.core.limits import layer_place, layer_span

Assignment = tuple[str, int, int]
"""(worker, start, end): layers [start, end), or parts of layers."""


def checked(
    plan: Sequence[Assignment], workers: Collection[str], layers: int, expert_shards: int = 1
) -> tuple[Assignment, ...]:
    """The plan in order of layers, or of parts of layers. UsageError names the layers or the worker that are wrong."""
    span = partial(layer_span, expert_shards=expert_shards)
    for worker, start, end in plan:
        if worker not in workers:
            raise UsageError(f"plan: unknown worker {worker!r}; known: {', '.join(workers)}")
        if not 0 <= start < end <= layers:
            what = "that is no layer" if start == end else f"the model has layers {span(0, layers)}"
            raise UsageError(f"plan: layers {span(start, end)} of worker {worker!r}: {what}")
    _check_once(plan, span)
    ordered = sorted(plan, key=lambda entry: entry[1])
    _check_covered(ordered, layers, span)
    return tuple(ordered)


def check_possible(plan: Sequence[Assignment], possible: NDArray[np.bool_], expert_shards: int = 1) -> None:
    """UsageError for a border that divides layers which read the same keys and values, or a layer that cannot be
    divided; `possible`: by start and end."""
    borders = np.flatnonzero(possible.diagonal())
    for worker, start, end in plan:
        if not possible[start, end]:
            known = ", ".join(str(layer_place(int(border), expert_shards)) for border in borders)
            what = "divides layers that read the same keys and values"
            if expert_shards > 1:
                what += ", or a layer without so many experts"
            layers = layer_span(start, end, expert_shards)
            raise UsageError(f"plan: layers {layers} of worker {worker!r}: a border {what}; borders may be {known}")


_Span = Callable[[int, int], str]
"""Layers [start, end) as text."""


def _check_once(plan: Sequence[Assignment], span: _Span) -> None:
    ranges: dict[str, tuple[int, int]] = {}
    for worker, start, end in plan:
        if worker in ranges:
            two = f"{span(*ranges[worker])} and {span(start, end)}"
            raise UsageError(f"plan: worker {worker!r} has layers {two}; a worker holds one range")
        ranges[worker] = start, end


def _check_covered(ordered: Sequence[Assignment], layers: int, span: _Span) -> None:
    covered, before = 0, ""
    for worker, start, end in ordered:
        if start > covered:
            raise UsageError(
                f"plan: layers {span(covered, start)} are on no worker; the model has layers {span(0, layers)}"
            )
        if start < covered:
            twice = f"layers {span(start, min(covered, end))} of worker {worker!r} are on another one too"
            raise UsageError(f"plan: {twice}: {before}")
        covered, before = end, f"worker {worker!r} has {span(start, end)}"
    if covered < layers:
        raise UsageError(
            f"plan: layers {span(covered, layers)} are on no worker; the model has layers {span(0, layers)}"
        )
