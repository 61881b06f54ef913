"""What a stage takes beside weights and KV memory. The planner knows no backend: it is handed somebody who does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llamaclust.cluster.planner.costs import Counts


@dataclass(frozen=True, slots=True)
class StagePlace:
    """What a stage's workspace depends on, besides the model and the rows of a microbatch."""

    threads: int
    context_length: int
    is_last: bool  # it has the head
    device: str = "cpu"


Workspace = Callable[[StagePlace], int]
"""Bytes of any stage at such a place, at most. Asked often for equal places: it is to remember."""

Rounding = Callable[[str], Counts | int]
"""What weights of layers [start, end) take of a device's memory beyond their bytes: a table by start and end, or the
same for all. It is to remember likewise."""


def no_rounding(device: str) -> int:
    """Memory is given out to the byte."""
    return 0
