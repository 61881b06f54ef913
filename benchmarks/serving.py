"""Many streams for a minute beside llama.cpp's server, in turns on the same machine: tokens a second, errors.

    python benchmarks/serving.py MODEL.gguf --llama-server PATH [--streams 16 64] [--seconds 60] [--pairs 3]
        [--threads 2] [--prompt-tokens 128] [--tokens 64]

Each stream sends its next chat when the last one has ended; prompts differ from their first word on. Both servers are
there all the time, one of them idle. Prints tokens a second of answers, the first token's median and 99th percentile,
errors, and the pairs' ratios, median and quartiles; above 1 means that llamaclust is faster.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any

import httpx

sys.path.append(str(Path(__file__).parent / "clusters"))

from running import Layout, free_port, running

_READY_S = 120.0
_REQUEST_S = 300.0
_LOOK_S = 0.1
_WORDS = ("sea", "wind", "stone", "river", "house", "light", "road", "bird", "night", "tree", "song", "fire")


@dataclass(frozen=True, slots=True)
class Load:
    """What each stream sends."""

    streams: int
    seconds: float
    prompt_words: int
    tokens: int

    def body(self, source: Random) -> dict[str, Any]:
        text = " ".join(source.choices(_WORDS, k=self.prompt_words))
        options = {"include_usage": True}
        return {
            "messages": [{"role": "user", "content": f"{source.random()} {text}"}],
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": options,
        }


@dataclass(slots=True)
class Result:
    """Of one server under one load."""

    tokens: int = 0
    errors: int = 0
    first_s: list[float] = field(default_factory=list)
    elapsed_s: float = 0.0
    reason: str = ""  # of the first error

    @property
    def rate(self) -> float:
        return self.tokens / self.elapsed_s

    def row(self, name: str) -> str:
        slowest = quantiles(self.first_s, n=100)[98] if len(self.first_s) > 1 else 0.0
        first = median(self.first_s) if self.first_s else 0.0
        waits = f"{first:12.2f}{slowest:10.2f}"
        return f"{name:12}{self.rate:10.1f}{waits}{len(self.first_s):10}{self.errors:8} {self.reason}".rstrip()


async def offer(api: str, load: Load, seed: int) -> Result:
    """Streams one after the other in each of `load.streams`, until the time is up; those that run then are cut off and
    their events so far count as tokens."""
    result, begun_s = Result(), time.monotonic()
    limits = httpx.Limits(max_connections=load.streams)
    async with httpx.AsyncClient(base_url=api, timeout=_REQUEST_S, limits=limits, trust_env=False) as client:
        tasks = [
            asyncio.create_task(_streams(client, load, Random(f"{seed} {n}"), result)) for n in range(load.streams)
        ]
        await asyncio.sleep(load.seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    result.elapsed_s = time.monotonic() - begun_s
    return result


async def _streams(client: httpx.AsyncClient, load: Load, source: Random, result: Result) -> None:
    while True:
        begun_s, shown = time.monotonic(), 0  # events of this answer
        try:
            async with client.stream("POST", "/v1/chat/completions", json=load.body(source)) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    event = json.loads(line[6:]) if line.startswith("data: {") else {}
                    if (usage := event.get("usage")) is not None:  # an event may have several tokens, or none
                        result.tokens += usage["completion_tokens"] - shown
                        shown = usage["completion_tokens"]
                    elif _has_text(event):
                        if not shown:
                            result.first_s.append(time.monotonic() - begun_s)
                        result.tokens += 1
                        shown += 1
        except httpx.HTTPError as error:
            result.errors += 1
            result.reason = result.reason or str(error)


def _has_text(event: dict[str, Any]) -> bool:
    return any(choice["delta"].get("content") for choice in event.get("choices", ()))


@asynccontextmanager
async def llama_server(program: Path, model: Path, threads: int, slots: int, context: int) -> AsyncIterator[str]:
    """Its address, when it is ready."""
    port = free_port()
    words = ["-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-t", str(threads), "-np", str(slots)]
    words += ["-c", str(context * slots), "--no-webui"]
    nowhere = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(str(program), *words, stdout=nowhere, stderr=nowhere)
    api = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(_READY_S), httpx.AsyncClient(trust_env=False) as client:
            while not await _is_ready(client, api):
                if process.returncode is not None:
                    raise SystemExit(f"{program} ended with code {process.returncode}")
                await asyncio.sleep(_LOOK_S)
        yield api
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _is_ready(client: httpx.AsyncClient, api: str) -> bool:
    try:
        return (await client.get(f"{api}/health")).is_success
    except httpx.HTTPError:
        return False


async def compare(apis: dict[str, str], load: Load, pairs: int) -> None:
    print(f"{load.streams} streams\n{'':12}{'tokens/s':>10}{'first s':>12}{'p99':>10}{'answers':>10}{'errors':>8}")
    ratios = []
    for pair in range(pairs):
        rates = {}
        for name in sorted(apis, reverse=bool(pair % 2)):
            result = await offer(apis[name], load, pair)
            rates[name] = result.rate
            print(result.row(name), flush=True)
        if len(rates) == 2:
            ratios.append(rates["llamaclust"] / rates["llama.cpp"])
    if ratios:
        low, middle, high = quantiles(ratios * 2 if len(ratios) == 1 else ratios, n=4, method="inclusive")
        print(f"ratio: median {middle:.2f}, quartiles {low:.2f} and {high:.2f}", flush=True)


async def run(given: argparse.Namespace) -> None:
    most, words = max(given.streams), round(given.prompt_tokens / 1.2)
    context = given.prompt_tokens * 2 + given.tokens + 256
    workers = [{"name": "a", "threads": given.threads}]
    keys = {"workers": workers, "context_length": context, "max_sequences": most, "objective": "throughput"}
    async with AsyncExitStack() as stack:
        bench, _ = await stack.enter_async_context(running(given.model, Layout(workers=1, keys=keys)))
        apis = {"llamaclust": bench.api}
        if given.llama_server is not None:
            other = llama_server(given.llama_server, given.model, given.threads, most, context)
            apis["llama.cpp"] = await stack.enter_async_context(other)
        for streams in given.streams:
            await compare(apis, Load(streams, given.seconds, words, given.tokens), given.pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
