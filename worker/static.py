"""A worker that is started separately, and that keeps its weights and joins again if the coordinator is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any

from llamaclust.core.addresses import is_link_local, joined_address, split_address
from llamaclust.core.bounds import one_line
from llamaclust.core.errors import (
    DeadlineError,
    DeviceLostError,
    LlamaclustError,
    UsageError,
    WorkerError,
)
from llamaclust.wire.control.messages import Register
from llamaclust.wire.rpc.client import Peer
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.sched_slice import short_slices
from llamaclust.wire.rpc.server import Server
from llamaclust.wire.security.certificate_names import COORDINATOR
from llamaclust.wire.security.certificates import cluster_id
from llamaclust.wire.security.credentials import Credentials, Identity, Insecure
from llamaclust.wire.security.token import JoinToken
from llamaclust.worker.coordinator_search import CoordinatorSearch
from llamaclust.worker.devices.system_info import log_place, release_freed_memory
from llamaclust.worker.enrolment import enrol, is_open, speaks_tls
from llamaclust.worker.membership import Member
from llamaclust.worker.own_address import OwnAddress, Route
from llamaclust.worker.settings import WorkerSettings
from llamaclust.worker.worker import Worker

_log = logging.getLogger(__name__)

_OPEN_S = 10.0
_GRACE_S = 0.5
_STEP_S = 300.0
"""Maximum seconds of steps that still run when a membership ends. A coordinator waits as long for a result."""
_TOKEN_LOOK_S = 2.0
_COORDINATOR_S = 20.0
"""Seconds within which a broken connection to the coordinator is noticed."""


async def run_static_worker(settings: WorkerSettings) -> str:
    """Runs a worker until its cluster ends, and returns the coordinator's reason. Raises UsageError if all coordinators
    refuse the worker, and WorkerError if a lost coordinator does not return in time."""
    worker = _StaticWorker(settings)
    try:
        return await worker.run()
    finally:
        await worker.close()


@dataclass(frozen=True, slots=True)
class _Reached:
    target: str  # gRPC target of the Coordinator service.
    credentials: Identity | Insecure


class _StaticWorker:
    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        file = settings.token_file
        # None for an insecure cluster.
        self._token = JoinToken.parse(settings.token) if file is None else JoinToken.read(file)
        self._worker = Worker.open(settings)
        given = tuple(filter(None, (settings.join, *settings.standbys)))
        self._search = CoordinatorSearch(
            given, discovers=settings.discover, stays=settings.stays, first_s=settings.search_s
        )
        self._credentials: Credentials | None = None
        self._server: Server | None = None
        self._served: tuple[str, Credentials] | None = None  # Address and credentials of the server.
        self._address = self._link_address = ""

    async def run(self) -> str:
        if self._token is None:
            _log.warning("insecure: links are neither encrypted nor authenticated")
        if self._token is None or not self._settings.discover:
            _log.info("joining the coordinator at %s", " or ".join((self._settings.join, *self._settings.standbys)))
            return await self._run()
        advice = "start `llamaclust up --discover` in the same network, or start this worker with --join HOST:PORT"
        _log.info("looking for the coordinator of the token's cluster by multicast DNS; %s", advice)
        return await _watched(self._run(), self._browse(self._token))

    async def _browse(self, token: JoinToken) -> WorkerError:
        """Looks for the coordinator of the token's cluster. Starts again if the file gets another cluster's token."""
        from llamaclust.wire.discovery import browsing

        while True:
            ca_hash = token.ca_hash
            async with browsing(cluster_id(ca_hash), self._search.add, self._tell_of_another):
                while token.ca_hash == ca_hash:
                    await asyncio.sleep(_TOKEN_LOOK_S)
                    with contextlib.suppress(UsageError, OSError):
                        token = await asyncio.to_thread(self._read_token, token)

    def _read_token(self, last: JoinToken) -> JoinToken:
        given = self._settings.token_file
        return JoinToken.read(given) if given is not None and given.is_file() else last

    async def _run(self) -> str:
        while True:
            try:
                reason = await self._run_cluster()
                self._worker.terms.end()
            except DeviceLostError:
                raise
            except WorkerError as error:  # The coordinator has not returned in time.
                if not self._settings.stays:
                    raise
                reason = str(error)
                self._worker.terms.give_up()
            if not self._settings.stays:
                return reason
            _log.info("%s; this worker waits for the next cluster", reason)
            await self._worker.service.free()
            self._search.begin_anew()
            release_freed_memory()

    async def _run_cluster(self) -> str:
        while True:
            compute = self._worker.compute
            # Raises DeviceLostError if a step of the last membership hangs.
            await compute.run_until_device_lost(compute.idle(_STEP_S))
            place, reached = await self._search.reached(self._reach)
            try:
                return await self._run_membership(place.address, reached)
            except DeviceLostError:
                raise
            except LlamaclustError as error:
                self._search.failed(place, await self._explained(place.address, error))

    def _tell_of_another(self, name: str) -> None:
        if self._search.limit_s is None:
            what = "cluster %s is announced in this network, but this worker lacks its token"
            _log.warning(f"{what}; copy the token file that its `llamaclust up` names", name)

    async def _explained(self, address: str, error: LlamaclustError) -> LlamaclustError:
        if self._token is None and self._search.limit_s is None and await speaks_tls(*split_address(address)):
            advice = "start the worker with --token-file instead of --insecure"
            return UsageError(f"the coordinator at {address} requires TLS: {advice}")
        return error

    async def _reach(self, address: str) -> _Reached:
        host, port = split_address(address)
        route = await Route.to(host, port)  # Resolves the name first, so that an unknown name is reported.
        if self._token is None:
            if self._settings.standbys and not await is_open(host, port, _OPEN_S):
                raise WorkerError(f"{address} cannot be reached")
            return _Reached(address, Insecure())
        self._token = self._read_token(self._token)  # The file may contain a new token.
        enrolled = await enrol(host, port, self._token, self._settings.name)
        reached, service_port = enrolled.reached  # One name may have the addresses of a coordinator and its standby.
        target = joined_address(route.host if is_link_local(reached) else reached, service_port)
        return _Reached(target, enrolled.identity)

    async def _run_membership(self, address: str, reached: _Reached) -> str:
        credentials = self._adopted(reached.credentials)
        own = await OwnAddress.find(self._settings, reached.target)
        await self._listen(own, credentials)
        peer = Peer(reached.target, credentials, COORDINATOR, _COORDINATOR_S)
        member = Member(self._worker, credentials)
        try:
            await member.join(peer, self._registration(), self._settings.join_s, wait_for_ready=False)
            self._search.admitted(address, member.coordinator_s)
            links = self._link_address or "no port"
            _log.info(
                "worker %s is a member, its stages are served at %s, links of groups at %s",
                self._settings.name,
                self._address,
                links,
            )
            return await self._worker.compute.run_until_device_lost(_watched(member.serve(), own.changed()))
        finally:
            self._worker.service.keep()
            await peer.close()

    def _adopted(self, new: Identity | Insecure) -> Credentials:
        held = self._credentials
        if isinstance(held, Identity) and isinstance(new, Identity) and held.ca == new.ca:
            held.pair = new.pair
            return held
        self._credentials = new
        return new

    async def _listen(self, own: OwnAddress, credentials: Credentials) -> None:
        if self._server is None or self._served != (own.listen, credentials):
            await self._stop_server()
            with short_slices():  # gRPC's threads inherit the short time slices.
                self._server = await Server.start(own.listen, credentials, self._worker.handlers)
            self._served = own.listen, credentials
        self._address = own.at_port(self._server.port)
        links = self._worker.links
        await self._worker.accept_links(own.listen, self._settings.link_port, credentials)
        self._link_address = own.at_link_port(split_address(links.address)[1]) if links.address else ""

    def _registration(self) -> Register:
        kept = self._worker.service.kept_bytes
        now = self._worker.device.registration(self._settings.name, self._address, self._link_address)
        free, machine = now.free_memory_bytes + kept["cpu"], now.machine_free_bytes + kept["cpu"]
        gpus = tuple(replace(gpu, free_bytes=gpu.free_bytes + kept[gpu.device]) for gpu in now.gpus)
        here = one_line(log_place())
        return replace(now, free_memory_bytes=free, machine_free_bytes=machine, gpus=gpus, log=here)

    async def close(self) -> None:
        self._worker.compute.close()
        await self._stop_server()
        await self._worker.links.stop()

    async def _stop_server(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            with contextlib.suppress(DeadlineError):
                async with deadline("closing streams", _GRACE_S):
                    await server.stop(0.0)


async def _watched(running: Coroutine[Any, Any, str], watch: Coroutine[Any, Any, WorkerError]) -> str:
    """Runs both coroutines until one ends, and cancels the other. Raises the error that `watch` returns or raises."""
    serving, watching = asyncio.create_task(running), asyncio.create_task(watch)
    try:
        await asyncio.wait((serving, watching), return_when=asyncio.FIRST_COMPLETED)
        if watching.done() and not serving.done():
            raise watching.result()
        return await serving
    finally:
        for task in (serving, watching):
            task.cancel()
        # Waits until serving has ended, before weights are kept.
        await asyncio.gather(serving, watching, return_exceptions=True)
