"""Measures the round trip and throughput of streams between processes, with messages as large as hidden states."""

from __future__ import annotations

import asyncio
from statistics import median
from time import perf_counter

from llamaclust.wire.control.profiles import LinkProfile
from llamaclust.wire.rpc.cache_flush import CacheFlush
from llamaclust.wire.rpc.client import ClientStream, Peer
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.methods import ECHO, PROBE_BYTES
from llamaclust.wire.rpc.server import ServerStream

_SERVE_S = 60.0
_MEASURE_S = 20.0
_ANSWER = b"here"
PING_BYTES = 8192  # Approximate size of one token's hidden state.
_WARM_UP, _PINGS = 3, 12
_BETWEEN_S = 0.002  # Pause in which the other side becomes ready again.
_FIRST_BYTES, _MOST_BYTES = 1 << 16, 1 << 25
_LONG_ENOUGH_S = 0.1
_TRIES, _TRY_AGAIN_S = 3, 4.0
MOST_MESSAGES = 512


async def serve_echo(stream: ServerStream) -> None:
    """Answers each probe message. Flushes caches after pings, because a stage's caches are cold between tokens."""
    await stream.accept()
    caches: CacheFlush | None = None
    async with deadline("a measurement of a link", _SERVE_S):
        for _ in range(MOST_MESSAGES):
            if (data := await stream.read()) is None:
                return
            await stream.write(_ANSWER)
            if len(data) == PING_BYTES:
                if caches is None:
                    caches = await asyncio.to_thread(CacheFlush.shared)
                await caches.sweep_async()


async def measure_link(peer: Peer, permit: str = "") -> LinkProfile:
    """Measures a link in a few seconds. Raises StreamBrokenError, or DeadlineError if no answer comes."""
    stream = peer.open(ECHO, permit=permit or None)
    try:
        async with deadline(f"measuring the link to {peer.address}", _MEASURE_S):
            await stream.opened()
            round_trip_s = await _round_trip(stream)
            return LinkProfile(round_trip_s, await _throughput(stream, round_trip_s))
    finally:
        stream.cancel()


async def try_link(peer: Peer, seconds: float, permit: str = "") -> None:
    """Sends 64 KiB and waits for the answer. Raises StreamBrokenError, or DeadlineError after `seconds` seconds."""
    stream = peer.open(ECHO, permit=permit or None)
    try:
        async with deadline(f"an answer from {peer.address}", seconds):
            await peer.connected()
            await stream.opened()
            await _sent(stream, _FIRST_BYTES)
    finally:
        stream.cancel()


async def _round_trip(stream: ClientStream) -> float:
    caches, times = await asyncio.to_thread(CacheFlush.shared), []
    for _ in range(_WARM_UP + _PINGS):
        await caches.sweep_async()
        await asyncio.sleep(_BETWEEN_S)
        times.append(await _sent(stream, PING_BYTES))
    return median(times[_WARM_UP:])


async def _throughput(stream: ClientStream, round_trip_s: float) -> float:
    size = _FIRST_BYTES
    while True:
        taken_s = max(await _fastest(stream, size, round_trip_s + _LONG_ENOUGH_S) - round_trip_s, 1e-6)
        if taken_s >= _LONG_ENOUGH_S or size >= _MOST_BYTES:
            return size / taken_s
        size *= 2


async def _fastest(stream: ClientStream, size: int, enough_s: float) -> float:
    """Returns the shortest of up to 3 transfer times in s. Stops if a time is below `enough_s`, or after about 4 s."""
    fastest_s, begun = await _sent(stream, size), perf_counter()
    for _ in range(1, _TRIES):
        if fastest_s < enough_s or fastest_s + perf_counter() - begun > _TRY_AGAIN_S:
            break
        fastest_s = min(fastest_s, await _sent(stream, size))
    return fastest_s


async def _sent(stream: ClientStream, size: int) -> float:
    frames = [bytes(min(PROBE_BYTES, size - at)) for at in range(0, size, PROBE_BYTES)]
    begun = perf_counter()
    for frame in frames:
        await stream.write(frame)
    for _ in frames:
        await stream.read()
    return perf_counter() - begun
