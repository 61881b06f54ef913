from __future__ import annotations

from dataclasses import dataclass, field

from llamaclust.cluster.scheduler.requests import Update
from llamaclust.cluster.scheduler.rows.retries import RowFault


@dataclass(slots=True)
class Completed:
    updated: list[tuple[int, list[Update]]] = field(default_factory=list)  # Pairs of a sequence's key and its updates.
    faults: list[RowFault] = field(default_factory=list)
    # Keys of failed sequences that also failed on another worker, so that no worker was at fault.
    failed_elsewhere: list[int] = field(default_factory=list)
