"""Moves layers while clients stream, and compares every answer with an undisturbed run's.

    python benchmarks/clusters/moves.py MODEL.gguf [--seed N] [--streams 8] [--tokens 192] [--workers 3] [--rounds 2]

In each round the last worker is drained, undrained (a rebalance), drained again, and joins as a new process. Prints the
largest gap between two tokens of a stream for each move, the median token time, and how long it took until the new plan
served and until the old epoch was freed. Exit code 1: a token was lost or changed (token ids and logprob bits).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

from llamaclust.wire.rpc.grpc_options import tune_grpc

tune_grpc()

from chaos import make_requests, until  # noqa: E402

from llamaclust.cluster.config.cluster_config import load_config  # noqa: E402
from llamaclust.cluster.scheduler.requests import GenerationRequest, TokenSampled  # noqa: E402
from llamaclust.cluster.server.coordinator import Cluster, open_cluster  # noqa: E402
from llamaclust.cluster.state.directory import ClusterDir  # noqa: E402
from llamaclust.tools.chaos.received import Answer, answer_rows  # noqa: E402
from llamaclust.tools.chaos.tally import Comparison  # noqa: E402

_PROMPT_TOKENS = (64,)
_STEADY_S = 3.0
_GAP_MEDIANS, _GAP_S = 3.0, 0.1
"""No gap may be longer than so many median token times, and so many seconds more."""


@dataclass
class Gaps:
    """Times between two tokens of a stream, since the last call of `take`."""

    seconds: list[float] = field(default_factory=list)
    all: list[float] = field(default_factory=list)

    def take(self) -> float:
        """The largest one."""
        largest = max(self.seconds, default=0.0)
        self.all += self.seconds
        self.seconds.clear()
        return largest


class Load:
    """Streams that send their next request when an answer has ended."""

    def __init__(self, cluster: Cluster, requests: list[GenerationRequest]) -> None:
        self.gaps = Gaps()
        self.compared = Comparison()
        self._cluster = cluster
        self._requests = requests
        self._expected: list[Answer] = []
        self._done = asyncio.Event()

    async def undisturbed(self) -> None:
        self._expected = await asyncio.gather(*map(self._answer, self._requests))
        self.gaps = Gaps()

    async def stream(self, number: int) -> None:
        while not self._done.is_set():
            self.compared.add(self._expected[number], await self._answer(self._requests[number]))

    def stop(self) -> None:
        self._done.set()

    async def _answer(self, request: GenerationRequest) -> Answer:
        rows: Answer = []
        last_s: float | None = None
        async for event in self._cluster.engine.submit(request):
            if isinstance(event, TokenSampled):
                now_s = time.monotonic()
                if last_s is not None:
                    self.gaps.seconds.append(now_s - last_s)
                last_s = now_s
                rows += answer_rows([event.row])
        return rows


class Moves:
    """Of one cluster under load."""

    def __init__(self, cluster: Cluster, load: Load) -> None:
        self._cluster = cluster
        self._load = load
        self._name = cluster.config.workers[-1].name
        self.largest: dict[str, float] = {}

    async def run(self, rounds: int) -> None:
        await self._steady("steady")
        for _ in range(rounds):
            await self._move("drain", self._drain)
            await self._move("rebalance", self._undrain)
            await self._move("drain", self._drain)
            await self._move("join", self._join)

    async def _steady(self, what: str) -> None:
        await asyncio.sleep(_STEADY_S)
        self._keep(what)

    def _keep(self, what: str) -> float:
        largest = self._load.gaps.take()
        self.largest[what] = max(largest, self.largest.get(what, 0.0))
        return largest

    async def _move(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        self._keep("steady")
        supervisor, before = self._cluster.supervisor, self._cluster.supervisor.epoch.number
        begun_s = time.monotonic()
        moving = asyncio.ensure_future(work())
        await until(lambda: supervisor.epoch.number != before)
        serves_s = time.monotonic() - begun_s
        await until(lambda: self._cluster.engine.retirement is None)
        freed_s = time.monotonic() - begun_s
        await moving
        await asyncio.sleep(0.5)
        largest = self._keep(what)
        print(f"{what}: new plan serves after {serves_s:.2f} s, old epoch empty after {freed_s:.2f} s", end=", ")
        print(f"largest gap {1e3 * largest:.0f} ms", flush=True)
        await self._steady("steady")

    async def _drain(self) -> None:
        await self._cluster.pool.operations.drain(self._name)

    async def _undrain(self) -> None:
        self._cluster.pool.operations.undrain(self._name)

    async def _join(self) -> None:
        """Its process is replaced while it holds no layers."""
        worker = self._cluster.registry.workers[self._name]
        os.kill(worker.registration.pid, signal.SIGKILL)
        await until(lambda: worker.loss is not None)
        self._cluster.pool.operations.undrain(self._name)


async def run(model: Path, given: argparse.Namespace) -> bool:
    names = "abcdefgh"[: given.workers]
    alike = ", ".join(f"{{name: {name}, threads: 1, memory_bandwidth_gb_s: 20, int8_gmac_s: 300}}" for name in names)
    overrides = [f"model={model}", f"workers=[{alike}]", "objective=throughput", "context_length=1024"]
    with tempfile.TemporaryDirectory(prefix="llamaclust-moves-") as folder:
        directory = ClusterDir(Path(folder) / "moves")
        with directory.locked():
            async with open_cluster(load_config(None, overrides), [model], directory, lambda event: None) as cluster:
                requests = make_requests(Random(given.seed), given.streams, _PROMPT_TOKENS, given.tokens)
                load = Load(cluster, requests)
                await load.undisturbed()
                streams = [asyncio.create_task(load.stream(number)) for number in range(given.streams)]
                moves = Moves(cluster, load)
                await moves.run(given.rounds)
                load.stop()
                await asyncio.gather(*streams)
                assert cluster.supervisor.recoveries == 0, "a move is no recovery"
    return show(load, moves.largest)


def show(load: Load, largest: dict[str, float]) -> bool:
    compared, token_s = load.compared, median(load.gaps.all)
    limit_s = _GAP_MEDIANS * token_s + _GAP_S
    print(f"{compared.answers} answers of {compared.tokens} tokens: {compared.lost} lost, {compared.changed} changed")
    gaps = ", ".join(f"{what} {1e3 * gap_s:.0f} ms" for what, gap_s in largest.items())
    print(f"median token time {1e3 * token_s:.1f} ms, largest gaps: {gaps}; limit {1e3 * limit_s:.0f} ms")
    return compared.is_intact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192, help="of each answer")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    if not asyncio.run(run(given.model, given)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
