"""Checks that requests that are refused when the run ends are retried, and then compared or counted as lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.core.errors import LlamaclustError
from llamaclust.tools.chaos import load
from llamaclust.tools.chaos.load import Requests, Streams
from llamaclust.tools.chaos.received import Received
from llamaclust.tools.chaos.tally import Tally

EVENT = {"choices": [{"index": 0, "token_ids": [5], "logprobs": {"token_logprobs": [-0.25], "top_logprobs": [None]}}]}


class Refusing:
    """A client whose first requests are refused. The run ends during its first request."""

    def __init__(self, refusals: int) -> None:
        self.refusals, self.sent, self.until = refusals, 0, asyncio.Event()

    async def events(self, path: str, body: object) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        self.until.set()
        self.sent += 1
        if self.sent <= self.refusals:
            raise LlamaclustError("the cluster has no workers")
        yield "request:1", EVENT


@pytest.fixture(autouse=True)
def fast_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advances the time by 50 s with each refusal, without pauses."""
    times = count(1.0, 50.0)
    monkeypatch.setattr(load, "time", SimpleNamespace(monotonic=lambda: next(times)))
    monkeypatch.setattr(load, "_PAUSE_S", 0.0)


async def ended(refusals: int) -> tuple[Refusing, Tally]:
    expected = Received()
    expected.add("request:1", EVENT)
    client, tally = Refusing(refusals), Tally(seed=1)
    served: Any = client
    async with asyncio.timeout(60):
        await Streams(served, Requests(), tally, {0: expected}).repeat(0, client.until)
    return client, tally


@pytest.mark.parametrize("refusals", [0, 1, 3])
async def test_an_answer_after_refusals_is_compared(refusals: int) -> None:
    client, tally = await ended(refusals)
    assert client.sent == refusals + 1 and not tally.errors
    assert (tally.compared.answers, tally.compared.tokens) == (1, 1) and tally.compared.is_intact


async def test_a_request_that_stays_refused_is_lost() -> None:
    client, tally = await ended(1 << 30)
    assert client.sent == 4 and tally.errors == {"the cluster has no workers": 1}
    assert (tally.compared.answers, tally.compared.lost) == (1, 1) and not tally.compared.is_intact
