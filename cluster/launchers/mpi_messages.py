"""JSON messages between the coordinator and the ranks of an MPI job."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, get_args


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Orders a rank to start a worker. The rank can reach at least one of the enrolment `addresses`."""

    rank: int
    # WorkerSettings as JSON, including the token. If `threads` is None, the rank uses its share of the cores.
    settings: str = field(repr=False)
    addresses: tuple[str, ...] = ()
    sharers: int = 1  # Number of ranks on the same machine, filled in by rank 0.


@dataclass(frozen=True, slots=True)
class EndWorker:
    rank: int
    number: int


@dataclass(frozen=True, slots=True)
class Leave:
    """Orders a rank to kill its worker and end. MPI can be finalized only if no rank is lost (`is_complete`)."""

    rank: int
    is_complete: bool


@dataclass(frozen=True, slots=True)
class Machine:
    rank: int
    boot_id: str


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    rank: int
    how: str
    last_error: str


@dataclass(frozen=True, slots=True)
class RankLost:
    rank: int


Message = StartWorker | EndWorker | Leave | Machine | WorkerEnded | RankLost
_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Message)}


def to_bytes(message: Message) -> bytes:
    return json.dumps({"message": type(message).__name__, **asdict(message)}).encode() + b"\n"


def from_bytes(data: bytes) -> Message:
    fields = json.loads(data)
    message: Message = _KINDS[fields.pop("message")](**fields)
    return message
