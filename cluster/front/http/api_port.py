"""The sockets of the API, and the certificate that it shows."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamaclust.cluster.front.http.tls_protocol import TlsProtocol
from llamaclust.core.addresses import joined_address
from llamaclust.wire.listening import listener, listening_host

if TYPE_CHECKING:
    from llamaclust.cluster.front.http.certificate import ServerCertificate

_CURE = "choose another with `--port N` or `listen:` (0: any free one)"


@dataclass(frozen=True, slots=True)
class ApiPort:
    """Where clients connect to."""

    listener: socket.socket
    certificate: ServerCertificate | None = None  # None: plain HTTP
    further: tuple[socket.socket, ...] = ()

    @property
    def listeners(self) -> list[socket.socket]:
        """Of all addresses."""
        return [self.listener, *self.further]

    @property
    def url(self) -> str:
        """Of the first address."""
        scheme = "http" if self.certificate is None else "https"
        return f"{scheme}://{joined_address(listening_host(self.listener), self.listener.getsockname()[1])}"

    def carrying(self, protocol: asyncio.Protocol) -> asyncio.Protocol:
        """What a new connection speaks to."""
        return protocol if self.certificate is None else TlsProtocol(protocol, self.certificate.context)


@contextmanager
def listening(addresses: Sequence[tuple[str, int]], certificate: ServerCertificate | None) -> Iterator[ApiPort]:
    """Takes the ports. UsageError where that is not possible."""
    with ExitStack() as sockets:
        first, *further = [sockets.enter_context(listener(*address, _CURE)) for address in addresses]
        yield ApiPort(first, certificate, tuple(further))
