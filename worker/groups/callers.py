"""Counts a listener's callers by host, so that a host with many connections does not block other hosts."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

from llamaclust.core.addresses import bounded_host

_Connection = TypeVar("_Connection")


def caller_of(connection: socket.socket) -> str:
    if connection.family == socket.AF_UNIX:
        return ""
    return bounded_host(connection.getpeername()[0])


def of_the_most(hosts: Mapping[_Connection, str]) -> list[_Connection]:
    counts = Counter(hosts.values())
    most = max(counts.values())
    return [connection for connection, host in hosts.items() if counts[host] == most]
