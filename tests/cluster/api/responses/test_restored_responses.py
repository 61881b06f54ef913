"""Responses in the background outlive the coordinator."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from support.clusters.resumable import KilledJournal, served, stream

PATH = "/v1/responses"
BODY: dict[str, Any] = {"input": "Hello", "background": True, "seed": 7, "max_output_tokens": 40}


async def test_a_background_stream_is_read_on_after_a_kill(tmp_path: Path) -> None:
    async with served(tmp_path / "journal", KilledJournal) as server:
        begun = await stream(server.http, "POST", PATH, json=BODY | {"stream": True}, most=6)
    first = begun[0][1]
    assert isinstance(first, dict)
    path = f"{PATH}/{first['response']['id']}"
    async with served(tmp_path / "journal") as server:
        rest = await stream(server.http, "GET", path, params={"stream": "true", "starting_after": 5})
        whole = await stream(server.http, "GET", path, params={"stream": "true"})
        response = (await server.http.get(path)).json()
    events = [data for _, data in rest if isinstance(data, dict)]
    assert [event["sequence_number"] for event in events] == [*range(6, 6 + len(events))]
    assert whole[6:] == rest and events[-1]["response"] == response
    assert response["status"] in ("completed", "incomplete") and response["background"]


async def test_a_background_response_is_computed_after_a_kill(tmp_path: Path) -> None:
    async with served(tmp_path / "journal", KilledJournal) as server:
        created = (await server.http.post(PATH, json=BODY)).json()
    async with served(tmp_path / "journal") as server:
        status = "queued"
        while status in ("queued", "in_progress"):
            await asyncio.sleep(0.01)
            response = (await server.http.get(f"{PATH}/{created['id']}")).json()
            status = response["status"]
    assert status in ("completed", "incomplete") and response["usage"]["output_tokens"] > 0


async def test_a_coordinator_that_ends_leaves_responses_to_the_next_one(tmp_path: Path) -> None:
    async with served(tmp_path / "journal") as server:
        server.pipeline.gate.clear()
        created = (await server.http.post(PATH, json=BODY)).json()
        server.replies.cache.stop()
        reply = await server.http.get(f"{PATH}/{created['id']}")
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "cluster_stopping"
