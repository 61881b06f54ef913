"""What the coordinator and the ranks of an MPI job exchange, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, get_args


@dataclass(frozen=True, slots=True)
class StartWorker:
    """To a rank. `addresses`: HOST:PORT of the enrolment port, by one of which this rank's machine reaches it."""

    rank: int
    settings: str = field(repr=False)  # JSON of WorkerSettings, with the token; threads None: the rank's share
    addresses: tuple[str, ...] = ()
    sharers: int = 1  # ranks on this rank's machine, which rank 0 knows


@dataclass(frozen=True, slots=True)
class EndWorker:
    """To a rank: its worker gets this signal, if it has one."""

    rank: int
    number: int


@dataclass(frozen=True, slots=True)
class Leave:
    """To a rank: its worker is killed if it is still there, and it ends itself; by MPI's rules if all ranks do."""

    rank: int
    with_all: bool


@dataclass(frozen=True, slots=True)
class Machine:
    """To rank 0, first of all: where a rank is."""

    rank: int
    boot_id: str


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """To the coordinator: how its worker ended."""

    rank: int
    how: str
    last_error: str


@dataclass(frozen=True, slots=True)
class RankLost:
    """To the coordinator: MPI says so."""

    rank: int


Message = StartWorker | EndWorker | Leave | Machine | WorkerEnded | RankLost
_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Message)}


def to_bytes(message: Message) -> bytes:
    """One line."""
    return json.dumps({"message": type(message).__name__, **asdict(message)}).encode() + b"\n"


def from_bytes(data: bytes) -> Message:
    """What `to_bytes` wrote, in this job."""
    fields = json.loads(data)
    message: Message = _KINDS[fields.pop("message")](**fields)
    return message
