"""Sampling tasks of consecutive output rows."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, chain, repeat

from llamaclust.core.sampler.tasks import RowTask, SampleTask


def in_a_row(first: SampleTask, count: int) -> tuple[RowTask, ...]:
    """Returns the tasks of `count` consecutive rows."""
    return tuple(accumulate(repeat(first, count), lambda task, _: task.next()))


def chained(groups: Iterable[tuple[RowTask, ...]]) -> tuple[RowTask, ...]:
    return tuple(chain.from_iterable(groups))
