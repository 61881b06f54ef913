"""What grammars cost and save: one model in this process, with and without a grammar in turns, as ratios of pairs.

    python benchmarks/structured.py [MODEL] [--threads 2] [--tokens 96] [--pairs 7]

Step cost: answers under a grammar that any text obeys, relative to the same number of free tokens, at 1 and at 16
streams. JSON: an object by a schema, relative to a free answer of the same number of tokens; its forced tokens are
computed together.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

from llamaclust.cluster.config.catalog import resolve_model
from llamaclust.cluster.front.text.request import CompletionRequest
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.launchers.in_process import LocalSettings, LocalStage
from llamaclust.core.sampling import Grammar
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


@dataclass(frozen=True, slots=True)
class Turn:
    """Answers that ran together."""

    tokens: int
    seconds: float  # from the first token of the last one to start, to the end
    processor_s: float  # of this process, prompts included


async def answer(service: TextService, request: CompletionRequest, started: list[float]) -> int:
    tokens = 0
    async with await service.start(request) as running:
        async for chunk in running.log.chunks():
            if chunk.rows and not tokens:
                started.append(perf_counter())
            tokens += len(chunk.rows)
    return tokens


async def turn(service: TextService, streams: int, tokens: int, grammar: Grammar | None, *, may_end: bool) -> Turn:
    request = CompletionRequest("A person, described in JSON:\n", tokens, grammar=grammar, ignore_eos=not may_end)
    started: list[float] = []
    began_s = process_time()
    requests = (replace(request, seed=number) for number in range(streams))
    counts = await asyncio.gather(*(answer(service, each, started) for each in requests))
    return Turn(sum(counts), perf_counter() - max(started), process_time() - began_s)


async def compare(service: TextService, streams: int, tokens: int, pairs: int, grammar: Grammar) -> str:
    """Seconds under a grammar relative to seconds without, for as many tokens; the same of processor time, which other
    processes disturb less."""
    ratios, processor = [], []
    for _ in range(pairs):
        free = await turn(service, streams, tokens, None, may_end=False)
        bound = await turn(service, streams, tokens, grammar, may_end=False)
        ratios.append(bound.seconds / bound.tokens / (free.seconds / free.tokens))
        processor.append(bound.processor_s / bound.tokens / (free.processor_s / free.tokens))
    return f"{_spread(ratios)}, processor time {_spread(processor)}"


async def speed_up(service: TextService, pairs: int) -> str:
    """Seconds of a free answer relative to seconds of JSON with as many tokens."""
    ratios, tokens = [], 0
    for _ in range(pairs):
        bound = await turn(service, 1, 400, PERSON, may_end=True)
        free = await turn(service, 1, bound.tokens, None, may_end=False)
        ratios.append(free.seconds / bound.seconds)
        tokens = bound.tokens
    return f"{_spread(ratios)}, {tokens} tokens"


def _spread(ratios: list[float]) -> str:
    return f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


async def run(model: Path, threads: int, tokens: int, pairs: int) -> None:
    settings = LocalSettings(context_length=1024, max_sequences=16, kv_blocks=1024)
    async with LocalStage(model, threads, None, settings).serve() as service:
        await turn(service, 1, 8, ANY_TEXT, may_end=False)
        for streams in (1, 16):
            for name, grammar in (("any text", ANY_TEXT), ("JSON strings", ANY_JSON)):
                print(f"step, {name}, {streams:2} streams: {await compare(service, streams, tokens, pairs, grammar)}")
        print(f"JSON by a schema, speed relative to free text: {await speed_up(service, pairs)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--pairs", type=int, default=7)
    given = parser.parse_args()
    asyncio.run(run(resolve_model(given.model), given.threads, given.tokens, given.pairs))


if __name__ == "__main__":
    main()
