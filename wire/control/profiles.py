"""Control messages about the measured speeds of workers and of the links between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llamaclust.core.bounds import (
    MAX_PERMIT,
    Address,
    Integer,
    Line,
    MemoryBytes,
    ModelId,
    ModelPath,
    Real,
    Size,
    WorkerName,
)
from llamaclust.core.profile import Profile

Permit = Annotated[str, Line(MAX_PERMIT)]

QuantTypes = Annotated[tuple[Annotated[int, Integer(0, 255)], ...], Size(0, 256)]
"""Numbers of quant types in ggml, for example 12 for Q4_K."""


@dataclass(frozen=True, slots=True)
class ProfileWorker:
    """Orders a worker to measure its machine, matrix products of each type in `quant_types`, and a model's steps."""

    model_path: ModelPath | None = None
    model_id: ModelId = ""
    request_id: int = 0
    quant_types: QuantTypes = ()


@dataclass(frozen=True, slots=True)
class WorkerProfile:
    """Answers ProfileWorker. The profile has no step times if the model's file is missing or memory is short."""

    profile: Profile
    request_id: int = 0
    # Memory that the process keeps after the measurement, for example for modules and stacks.
    kept_bytes: MemoryBytes = 0


@dataclass(frozen=True, slots=True)
class LinkEnd:
    worker: WorkerName
    address: Address  # Address of the worker's Stage service.
    permit: Permit = ""  # The coordinator's permit to measure this link.
    link_address: Address = ""  # Address for links between group members, or "" if the worker takes part in no group.


@dataclass(frozen=True, slots=True)
class ProfileLinks:
    ends: Annotated[tuple[LinkEnd, ...], Size(0, 1 << 12)]
    request_id: int = 0


@dataclass(frozen=True, slots=True)
class LinkProfile:
    round_trip_s: Annotated[float, Real(0.0, 86400.0)]  # Round trip of one token's hidden state and a short answer.
    bytes_s: Annotated[float, Real(1e-3, 1e18)]  # Throughput of large messages, in bytes per second.
    # Round trip between the two kernels, without the programs, or None if it is unknown.
    network_s: Annotated[float, Real(0.0, 86400.0)] | None = None


@dataclass(frozen=True, slots=True)
class LinkProfiles:
    """Answers ProfileLinks. `links` has one profile for each of the request's `ends`, in the same order."""

    links: Annotated[tuple[LinkProfile, ...], Size(0, 1 << 12)]
    request_id: int = 0
