"""One answer without and with drafted tokens, in turns on one engine: both must have the same tokens and logprobs."""

from __future__ import annotations

import asyncio
import struct
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))
from runner.in_process import cluster_of

from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.launchers.in_process import LocalPipeline, LocalSettings, LocalStage
from llamaclust.cluster.scheduler.drafting.drafter import Drafters
from llamaclust.cluster.scheduler.requests import Finished, GenerationRequest, TokenSampled
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.core.errors import LlamaclustError
from llamaclust.model.loader import Model

CONTEXT = 1024
_OF_CLUSTERS = "llamaclust.cluster.control.limits.NgramDrafters"


@dataclass(frozen=True, slots=True)
class Served:
    engine: Engine
    model: Model

    @property
    def vocabulary(self) -> int:
        return self.model.hyperparameters.vocabulary_size


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer and its course."""

    tokens: tuple[int, ...]
    logprobs: bytes  # float32, one a token
    arrived_ns: tuple[int, ...]  # of each token
    tok_s: float  # behind the first token
    drafted: int
    accepted: int
    ttft_ms: float

    @property
    def token_ns(self) -> float:
        return 1e9 / self.tok_s


@dataclass(frozen=True, slots=True)
class Pair:
    plain: Answered
    drafted: Answered

    @property
    def gain(self) -> float:
        return self.drafted.tok_s / self.plain.tok_s


@asynccontextmanager
async def served(
    path: Path, stages: int, threads: int, drafters: Drafters, *, mtp: bool = False
) -> AsyncIterator[Served]:
    """One stage is in this process, with so many threads; several are workers of one thread each on this machine.
    `mtp`: the model's own head drafts too."""
    if stages == 1:
        context = _context(path)
        own = LocalSettings(context_length=context, kv_blocks=16 * -(-context // 16), mtp=mtp)
        stage = LocalStage(path, threads, None, own)
        settings = replace(stage.scheduling, speculation=SpeculationSettings(drafters, mtp=mtp))
        with stage.model:
            async with Engine(LocalPipeline(stage), settings) as engine:
                yield Served(engine, stage.model)
        return
    with drafting_with(drafters):
        async with cluster_of(stages, path, f"speculative={{mtp: {mtp}}}") as cluster:
            yield Served(cluster.engine, cluster.model)


@contextmanager
def drafting_with(drafters: Drafters) -> Iterator[None]:
    """Clusters that open meanwhile draft with these."""
    with patch(_OF_CLUSTERS, lambda: drafters):
        yield


def _context(path: Path) -> int:
    with Model.open(path) as model:
        return min(CONTEXT, model.hyperparameters.context_length)


async def answer(engine: Engine, request: GenerationRequest) -> Answered:
    stream = engine.submit(request)
    rows, arrived_ns = [], []
    async for event in stream:
        if isinstance(event, TokenSampled):
            rows.append(event.row)
            arrived_ns.append(perf_counter_ns())
        elif isinstance(event, Finished):
            return Answered(
                tuple(row.token for row in rows),
                struct.pack(f"<{len(rows)}f", *(row.logprob for row in rows)),
                tuple(arrived_ns),
                event.timings.decode_tok_s,
                event.timings.drafted_tokens,
                event.timings.accepted_tokens,
                event.timings.ttft_ms,
            )
    raise AssertionError("a request ends with Finished")


async def pair(engine: Engine, request: GenerationRequest, turn: int) -> Pair:
    """Both ways to one answer; which is first changes with the turn. LlamaclustError where they differ."""
    ways = [replace(request, max_drafted=0), request]
    if turn % 2:
        ways.reverse()
    by_way = {way.max_drafted: await answer(engine, way) for way in ways}
    both = Pair(by_way[0], by_way[None])
    check_same(both.plain, both.drafted)
    return both


def summary(pairs: Sequence[Pair]) -> str:
    """Medians of both ways, and how many rows were drafted for it."""
    plain, drafted = (median(each.plain.tok_s for each in pairs), median(each.drafted.tok_s for each in pairs))
    accepted, tried = (sum(each.drafted.accepted for each in pairs), sum(each.drafted.drafted for each in pairs))
    return f"{plain:.1f} -> {drafted:.1f} tok/s, {accepted} of {tried} drafted tokens accepted"


def check_same(plain: Answered, drafted: Answered) -> None:
    if (plain.tokens, plain.logprobs) != (drafted.tokens, drafted.logprobs):
        pairs = zip(plain.tokens, drafted.tokens, strict=False)
        place = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        what = "its logprobs differ" if place is None else f"token {place} differs"
        raise LlamaclustError(f"an answer of {len(plain.tokens)} tokens changes with drafted tokens: {what}")


async def together(engine: Engine, requests: list[GenerationRequest]) -> tuple[list[Answered], float]:
    """Answers of requests that run at the same time, and tokens a second of all of them."""
    begun_ns = perf_counter_ns()
    answers = await asyncio.gather(*(answer(engine, request) for request in requests))
    return answers, sum(len(each.tokens) for each in answers) / (perf_counter_ns() - begun_ns) * 1e9
