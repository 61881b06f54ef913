"""The supervisor's observations. They are plain values in one queue, in the order in which they happened."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from llamaclust.cluster.planner.adjacency import Pairs
from llamaclust.cluster.planner.plan import Plan, Prediction
from llamaclust.core.errors import LlamaclustError

Incarnation = tuple[str, int]
"""A worker's name, and the unique number of its join."""


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """The values that a plan depends on. When they change, a new plan is due."""

    workers: tuple[Incarnation, ...] = ()  # workers that may hold layers
    quarantined: frozenset[str] = frozenset()
    partitions: Pairs = frozenset()
    links: int = 0  # number of times that links have changed
    memory: int = 0  # number of times that other models freed or took memory


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """A worker is a member. If `join` is unchanged, the membership is too."""

    name: str
    join: int


@dataclass(frozen=True, slots=True)
class WorkerLost:
    name: str


@dataclass(frozen=True, slots=True)
class PartitionsChanged:
    """All pairs of live workers that cannot reach each other now."""

    pairs: Pairs


@dataclass(frozen=True, slots=True)
class DrainRequested:
    name: str


@dataclass(frozen=True, slots=True)
class UndrainRequested:
    name: str


@dataclass(frozen=True, slots=True)
class PipelineLost:
    """The pipeline failed. `error` names the worker at fault, if it is known. `requests` has the keys of requests in
    flight. `causes` has the keys of requests that caused the failure and end. `is_repeated` means that the worker has
    failed on the same rows before."""

    error: LlamaclustError
    requests: frozenset[int] = frozenset()
    causes: frozenset[int] = frozenset()
    is_repeated: bool = False


@dataclass(frozen=True, slots=True)
class RowsFailed:
    key: int


@dataclass(frozen=True, slots=True)
class Tick:
    """The event loop's time, observed before each decision."""

    now_s: float


@dataclass(frozen=True, slots=True)
class Planned:
    inputs: PlanInputs
    plan: Plan | None = None
    error: LlamaclustError | None = None
    served: Prediction | None = None  # for the serving plan, by the same profiles and links; None: unknown
    is_beside: bool = False  # other models hold memory of these workers


@dataclass(frozen=True, slots=True)
class Suspect:
    name: str
    error: LlamaclustError


@dataclass(frozen=True, slots=True)
class EpochLoadFailed:
    """An epoch's load failed. `file_is_absent` means that no present worker has the model's file, and some need it."""

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
    LINKS_CHANGED = auto()  # links were measured again, with other results
    EPOCH_LOADED = auto()  # the planned epoch is loaded and connected
    EPOCH_SERVING = auto()  # the engine runs on the loaded epoch
    PIPELINE_CLOSED = auto()  # the lost pipeline is closed, and its workers' reports are confirmed or dropped
    RETIRING_EMPTY = auto()  # no sequence runs on the epoch before the serving one any more
    RETIRING_FREED = auto()  # the retired epoch's stages are freed
    WORKERS_EXPELLED = auto()  # the workers of the last `Expel` count as lost
    WAKE_REQUESTED = auto()  # the model is to be loaded
    SLEEP_REQUESTED = auto()  # the model is to be unloaded, unless it has requests
    TURN_ENDED = auto()  # the model is to be unloaded for another one; its requests wait
    ASLEEP = auto()  # the model's stages are freed
    MEMORY_FREED = auto()  # by another model
    MEMORY_TAKEN = auto()  # by another model, since the newest plan was made
    ACTION_ENDED = auto()  # the next action may begin


PoolObservation = WorkerSeen | WorkerLost | PartitionsChanged | DrainRequested | UndrainRequested
Observation = (
    PoolObservation | PipelineLost | RowsFailed | Tick | Planned | EpochLoadFailed | RequestsFailed | Noticed | Signal
)
