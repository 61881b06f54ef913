"""A worker's membership in a cluster: it joins, serves its coordinator's orders, and ends with it."""

from __future__ import annotations

import asyncio
import contextlib

from llamaclust.core.errors import ProtocolError, UsageError, WorkerError
from llamaclust.core.logs import name_cluster
from llamaclust.wire.codec import PROTOCOL_VERSION
from llamaclust.wire.control.codec import decode_coordinator_message, encode_worker_message
from llamaclust.wire.control.messages import (
    AddWeightSource,
    Admitted,
    CertificateRenewed,
    CoordinatorMessage,
    Deadlines,
    Load,
    Register,
    Rejected,
    RenewalFailed,
    Shutdown,
    Unload,
    WorkerMessage,
    WorkerRequest,
)
from llamaclust.wire.rpc.client import JOIN, ClientStream, Peer
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.task_set import TaskSet
from llamaclust.wire.security.credentials import Credentials, Identity
from llamaclust.worker.heartbeats import send_heartbeats
from llamaclust.worker.renewal import Renewal
from llamaclust.worker.requests import Requests
from llamaclust.worker.session import Session
from llamaclust.worker.stage.loads import Loads
from llamaclust.worker.stage.loop import Counters
from llamaclust.worker.worker import Worker


class Member:
    """One membership, from the handshake until the coordinator ends it or is lost."""

    def __init__(self, worker: Worker, credentials: Credentials) -> None:
        self._worker = worker
        self._credentials = credentials
        self._renewal = Renewal(credentials, self.send) if isinstance(credentials, Identity) else None
        self._deadlines = Deadlines()
        self._tasks = TaskSet()
        self._writing = asyncio.Lock()
        self._stream: ClientStream | None = None

    async def join(
        self, coordinator: Peer, registration: Register, join_s: float, *, wait_for_ready: bool = True
    ) -> None:
        """Registers. UsageError where the coordinator refuses, DeadlineError where it does not answer."""
        self._stream = coordinator.open(JOIN, wait_for_ready=wait_for_ready)
        async with deadline(f"joining the coordinator at {coordinator.address}", join_s):
            await self._stream.opened()
            await self.send(registration)
            answer = await self._receive()
        if isinstance(answer, Rejected):
            raise UsageError(f"the coordinator refused: {answer.reason}")
        if not isinstance(answer, Admitted):
            raise ProtocolError(f"the coordinator answered {type(answer).__name__} to a registration")
        if answer.protocol_version != PROTOCOL_VERSION:
            versions = f"{answer.protocol_version}, this worker {PROTOCOL_VERSION}"
            raise UsageError(f"the coordinator speaks protocol {versions}")
        self._deadlines = answer.deadlines
        if answer.cluster:
            name_cluster(answer.cluster)

    @property
    def coordinator_s(self) -> float:
        """How long to wait for a lost coordinator."""
        return self._deadlines.coordinator_s

    async def serve(self) -> str:
        """Until the coordinator ends the membership; returns its reason. WorkerError where it is lost."""
        session = Session(self._worker, self._credentials, self._deadlines, Counters(), self.send)
        exclusive = asyncio.Lock()
        loads, requests = Loads(session, exclusive), Requests(session, exclusive)
        self._tasks.start(send_heartbeats(session))
        if self._renewal is not None:
            self._tasks.start(self._renew(self._renewal))
        try:
            while not isinstance(message := await self._receive(), Shutdown):
                self._dispatch(message, session, loads, requests)
            return message.reason
        finally:
            self._tasks.cancel()

    def _dispatch(self, message: CoordinatorMessage, session: Session, loads: Loads, requests: Requests) -> None:
        match message:
            case Load():
                self._tasks.start(loads.load(message))
            case Unload():
                self._tasks.start(loads.unload(message))
            case AddWeightSource():
                self._worker.weights.add_source(message, session.peer)
            case CertificateRenewed() | RenewalFailed() if self._renewal is not None:
                self._renewal.receive(message)
            case _ if isinstance(message, WorkerRequest):
                self._tasks.start(requests.answer(message))
            case _:
                raise ProtocolError(f"the coordinator sent {type(message).__name__} to a member")

    async def _renew(self, renewal: Renewal) -> None:
        with contextlib.suppress(WorkerError):  # as with heartbeats
            await renewal.run()

    async def send(self, message: WorkerMessage) -> None:
        """Goes on if the caller is cancelled, such as a stage's stream that breaks: gRPC would end the membership."""
        await asyncio.shield(self._write(message))

    async def _write(self, message: WorkerMessage) -> None:
        assert self._stream is not None
        async with self._writing:
            await self._stream.write(encode_worker_message(message))

    async def _receive(self) -> CoordinatorMessage:
        assert self._stream is not None
        data = await self._stream.read()
        if data is None:
            raise WorkerError("the coordinator ended the stream")
        return decode_coordinator_message(data)
