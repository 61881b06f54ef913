"""Defines the events that the supervisor observes. They are plain values in one queue, in the order of the events."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from llamaclust.cluster.planner.links import Pairs
from llamaclust.cluster.planner.plan import Plan, Prediction
from llamaclust.core.errors import LlamaclustError

Incarnation = tuple[str, int]
"""A worker's name, and a number that is new each time the worker joins."""


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """The values that a plan depends on. A new plan is made when they change."""

    workers: tuple[Incarnation, ...] = ()  # Workers that may hold layers.
    quarantined: frozenset[str] = frozenset()
    partitions: Pairs = frozenset()
    disputes: Pairs = frozenset()  # Pairs of workers that must not be in one group.
    links: int = 0  # Number of times that link measurements have changed.
    memory: int = 0  # Number of times that memory was freed, or taken by other models.


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """A worker is connected. A different `join` means that it has joined again."""

    name: str
    join: int


@dataclass(frozen=True, slots=True)
class WorkerLost:
    name: str


@dataclass(frozen=True, slots=True)
class PartitionsChanged:
    """All pairs of connected workers that currently cannot reach each other."""

    pairs: Pairs


@dataclass(frozen=True, slots=True)
class DrainRequested:
    name: str


@dataclass(frozen=True, slots=True)
class UndrainRequested:
    name: str


@dataclass(frozen=True, slots=True)
class PipelineLost:
    error: LlamaclustError
    requests: frozenset[int] = frozenset()  # Keys of the requests that were in flight.
    causes: frozenset[int] = frozenset()  # Keys of the requests that caused the failure.
    is_repeated: bool = False  # True if the worker failed to compute the same tokens before.


@dataclass(frozen=True, slots=True)
class RequestsStruckOut:
    """The requests with these keys have ended, because they made a retiring pipeline fail."""

    keys: frozenset[int]


@dataclass(frozen=True, slots=True)
class RowsFailed:
    key: int


@dataclass(frozen=True, slots=True)
class Tick:
    now_s: float


@dataclass(frozen=True, slots=True)
class Planned:
    inputs: PlanInputs
    plan: Plan | None = None
    error: LlamaclustError | None = None
    # Prediction for the plan that serves now, from the same profiles and links as `plan`. None if it is unknown.
    served: Prediction | None = None
    is_beside: bool = False  # True if other models use memory of the workers in `inputs`.


@dataclass(frozen=True, slots=True)
class Suspect:
    name: str
    error: LlamaclustError


@dataclass(frozen=True, slots=True)
class EpochLoadFailed:
    """Loading the stages of a plan failed. `file_is_absent` means that no machine can send the model's file."""

    error: LlamaclustError
    is_exclusive: bool
    suspects: tuple[Suspect, ...] = ()
    file_is_absent: bool = False

    def error_of(self, name: str) -> LlamaclustError | None:
        return next((suspect.error for suspect in self.suspects if suspect.name == name), None)


@dataclass(frozen=True, slots=True)
class RequestsFailed:
    reason: str


@dataclass(frozen=True, slots=True)
class Noticed:
    text: str


class Signal(Enum):
    LINKS_CHANGED = auto()  # The links were measured again, and results have changed.
    EPOCH_LOADED = auto()  # The planned epoch is loaded and connected.
    EPOCH_SERVING = auto()  # The engine runs on the loaded epoch.
    PIPELINE_CLOSED = auto()  # The lost pipeline is closed, and all reports of broken links are checked.
    RETIRING_EMPTY = auto()  # No sequence uses the retiring epoch any longer.
    RETIRING_FREED = auto()  # The stages of the retired epoch have been freed.
    WORKERS_EXPELLED = auto()  # The workers named by the last `Expel` count as lost.
    WAKE_REQUESTED = auto()  # The model should be loaded.
    SLEEP_REQUESTED = auto()  # The model should be unloaded if it has no requests.
    TURN_ENDED = auto()  # The model should be unloaded for another model, while its requests wait.
    ASLEEP = auto()  # The model's stages have been freed.
    MEMORY_FREED = auto()  # Another model has freed memory, or a worker reports more memory than before.
    MEMORY_TAKEN = auto()  # Another model has taken memory since the newest plan was made.
    ACTION_ENDED = auto()  # The next action can begin.


PoolObservation = WorkerSeen | WorkerLost | PartitionsChanged | DrainRequested | UndrainRequested
Observation = (
    PoolObservation
    | PipelineLost
    | RequestsStruckOut
    | RowsFailed
    | Tick
    | Planned
    | EpochLoadFailed
    | RequestsFailed
    | Noticed
    | Signal
)
