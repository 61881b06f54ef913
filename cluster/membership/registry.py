"""The coordinator's side of membership: who is there, who is ready, who was lost and how."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from llamaclust.cluster.membership.worker_handle import WorkerHandle, WorkerState
from llamaclust.core.errors import DeadlineError, ProtocolError, WorkerError
from llamaclust.core.limits import NUMERICS_VERSION
from llamaclust.wire.codec import PROTOCOL_VERSION
from llamaclust.wire.control.codec import decode_worker_message, encode_coordinator_message
from llamaclust.wire.control.messages import (
    Admitted,
    CertificateRenewed,
    CoordinatorMessage,
    Deadlines,
    Failure,
    PeerUnreachable,
    Register,
    Rejected,
    RenewalFailed,
    RenewCertificate,
    Shutdown,
)
from llamaclust.wire.rpc.client import JOIN
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.rejections import RefusalLog
from llamaclust.wire.rpc.server import Server, ServerStream
from llamaclust.wire.security.credentials import Credentials, Principal

_HANDSHAKE_S = 10.0
_GOODBYE_S = 0.5
_LISTEN_S = 0.1
_EXIT_NEWS_S = 0.5
"""A stream breaks a moment before the launcher hears why the process ended."""

Welcomes = Callable[[str], str | None]
Certify = Callable[[bytes, Principal], bytes]
"""A certificate (DER) for a certificate request (DER) of who is named; ProtocolError where that will not do."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MemberJoined:
    worker: WorkerHandle


@dataclass(frozen=True, slots=True)
class MemberLost:
    worker: WorkerHandle


@dataclass(frozen=True, slots=True)
class PeerReported:
    """A member reports that it cannot reach another one."""

    worker: WorkerHandle
    report: PeerUnreachable


MembershipEvent = MemberJoined | MemberLost | PeerReported


class Registry:
    """Serves the Coordinator service while it is entered."""

    def __init__(
        self,
        listen: str,
        credentials: Credentials,
        *,
        silence_s: float = 5.0,
        deadlines: Deadlines | None = None,
        last_words: Callable[[str], str] = lambda name: "",
        welcomes: Welcomes = lambda name: None,
        certify: Certify | None = None,
        cluster: str = "",
    ) -> None:
        """`silence_s`: without a heartbeat for so long a worker is lost. `last_words`: of a worker's log, by name.
        `welcomes`: why a worker of a name is refused. `certify`: renews certificates, where there are any. `cluster`:
        its name, for workers' logs."""
        self._cluster = cluster
        self._listen = listen
        self._credentials = credentials
        self._welcomes = welcomes
        self._certify = certify
        self._refusals = RefusalLog(_log)
        self._silence_s = silence_s
        self._deadlines = deadlines or Deadlines()
        self._last_words = last_words
        self._subscribers: list[Callable[[MembershipEvent], None]] = []
        self._workers: dict[str, WorkerHandle] = {}
        self._exits: dict[str, str] = {}
        self._changed = asyncio.Event()
        self._mourning: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._server: Server | None = None

    @property
    def address(self) -> str:
        """gRPC target that workers join."""
        assert self._server is not None
        return self._server.address

    @property
    def workers(self) -> Mapping[str, WorkerHandle]:
        """By name; lost ones stay until another of that name joins."""
        return MappingProxyType(self._workers)

    @property
    def present(self) -> dict[str, WorkerHandle]:
        """Those that are not lost, in the order in which they joined."""
        return {name: handle for name, handle in self._workers.items() if handle.loss is None}

    def subscribe(self, subscriber: Callable[[MembershipEvent], None]) -> None:
        """It gets every event from now on, at once."""
        self._subscribers.append(subscriber)

    def _publish(self, event: MembershipEvent) -> None:
        for subscriber in self._subscribers:
            subscriber(event)

    async def __aenter__(self) -> Registry:
        self._server = await Server.start(self._listen, self._credentials, {JOIN: self._join})
        return self

    async def __aexit__(self, *_: object) -> None:
        """Tells every worker to end."""
        present = self.present.values()
        for handle in present:
            handle.left = True
        goodbye = Shutdown("the cluster was stopped")
        with contextlib.suppress(DeadlineError):
            async with deadline("saying goodbye", _GOODBYE_S):
                await asyncio.gather(*(handle.say(goodbye) for handle in present), return_exceptions=True)
        assert self._server is not None
        self._is_closed = True  # calls may end later than their server
        await self._server.stop(_GOODBYE_S)
        mourning = tuple(self._mourning)
        for task in mourning:
            task.cancel()
        await asyncio.gather(*mourning, return_exceptions=True)

    async def changed(self) -> None:
        """Returns at the next change of who is there. For as long as it takes: the caller has a deadline."""
        await self._changed.wait()

    async def wait_for(self, names: Collection[str], deadline_s: float) -> None:
        """Returns when all have joined. DeadlineError names those that have not, WorkerError one that ended before."""
        missing = sorted(names)
        try:
            async with deadline("workers joining", deadline_s):
                while missing := [name for name in names if name not in self.present]:
                    self._check_alive(missing)
                    await self._changed.wait()
        except DeadlineError as error:
            raise DeadlineError(f"workers {', '.join(missing)} have not joined within {deadline_s:g} s") from error

    def _check_alive(self, names: Collection[str]) -> None:
        for name in names:
            if name in self._exits:
                words = self._last_words(name)
                last = f"; its last words: {words}" if words else ""
                raise WorkerError(f"worker {name} did not start: {self._exits[name]}{last}")

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def process_exited(self, name: str, how: str) -> None:
        """Notice from the launcher that a worker's process is gone."""
        if name in self._workers:
            self._lose(self._workers[name], how)
        else:
            self._exits[name] = how
        self._tell_change()

    def will_not_return(self, name: str, why: str) -> None:
        """Notice from the launcher that it starts this worker no more."""
        self._exits[name] = why
        self._tell_change()

    def fence(self, handle: WorkerHandle, reason: str) -> None:
        """Counts a worker as lost, although its process may live on: it is not heard any more."""
        self._lose(handle, reason)

    def _lose(self, handle: WorkerHandle, reason: str) -> None:
        if handle.state not in (WorkerState.LOST, WorkerState.LEFT):
            handle.lose(reason)
            self._publish(MemberLost(handle))

    async def _mourn(self, handle: WorkerHandle, reason: str) -> None:
        """Declares the loss; what the launcher says comes first, for it knows of signals and exit codes."""
        with contextlib.suppress(DeadlineError):
            async with deadline("news of its process", _EXIT_NEWS_S):
                await handle.lost.wait()
        self._lose(handle, reason)

    async def _join(self, stream: ServerStream) -> None:
        await stream.accept()
        async with deadline("a worker's registration", _HANDSHAKE_S):
            data = await stream.read()
        register = None if data is None else decode_worker_message(data)
        if not isinstance(register, Register):
            raise ProtocolError("a worker must register first")
        if refusal := await self._refusal(register, stream.peer):
            self._refusals.tell(refusal)
            async with deadline("refusing a worker", _HANDSHAKE_S):
                await stream.write(encode_coordinator_message(Rejected(refusal)))
            return
        await self._serve(register, stream)

    async def _refusal(self, register: Register, peer: Principal | None) -> str | None:
        """Of whom fits, only after a sign of life of the member whose name it has: that one hangs, perhaps."""
        if misfit := self._misfit(register, peer):
            return misfit
        if rival := self._rival(register):
            await self._is_responsive(rival)
        if rival := self._rival(register):
            pid = rival.registration.pid
            return f"a worker named {register.name} is a member already (pid {pid}): choose another name"
        return self._welcomes(register.name)

    def _misfit(self, register: Register, peer: Principal | None) -> str | None:
        name = register.name
        if peer is not None and peer.worker != name:
            return f"the certificate is of {peer}, which registers as worker {name}"
        same = "install the same version of llamaclust everywhere"
        if register.protocol_version != PROTOCOL_VERSION:
            theirs = f"protocol {register.protocol_version}"
            return f"worker {name} speaks {theirs}, this coordinator {PROTOCOL_VERSION}: {same}"
        if register.numerics_version != (needed := self._numerics_version(register)):
            theirs = f"numerics_version {register.numerics_version}"
            return f"worker {name} computes by {theirs}, this cluster needs {needed}: {same}"
        return None

    def _rival(self, register: Register) -> WorkerHandle | None:
        """Another process that is a member under that name."""
        present = self.present.get(register.name)
        return None if present is None or present.is_same_process(register) else present

    async def _is_responsive(self, member: WorkerHandle) -> None:
        """Waits for its next sign of life, or its loss."""
        with contextlib.suppress(DeadlineError):
            async with deadline("a sign of life", self._silence_s + _HANDSHAKE_S):
                await member.is_responsive()

    def _numerics_version(self, register: Register) -> int:
        """What the first member computes by; of a first member, what this version of its device does."""
        members = (handle.registration.numerics_version for handle in self.present.values())
        return next(members, 0 if register.device == "reference" else NUMERICS_VERSION)

    async def _serve(self, register: Register, stream: ServerStream) -> None:
        name = register.name
        if name in self.present:
            self._lose(self._workers[name], "it joins again")
        handle = WorkerHandle(register, _speaker(stream), lambda: self._last_words(name))
        self._workers[name] = handle
        self._exits.pop(name, None)
        reason = "its connection broke"
        try:
            async with deadline("welcoming a worker", _HANDSHAKE_S):
                await handle.say(Admitted(self._deadlines, cluster=self._cluster))
            self._tell_change()
            self._publish(MemberJoined(handle))
            reason = await self._listen_to(handle, stream)
        except ProtocolError as error:
            reason = str(error)
            raise
        finally:
            if not self._is_closed:
                mourning = asyncio.create_task(self._mourn(handle, reason))
                self._mourning.add(mourning)
                mourning.add_done_callback(self._mourning.discard)

    async def _listen_to(self, handle: WorkerHandle, stream: ServerStream) -> str:
        """Until the worker is heard of no more; returns why."""
        reading, lost = asyncio.create_task(stream.read()), asyncio.create_task(handle.lost.wait())
        try:
            while await self._comes(reading, lost):
                if handle.lost.is_set():
                    return "it is not a member any more"
                data = reading.result()
                if data is None:
                    return "its connection closed"
                reading = asyncio.create_task(stream.read())
                message = decode_worker_message(data)
                if isinstance(message, RenewCertificate):
                    async with deadline("renewing a certificate", _HANDSHAKE_S):
                        await handle.say(self._renewal(message, stream.peer))
                else:
                    handle.hear(message)
                    if isinstance(message, PeerUnreachable) and message.epoch in handle.stages:
                        self._publish(PeerReported(handle, message))
            silent = f"no sign of life for {self._silence_s:g} s"
            self._lose(handle, silent)  # no news of its end is to be waited for
            return silent
        finally:
            reading.cancel()
            lost.cancel()

    def _renewal(self, request: RenewCertificate, peer: Principal | None) -> CertificateRenewed | RenewalFailed:
        """Of the name that the present certificate has."""
        if self._certify is None or peer is None:
            raise ProtocolError("a certificate is to be renewed where there are none")
        try:
            return CertificateRenewed(self._certify(request.certificate_request, peer))
        except ProtocolError as error:
            return RenewalFailed(Failure(ProtocolError.__name__, str(error)))

    async def _comes(self, reading: asyncio.Task[bytes | None], lost: asyncio.Task[bool]) -> bool:
        """False after silence in which this loop had time to listen: it may have been busy while messages waited."""
        news = (reading, lost)
        done, _ = await asyncio.wait(news, timeout=self._silence_s, return_when=asyncio.FIRST_COMPLETED)
        clock, late = asyncio.get_running_loop().time, True
        while late and not done:
            begun = clock()
            done, _ = await asyncio.wait(news, timeout=_LISTEN_S, return_when=asyncio.FIRST_COMPLETED)
            late = clock() - begun > 2 * _LISTEN_S
        return bool(done)


def _speaker(stream: ServerStream) -> Callable[[CoordinatorMessage], Awaitable[None]]:
    """Writes messages one at a time, as gRPC wants it."""
    writing = asyncio.Lock()

    async def said(message: CoordinatorMessage) -> None:
        async with writing:
            await stream.write(encode_coordinator_message(message))

    async def say(message: CoordinatorMessage) -> None:
        await asyncio.shield(said(message))  # where its deadline passes, gRPC still has the message

    return say
