from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from runner.case import Case, Group, Measures, argument, option
from runner.clusters import Bench, Layout, processor_s, running
from runner.options import existing, positive
from runner.streams import requested

from llamaclust.core.errors import LlamaclustError

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
"""The program `llamaclust` with a coordinator that keeps no journal of replies."""


@dataclass(frozen=True)
class Journal(Case):
    """Compares the throughput of short requests with and without the journal of admitted requests.
    Bursts of streamed requests go to two clusters in turns. The journal is in the folder of temporary files or in
    --state-dir. The folder should be on a disk, not on a tmpfs."""

    rounds = 15
    warm = 1
    model: Path = argument("path of a .gguf", existing)
    requests: int = option(1000, "number of requests per burst", positive)
    connections: int = option(64, "number of simultaneous connections", positive)
    tokens: int = option(4, "number of tokens in an answer", positive)
    state_dir: Path | None = option(None, "existing folder for the journal (default: a temporary folder)", Path)

    async def groups(self) -> AsyncIterator[Group]:
        if self.state_dir is not None:
            tempfile.tempdir = str(self.state_dir)
        keys = {"context_length": 128, "max_sequences": 64, "max_waiting": 2 * self.connections}
        layout, command = Layout(workers=1, keys=keys), (sys.executable, "-P", "-c", _WITHOUT)
        async with running(self.model, layout) as (kept, _), running(self.model, layout, command) as (bare, _):
            yield Group("", {"without": partial(self._burst, bare), "with": partial(self._burst, kept)})
            if not kept.directory.has_requests or bare.directory.has_requests:
                raise LlamaclustError("expected requests in one cluster's journal, and none in the other's")

    async def _burst(self, bench: Bench, turn: int) -> Measures:
        numbers = iter(range(self.requests))
        used_s, begun_s = processor_s(bench.coordinator), time.perf_counter()
        await asyncio.gather(*(self._connection(bench.api, numbers) for _ in range(self.connections)))
        took_s, used_s = time.perf_counter() - begun_s, processor_s(bench.coordinator) - used_s
        return {"requests/s": self.requests / took_s, "coordinator ms": 1e3 * used_s / self.requests}

    async def _connection(self, api: str, numbers: Iterator[int]) -> None:
        connection = None
        for number in numbers:
            body = {"prompt": f"{number} words", "max_tokens": self.tokens, "ignore_eos": True}
            connection = await requested(api, body, connection=connection)
            answer = await connection[0].readuntil(b"\r\n0\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 200") or b"data: [DONE]" not in answer:
                raise LlamaclustError(f"a request was not answered to its end: {answer[:300]!r}")
        if connection is not None:
            connection[1].close()
