"""What one costly request costs the streams beside it: gaps between their tokens, first tokens, memory, recoveries.

    python benchmarks/clusters/gaps.py MODEL.gguf [--part logprobs breakers] [--streams 8] [--workers 2]

`logprobs`: a POST of 8 prompts of 2,000 tokens with 128 logprobs each, and one of 64 prompts that fill the context.
`breakers`: 8 requests at once with 64 new DRY breakers each, and a worker that is killed while they run.

Prints for each the longest gap between two tokens of one of the other streams beside the longest one without it, how
long new short requests waited for their first token, the coordinator's memory, and how it was answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from running import Bench, Layout, resident_mib, running

from llamaclust.cluster.client.http import AsyncClient
from llamaclust.tools.chaos.load import meanwhile

_CONTEXT_TOKENS = 2048
_QUIET_S = 10.0
_LOOK_S = 0.02
_PROBE_S = 0.3
_SETTLE_S = 1.0
_DEADLINE_S = 600.0
_MOST_MORE_MIB = 512.0
_BODY = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0}
_POST = """
import sys, httpx
body = sys.stdin.buffer.read()
with httpx.stream("POST", sys.argv[1], content=body, timeout=600.0, trust_env=False) as reply:
    parts = reply.iter_raw()
    first = next(parts, b"")
    print(reply.status_code, len(first) + sum(map(len, parts)), first[:200].decode("utf-8", "replace"))
"""
"""A client of its own, which does not hold up the others."""


@dataclass(slots=True)
class Others:
    """Streams that run beside, and short requests that come one after the other."""

    client: AsyncClient
    longest_s: float = 0.0  # between two tokens of one stream
    first_s: list[float] = field(default_factory=list)  # to the first token of the short requests
    most_mib: float = 0.0

    def clear(self) -> None:
        self.longest_s, self.most_mib = 0.0, 0.0
        self.first_s.clear()

    async def stream(self, number: int) -> None:
        while True:
            last_s = None
            body = {**_BODY, "prompt": f"stream {number}", "max_tokens": 500}
            async with aclosing(self.client.events("v1/completions", body)) as events:
                async for _ in events:
                    now_s = time.monotonic()
                    self.longest_s = max(self.longest_s, 0.0 if last_s is None else now_s - last_s)
                    last_s = now_s

    async def probe(self) -> None:
        for number in range(1_000_000):
            begun_s = time.monotonic()
            body = {**_BODY, "prompt": f"probe {number}", "max_tokens": 2}
            async with aclosing(self.client.events("v1/completions", body)) as events:
                async for _, event in events:
                    if any(choice.get("token_ids") for choice in event["choices"]):
                        self.first_s.append(time.monotonic() - begun_s)
                        break
            await asyncio.sleep(_PROBE_S)

    async def watch(self, pid: int) -> None:
        while True:
            self.most_mib = max(self.most_mib, resident_mib(pid))
            await asyncio.sleep(_LOOK_S)

    def row(self, what: str, answer: str = "") -> str:
        first_s = max(self.first_s, default=0.0)
        return f"{what:26}{1e3 * self.longest_s:9.0f}{1e3 * first_s:12.0f}{self.most_mib:10.0f}   {answer}"


@asynccontextmanager
async def others(client: AsyncClient, streams: int, pid: int) -> AsyncIterator[Others]:
    made = Others(client)
    works = [*(made.stream(number) for number in range(streams)), made.probe(), made.watch(pid)]
    async with meanwhile(works):
        yield made


async def post(api: str, body: dict[str, Any]) -> str:
    """Status, size in MiB and beginning of a reply that is read to its end elsewhere."""
    pipe = asyncio.subprocess.PIPE
    words = (sys.executable, "-c", _POST, f"{api}/v1/completions")
    process = await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe)
    begun_s = time.monotonic()
    out, _ = await process.communicate(json.dumps(body).encode())
    status, size, start = out.decode().split(" ", 2)
    shown = "" if status == "200" else f": {start.strip()[:110]}"
    return f"{status}, {int(size) / (1 << 20):.1f} MiB in {time.monotonic() - begun_s:.1f} s{shown}"


def scored(source: Random, prompts: int, tokens: int) -> dict[str, Any]:
    made = [[source.randrange(100, 300) for _ in range(tokens)] for _ in range(prompts)]
    return {"prompt": made, "max_tokens": 0, "echo": True, "logprobs": 128}


async def with_breakers(client: AsyncClient, source: Random) -> None:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    texts = ["".join(source.choices(letters, k=source.randrange(2, 4))) for _ in range(64)]
    body = {**_BODY, "prompt": "a story", "max_tokens": 200, "dry_multiplier": 0.8, "dry_sequence_breakers": texts}
    async with aclosing(client.events("v1/completions", body)) as events:
        async for _ in events:
            pass


async def alone(client: AsyncClient, source: Random) -> str:
    """Eight of them."""
    begun_s = time.monotonic()
    await asyncio.gather(*(with_breakers(client, source) for _ in range(8)))
    return f"8 read in {time.monotonic() - begun_s:.1f} s"


async def breakers(bench: Bench, client: AsyncClient, source: Random) -> str:
    """Eight of them, and a worker killed when they have run for a moment."""
    before = (await bench.status())["recoveries"]
    work = asyncio.gather(*(with_breakers(client, source) for _ in range(8)))
    await asyncio.sleep(_SETTLE_S)
    status = await bench.status()
    os.kill(status["workers"][-1]["pid"], signal.SIGKILL)
    await work
    status = await bench.status()
    seconds = ", ".join(f"{s:.2f}" for s in status["recovery_seconds"][-1:])
    return f"8 read, {status['recoveries'] - before} recoveries: {seconds} s"


async def measure(seen: Others, what: str, work: Awaitable[str], idle_mib: float) -> str:
    """Its row."""
    seen.clear()
    answer = await asyncio.wait_for(work, _DEADLINE_S)
    await asyncio.sleep(_SETTLE_S)
    more_mib = seen.most_mib - idle_mib
    return seen.row(what, answer + (f"; {more_mib:.0f} MiB MORE" if more_mib > _MOST_MORE_MIB else ""))


async def run(model: Path, parts: Sequence[str], streams: int, workers: int) -> None:
    source = Random(1)
    keys = {"context_length": _CONTEXT_TOKENS, "max_sequences": 96, "max_waiting": 512, "objective": "throughput"}
    async with (
        running(model, Layout(workers=workers, keys=keys)) as (bench, coordinator),
        AsyncClient(bench.api) as client,
        others(client, streams, coordinator.pid) as seen,
    ):
        await asyncio.sleep(_SETTLE_S)
        seen.clear()
        await asyncio.sleep(_QUIET_S)
        print(f"{'':26}{'gap ms':>9}{'first ms':>12}{'MiB':>10}   answer\n{seen.row('nothing else')}", flush=True)
        idle_mib = seen.most_mib
        if "logprobs" in parts:
            for what, prompts, tokens in (("8 x 2000 x 128", 8, 2000), ("64 x context x 128", 64, _CONTEXT_TOKENS)):
                work = post(bench.api, scored(source, prompts, tokens))
                print(await measure(seen, what, work, idle_mib), flush=True)
        if "breakers" in parts:
            print(await measure(seen, "8 x 64 breakers", alone(client, source), idle_mib), flush=True)
            print(await measure(seen, "and a killed worker", breakers(bench, client, source), idle_mib), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--part", nargs="+", choices=("logprobs", "breakers"), default=("logprobs", "breakers"))
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    asyncio.run(run(given.model, given.part, given.streams, given.workers))


if __name__ == "__main__":
    main()
