"""Checks that streams of messages outlive the coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.clusters.resumable import Event, KilledJournal, served, stream

PATH = "/v1/messages"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40, "seed": 7, "stream": True}


def said(events: list[Event]) -> list[Any]:
    """Returns the types and deltas of events, which do not differ between requests."""
    return [(data["type"], data.get("delta")) for _, data in events if isinstance(data, dict)]


async def test_a_stream_is_read_on_after_a_kill(tmp_path: Path) -> None:
    async with served(tmp_path / "undisturbed") as server:
        whole = await stream(server.http, "POST", PATH, json=BODY)
    async with served(tmp_path / "journal", KilledJournal) as server:
        begun = await stream(server.http, "POST", PATH, json=BODY, most=5)
    last = begun[-1][0]
    async with served(tmp_path / "journal") as server:
        rest = await stream(server.http, "GET", f"/v1/streams/{last.partition(':')[0]}", params={"after": last})
    assert said(begun + rest) == said(whole) and said(whole)[-1] == ("message_stop", None)
