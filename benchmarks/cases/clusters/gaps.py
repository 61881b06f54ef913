from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from runner.beside import BODY, Others, others, posted
from runner.case import Case, Group, Measures, argument, option
from runner.clusters import Bench, Layout, running
from runner.options import chosen, existing, listed, positive

from llamaclust.cluster.client.http import AsyncClient

_CONTEXT_TOKENS = 2048
_QUIET_S, _SETTLE_S = 10.0, 1.0
_DEADLINE_S = 600.0
_PARTS = ("logprobs", "breakers")


@dataclass(frozen=True)
class Gaps(Case):
    """Measures how expensive requests affect other streams: time between tokens, time to the first token, memory.
    `logprobs` sends a request of 8 prompts of 2,000 tokens with 128 logprobs each, and a request of 64 prompts that
    fill the context. `breakers` sends 8 requests with 64 new DRY breakers each, and 8 more while a worker is killed."""

    rounds = 1
    model: Path = argument("path of a .gguf", existing)
    parts: tuple[str, ...] = option(_PARTS, "requests to send", listed(chosen("part", {part: part for part in _PARTS})))
    streams: int = option(8, "number of streams to measure", positive)
    workers: int = option(2, "number of workers, with one thread each", positive)
    quiet: float = option(_QUIET_S, "seconds of streams before the first expensive request")

    async def groups(self) -> AsyncIterator[Group]:
        source = Random(1)
        keys = {"context_length": _CONTEXT_TOKENS, "max_sequences": 96, "max_waiting": 512, "objective": "throughput"}
        async with (
            running(self.model, Layout(workers=self.workers, keys=keys)) as (bench, _),
            AsyncClient(bench.api) as client,
            others(client, bench, self.streams) as seen,
        ):
            works: dict[str, Callable[[], Awaitable[str]]] = {"nothing else": self._nothing}
            if "logprobs" in self.parts:
                for what, prompts, tokens in (("8 x 2000 x 128", 8, 2000), ("64 x context x 128", 64, _CONTEXT_TOKENS)):
                    body = _scored(source, prompts, tokens)
                    works[what] = partial(posted, bench.api, "v1/completions", body)
            if "breakers" in self.parts:
                works["8 x 64 breakers"] = partial(_breakers, client, source)
                works["and a killed worker"] = partial(_killed, bench, client, source)
            for what, work in works.items():
                yield Group("", {what: partial(self._measure, seen, work)}, rounds=1)

    async def _nothing(self) -> str:
        await asyncio.sleep(self.quiet)
        return ""

    async def _measure(self, seen: Others, work: Callable[[], Awaitable[str]], turn: int) -> Measures:
        await asyncio.sleep(_SETTLE_S)
        seen.clear()
        answer = await asyncio.wait_for(work(), _DEADLINE_S)
        await asyncio.sleep(_SETTLE_S)
        return {**seen.measures, "answer": answer}


def _scored(source: Random, prompts: int, tokens: int) -> bytes:
    made = [[source.randrange(100, 300) for _ in range(tokens)] for _ in range(prompts)]
    return json.dumps({"prompt": made, "max_tokens": 0, "echo": True, "logprobs": 128}).encode()


async def _breakers(client: AsyncClient, source: Random) -> str:
    begun_s = time.monotonic()
    await asyncio.gather(*(_with_breakers(client, source) for _ in range(8)))
    return f"8 read in {time.monotonic() - begun_s:.1f} s"


async def _killed(bench: Bench, client: AsyncClient, source: Random) -> str:
    work = asyncio.gather(*(_with_breakers(client, source) for _ in range(8)))
    await asyncio.sleep(_SETTLE_S)
    before = await bench.status()
    os.kill(before["workers"][-1]["pid"], signal.SIGKILL)
    await work
    status = await bench.status()
    seconds = ", ".join(f"{s:.2f}" for s in status["recovery_seconds"][-1:])
    return f"8 read, {status['recoveries'] - before['recoveries']} recoveries: {seconds} s"


async def _with_breakers(client: AsyncClient, source: Random) -> None:
    texts = ["".join(source.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=source.randrange(2, 4))) for _ in range(64)]
    body = {**BODY, "prompt": "a story", "max_tokens": 200, "dry_multiplier": 0.8, "dry_sequence_breakers": texts}
    async with aclosing(client.events("v1/completions", body)) as events:
        async for _ in events:
            pass
