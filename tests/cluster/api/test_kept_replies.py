"""Kept replies that end before they are complete: their readers get the cause, and nothing of them runs on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.api.openai.reply import OpenAiReply
from llamaclust.cluster.api.replies.kept import KeptReply
from llamaclust.cluster.api.replies.reply import Event, Position
from llamaclust.cluster.api.replies.ticket import Ticket
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.core.errors import RequestCancelledError
from support.clusters.resumable import KEY, PATHS, body_of, is_idle, served, stream
from support.clusters.served import until

TICKET = Ticket(id="a", seed=1, created=1, owner="")


class EndlessReply:
    """Submitted at once, without events."""

    is_streamed = True

    def __init__(self) -> None:
        self.closed = 0

    async def start(self) -> None:
        pass

    async def wait_first(self) -> None:
        pass

    async def events(self) -> AsyncGenerator[Event | None, None]:
        await asyncio.Event().wait()
        yield None

    async def whole(self) -> list[bytes]:
        return []

    async def aclose(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("steps", [0, 1, 2])
async def test_a_reply_is_closed_at_any_moment_after_its_begin(steps: int) -> None:
    """Also before the first step of its task."""
    kept = KeptReply(TICKET, ApiSettings(), lambda kept: None, is_streamed=True)
    reply = EndlessReply()
    reading = asyncio.create_task(anext(kept.read(Position(), with_comments=False)))
    await asyncio.sleep(0)
    await kept.begin(reply)
    for _ in range(steps):
        await asyncio.sleep(0)
    await kept.aclose()
    assert reply.closed
    async with asyncio.timeout(5):
        with pytest.raises(RequestCancelledError):
            await reading


async def test_a_reply_that_was_closed_does_not_begin() -> None:
    kept = KeptReply(TICKET, ApiSettings(), lambda kept: None, is_streamed=True)
    await kept.aclose()
    reply = EndlessReply()
    with pytest.raises(RequestCancelledError):
        await kept.begin(reply)
    assert reply.closed


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_mistake_in_a_kept_reply_is_logged_and_named(
    is_streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def mistaken(*arguments: Any, **named: Any) -> Any:
        raise TypeError("a mistake of ours")

    monkeypatch.setattr(OpenAiReply, "_reply", mistaken)
    async with served(tmp_path / "journal") as server:
        body = body_of(PATHS[0], stream=is_streamed)
        if is_streamed:
            ((_, data),) = await stream(server.http, "POST", PATHS[0], json=body, headers=KEY)
            assert isinstance(data, dict)
        else:
            reply = await server.http.post(PATHS[0], json=body, headers=KEY)
            data = reply.json()
            assert reply.status_code == 500
        assert data["error"]["code"] == "internal_error" and "log says more" in data["error"]["message"]
        assert "TypeError: a mistake of ours" in caplog.text
        await until(lambda: is_idle(server.engine))
