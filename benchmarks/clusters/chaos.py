"""Kills and stops workers at random while requests run, and compares every answer with an undisturbed run's.

    python benchmarks/clusters/chaos.py MODEL.gguf [--faults 200] [--seed N] [--streams 32]
        [--workers 3 | --group 3 [--spares 1]] [--launcher local|static] [--minutes M] [--silence 1] [--verbose]

Faults are SIGKILL and SIGSTOP of any worker: while it computes a prompt, while it decodes, while it loads layers, while
another loss is recovered from, and of two at once. Every worker has the model's file. Requests are greedy and sampled,
with penalties, two choices and top logprobs, with short and long prompts. The next fault comes as soon as requests go
on and two workers are there.

With `--group`, so many workers hold the first two thirds of the layers together, and one more has the rest: no other
worker can take their places, so requests wait until a lost one is started again. With `--spares` as well, the plan is
automatic: a group of so many workers has all layers, and others take the places of lost ones at once. Such workers are
stated to be slow, and their network to be fast, so that a group is the best plan. Each fault strikes a whole group.

Prints a table by kind of fault: how soon losses were noticed, how long requests paused (from the fault to the next
token of any of them), and how many tokens were lost or changed (ids and logprob bits).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import median

from llamaclust.wire.rpc.grpc_options import tune_grpc

tune_grpc()

from running import MOST_WORKERS, Bench, Layout  # noqa: E402

from llamaclust.cluster.config.cluster_config import load_config  # noqa: E402
from llamaclust.cluster.control.observations import Signal  # noqa: E402
from llamaclust.cluster.engine.engine import EngineState  # noqa: E402
from llamaclust.cluster.membership.worker_handle import WorkerHandle, WorkerState  # noqa: E402
from llamaclust.cluster.planner.links import COORDINATOR, Link, Links  # noqa: E402
from llamaclust.cluster.scheduler.requests import GenerationRequest, TokenSampled  # noqa: E402
from llamaclust.cluster.server.coordinator import Cluster, open_cluster  # noqa: E402
from llamaclust.cluster.state.events import Event, Notice  # noqa: E402
from llamaclust.core.errors import LlamaclustError  # noqa: E402
from llamaclust.core.sampling import SamplingParams  # noqa: E402
from llamaclust.model.loader import Model  # noqa: E402
from llamaclust.tools.chaos.received import Answer, answer_rows  # noqa: E402
from llamaclust.tools.chaos.tally import Comparison, p99  # noqa: E402

_CONTEXT_TOKENS = 1024
_TOKENS = 96
_PROMPT_TOKENS = (16, 64, 240)
_LATE = 4  # requests with longer prompts, that come where prefill is to be hit
_LATE_TOKENS = 16
_LATE_PROMPT_TOKENS = 480
_HANGS = 0.2  # share of faults
_PARAMS = (
    SamplingParams(),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.95),
    SamplingParams(repetition_penalty=1.1, frequency_penalty=0.2),
    SamplingParams(temperature=0.9, min_p=0.02, presence_penalty=0.3),
)
_TOP_LOGPROBS = (0, 0, 5)
_MOMENTS = ("prefill",) * 5 + ("decode",) * 7 + ("loading",) * 3 + ("recovery",) * 3 + ("two at once",) * 2
_TOGETHER = "two losses"
_SLOW = {"threads": 1, "memory_bandwidth_gb_s": 0.1, "int8_gmac_s": 2.0}
_NEAR = Link(one_way_s=1.6e-4, byte_s=1e-10, network_s=1e-5)


@dataclass(frozen=True, slots=True)
class Struck:
    worker: WorkerHandle
    number: signal.Signals
    at_s: float
    serves: bool  # it holds layers of the epoch that serves


@dataclass
class Outcome:
    """What was seen, by kind of fault: its moment and signal, or two losses."""

    faults: Counter[str] = field(default_factory=Counter)
    compared: Comparison = field(default_factory=Comparison)
    errors: Counter[str] = field(default_factory=Counter)
    noticed_s: dict[str, list[float]] = field(default_factory=dict)
    pauses_s: dict[str, list[float]] = field(default_factory=dict)
    last_token_s: float = 0.0

    @property
    def is_intact(self) -> bool:
        return self.compared.is_intact and not self.errors

    def show(self, recoveries: int) -> None:
        print(f"{'':20}{'faults':>8}{'noticed':>9}{'pauses':>8}{'median':>9}{'p99':>9}{'longest':>9} s")
        for kind in sorted(self.faults | Counter(self.pauses_s.keys())):
            self._row(kind, self.faults[kind], self.noticed_s.get(kind, []), self.pauses_s.get(kind, []))
        noticed = [seconds for times in self.noticed_s.values() for seconds in times]
        every = [seconds for times in self.pauses_s.values() for seconds in times]
        single = [seconds for kind, times in self.pauses_s.items() if kind != _TOGETHER for seconds in times]
        self._row("one loss", self.faults.total(), noticed, single)
        self._row("all", self.faults.total(), noticed, every)
        result = "nothing lost, nothing changed" if self.is_intact else "LOST OR CHANGED"
        print(f"{result}: {self.faults.total()} faults, {recoveries} recoveries, {self.errors.total()} requests failed")
        print(self.compared)
        for error, count in self.errors.most_common(3):
            print(f"{count} requests failed: {error}")

    @staticmethod
    def _row(kind: str, faults: int, noticed_s: Sequence[float], pauses_s: Sequence[float]) -> None:
        noticed = f"{median(noticed_s):9.3f}" if noticed_s else f"{'':9}"
        times = (median(pauses_s), p99(pauses_s), max(pauses_s)) if pauses_s else ()
        print(f"{kind:20}{faults:8}{noticed}{len(pauses_s):8}" + "".join(f"{seconds:9.3f}" for seconds in times))


def make_requests(
    source: Random, count: int, prompt_tokens: Sequence[int] = _PROMPT_TOKENS, tokens: int = _TOKENS
) -> list[GenerationRequest]:
    """Of mixed kinds; each fourth prompt has two choices."""
    requests: list[GenerationRequest] = []
    while len(requests) < count:
        number = len(requests)
        prompt = tuple(source.randrange(100, 40_000) for _ in range(source.choice(prompt_tokens)))
        for choice in range(min(count - number, 2 if source.random() < 0.25 else 1)):
            requests.append(
                GenerationRequest(
                    f"stream {number}-{choice}",
                    prompt,
                    tokens,
                    _PARAMS[number % len(_PARAMS)],
                    seed=number,
                    choice=choice,
                    top_logprobs=_TOP_LOGPROBS[number % len(_TOP_LOGPROBS)],
                    group=f"group {number}",
                )
            )
    return requests


def make_late_requests(source: Random) -> list[GenerationRequest]:
    prompts = [tuple(source.randrange(100, 40_000) for _ in range(_LATE_PROMPT_TOKENS)) for _ in range(_LATE)]
    return [GenerationRequest(f"late {i}", prompt, _LATE_TOKENS) for i, prompt in enumerate(prompts)]


async def until(happens: Callable[[], bool], limit_s: float = 120.0) -> None:
    end = time.monotonic() + limit_s
    while not happens():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {limit_s:g} s")
        await asyncio.sleep(0.001)


class Chaos:
    """Faults of one cluster, and requests that run meanwhile."""

    def __init__(self, cluster: Cluster, source: Random, faults: int, end_s: float, *, members: int = 0) -> None:
        """`members`: of the group that an automatic plan is to have before each fault."""
        self.outcome = Outcome()
        self._members = members
        self._cluster = cluster
        self._left = faults
        self._end_s = end_s
        self._source = source
        self._late = make_late_requests(source)
        self._expected: dict[str, Answer] = {}
        self._late_tasks: list[asyncio.Task[None]] = []

    @property
    def _is_over(self) -> bool:
        return self._left <= 0 or time.monotonic() > self._end_s

    async def run(self, streams: int) -> Outcome:
        requests = make_requests(self._source, streams)
        every = [*requests, *self._late]
        answers = await asyncio.gather(*map(self._answer, every))
        self._expected = {request.request_id: answer for request, answer in zip(every, answers, strict=True)}
        tasks = [asyncio.create_task(self._repeat(request)) for request in requests]
        while not self._is_over:
            await asyncio.sleep(self._source.uniform(0.0, 0.3))
            await self._incident()
        await asyncio.gather(*tasks, *self._late_tasks)
        return self.outcome

    async def _repeat(self, request: GenerationRequest) -> None:
        while not self._is_over:
            await self._compare(request, self._expected[request.request_id])

    async def _compare(self, request: GenerationRequest, expected: Answer) -> None:
        answer: Answer = []
        try:
            answer = await self._answer(request)
        except LlamaclustError as error:
            self.outcome.errors[str(error)] += 1
        self.outcome.compared.add(expected, answer)

    async def _answer(self, request: GenerationRequest) -> Answer:
        rows: Answer = []
        async for event in self._cluster.engine.submit(request):
            if isinstance(event, TokenSampled):
                self.outcome.last_token_s = time.monotonic()
                rows += answer_rows([event.row])
        return rows

    # -- faults ------------------------------------------------------------------------------------------------------

    @property
    def _present(self) -> list[WorkerHandle]:
        return list(self._cluster.registry.present.values())

    async def _incident(self) -> None:
        """One fault, or two; returns when requests go on."""
        self._cluster.launcher.reset_restarts()  # a worker may be killed more than six times a minute
        await until(lambda: len(self._present) > 1)
        if self._members:
            await form_group(self._cluster, self._members)
        moment = self._source.choice(_MOMENTS)
        if moment == "prefill":
            self._start_late()
            await until(lambda: self._cluster.engine.scheduler.counts.in_flight > 0)
            await asyncio.sleep(self._source.uniform(0.0, 0.15))
        among = await self._loading(provoke=True) if moment == "loading" else []
        first = "decode" if moment == "recovery" or (moment == "loading" and not among) else moment
        struck = await self._strike(first, among, victims=2 if moment == "two at once" else 1)
        if moment == "recovery" and self._left and (among := await self._loading(provoke=False)):
            struck += await self._strike(moment, among)
        await self._goes_on(first, struck)

    def _start_late(self) -> None:
        """Requests that run at the same time have different names."""
        late = self._source.choice(self._late)
        named = replace(late, request_id=f"{late.request_id}, {len(self._late_tasks)}")
        self._late_tasks.append(asyncio.create_task(self._compare(named, self._expected[late.request_id])))

    async def _loading(self, *, provoke: bool) -> list[WorkerHandle]:
        """Workers that load layers now. `provoke`: drains a worker, so that its layers move."""

        def loading() -> list[WorkerHandle]:
            return [worker for worker in self._present if worker.state is WorkerState.LOADING]

        pool, moving = self._cluster.pool.operations, None
        name = self._source.choice([worker.name for worker in self._cluster.config.workers])
        if provoke and not loading():
            moving = asyncio.create_task(pool.drain(name))
        try:
            await until(lambda: bool(loading()), 3.0)
            return loading()
        except TimeoutError:
            return []
        finally:
            if moving is not None:
                moving.cancel()
                await asyncio.gather(moving, return_exceptions=True)
                pool.undrain(name)

    async def _strike(self, moment: str, among: Sequence[WorkerHandle], victims: int = 1) -> list[Struck]:
        """Stops or kills several workers at once, by default of all. Returns when the cluster has noticed."""
        able = among or self._present
        struck = []
        for worker in self._source.sample(able, min(victims, len(able), self._left)):
            number = signal.SIGSTOP if self._source.random() < _HANGS else signal.SIGKILL
            with suppress(ProcessLookupError):
                os.kill(worker.registration.pid, number)
                serves = worker in self._cluster.supervisor.epoch.workers
                struck.append(Struck(worker, number, time.monotonic(), serves))
                self._left -= 1
        await asyncio.gather(*(self._notice(moment, strike) for strike in struck))
        return struck

    async def _notice(self, moment: str, struck: Struck) -> None:
        """A stopped worker of a static cluster goes on once it is lost: no launcher ends it."""
        await until(struck.worker.lost.is_set)
        kind = f"{moment} {struck.number.name}"
        self.outcome.faults[kind] += 1
        self.outcome.noticed_s.setdefault(kind, []).append(time.monotonic() - struck.at_s)
        if struck.number is signal.SIGSTOP and self._cluster.config.launcher == "static":
            os.kill(struck.worker.registration.pid, signal.SIGCONT)

    async def _goes_on(self, moment: str, struck: Sequence[Struck]) -> None:
        """Returns when there is a pipeline, and a token, again."""
        engine, supervisor = self._cluster.engine, self._cluster.supervisor
        await until(lambda: engine.state is EngineState.READY and supervisor.epoch.root_cause is None)
        ready_s = time.monotonic()
        if not any(strike.serves for strike in struck) or not engine.scheduler.sequences:
            return
        await until(lambda: self.outcome.last_token_s > ready_s or not engine.scheduler.sequences)
        if self.outcome.last_token_s > ready_s:
            kind = _TOGETHER if len(struck) > 1 else f"{moment} {struck[0].number.name}"
            self.outcome.pauses_s.setdefault(kind, []).append(self.outcome.last_token_s - struck[0].at_s)


def group_keys(given: argparse.Namespace) -> dict[str, object]:
    """Of a cluster file: a group by hand, or workers of which a group is the best plan."""
    if not given.spares:
        return {"plan": group_plan(given.model, given.group)}
    workers = [{"name": name, **_SLOW} for name in Layout(workers=given.workers).names]
    return {"workers": workers, "objective": "latency", "groups": given.group}


async def form_group(cluster: Cluster, members: int) -> None:
    """Returns when so many workers are a group, since the network is known to be fast, and no worker is suspected."""
    names, supervisor = [worker.name for worker in cluster.config.workers], cluster.supervisor
    await until(lambda: len(cluster.registry.present) == len(names))
    if supervisor.planner.update(Links({frozenset(pair): _NEAR for pair in combinations((COORDINATOR, *names), 2)})):
        supervisor.observed.post(Signal.LINKS_CHANGED)
    for name in names:
        cluster.pool.operations.undrain(name)
    await until(lambda: len(supervisor.epoch.plan.stages) == members and supervisor.retiring_epoch is None)


def group_plan(model: Path, members: int) -> list[dict[str, object]]:
    """A group of so many workers, and a stage behind it."""
    layers = Model.open(model).layer_count
    *group, last = list(Layout(workers=members + 1).names)
    return [
        {"workers": group, "layers": [0, layers * 2 // 3]},
        {"worker": last, "layers": [layers * 2 // 3, layers]},
    ]


async def run(given: argparse.Namespace) -> bool:
    keys = {
        "objective": "throughput",
        "context_length": _CONTEXT_TOKENS,
        "max_sequences": 2 * given.streams,
        "timeouts": {"worker": f"{given.silence:g}s"},
    }
    if given.group:
        keys |= group_keys(given)
    begun_s = time.monotonic()

    def report(event: Event) -> None:
        if given.verbose and isinstance(event, Notice):
            print(f"{time.monotonic() - begun_s:7.2f} s: {event.text}", flush=True)

    with tempfile.TemporaryDirectory(prefix="llamaclust-chaos-") as folder:
        layout = Layout(launcher=given.launcher, workers=given.workers, keys=keys)
        bench = Bench(given.model, layout, Path(folder))
        os.environ.update(bench.environment)
        async with bench.static_workers():
            with bench.directory.locked():
                config = load_config(bench.file)
                async with open_cluster(config, [given.model], bench.directory, report) as cluster:
                    end_s = time.monotonic() + 60.0 * given.minutes
                    members = given.group if given.spares else 0
                    chaos = Chaos(cluster, Random(given.seed), given.faults, end_s, members=members)
                    outcome = await chaos.run(given.streams)
                    recoveries = cluster.supervisor.recoveries
    outcome.show(recoveries)
    print(f"{time.monotonic() - begun_s:.0f} s in all")
    return outcome.is_intact


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=1e6, help="at most; the verdict is of the faults until then")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--workers", type=int, help="3 by default; not with --group, which has its own number")
    parser.add_argument("--group", type=int, default=0, help="workers that hold the first layers together")
    parser.add_argument("--spares", type=int, default=0, help="more workers than the group's, for an automatic plan")
    parser.add_argument("--launcher", choices=("local", "static"), default="local")
    parser.add_argument(
        "--silence", type=float, default=1.0, help="timeouts.worker in seconds (a cluster's default: 5)"
    )
    parser.add_argument("--verbose", action="store_true", help="print the cluster's events")
    given = parser.parse_args(arguments)
    if given.group == 1 or given.spares < 0 or (given.spares and not given.group):
        parser.error("--group: 2 members or more; --spares: so many workers beside these")
    if given.group and given.workers is not None:
        parser.error("--workers: a --group has its members, and --spares more, or one for the stage behind it")
    given.workers = given.group + max(1, given.spares) if given.group else given.workers or 3
    if not 1 < given.workers <= MOST_WORKERS:
        parser.error(f"{given.workers} workers: there may be 2 to {MOST_WORKERS}")
    return given


def main() -> None:
    given = parse(sys.argv[1:])
    print(
        f"seed {given.seed}, {given.launcher}, {given.workers} workers, {given.streams} streams, "
        f"timeouts.worker {given.silence:g} s",
        flush=True,
    )
    if not asyncio.run(run(given)):
        sys.exit(1)


if __name__ == "__main__":
    main()
