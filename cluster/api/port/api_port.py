"""The sockets of the API, and the certificate that it shows."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamaclust.cluster.api.port.tls_protocol import TlsProtocol
from llamaclust.core.addresses import joined_address
from llamaclust.core.errors import UsageError

if TYPE_CHECKING:
    from llamaclust.cluster.api.port.certificate import ServerCertificate

_BACKLOG = 128


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
        host, port = self.listener.getsockname()[:2]
        scheme = "http" if self.certificate is None else "https"
        return f"{scheme}://{joined_address(host, port)}"

    def carrying(self, protocol: asyncio.Protocol) -> asyncio.Protocol:
        """What a new connection speaks to."""
        return protocol if self.certificate is None else TlsProtocol(protocol, self.certificate.context)


@contextmanager
def listening(addresses: Sequence[tuple[str, int]], certificate: ServerCertificate | None) -> Iterator[ApiPort]:
    """Takes the ports. UsageError where that is not possible."""
    with ExitStack() as sockets:
        first, *further = [sockets.enter_context(_listener(*address)) for address in addresses]
        yield ApiPort(first, certificate, tuple(further))


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with the protocol by name: only then asyncio sends each part of a reply at once (TCP_NODELAY)
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        what = f"cannot listen on {host} port {port}: {error.strerror}"
        raise UsageError(f"{what}; choose another with `--port N` or `listen:` (0: any free one)") from error
    listener.setblocking(False)
    return listener
