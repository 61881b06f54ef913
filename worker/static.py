"""A worker of a static cluster: it joins, and rejoins with its weights kept after a loss of its coordinator, which may
be a standby at another address by then."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence
from dataclasses import replace

from llamaclust.core.addresses import ANYWHERE, joined_address, split_address
from llamaclust.core.backoff import Backoff
from llamaclust.core.bounds import one_line
from llamaclust.core.errors import (
    DeadlineError,
    DeviceLostError,
    LlamaclustError,
    RefusedError,
    UsageError,
    WorkerError,
)
from llamaclust.wire.control.messages import Register
from llamaclust.wire.rpc.client import Peer
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.sched_slice import short_slices
from llamaclust.wire.rpc.server import Server
from llamaclust.wire.security.credentials import COORDINATOR, Credentials, Identity, Insecure
from llamaclust.wire.security.token import JoinToken
from llamaclust.worker.devices.system_info import log_place
from llamaclust.worker.enrolment import Enrolled, enrol, is_open, speaks_tls
from llamaclust.worker.membership import Member
from llamaclust.worker.settings import WorkerSettings
from llamaclust.worker.worker import Worker

_log = logging.getLogger(__name__)

_BACKOFF = Backoff(0.2, 5.0)
_TURN = Backoff(3.0, 30.0)
"""For one of several addresses: a machine that is gone does not answer, and a busy one may need long."""
_LOG_EVERY_S = 60.0
_MOST_LOGGED = 16
_RESOLVE_S = 10.0
_GRACE_S = 0.5
_STEP_S = 10.0


async def run_static_worker(settings: WorkerSettings) -> str:
    """Until the coordinator ends the cluster; returns its reason. UsageError where it refuses the worker at first, or
    no address is a coordinator's that could take it, WorkerError where it was gone for longer than it said to wait."""
    worker = _StaticWorker(settings)
    try:
        return await worker.run()
    finally:
        await worker.close()


class _StaticWorker:
    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        file = settings.token_file
        self._token = JoinToken.parse(settings.token) if file is None else JoinToken.read(file)  # None: insecure
        self._worker = Worker.open(settings)
        self._rejoin = _Attempts((settings.join, *settings.standbys))
        self._credentials: Credentials | None = None
        self._server: Server | None = None
        self._address = ""
        self._coordinator_s: float | None = None  # None: it has never been a member

    async def run(self) -> str:
        while True:
            try:
                return await self._run_membership()
            except LlamaclustError as error:
                why = await self._explained(error)
                if self._is_final(why):
                    raise why from error
                await self._rejoin.pause(why, self._coordinator_s)

    async def _explained(self, error: LlamaclustError) -> LlamaclustError:
        address, is_insecure = self._rejoin.address, self._token is None and self._coordinator_s is None
        if is_insecure and await speaks_tls(*split_address(address)):
            advice = "start the worker with --token-file instead of --insecure"
            return UsageError(f"the coordinator at {address} requires TLS: {advice}")
        return error

    def _is_final(self, error: LlamaclustError) -> bool:
        """Of several addresses, one may be another program's by now, whatever that answers."""
        is_refused = self._rejoin.is_refused(error) or isinstance(error, RefusedError)
        return isinstance(error, DeviceLostError) or (is_refused and self._coordinator_s is None)

    async def _run_membership(self) -> str:
        """One membership. DeviceLostError where a step of the last one hangs."""
        await self._worker.compute.idle(_STEP_S)
        target = await self._enrol()
        assert self._credentials is not None
        if self._server is None:
            await self._listen(self._credentials)
        peer = Peer(target, self._credentials, COORDINATOR)
        member = Member(self._worker, self._credentials)
        try:
            await member.join(peer, self._registration(), self._settings.join_s, wait_for_ready=False)
            self._coordinator_s = member.coordinator_s
            self._rejoin.end()
            _log.info("worker %s is a member, its stages are served at %s", self._settings.name, self._address)
            return await self._worker.compute.while_able(member.serve())
        finally:
            self._worker.service.keep()
            await peer.close()

    async def _enrol(self) -> str:
        """Where the Coordinator service is; from then on there are credentials."""
        address, turn_s = self._rejoin.address, self._rejoin.turn_s
        if self._token is None:
            if self._credentials is None:
                _log.warning("insecure: links are neither encrypted nor authenticated")
            self._credentials = Insecure()
            if turn_s is not None and not await is_open(*split_address(address), turn_s):
                raise WorkerError(f"{address} cannot be reached")
            return address
        if (given := self._settings.token_file) is not None and given.is_file():  # it may hold another one by now
            self._token = JoinToken.read(given)
        enrolled = await self._enrolled(self._token, address, turn_s)
        if isinstance(self._credentials, Identity):
            self._credentials.pair = enrolled.identity.pair  # what serves already goes on
        else:
            self._credentials = enrolled.identity
        return enrolled.target

    async def _enrolled(self, token: JoinToken, address: str, turn_s: float | None) -> Enrolled:
        async with contextlib.AsyncExitStack() as limit:
            if turn_s is not None:
                await limit.enter_async_context(deadline(f"enrolling at {address}", turn_s))
            return await enrol(*split_address(address), token, self._settings.name)

    async def _listen(self, credentials: Credentials) -> None:
        settings, coordinator = self._settings, split_address(self._rejoin.address)
        listen = settings.listen or joined_address(await _own_host(*coordinator), 0)
        with short_slices():
            self._server = await Server.start(listen, credentials, self._worker.handlers)
        host, _ = split_address(listen)
        if host in ANYWHERE:
            host = await _own_host(*coordinator)
        self._address = settings.advertise or joined_address(host, self._server.port)
        if ":" not in self._address.rpartition("]")[2]:
            self._address = f"{self._address}:{self._server.port}"
        split_address(self._address)

    def _registration(self) -> Register:
        """What is kept from before can be had again."""
        kept = self._worker.service.kept_bytes
        now = self._worker.device.registration(self._settings.name, self._address)
        free, machine = now.free_memory_bytes + kept["cpu"], now.machine_free_bytes + kept["cpu"]
        gpus = tuple(replace(gpu, free_bytes=gpu.free_bytes + kept[gpu.device]) for gpu in now.gpus)
        here = one_line(log_place())
        return replace(now, free_memory_bytes=free, machine_free_bytes=machine, gpus=gpus, log=here)

    async def close(self) -> None:
        self._worker.compute.close()
        if self._server is not None:
            with contextlib.suppress(DeadlineError):
                async with deadline("closing streams", _GRACE_S):
                    await self._server.stop(0.0)


class _Attempts:
    """To join, at the addresses of the coordinator and its standbys in turn: pauses with backoff after each round, and
    log lines about what is waited for."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._place = 0
        self._refused: set[str] = set()  # the addresses whose last attempts no other try would mend
        self.end()

    @property
    def address(self) -> str:
        """To be tried now."""
        return self._addresses[self._place]

    @property
    def turn_s(self) -> float | None:
        """What it may take; None where there is no other one."""
        return None if len(self._addresses) == 1 else _TURN.pause_s(self._attempts // len(self._addresses))

    def is_refused(self, error: LlamaclustError) -> bool:
        """Whether this one and the last attempts at all other addresses failed for good."""
        (self._refused.add if isinstance(error, UsageError) else self._refused.discard)(self.address)
        return len(self._refused) == len(self._addresses)

    def end(self) -> None:
        """There is nothing to wait for."""
        self._begun_s: float | None = None
        self._logged: dict[str, float] = {}
        self._attempts = 0

    async def pause(self, error: LlamaclustError, limit_s: float | None) -> None:
        """Before the next address. WorkerError after `limit_s` of it; None: there is no limit."""
        now_s = asyncio.get_running_loop().time()
        if self._begun_s is None:
            self._begun_s = now_s
        rounds, place = divmod(self._attempts, len(self._addresses))
        pause_s = _BACKOFF.pause_s(rounds) if place == len(self._addresses) - 1 else 0.0
        if limit_s is not None and now_s + pause_s - self._begun_s > limit_s:
            raise WorkerError(
                f"the coordinator is gone, and has not come back within {limit_s:g} s: {error}"
            ) from error
        if now_s - self._logged.get(str(error), -_LOG_EVERY_S) >= _LOG_EVERY_S:
            limit = "" if limit_s is None else f" for {limit_s:g} s at most, weights kept"
            _log.warning("waiting for the coordinator at %s%s: %s", " or ".join(self._addresses), limit, error)
            self._logged = {str(error): now_s, **dict(list(self._logged.items())[: _MOST_LOGGED - 1])}
        await asyncio.sleep(pause_s)
        self._attempts += 1
        self._place = (self._place + 1) % len(self._addresses)


async def _own_host(host: str, port: int) -> str:
    """The address of this machine from which the coordinator is reached. WorkerError where its name leads nowhere."""
    loop = asyncio.get_running_loop()
    try:
        async with deadline(f"looking up {host}", _RESOLVE_S):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise WorkerError(f"{host} cannot be reached: {error.strerror or error}") from error
