"""Mixed requests at once, streamed to clients that resume: their tokens with the bits of their logprobs."""

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
    """Greedy and drawn, with penalties and without."""
    more = {"temperature": 0.9, "seed": number, "repetition_penalty": 1.1} if number % 2 else {}
    return {"max_tokens": TOKENS, "ignore_eos": True, **more}


async def answer(client: AsyncClient, number: int, arrived: list[int]) -> list[tuple[int, bytes]]:
    """Tokens with the bits of their logprobs; counts them as they come."""
    rows = []
    async for chunk in client.generate(f"prompt {number}", stream=True, **options(number)):
        rows += [(row.token, struct.pack("<f", row.logprob)) for row in chunk.rows]
        arrived[number] = len(rows)
    return rows


async def answers(api: str, arrived: list[int]) -> Answers:
    async with AsyncClient(api) as client:
        return list(await asyncio.gather(*(answer(client, number, arrived) for number in range(STREAMS))))


async def undisturbed(api: str, model: Path) -> Answers:
    """A model's answers from the first cluster that was asked: they are those of every other one."""
    key = hashlib.sha256(await asyncio.to_thread(model.read_bytes)).hexdigest()
    if key not in _UNDISTURBED:
        _UNDISTURBED[key] = await answers(api, [0] * STREAMS)
    return _UNDISTURBED[key]
