from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from runner.case import Case, Group, Measures, argument, option
from runner.clusters import Bench, Layout, running
from runner.options import positive
from runner.streams import answer

from llamaclust.cluster.config.catalog import resolve_model

_OWN_TOKENS, _TOKENS = 8, 8
_QUIET_S = 2.5
"""Seconds without a write (two heartbeats) after which all KV memory counts as written."""
_WRITTEN = "llamaclust_worker_kv_disk_written_bytes_total{"


@dataclass(frozen=True)
class KvDisk(Case):
    """Measures the time to the first token after a full restart, if a long shared prefix is read from disk.
    The first cluster computes the prefix and writes its KV memory. The second cluster answers another prompt with the
    same prefix. Both clusters' answers to the first prompt must have equal ids and logprobs. Clients measure times."""

    rounds = 3
    model: str = argument("catalog name or path of a .gguf", str, default="smollm2-135m-instruct")
    workers: int = option(2, "number of workers in the cluster", positive)
    threads: int = option(1, "number of threads of each worker", positive)
    prefix: int = option(4000, "number of tokens in the shared prefix", positive)
    damage: bool = option(False, "damage each file of KV memory before the restart, by flipping a byte")

    async def groups(self) -> AsyncIterator[Group]:
        with TemporaryDirectory(prefix="llamaclust-") as home:
            variants = {
                "computed": partial(self._computed, Path(home)),
                "restarted": partial(self._restarted, Path(home)),
            }
            yield Group("", variants, {"first s": ""}, in_order=True)

    async def _computed(self, home: Path, turn: int) -> Measures:
        async with self._cluster(home) as bench:
            found = await answer(bench.api, self._prompt(turn, 0), _TOKENS, logprobs=0)
            await _written(bench.api)
        size_mib = sum(path.stat().st_size for path in (home / "kv").glob("*.kv")) / (1 << 20)
        return {"first s": found.first_s, "MiB on disk": size_mib, "answer": found.bits}

    async def _restarted(self, home: Path, turn: int) -> Measures:
        if self.damage:
            flip_bytes(home / "kv")
        async with self._cluster(home) as bench:
            first_s = (await answer(bench.api, self._prompt(turn, 1), _TOKENS)).first_s
            again = await answer(bench.api, self._prompt(turn, 0), _TOKENS, logprobs=0)
        return {"first s": first_s, "answer": again.bits}

    @asynccontextmanager
    async def _cluster(self, home: Path) -> AsyncIterator[Bench]:
        names = Layout(workers=self.workers).names
        workers = [{"name": name, "threads": self.threads, "kv_disk": "4GiB"} for name in names]
        keys = {"workers": workers, "context_length": self.prefix + 64}
        keys |= {"objective": "throughput"} if self.workers > 1 else {}
        layout = Layout(workers=self.workers, keys=keys, home=home)
        async with running(resolve_model(self.model), layout) as (bench, _):
            await answer(bench.api, range(20, 28), _TOKENS)
            yield bench

    def _prompt(self, turn: int, own: int) -> list[int]:
        prefix, end = random.Random(turn), random.Random(-1 - own)
        tokens = [prefix.randrange(20, 300) for _ in range(self.prefix)]
        return [*tokens, *(end.randrange(20, 300) for _ in range(_OWN_TOKENS))]


async def _written(api: str) -> None:
    before, since_s = -1.0, time.monotonic()
    async with httpx.AsyncClient(base_url=api, trust_env=False, timeout=60.0) as client:
        while time.monotonic() - since_s < _QUIET_S:
            lines = (await client.get("/metrics")).text.splitlines()
            now = sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(_WRITTEN))
            if now != before:
                before, since_s = now, time.monotonic()
            await asyncio.sleep(0.1)


def flip_bytes(folder: Path) -> None:
    for path in sorted(folder.glob("*.kv")):
        with path.open("r+b") as file:
            file.seek(-1 - path.stat().st_size // 3, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
