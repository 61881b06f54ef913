"""Throughput of short requests with the journal of admissions, relative to a coordinator without one.

    python benchmarks/clusters/journal.py MODEL.gguf [--requests 1000] [--pairs 15] [--connections 64] [--tokens 4]
        [--state-dir FOLDER]

Two clusters of one worker each stand side by side; bursts of streamed requests go to them in turns, in pairs of
alternating order. Prints requests per second and the coordinator's processor time per request, and the medians of the
ratios. The journal lies in the folder of temporary files, or in `--state-dir`: choose a disk, not a tmpfs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from urllib.parse import urlsplit

import psutil
from running import Layout, running

_CONTEXT_TOKENS = 128
_WITHOUT = """
from llamaclust.wire.rpc.grpc_options import tune_grpc
tune_grpc()
from llamaclust.cluster.server import front
from llamaclust.cli.main import main
class Replies(front.Replies):
    def __init__(self, settings, durability):
        super().__init__(settings)
    async def restore(self, requests):
        pass
front.Replies = Replies
main()
"""
"""The program, whose replies are not journalled."""


@dataclass(frozen=True, slots=True)
class Burst:
    requests_s: float
    coordinator_ms: float  # of processor time, a request


@dataclass(frozen=True, slots=True)
class Server:
    api: str
    process: psutil.Process

    async def burst(self, requests: int, connections: int, tokens: int) -> Burst:
        numbers = iter(range(requests))
        before, begun_s = _cpu_s(self.process), time.perf_counter()
        await asyncio.gather(*(self._connection(numbers, tokens) for _ in range(connections)))
        seconds = time.perf_counter() - begun_s
        return Burst(requests / seconds, 1e3 * (_cpu_s(self.process) - before) / requests)

    async def _connection(self, numbers: Iterator[int], tokens: int) -> None:
        """Requests one after the other, by a client that takes little time itself."""
        where = urlsplit(self.api)
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        for number in numbers:
            body = {"prompt": f"{number} words", "max_tokens": tokens, "stream": True, "ignore_eos": True}
            content = json.dumps(body).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            answer = await reader.readuntil(b"\r\n0\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 200") or b"data: [DONE]" not in answer:
                raise SystemExit(f"no answer: {answer[:300]!r}")
        writer.close()


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def compare(with_journal: Server, without: Server, given: argparse.Namespace) -> None:
    print(f"{'':6}{'with':>10}{'without':>10} requests/s{'ratio':>8}{'with':>10}{'without':>10} ms{'ratio':>8}")
    rates, times = [], []
    for pair in range(-1, given.pairs):
        order = (with_journal, without) if pair % 2 else (without, with_journal)
        found = {server: await server.burst(given.requests, given.connections, given.tokens) for server in order}
        kept, bare = found[with_journal], found[without]
        if pair < 0:
            continue  # to warm up
        rates.append(kept.requests_s / bare.requests_s)
        times.append(kept.coordinator_ms / bare.coordinator_ms)
        print(
            f"{pair:6}{kept.requests_s:10.1f}{bare.requests_s:10.1f}           {rates[-1]:8.3f}"
            f"{kept.coordinator_ms:10.3f}{bare.coordinator_ms:10.3f}   {times[-1]:8.3f}",
            flush=True,
        )
    for what, ratios in (("throughput", rates), ("coordinator's processor time", times)):
        low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        print(f"{what} with the journal / without: median {median(ratios):.3f} (quartiles {low:.3f}, {high:.3f})")


async def run(given: argparse.Namespace) -> None:
    more = 2 * given.connections
    layout = Layout(workers=1, keys={"context_length": _CONTEXT_TOKENS, "max_sequences": 64, "max_waiting": more})
    command = (sys.executable, "-P", "-c", _WITHOUT)
    async with running(given.model, layout) as (bench, process), running(given.model, layout, command) as (bare, other):
        servers = (Server(bench.api, psutil.Process(process.pid)), Server(bare.api, psutil.Process(other.pid)))
        await compare(*servers, given)
        if not bench.directory.has_requests or bare.directory.has_requests:
            raise SystemExit("one cluster was to have requests in its journal, the other none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=1000, help="of one burst")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--state-dir", type=Path, help="an existing folder")
    given = parser.parse_args()
    if given.state_dir is not None:
        tempfile.tempdir = str(given.state_dir)
    asyncio.run(run(given))


if __name__ == "__main__":
    main()
