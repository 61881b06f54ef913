from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter

from runner.case import Case, Group, Measures, argument, option
from runner.clusters import Bench, Layout, processor_s, resident_mib, running
from runner.options import positive
from runner.streams import Connection, event, requested

from llamaclust.cluster.config.catalog import resolve_model
from llamaclust.core.errors import LlamaclustError

_FIRST, _LAST = 2000, 2400
"""Tokens of the answer at which the measurement begins and ends. All other streams are open during this time."""
_AT_ONCE = 250
_DEADLINE_S = 120.0
_BODY = {"prompt": "Once upon a time", "temperature": 0, "speculative": False, "ignore_eos": True}


@dataclass(frozen=True)
class IdleStreams(Case):
    """Measures the cost of waiting streams: one answer alone, and one while a thousand other streams are open.
    The cluster computes one request at a time, and waiting streams get keepalives. Figures are tokens per second, the
    coordinator's processor time per token, and its memory per open stream. Tokens 2,000 to 2,400 are measured."""

    rounds = 3
    warm = 1
    model: str = argument("catalog name or path of a .gguf", str, default="smollm2-135m-instruct")
    streams: int = option(1000, "number of waiting streams", positive)
    threads: int = option(2, "number of threads of the worker", positive)

    async def groups(self) -> AsyncIterator[Group]:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        workers = [{"name": "a", "threads": self.threads}]
        keys = {"workers": workers, "max_sequences": 1, "max_waiting": self.streams + 8}
        async with running(resolve_model(self.model), Layout(workers=1, keys=keys)) as (bench, _):
            beside = {"alone": 0, f"{self.streams} waiting": self.streams}
            yield Group("", {name: partial(self._measure, bench, count) for name, count in beside.items()})

    async def _measure(self, bench: Bench, streams: int, turn: int) -> Measures:
        async with asyncio.timeout(_DEADLINE_S):
            before_mib = resident_mib(bench.coordinator.pid)
            reader, writer = await requested(bench.api, {**_BODY, "max_tokens": _LAST + 50})
            await event(reader)
            before = asyncio.create_task(
                _events(reader, _FIRST - 1)
            )  # A task reads tokens when they arrive, even while other streams are opened.
            async with _waiting(bench.api, streams):
                more_kib = 1024 * (resident_mib(bench.coordinator.pid) - before_mib)
                if before.done():
                    raise LlamaclustError(
                        f"{streams} streams were not open before token {_FIRST}; choose fewer --streams"
                    )
                await before
                begun_s, used_s = perf_counter(), processor_s(bench.coordinator)
                await _events(reader, _LAST - _FIRST)
                took_s, used_s = perf_counter() - begun_s, processor_s(bench.coordinator) - used_s
            writer.transport.abort()
        tokens = _LAST - _FIRST
        kib = {"KiB a stream": more_kib / streams} if streams else {}
        return {"tok/s": tokens / took_s, "coordinator ms": 1e3 * used_s / tokens, **kib}


async def _events(reader: asyncio.StreamReader, count: int) -> None:
    for _ in range(count):
        if not await event(reader):
            raise LlamaclustError("the answer ended early")


@asynccontextmanager
async def _waiting(api: str, streams: int) -> AsyncIterator[None]:
    room = asyncio.Semaphore(_AT_ONCE)

    async def one() -> Connection:
        async with room:
            reader, writer = await requested(api, {**_BODY, "max_tokens": 1})
            if b" 200 " not in (status := await reader.readline()):
                raise LlamaclustError(f"a stream was refused: {status.decode()}")
            return reader, writer

    opened = await asyncio.gather(*(one() for _ in range(streams)))
    try:
        yield
    finally:
        for _, writer in opened:
            writer.transport.abort()
