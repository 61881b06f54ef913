"""What a stage takes beside weights and KV memory. The planner knows no backend: it is handed somebody who does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StagePlace:
    """What a stage's workspace depends on, besides the model and the rows of a microbatch."""

    threads: int
    context_length: int
    is_last: bool  # it has the head
    device: str = "cpu"


Workspace = Callable[[StagePlace], int]
"""Bytes of any stage at such a place, at most. Asked often for equal places: it is to remember."""
