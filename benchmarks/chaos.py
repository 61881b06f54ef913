"""Kills and stops workers at random while requests run, and compares every answer with an undisturbed run's.

    python benchmarks/chaos.py MODEL.gguf [--seed N] [--faults 200] [--seconds S]

Prints how many tokens were lost or changed (token ids and logprob bits), how soon losses were noticed, and how long
requests paused: from the fault to the next token of any of them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import struct
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

from llamaclust.wire.tuning import tune_grpc

tune_grpc()

from llamaclust.cluster.config import load_config  # noqa: E402
from llamaclust.cluster.coordinator import Cluster, open_cluster  # noqa: E402
from llamaclust.cluster.engine import EngineState  # noqa: E402
from llamaclust.cluster.requests import Generation, TokenChosen  # noqa: E402
from llamaclust.cluster.state import ClusterDir  # noqa: E402
from llamaclust.wire.messages import SamplingParams  # noqa: E402

_SEQUENCES = 8
_TOKENS = 192
_PROMPT_TOKENS = 64
_LIVES = 4  # that one worker may lose in a minute: the launcher gives up after a few more
_HANGS = 0.1  # share of faults
_SEEDED = SamplingParams(temperature=0.8, top_k=40, top_p=0.95)

Answer = list[tuple[int, bytes]]


@dataclass
class Tally:
    """What was seen."""

    faults: int = 0
    lost: int = 0  # tokens that did not come
    changed: int = 0
    kill_noticed_s: list[float] = field(default_factory=list)
    hang_noticed_s: list[float] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)  # after kills
    last_token_s: float = 0.0

    def compare(self, expected: Sequence[Answer], answers: Sequence[Answer]) -> None:
        for want, got in zip(expected, answers, strict=True):
            self.lost += max(0, len(want) - len(got))
            self.changed += sum(one != other for one, other in zip(want, got, strict=False))

    def show(self, recoveries: int) -> None:
        print(f"{self.faults} faults, {recoveries} recoveries: {self.lost} tokens lost, {self.changed} changed")
        for what, times in (
            ("kill noticed", self.kill_noticed_s),
            ("hang noticed", self.hang_noticed_s),
            ("pause after a kill", self.pauses_s),
        ):
            if times:
                print(f"{what}: median {median(times):.3f} s, longest {max(times):.3f} s of {len(times)}")


async def answer(cluster: Cluster, ask: Generation, tally: Tally) -> Answer:
    rows: Answer = []
    async for event in cluster.engine.submit(ask):
        if isinstance(event, TokenChosen):
            tally.last_token_s = time.monotonic()
            rows.append((event.row.token, struct.pack("<f", event.row.logprob)))
    return rows


def asks(source: Random) -> list[Generation]:
    """Half greedy, half seeded."""
    return [
        Generation(
            f"r{i}",
            tuple(source.randrange(100, 40_000) for _ in range(_PROMPT_TOKENS)),
            _TOKENS,
            _SEEDED if i % 2 else SamplingParams(),
            seed=i,
        )
        for i in range(_SEQUENCES)
    ]


async def until(happens: Callable[[], bool], limit_s: float = 120.0) -> None:
    end = time.monotonic() + limit_s
    while not happens():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {limit_s:g} s")
        await asyncio.sleep(0.001)


async def fault(cluster: Cluster, tally: Tally, source: Random, kills: dict[str, deque[float]]) -> None:
    """One worker is killed or stopped; returns when requests go on."""
    now = time.monotonic()
    rested = [n for n in cluster.registry.present if len(kills[n]) < _LIVES or now - kills[n][0] > 60.0]
    if not rested:
        await asyncio.sleep(1.0)
        return
    name = source.choice(rested)
    kills[name].append(now)
    worker, hangs = cluster.registry.workers[name], source.random() < _HANGS
    serves = worker in cluster.supervisor.epoch.workers
    os.kill(worker.registration.pid, signal.SIGSTOP if hangs else signal.SIGKILL)
    begun = time.monotonic()
    tally.faults += 1
    await until(worker.lost.is_set)
    (tally.hang_noticed_s if hangs else tally.kill_noticed_s).append(time.monotonic() - begun)
    await until(lambda: cluster.engine.state is EngineState.READY)
    if serves and not hangs and cluster.engine.scheduler.sequences:
        ready = time.monotonic()
        await until(lambda: tally.last_token_s > ready or not cluster.engine.scheduler.sequences)
        tally.pauses_s.append(time.monotonic() - begun)


async def chaos(cluster: Cluster, seed: int, faults: int, seconds: float) -> Tally:
    source, tally = Random(seed), Tally()
    requests = asks(source)
    expected = await asyncio.gather(*(answer(cluster, ask, tally) for ask in requests))
    kills = {worker.name: deque[float](maxlen=_LIVES) for worker in cluster.config.workers}
    end = time.monotonic() + seconds
    while tally.faults < faults and time.monotonic() < end:
        running = [asyncio.create_task(answer(cluster, ask, tally)) for ask in requests]
        while tally.faults < faults and not all(task.done() for task in running):
            await asyncio.sleep(source.uniform(0.0, 1.5))
            await fault(cluster, tally, source, kills)
        tally.compare(expected, await asyncio.gather(*running))
    return tally


async def run(model: Path, seed: int, faults: int, seconds: float, workers: int) -> None:
    names = "abcdefgh"[:workers]
    alike = ", ".join(f"{{name: {name}, threads: 1, bandwidth: 20, int8: 300}}" for name in names)
    overrides = [f"model={model}", f"workers=[{alike}]", "objective=throughput", "context_length=1024"]
    with tempfile.TemporaryDirectory(prefix="llamaclust-chaos-") as folder:
        directory = ClusterDir(Path(folder) / "chaos")
        with directory.locked():
            async with open_cluster(load_config(None, overrides), model, directory) as cluster:
                tally = await chaos(cluster, seed, faults, seconds)
                tally.show(cluster.supervisor.recoveries)
                if tally.lost or tally.changed:
                    raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=3600.0, help="no new requests after that")
    parser.add_argument("--workers", type=int, default=3)
    given = parser.parse_args()
    print(f"seed {given.seed}")
    asyncio.run(run(given.model, given.seed, given.faults, given.seconds, given.workers))


if __name__ == "__main__":
    main()
