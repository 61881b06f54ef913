from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from runner.case import Case, Group, Measures, argument, option
from runner.corpus import KINDS, Prompt, answer_tokens, prompts
from runner.drafted import Served, measured, served
from runner.options import chosen, existing, listed, positive

from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafters
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.sampler.params import SamplingParams

_GOALS = {"copy": ">= 3", "edit": ">= 3", "quote": ">= 1.3", "prose": ">= 0.97"}
_LEAST_TOKENS = 32
"""The minimum number of tokens in an answer that gives a meaningful rate."""


@dataclass(frozen=True)
class Texts(Case):
    """Measures the gain of n-gram drafts on real text: each prompt with plain decode and with drafted tokens.
    `copy` is a file of this repository and the first part of its copy. `edit` is a program and the first part of a copy
    with a changed name. `quote` asks for a summary with quotations. `prose` asks an open question at temperature 0.8.
    Each turn has its own prompt. Tokens and logprobs must be equal with and without drafts."""

    rounds = 50
    warm = 1
    model: Path = argument("path of a .gguf", existing)
    kinds: tuple[str, ...] = option(
        (*KINDS,), "kinds of prompts", listed(chosen("kind", {kind: kind for kind in KINDS}))
    )
    stages: tuple[int, ...] = option(
        (1,), "numbers of stages: one runs in this process, several run in one-thread workers", listed(positive)
    )
    tokens: int = option(200, "maximum number of tokens in an answer", positive)
    characters: int = option(1200, "number of characters of text in a prompt", positive)
    threads: int = option(os.cpu_count() or 1, "number of threads of a stage in this process", positive)
    seed: int = option(1, "seed of the prompts")

    async def groups(self) -> AsyncIterator[Group]:
        for stages in self.stages:
            async with served(self.model, stages, self.threads if stages == 1 else 1, NgramDrafters()) as model:
                for kind in self.kinds:
                    ways = {way: partial(self._measure, model, kind, way == "plain") for way in ("plain", "drafted")}
                    yield Group(f"{stages} stages, {kind}", ways, {"tok/s": _GOALS[kind]})

    async def _measure(self, model: Served, kind: str, plain: bool, turn: int) -> Measures:
        for seed in count(1000 * self.seed + turn, 1_000_000):
            (prompt,) = prompts(model.model, (kind,), 1, self.characters, seed)
            request = self._request(model, prompt, turn)
            if request.max_new_tokens >= 2:
                return await measured(model.engine, request, plain=plain)
        raise AssertionError("endless")

    def _request(self, model: Served, prompt: Prompt, turn: int) -> GenerationRequest:
        most = answer_tokens(prompt, self.tokens, model.engine.scheduler.settings.max_sequence_tokens)
        return GenerationRequest(
            f"{prompt.kind}-{turn}",
            prompt.tokens,
            most,
            SamplingParams(temperature=prompt.temperature),
            prompt.seed,
            stop_token_ids=frozenset(model.model.tokenizer.end_of_generation),
            min_tokens=max(0, min(most, _LEAST_TOKENS)),
        )
