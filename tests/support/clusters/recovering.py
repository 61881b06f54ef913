"""Clusters of real processes for tests that end or stop workers, and the answers that requests must still give."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random

import psutil
import pytest

from llamaclust.cluster.client.local import LocalClient
from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.engine.engine import EngineState
from llamaclust.cluster.engine.lane import Lane
from llamaclust.cluster.launchers.in_process import LocalSettings
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.scheduler.requests import GenerationRequest, PromptEmbedded, PromptScored, TokenSampled
from llamaclust.cluster.server.coordinator import Cluster, open_cluster
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.events import Event, Notice, PlanMade
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.wire.microbatch.messages import Result
from support.models.tiny_model import build_tiny_model

Answer = tuple[tuple[int, bytes], ...]
"""Pairs (token id, the four bytes of its float32 logprob) of scored prompt tokens, then of generated tokens; first, if
requested, (position, bytes of all hidden states)."""

REQUESTS = 8
CONTEXT = 512
_SEEDED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.1)
_SPEED = {"threads": 1, "memory_bandwidth_gb_s": 20.0, "int8_gmac_s": 300.0}


@cache
def model_in(folder: Path) -> Path:
    return build_tiny_model(folder / "tiny.gguf", layers=6, context=CONTEXT)


def generations(seed: int, tokens: int = 120, longest: int = 90) -> tuple[GenerationRequest, ...]:
    """Builds requests, half of them greedy, half seeded, one with scores of its prompt, two with a common beginning."""
    source = Random(seed)
    prompts = [[source.randrange(3, 320) for _ in range(source.randrange(20, longest))] for _ in range(REQUESTS)]
    prompts[3] = prompts[2][:16] + prompts[3]
    return tuple(
        GenerationRequest(
            f"request {i}",
            tuple(prompt),
            tokens,
            _SEEDED if i % 2 else SamplingParams(),
            seed=i,
            score_from=1 if i == REQUESTS - 1 else None,
        )
        for i, prompt in enumerate(prompts)
    )


def undisturbed(model: Path, requests: Sequence[GenerationRequest]) -> list[Answer]:
    """Returns the answers of one worker that runs each request alone."""

    async def run() -> list[Answer]:
        client = LocalClient(model, threads=1, settings=LocalSettings(CONTEXT, speculation=False))
        async with client._stage.serve() as service:
            return [await answer_of(service._engine.submit(generation)) for generation in requests]

    return asyncio.run(run())


async def answer_of(events: AsyncIterable[object], on_token: Callable[[], None] = lambda: None) -> Answer:
    rows: list[RowResult] = []
    hidden: list[tuple[int, bytes]] = []
    async for event in events:
        match event:
            case PromptScored():
                rows += event.rows
            case PromptEmbedded():
                hidden.append((event.start, event.data))
            case TokenSampled():
                rows.append(event.row)
                on_token()
    return (*_joined(hidden), *((row.token, struct.pack("<f", row.logprob)) for row in rows))


def _joined(hidden: list[tuple[int, bytes]]) -> Answer:
    """Joins the pieces of hidden states."""
    return ((hidden[0][0], b"".join(data for _, data in hidden)),) if hidden else ()


@dataclass
class Recovering:
    """A running cluster, and the notices that it has reported."""

    cluster: Cluster
    told: list[str]
    on_event: Callable[[str], None] = lambda text: None
    tokens: int = 0  # received by clients
    _token: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self, requests: Sequence[GenerationRequest]) -> list[asyncio.Task[Answer]]:
        return [
            asyncio.create_task(answer_of(self.cluster.engine.submit(generation), on_token=self._count))
            for generation in requests
        ]

    def _count(self) -> None:
        self.tokens += 1
        self._token.set()

    async def token(self, number: int) -> None:
        """Waits until clients have received `number` tokens."""
        while self.tokens < number:
            self._token.clear()
            await self._token.wait()

    async def at_work(self) -> None:
        """Waits until a microbatch is in flight."""
        await self.until("a microbatch", lambda: self.cluster.engine.scheduler.counts.in_flight > 0)

    async def both_epochs(self) -> None:
        """Waits until requests run on an old epoch beside the new one. Results are held back until then, since a fast
        machine could otherwise answer all requests before the layers are loaded."""
        engine, held = self.cluster.engine, list[tuple[Lane, Sequence[Result]]]()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(engine, "completed", lambda lane, results: held.append((lane, results)))
            await self.until("a retirement", lambda: engine.retirement is not None)
        for lane, results in held:
            engine.completed(lane, results)

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The workers of each group of the serving epoch."""
        return [members for members in self.cluster.supervisor.epoch.plan.chain if len(members) > 1]

    def worker(self, name: str) -> WorkerHandle:
        return self.cluster.registry.workers[name]

    def hurt(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.worker(name).registration.pid, number)

    async def until(self, what: str, happens: Callable[[], bool], within_s: float = 60.0) -> None:
        """Waits until `happens()` is true; fails after `within_s`."""
        end = asyncio.get_running_loop().time() + within_s
        while not happens():
            assert asyncio.get_running_loop().time() < end, f"not within {within_s:g} s: {what}; told: {self.told}"
            await asyncio.sleep(0.002)

    @property
    def is_whole(self) -> bool:
        """True if all workers hold layers of one epoch, and the cluster is ready."""
        epoch, state = self.cluster.supervisor.epoch.number, self.cluster.engine.state
        names = (worker.name for worker in self.cluster.config.workers)
        return state is EngineState.READY and all(list(self.worker(name).stages) == [epoch] for name in names)

    async def whole(self) -> None:
        """Waits until all workers hold layers of one epoch and the cluster is ready."""
        await self.until("all workers at work", lambda: self.is_whole)


def worker_pids() -> dict[str, int]:
    """Returns the process ids of this process's workers by name."""
    found = {}
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # a process that has just ended
            words = child.cmdline()
            if "llamaclust.worker" in words:
                found[words[words.index("--name") + 1]] = child.pid
    return found


def config(model: Path, folder: Path, workers: int | list[dict[str, object]] = 3, **values: object) -> ClusterConfig:
    base: dict[str, object] = {
        "model": str(model),
        "workers": ([{"name": name, **_SPEED} for name in "abcde"[:workers]] if isinstance(workers, int) else workers),
        "objective": "throughput",
        "context_length": CONTEXT,
        "state_dir": folder,
        "timeouts": {"worker": "3s"},
    }
    return ClusterConfig.model_validate({**base, **values})


@asynccontextmanager
async def recovering(
    settings: ClusterConfig, *, at_plan: Callable[[], None] = lambda: None, deadline_s: float = 120.0
) -> AsyncIterator[Recovering]:
    """Runs a cluster for at most `deadline_s`; calls `at_plan` at the first plan."""
    told: list[str] = []
    plans: list[Event] = []
    running: list[Recovering] = []

    def report(event: Event) -> None:
        if isinstance(event, Notice):
            told.append(event.text)
            for run in running:
                run.on_event(event.text)
        elif isinstance(event, PlanMade) and not plans:
            plans.append(event)
            at_plan()

    directory = ClusterDir(settings.state_dir / settings.name)
    with directory.locked():
        async with (
            asyncio.timeout(deadline_s),
            open_cluster(settings, [Path(settings.model)], directory, report) as cluster,
        ):
            running.append(Recovering(cluster, told))
            yield running[0]
