"""Plans made by hand: every layer exactly once, every worker known."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from llamaclust.errors import UsageError

Assignment = tuple[str, int, int]
"""(worker, start, end): layers [start, end)."""


def checked(plan: Sequence[Assignment], workers: Collection[str], layers: int) -> tuple[Assignment, ...]:
    """The plan in order of layers. UsageError names the layers or the worker that are wrong."""
    for worker, start, end in plan:
        if worker not in workers:
            raise UsageError(f"plan: unknown worker {worker!r}; known: {', '.join(workers)}")
        if not 0 <= start < end <= layers:
            raise UsageError(f"plan: layers [{start}, {end}) of worker {worker!r}: the model has layers [0, {layers})")
    names = [worker for worker, _, _ in plan]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"plan: worker {twice!r} has two ranges of layers; a worker holds one")
    ordered = sorted(plan, key=lambda entry: entry[1])
    covered = 0
    for worker, start, end in ordered:
        if start > covered:
            raise UsageError(f"plan: layers [{covered}, {start}) are on no worker")
        if start < covered:
            raise UsageError(f"plan: layers [{start}, {min(covered, end)}) of worker {worker!r} are on another one too")
        covered = end
    if covered < layers:
        raise UsageError(f"plan: layers [{covered}, {layers}) are on no worker")
    return tuple(ordered)
