"""Tests that a running worker accepts group links at the address that it registers."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.membership.authority import Authority
from llamaclust.cluster.membership.enrolment import EnrolmentServer
from llamaclust.cluster.membership.join_rules import JoinSettings
from llamaclust.cluster.membership.registry import Registry
from llamaclust.core.addresses import split_address
from llamaclust.core.errors import UsageError
from llamaclust.wire.control.messages import Register
from llamaclust.wire.security.credentials import Insecure
from llamaclust.wire.security.token import ClusterToken
from llamaclust.worker import own_address
from llamaclust.worker import worker as workers
from llamaclust.worker.groups.listener import LINK_PORTS, link_address
from llamaclust.worker.main import _run_started_worker
from llamaclust.worker.own_address import OwnAddress
from llamaclust.worker.settings import WorkerSettings
from llamaclust.worker.static import run_static_worker
from llamaclust.worker.worker import Worker
from support.clusters.members import registry
from support.clusters.served import until
from support.network.loopback import free_port
from support.wire.group_links import needs_tls
from support.wire.trust import A

SETTINGS = WorkerSettings(name="a", static=True, threads=1)
HERE = "127.0.0.1:0"


@pytest.mark.parametrize(
    ("stages", "port", "expected"),
    [
        ("10.0.0.1:7102", None, "10.0.0.1:8102"),
        ("10.0.0.1:7102", 7105, "10.0.0.1:7105"),
        ("[fd00::1]:0", None, "[fd00::1]:0"),
        ("[fd00::1]:0", 7105, "[fd00::1]:7105"),
        ("host.name:64535", None, "host.name:65535"),
        ("host.name:64536", None, "host.name:0"),
        ("unix:/run/w0.sock", None, "unix:/run/w0.sock.l"),
        ("unix:/run/w0.sock", 7105, "unix:/run/w0.sock.l"),
    ],
)
def test_links_are_accepted_beside_the_port_of_stages(stages: str, port: int | None, expected: str) -> None:
    assert link_address(stages, port) == expected


@pytest.mark.parametrize(
    ("listen", "advertise", "expected"),
    [
        ("", "", "127.0.0.1:7"),
        ("0.0.0.0:7102", "", "127.0.0.1:7"),
        ("10.0.0.1:7102", "", "10.0.0.1:7"),
        ("10.0.0.1:7102", "out.side", "out.side:7"),
        ("10.0.0.1:7102", "out.side:99", "out.side:7"),
        ("10.0.0.1:7102", "[fd00::1]", "[fd00::1]:7"),
        ("10.0.0.1:7102", "[fd00::1]:99", "[fd00::1]:7"),
    ],
)
async def test_others_are_told_the_host_that_is_advertised(listen: str, advertise: str, expected: str) -> None:
    own = await OwnAddress.find(replace(SETTINGS, listen=listen, advertise=advertise), "127.0.0.1:7100")
    assert own.at_link_port(7) == expected


def joined(coordinator: Registry) -> Register:
    return coordinator.workers["a"].registration


@asynccontextmanager
async def insecure(listen: str = HERE) -> AsyncIterator[Registry]:
    async with Registry(listen, Insecure(), lambda name, silent_s: "", JoinSettings(5.0)) as coordinator:
        yield coordinator


@asynccontextmanager
async def enrolling(trust: Authority, coordinator: Registry) -> AsyncIterator[str]:
    """Serves enrolment and yields its address."""
    port = split_address(coordinator.address)[1]
    async with EnrolmentServer(HERE, trust, trust.identity(), lambda name: None, port) as server:
        yield server.address


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[asyncio.Task[str]]:
    worker = asyncio.create_task(run_static_worker(replace(SETTINGS, **settings)))
    try:
        yield worker
    finally:
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker


def accepts(address: str) -> bool:
    try:
        socket.create_connection(split_address(address), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def two_free_ports() -> tuple[int, int]:
    """Returns a port for stages, and the port for links that belongs to it."""
    port = free_port(LINK_PORTS)
    return port, port + LINK_PORTS


@pytest.mark.parametrize("listen", ["", HERE, "0.0.0.0:0", "localhost:0"])
async def test_any_free_port(listen: str) -> None:
    async with insecure() as coordinator:
        async with running(join=coordinator.address, listen=listen):
            await until(lambda: "a" in coordinator.workers)
            address = joined(coordinator).link_address
            host, port = split_address(address)
            assert host == split_address(joined(coordinator).address)[0] and port and accepts(address)
        await until(lambda: not accepts(address))


async def test_fixed_ports() -> None:
    async with insecure() as coordinator:
        stages, links = two_free_ports()
        async with running(join=coordinator.address, listen=f"127.0.0.1:{stages}"):
            await until(lambda: "a" in coordinator.workers)
            assert joined(coordinator).link_address == f"127.0.0.1:{links}" and accepts(f"127.0.0.1:{links}")
    async with insecure() as coordinator, running(join=coordinator.address, link_port=links):
        await until(lambda: "a" in coordinator.workers)
        assert joined(coordinator).link_address == f"127.0.0.1:{links}" and accepts(f"127.0.0.1:{links}")


@pytest.mark.parametrize("listen", ["", HERE, "localhost:0"])
async def test_a_worker_whose_own_link_port_is_in_use_ends_with_a_line(listen: str) -> None:
    """A stages port that is in use has the same effect."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with insecure() as coordinator:
            with pytest.raises(UsageError) as raised:
                await run_static_worker(replace(SETTINGS, join=coordinator.address, listen=listen, link_port=port))
            assert not coordinator.workers
    what = rf"links of groups cannot be accepted at \S+:{port}: Address already in use"
    assert re.fullmatch(rf"{what}; free the port, or choose another port with --link-port N", str(raised.value))


@pytest.mark.parametrize("memberships", [1, 2, 3])
async def test_another_port_stands_in_for_one_that_follows_from_that_of_stages(
    memberships: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The port is the same in all memberships, and is reported once."""
    stages, links = two_free_ports()
    found = list[str]()
    with socket.create_server(("127.0.0.1", links)):
        settings = replace(SETTINGS, listen=f"127.0.0.1:{stages}", stays=True)
        async with insecure() as first:
            address = first.address
            worker = asyncio.create_task(run_static_worker(replace(settings, join=address)))
            await until(lambda: "a" in first.workers)
            found.append(joined(first).link_address)
        for _ in range(memberships - 1):
            async with insecure(address) as coordinator:
                await until(lambda: "a" in coordinator.workers)
                found.append(joined(coordinator).link_address)
                assert accepts(found[0])
        worker.cancel()
        await asyncio.wait([worker])
    assert len({*found}) == 1 and found[0] != f"127.0.0.1:{links}"
    told = [text for text in caplog.messages if "in use" in text]
    instead = f"port {split_address(found[0])[1]} is used instead, which firewalls may close"
    assert told == [f"port {links} for links of groups is in use: {instead}; --link-port N chooses one"]


async def test_a_worker_that_joins_again_keeps_its_port() -> None:
    """The worker's coordinator ends, and another one starts at the same address."""
    found = []
    async with insecure() as first:
        address = first.address
        worker = asyncio.create_task(run_static_worker(replace(SETTINGS, join=address, stays=True)))
        await until(lambda: "a" in first.workers)
        found.append(joined(first).link_address)
    async with insecure(address) as second:
        await until(lambda: "a" in second.workers)
        found.append(joined(second).link_address)
        assert accepts(found[0])
    worker.cancel()
    await asyncio.wait([worker])
    assert found == [found[0]] * 2 and not accepts(found[0])


async def test_the_port_moves_with_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = ["127.0.0.1"]
    monkeypatch.setattr(own_address, "source_host", lambda *route: hosts[-1])
    monkeypatch.setattr(own_address, "_LOOK_S", 0.01)
    async with insecure() as coordinator, running(join=coordinator.address, stays=True):
        await until(lambda: "a" in coordinator.workers)
        before = joined(coordinator).link_address
        hosts.append("127.0.0.2")
        await until(lambda: "a" in coordinator.workers and joined(coordinator).address.startswith("127.0.0.2:"))
        now = joined(coordinator).link_address
        assert before.startswith("127.0.0.1:") and now.startswith("127.0.0.2:")
        assert accepts(now) and not accepts(before)


async def test_a_local_worker_has_a_socket_beside_that_of_its_stages(tmp_path: Path) -> None:
    token = ClusterToken.create()
    async with Registry(f"unix:{tmp_path}/c.sock", token, lambda name, silent_s: "", JoinSettings(5.0)) as coordinator:
        join, listen = coordinator.address, f"unix:{tmp_path}/w0.sock"
        settings = replace(SETTINGS, join=join, listen=listen, static=False, token=token.value)
        worker = asyncio.create_task(_run_started_worker(settings))
        await until(lambda: "a" in coordinator.workers)
        assert joined(coordinator).link_address == f"unix:{tmp_path}/w0.sock.l" and (tmp_path / "w0.sock.l").is_socket()
        worker.cancel()
        await asyncio.wait([worker])
    assert not (tmp_path / "w0.sock.l").exists()


@needs_tls
async def test_a_worker_with_a_certificate(trust: Authority) -> None:
    async with (
        registry(trust) as coordinator,
        enrolling(trust, coordinator) as join,
        running(join=join, token=trust.token.text),
    ):
        await until(lambda: "a" in coordinator.workers)
        assert accepts(joined(coordinator).link_address)


@pytest.mark.parametrize(
    ("kind", "library", "is_member"),
    [
        ("cpu", "OpenSSL 3.5", True),
        ("reference", "OpenSSL 3.5", True),
        ("cuda:0", "OpenSSL 3.5", True),
        ("cuda:0,cuda:1", "OpenSSL 3.5", True),
        ("cpu", "", False),
    ],
)
async def test_who_takes_part_in_groups(
    kind: str, library: str, is_member: bool, trust: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "tls_library", lambda: library)
    anything: Any = object()
    device: Any = SimpleNamespace(kind=kind)
    worker = Worker("a", device, anything, anything, anything)
    await worker.accept_links(HERE, None, trust.identity(A))
    assert bool(worker.links.address) == is_member
    await worker.links.stop()
