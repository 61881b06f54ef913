"""Whose turn it is: prompts and choices of one request take turns with other requests. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from heapq import nsmallest

from llamaclust.cluster.scheduler.sequences import Sequence


def turn_of(sequence: Sequence) -> str:
    """Sequences of one request have the same."""
    return sequence.request.group or sequence.request.request_id


def running_by_turn(running: Iterable[Sequence]) -> Counter[str]:
    """How many sequences of each request run."""
    return Counter(map(turn_of, running))


def in_turn(waiting: Iterable[Sequence], running: Counter[str], most: int) -> list[Sequence]:
    """The first `most` of those that wait, in the order in which `first_in_turn` would choose them if none started."""
    return nsmallest(most, waiting, key=lambda sequence: running[turn_of(sequence)])


def first_in_turn(waiting: Iterable[Sequence], running: Counter[str]) -> Sequence:
    """Of those that wait: the first one of the request with the fewest that run."""
    fewest: Sequence | None = None
    for sequence in waiting:
        if not running[turn_of(sequence)]:
            return sequence
        if fewest is None or running[turn_of(sequence)] < running[turn_of(fewest)]:
            fewest = sequence
    assert fewest is not None, "none waits"
    return fewest


def takes_turn(sequence: Sequence, running: Counter[str]) -> bool:
    """Whether others give way to it: nothing of its request runs, and several sequences of another one do."""
    return not running[turn_of(sequence)] and max(running.values(), default=0) > 1
