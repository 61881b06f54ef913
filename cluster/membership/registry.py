"""The service that workers join. It handles handshakes, messages and disconnections."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from llamaclust.cluster.membership.join_rules import HANDSHAKE_S, JoinRules, JoinSettings
from llamaclust.cluster.membership.members import HeartbeatReceived, Members, PeerReported, ReadLastError
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.core.addresses import split_address
from llamaclust.core.errors import DeadlineError, ProtocolError, SupersededError, UsageError
from llamaclust.wire.control import messages
from llamaclust.wire.control.codec import decode_worker_message, encode_coordinator_message
from llamaclust.wire.control.messages import CoordinatorMessage, Register
from llamaclust.wire.listening import listener
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.methods import JOIN
from llamaclust.wire.rpc.rejections import RefusalLog
from llamaclust.wire.rpc.server import Server, ServerStream
from llamaclust.wire.rpc.unix_streams import PREFIX
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.wire.security.credentials import Credentials
from llamaclust.wire.security.terms import is_term_proven, prove_term
from llamaclust.worker.weights.giver import WeightGiver

_LISTEN_S = 0.1
_GOODBYE_S = 0.5
_LOOK_S = 1.0
"""Seconds between two reads of the coordinator's record on disk."""
_CURE = "choose another port with `join.members`"

_log = logging.getLogger(__name__)


class Registry(Members):
    """The members of a cluster, and the gRPC service that they join. It runs while its context is open."""

    def __init__(
        self,
        listen: str,
        credentials: Credentials,
        read_last_error: ReadLastError,
        settings: JoinSettings,
        giver: WeightGiver | None = None,
    ) -> None:
        super().__init__(read_last_error)
        self._listen = listen
        self._credentials = credentials
        self._settings = settings
        self.giver = giver
        self._rules = JoinRules(self, settings, credentials)
        self._refusals = RefusalLog(_log)
        self._server: Server | None = None
        self._is_closed = False  # True after the server was closed. Connections may end later.
        self._superseded: asyncio.Future[None] = asyncio.Future()
        self._is_left = False  # True if the workers are left to the next coordinator.

    @property
    def address(self) -> str:
        assert self._server is not None
        return self._server.address

    async def __aenter__(self) -> Registry:
        given = {} if self.giver is None else self.giver.handlers
        try:
            self._server = await Server.start(self._listen, self._credentials, {JOIN: self._join, **given})
        except UsageError as error:
            if not self._listen.startswith(PREFIX):  # gRPC does not tell why it cannot listen.
                listener(*split_address(self._listen), _CURE).close()
            raise UsageError(f"{error}; {_CURE}") from error
        return self

    async def __aexit__(self, *error: object) -> None:
        """Ends the workers, unless `leave_workers` was called, another coordinator took over or the start timed out."""
        is_late = any(isinstance(part, DeadlineError) for part in error)
        present = [] if self._superseded.done() or self._is_left or is_late else list(self.present.values())
        for handle in present:
            handle.left = True
        goodbye = messages.Shutdown("the cluster was stopped")
        with contextlib.suppress(DeadlineError):
            async with deadline("sending Shutdown to the workers", _GOODBYE_S):
                await asyncio.gather(*(handle.channel.send(goodbye) for handle in present), return_exceptions=True)
        assert self._server is not None
        self._is_closed = True
        await self._server.stop(_GOODBYE_S)
        await self.losing.close()

    async def _join(self, stream: ServerStream) -> None:
        await stream.accept()
        async with deadline("a worker's registration", HANDSHAKE_S):
            data = await stream.read()
        register = None if data is None else decode_worker_message(data)
        if not isinstance(register, Register):
            raise ProtocolError("a worker must register first")
        refusal = (
            await self._rules.refusal(register, stream.peer)
            or await self._newer_coordinator(register)
            # Meanwhile, another worker with this name may have joined.
            or await self._rules.refusal(register, stream.peer)
        )
        if refusal is not None:
            self._refusals.tell(refusal)
            async with deadline("refusing a worker", HANDSHAKE_S):
                await stream.write(encode_coordinator_message(messages.Rejected(refusal)))
            return
        await self._serve(register, stream)

    async def _newer_coordinator(self, register: Register) -> str | None:
        """Returns the reason to refuse a worker if it has seen a newer coordinator or waits for another cluster."""
        record, name, is_ours = self._settings.record, register.name, register.cluster == self._settings.cluster
        if register.is_awaited and not is_ours:
            here = f"but this is a coordinator of {self._settings.cluster!r}"
            return f"worker {name} waits for a coordinator of cluster {register.cluster!r}, {here}"
        seen = register.largest_term if is_ours else 0
        former = record.term
        try:
            if await record.admits(seen):
                return None
        finally:
            if record.term > former:
                await self._prove_term()
        is_proven = is_term_proven(self._credentials, seen, register.term_proof, self._settings.cluster)
        terms = f"term {seen}{'' if is_proven else ', without a valid signature'}; this coordinator has {record.term}"
        newer = f"worker {name} has seen a newer coordinator of this cluster ({terms})"
        # A worker's false report must not end this coordinator.
        if is_proven and name in self.workers and self.workers[name].stages:
            self._supersede(newer)
        return f"{newer}; restart this coordinator, or end it"

    def _supersede(self, newer: str) -> None:
        if not self._superseded.done():
            self._superseded.set_exception(SupersededError(f"superseded by a newer coordinator: {newer}"))

    async def superseded(self) -> None:
        """Waits until a worker or the record on disk shows a newer coordinator. Then raises SupersededError."""
        record = self._settings.record
        while not self._superseded.done():
            look = asyncio.ensure_future(asyncio.to_thread(record.newer_term))
            signs: list[asyncio.Future[Any]] = [look, self._superseded]
            try:  # A worker's proof counts even if the state directory does not answer.
                await asyncio.wait(signs, return_when=asyncio.FIRST_COMPLETED)
            finally:
                look.cancel()
            if look.done() and (newer := look.result()):
                self._supersede(f"the state directory has term {newer}, and this coordinator has term {record.term}")
            await asyncio.wait([self._superseded], timeout=_LOOK_S)
        await self._superseded

    def leave_workers(self) -> None:
        """Keeps the workers running when this registry ends, so that the next coordinator can use them."""
        self._is_left = True

    async def _serve(self, register: Register, stream: ServerStream) -> None:
        name = register.name
        send = _serial_sender(stream)
        handle = WorkerHandle(register, send, lambda: self.read_last_error(name, handle.silent_s), self._credentials)
        self.admit(handle)
        reason = "its connection broke"
        try:
            async with deadline("admission of a worker", HANDSHAKE_S):
                await handle.channel.send(self._admitted())
            self.announce(handle)
            reason = await self._listen_to(handle, stream)
        except ProtocolError as error:
            reason = str(error)
            raise
        finally:
            if not self._is_closed:
                self.report_loss(handle, reason)

    async def _prove_term(self) -> None:
        with contextlib.suppress(DeadlineError):
            async with deadline("proving a term", HANDSHAKE_S):
                sends = (handle.channel.send(self._admitted()) for handle in self.present.values())
                await asyncio.gather(*sends, return_exceptions=True)

    def _admitted(self) -> messages.Admitted:
        settings, term = self._settings, self._settings.record.term
        proof = prove_term(self._credentials, term, settings.cluster)
        return messages.Admitted(settings.deadlines, cluster=settings.cluster, term=term, term_proof=proof)

    async def _listen_to(self, handle: WorkerHandle, stream: ServerStream) -> str:
        reading, lost = asyncio.create_task(stream.read()), asyncio.create_task(handle.lost.wait())
        try:
            while await self._has_message(reading, lost, self._settings.heartbeat_timeout_s + handle.quiet_s):
                if handle.lost.is_set():
                    return "it is no longer a member"
                data = reading.result()
                if data is None:
                    return "its connection closed"
                reading = asyncio.create_task(stream.read())
                message = decode_worker_message(data)
                if isinstance(message, messages.RenewCertificate):
                    async with deadline("renewing a certificate", HANDSHAKE_S):
                        await handle.channel.send(self._renewal(message, stream.peer))
                else:
                    handle.receive(message)
                    if isinstance(message, messages.PeerUnreachable) and message.epoch in handle.stages:
                        self.publish(PeerReported(handle, message))
                    if isinstance(message, messages.Heartbeat):
                        self.publish(HeartbeatReceived(handle))
            silent = f"no heartbeat for {self._settings.heartbeat_timeout_s + handle.quiet_s:g} s"
            self.mark_lost(handle, silent)  # The launcher has reported no exit, so there is nothing to wait for.
            return silent
        finally:
            reading.cancel()
            lost.cancel()

    def _renewal(self, request: messages.RenewCertificate, peer: Principal | None) -> CoordinatorMessage:
        if self._settings.certify is None or peer is None:
            raise ProtocolError("this cluster has no certificates to renew")
        try:
            return messages.CertificateRenewed(self._settings.certify(request.certificate_request, peer))
        except ProtocolError as error:
            return messages.RenewalFailed(messages.Failure(ProtocolError.__name__, str(error)))

    async def _has_message(
        self, reading: asyncio.Task[bytes | None], lost: asyncio.Task[bool], timeout_s: float
    ) -> bool:
        tasks = (reading, lost)
        done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        clock, late = asyncio.get_running_loop().time, True
        while late and not done:
            begun = clock()
            done, _ = await asyncio.wait(tasks, timeout=_LISTEN_S, return_when=asyncio.FIRST_COMPLETED)
            late = clock() - begun > 2 * _LISTEN_S
        return bool(done)


def _serial_sender(stream: ServerStream) -> Callable[[CoordinatorMessage], Awaitable[None]]:
    """Returns a function that sends messages one at a time, as gRPC requires."""
    writing = asyncio.Lock()

    async def write(message: CoordinatorMessage) -> None:
        async with writing:
            await stream.write(encode_coordinator_message(message))

    async def send(message: CoordinatorMessage) -> None:
        # Shielded, because gRPC still holds the message after the deadline of the sender.
        await asyncio.shield(write(message))

    return send
