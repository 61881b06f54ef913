from __future__ import annotations

from dataclasses import dataclass, field

from llamaclust.cluster.scheduler.requests import Update
from llamaclust.cluster.scheduler.rows.retries import RowFault


@dataclass(slots=True)
class Completed:
    updated: list[tuple[int, list[Update]]] = field(default_factory=list)  # a sequence's key, and its updates
    faults: list[RowFault] = field(default_factory=list)  # faults of the last stage
    failed_elsewhere: list[int] = field(default_factory=list)  # keys of sequences that end, whose fault was no worker's
