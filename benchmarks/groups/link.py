"""Measures the cost of a gather of two members beyond the exchange of the same bytes, over loopback.

    python benchmarks/groups/link.py [--kib 16] [--gathers 2000] [--turns 9] [--late-ms 2] [--json FILE]

Two processes, each with a core for itself, take turns: a loop that only sends and receives, plain links, and links with
TLS. Each member sends `--kib`. Prints the median and the 99th percentile of a gather, what is beyond the loop's (the
median of the differences of turns), and processor time; then the same where the other member is late each time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from measuring.compiler import compiler

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.cluster.membership.authority import Authority
from llamaclust.core.errors import UsageError
from llamaclust.kernels._native import Link, Links, TlsSettings, tls_library
from llamaclust.wire.security.credentials import Identity, Principal

_SOURCE = Path(__file__).parent / "raw_exchange.cpp"
_DEADLINE_S = 60.0
_WARM = 200
_LATE_GATHERS = 100
_GREETING = b"benchmark"
_NAMES = ("first", "second")

Way = Callable[[int], list[int]]
"""A way does so many exchanges and returns the nanoseconds of each."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of a gather; `beyond_us`: beyond the loop's median in the same turn."""

    way: str
    kib: float
    late_ms: float
    median_us: float
    p99_us: float
    beyond_us: float
    processor_us: float


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two processes."""

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


def main() -> None:
    options, rows = _options(), list[str]()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        authority = Authority.open(Path(folder) / "trust")
        first, second = (authority.identity(Principal(name)) for name in _NAMES)
        library, kib = _build(Path(folder)), options.kib
        sides = [Side(member, library, (first, second), kib) for member in range(2)]
        pairs = [_connected() for _ in range(3 if tls_library() else 2)]
        orders, theirs = get_context("spawn").Pipe()
        process = get_context("spawn").Process(
            target=_serve, args=(sides[1], [end for _, end in pairs], theirs), daemon=True
        )
        process.start()
        stack.callback(process.kill)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        ways = sides[0].ways([end for end, _ in pairs])
        print(f"two members, {kib:g} KiB each; {tls_library() or 'no TLS library'}")
        for late_ms in dict.fromkeys((0.0, options.late_ms)):
            gathers = _LATE_GATHERS if late_ms else options.gathers
            for cost in _measured(ways, orders, gathers, options.turns, late_ms, kib):
                _print(cost)
                rows.append(json.dumps(asdict(cost)))
        orders.send(None)
    if options.json is not None:
        options.json.write_text("".join(f"{row}\n" for row in rows))


def _serve(side: Side, ends: list[socket.socket], orders: Connection) -> None:
    """The second member: a way and a number of gathers at a time, each of them late."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    ways = side.ways(ends)
    while (order := orders.recv()) is not None:
        way, count, late_ms = order
        if not late_ms:
            ways[way](count)
        for _ in range(count if late_ms else 0):
            time.sleep(late_ms / 1000)
            ways[way](1)


def _measured(
    ways: dict[str, Way], orders: Connection, gathers: int, turns: int, late_ms: float, kib: float
) -> Iterator[Cost]:
    times: dict[str, list[list[float]]] = {way: [] for way in ways}
    processor: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns):
        for way, run in ways.items():
            if not late_ms:
                orders.send((way, _WARM, 0.0))
                run(_WARM)
            orders.send((way, gathers, late_ms))
            began_ns = time.process_time_ns()
            took = [ns for _ in range(gathers) for ns in run(1)] if late_ms else run(gathers)
            processor[way].append((time.process_time_ns() - began_ns) / gathers / 1000)
            times[way].append([ns / 1000 for ns in took])
    for way in ways:
        every = np.array(times[way])
        pairs = zip(times[way], times["loop"], strict=True)
        beyond = median(median(ours) - median(loop) for ours, loop in pairs)
        yield Cost(
            way,
            kib,
            late_ms,
            float(np.median(every)),
            float(np.percentile(every, 99)),
            beyond,
            median(processor[way]),
        )


def _print(cost: Cost) -> None:
    late = f", {cost.late_ms:g} ms late" if cost.late_ms else ""
    print(
        f"{cost.way + late:<18} median {cost.median_us:8.1f} us  p99 {cost.p99_us:8.1f} us  "
        f"beyond the loop {cost.beyond_us:+7.1f} us  processor {cost.processor_us:7.1f} us"
    )


def _connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return socket.create_connection(listener.getsockname()), listener.accept()[0]


def _build(folder: Path) -> Path:
    command, library = compiler(), folder / "raw_exchange.so"
    if command is None:
        raise UsageError("no C++ compiler found")
    done = subprocess.run(
        [command, "-O2", "-shared", "-fPIC", str(_SOURCE), "-o", str(library)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise UsageError(f"{_SOURCE}: {done.stderr.strip()}")
    return library


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kib", type=float, default=16, help="what each member sends (default 16)")
    parser.add_argument("--gathers", type=int, default=2000, help="of each turn (default 2000)")
    parser.add_argument("--turns", type=int, default=9, help="default 9")
    parser.add_argument("--late-ms", type=float, default=2, help="how late the other member is (default 2; 0: never)")
    parser.add_argument("--json", type=Path, help="also write the rows there, a JSON object a line")
    options = parser.parse_args()
    if not (0 < options.kib <= 1024 and options.gathers > 0 and options.turns > 0 and 0 <= options.late_ms <= 1000):
        parser.error("--kib must be above 0 and at most 1024, --late-ms 0 to 1000, --gathers and --turns at least 1")
    return options


if __name__ == "__main__":
    with ends_in_one_line():
        main()
