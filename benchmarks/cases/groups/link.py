from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from emulated.emulation import compiled
from runner.case import Case, Group, Measures, option
from runner.options import positive, zero_or_more

from llamaclust.cluster.membership.authority import Authority
from llamaclust.kernels._native import Link, Links, TlsSettings, tls_library
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.wire.security.credentials import Identity

_DEADLINE_S = 60.0
_WARM = 200
_LATE_GATHERS = 100
_GREETING = b"benchmark"
_NAMES = ("first", "second")

Way = Callable[[int], list[int]]


@dataclass(frozen=True, slots=True)
class Side:
    member: int
    library: Path
    identities: tuple[Identity, Identity]
    kib: float

    def ways(self, ends: list[socket.socket]) -> dict[str, Way]:
        raw, plain, *secure = ends
        found = {"loop": self._loop(raw), "plain": self._gathers(plain, None)}
        for end in secure:
            ours, theirs = self.identities[self.member], self.identities[1 - self.member]
            host = theirs.principal.host(theirs.cluster)
            pair = ours.pair.certificate, ours.pair.private_key
            found["TLS"] = self._gathers(end, TlsSettings(ours.ca, *pair, host, self.member == 0))
        return found

    def _loop(self, end: socket.socket) -> Way:
        function = ctypes.CDLL(str(self.library)).raw_exchange
        end.setblocking(False)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        n_bytes = round(1024 * self.kib)
        own, theirs = np.ones(n_bytes, np.uint8), np.ones(n_bytes, np.uint8)

        def run(count: int) -> list[int]:
            took = np.zeros(count, np.int64)
            pointers = [ctypes.c_void_p(array.ctypes.data) for array in (own, theirs)]
            size, out = ctypes.c_int64(n_bytes), ctypes.c_void_p(took.ctypes.data)
            if number := function(end.fileno(), *pointers, size, count, out):
                raise OSError(number, os.strerror(number))
            return [int(ns) for ns in took]

        return run

    def _gathers(self, end: socket.socket, tls: TlsSettings | None) -> Way:
        other = 1 - self.member
        link = Link(end.detach(), _NAMES[other], tls, _GREETING, _GREETING, _DEADLINE_S)
        links = Links(self.member, [link if number == other else None for number in range(2)], _DEADLINE_S)
        columns = round(256 * self.kib)
        own, whole = np.ones((1, columns), np.float32), np.ones((1, 2 * columns), np.float32)
        borders = [0, columns, 2 * columns]

        def run(count: int) -> list[int]:
            took = []
            for number in range(count):
                began_ns = time.perf_counter_ns()
                links.gather(number, own, whole, borders)
                took.append(time.perf_counter_ns() - began_ns)
            return took

        return run


@dataclass(frozen=True)
class LinkCase(Case):
    """Compares a gather (an exchange of rows between two members of a group) with a loop that exchanges as many bytes.
    Two processes on two cores each send --kib over loopback. Three ways take turns: a loop that only sends and
    receives, links without TLS, and links with TLS. All turns are repeated with one late member."""

    rounds = 9
    kib: float = option(16.0, "number of KiB that each member sends, up to 1024", zero_or_more)
    gathers: int = option(2000, "number of exchanges of rows in a turn", positive)
    late_ms: float = option(2.0, "delay of the late member in ms (0: no late member)", zero_or_more)

    async def groups(self) -> AsyncIterator[Group]:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            authority = Authority.open(Path(folder) / "trust")
            first, second = (authority.identity(Principal(name)) for name in _NAMES)
            library = compiled("raw_exchange.cpp", Path(folder))
            sides = [Side(member, library, (first, second), self.kib) for member in range(2)]
            pairs = [_connected() for _ in range(3 if tls_library() else 2)]
            orders, theirs = get_context("spawn").Pipe()
            process = get_context("spawn").Process(
                target=serve, args=(sides[1], [end for _, end in pairs], theirs), daemon=True
            )
            process.start()
            stack.callback(process.kill)
            before = os.sched_getaffinity(0)
            stack.callback(os.sched_setaffinity, 0, before)
            os.sched_setaffinity(0, {min(before)})
            ways = sides[0].ways([end for end, _ in pairs])
            for late_ms in dict.fromkeys((0.0, self.late_ms)):
                name = f"two members, {self.kib:g} KiB each" + (f", {late_ms:g} ms late" if late_ms else "")
                measured = {way: partial(self._measure, ways[way], way, orders, late_ms) for way in ways}
                group = Group(name, measured, {"us": ""})
                yield group
                for way in list(ways)[1:]:
                    beyond = [b - a for a, b in zip(group.values("loop", "us"), group.values(way, "us"), strict=True)]
                    print(f"{way} beyond the loop: {sorted(beyond)[len(beyond) // 2]:+.1f} us")
            orders.send(None)

    async def _measure(self, run: Way, way: str, orders: Connection, late_ms: float, turn: int) -> Measures:
        return await asyncio.to_thread(self._run, run, way, orders, late_ms)

    def _run(self, run: Way, way: str, orders: Connection, late_ms: float) -> Measures:
        gathers = _LATE_GATHERS if late_ms else self.gathers
        if not late_ms:
            orders.send((way, _WARM, 0.0))
            run(_WARM)
        orders.send((way, gathers, late_ms))
        began_ns = time.thread_time_ns()
        took = [ns / 1000 for _ in range(gathers) for ns in run(1)] if late_ms else [ns / 1000 for ns in run(gathers)]
        processor_us = (time.thread_time_ns() - began_ns) / gathers / 1000
        return {"us": float(np.median(took)), "p99 us": float(np.percentile(took, 99)), "processor us": processor_us}


def serve(side: Side, ends: list[socket.socket], orders: Connection) -> None:
    """Runs the second member. Each order is (way to exchange rows, number of exchanges, delay of an exchange in ms)."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    ways = side.ways(ends)
    while (order := orders.recv()) is not None:
        way, count, late_ms = order
        if not late_ms:
            ways[way](count)
        for _ in range(count if late_ms else 0):
            time.sleep(late_ms / 1000)
            ways[way](1)


def _connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return socket.create_connection(listener.getsockname()), listener.accept()[0]
