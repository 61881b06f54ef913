"""Coordinators found without an address: by multicast DNS and service discovery (RFC 6762, RFC 6763).

A coordinator announces its enrolment port with its cluster's id, which is part of every join token's CA hash. What is
found is only an address to try: enrolment verifies the coordinator, so that a false announcement costs a connection.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv4Address

from zeroconf import Error, InterfaceChoice, IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from llamaclust.core.addresses import ANYWHERE, is_loopback, joined_address, split_address
from llamaclust.core.errors import DeadlineError, UsageError
from llamaclust.core.this_machine import own_addresses
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.task_set import TaskSet

_log = logging.getLogger(__name__)

SERVICE = "_llamaclust._tcp.local."
_CLUSTER = "cluster"
_ANSWER_MS = 3000
_MOST_NAME = 40
_MOST_LOOK_UPS = 16
_MOST_ADDRESSES = 32
_BEGIN_S = 10.0
_END_S = 5.0


@asynccontextmanager
async def announced(name: str, cluster: str, address: str) -> AsyncIterator[None]:
    """While it lasts, machines of the local network find the cluster of this name and id at `address` (HOST:PORT).

    UsageError where the host is no IPv4 address, or multicast is not possible.
    """
    hosts, port = _announced_hosts(address), split_address(address)[1]
    info = AsyncServiceInfo(
        SERVICE,
        f"{name[:_MOST_NAME]}-{cluster}.{SERVICE}",
        port=port,
        addresses=[IPv4Address(host).packed for host in hosts],
        properties={_CLUSTER: cluster},
        server=f"llamaclust-{cluster}-{port}.local.",
    )
    async with _multicast(hosts) as service:
        async with deadline("the announcement by multicast DNS", _BEGIN_S):
            await (await service.async_register_service(info, allow_name_change=True))
        yield


@asynccontextmanager
async def browsing(cluster: str, found: Callable[[str], None]) -> AsyncIterator[None]:
    """While it lasts, `found` is called with the addresses (HOST:PORT) at which a cluster of this id is announced.

    UsageError where multicast is not possible.
    """
    async with _multicast(own_addresses()) as service:
        browser = _Browser(service.zeroconf, cluster, found)
        listening = AsyncServiceBrowser(service.zeroconf, [SERVICE], handlers=[browser.changed])
        try:
            yield
        finally:
            async with _ending():
                await browser.close()
                await listening.async_cancel()


class _Browser:
    """Looks up what is announced by names with the cluster's id: other clusters may be many. Of a flood of names with
    it, those beyond a few at once are left out."""

    def __init__(self, zeroconf: Zeroconf, cluster: str, found: Callable[[str], None]) -> None:
        self._zeroconf = zeroconf
        self._cluster = cluster
        self._found = found
        self._look_ups = TaskSet()

    def changed(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        """A handler of zeroconf, which passes its arguments by these names."""
        del zeroconf
        is_there = state_change is not ServiceStateChange.Removed and self._cluster in name
        if is_there and len(self._look_ups) < _MOST_LOOK_UPS:
            self._look_ups.start(self._look_up(service_type, name))

    async def _look_up(self, service_type: str, name: str) -> None:
        with contextlib.suppress(Error):  # also for a name of another type
            info = AsyncServiceInfo(service_type, name)
            if await info.async_request(self._zeroconf, _ANSWER_MS):
                self._answered(info)

    def _answered(self, info: AsyncServiceInfo) -> None:
        if info.properties.get(_CLUSTER.encode()) != self._cluster.encode() or not info.port:
            return
        for host in info.parsed_addresses(IPVersion.V4Only)[:_MOST_ADDRESSES]:
            self._found(joined_address(host, info.port))

    async def close(self) -> None:
        await self._look_ups.close()


def _announced_hosts(address: str) -> list[str]:
    host, _ = split_address(address)
    if host in ANYWHERE:
        here = own_addresses()
        return [each for each in here if not is_loopback(each)] or here
    try:
        return [str(IPv4Address(socket.gethostbyname(host) if host == "localhost" else host))]
    except ValueError:
        why = f"an IPv4 address is needed for multicast DNS, and {host} is none"
        raise UsageError(f"join.discover: {why}; set join.listen to 0.0.0.0:PORT or to an address") from None


@asynccontextmanager
async def _multicast(hosts: list[str]) -> AsyncIterator[AsyncZeroconf]:
    """Over the interfaces with these addresses."""
    try:
        service = AsyncZeroconf(interfaces=hosts or InterfaceChoice.Default, ip_version=IPVersion.V4Only)
    except OSError as error:
        why = f"multicast DNS is not possible at {', '.join(hosts)}: {error.strerror or error}"
        raise UsageError(f"{why}; start workers with --join HOST:PORT instead of --discover") from error
    try:
        yield service
    finally:
        async with _ending():
            await service.async_close()


@asynccontextmanager
async def _ending() -> AsyncIterator[None]:
    """What does not end in time is left to the end of the process."""
    try:
        async with deadline("the end of multicast DNS", _END_S):
            yield
    except DeadlineError as error:
        _log.warning("%s", error)
