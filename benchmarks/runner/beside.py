"""Acts as other clients during a measurement: keeps streams open, sends short requests, and watches memory."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import httpx

from llamaclust.cluster.client.http import AsyncClient
from llamaclust.tools.chaos.load import meanwhile
from runner.case import Measures
from runner.clusters import Bench, resident_mib

_LOOK_S, _PROBE_S = 0.02, 0.3
_DEADLINE_S = 300.0
BODY = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0}
_POST = """
import asyncio, sys, httpx
url, key, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
body = sys.stdin.buffer.read()
async def post(client, number):
    try:
        reply = await client.post(url, content=body.replace(b"@NUMBER@", b"%d" % number))
        shown = " ".join(reply.text[:150].split()).encode("ascii", "replace").decode()
        print(reply.status_code, len(reply.content), shown)
    except httpx.HTTPError as error:
        print(0, 0, type(error).__name__)
async def main():
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(headers=headers, timeout=600.0, limits=limits, trust_env=False) as client:
        await asyncio.gather(*(post(client, number) for number in range(count)))
asyncio.run(main())
"""
_RAW = """
import socket, sys
(host, _, port), count = sys.argv[1].partition(":"), int(sys.argv[3])
data = sys.stdin.buffer.read()
connections = [socket.create_connection((host, int(port)), 200) for _ in range(count)]
for connection in connections:
    try:
        connection.sendall(data)
    except OSError:
        pass
for connection in connections:
    try:
        print(connection.recv(1000).partition(b" ")[2][:3].decode() or 0, 0, flush=True)
    except OSError as error:
        print(0, 0, type(error).__name__, flush=True)
"""


@dataclass(slots=True)
class Others:
    client: AsyncClient
    bench: Bench
    # Times (start, end) between two tokens of one stream.
    gaps: list[tuple[float, float]] = field(default_factory=list)
    live_s: float = 0.0  # Maximum seconds of a `/live` request.
    first_s: list[float] = field(default_factory=list)  # Seconds to the first token of short requests.
    most_mib: float = 0.0  # Peak memory of the coordinator.
    idle_mib: float = 0.0

    def clear(self) -> None:
        self.live_s, self.most_mib = 0.0, 0.0
        self.gaps.clear()
        self.first_s.clear()
        self.idle_mib = resident_mib(self.bench.coordinator.pid)

    @property
    def measures(self) -> Measures:
        gap_s = max((end_s - begun_s for begun_s, end_s in self.gaps), default=0.0)
        times = {"gap ms": 1e3 * gap_s, "live ms": 1e3 * self.live_s}
        first_s = max(self.first_s, default=float("inf"))  # Infinite if no short request got a token.
        return {**times, "first ms": 1e3 * first_s, "MiB more": max(0.0, self.most_mib - self.idle_mib)}

    async def stream(self, number: int) -> None:
        while True:
            last_s = None
            body = {**BODY, "prompt": f"stream {number}", "max_tokens": 500}
            async with aclosing(self.client.events("v1/completions", body)) as events:
                async for _ in events:
                    now_s = time.monotonic()
                    if last_s is not None:
                        self.gaps.append((last_s, now_s))
                    last_s = now_s

    async def probe(self) -> None:
        for number in range(1_000_000):
            begun_s = time.monotonic()
            body = {**BODY, "prompt": f"probe {number}", "max_tokens": 2}
            async with aclosing(self.client.events("v1/completions", body)) as events:
                async for _, event in events:
                    if any(choice.get("token_ids") for choice in event["choices"]):
                        self.first_s.append(time.monotonic() - begun_s)
                        break
            await asyncio.sleep(_PROBE_S)

    async def live(self) -> None:
        async with httpx.AsyncClient(base_url=self.bench.api, timeout=_DEADLINE_S, trust_env=False) as client:
            while True:
                begun_s = time.monotonic()
                await client.get("/live")
                self.live_s = max(self.live_s, time.monotonic() - begun_s)
                await asyncio.sleep(_PROBE_S)

    async def watch(self) -> None:
        while True:
            self.most_mib = max(self.most_mib, resident_mib(self.bench.coordinator.pid))
            await asyncio.sleep(_LOOK_S)


@asynccontextmanager
async def others(client: AsyncClient, bench: Bench, streams: int) -> AsyncIterator[Others]:
    made = Others(client, bench)
    works = [*(made.stream(number) for number in range(streams)), made.probe(), made.live(), made.watch()]
    async with meanwhile(works):
        yield made


async def posted(api: str, path: str, body: bytes, count: int = 1, key: str = "") -> str:
    """Sends `count` requests and describes the replies. In each body, the request's number replaces `@NUMBER@`. If
    `path` is empty, `body` is a whole HTTP request."""
    pipe = asyncio.subprocess.PIPE
    words = (sys.executable, "-c", _POST, f"{api}/{path}") if path else (sys.executable, "-c", _RAW, api[7:])
    process = await asyncio.create_subprocess_exec(*words, key, str(count), stdin=pipe, stdout=pipe)
    begun_s = time.monotonic()
    out, _ = await process.communicate(body)
    lines = [line.split(" ", 2) for line in out.decode().splitlines()]
    shown = ", ".join(f"{number} x {status}" for status, number in Counter(line[0] for line in lines).items())
    refused = next((line[-1] for line in lines if line[0] != "200"), "")
    size_mib = sum(int(line[1]) for line in lines) / (1 << 20)
    return f"{shown}, {size_mib:.1f} MiB in {time.monotonic() - begun_s:.1f} s {refused[:110]}".rstrip()
