"""Tests of changed addresses of this machine and its coordinator: a membership ends completely before the next one
begins. Tests of names that are not found or have only link-local addresses, and of another cluster's token."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import pytest

from llamaclust.cluster.membership.authority import Authority
from llamaclust.cluster.membership.enrolment import EnrolmentServer
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.scheduler.settings import EngineSettings
from llamaclust.core.addresses import split_address
from llamaclust.core.errors import DeviceLostError, WorkerError
from llamaclust.wire import discovery
from llamaclust.wire.control.messages import Shutdown
from llamaclust.wire.rpc.client import Peer, StreamBrokenError
from llamaclust.wire.rpc.methods import SAMPLE
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.wire.security.credentials import Insecure
from llamaclust.worker import static
from llamaclust.worker.membership import Member
from llamaclust.worker.own_address import Route
from llamaclust.worker.settings import WorkerSettings
from llamaclust.worker.static import _StaticWorker, _watched, run_static_worker
from support.clusters.members import registry
from support.clusters.served import until
from support.network.loopback import free_port
from support.wire.trust import authority


class _Parts:
    """A member whose service takes some turns of the event loop to end, and whose address may change."""

    def __init__(self, turns: int, ends: WorkerError | str, changes: WorkerError | None) -> None:
        self.turns = turns
        self.ends = ends
        self.changes = changes
        self.is_serving = self.is_watching = True

    async def serve(self) -> str:
        try:
            if self.changes is not None:
                await asyncio.Event().wait()
            if isinstance(self.ends, WorkerError):
                raise self.ends
            return self.ends
        finally:
            for _ in range(self.turns):
                await asyncio.sleep(0)
            self.is_serving = False

    async def changed(self) -> WorkerError:
        try:
            if self.changes is None:
                await asyncio.Event().wait()
            return self.changes or WorkerError("never")
        finally:
            for _ in range(self.turns):
                await asyncio.sleep(0)
            self.is_watching = False


@pytest.mark.parametrize("turns", [0, 1, 5])
@pytest.mark.parametrize(
    ("ends", "changes"),
    [("stopped", None), (WorkerError("it is lost"), None), ("stopped", WorkerError("this machine's address is new"))],
    ids=["end", "loss", "change"],
)
async def test_nothing_of_a_membership_runs_on(
    turns: int, ends: WorkerError | str, changes: WorkerError | None
) -> None:
    parts: Any = _Parts(turns, ends, changes)
    error = changes or ends
    async with asyncio.timeout(60):
        if isinstance(error, WorkerError):
            with pytest.raises(WorkerError, match=str(error)):
                await _watched(parts.serve(), parts.changed())
        else:
            assert await _watched(parts.serve(), parts.changed()) == ends
    assert not parts.is_serving and not parts.is_watching


LINK = (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("fe80::7%eth0", 7100, 0, 2))
UNIQUE = (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("fd00::7", 7100, 0, 0))
IPV4 = (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("192.168.1.7", 7100))


def resolve_to(monkeypatch: pytest.MonkeyPatch, *found: Any) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: list(found))


@pytest.mark.parametrize(
    ("found", "host"),
    [((LINK, UNIQUE, IPV4), "fd00::7"), ((LINK, IPV4), "192.168.1.7"), ((IPV4, LINK), "192.168.1.7")],
)
async def test_an_address_that_other_machines_can_use_is_chosen(
    monkeypatch: pytest.MonkeyPatch, found: Any, host: str
) -> None:
    resolve_to(monkeypatch, *found)
    assert (await Route.to("laptop.local", 7100)).host == host


async def test_a_name_with_addresses_of_one_link_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, LINK, LINK)
    with pytest.raises(WorkerError, match=r"laptop\.local has only link-local addresses, .*; give a host name"):
        await Route.to("laptop.local", 7100)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (socket.EAI_NONAME, "Name or service not known"),
        (socket.EAI_AGAIN, "Temporary failure in name resolution"),
        (socket.EAI_FAIL, "Non-recoverable failure in name resolution"),
    ],
)
async def test_a_name_that_is_not_found(monkeypatch: pytest.MonkeyPatch, code: int, reason: str) -> None:
    def fail(*given: object, **more: object) -> None:
        raise socket.gaierror(code, reason)

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(WorkerError, match=f"^laptopp is not found: {reason}; check the name, or give an address"):
        await Route.to("laptopp", 7100)


def test_a_step_that_outlives_a_membership_may_take_as_long_as_within_it() -> None:
    assert EngineSettings().result_s <= static._STEP_S


async def test_a_step_that_outlives_a_membership_and_its_own_limit_ends_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llamaclust.worker.stage.compute._WATCH_S", 0.005)
    worker, go_on = _StaticWorker(WorkerSettings(name="a", join="127.0.0.1:9", threads=1)), threading.Event()
    hanging = worker._worker.compute.queue(lambda: go_on.wait(60), limit_s=0.05)
    with pytest.raises(DeviceLostError, match="the GPU hangs"):
        await worker.run()
    go_on.set()
    await hanging
    await worker.close()


@pytest.mark.parametrize("turns", [0, 1, 5])
@pytest.mark.parametrize(
    "end", [Shutdown("stopped"), WorkerError("it is lost"), None], ids=["end", "loss", "cancelled"]
)
async def test_tasks_of_a_membership_end_with_it(turns: int, end: Shutdown | WorkerError | None) -> None:
    running = asyncio.Event()
    ended = False

    async def follow(*_: object) -> None:
        nonlocal ended
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            for _turn in range(turns):
                await asyncio.sleep(0)
            ended = True

    async def receive() -> Shutdown:
        await running.wait()
        if isinstance(end, Shutdown):
            return end
        if end is not None:
            raise end
        raise asyncio.CancelledError

    parts: Any = MagicMock()
    parts.readiness.follow = follow
    member = Member(parts, Insecure())
    async with asyncio.timeout(60):
        with patch.object(member, "_receive", receive), suppress(WorkerError, asyncio.CancelledError):
            assert await member.serve() == "stopped"
    assert ended and not len(member._tasks)


@asynccontextmanager
async def coordinator(trust: Authority, join: str, *, is_announced: bool) -> AsyncIterator[Registry]:
    """Admits workers that enrol at `join`, which it announces if `is_announced` is true."""
    async with registry(trust) as there:
        port = split_address(there.address)[1]
        async with EnrolmentServer(join, trust, trust.identity(), lambda name: None, port) as server:
            if not is_announced:
                yield there
                return
            async with discovery.announced("home", trust.cluster, server.address):
                yield there


@pytest.mark.parametrize("discovers", [False, True], ids=["join", "discover"])
async def test_a_worker_that_stays_joins_another_cluster_with_its_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, discovers: bool
) -> None:
    """The file's new token names another CA, so the worker's certificates and its server's are replaced."""
    monkeypatch.setattr(discovery, "own_addresses", lambda: ["127.0.0.1"])
    first, second = authority(tmp_path, "first"), authority(tmp_path, "second")
    join, file = f"127.0.0.1:{free_port()}", tmp_path / "token"
    file.touch(0o600)
    file.write_text(first.token.text)
    known = "" if discovers else join
    settings = WorkerSettings(
        name="a", join=known, discover=discovers, token_file=file, static=True, stays=True, threads=1
    )
    working = asyncio.create_task(run_static_worker(settings))
    async with coordinator(first, join, is_announced=discovers) as there:
        await until(lambda: "a" in there.workers)
    file.write_text(second.token.text)
    async with coordinator(second, "127.0.0.1:0" if discovers else join, is_announced=discovers) as there:
        await until(lambda: "a" in there.workers)
        peer = Peer(there.workers["a"].registration.address, second.identity(), Principal("a"))
        with pytest.raises(StreamBrokenError, match="worker a holds no stage"):
            await peer.open(SAMPLE, epoch=1).opened()
        await peer.close()
    working.cancel()
    await asyncio.wait([working])
