from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from statistics import linear_regression, median
from typing import Any

import httpx
import psutil
from runner.case import Case, Group, Measures, argument, option
from runner.clusters import Bench, Layout, resident_mib, running
from runner.options import existing, positive

from llamaclust.cluster.client.http import AsyncClient, ResumableStream
from llamaclust.cluster.client.http_codec import encode
from llamaclust.core.errors import LlamaclustError
from llamaclust.tools.chaos.load import Requests, Streams, meanwhile
from llamaclust.tools.chaos.received import Received
from llamaclust.tools.chaos.tally import Comparison, Tally

_CONTEXT_TOKENS = 256
_LONGEST_WORDS = 30
_KINDS = 32  # Number of different requests.
_LOOK_S = 1.0
_AWAY_S = 2.0
_TIMEOUT_S = 300.0
_MOST_CHANGE = 0.05
_ENDS = ("read",) * 6 + ("resumed",) * 2 + ("given up", "given up by name")


@dataclass(slots=True)
class Soak:
    api: str
    requests: Requests
    expected: dict[int, Received]
    compared: Comparison = field(default_factory=Comparison)
    ended: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    async def stream(self, source: Random, end_s: float) -> None:
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
    client: httpx.AsyncClient
    path: str
    content: bytes
    stream: ResumableStream
    received: Received = field(default_factory=Received)

    async def read(self, most: int | None, *, with_name: bool) -> None:
        """Reads up to `most` events over a new connection. If `with_name`, a later connection can resume the reply."""
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


Samples = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class SoakCase(Case):
    """Runs many streams for a long time with clients that disconnect, return or give up. Checks answers and memory.
    Three in five clients read their reply to the end. Other clients disconnect at a random event, and return within two
    seconds or give up. The case fails if a complete answer differs from an undisturbed answer. It also fails if a
    process's median memory changes by more than 5 % between the first tenth after --warm-up and the last tenth."""

    rounds = 1
    model: Path = argument("path of a .gguf", existing)
    minutes: float = option(10.0, "duration of the streams in minutes")
    warm_up: float = option(2.0, "minutes of warm-up, which do not count in the comparison of memory")
    streams: int = option(300, "number of simultaneous streams", positive)
    sequences: int = option(64, "max_sequences in the cluster file", positive)
    tokens: int = option(48, "number of tokens in an answer", positive)
    workers: int = option(2, "number of workers, with one thread each", positive)
    seed: int = option(1, "seed of the requests")

    async def groups(self) -> AsyncIterator[Group]:
        sizes = {"max_sequences": self.sequences, "max_waiting": 4 * self.streams}
        keys = {"context_length": _CONTEXT_TOKENS, **sizes, "objective": "throughput"}
        async with running(self.model, Layout(workers=self.workers, keys=keys)) as (bench, _):
            soak = Soak(bench.api, Requests(self.tokens, _LONGEST_WORDS), await self._undisturbed(bench))
            samples: Samples = {name: [] for name in _pids(bench)}
            yield Group("", {f"{self.streams} streams": partial(self._soak, bench, soak, samples)})
            for error, count in soak.errors.most_common(5):
                print(f"  {count} x {error}")
            changes = []
            for name, found in samples.items():
                group = Group("", {name: partial(self._memory, found)})
                yield group
                changes.append(abs(group.values(name, "change")[0]))
        if not soak.compared.is_intact or soak.errors or max(changes) > _MOST_CHANGE:
            raise LlamaclustError(
                f"answers differ, requests failed, or memory changed too much; repeat with --seed {self.seed}"
            )

    async def _undisturbed(self, bench: Bench) -> dict[int, Received]:
        async with AsyncClient(bench.api) as client:
            streams = Streams(client, Requests(self.tokens, _LONGEST_WORDS), Tally(0))
            await streams.undisturbed(_KINDS)
            return streams.expected

    async def _soak(self, bench: Bench, soak: Soak, samples: Samples, turn: int) -> Measures:
        end_s = time.monotonic() + 60.0 * self.minutes
        async with meanwhile([_watch(_pids(bench), samples)]):
            sources = (Random(f"{self.seed} {number}") for number in range(self.streams))
            await asyncio.gather(*(soak.stream(source, end_s) for source in sources))
        counts = {
            "requests": soak.ended.total(),
            "errors": soak.errors.total(),
        }
        return {
            **counts,
            "compared": str(soak.compared),
            "ends": ", ".join(f"{count} {how}" for how, count in soak.ended.most_common()),
        }

    async def _memory(self, samples: list[tuple[float, float]], turn: int) -> Measures:
        begun_s = samples[0][0] + 60.0 * self.warm_up
        rest = [(at_s, mib) for at_s, mib in samples if at_s >= begun_s] or samples[-2:]
        tenth = max(1, len(rest) // 10)
        first, last = median(mib for _, mib in rest[:tenth]), median(mib for _, mib in rest[-tenth:])
        slope = linear_regression(*zip(*rest, strict=True)).slope * 60.0 if len(rest) > 1 else 0.0
        sizes = {"warm MiB": first, "end MiB": last, "most MiB": max(mib for _, mib in samples)}
        return {**sizes, "change": last / first - 1.0, "MiB/min": slope}


def _pids(bench: Bench) -> dict[str, int]:
    names = {"coordinator": bench.coordinator.pid}
    for child in bench.coordinator.children():
        words = child.cmdline()
        if "--name" in words:
            names[f"worker {words[words.index('--name') + 1]}"] = child.pid
    return names


async def _watch(pids: dict[str, int], samples: Samples) -> None:
    while True:
        now_s = time.monotonic()
        for name, pid in pids.items():
            with suppress(psutil.NoSuchProcess):
                samples[name].append((now_s, resident_mib(pid)))
        await asyncio.sleep(_LOOK_S)
