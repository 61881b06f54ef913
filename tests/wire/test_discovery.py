"""Tests of a coordinator's announcements by multicast DNS, over loopback."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from ipaddress import IPv4Address
from types import SimpleNamespace
from typing import Any

import pytest
from zeroconf import IPVersion, ServiceStateChange
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from llamaclust.core.errors import UsageError
from llamaclust.wire import discovery
from llamaclust.wire.discovery import SERVICE, announced, browsing
from llamaclust.wire.rpc.deadlines import deadline

CLUSTER = "0123456789abcdef"
WITHIN_S = 20.0


class Found:
    """Collects addresses in order."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self._more = asyncio.Event()

    def __call__(self, address: str) -> None:
        self.addresses.append(address)
        self._more.set()

    async def until(self, address: str) -> None:
        async with deadline(f"an announcement of {address}", WITHIN_S):
            while address not in self.addresses:
                self._more.clear()
                await self._more.wait()


@pytest.fixture(autouse=True)
def _on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("network_addresses", "own_addresses"):
        monkeypatch.setattr(discovery, name, lambda: ["127.0.0.1"])


@asynccontextmanager
async def announced_by_another(
    name: str, port: int, properties: dict[str, str], hosts: Sequence[str] = ("127.0.0.1",)
) -> AsyncIterator[None]:
    """Announces a service with any properties, as a hostile program may."""
    service = AsyncZeroconf(interfaces=["127.0.0.1"], ip_version=IPVersion.V4Only)
    packed = [IPv4Address(host).packed for host in hosts]
    info = AsyncServiceInfo(SERVICE, f"{name}.{SERVICE}", port=port, addresses=packed, properties=properties)
    try:
        await (await service.async_register_service(info))
        yield
    finally:
        await service.async_close()


async def test_a_cluster_is_found_before_and_after_it_is_announced() -> None:
    early, late = Found(), Found()
    async with browsing(CLUSTER, early, Found()), announced("tiny", CLUSTER, "0.0.0.0:7100"):
        await early.until("127.0.0.1:7100")
        async with browsing(CLUSTER, late, Found()):
            await late.until("127.0.0.1:7100")


async def test_clusters_with_the_same_id_are_all_found() -> None:
    """The two are a coordinator and the standby that took over, or two clusters with the same id by mistake."""
    found = Found()
    async with (
        announced("tiny", CLUSTER, "127.0.0.1:7100"),
        announced("tiny", CLUSTER, "127.0.0.1:7200"),
        browsing(CLUSTER, found, Found()),
    ):
        await found.until("127.0.0.1:7100")
        await found.until("127.0.0.1:7200")


async def test_other_clusters_and_strange_announcements_are_left_out() -> None:
    found = Found()
    async with (
        announced("other", CLUSTER[::-1], "127.0.0.1:7101"),
        announced_by_another(f"no id {CLUSTER}", 7102, {}),
        announced_by_another(f"no port {CLUSTER}", 0, {"cluster": CLUSTER}),
        announced_by_another(f"another id {CLUSTER}", 7103, {"cluster": CLUSTER.upper()}),
        browsing(CLUSTER, found, Found()),
        announced("tiny", CLUSTER, "127.0.0.1:7100"),
    ):
        await found.until("127.0.0.1:7100")
    assert found.addresses == ["127.0.0.1:7100"]


@asynccontextmanager
async def browser(
    found: Found, other: Callable[[str], None] = lambda name: None
) -> AsyncIterator[Callable[[str], None]]:
    """Yields the function that handles a new service, given the service's name."""
    async with discovery._multicast(["127.0.0.1"]) as service:
        browser = discovery._Browser(service.zeroconf, CLUSTER, found, other)
        try:
            yield lambda name: browser.changed(service.zeroconf, SERVICE, name, ServiceStateChange.Added)
        finally:
            await browser.close()


async def test_names_of_other_types_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    found = Found()
    with caplog.at_level(logging.WARNING):
        async with announced("tiny", CLUSTER, "127.0.0.1:7100"), browser(found) as changed:
            for name in ("evil.example.", f"{CLUSTER}._other._tcp.local.", CLUSTER, f"{CLUSTER}.local."):
                changed(name)
            changed(f"tiny-{CLUSTER}.{SERVICE}")
            await found.until("127.0.0.1:7100")
    assert not caplog.records


async def test_a_cluster_is_found_among_many_others() -> None:
    found = Found()
    async with announced("tiny", CLUSTER, "127.0.0.1:7100"), browser(found) as changed:
        for number in range(4 * discovery._MOST_LOOK_UPS):
            changed(f"other-{number}-{CLUSTER[::-1]}.{SERVICE}")
        changed(f"tiny-{CLUSTER}.{SERVICE}")
        await found.until("127.0.0.1:7100")


async def test_all_addresses_of_a_machine_with_many_networks_are_found() -> None:
    found, hosts = Found(), [f"10.0.{number}.1" for number in range(24)]
    async with (
        announced_by_another(f"tiny-{CLUSTER}", 7100, {"cluster": CLUSTER}, hosts),
        browsing(CLUSTER, found, Found()),
    ):
        for host in hosts:
            await found.until(f"{host}:7100")


@pytest.mark.parametrize("hanging", [(AsyncZeroconf, "async_close"), (AsyncServiceBrowser, "async_cancel")])
async def test_the_end_does_not_wait_for_ever(
    hanging: tuple[type, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kind, name = hanging
    end = getattr(kind, name)

    async def hang(service: object) -> None:
        await end(service)
        await asyncio.Event().wait()

    monkeypatch.setattr(kind, name, hang)
    monkeypatch.setattr(discovery, "_END_S", 2.0)
    async with asyncio.timeout(WITHIN_S):
        with pytest.raises(UsageError, match="why it ends"):
            async with browsing(CLUSTER, Found(), Found()):
                raise UsageError("why it ends")
    assert caplog.messages == ["stopping multicast DNS took longer than 2 s"]


@pytest.mark.parametrize("address", ["coordinator.example:7100", "[::1]:7100"])
async def test_an_address_that_cannot_be_announced_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match=r"join\.discover: multicast DNS needs an address with multicast"):
        async with announced("tiny", CLUSTER, address):
            pass


async def test_where_multicast_is_not_possible_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> AsyncZeroconf:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(discovery, "AsyncZeroconf", refuse)
    with pytest.raises(UsageError, match="Network is unreachable; start workers with --join HOST:PORT"):
        async with browsing(CLUSTER, Found(), Found()):
            pass


async def test_clusters_of_other_tokens_are_named_once_and_not_without_end() -> None:
    found, others = Found(), list[str]()
    foreign = CLUSTER[::-1]
    async with browser(found, others.append) as changed:
        for name in ("home", "home", "qwen3-8b", "a.b_c", "home"):
            changed(f"{name}-{foreign}.{SERVICE}")
        changed(f"\N{ESCAPE}[31mred-{foreign}.{SERVICE}")
        changed(f"no-id.{SERVICE}")
        assert others == ["home", "qwen3-8b", "a.b_c"]
        for number in range(100):
            changed(f"flood-{number}-{foreign}.{SERVICE}")
    assert len(others) == discovery._MOST_OTHERS
    assert found.addresses == []


@pytest.mark.parametrize("error", [OSError("too many open files"), RuntimeError("no adapters"), OSError(12, "memory")])
async def test_addresses_that_cannot_be_read_for_once_are_read_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(discovery, "_LOOK_S", 0.001)
    answers: list[list[str] | Exception] = [["10.0.0.1"], error, ["10.0.0.1"], ["10.0.0.2"]]
    changed, used = asyncio.Event(), list[list[str]]()

    def hosts() -> list[str]:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def update(hosts: list[str], version: IPVersion) -> None:
        used.append(hosts)
        changed.set()

    service: Any = SimpleNamespace(zeroconf=SimpleNamespace(async_update_interfaces=update))
    async with deadline("other addresses", WITHIN_S), discovery._following(service, hosts):
        await changed.wait()
    assert used == [["10.0.0.2"]] and str(error) in caplog.text
