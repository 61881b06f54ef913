"""The coordinator's view of one worker: its stages, heartbeats and loss."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from itertools import count
from time import monotonic

from llamaclust.cluster.membership.worker_channel import ProgressDeadline, Send, WorkerChannel
from llamaclust.core.epochs import epoch_text
from llamaclust.core.errors import (
    DeadlineError,
    InsufficientMemoryError,
    LlamaclustError,
    LoadCancelledError,
    ModelFileError,
    ProtocolError,
    RequestError,
    UsageError,
    WorkerError,
)
from llamaclust.core.gpus import DeviceLayers, Gpu
from llamaclust.wire.control import messages, profiles
from llamaclust.wire.control.groups import GroupFault
from llamaclust.wire.control.kv_disk import KvDone
from llamaclust.wire.control.logs import LogTail
from llamaclust.wire.control.messages import Heartbeat, Load, Loaded, LoadProgress, ProbeResult, StageProgress
from llamaclust.wire.control.weights import AdaptersSet, FindWeightsProgress, WeightsFound
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.security.credentials import Credentials
from llamaclust.wire.security.permits import permit

PROGRESS_TIMEOUT_S = 60.0
"""Seconds without progress after which a load counts as hung."""
_UNLOAD_S = 60.0
_REPORTED: dict[str, Callable[[str], LlamaclustError]] = {
    kind.__name__: kind
    for kind in (
        LlamaclustError,
        UsageError,
        ModelFileError,
        InsufficientMemoryError,
        RequestError,
        ProtocolError,
        DeadlineError,
        LoadCancelledError,
    )
}
"""Classes of errors that a worker may report, by name. An error with another name becomes a WorkerError."""
_loss_numbers = count()


class WorkerState(StrEnum):
    JOINED = "joined"  # The worker is registered, and holds no stage.
    LOADING = "loading"
    READY = "ready"
    LEFT = "left"
    LOST = "lost"

    @property
    def is_gone(self) -> bool:
        return self in (WorkerState.LEFT, WorkerState.LOST)


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a worker. `number` is larger for later losses. The worker logged `last_error` shortly before."""

    reason: str
    number: int
    last_error: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True)
class FreshMemory:
    """A worker's free memory. The memory of its loaded stages counts as free."""

    free_bytes: int
    gpus: tuple[Gpu, ...]


class UnreachablePeer:
    """Stores the name of the first peer that a worker reports as unreachable."""

    def __init__(self) -> None:
        self.reported = asyncio.Event()
        self.name: str | None = None

    def report(self, name: str) -> None:
        self.name = self.name or name
        self.reported.set()


class GroupFaults:
    """Stores the first fault that a worker reports in its group."""

    def __init__(self) -> None:
        self.reported = asyncio.Event()
        self.fault: GroupFault | None = None

    def report(self, fault: GroupFault) -> None:
        self.fault = self.fault or fault
        self.reported.set()


class WorkerHandle:
    """A member of the cluster. If the worker is lost, `lost` is set, and `loss` has the reason."""

    def __init__(
        self,
        registration: messages.Register,
        send: Send,
        read_last_error: Callable[[], str],
        credentials: Credentials,
    ) -> None:
        self.registration = registration
        self._credentials = credentials
        self.channel = WorkerChannel(send)
        self.stages: dict[int, tuple[Load, Loaded]] = {}  # `Load` and `Loaded` messages of each stage, by epoch.
        self.loading: Load | None = None
        self.fresh_memory: FreshMemory | None = None
        # Bytes of memory that measurements have taken since the worker's registration, and that the worker keeps.
        self.measuring_bytes = 0
        # Answers to `FindWeights`, by file id and by whether a manifest was requested.
        self.weights_found: dict[tuple[str, bool], WeightsFound] = {}
        # Reason why other workers cannot connect to the port for group links. Empty if they can.
        self.closed_port = ""
        self.heartbeat: Heartbeat | None = None
        self.quiet_s = 0.0  # Seconds by which the heartbeat timeout is extended.
        self.lost = asyncio.Event()
        self.loss: Loss | None = None
        self.left = False
        self._read_last_error = read_last_error
        self._message = asyncio.Event()
        self._message_at_s = monotonic()
        self._unreachable: dict[int, UnreachablePeer] = {}
        self._faults: dict[int, GroupFaults] = {}

    def forget_files(self) -> None:
        self.weights_found = {key: found for key, found in self.weights_found.items() if not found.has_file}

    @property
    def name(self) -> str:
        return self.registration.name

    def permit(self, other: str) -> str:
        return permit(self._credentials, self.name, other)

    @property
    def state(self) -> WorkerState:
        if self.loss is not None:
            return WorkerState.LOST
        if self.left:
            return WorkerState.LEFT
        if self.loading is not None:
            return WorkerState.LOADING
        return WorkerState.READY if self.stages else WorkerState.JOINED

    @property
    def silent_s(self) -> float:
        """Seconds since the worker's last message, or since it joined."""
        return monotonic() - self._message_at_s

    @property
    def layers(self) -> tuple[float, float] | None:
        order = self.loading or (self.stages[max(self.stages)][0] if self.stages else None)
        return None if order is None else order.limits.places(order.start, order.end)

    def epochs_of(self, model_id: str) -> list[int]:
        return [epoch for epoch, (order, _) in self.stages.items() if order.model_id == model_id]

    def holds_others(self, model_id: str) -> bool:
        return any(order.model_id != model_id for order, _ in self.stages.values())

    def layers_of(self, epoch: int) -> tuple[float, float]:
        order, _ = self.stages[epoch]
        return order.limits.places(order.start, order.end)

    @property
    def newest_orders(self) -> list[Load]:
        """The `Load` message of each model's newest stage."""
        orders = [order for order, _ in self.stages.values()]
        models = {order.model_id for order in (*orders, self.loading) if order is not None}
        newest = (self.order_of(model_id) for model_id in sorted(models))
        return [order for order in newest if order is not None]

    @property
    def device_layers(self) -> tuple[DeviceLayers, ...]:
        return tuple(part for order in self.newest_orders for part in self.devices_of(order))

    def devices_of(self, order: Load | None) -> tuple[DeviceLayers, ...]:
        kind = "cpu" if self.registration.gpus else self.registration.device
        return () if order is None else order.devices or (DeviceLayers(kind, order.start, order.end),)

    def order_of(self, model_id: str) -> Load | None:
        """Returns the `Load` message of the model's newest stage, or None. The stage may still be loading."""
        if self.state.is_gone:
            return None
        if self.loading is not None and self.loading.model_id == model_id:
            return self.loading
        epochs = self.epochs_of(model_id)
        return self.stages[max(epochs)][0] if epochs else None

    @property
    def held_bytes(self) -> int:
        """Total bytes of all stages on the worker. It is 0 if the worker is gone."""
        stages = (loaded for _, loaded in self.stages.values() if not self.state.is_gone)
        return sum(
            stage.weight_bytes + stage.kv_bytes + stage.workspace_bytes + stage.encoder_bytes for stage in stages
        )

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        gpus, heartbeat = self.registration.gpus, self.heartbeat
        if heartbeat is None or len(heartbeat.gpu_free_bytes) != len(gpus):
            return gpus
        free = zip(gpus, heartbeat.gpu_free_bytes, strict=True)
        return tuple(replace(gpu, free_bytes=free_bytes) for gpu, free_bytes in free)

    @property
    def error(self) -> WorkerError:
        layers = f" ({self._layers_text})" if self.layers else ""
        last_error = "" if self.loss is None else self.loss.last_error
        text = f"; its last error: {last_error}" if last_error else ""
        if self.registration.log:
            text += f"; look at {self.registration.log} on {self.registration.host}"
        why = self.loss or "no reason is known"
        message = f"worker {self.name}{layers} is lost: {why}{text or '; its log has no recent error'}"
        return WorkerError(message, worker=self.name)

    @property
    def _layers_text(self) -> str:
        models = {order.model_id for order, _ in self.stages.values()}
        return f"layers of {len(models)} models" if len(models) > 1 else "layers [{}, {})".format(*self.layers or ())

    def progress(self, epoch: int) -> StageProgress | None:
        stages = () if self.heartbeat is None else self.heartbeat.stages
        return next((stage for stage in stages if stage.epoch == epoch), None)

    def unreachable_peer(self, epoch: int) -> UnreachablePeer:
        return self._unreachable.setdefault(epoch, UnreachablePeer())

    def group_faults(self, epoch: int) -> GroupFaults:
        return self._faults.setdefault(epoch, GroupFaults())

    async def is_responsive(self) -> bool:
        """Waits for the next message of the worker. Returns False if the worker is lost before that."""
        signs = [asyncio.create_task(sign.wait()) for sign in (self._message, self.lost)]
        try:
            await asyncio.wait(signs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for sign in signs:
                sign.cancel()
        return self.loss is None

    async def load(
        self,
        order: Load,
        on_progress: Callable[[LoadProgress], None] | None = None,
        progress_timeout_s: float = PROGRESS_TIMEOUT_S,
    ) -> Loaded:
        """Loads a stage. Raises the worker's error, WorkerError if it is lost, or StalledError if loading stalls."""
        assert self.loading is None, "a worker loads one stage at a time"
        what = f"worker {self.name} made no progress with layers [{order.start}, {order.end})"
        request = partial(self.channel.order, f"load of epoch {epoch_text(order.epoch)}", order)
        self.loading = order
        if order.exclusive:
            for epoch in self.epochs_of(order.model_id):
                self._forget(epoch)
        try:
            loaded: Loaded = await self.channel.with_progress(
                LoadProgress, request, ProgressDeadline(what, progress_timeout_s), on_progress
            )
        except LoadCancelledError:
            await self.unload(order.epoch)
            raise
        finally:
            self.loading = None
        self.stages[order.epoch] = (order, loaded)
        return loaded

    def cancel_load(self, model_id: str) -> None:
        if self.loading is not None and self.loading.model_id == model_id:
            error = LoadCancelledError(f"worker {self.name}: its load is no longer needed")
            self.channel.answer(f"load of epoch {epoch_text(self.loading.epoch)}", error)

    async def unload(self, epoch: int, deadline_s: float = _UNLOAD_S) -> None:
        """Unloads the stage of an epoch. Raises WorkerError, DeadlineError, or the error that the worker reports."""
        what = f"unload of epoch {epoch_text(epoch)}"
        await self.channel.order(what, messages.Unload(epoch), deadline(f"worker {self.name}: {what}", deadline_s))
        self._forget(epoch)

    def _forget(self, epoch: int) -> None:
        self.stages.pop(epoch, None)
        self._unreachable.pop(epoch, None)
        self._faults.pop(epoch, None)

    def receive(self, message: messages.WorkerMessage) -> None:
        """Processes a message. Raises ProtocolError if the message is not allowed after registration."""
        self._message_at_s = monotonic()
        self._message.set()
        self._message = asyncio.Event()
        match message:
            case Heartbeat():
                self.heartbeat = message
            case messages.Quiet(seconds):
                self.quiet_s = seconds
            case LoadProgress() | FindWeightsProgress():
                self.channel.observe(message)
            case (
                WeightsFound()
                | ProbeResult()
                | LogTail()
                | profiles.WorkerProfile()
                | profiles.LinkProfiles()
                | KvDone()
                | AdaptersSet()
            ):
                self.channel.answer(message.request_id, message)
            case messages.RequestFailed(failure, request_id):
                self.channel.answer(request_id, _error(self.name, failure))
            case Loaded(epoch):
                self.channel.answer(f"load of epoch {epoch_text(epoch)}", message)
            case messages.LoadFailed(epoch, failure):
                self.channel.answer(f"load of epoch {epoch_text(epoch)}", _error(self.name, failure))
            case messages.Unloaded(epoch):
                self.channel.answer(f"unload of epoch {epoch_text(epoch)}", None)
            case messages.UnloadFailed(epoch, failure):
                self.channel.answer(f"unload of epoch {epoch_text(epoch)}", _error(self.name, failure))
            case messages.PeerUnreachable(epoch, other):
                if epoch in self.stages:
                    self.unreachable_peer(epoch).report(other)
            case GroupFault(epoch):
                if epoch in self.stages:
                    self._check_fault(message)
                    self.group_faults(epoch).report(message)
            case messages.Register() | messages.RenewCertificate():
                raise ProtocolError(
                    f"worker {self.name} sends {type(message).__name__}, which is not allowed after registration"
                )

    def _check_fault(self, fault: GroupFault) -> None:
        group = self.stages[fault.epoch][0].group
        members = () if group is None else tuple(member.worker for member in group.members)
        if fault.worker not in members or (fault.kind == "failed" and fault.worker != self.name):
            who = f"worker {self.name} (group: {', '.join(members) or 'none'})"
            raise ProtocolError(f"{who} must not report worker {fault.worker} as {fault.kind}")

    def lose(self, reason: str) -> None:
        """Marks the worker as lost and fails every pending request. Only the first call has an effect."""
        if self.loss is not None or self.left:
            return
        last_error = self._read_last_error() or (self.heartbeat.last_error if self.heartbeat else "")
        self.loss = Loss(reason, next(_loss_numbers), last_error)
        self.channel.fail(self.error)
        self.lost.set()


def _error(worker: str, failure: messages.Failure) -> LlamaclustError:
    return _REPORTED.get(failure.kind, WorkerError)(f"worker {worker}: {failure.message}")
