from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

from runner.case import Case, Group, Measures, argument, option
from runner.drafted import CONTEXT, RecordedDrafters, Served, chosen_right, measured, served, tokens_of
from runner.options import existing, listed, natural, positive, share
from runner.row_costs import measured as measured_costs

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.errors import UsageError

_PROMPT = 64
_GOALS = {0.95: ">= 0.85", 0.0: ">= 0.97"}
"""Goals for the ratio of the measured gain to the maximum gain, by acceptance."""


@dataclass(frozen=True)
class Replay(Case):
    """Measures the gain of drafted tokens by acceptance, which is the share of drafted tokens that are right.
    Drafts are recorded answers. The gain is compared with the maximum gain of drafting a fixed number of tokens per
    step, computed from measured times of microbatches with 1, 2 and more rows. With --together, random prompts are
    answered at the same time, with and without n-gram drafts. Drafts must not change tokens or logprobs."""

    warm = 1
    model: Path = argument("path of a .gguf", existing)
    acceptance: tuple[float, ...] = option(
        (0.0, 0.5, 0.8, 0.95, 1.0), "shares of drafted tokens that are right", listed(share)
    )
    stages: tuple[int, ...] = option(
        (1,), "numbers of stages: one runs in this process, several run in one-thread workers", listed(positive)
    )
    tokens: int = option(260, "number of tokens in an answer", positive)
    threads: int = option(os.cpu_count() or 1, "number of threads of a stage in this process", positive)
    together: int = option(0, "number of simultaneous requests to measure too, up to 8 (0: none)", natural)
    seed: int = option(1, "seed of prompts and drafts")
    drafters: RecordedDrafters = field(default_factory=RecordedDrafters, init=False)

    async def groups(self) -> AsyncIterator[Group]:
        if not 1 < self.tokens <= CONTEXT - _PROMPT or self.together > 8:
            raise UsageError(f"--tokens must be 2 to {CONTEXT - _PROMPT}, and --together must be 0 to 8")
        for stages in self.stages:
            threads = self.threads if stages == 1 else 1
            costs = measured_costs(self.model, threads, _PROMPT + self.tokens // 2)
            costs.show()
            async with served(self.model, stages, threads, self.drafters) as model:
                for acceptance in self.acceptance:
                    name = f"{stages} stages, acceptance {acceptance:g}"
                    ways = {
                        "plain": partial(self._measure, model, name, None),
                        "drafted": partial(self._measure, model, name, acceptance),
                    }
                    group = Group(name, ways, {"tok/s": ""})
                    yield group
                    allowed = costs.allowed_gain(acceptance)
                    gain, goal = median(group.ratios("drafted", "tok/s")), _GOALS.get(acceptance)
                    wanted = f", goal {goal}" if goal else ""
                    print(f"gain / {allowed:.2f}, which is allowed: {gain / allowed:.2f}{wanted}")
                if self.together:
                    ways = {way: partial(self._together, model, way == "plain") for way in ("plain", "drafted")}
                    yield Group(f"{stages} stages, {self.together} together, n-grams", ways, {"tok/s": ">= 0.98"})

    async def _measure(self, model: Served, name: str, acceptance: float | None, turn: int) -> Measures:
        request = self._request(model, f"{name} {turn}")
        if acceptance is not None:
            recorded = await tokens_of(model.engine, request)
            is_right = chosen_right(len(recorded), acceptance, random.Random(turn))
            self.drafters.record(request.prompt, recorded, is_right, model.vocabulary)
        return await measured(model.engine, request, plain=acceptance is None)

    async def _together(self, model: Served, plain: bool, turn: int) -> Measures:
        requests = [self._request(model, f"together {turn} {number}") for number in range(self.together)]
        return await measured(model.engine, *requests, plain=plain)

    def _request(self, model: Served, name: str) -> GenerationRequest:
        draw = random.Random(f"{self.seed} {name}")
        prompt = tuple(draw.randrange(model.vocabulary) for _ in range(_PROMPT))
        return GenerationRequest(name, prompt, self.tokens)
