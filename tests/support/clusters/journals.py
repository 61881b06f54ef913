"""Builders of request contexts and journals."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import ChoiceKey, Instant, RequestContext, read_journal
from llamaclust.core.sampler.results import RowResult

NOW = Instant(unix_s=1_000.0, boot_s=50.0, machine="m")
LIMIT_S = 60.0


def admission(number: int, body: bytes = b"{}") -> RequestContext:
    return RequestContext(
        id=f"id{number}",
        seed=number,
        created=7,
        endpoint="/v1/completions",
        idempotency_key="é\n",
        scales=((1, 0.5),),
        body=body,
        admitted=NOW,
        limit_s=LIMIT_S,
    )


def left(
    request: RequestContext,
    answered: dict[ChoiceKey, list[RowResult]] | None = None,
    *,
    is_sent: bool = False,
    restores: int = 0,
) -> RequestContext:
    """Returns the request with the fields that an earlier coordinator left."""
    request.answered, request.is_sent, request.restores = answered or {}, is_sent, restores
    return request


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not check():  # noqa: ASYNC110  a file reports nothing
            await asyncio.sleep(0.01)


def row(token: int, random_bits: int = 0) -> RowResult:
    """Builds the result of a token whose float32 logprob has these random bits."""
    return RowResult(token, struct.unpack("<f", struct.pack("<I", 0xBF800000 | random_bits & 0xFFFFF))[0])


@asynccontextmanager
async def journal(path: Path, record: ControlRecord | None = None, sent_s: float = 60.0) -> AsyncIterator[Journal]:
    opened = Journal(path, record or ControlRecord(), sent_s)
    try:
        yield opened
    finally:
        await opened.aclose()


def ids_in(path: Path, *, is_sent: bool) -> list[str]:
    return [request.id for request in read_journal(path, NOW) if request.is_sent == is_sent]
