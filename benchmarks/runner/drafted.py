"""Measures answers with and without drafted tokens on one engine, and provides the drafters."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.launchers.in_process import LocalPipeline, LocalSettings, LocalStage
from llamaclust.cluster.scheduler.drafting.drafter import NO_DRAFT, Draft, Drafter, Drafters
from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafter
from llamaclust.cluster.scheduler.requests import Finished, GenerationRequest, TokenSampled
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.model.loader import Model
from runner.case import Measures
from runner.in_process import cluster_of

CONTEXT = 1024
_OF_CLUSTERS = "llamaclust.cluster.control.limits.NgramDrafters"
_CONFIDENCE = 0
"""The confidence class of recorded drafts. N-gram drafts have other classes."""


def chosen_right(count: int, acceptance: float, draw: random.Random) -> list[bool]:
    wrong = set(draw.sample(range(count), round((1 - acceptance) * count)))
    return [place not in wrong for place in range(count)]


class RecordedDrafters:
    """Takes drafts from recorded answers if a sequence begins with a recorded prompt, and otherwise from n-grams."""

    def __init__(self) -> None:
        self._drafts: dict[tuple[int, ...], tuple[int, ...]] = {}

    def record(self, prompt: tuple[int, ...], answer: Sequence[int], is_right: Sequence[bool], vocabulary: int) -> None:
        """Records an answer for later drafts. Where `is_right` is False, drafts get a wrong token."""
        pairs = zip(answer, is_right, strict=True)
        self._drafts[prompt] = tuple(token if right else (token + 1) % vocabulary for token, right in pairs)

    def of(self, key: Hashable) -> Drafter:
        return _RecordedDrafter(self._drafts)

    def ended(self, key: Hashable, tokens: Sequence[int]) -> None: ...


class NoDrafters:
    """Drafts nothing, so that only a draft model or the model's own head drafts."""

    def of(self, key: Hashable) -> Drafter:
        return self

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        return NO_DRAFT

    def ended(self, key: Hashable, tokens: Sequence[int]) -> None: ...


class _RecordedDrafter:
    def __init__(self, drafts: dict[tuple[int, ...], tuple[int, ...]]) -> None:
        self._drafts = drafts
        self._prompt_length = 0
        self._answer: tuple[int, ...] = ()
        self._other: NgramDrafter | None = None

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        if not self._prompt_length and self._other is None:
            self._find(tokens)
        if self._other is not None:
            return self._other.draft(tokens, most)
        start = len(tokens) - self._prompt_length
        drafted = self._answer[start : start + most]
        return Draft(drafted, _CONFIDENCE) if drafted else NO_DRAFT

    def _find(self, tokens: Sequence[int]) -> None:
        for prompt, answer in self._drafts.items():
            if tuple(tokens[: len(prompt)]) == prompt:
                self._prompt_length, self._answer = len(prompt), answer
                return
        self._other = NgramDrafter()


@dataclass(frozen=True, slots=True)
class Served:
    engine: Engine
    model: Model

    @property
    def vocabulary(self) -> int:
        return self.model.hyperparameters.vocabulary_size


@asynccontextmanager
async def served(
    path: Path, stages: int, threads: int, drafters: Drafters, *, mtp: bool = False
) -> AsyncIterator[Served]:
    """Serves a model. A single stage runs in this process with `threads` threads. Several stages run in local workers
    of one thread each. With `mtp`, the model's own head drafts too."""
    if stages == 1:
        with Model.open(path) as model:
            context = min(CONTEXT, model.hyperparameters.context_length)
        own = LocalSettings(context_length=context, kv_blocks=16 * -(-context // 16), mtp=mtp)
        stage = LocalStage(path, threads, None, own)
        settings = replace(stage.scheduling, speculation=SpeculationSettings(drafters, mtp=mtp))
        with stage.model:
            async with Engine(LocalPipeline(stage), settings) as engine:
                yield Served(engine, stage.model)
        return
    with patch(_OF_CLUSTERS, lambda: drafters):
        async with cluster_of(stages, path, f"speculative={{mtp: {mtp}}}") as cluster:
            yield Served(cluster.engine, cluster.model)


async def measured(engine: Engine, *requests: GenerationRequest, plain: bool) -> Measures:
    """Measures simultaneous requests. A single request's tokens per second do not include its first token."""
    chosen = [replace(each, max_drafted=0) if plain else each for each in requests]
    begun_s = asyncio.get_running_loop().time()
    found = await asyncio.gather(*(_answer(engine, each) for each in chosen))
    took_s = asyncio.get_running_loop().time() - begun_s
    times = [finished.timings for _, finished in found]
    tok_s = times[0].decode_tok_s if len(found) == 1 else sum(len(ids) for (ids, _), _ in found) / took_s
    counts = {
        "drafted": sum(each.drafted_tokens for each in times),
        "accepted": sum(each.accepted_tokens for each in times),
    }
    bits = repr([ids for (ids, _), _ in found]).encode() + b"".join(logprobs for (_, logprobs), _ in found)
    return {"tok/s": tok_s, "prompt ms": times[0].ttft_ms, **counts, "tokens or logprobs": bits}


async def tokens_of(engine: Engine, request: GenerationRequest) -> tuple[int, ...]:
    (ids, _), _ = await _answer(engine, replace(request, max_drafted=0))
    return ids


async def _answer(engine: Engine, request: GenerationRequest) -> tuple[tuple[tuple[int, ...], bytes], Finished]:
    rows = []
    async for event in engine.submit(request):
        if isinstance(event, TokenSampled):
            rows.append(event.row)
        elif isinstance(event, Finished):
            logprobs = struct.pack(f"<{len(rows)}f", *(row.logprob for row in rows))
            return (tuple(row.token for row in rows), logprobs), event
    raise AssertionError("a request ends with Finished")
