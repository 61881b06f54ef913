"""Ports and addresses of the loopback interface for tests."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from functools import cache
from itertools import cycle
from pathlib import Path
from random import SystemRandom

_FIRST_PORT = 20_000  # Common programs, the workers of Ray (10002 to 19999) and llamaclust use lower ports.
_BLOCK_PORTS = 2000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL_START = 32768


def free_port(*offsets: int) -> int:
    """Returns a port that nothing uses. The ports at `offsets` above it are free as well. No connection takes the ports
    before the caller listens at them, because they are below the range from which the system takes ports of outgoing
    connections. If that range begins too low, the system chooses the port."""
    ports = _ports(os.environ.get("PYTEST_XDIST_WORKER", ""))
    while True:
        port = _any_port() if ports is None else next(ports)
        if all(_is_free(port + offset) for offset in (0, *offsets)):
            return port


@cache
def _ports(worker: str) -> Iterator[int] | None:
    """Returns an endless iterator over the ports of this process, or None if there is no room for a block of ports.

    Each process of pytest-xdist has a block of its own. The start within it is random, because two runs of the tests
    may take place at the same time. Only even ports of the block's lower half are used, because a cluster that is given
    a port may also listen at the next port, for members, and 1000 ports above it, for links of groups."""
    blocks = (_first_outgoing_port() - _FIRST_PORT) // _BLOCK_PORTS
    if blocks < 1:
        return None
    number = re.sub(r"\D", "", worker)
    block = 1 + int(number) if number else 0
    first = _FIRST_PORT + block % blocks * _BLOCK_PORTS
    ports = range(first, first + _BLOCK_PORTS // 2, 2)
    start = SystemRandom().randrange(len(ports))
    return cycle([*ports[start:], *ports[:start]])


def _first_outgoing_port() -> int:
    return int(_RANGE.read_text().split()[0]) if _RANGE.exists() else _USUAL_START


def _any_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", port))  # It fails if the port is taken at any address.
        except (OSError, OverflowError):
            return False
        return True


@cache
def has_ipv6_loopback() -> bool:
    """Returns whether this machine can listen at ::1. Many containers cannot."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
