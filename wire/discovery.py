"""Announces and finds coordinators with multicast DNS and DNS service discovery (RFC 6762, RFC 6763)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address

from zeroconf import Error, IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from llamaclust.core.addresses import ANYWHERE, is_link_local, joined_address, split_address
from llamaclust.core.errors import DeadlineError, UsageError
from llamaclust.core.interfaces import network_addresses, own_addresses
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.task_set import TaskSet

_log = logging.getLogger(__name__)

SERVICE = "_llamaclust._tcp.local."
_CLUSTER = "cluster"
_ANSWER_MS = 3000
_MOST_NAME = 40
_MOST_LOOK_UPS = 16
_MOST_OTHERS = 8
_OTHER_NAME = re.compile(r"([a-z0-9_.-]{1,40})-[0-9a-f]{16}\b", re.ASCII)
_MOST_ADDRESSES = 32
_BEGIN_S = 10.0
_END_S = 5.0
_LOOK_S = 2.0
_NO_MULTICAST = "::1"
"""The IPv6 loopback address, on which multicast does not work."""


@asynccontextmanager
async def announced(name: str, cluster: str, address: str) -> AsyncIterator[None]:
    """Announces a cluster at `address` (HOST:PORT) by multicast DNS. Raises UsageError if multicast is impossible."""
    hosts, port = _announced_hosts(address), split_address(address)[1]

    def info() -> AsyncServiceInfo:
        return AsyncServiceInfo(
            SERVICE,
            f"{name[:_MOST_NAME]}-{cluster}.{SERVICE}",
            port=port,
            addresses=[ip_address(host).packed for host in hosts()],
            properties={_CLUSTER: cluster},
            server=f"llamaclust-{cluster}-{port}.local.",
        )

    async with _multicast(hosts()) as service:
        registered = info()
        async with deadline("the announcement by multicast DNS", _BEGIN_S):
            await (await service.async_register_service(registered, allow_name_change=True))

        async def renew() -> None:
            registered.addresses = info().addresses
            await (await service.async_update_service(registered))

        async with _following(service, hosts, renew):
            yield


@asynccontextmanager
async def browsing(cluster: str, found: Callable[[str], None], other: Callable[[str], None]) -> AsyncIterator[None]:
    """Calls `found` with each address (HOST:PORT) of `cluster`. Calls `other` with the name of each other cluster."""
    async with _multicast(_browsed()) as service:
        browser = _Browser(service.zeroconf, cluster, found, other)
        listening = AsyncServiceBrowser(service.zeroconf, [SERVICE], handlers=[browser.changed])
        try:
            async with _following(service, _browsed):
                yield
        finally:
            async with _ending():
                await browser.close()
                await listening.async_cancel()


class _Browser:
    """Looks up announced services whose names contain the cluster's id, at most 16 at a time."""

    def __init__(
        self, zeroconf: Zeroconf, cluster: str, found: Callable[[str], None], other: Callable[[str], None]
    ) -> None:
        self._zeroconf = zeroconf
        self._cluster = cluster
        self._found = found
        self._other = other
        self._others: set[str] = set()
        self._look_ups = TaskSet()

    def changed(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        """Handles a change that zeroconf reports. zeroconf passes the arguments by keyword."""
        del zeroconf
        if state_change is ServiceStateChange.Removed:
            return
        if self._cluster not in name:
            self._tell_of_another(name)
        elif len(self._look_ups) < _MOST_LOOK_UPS:
            self._look_ups.start(self._look_up(service_type, name))

    def _tell_of_another(self, name: str) -> None:
        match = _OTHER_NAME.match(name)
        if match is not None and match[1] not in self._others and len(self._others) < _MOST_OTHERS:
            self._others.add(match[1])
            self._other(match[1])

    async def _look_up(self, service_type: str, name: str) -> None:
        with contextlib.suppress(Error):  # zeroconf raises an Error for a name of another service type.
            info = AsyncServiceInfo(service_type, name)
            if await info.async_request(self._zeroconf, _ANSWER_MS):
                self._answered(info)

    def _answered(self, info: AsyncServiceInfo) -> None:
        if info.properties.get(_CLUSTER.encode()) != self._cluster.encode() or not info.port:
            return
        for host in info.parsed_scoped_addresses()[:_MOST_ADDRESSES]:
            if not is_link_local(host):
                self._found(joined_address(host, info.port))

    async def close(self) -> None:
        await self._look_ups.close()


def _announced() -> list[str]:
    return [host for host in network_addresses() if host != _NO_MULTICAST]


def _browsed() -> list[str]:
    """Returns this machine's addresses, including loopback. A local cluster may be announced on loopback only."""
    return [host for host in own_addresses() if host != _NO_MULTICAST]


def _announced_hosts(address: str) -> Callable[[], list[str]]:
    host, _ = split_address(address)
    if host in ANYWHERE:
        return _announced
    try:
        hosts = [str(ip_address("127.0.0.1" if host == "localhost" else host))]
        if hosts == [_NO_MULTICAST]:
            raise ValueError
    except ValueError:
        why = f"multicast DNS needs an address with multicast, and {host} has none"
        raise UsageError(f"join.discover: {why}; set join.listen to 0.0.0.0:PORT or another address") from None
    return lambda: hosts


@asynccontextmanager
async def _multicast(hosts: Sequence[str]) -> AsyncIterator[AsyncZeroconf]:
    try:
        service = AsyncZeroconf(interfaces=[*hosts], ip_version=_version(hosts))
    except (OSError, RuntimeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        why = f"multicast DNS is not possible at {', '.join(hosts)}: {reason}"
        raise UsageError(f"{why}; start workers with --join HOST:PORT instead of --discover") from error
    try:
        yield service
    finally:
        async with _ending():
            await service.async_close()


def _version(hosts: Sequence[str]) -> IPVersion:
    return IPVersion.All if any(":" in host for host in hosts) else IPVersion.V4Only


@asynccontextmanager
async def _following(
    service: AsyncZeroconf, hosts: Callable[[], list[str]], renew: Callable[[], Awaitable[None]] | None = None
) -> AsyncIterator[None]:
    """Runs multicast DNS on the addresses that `hosts` returns, and calls `renew` when these addresses change."""
    tasks = TaskSet()
    tasks.start(_follow(service, hosts, renew))
    try:
        yield
    finally:
        await tasks.close()


async def _follow(
    service: AsyncZeroconf, hosts: Callable[[], list[str]], renew: Callable[[], Awaitable[None]] | None
) -> None:
    known = hosts()
    while True:
        await asyncio.sleep(_LOOK_S)
        try:
            now = hosts()
            if not now or set(now) == set(known):
                continue
            async with deadline("multicast DNS at changed addresses", _BEGIN_S):
                await service.zeroconf.async_update_interfaces(now, _version(now))
                if renew is not None:
                    await renew()
        except (DeadlineError, Error, OSError, RuntimeError) as error:
            _log.warning("multicast DNS cannot use this machine's new addresses: %s; trying again", error)
            continue
        _log.info("multicast DNS is at %s", ", ".join(now))
        known = now


@asynccontextmanager
async def _ending() -> AsyncIterator[None]:
    try:
        async with deadline("stopping multicast DNS", _END_S):
            yield
    except DeadlineError as error:
        _log.warning("%s", error)
