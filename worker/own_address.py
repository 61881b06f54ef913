"""The address at which a worker serves its stages. Each membership determines the address and watches for changes."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass

from llamaclust.core.addresses import ANYWHERE, LASTING, is_link_local, joined_address, split_address
from llamaclust.core.errors import WorkerError
from llamaclust.core.interfaces import source_host
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.worker.settings import WorkerSettings

_RESOLVE_S = 10.0
_LOOK_S = 1.0
_LOOKS = 3
"""Number of consecutive checks that must find the same new address. Interfaces change while a machine wakes up."""


@dataclass(frozen=True, slots=True)
class Route:
    host: str  # IP address of the coordinator.
    family: socket.AddressFamily
    port: int

    @classmethod
    async def to(cls, host: str, port: int) -> Route:
        loop = asyncio.get_running_loop()
        try:
            async with deadline(f"looking up {host}", _RESOLVE_S):
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        except OSError as error:
            reason = error.strerror or error
            raise WorkerError(f"{host} is not found: {reason}; check the name, or give an address instead") from error
        lasting = [(str(address[0]), family) for family, *_, address in found if not is_link_local(str(address[0]))]
        if not lasting:
            raise WorkerError(f"{host} has only link-local addresses, which other machines cannot use; {LASTING}")
        return cls(*lasting[0], port)

    def own_host(self) -> str:
        host = source_host(self.host, self.family, self.port)
        if host is None:
            raise WorkerError(f"{self.host} cannot be reached: this machine has no route to it")
        return host


@dataclass(frozen=True, slots=True)
class OwnAddress:
    listen: str
    advertised: str  # "HOST" or "HOST:PORT".
    route: Route
    # This machine's address on `route`, or None if neither `listen` nor `advertised` depends on it.
    own_host: str | None

    @classmethod
    async def find(cls, settings: WorkerSettings, coordinator: str) -> OwnAddress:
        route = await Route.to(*split_address(coordinator))
        own_host = route.own_host()
        own = joined_address(own_host, 0)
        is_own = not settings.listen or split_address(settings.listen)[0] in ANYWHERE
        advertised = settings.advertise or _host_of(own if is_own else settings.listen)
        decides = not settings.listen or (is_own and not settings.advertise)
        return cls(settings.listen or own, advertised, route, own_host if decides else None)

    def at_port(self, port: int) -> str:
        has_port = ":" in self.advertised.rpartition("]")[2]
        address = self.advertised if has_port else f"{self.advertised}:{port}"
        split_address(address)
        return address

    def at_link_port(self, port: int) -> str:
        """Returns the advertised HOST:PORT for group links. A NAT gateway must forward `port` unchanged."""
        return f"{_host_of(self.at_port(port))}:{port}"

    async def changed(self) -> WorkerError:
        """Waits for a lasting change of this machine's address, and returns an error that names both addresses."""
        now, looks = self.own_host, 0
        while True:
            await asyncio.sleep(_LOOK_S)
            before, now = now, self._host_now()
            looks = looks + 1 if now == before else 1
            if now != self.own_host and looks >= _LOOKS:
                return WorkerError(f"this machine's address changed from {self.own_host} to {now}")

    def _host_now(self) -> str | None:
        found = source_host(self.route.host, self.route.family, self.route.port)
        return self.own_host if self.own_host is None or found is None else found


def _host_of(address: str) -> str:
    return address.rpartition(":")[0]
