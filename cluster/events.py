"""What a coordinator tells whoever watches its start: loading progress, the plan, the address, the end.

Events cross a pipe as JSON lines when the coordinator runs detached from the command that started it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class WorkerLoading:
    """A worker has made `done_bytes` of `total_bytes` of weights ready."""

    worker: str
    start: int
    end: int
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class PlanMade:
    """The plan as `llamaclust plan` prints it, one line an entry."""

    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """The API answers."""

    name: str
    api: str
    model: str


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The start ended with an error; the process that started it exits with `exit_code`."""

    message: str
    exit_code: int


Event = WorkerLoading | PlanMade | Ready | StartFailed
Watch = Callable[[Event], None]

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (WorkerLoading, PlanMade, Ready, StartFailed)}


def to_line(event: Event) -> str:
    """The event as one line of JSON."""
    return json.dumps({"event": type(event).__name__, **asdict(event)}) + "\n"


def from_line(line: str) -> Event:
    """The event that `to_line` wrote; the pipe's other end is our own process."""
    fields = json.loads(line)
    event: Event = _KINDS[fields.pop("event")](**fields)
    return event
