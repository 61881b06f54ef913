"""Streams the tokens and logprob bits of concurrent requests of several kinds to clients that resume."""

from __future__ import annotations

import asyncio
import hashlib
import struct
from pathlib import Path
from typing import Any

from llamaclust.cluster.client.http import AsyncClient

STREAMS = 6
TOKENS = 600

Answers = list[list[tuple[int, bytes]]]

_UNDISTURBED: dict[str, Answers] = {}


def options(number: int) -> dict[str, Any]:
    """Returns the options of a greedy request, or of a seeded one with a repetition penalty."""
    more = {"temperature": 0.9, "seed": number, "repetition_penalty": 1.1} if number % 2 else {}
    return {"max_tokens": TOKENS, "ignore_eos": True, **more}


async def answer(client: AsyncClient, number: int, arrived: list[int]) -> list[tuple[int, bytes]]:
    """Returns tokens with the bits of their logprobs, and counts them in `arrived` as they come."""
    rows = []
    async for chunk in client.generate(f"prompt {number}", stream=True, **options(number)):
        rows += [(row.token, struct.pack("<f", row.logprob)) for row in chunk.rows]
        arrived[number] = len(rows)
    return rows


async def answers(api: str, arrived: list[int]) -> Answers:
    async with AsyncClient(api) as client:
        return list(await asyncio.gather(*(answer(client, number, arrived) for number in range(STREAMS))))


async def undisturbed(api: str, model: Path) -> Answers:
    """Returns a model's answers, computed by the cluster of the first call; all clusters give the same ones."""
    key = hashlib.sha256(await asyncio.to_thread(model.read_bytes)).hexdigest()
    if key not in _UNDISTURBED:
        _UNDISTURBED[key] = await answers(api, [0] * STREAMS)
    return _UNDISTURBED[key]
