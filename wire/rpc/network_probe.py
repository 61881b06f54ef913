"""Measures a network round trip as the time until the kernel at the other end accepts a connection."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from time import perf_counter
from typing import Any

from llamaclust.core.addresses import split_address
from llamaclust.core.errors import DeadlineError
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.unix_streams import PREFIX

_CONNECTIONS = 8
_CONNECT_S = 2.0
_MOST_S = 4.0
"""The time limit for the whole measurement, in seconds. It includes name resolution."""


async def network_round_trip(address: str) -> float | None:
    """Returns the shortest time in seconds of several connections to HOST:PORT or unix:PATH, or None if all fail."""
    if not address:
        return None
    try:
        async with deadline(f"a round trip to {address}", _MOST_S):
            family, place = await asyncio.to_thread(_resolved, address)
            return await asyncio.to_thread(_shortest, family, place)
    except (OSError, DeadlineError):
        return None


def _resolved(address: str) -> tuple[int, Any]:
    if address.startswith(PREFIX):
        return socket.AF_UNIX, address.removeprefix(PREFIX)
    family, _, _, _, place = socket.getaddrinfo(*split_address(address), type=socket.SOCK_STREAM)[0]
    return family, place


def _shortest(family: int, place: Any) -> float | None:
    shortest_s, ends = None, perf_counter() + _CONNECT_S
    with suppress(OSError):
        for _ in range(_CONNECTIONS):
            if (left_s := ends - perf_counter()) <= 0:
                break
            seconds = _connecting_s(family, place, left_s)
            shortest_s = seconds if shortest_s is None else min(seconds, shortest_s)
    return shortest_s


def _connecting_s(family: int, place: Any, most_s: float) -> float:
    with socket.socket(family) as connection:
        connection.settimeout(most_s)
        begun = perf_counter()
        connection.connect(place)
        return perf_counter() - begun
