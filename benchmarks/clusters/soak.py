"""Many streams for a long time, with clients that are cut off, come back or give up: errors, and memory over time.

    python benchmarks/clusters/soak.py MODEL.gguf [--minutes 10] [--streams 300] [--seed N] [--workers 2] [--tokens 48]

Each stream runs one request after the other. Three in five are read to their end; of the others, clients are cut off at
a random event, and come back at once or within two seconds, or give up, with or without a name of their reply. Answers
that are read to the end are compared with the undisturbed ones.

Prints requests, errors, tokens lost or changed, and for each process resident memory after `--warm-up` minutes and at
the end (medians of a tenth of the rest each), its change, and its slope.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import linear_regression, median
from typing import Any

import httpx
import psutil
from running import Bench, Layout, resident_mib, running

from llamaclust.cluster.client.http import AsyncClient, ResumableStream
from llamaclust.cluster.client.http_codec import encode
from llamaclust.core.errors import LlamaclustError
from llamaclust.tools.chaos.load import Requests, Streams
from llamaclust.tools.chaos.received import Received
from llamaclust.tools.chaos.tally import Comparison, Tally

_CONTEXT_TOKENS = 256
_LONGEST_WORDS = 30
_KINDS = 32  # of requests
_LOOK_S = 1.0
_AWAY_S = 2.0
_TIMEOUT_S = 300.0
_MOST_CHANGE = 0.05
_ENDS = ("read",) * 6 + ("resumed",) * 2 + ("given up", "given up by name")


@dataclass(slots=True)
class Soak:
    """Streams of one cluster."""

    api: str
    requests: Requests
    expected: dict[int, Received]
    compared: Comparison = field(default_factory=Comparison)
    ended: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    async def stream(self, source: Random, end_s: float) -> None:
        """One request after the other."""
        limits = httpx.Limits(max_connections=1)
        options: dict[str, Any] = {"base_url": self.api, "timeout": _TIMEOUT_S, "trust_env": False, "limits": limits}
        async with httpx.AsyncClient(**options) as client:
            while time.monotonic() < end_s:
                end, number = source.choice(_ENDS), source.randrange(len(self.expected))
                try:
                    await self._request(client, source, end, number)
                except (httpx.HTTPError, LlamaclustError) as error:
                    self.errors[f"{end}: {type(error).__name__}: {error}"] += 1
                self.ended[end] += 1

    async def _request(self, client: httpx.AsyncClient, source: Random, end: str, number: int) -> None:
        path, body = self.requests.path_and_body(number)
        content = encode({**body, "stream": True, "return_token_ids": True})
        exchange = Exchange(client, path, content, ResumableStream(client.base_url))
        most = None if end == "read" else source.randrange(1, self.requests.tokens)
        await exchange.read(most, with_name=end != "given up")
        if end == "resumed" and not exchange.stream.is_done:
            await asyncio.sleep(source.choice((0.0, source.uniform(0.0, _AWAY_S))))
            await exchange.read(None, with_name=True)
        if end in ("read", "resumed"):
            self.compared.add_request(self.expected[number], exchange.received)


@dataclass(slots=True)
class Exchange:
    """One request and its connections."""

    client: httpx.AsyncClient
    path: str
    content: bytes
    stream: ResumableStream
    received: Received = field(default_factory=Received)

    async def read(self, most: int | None, *, with_name: bool) -> None:
        """One connection, which is cut after `most` events."""
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        headers |= self.stream.headers if with_name else {}
        events = 0
        async with self.client.stream("POST", self.path, content=self.content, headers=headers) as reply:
            self.stream.opened(reply, b"" if reply.is_success else await reply.aread())
            async for data in reply.aiter_bytes():
                for event in self.stream.feed(data):
                    self.received.add(self.stream.last_event_id, event)
                    events += 1
                    if events == most:
                        return
            self.stream.ended()


class Memory:
    """Resident memory of the coordinator and its workers, over time."""

    def __init__(self, pid: int) -> None:
        names = {"coordinator": pid}
        for child in psutil.Process(pid).children():
            words = child.cmdline()
            if "--name" in words:
                names[f"worker {words[words.index('--name') + 1]}"] = child.pid
        self._pids = names
        self._samples: dict[str, list[tuple[float, float]]] = {name: [] for name in names}

    async def watch(self) -> None:
        """Until it is cancelled."""
        while True:
            now_s = time.monotonic()
            for name, pid in self._pids.items():
                with suppress(psutil.NoSuchProcess):
                    self._samples[name].append((now_s, resident_mib(pid)))
            await asyncio.sleep(_LOOK_S)

    def show(self, warm_s: float) -> bool:
        """Whether no process grew or shrank by more than a twentieth."""
        print(f"{'':14}{'warm':>10}{'end':>10} MiB{'change':>9}{'slope':>9} MiB/min{'most':>9} MiB")
        are_flat = [self._row(name, samples, warm_s) for name, samples in self._samples.items()]
        return all(are_flat)

    @staticmethod
    def _row(name: str, samples: Sequence[tuple[float, float]], warm_s: float) -> bool:
        rest = [(at_s, mib) for at_s, mib in samples if at_s - samples[0][0] >= warm_s] or samples[-2:]
        tenth = max(1, len(rest) // 10)
        first, last = median(mib for _, mib in rest[:tenth]), median(mib for _, mib in rest[-tenth:])
        slope = linear_regression(*zip(*rest, strict=True)).slope * 60.0 if len(rest) > 1 else 0.0
        change = last / first - 1.0
        most = max(mib for _, mib in samples)
        print(f"{name:14}{first:10.1f}{last:10.1f}    {change:9.1%}{slope:9.2f}        {most:9.1f}")
        return abs(change) <= _MOST_CHANGE


async def run(given: argparse.Namespace) -> bool:
    keys = {
        "context_length": _CONTEXT_TOKENS,
        "max_sequences": given.sequences,
        "max_waiting": 4 * given.streams,
        "objective": "throughput",
    }
    layout = Layout(workers=given.workers, keys=keys)
    async with running(given.model, layout) as (bench, coordinator):
        soak = Soak(bench.api, Requests(given.tokens, _LONGEST_WORDS), await _undisturbed(bench, given.tokens))
        return await _soak(soak, coordinator, given)


async def _undisturbed(bench: Bench, tokens: int) -> dict[int, Received]:
    async with AsyncClient(bench.api) as client:
        streams = Streams(client, Requests(tokens, _LONGEST_WORDS), Tally(0))
        await streams.undisturbed(_KINDS)
        return streams.expected


async def _soak(soak: Soak, coordinator: subprocess.Popen[bytes], given: argparse.Namespace) -> bool:
    memory = Memory(coordinator.pid)
    end_s = time.monotonic() + 60.0 * given.minutes
    watching = asyncio.create_task(memory.watch())
    try:
        await asyncio.gather(*(soak.stream(Random(f"{given.seed} {i}"), end_s) for i in range(given.streams)))
    finally:
        watching.cancel()
    is_flat = memory.show(60.0 * given.warm_up)
    ended = ", ".join(f"{count} {how}" for how, count in soak.ended.most_common())
    print(f"{soak.ended.total()} requests ({ended}): {soak.errors.total()} errors; {soak.compared}")
    for error, count in soak.errors.most_common(5):
        print(f"  {count} x {error}")
    is_intact = soak.compared.is_intact and not soak.errors
    print(f"{'no errors' if is_intact else 'ERRORS'}; memory {'flat' if is_flat else 'NOT FLAT'}; seed {given.seed}")
    return is_intact and is_flat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--warm-up", type=float, default=2.0, help="minutes")
    parser.add_argument("--streams", type=int, default=300)
    parser.add_argument("--sequences", type=int, default=64, help="max_sequences of the cluster")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(f"seed {given.seed}, {given.workers} workers, {given.streams} streams, {given.minutes:g} minutes", flush=True)
    if not asyncio.run(run(given)):
        sys.exit(1)


if __name__ == "__main__":
    main()
