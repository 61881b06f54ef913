"""Listening TCP sockets for one address or for all addresses."""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack

from llamaclust.core.addresses import ANYWHERE
from llamaclust.core.errors import LlamaclustError, UsageError

BACKLOG = 128
_LATE = (errno.EADDRNOTAVAIL, socket.EAI_AGAIN)


def listening_socket(host: str, port: int) -> socket.socket:
    """Opens a non-blocking listening TCP socket. A wildcard host means all IPv4 and IPv6 addresses. Raises OSError."""
    is_anywhere = host in ANYWHERE and socket.has_dualstack_ipv6()
    places = socket.getaddrinfo("::" if is_anywhere else host, port, type=socket.SOCK_STREAM)
    family, _, _, _, place = min(places, key=lambda found: found[0] != socket.AF_INET)
    with ExitStack() as undo:
        # asyncio sets TCP_NODELAY only if the protocol is named here. Otherwise, parts of a reply would be delayed.
        opened = undo.enter_context(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not is_anywhere)
        opened.bind(place)
        opened.listen(BACKLOG)
        opened.setblocking(False)
        undo.pop_all()
    return opened


def listener(host: str, port: int, cure: str) -> socket.socket:
    """Opens a listening socket, or raises UsageError with the advice `cure`. Raises LlamaclustError instead if this
    machine does not have the address yet, but may get it, for example by DHCP."""
    try:
        return listening_socket(host, port)
    except OSError as error:
        kind = LlamaclustError if error.errno in _LATE else UsageError
        raise kind(f"cannot listen on {host} port {port}: {error.strerror}; {cure}") from error


def listening_host(opened: socket.socket) -> str:
    """Returns a host at which this machine reaches a listener, for example 0.0.0.0 for a listener on all addresses."""
    host = str(opened.getsockname()[0])
    takes_both = host == "::" and not opened.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    return ANYWHERE[0] if takes_both else host
