"""What streams cost that wait: one answer while a thousand other streams are open, and alone, in turns.

    python benchmarks/clusters/idle_streams.py [MODEL] [--streams 1000] [--threads 2] [--repeats 3]

The cluster computes one request at a time, so the others wait for their turn, with signs of life. Compared are tokens
a second of the same tokens of the answer, and processor time of the coordinator's process meanwhile; printed besides,
the memory that an open stream takes there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent.parent))

from measuring.options import positive
from streaming import Served, server

from llamaclust.tools.bench.limits import Spread

_FIRST, _LAST = 2000, 2400
"""Tokens between which time is measured: the others are open by then."""
_DEADLINE_S = 120.0
_AT_ONCE = 250

_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class Turn:
    """`processor_ms`: of the coordinator, a token."""

    tok_s: float
    processor_ms: float
    memory_kib: float  # of each stream that waits


async def asked(api: str, tokens: int) -> _Connection:
    """A streamed answer that has been asked for."""
    where = urlsplit(api)
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=1 << 20)
    values = {"prompt": "Once upon a time", "max_tokens": tokens, "min_tokens": tokens, "temperature": 0}
    body = json.dumps(values | {"speculative": False, "stream": True}).encode()
    fields = f"Host: {where.netloc}", "Content-Type: application/json", f"Content-Length: {len(body)}", "", ""
    writer.write("\r\n".join(("POST /v1/completions HTTP/1.1", *fields)).encode() + body)
    await writer.drain()
    return reader, writer


async def until_token(reader: asyncio.StreamReader, seen: int, wanted: int) -> None:
    """Reads events until so many have come, of which `seen` came before."""
    while seen < wanted:
        line = await reader.readline()
        if not line or line.startswith(b"data: [DONE]") or b'"error"' in line:
            raise SystemExit(f"the answer ended after {seen} tokens: {line.decode()}")
        seen += line.startswith(b"data: {")


@asynccontextmanager
async def waiting(api: str, streams: int) -> AsyncIterator[None]:
    """Streams that are open meanwhile."""
    room = asyncio.Semaphore(_AT_ONCE)

    async def one() -> _Connection:
        async with room:
            reader, writer = await asked(api, 1)
            if b" 200 " not in (status := await reader.readline()):
                raise SystemExit(f"a stream was refused: {status.decode()}")
            return reader, writer

    opened = await asyncio.gather(*(one() for _ in range(streams)))
    try:
        yield
    finally:
        for _, writer in opened:
            writer.transport.abort()


async def turn(served: Served, streams: int) -> Turn:
    async with asyncio.timeout(_DEADLINE_S):
        before_bytes = served.coordinator.memory_info().rss
        reader, writer = await asked(served.api, _LAST + 50)
        await until_token(reader, 0, 1)
        before = asyncio.create_task(until_token(reader, 1, _FIRST))  # read as they come, also while others are opened
        async with waiting(served.api, streams):
            more_bytes = served.coordinator.memory_info().rss - before_bytes
            if before.done():
                raise SystemExit(f"{streams} streams were not open before token {_FIRST}: ask for fewer with --streams")
            await before
            begun_s, processor_s = perf_counter(), served.processor_s
            await until_token(reader, _FIRST, _LAST)
            took_s, used_s = perf_counter() - begun_s, served.processor_s - processor_s
        writer.transport.abort()
    tokens = _LAST - _FIRST
    return Turn(tokens / took_s, used_s * 1e3 / tokens, more_bytes / max(streams, 1) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct", help="catalog name or path of a .gguf")
    parser.add_argument("--streams", type=positive, default=1000, help="that wait")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--repeats", type=positive, default=3, help="pairs")
    given = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    more = ["max_sequences=1", f"max_waiting={given.streams + 8}"]
    pairs: list[tuple[Turn, Turn]] = []
    with server(given.model, given.threads, 1, more) as served:
        asyncio.run(turn(served, given.streams))
        for _ in range(given.repeats):
            pairs.append((asyncio.run(turn(served, 0)), asyncio.run(turn(served, given.streams))))
            alone, beside = pairs[-1]
            print(f"alone {alone.tok_s:7.1f} tok/s   beside {beside.tok_s:7.1f}", flush=True)
    shares = Spread.of(beside.tok_s / alone.tok_s for alone, beside in pairs)
    print(f"{given.streams} waiting, beside / alone: {shares:.3f}")
    for which, turns in (("alone", [pair[0] for pair in pairs]), ("beside", [pair[1] for pair in pairs])):
        print(f"coordinator {which}: {Spread.of(each.processor_ms for each in turns):.3f} ms of processor time a token")
    print(f"memory: {Spread.of(pair[1].memory_kib for pair in pairs):.1f} KiB a stream, growth since the turn before")


if __name__ == "__main__":
    main()
