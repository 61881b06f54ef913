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
"""Quant types, as ggml's numbers."""


@dataclass(frozen=True, slots=True)
class ProfileWorker:
    """Orders a worker to measure its machine, products with weights of these quant types, and a model's steps."""

    model_path: ModelPath | None = None
    model_id: ModelId = ""
    request_id: int = 0
    quant_types: QuantTypes = ()


@dataclass(frozen=True, slots=True)
class WorkerProfile:
    """The answer to ProfileWorker. Step times are absent if the model file or enough memory is missing."""

    profile: Profile
    request_id: int = 0
    kept_bytes: MemoryBytes = 0  # of memory, that its process has taken to measure and keeps: modules, stacks


@dataclass(frozen=True, slots=True)
class LinkEnd:
    worker: WorkerName
    address: Address  # of its Stage service
    permit: Permit = ""  # the coordinator's, for this link
    link_address: Address = ""  # where it accepts links of members of a group; "": it does not


@dataclass(frozen=True, slots=True)
class ProfileLinks:
    ends: Annotated[tuple[LinkEnd, ...], Size(0, 1 << 12)]
    request_id: int = 0


@dataclass(frozen=True, slots=True)
class LinkProfile:
    round_trip_s: Annotated[float, Real(0.0, 86400.0)]  # of a token's hidden state and a short answer
    bytes_s: Annotated[float, Real(1e-3, 1e18)]  # of a stream of large messages
    network_s: Annotated[float, Real(0.0, 86400.0)] | None = None  # of the round trip, without the programs at its ends


@dataclass(frozen=True, slots=True)
class LinkProfiles:
    """The answer to ProfileLinks, with one profile for each of the request's `ends` in the same order."""

    links: Annotated[tuple[LinkProfile, ...], Size(0, 1 << 12)]
    request_id: int = 0
