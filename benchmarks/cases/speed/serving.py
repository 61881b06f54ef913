from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any

import httpx
from runner.case import Case, Group, Measures, argument, option
from runner.clusters import Layout, free_port, running
from runner.options import existing, listed, positive
from runner.streams import event, requested

from llamaclust.core.errors import LlamaclustError, UsageError

_READY_S, _LOOK_S = 120.0, 0.1
_WORDS = ("sea", "wind", "stone", "river", "house", "light", "road", "bird", "night", "tree", "song", "fire")


@dataclass(slots=True)
class Served:
    tokens: int = 0
    errors: int = 0
    first_s: list[float] = field(default_factory=list)
    reason: str = ""  # Message of the first error.


@dataclass(frozen=True)
class Serving(Case):
    """Compares many streams with llama.cpp's server for a minute: tokens per second, time to the first token, errors.
    Each stream sends a chat when its previous chat has ended. Prompts begin with different words. Both servers run all
    the time, but only one of them gets requests. A ratio of `tok/s` above 1 means that llamaclust is faster."""

    rounds = 3
    model: Path = argument("path of a .gguf", existing)
    llama_server: Path | None = option(None, "path of llama.cpp's program llama-server", Path)
    streams: tuple[int, ...] = option((16, 64), "numbers of simultaneous streams", listed(positive))
    seconds: float = option(60.0, "seconds of each server's turn")
    threads: int = option(2, "number of threads of each server", positive)
    prompt_tokens: int = option(128, "approximate number of tokens in a chat's prompt", positive)
    tokens: int = option(64, "number of tokens in an answer", positive)

    async def groups(self) -> AsyncIterator[Group]:
        most, context = max(self.streams), self.prompt_tokens * 2 + self.tokens + 256
        workers = [{"name": "a", "threads": self.threads}]
        keys = {"workers": workers, "context_length": context, "max_sequences": most, "objective": "throughput"}
        async with AsyncExitStack() as stack:
            apis = {}
            if self.llama_server is not None:
                other = _llama_server(self.llama_server, self.model, self.threads, most, context)
                apis["llama.cpp"] = await stack.enter_async_context(other)
            bench, _ = await stack.enter_async_context(running(self.model, Layout(workers=1, keys=keys)))
            apis["llamaclust"] = bench.api
            for streams in self.streams:
                yield Group(f"{streams} streams", {name: partial(self._offer, apis[name], streams) for name in apis})

    async def _offer(self, api: str, streams: int, turn: int) -> Measures:
        """Runs streams for `seconds`, then cancels them. Each event of a cancelled answer counts as a token."""
        found, begun_s = Served(), time.monotonic()
        tasks = [asyncio.create_task(self._stream(api, Random(f"{turn} {n}"), found)) for n in range(streams)]
        await asyncio.sleep(self.seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        slowest = quantiles(found.first_s, n=100)[98] if len(found.first_s) > 1 else 0.0
        return {
            "tok/s": found.tokens / (time.monotonic() - begun_s),
            "first s": median(found.first_s or [0.0]),
            "first p99 s": slowest,
            "answers": len(found.first_s),
            "errors": found.errors,
            "": found.reason,
        }

    async def _stream(self, api: str, source: Random, found: Served) -> None:
        while True:
            begun_s, shown = time.monotonic(), 0  # Number of tokens of this answer so far.
            writer = None
            try:
                reader, writer = await requested(api, self._body(source), "/v1/chat/completions")
                while data := await event(reader):
                    answer = json.loads(data)
                    # Usage is exact, but an event may have several tokens or none.
                    if (usage := answer.get("usage")) is not None:
                        found.tokens += usage["completion_tokens"] - shown
                        shown = usage["completion_tokens"]
                    elif any(choice["delta"].get("content") for choice in answer.get("choices", ())):
                        if not shown:
                            found.first_s.append(time.monotonic() - begun_s)
                        found.tokens += 1
                        shown += 1
            except (OSError, LlamaclustError) as error:
                found.errors += 1
                found.reason = found.reason or str(error)
            finally:
                if writer is not None:
                    writer.close()

    def _body(self, source: Random) -> dict[str, Any]:
        text = " ".join(source.choices(_WORDS, k=round(self.prompt_tokens / 1.2)))
        messages = [{"role": "user", "content": f"{source.random()} {text}"}]
        fields = {"max_tokens": self.tokens, "ignore_eos": True, "stream_options": {"include_usage": True}}
        return {"messages": messages, **fields}


@asynccontextmanager
async def _llama_server(program: Path, model: Path, threads: int, slots: int, context: int) -> AsyncIterator[str]:
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
                    raise UsageError(f"{program} ended with exit status {process.returncode}")
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
