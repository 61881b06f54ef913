"""Defines the events that a coordinator reports. A detached coordinator sends them to the command that started it, as
JSON lines through a pipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, get_args


@dataclass(frozen=True, slots=True)
class AwaitingWorkers:
    """Instructions for starting workers on other machines, as lines of text."""

    lines: tuple[str, ...]
    missing: tuple[str, ...] = ("workers",)  # Descriptions of the workers that have not joined yet.


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
    workers: tuple[str, ...]
    what: str  # Description of the measurements.


@dataclass(frozen=True, slots=True)
class WorkerLoading:
    worker: str
    start: float  # First layer that is loaded. A fraction means a part of a layer.
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
    fingerprint: str | None = None  # SHA-256 fingerprint of the API's certificate. None if the API uses plain HTTP.
    ca_file: str | None = None  # File with the certificate if the cluster has made the certificate itself.
    use: ModelUse = ModelUse.TEXT  # Kind of results that the model computes.
    others: tuple[str, ...] = ()  # Names of further text models, and of adapters.
    collector: str | None = None  # Address that telemetry is sent to. None if telemetry is off.
    loads_on_demand: bool = True  # False if no model is loaded yet and requests do not load one.


@dataclass(frozen=True, slots=True)
class StartFailed:
    message: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Notice:
    text: str


@dataclass(frozen=True, slots=True)
class Draining:
    """The cluster is stopping. It ends when its open requests have ended, at the latest after `limit_s` seconds."""

    requests: int
    limit_s: float


StartProgress = AwaitingWorkers | WorkerJoined | Waiting | Measuring | PlanMade | WorkerLoading | WorkerReading | Ready
Event = StartProgress | StartFailed | Notice | Draining
Report = Callable[[Event], None]

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Event)}


def awaited(event: Event) -> str | None:
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
