from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter, process_time

from runner.case import Case, Group, Measures, argument, option
from runner.options import positive

from llamaclust.cluster.config.catalog import resolve_model
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.launchers.in_process import LocalSettings, LocalStage
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.model.grammars import definitions

ANY_TEXT = definitions.of_regex(r"(?s:.*)", "benchmark")
ANY_JSON = definitions.of_schema({"type": "array", "items": {"type": "string"}, "minItems": 1000}, "benchmark")
_PERSON = {
    "first_name": {"type": "string", "maxLength": 12},
    "last_name": {"type": "string", "maxLength": 12},
    "date_of_birth": {"type": "string", "pattern": "^19[0-9]{2}-0[1-9]-[0-2][0-9]$"},
    "is_married": {"type": "boolean"},
    "number_of_children": {"type": "integer", "minimum": 0, "maximum": 9},
    "favourite_colour": {"enum": ["red", "green", "blue"]},
}
PERSON = definitions.of_schema(
    {"type": "object", "properties": _PERSON, "required": [*_PERSON], "additionalProperties": False}, "benchmark"
)


@dataclass(frozen=True)
class Structured(Case):
    """Measures the cost and the savings of grammars, with one model in this process.
    The cost is the time of a token under a grammar that allows any text or any list, relative to a token without a
    grammar, with 1 and with 16 streams. The savings are the time of a token in a JSON object under a schema, relative
    to text without a grammar. Forced tokens of the object are computed together."""

    rounds = 7
    model: str = argument("catalog name or path of a .gguf", str, default="smollm2-135m-instruct")
    threads: int = option(2, "number of threads of the stage", positive)
    tokens: int = option(96, "number of tokens in an answer", positive)

    async def groups(self) -> AsyncIterator[Group]:
        settings = LocalSettings(context_length=1024, max_sequences=16, kv_blocks=1024)
        async with LocalStage(resolve_model(self.model), self.threads, None, settings).serve() as service:
            await self._answers(service, 1, 8, ANY_TEXT, may_end=False)
            for name, grammar in (("any text", ANY_TEXT), ("JSON strings", ANY_JSON)):
                for streams in (1, 16):
                    free = partial(self._measure, service, streams, None)
                    bound = partial(self._measure, service, streams, grammar)
                    yield Group(
                        f"{name}, {streams} streams",
                        {"free": free, "bound": bound},
                        {"ms a token": "1.02", "processor ms": ""},
                    )
            free, bound = partial(self._measure, service, 1, None), partial(self._person, service)
            yield Group("JSON by a schema", {"free": free, "bound": bound}, {"ms a token": "1 / 1.1"})

    async def _person(self, service: TextService, turn: int) -> Measures:
        return await self._answers(service, 1, 400, PERSON, may_end=True)

    async def _measure(self, service: TextService, streams: int, grammar: Grammar | None, turn: int) -> Measures:
        return await self._answers(service, streams, self.tokens, grammar, may_end=False)

    async def _answers(
        self, service: TextService, streams: int, tokens: int, grammar: Grammar | None, *, may_end: bool
    ) -> Measures:
        """Measures the time since all answers have a first token, and the processor time since the start."""
        request = CompletionRequest("A person, described in JSON:\n", tokens, grammar=grammar, ignore_eos=not may_end)
        started, began_s = list[float](), process_time()
        requests = (replace(request, seed=number) for number in range(streams))
        counts = await asyncio.gather(*(_answer(service, each, started) for each in requests))
        count = sum(counts)
        took_s, used_s = perf_counter() - max(started), process_time() - began_s
        return {"ms a token": 1e3 * took_s / count, "processor ms": 1e3 * used_s / count, "tokens": count}


async def _answer(service: TextService, request: CompletionRequest, started: list[float]) -> int:
    tokens = 0
    async with await service.start(request) as running:
        async for chunk in running.log.chunks():
            if chunk.rows and not tokens:
                started.append(perf_counter())
            tokens += len(chunk.rows)
    return tokens
