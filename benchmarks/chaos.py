"""Kills and stops workers at random while requests run, and compares every answer with an undisturbed run's.

    python benchmarks/chaos.py MODEL.gguf [--seed N] [--faults 200] [--workers 5] [--silence 1] [--verbose]

Faults are SIGKILL and SIGSTOP of any worker: while it computes a prompt, while it decodes, while it loads layers, while
another loss is recovered from, and of two at once. Every worker has the model's file.

Prints how many tokens were lost or changed (token ids and logprob bits), how soon losses were noticed, and how long
requests paused: from the first fault to the next token of any of them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

from llamaclust.wire.rpc.grpc_options import tune_grpc

tune_grpc()

from llamaclust.cluster.config.cluster_config import load_config  # noqa: E402
from llamaclust.cluster.engine.engine import EngineState  # noqa: E402
from llamaclust.cluster.membership.worker_handle import WorkerHandle, WorkerState  # noqa: E402
from llamaclust.cluster.scheduler.requests import GenerationRequest, TokenSampled  # noqa: E402
from llamaclust.cluster.server.coordinator import Cluster, open_cluster  # noqa: E402
from llamaclust.cluster.state.directory import ClusterDir  # noqa: E402
from llamaclust.cluster.state.events import Event, Notice  # noqa: E402
from llamaclust.core.sampling import SamplingParams  # noqa: E402
from llamaclust.tools.chaos.tally import Answer, Comparison, answer_rows  # noqa: E402

_SEQUENCES = 8
_TOKENS = 192
_PROMPT_TOKENS = 64
_LATE = 4  # requests with longer prompts, that come where prefill is to be hit
_LATE_TOKENS = 16
_LATE_PROMPT_TOKENS = 240
_LIVES = 5  # that one worker may lose in a minute: the launcher gives it up after a few more
_HANGS = 0.2  # share of faults
_SEEDED = SamplingParams(temperature=0.8, top_k=40, top_p=0.95)
_MOMENTS = ("prefill",) * 5 + ("decode",) * 7 + ("loading",) * 3 + ("recovery",) * 3 + ("two at once",) * 2


@dataclass(frozen=True, slots=True)
class Struck:
    worker: WorkerHandle
    number: signal.Signals
    at_s: float
    serves: bool  # it holds layers of the epoch that serves


@dataclass
class Tally:
    """What was seen."""

    faults: Counter[str] = field(default_factory=Counter)  # by moment and signal
    compared: Comparison = field(default_factory=Comparison)
    noticed_s: dict[signal.Signals, list[float]] = field(
        default_factory=lambda: {signal.SIGKILL: [], signal.SIGSTOP: []}
    )
    pauses_s: dict[str, list[float]] = field(
        default_factory=lambda: {"after one SIGKILL": [], "after one SIGSTOP": [], "after two faults": []}
    )
    last_token_s: float = 0.0

    def show(self, recoveries: int) -> None:
        total, compared = self.faults.total(), self.compared
        print(
            f"{total} faults, {recoveries} recoveries: {compared.lost} tokens lost, {compared.changed} changed", end=" "
        )
        print(f"of {compared.tokens}")
        print(", ".join(f"{what}: {count}" for what, count in sorted(self.faults.items())))
        noticed = ((f"{number.name} noticed", times) for number, times in self.noticed_s.items())
        for what, times in (*noticed, *((f"pause {what}", times) for what, times in self.pauses_s.items())):
            if times:
                print(f"{what}: median {median(times):.3f} s, longest {max(times):.3f} s of {len(times)}")


def make_requests(source: Random, count: int, prompt_tokens: int, tokens: int, name: str) -> list[GenerationRequest]:
    """Half greedy, half seeded."""
    return [
        GenerationRequest(
            f"{name} {i}",
            tuple(source.randrange(100, 40_000) for _ in range(prompt_tokens)),
            tokens,
            _SEEDED if i % 2 else SamplingParams(),
            seed=i,
        )
        for i in range(count)
    ]


async def until(happens: Callable[[], bool], limit_s: float = 120.0) -> None:
    end = time.monotonic() + limit_s
    while not happens():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {limit_s:g} s")
        await asyncio.sleep(0.001)


class Chaos:
    """Faults of one cluster, and requests that run meanwhile."""

    def __init__(self, cluster: Cluster, seed: int, faults: int) -> None:
        self.tally = Tally()
        self._cluster = cluster
        self._left = faults
        self._source = Random(seed)
        self._requests = make_requests(self._source, _SEQUENCES, _PROMPT_TOKENS, _TOKENS, "early")
        self._late = make_requests(self._source, _LATE, _LATE_PROMPT_TOKENS, _LATE_TOKENS, "late")
        self._expected: dict[str, Answer] = {}
        self._running: dict[asyncio.Task[Answer], GenerationRequest] = {}
        self._struck_s = {worker.name: deque[float](maxlen=_LIVES) for worker in cluster.config.workers}

    async def run(self) -> Tally:
        every = [*self._requests, *self._late]
        answers = await asyncio.gather(*(self._answer(request) for request in every))
        self._expected = {request.request_id: answer for request, answer in zip(every, answers, strict=True)}
        while self._left > 0:
            for request in self._requests:
                self._start(request)
            while self._left > 0 and not all(task.done() for task in self._running):
                await asyncio.sleep(self._source.uniform(0.0, 1.0))
                await self._incident()
            for task, request in self._running.items():
                self.tally.compared.add(self._expected[request.request_id], await task)
            self._running.clear()
        return self.tally

    def _start(self, request: GenerationRequest) -> None:
        self._running[asyncio.create_task(self._answer(request))] = request

    async def _answer(self, request: GenerationRequest) -> Answer:
        rows: Answer = []
        async for event in self._cluster.engine.submit(request):
            if isinstance(event, TokenSampled):
                self.tally.last_token_s = time.monotonic()
                rows += answer_rows([event.row])
        return rows

    # -- faults ------------------------------------------------------------------------------------------------------

    @property
    def _rested(self) -> list[WorkerHandle]:
        """Connected workers that have restarts left."""
        now_s = time.monotonic()
        struck = self._struck_s
        return [
            worker
            for name, worker in self._cluster.registry.present.items()
            if len(struck[name]) < _LIVES or now_s - struck[name][0] > 60.0
        ]

    async def _incident(self) -> None:
        """One fault, or two; returns when requests go on."""
        if len(self._rested) < 2:
            await asyncio.sleep(1.0)
            return
        moment = self._source.choice(_MOMENTS)
        if moment == "prefill":
            self._start(self._source.choice(self._late))
            await until(lambda: self._cluster.engine.scheduler.counts.in_flight > 0)
            await asyncio.sleep(self._source.uniform(0.0, 0.15))
        among = await self._loading(provoke=True) if moment == "loading" else []
        first = "decode" if moment == "recovery" or (moment == "loading" and not among) else moment
        struck = await self._strike(first, among, victims=2 if moment == "two at once" else 1)
        if moment == "recovery" and self._left and (among := await self._loading(provoke=False)):
            struck += await self._strike(moment, among)
        await self._goes_on(struck)

    async def _loading(self, *, provoke: bool) -> list[WorkerHandle]:
        """Workers that load layers now. `provoke`: drains a worker, so that its layers move."""

        def loading() -> list[WorkerHandle]:
            return [worker for worker in self._rested if worker.state is WorkerState.LOADING]

        supervisor, moving, name = self._cluster.supervisor, None, self._source.choice(sorted(self._struck_s))
        if provoke and not loading():
            moving = asyncio.create_task(supervisor.pool.drain(name))
        try:
            await until(lambda: bool(loading()), 3.0)
            return loading()
        except TimeoutError:
            return []
        finally:
            if moving is not None:
                moving.cancel()
                await asyncio.gather(moving, return_exceptions=True)
                supervisor.pool.undrain(name)

    async def _strike(self, moment: str, among: Sequence[WorkerHandle], victims: int = 1) -> list[Struck]:
        """Stops or kills several workers at once, by default rested ones. Returns when the cluster has noticed."""
        able = among or self._rested
        struck = []
        for worker in self._source.sample(able, min(victims, len(able), self._left)):
            number = signal.SIGSTOP if self._source.random() < _HANGS else signal.SIGKILL
            serves = worker in self._cluster.supervisor.epoch.workers
            os.kill(worker.registration.pid, number)
            struck.append(Struck(worker, number, time.monotonic(), serves))
            self._struck_s[worker.name].append(struck[-1].at_s)
            self.tally.faults[f"{moment} {number.name}"] += 1
            self._left -= 1
        await asyncio.gather(*map(self._notice, struck))
        return struck

    async def _notice(self, struck: Struck) -> None:
        await until(struck.worker.lost.is_set)
        self.tally.noticed_s[struck.number].append(time.monotonic() - struck.at_s)

    async def _goes_on(self, struck: Sequence[Struck]) -> None:
        """Returns when there is a pipeline, and a token, again."""
        engine, supervisor = self._cluster.engine, self._cluster.supervisor
        await until(lambda: engine.state is EngineState.READY and supervisor.epoch.root_cause is None)
        ready_s = time.monotonic()
        if not any(strike.serves for strike in struck) or not engine.scheduler.sequences:
            return
        await until(lambda: self.tally.last_token_s > ready_s or not engine.scheduler.sequences)
        if self.tally.last_token_s > ready_s:
            what = "after two faults" if len(struck) > 1 else f"after one {struck[0].number.name}"
            self.tally.pauses_s[what].append(self.tally.last_token_s - struck[0].at_s)


async def run(model: Path, seed: int, faults: int, workers: int, heartbeat_timeout_s: float, verbose: bool) -> None:
    names = "abcdefgh"[:workers]
    alike = ", ".join(f"{{name: {name}, threads: 1, memory_bandwidth_gb_s: 20, int8_gmac_s: 300}}" for name in names)
    overrides = [f"model={model}", f"workers=[{alike}]", "objective=throughput", "context_length=1024"]
    overrides.append(f"timeouts.worker={heartbeat_timeout_s:g}s")
    begun_s = time.monotonic()

    def report(event: Event) -> None:
        if verbose and isinstance(event, Notice):
            print(f"{time.monotonic() - begun_s:7.2f} s: {event.text}")

    with tempfile.TemporaryDirectory(prefix="llamaclust-chaos-") as folder:
        directory = ClusterDir(Path(folder) / "chaos")
        with directory.locked():
            async with open_cluster(load_config(None, overrides), model, directory, report) as cluster:
                tally = await Chaos(cluster, seed, faults).run()
                tally.show(cluster.supervisor.recoveries)
    print(f"{time.monotonic() - begun_s:.0f} s in all")
    if not tally.compared.is_intact:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--workers", type=int, default=5)
    parser.add_argument(
        "--silence", type=float, default=1.0, help="timeouts.worker in seconds (a cluster's default: 5)"
    )
    parser.add_argument("--verbose", action="store_true", help="print the cluster's events")
    given = parser.parse_args()
    print(f"seed {given.seed}, {given.workers} workers, timeouts.worker {given.silence:g} s")
    asyncio.run(run(given.model, given.seed, given.faults, given.workers, given.silence, given.verbose))


if __name__ == "__main__":
    main()
