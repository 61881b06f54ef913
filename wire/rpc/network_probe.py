"""The round trip of the network to another process, without the programs at both ends: what a connection takes to be
accepted, which kernels do among themselves."""

from __future__ import annotations

import asyncio
import socket
from time import perf_counter
from typing import Any

from llamaclust.core.addresses import split_address
from llamaclust.wire.rpc.unix_streams import PREFIX

_CONNECTIONS = 8
_CONNECT_S = 2.0


async def network_round_trip(address: str) -> float | None:
    """The shortest of some connections to HOST:PORT or unix:PATH, in seconds; None where none is accepted."""
    return await asyncio.to_thread(_shortest, address) if address else None


def _shortest(address: str) -> float | None:
    """Ends with the first that is not accepted: where packets are dropped, each takes long."""
    shortest_s = None
    for _ in range(_CONNECTIONS):
        if (seconds := _connected(address)) is None:
            break
        shortest_s = seconds if shortest_s is None else min(seconds, shortest_s)
    return shortest_s


def _connected(address: str) -> float | None:
    try:
        if address.startswith(PREFIX):
            return _connecting_s(socket.AF_UNIX, address.removeprefix(PREFIX))
        family, _, _, _, place = socket.getaddrinfo(*split_address(address), type=socket.SOCK_STREAM)[0]
        return _connecting_s(family, place)
    except OSError:
        return None


def _connecting_s(family: int, place: Any) -> float:
    with socket.socket(family) as connection:
        connection.settimeout(_CONNECT_S)
        begun = perf_counter()
        connection.connect(place)
        return perf_counter() - begun
