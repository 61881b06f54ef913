"""What a coordinator knows of one worker, and what it can ask of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from enum import StrEnum
from functools import partial
from itertools import count
from typing import Any

from llamaclust.cluster.membership.progress_deadline import ProgressDeadline
from llamaclust.core import errors
from llamaclust.core.errors import LlamaclustError, ProtocolError, WorkerError
from llamaclust.core.gpus import DeviceLayers, Gpu
from llamaclust.core.profile import Profile
from llamaclust.wire.control.messages import (
    CoordinatorMessage,
    Failure,
    FindWeights,
    FindWeightsProgress,
    GetLog,
    Heartbeat,
    LinkEnd,
    LinkProfile,
    LinkProfiles,
    Load,
    Loaded,
    LoadFailed,
    LoadProgress,
    LogTail,
    PeerUnreachable,
    ProbePeer,
    ProbeResult,
    ProfileLinks,
    ProfileWorker,
    Register,
    RenewCertificate,
    RequestFailed,
    Unload,
    Unloaded,
    WeightsFound,
    WorkerMessage,
    WorkerProfile,
    WorkerRequest,
)
from llamaclust.wire.rpc.deadlines import deadline

OnProgress = Callable[[LoadProgress], None]
OnReading = Callable[[FindWeightsProgress], None]
Say = Callable[[CoordinatorMessage], Awaitable[None]]

_MEASURE_S = 300.0
"""Layers of a large model are read from a slow disk for it."""
PROGRESS_TIMEOUT_S = 60.0
"""Without progress for so long, a load is taken to hang."""
_LINK_S = 30.0
_UNLOAD_S = 60.0
_LOG_S = 5.0
_losses = count()


class WorkerState(StrEnum):
    JOINED = "joined"  # registered, holds nothing
    LOADING = "loading"
    READY = "ready"  # holds a stage
    LEFT = "left"  # the cluster ended
    LOST = "lost"


class WorkerHandle:
    """One member. `lost` is set once it is gone for any reason but the cluster's end; then `loss` says how."""

    def __init__(self, registration: Register, say: Say, last_error: Callable[[], str]) -> None:
        self.registration = registration
        self.stages: dict[int, tuple[Load, Loaded]] = {}  # by epoch
        self.heartbeat: Heartbeat | None = None
        self.lost = asyncio.Event()
        self.loss: str | None = None
        self.loss_number = 0  # of those that are lost, counted as they are
        self.left = False
        self.say = say
        self.last_error = ""  # of its log, once it is lost
        self._read_last_words = last_error
        self._located: dict[tuple[str, bool], WeightsFound] = {}
        self._on_progress: OnProgress | None = None
        self._on_reading: OnReading | None = None
        self._loading: Load | None = None
        self._pending: dict[str | int, asyncio.Future[Any]] = {}  # answers by request id or order
        self._finding_weights = asyncio.Lock()
        self._reading_log = asyncio.Lock()  # its log
        self._probing: dict[str, asyncio.Lock] = {}  # by the other's name
        self._request_ids = count(1)
        self._message = asyncio.Event()  # the next one that it says
        self._unreachable: dict[int, asyncio.Event] = {}  # by epoch
        self._unreachable_peers: dict[int, str] = {}  # by epoch: whom its stage cannot reach

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
    def loading(self) -> Load | None:
        """What it loads now."""
        return self._loading

    @property
    def layers(self) -> tuple[int, int] | None:
        """The layers of its newest stage, loaded or being loaded."""
        order = self._newest
        return None if order is None else (order.start, order.end)

    @property
    def device_layers(self) -> tuple[DeviceLayers, ...]:
        """Which of its devices hold which of them; none where it holds none."""
        order, kind = self._newest, "cpu" if self.registration.gpus else self.registration.device
        return () if order is None else order.devices or (DeviceLayers(kind, order.start, order.end),)

    @property
    def _newest(self) -> Load | None:
        return self._loading or (self.stages[max(self.stages)][0] if self.stages else None)

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """Its GPUs, of which so much is free as it said last."""
        gpus, beat = self.registration.gpus, self.heartbeat
        if beat is None or len(beat.gpu_free_bytes) != len(gpus):
            return gpus
        free = zip(gpus, beat.gpu_free_bytes, strict=True)
        return tuple(replace(gpu, free_bytes=free_bytes) for gpu, free_bytes in free)

    @property
    def memory_bytes(self) -> int:
        """Of all its stages together."""
        return sum(one.weight_bytes + one.kv_bytes + one.workspace_bytes for _, one in self.stages.values())

    @property
    def error(self) -> WorkerError:
        """What a request hears that was lost with this worker."""
        layers = f" (layers [{self.layers[0]}, {self.layers[1]}))" if self.layers else ""
        why = self.loss or "no reason is known"
        error = WorkerError(f"worker {self.name}{layers} is lost: {why}{self._last_words_text}")
        error.worker = self.name
        return error

    @property
    def _last_words_text(self) -> str:
        known = f"; its last error: {self.last_error}" if self.last_error else ""
        if self.registration.log:
            return f"{known}; look at {self.registration.log} on {self.registration.host}"
        return known or "; its log has no error"

    def peer_unreachable(self, epoch: int) -> asyncio.Event:
        """Set once its stage of the epoch has said that it cannot reach another one."""
        return self._unreachable.setdefault(epoch, asyncio.Event())

    def unreachable_peer(self, epoch: int) -> str | None:
        """Which worker that is."""
        return self._unreachable_peers.get(epoch)

    async def is_responsive(self) -> bool:
        """Returns at the next sign of life; False where it is lost instead."""
        signs = [asyncio.create_task(sign.wait()) for sign in (self._message, self.lost)]
        try:
            await asyncio.wait(signs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for sign in signs:
                sign.cancel()
        return self.loss is None

    async def load(
        self, order: Load, on_progress: OnProgress | None = None, progress_timeout_s: float = PROGRESS_TIMEOUT_S
    ) -> Loaded:
        """Loads a stage. Raises the worker's own error where it fails, WorkerError where the worker is lost,
        StalledError where it gets no further for `progress_timeout_s`."""
        assert self._loading is None, "one load at a time"
        progress_deadline = ProgressDeadline(
            f"worker {self.name} gets no further with layers [{order.start}, {order.end})", progress_timeout_s
        )

        def progress(news: LoadProgress) -> None:
            progress_deadline.report(news.done_bytes, news.total_bytes)
            if on_progress is not None:
                on_progress(news)

        self._loading, self._on_progress = order, progress
        if order.exclusive:
            self.stages.clear()
            self._unreachable.clear()
            self._unreachable_peers.clear()
        try:
            loaded: Loaded = await progress_deadline.wait(partial(self._order, f"load of epoch {order.epoch}", order))
        finally:
            self._loading = self._on_progress = None
        self.stages[order.epoch] = (order, loaded)
        return loaded

    async def unload(self, epoch: int, deadline_s: float = _UNLOAD_S) -> None:
        """Frees the stage of an epoch; returns when it is freed."""
        what = f"unload of epoch {epoch}"
        await self._order(what, Unload(epoch), deadline(f"worker {self.name}: {what}", deadline_s))
        self.stages.pop(epoch, None)
        self._unreachable.pop(epoch, None)
        self._unreachable_peers.pop(epoch, None)

    async def measure(self, order: ProfileWorker = ProfileWorker(), deadline_s: float = _MEASURE_S) -> Profile:  # noqa: B008
        """Has the worker measure its machine; it should do nothing else meanwhile. ProtocolError for an answer about
        other GPUs than it has."""
        limit = deadline(f"worker {self.name}: measurement", deadline_s)
        measured: WorkerProfile = await self._request(order, limit)
        gpus, measured_gpus = len(self.registration.gpus), len(measured.profile.gpus)
        if measured_gpus != gpus:
            raise ProtocolError(f"worker {self.name} measured {measured_gpus} GPUs, it has {gpus}")
        return measured.profile

    async def measure_link(self, other: WorkerHandle, deadline_s: float = _LINK_S) -> LinkProfile:
        """Has it measure its link to another worker. Raises what it met there."""
        limit = deadline(f"worker {self.name}: measuring the link to worker {other.name}", deadline_s)
        order = ProfileLinks((LinkEnd(other.name, other.registration.address),))
        measured: LinkProfiles = await self._request(order, limit)
        if len(measured.links) != 1:
            raise ProtocolError(f"worker {self.name} measured {len(measured.links)} links, asked for one")
        return measured.links[0]

    async def probe(self, other: WorkerHandle, deadline_s: float) -> str:
        """Why it cannot reach another worker now; "" where it can. WorkerError where it is lost, DeadlineError where it
        does not say."""
        what = f"way to {other.name}"
        async with self._probing.setdefault(other.name, asyncio.Lock()):
            limit = deadline(f"worker {self.name}: the {what}", deadline_s)
            tried: ProbeResult = await self._request(ProbePeer(other.name, other.registration.address), limit)
        return tried.reason

    async def log(self, deadline_s: float = _LOG_S) -> LogTail:
        """The last lines of its log. WorkerError where it is lost, DeadlineError."""
        async with self._reading_log:
            told: LogTail = await self._request(GetLog(), deadline(f"worker {self.name}: its log", deadline_s))
        return told

    async def locate(
        self,
        model_path: str,
        model_id: str,
        *,
        describe: bool,
        on_reading: OnReading | None = None,
        progress_timeout_s: float = PROGRESS_TIMEOUT_S,
    ) -> WeightsFound:
        """What it has of a model; asked once. `describe`: with the manifest of its file, for which it may read that.
        StalledError where it gets no further for `progress_timeout_s`."""
        async with self._finding_weights:
            key = model_id, describe
            if key not in self._located:
                question = FindWeights(model_path, model_id, describe)
                self._located[key] = await self._locate(question, on_reading, progress_timeout_s)
            return self._located[key]

    async def _locate(
        self, question: FindWeights, on_reading: OnReading | None, progress_timeout_s: float
    ) -> WeightsFound:
        what = f"worker {self.name} gets no further with reading {question.model_path}"
        progress_deadline = ProgressDeadline(what, progress_timeout_s)

        def progress(news: FindWeightsProgress) -> None:
            progress_deadline.report(news.done_bytes, news.total_bytes)
            if on_reading is not None:
                on_reading(news)

        self._on_reading = progress
        try:
            located: WeightsFound = await progress_deadline.wait(partial(self._request, question))
        finally:
            self._on_reading = None
        return located

    def found(self, model_id: str) -> WeightsFound | None:
        """What it said to have of a model; None: it was not asked, or has not answered."""
        return self._located.get((model_id, True)) or self._located.get((model_id, False))

    async def _request(self, request: WorkerRequest, limit: deadline) -> Any:
        request_id = next(self._request_ids)
        return await self._order(request_id, replace(request, request_id=request_id), limit)

    async def _order(self, key: str | int, message: CoordinatorMessage, limit: deadline) -> Any:
        if self.loss is not None:
            raise self.error
        assert key not in self._pending, f"{key} is under way"
        answer = self._pending[key] = asyncio.get_running_loop().create_future()
        try:
            async with limit:
                await self.say(message)
                return await answer
        finally:
            del self._pending[key]

    def receive(self, message: WorkerMessage) -> None:
        """Takes in what the worker says. ProtocolError for what it was not asked."""
        self._message.set()
        self._message = asyncio.Event()
        match message:
            case Heartbeat():
                self.heartbeat = message
            case LoadProgress():
                if self._on_progress is not None:
                    self._on_progress(message)
            case WorkerProfile() | LinkProfiles() | WeightsFound() | ProbeResult() | LogTail():
                self._answer(message.request_id, message)
            case RequestFailed(failure, request_id):
                self._answer(request_id, _error(self.name, failure))
            case Loaded(epoch):
                self._answer(f"load of epoch {epoch}", message)
            case LoadFailed(epoch, failure):
                self._answer(f"load of epoch {epoch}", _error(self.name, failure))
            case Unloaded(epoch):
                self._answer(f"unload of epoch {epoch}", None)
            case FindWeightsProgress():
                if self._on_reading is not None:
                    self._on_reading(message)
            case PeerUnreachable(epoch, other):
                if epoch in self.stages:
                    self._unreachable_peers.setdefault(epoch, other)
                    self.peer_unreachable(epoch).set()
            case Register() | RenewCertificate():
                raise ProtocolError(f"worker {self.name} sends {type(message).__name__} where it has no place")

    def _answer(self, key: str | int, answer: object) -> None:
        """Answers that come after their deadline are dropped."""
        pending = self._pending.get(key)
        if pending is None or pending.done():
            return
        if isinstance(answer, Exception):
            pending.set_exception(answer)
        else:
            pending.set_result(answer)

    def lose(self, reason: str) -> None:
        """The worker is gone; whoever waits for it hears so. The first reason stays."""
        if self.loss is not None or self.left:
            return
        self.loss = reason
        self.loss_number = next(_losses)
        self.last_error = self._read_last_words() or (self.heartbeat.last_error if self.heartbeat else "")
        error = self.error
        for pending in self._pending.values():
            if not pending.done():
                pending.set_exception(error)
                pending.exception()  # retrieved: its caller may be gone, too
        self.lost.set()


def _error(worker: str, failure: Failure) -> LlamaclustError:
    """The error that a worker reports, as an exception of its own class where that is one of ours."""
    kind = getattr(errors, failure.kind, None)
    ours = isinstance(kind, type) and issubclass(kind, LlamaclustError)
    return (kind if ours and kind is not None else WorkerError)(f"worker {worker}: {failure.message}")
