"""Events that a coordinator reports: progress of its start, notices, requests that its end waits for.

Events cross a pipe as JSON lines when the coordinator runs detached from the command that started it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, get_args


@dataclass(frozen=True, slots=True)
class AwaitingWorkers:
    """Workers are to be started elsewhere: what to do, one line an entry."""

    lines: tuple[str, ...]
    missing: tuple[str, ...] = ("workers",)  # in words


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """One of those is a member; the missing ones, in words."""

    worker: str
    host: str
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a start waits for, and why, in one line."""

    text: str


@dataclass(frozen=True, slots=True)
class Measuring:
    """Workers measure their machine, which takes some seconds; the next start knows the figures."""

    workers: tuple[str, ...]
    what: str  # is measured


@dataclass(frozen=True, slots=True)
class WorkerLoading:
    """A worker has made `done_bytes` of `total_bytes` of weights ready."""

    worker: str
    start: float  # of its layers, with fractions inside a layer
    end: float
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class WorkerReading:
    """A worker has read `done_bytes` of `total_bytes` of the model's file for workers that lack it."""

    worker: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class PlanMade:
    """The plan as `llamaclust plan` prints it, one line an entry."""

    lines: tuple[str, ...]


class ModelUse(StrEnum):
    """What requests of a model get."""

    TEXT = "text"
    EMBEDDINGS = "embeddings"
    RANKS = "ranks"


@dataclass(frozen=True, slots=True)
class Ready:
    """The API answers."""

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
    """The start ended with an error; the process that started it exits with `exit_code`."""

    message: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Notice:
    """What has happened to a cluster that runs, in one line: a worker is lost or back, layers move, requests go on."""

    text: str


@dataclass(frozen=True, slots=True)
class Draining:
    """The cluster is to end: so many requests are finished first, for `limit_s` at most."""

    requests: int
    limit_s: float


StartProgress = AwaitingWorkers | WorkerJoined | Waiting | Measuring | PlanMade | WorkerLoading | WorkerReading | Ready
Event = StartProgress | StartFailed | Notice | Draining
Report = Callable[[Event], None]

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Event)}


def awaited(event: Event) -> str | None:
    """What a start waits for from this event on; None: as before."""
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
    """The event as one line of JSON."""
    return json.dumps({"event": type(event).__name__, **asdict(event)}) + "\n"


def from_line(line: str) -> Event:
    """The event that `to_line` wrote; the pipe's other end is our own process."""
    fields = json.loads(line)
    event: Event = _KINDS[fields.pop("event")](**fields)
    return event
