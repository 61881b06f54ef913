"""Events that a coordinator reports. A detached coordinator sends them to its command as JSON lines in a pipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, get_args


@dataclass(frozen=True, slots=True)
class AwaitingWorkers:
    """Instructions to start workers elsewhere. Each entry of `lines` is one line of text."""

    lines: tuple[str, ...]
    missing: tuple[str, ...] = ("workers",)  # in words


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    worker: str
    host: str
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Waiting:
    text: str


@dataclass(frozen=True, slots=True)
class Measuring:
    """Workers are measuring their machines, which takes some seconds. The next start reuses the results."""

    workers: tuple[str, ...]
    what: str  # is measured


@dataclass(frozen=True, slots=True)
class WorkerLoading:
    worker: str
    start: float  # of its layers, with fractions inside a layer
    end: float
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class WorkerReading:
    worker: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class PlanMade:
    lines: tuple[str, ...]


class ModelUse(StrEnum):
    TEXT = "text"
    EMBEDDINGS = "embeddings"
    RANKS = "ranks"


@dataclass(frozen=True, slots=True)
class Ready:
    name: str
    api: str
    model: str
    api_keys_file: str | None = None
    fingerprint: str | None = None  # SHA-256 of the certificate; None: plain HTTP
    ca_file: str | None = None  # the certificate, where it is the cluster's own
    use: ModelUse = ModelUse.TEXT  # of the model
    others: tuple[str, ...] = ()  # further models that generate, and adapters
    collector: str | None = None  # where telemetry goes; None: it is off
    loads_on_demand: bool = True  # False: no model is loaded yet, and requests load none


@dataclass(frozen=True, slots=True)
class StartFailed:
    message: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Notice:
    text: str


@dataclass(frozen=True, slots=True)
class Draining:
    """The cluster ends when these requests have ended, or after `limit_s`."""

    requests: int
    limit_s: float


StartProgress = AwaitingWorkers | WorkerJoined | Waiting | Measuring | PlanMade | WorkerLoading | WorkerReading | Ready
Event = StartProgress | StartFailed | Notice | Draining
Report = Callable[[Event], None]

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Event)}


def awaited(event: Event) -> str | None:
    """Describes what a start waits for after this event, or returns None if the event does not change it."""
    match event:
        case AwaitingWorkers() | WorkerJoined():
            return ", ".join(event.missing)
        case Waiting(text):
            return text
        case Measuring():
            return f"measurements of {', '.join(event.workers)}"
        case PlanMade():
            return "workers to load their layers"
        case _:
            return None


def to_line(event: Event) -> str:
    return json.dumps({"event": type(event).__name__, **asdict(event)}) + "\n"


def from_line(line: str) -> Event:
    fields = json.loads(line)
    event: Event = _KINDS[fields.pop("event")](**fields)
    return event
