"""What a coordinator knows of one worker, and what it can ask of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Any

from llamaclust import errors
from llamaclust.errors import LlamaclustError, WireError, WorkerError
from llamaclust.wire.control import (
    CoordinatorMessage,
    Failure,
    Heartbeat,
    LinksMeasured,
    LinkSpeed,
    Load,
    Loaded,
    LoadFailed,
    LoadProgress,
    Locate,
    Located,
    LocateFailed,
    Measure,
    Measured,
    MeasureLinks,
    MeasureLinksFailed,
    Register,
    Renew,
    Unload,
    Unloaded,
    WorkerMessage,
)
from llamaclust.wire.deadlines import deadline

OnProgress = Callable[[LoadProgress], None]
Say = Callable[[CoordinatorMessage], Awaitable[None]]

_MEASURE_S = 60.0
_STALL_S = 60.0
"""Without progress for so long, a load is taken to hang."""
_LINK_S = 30.0
_UNLOAD_S = 60.0
_LOCATE_S = 60.0
_DESCRIBE_S = 3600.0


class WorkerState(StrEnum):
    JOINED = "joined"  # registered, holds nothing
    LOADING = "loading"
    READY = "ready"  # holds a stage
    LEFT = "left"  # the cluster ended
    LOST = "lost"


class WorkerHandle:
    """One member. `lost` is set once it is gone for any reason but the cluster's end; then `loss` says how."""

    def __init__(self, registration: Register, say: Say, last_words: Callable[[], str]) -> None:
        self.registration = registration
        self.stages: dict[int, tuple[Load, Loaded]] = {}  # by epoch
        self.heartbeat: Heartbeat | None = None
        self.lost = asyncio.Event()
        self.loss: str | None = None
        self.left = False
        self.say = say
        self.last_words = ""  # of its log, once it is lost
        self._read_last_words = last_words
        self._located: dict[tuple[str, bool], Located] = {}
        self._on_progress: OnProgress | None = None
        self._loading: Load | None = None
        self._asked: dict[str, asyncio.Future[Any]] = {}

    @property
    def name(self) -> str:
        return self.registration.name

    def is_same_process(self, registration: Register) -> bool:
        """Whether it is this worker that registers anew, and not another one of its name."""
        known = self.registration
        return (known.host, known.pid, known.address) == (registration.host, registration.pid, registration.address)

    @property
    def state(self) -> WorkerState:
        if self.loss is not None:
            return WorkerState.LOST
        if self.left:
            return WorkerState.LEFT
        if self._loading is not None:
            return WorkerState.LOADING
        return WorkerState.READY if self.stages else WorkerState.JOINED

    @property
    def layers(self) -> tuple[int, int] | None:
        """The layers of its newest stage, loaded or being loaded."""
        order = self._loading or (self.stages[max(self.stages)][0] if self.stages else None)
        return None if order is None else (order.start, order.end)

    @property
    def memory_bytes(self) -> int:
        """Of all its stages together."""
        return sum(one.weight_bytes + one.kv_bytes + one.workspace_bytes for _, one in self.stages.values())

    @property
    def error(self) -> WorkerError:
        """What a request hears that was lost with this worker."""
        layers = f" (layers [{self.layers[0]}, {self.layers[1]}))" if self.layers else ""
        last = f"; its last words: {self.last_words}" if self.last_words else "; its log has no error"
        return WorkerError(f"worker {self.name}{layers} is lost: {self.loss or 'no reason is known'}{last}")

    async def load(self, order: Load, on_progress: OnProgress | None = None, stall_s: float = _STALL_S) -> Loaded:
        """Loads a stage. Raises the worker's own error where it fails, WorkerError where the worker is lost,
        DeadlineError where it gets no further for `stall_s`."""
        assert self._loading is None, "one load at a time"
        what = f"load of epoch {order.epoch}"
        clock = asyncio.get_running_loop().time
        limit = deadline(f"worker {self.name}: progress of the {what}", stall_s)

        def progress(news: LoadProgress) -> None:
            limit.move(clock() + stall_s)
            if on_progress is not None:
                on_progress(news)

        self._loading, self._on_progress = order, progress
        if order.alone:
            self.stages.clear()
        try:
            loaded: Loaded = await self._ask(what, order, limit)
        finally:
            self._loading = self._on_progress = None
        self.stages[order.epoch] = (order, loaded)
        return loaded

    async def unload(self, epoch: int, deadline_s: float = _UNLOAD_S) -> None:
        """Frees the stage of an epoch; returns when it is freed."""
        what = f"unload of epoch {epoch}"
        await self._ask(what, Unload(epoch), deadline(f"worker {self.name}: {what}", deadline_s))
        self.stages.pop(epoch, None)

    async def measure(self, deadline_s: float = _MEASURE_S) -> Measured:
        """Has the worker measure its machine; it should do nothing else meanwhile."""
        limit = deadline(f"worker {self.name}: measurement", deadline_s)
        measured: Measured = await self._ask("measurement", Measure(), limit)
        return measured

    async def measure_link(self, other: WorkerHandle, deadline_s: float = _LINK_S) -> LinkSpeed:
        """Has it measure its link to another worker. Raises what it met there."""
        limit = deadline(f"worker {self.name}: measuring the link to worker {other.name}", deadline_s)
        order = MeasureLinks(((other.name, other.registration.address),))
        measured: LinksMeasured = await self._ask("links", order, limit)
        if len(measured.links) != 1:
            raise WireError(f"worker {self.name} measured {len(measured.links)} links, asked for one")
        return measured.links[0]

    async def locate(self, model_path: str, model_id: str, *, describe: bool) -> Located:
        """What it has of a model; asked once. `describe`: with the manifest of its file, for which it may read that."""
        key = model_id, describe
        if key not in self._located:
            limit = deadline(f"worker {self.name}: looking for weights", _DESCRIBE_S if describe else _LOCATE_S)
            self._located[key] = await self._ask("weights", Locate(model_path, model_id, describe), limit)
        return self._located[key]

    async def _ask(self, what: str, message: CoordinatorMessage, limit: deadline) -> Any:
        if self.loss is not None:
            raise self.error
        assert what not in self._asked, f"{what} is under way"
        answer = self._asked[what] = asyncio.get_running_loop().create_future()
        try:
            async with limit:
                await self.say(message)
                return await answer
        finally:
            del self._asked[what]

    def hear(self, message: WorkerMessage) -> None:
        """Takes in what the worker says. WireError for what it was not asked."""
        match message:
            case Heartbeat():
                self.heartbeat = message
            case LoadProgress():
                if self._on_progress is not None:
                    self._on_progress(message)
            case Measured():
                self._answer("measurement", message)
            case Failure():
                self._answer("measurement", _error(self.name, message))
            case LinksMeasured():
                self._answer("links", message)
            case MeasureLinksFailed(failure):
                self._answer("links", _error(self.name, failure))
            case Loaded(epoch):
                self._answer(f"load of epoch {epoch}", message)
            case LoadFailed(epoch, failure):
                self._answer(f"load of epoch {epoch}", _error(self.name, failure))
            case Unloaded(epoch):
                self._answer(f"unload of epoch {epoch}", None)
            case Located():
                self._answer("weights", message)
            case LocateFailed(failure):
                self._answer("weights", _error(self.name, failure))
            case Register() | Renew():
                raise WireError(f"worker {self.name} sends {type(message).__name__} where it has no place")

    def _answer(self, what: str, answer: object) -> None:
        """Answers that come after their deadline are dropped."""
        asked = self._asked.get(what)
        if asked is None or asked.done():
            return
        if isinstance(answer, Exception):
            asked.set_exception(answer)
        else:
            asked.set_result(answer)

    def lose(self, reason: str) -> None:
        """The worker is gone; whoever waits for it hears so. The first reason stays."""
        if self.loss is not None or self.left:
            return
        self.loss = reason
        self.last_words = self._read_last_words()
        error = self.error
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(error)
        self.lost.set()


def _error(worker: str, failure: Failure) -> LlamaclustError:
    """The error that a worker reports, as an exception of its own class where that is one of ours."""
    kind = getattr(errors, failure.kind, None)
    ours = isinstance(kind, type) and issubclass(kind, LlamaclustError)
    return (kind if ours and kind is not None else WorkerError)(f"worker {worker}: {failure.message}")
