"""A worker's life as a member of a cluster: it joins, obeys its coordinator, and ends with it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import Coroutine
from dataclasses import replace
from functools import partial
from time import perf_counter_ns

from llamaclust.core.errors import (
    DeadlineError,
    DeviceLostError,
    LlamaclustError,
    ModelFileError,
    ProtocolError,
    UsageError,
    WorkerError,
)
from llamaclust.core.gpus import placed
from llamaclust.core.logs import last_lines, last_trouble, name_cluster
from llamaclust.wire.codec import PROTOCOL_VERSION
from llamaclust.wire.control.codec import decode_coordinator_message, encode_worker_message
from llamaclust.wire.control.messages import (
    AddWeightSource,
    Admitted,
    CertificateRenewed,
    CoordinatorMessage,
    Deadlines,
    Failure,
    FindWeights,
    FindWeightsProgress,
    GetLog,
    Heartbeat,
    LinkProfile,
    LinkProfiles,
    Load,
    Loaded,
    LoadFailed,
    LogTail,
    PeerUnreachable,
    ProbePeer,
    ProbeResult,
    ProfileLinks,
    ProfileWorker,
    Register,
    Rejected,
    RenewalFailed,
    RequestFailed,
    Shutdown,
    Unload,
    Unloaded,
    WeightsFound,
    WorkerMessage,
    WorkerProfile,
)
from llamaclust.wire.rpc.client import JOIN, ClientStream, Peer
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.link_probe import measure_link, try_link
from llamaclust.wire.security.credentials import Credentials, Identity, Principal
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.devices.system_info import resident_bytes
from llamaclust.worker.renewal import Renewal
from llamaclust.worker.stage.compute import Compute
from llamaclust.worker.stage.executor import Counters
from llamaclust.worker.stage.service import StageService
from llamaclust.worker.stage.streams import Neighbours, StageFlow
from llamaclust.worker.weights.load import load_stage
from llamaclust.worker.weights.weights import Reading, Weights

_log = logging.getLogger(__name__)

_REPORT_S = 0.25


class Member:
    """One membership, from the handshake until the coordinator ends it or is gone."""

    def __init__(
        self,
        name: str,
        credentials: Credentials,
        device: Device,
        service: StageService,
        compute: Compute,
        weights: Weights,
    ) -> None:
        self._name = name
        self._weights = weights
        self._credentials = credentials
        self._renewal = Renewal(credentials, self._say) if isinstance(credentials, Identity) else None
        self._device = device
        self._service = service
        self._compute = compute
        self._counters = Counters()
        self._deadlines = Deadlines()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writing = asyncio.Lock()
        self._one_order = asyncio.Lock()
        self._stream: ClientStream | None = None

    async def join(
        self, coordinator: Peer, registration: Register, join_s: float, *, wait_for_ready: bool = True
    ) -> None:
        """Registers. UsageError where the coordinator refuses, DeadlineError where it is not there."""
        self._stream = coordinator.open(JOIN, wait_for_ready=wait_for_ready)
        async with deadline(f"joining the coordinator at {coordinator.address}", join_s):
            await self._stream.opened()
            await self._say(registration)
            welcome = await self._hear()
        if isinstance(welcome, Rejected):
            raise UsageError(f"the coordinator refused: {welcome.reason}")
        if not isinstance(welcome, Admitted):
            raise ProtocolError(f"the coordinator answered {type(welcome).__name__} to a registration")
        if welcome.protocol_version != PROTOCOL_VERSION:
            versions = f"{welcome.protocol_version}, this worker {PROTOCOL_VERSION}"
            raise UsageError(f"the coordinator speaks protocol {versions}")
        self._deadlines = welcome.deadlines
        if welcome.cluster:
            name_cluster(welcome.cluster)

    @property
    def coordinator_s(self) -> float:
        """How long to wait for a coordinator that is gone."""
        return self._deadlines.coordinator_s

    async def serve(self) -> str:
        """Obeys until the coordinator ends the membership; returns its reason. WorkerError where it is gone."""
        beating = asyncio.create_task(self._beat())
        if self._renewal is not None:
            self._start(self._renew(self._renewal))
        try:
            while not isinstance(message := await self._hear(), Shutdown):
                self._obey(message)
            return message.reason
        finally:
            for task in (beating, *self._tasks):
                task.cancel()

    def _obey(self, message: CoordinatorMessage) -> None:
        match message:
            case Load():
                self._start(self._load(message))
            case Unload():
                self._start(self._unload(message))
            case ProfileWorker():
                self._start(self._measure(message))
            case ProfileLinks():
                self._start(self._measure_links(message))
            case FindWeights():
                self._start(self._locate(message))
            case ProbePeer():
                self._start(self._try_peer(message))
            case AddWeightSource():
                self._weights.hear(message, self._source)
            case GetLog():
                self._start(self._say(LogTail.bounded(*last_lines(), message.request_id)))
            case CertificateRenewed() | RenewalFailed() if self._renewal is not None:
                self._renewal.hear(message)
            case _:
                raise ProtocolError(f"the coordinator sent {type(message).__name__} to a member")

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, order: Load) -> None:
        async with self._one_order:
            try:
                answer: WorkerMessage = await self._loaded(order)
            except Exception as error:  # noqa: BLE001  a border: the coordinator is told, the worker stays
                _log.error("layers [%d, %d) of epoch %d: %s", order.start, order.end, order.epoch, error)
                if isinstance(error, DeviceLostError):
                    self._compute.give_up(error)  # this process ends, which answers all that is asked
                    return
                answer = LoadFailed(order.epoch, _failure(error))
            if isinstance(answer, LoadFailed):
                gc.collect()  # a future and its error hold each other, and what was loaded until then
            await self._say(answer)

    async def _loaded(self, order: Load) -> Loaded:
        if order.epoch in self._service:
            raise ProtocolError(f"epoch {order.epoch} is loaded already")
        received_bytes = self._weights.received_bytes
        held = await self._service.clear() if order.exclusive else []
        try:
            runner = await self._service.take_kept(order)
            if runner is not None:
                _log.info("layers [%d, %d): its weights were kept", order.start, order.end)
            else:
                runner = await load_stage(order, self._device, self._say, self._weights, self._source)
        finally:
            held.clear()
        next_stage = self._peer(order.next_address, order.next_worker)
        first_stage = self._peer(order.first_address, order.first_worker)
        on_lost = partial(self._tell_lost, order.epoch)
        neighbours = Neighbours(next_stage, first_stage, order.previous_worker, order.last_worker, on_lost)
        flow = StageFlow(order.epoch, runner, self._name, self._compute, self._counters, self._deadlines, neighbours)
        self._service.add(flow)
        memory = runner.memory
        where = f", {placed(order.devices)}" if order.devices else ""
        _log.info("layers [%d, %d) are loaded as epoch %d%s", order.start, order.end, order.epoch, where)
        fetched_bytes = self._weights.received_bytes - received_bytes
        return Loaded(order.epoch, memory.weight_bytes, memory.kv_bytes, memory.workspace_bytes, fetched_bytes)

    def _source(self, address: str, worker: str) -> Peer:
        """The way to another worker, for its weights or to measure the link."""
        return Peer(address, self._credentials, Principal(worker), self._deadlines.peer_s)

    def _peer(self, address: str | None, worker: str | None) -> Peer | None:
        """The way to another stage, and who must be there."""
        if not address:
            return None
        return Peer(address, self._credentials, Principal(worker) if worker else None, self._deadlines.peer_s)

    async def _tell_lost(self, epoch: int, peer: Peer, why: str) -> None:
        """Tells the coordinator, if it is there to hear, whom a stage cannot reach."""
        if peer.worker is not None:
            _log.error("worker %s cannot be reached: %s", peer.worker, why)
            with contextlib.suppress(WorkerError, DeadlineError):
                async with deadline("telling the coordinator", self._deadlines.peer_s):
                    await self._say(PeerUnreachable(epoch, peer.worker, why))

    async def _try_peer(self, order: ProbePeer) -> None:
        """On a connection of its own: the one of a stage may last, or be of use no more."""
        peer = Peer(order.address, self._credentials, Principal(order.worker), self._deadlines.peer_s)
        why = ""
        try:
            await try_link(peer, self._deadlines.peer_s)
        except LlamaclustError as error:
            why = str(error)
        finally:
            await peer.close()
        await self._say(ProbeResult(order.worker, why, order.request_id))

    async def _unload(self, order: Unload) -> None:
        async with self._one_order:
            await self._service.remove(order.epoch)
            await self._say(Unloaded(order.epoch))

    async def _measure(self, order: ProfileWorker) -> None:
        async with self._one_order:
            try:
                answer: WorkerMessage = await asyncio.to_thread(self._measured, order)
            except Exception as error:  # noqa: BLE001  a border: the coordinator is told, the worker stays
                _log.error("measuring the machine: %s", error)
                if isinstance(error, DeviceLostError):
                    self._compute.give_up(error)
                    return
                answer = RequestFailed(_failure(error), order.request_id)
            await self._say(answer)

    def _measured(self, order: ProfileWorker) -> WorkerProfile:
        """Where the model's file is not there, of the machine alone."""
        try:
            model = self._weights.open_file(order.model_path, order.model_id) if order.model_path else None
        except ModelFileError:  # told when its layers are to be loaded
            model = None
        if model is None:
            return WorkerProfile(self._device.measure(), order.request_id)
        with model:
            return WorkerProfile(self._device.measure(model), order.request_id)

    async def _locate(self, wanted: FindWeights) -> None:
        try:
            answer: WorkerMessage = await self._located(wanted)
        except Exception as error:  # noqa: BLE001  a border: the coordinator is told, the worker stays
            _log.error("looking for %s: %s", wanted.model_path, error)
            answer = RequestFailed(_failure(error), wanted.request_id)
        await self._say(answer)

    async def _located(self, wanted: FindWeights) -> WeightsFound:
        reading = Reading()
        locating = asyncio.create_task(asyncio.to_thread(self._weights.locate, wanted, reading))
        while not (await asyncio.wait((locating,), timeout=_REPORT_S))[0]:
            if reading.total_bytes:
                await self._say(FindWeightsProgress(reading.done_bytes, reading.total_bytes))
        return replace(locating.result(), request_id=wanted.request_id)

    async def _renew(self, renewal: Renewal) -> None:
        with contextlib.suppress(WorkerError):  # as with heartbeats
            await renewal.run()

    async def _measure_links(self, order: ProfileLinks) -> None:
        async with self._one_order:
            answer: WorkerMessage
            try:
                links = tuple([await self._measured_link(end.worker, end.address) for end in order.ends])
                answer = LinkProfiles(links, order.request_id)
            except Exception as error:  # noqa: BLE001  a border: the coordinator is told, the worker stays
                _log.error("measuring links: %s", error)
                answer = RequestFailed(_failure(error), order.request_id)
            await self._say(answer)

    async def _measured_link(self, worker: str, address: str) -> LinkProfile:
        peer = self._source(address, worker)
        try:
            return await measure_link(peer)
        except WorkerError as error:
            raise WorkerError(f"it cannot reach worker {worker} at {address}: {error}") from error
        finally:
            await peer.close()

    async def _beat(self) -> None:
        """Signs of life, until the stream ends; that it ended is the reader's matter."""
        with contextlib.suppress(WorkerError):
            last_ns, busy_ns = perf_counter_ns(), self._counters.busy_ns
            while True:
                await asyncio.sleep(self._deadlines.heartbeat_s)
                now_ns, total_ns = perf_counter_ns(), self._counters.busy_ns
                try:
                    beat = self._heartbeat(min(1.0, (total_ns - busy_ns) / (now_ns - last_ns)))
                except DeviceLostError as error:  # its memory is asked for
                    self._compute.give_up(error)
                    return
                await self._say(beat)
                last_ns, busy_ns = now_ns, total_ns

    def _heartbeat(self, busy: float) -> Heartbeat:
        counters = self._counters
        return Heartbeat(
            busy,
            counters.microbatches,
            counters.tokens,
            resident_bytes(),
            self._device.free_memory_bytes,
            counters.received_bytes,
            counters.sent_bytes,
            self._weights.sent_bytes,
            self._weights.received_bytes,
            last_trouble(),
            tuple(gpu.free_bytes for gpu in self._device.gpus),
        )

    async def _say(self, message: WorkerMessage) -> None:
        """Goes on where the caller is cancelled, as a stage's stream is that breaks: gRPC would end the membership."""
        await asyncio.shield(self._said(message))

    async def _said(self, message: WorkerMessage) -> None:
        assert self._stream is not None
        async with self._writing:
            await self._stream.write(encode_worker_message(message))

    async def _hear(self) -> CoordinatorMessage:
        """The next message."""
        assert self._stream is not None
        data = await self._stream.read()
        if data is None:
            raise WorkerError("the coordinator ended the stream")
        return decode_coordinator_message(data)


def _failure(error: Exception) -> Failure:
    known = isinstance(error, LlamaclustError)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    return Failure(type(error).__name__ if known else LlamaclustError.__name__, text)
