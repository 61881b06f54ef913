"""A worker's membership in a cluster. The worker joins, obeys its coordinator, and ends with the coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from time import perf_counter_ns
from typing import TYPE_CHECKING

from llamaclust.core.errors import DeadlineError, DeviceLostError, ProtocolError, RefusedError, UsageError, WorkerError
from llamaclust.core.logs import name_cluster, recent_trouble
from llamaclust.core.version import VERSION
from llamaclust.wire.codec import PROTOCOL_VERSION
from llamaclust.wire.control import messages
from llamaclust.wire.control.codec import decode_coordinator_message, encode_worker_message
from llamaclust.wire.control.weights import AddWeightSource
from llamaclust.wire.rpc.client import ClientStream, Peer
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.methods import JOIN
from llamaclust.wire.rpc.task_set import TaskSet
from llamaclust.wire.security.credentials import Credentials, Identity
from llamaclust.wire.security.renewal import until_renewal
from llamaclust.worker.devices.system_info import resident_bytes
from llamaclust.worker.loads import Loads
from llamaclust.worker.requests import Requests
from llamaclust.worker.seen_terms import ClusterKey
from llamaclust.worker.session import Session
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.worker import Worker

if TYPE_CHECKING:
    from llamaclust.wire.security.certificates import NewKey

_log = logging.getLogger(__name__)
_RENEW_AGAIN_S = 60.0
_AT_MOST_EVERY_S = 1.0
_END_S = 5.0


class Renewal:
    def __init__(self, identity: Identity, send: Callable[[messages.RenewCertificate], Awaitable[None]]) -> None:
        self._identity = identity
        self._send = send
        self._key: NewKey | None = None
        self._renewed = asyncio.Event()

    async def run(self) -> None:
        """Renews the certificate at two thirds of each lifetime until the stream ends. Repeats unanswered requests."""
        from llamaclust.wire.security.certificates import NewKey

        with contextlib.suppress(WorkerError):  # The stream's reader reports this error.
            while True:
                await until_renewal(self._identity)
                self._key = NewKey()
                self._renewed.clear()
                await self._send(messages.RenewCertificate(self._key.request))
                tenth_s = self._identity.pair.life_s / 10
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(_RENEW_AGAIN_S, tenth_s)):
                        await self._renewed.wait()
                # A certificate that is over at once, because this machine's clock is ahead, is renewed again and again.
                await asyncio.sleep(_AT_MOST_EVERY_S)

    def receive(self, answer: messages.CertificateRenewed | messages.RenewalFailed) -> None:
        if isinstance(answer, messages.RenewalFailed):
            _log.error("the certificate was not renewed: %s", answer.failure.message)
            return
        if self._key is None:
            raise ProtocolError("the coordinator sent a renewed certificate that this worker did not request")
        try:
            self._identity.pair = self._key.with_certificate(answer.certificate)
        except ProtocolError as error:  # For example the answer to an earlier request, which came late.
            _log.warning("a renewed certificate is not used: %s", error)
            return
        self._key = None
        self._renewed.set()
        _log.info("the certificate is renewed")


def _retrieved(writing: asyncio.Task[None]) -> None:
    if not writing.cancelled():
        writing.exception()


class Member:
    def __init__(self, worker: Worker, credentials: Credentials) -> None:
        self._worker = worker
        self._credentials = credentials
        self._renewal = Renewal(credentials, self.send) if isinstance(credentials, Identity) else None
        self._deadlines = messages.Deadlines()
        self._tasks = TaskSet()
        self._writing = asyncio.Lock()
        self._stream: ClientStream | None = None

    async def join(
        self, coordinator: Peer, registration: messages.Register, join_s: float, *, wait_for_ready: bool = True
    ) -> None:
        """Joins the coordinator. Raises RefusedError if it refuses, and DeadlineError if it does not answer."""
        self._stream = coordinator.open(JOIN, wait_for_ready=wait_for_ready)
        async with deadline(f"joining the coordinator at {coordinator.address}", join_s):
            await self._stream.opened()
            await self.send(self._with_terms(registration))
            answer = await self._receive()
        if isinstance(answer, messages.Rejected):
            raise RefusedError(f"the coordinator refused: {answer.reason}")
        if not isinstance(answer, messages.Admitted):
            raise ProtocolError(f"the coordinator answered {type(answer).__name__} to a registration")
        if answer.protocol_version != PROTOCOL_VERSION:
            versions = f"speaks protocol {answer.protocol_version}, this worker {PROTOCOL_VERSION}"
            same = f"install the same version of llamaclust everywhere ({VERSION} here)"
            raise UsageError(f"the coordinator {versions}: {same}")
        cluster = ClusterKey(self._authority, answer.cluster)
        self._worker.terms.enter(cluster, answer.term, answer.term_proof)
        self._deadlines = answer.deadlines
        if answer.cluster:
            name_cluster(answer.cluster)

    @property
    def _authority(self) -> str:
        return self._credentials.cluster if isinstance(self._credentials, Identity) else ""

    def _with_terms(self, registration: messages.Register) -> messages.Register:
        terms = self._worker.terms
        if terms.last.authority != self._authority:
            return registration
        term, proof, name = terms.largest.value, terms.largest.proof, terms.last.name
        return replace(registration, largest_term=term, term_proof=proof, cluster=name, is_awaited=terms.is_awaited)

    @property
    def coordinator_s(self) -> float:
        return self._deadlines.coordinator_s

    async def serve(self) -> str:
        """Handles requests until the coordinator ends the membership. Returns its stated reason. Raises WorkerError."""
        coordinator = "" if self._stream is None else self._stream.address
        session = Session(self._worker, self._credentials, self._deadlines, Counters(), self.send, coordinator)
        loads = Loads(session)
        requests = Requests(session, loads.set_adapters)
        self._tasks.start(self._send_heartbeats(session))
        self._tasks.start(self._worker.readiness.follow(self._worker.exclusive, self._worker.service))
        if self._renewal is not None:
            self._tasks.start(self._renewal.run())
        try:
            while not isinstance(message := await self._receive(), messages.Shutdown):
                self._dispatch(message, session, loads, requests)
            return message.reason
        finally:
            loads.end()
            try:
                async with deadline("the end of a membership", _END_S):
                    await self._tasks.close()
            except DeadlineError as late:
                _log.warning("%s: %d of its tasks still run", late, len(self._tasks))

    def _dispatch(
        self, message: messages.CoordinatorMessage, session: Session, loads: Loads, requests: Requests
    ) -> None:
        match message:
            case messages.Admitted():  # The worker is admitted again because the coordinator's term has grown.
                self._worker.terms.see(message.term, message.term_proof)
            case messages.Load():
                requests.cancel_measurements()  # They are late, because the coordinator orders no load before them.
                self._tasks.start(loads.load(message))
            case messages.Unload():
                self._tasks.start(loads.unload(message))
            case AddWeightSource():
                self._worker.weights.add_source(message, session.source)
            case messages.CertificateRenewed() | messages.RenewalFailed() if self._renewal is not None:
                self._renewal.receive(message)
            case _ if isinstance(message, messages.WorkerRequest):
                self._tasks.start(requests.answer(message))
            case _:
                raise ProtocolError(f"the coordinator sent {type(message).__name__} to a member")

    async def _send_heartbeats(self, session: Session) -> None:
        counters, device, weights = session.counters, self._worker.device, self._worker.weights
        kv_disk, service = self._worker.kv_disk, self._worker.service
        last_ns, busy_ns = perf_counter_ns(), counters.busy_ns
        try:
            while True:
                await asyncio.sleep(session.deadlines.heartbeat_s)
                now_ns, total_ns = perf_counter_ns(), counters.busy_ns
                cache = service.experts_cache
                heartbeat = messages.Heartbeat(
                    busy=min(1.0, (total_ns - busy_ns) / (now_ns - last_ns)),
                    microbatches=counters.microbatches,
                    tokens=counters.tokens,
                    resident_bytes=resident_bytes(),
                    free_memory_bytes=device.free_memory_bytes,
                    received_bytes=counters.received_bytes,
                    sent_bytes=counters.sent_bytes,
                    weight_bytes_sent=weights.giver.sent_bytes,
                    weight_bytes_received=weights.received_bytes,
                    last_error=recent_trouble(),
                    gpu_free_bytes=tuple(gpu.free_bytes for gpu in device.gpus),
                    computing_s=max(self._worker.compute.computing_s, service.computing_s),
                    kv_disk_written_bytes=0 if kv_disk is None else kv_disk.traffic.written_bytes,
                    kv_disk_read_bytes=0 if kv_disk is None else kv_disk.traffic.read_bytes,
                    kv_disk_used_bytes=0 if kv_disk is None else kv_disk.traffic.used_bytes,
                    experts_cache_hits=cache.hits,
                    experts_cache_misses=cache.misses,
                    experts_cache_copied_bytes=cache.copied_bytes,
                    experts_cache_used_bytes=cache.used_bytes,
                    stages=service.progress,
                )
                await session.send(heartbeat)
                last_ns, busy_ns = now_ns, total_ns
        except DeviceLostError as error:  # Raised while the free memory of GPUs is read.
            self._worker.compute.give_up(error)
        except WorkerError:
            return

    async def send(self, message: messages.WorkerMessage) -> None:
        """Sends a message. A cancelled caller does not stop the write, because gRPC would then end the stream."""
        writing = asyncio.create_task(self._write(message))
        writing.add_done_callback(_retrieved)  # The caller may have been cancelled.
        await asyncio.shield(writing)

    async def _write(self, message: messages.WorkerMessage) -> None:
        assert self._stream is not None
        async with self._writing:
            await self._stream.write(encode_worker_message(message))

    async def _receive(self) -> messages.CoordinatorMessage:
        assert self._stream is not None
        data = await self._stream.read()
        if data is None:
            raise WorkerError("the coordinator ended the stream")
        return decode_coordinator_message(data)
