"""Requests of a benchmark to a cluster in its process."""

from __future__ import annotations

import random

from llamaclust.cluster.scheduler.requests import Finished, GenerationRequest
from llamaclust.cluster.server.coordinator import Cluster


def prompts(source: random.Random, count: int, tokens: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Random ids: nothing is found in the prefix cache."""
    return [tuple(source.randrange(3, vocabulary) for _ in range(tokens)) for _ in range(count)]


async def run(cluster: Cluster, prompt: tuple[int, ...], tokens: int) -> Finished:
    request = GenerationRequest("benchmark", prompt, tokens, min_tokens=tokens, max_drafted=0)
    async for event in cluster.engine.submit(request):
        if isinstance(event, Finished):
            return event
    raise AssertionError("a request ends with Finished")
