"""Checks that responses in the background outlive the coordinator."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.state.journal_records import Instant, read_journal
from support.clusters.journals import admission, journal, until
from support.clusters.resumable import SERVED, KilledJournal, Served, served, stream
from support.clusters.served import ended_response

PATH = "/v1/responses"
BODY: dict[str, Any] = {"input": "Hello", "background": True, "seed": 7, "max_output_tokens": 40}


@asynccontextmanager
async def killed(path: Path) -> AsyncIterator[Served]:
    """Yields a server that is killed after more than `timeouts.resume`."""
    async with served(path, resume_s=0.05) as server:
        yield server
        await asyncio.sleep(0.2)
        assert server.replies.cache.journal is not None
        server.replies.cache.journal.seal()


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


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
        response = await ended_response(server.http, created["id"])
    assert response["status"] in ("completed", "incomplete") and response["usage"]["output_tokens"] > 0


@pytest.mark.parametrize("fields", [{"background": True}, {"background": True, "stream": True}, {"stream": True}])
async def test_a_response_that_follows_another_is_computed_after_a_kill(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with served(tmp_path / "journal", KilledJournal) as server:
        first = (await server.http.post(PATH, json={"input": "A", "seed": 7, "max_output_tokens": 10})).json()
        body = {"input": "B", "previous_response_id": first["id"], "seed": 7, "max_output_tokens": 40, "store": True}
        undisturbed = (await server.http.post(PATH, json=body)).json()
        begun: list[Any] = []
        if "stream" in fields:
            begun = await stream(server.http, "POST", PATH, json=body | fields, most=1)
        created = begun[0][1]["response"] if begun else (await server.http.post(PATH, json=body | fields)).json()
    async with served(tmp_path / "journal") as server:
        if "stream" in fields:
            request_id = begun[0][0].partition(":")[0]
            *_, (_, last), _ = await stream(server.http, "GET", f"/v1/streams/{request_id}")
            assert isinstance(last, dict)
            response = last["response"]
        else:
            response = await ended_response(server.http, created["id"])
    assert response["id"] == created["id"] and text_of(response) == text_of(undisturbed)
    assert response["usage"]["input_tokens"] == undisturbed["usage"]["input_tokens"]


async def test_a_complete_response_is_computed_after_a_kill_only_for_a_poller(tmp_path: Path) -> None:
    async with served(tmp_path / "journal", KilledJournal) as server:
        created = (await server.http.post(PATH, json=BODY)).json()
        response = await ended_response(server.http, created["id"])
    async with served(tmp_path / "journal") as server:
        kept = server.replies.cache.named("", created["id"])
        assert kept is not None and kept.is_evictable and kept.context.is_background
        again = await ended_response(server.http, created["id"])
    assert again["status"] == response["status"] and text_of(again) == text_of(response)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_complete_response_outlives_several_coordinators(tmp_path: Path, is_streamed: bool) -> None:
    """Tests coordinators that live longer than `timeouts.resume`, with and without a stream's reader."""
    path = tmp_path / "journal"
    async with killed(path) as server:
        if is_streamed:
            events = await stream(server.http, "POST", PATH, json=BODY | {"stream": True})
            first = events[0][1]
            assert events[-1][1] == "[DONE]" and isinstance(first, dict)
            created = first["response"]
        else:
            created = (await server.http.post(PATH, json=BODY)).json()
        response = await ended_response(server.http, created["id"])
    async with killed(path):
        pass
    async with served(path) as server:
        again = await ended_response(server.http, created["id"])
    assert again["status"] == response["status"] and text_of(again) == text_of(response)


async def test_a_complete_response_has_time_to_be_computed_again(tmp_path: Path) -> None:
    """Checks that the response is computed even if its time limit has passed."""
    known = replace(admission(0, json.dumps(BODY).encode()), endpoint=PATH, admitted=Instant.now(), scales=())
    async with journal(tmp_path / "journal") as left:
        await left.admit(replace(known, served=SERVED, is_streamed=False, is_background=True))
        left.completed(known.id, 100.0)
        left.seal()
    async with served(tmp_path / "journal") as server:
        kept = server.replies.cache.named("", known.id)
        assert kept is not None and kept.context.limit_s == 100.0
        kept.context.limit_s = 0.0
        response = await ended_response(server.http, f"resp_{known.id}")
    assert response["status"] in ("completed", "incomplete")


async def test_a_restored_response_does_not_expire_while_it_is_computed_for_a_poller(tmp_path: Path) -> None:
    async with served(tmp_path / "journal", KilledJournal) as server:
        created = (await server.http.post(PATH, json=BODY)).json()
        await ended_response(server.http, created["id"])
    async with served(tmp_path / "journal") as server:
        kept = server.replies.cache.named("", created["id"])
        assert kept is not None and (expiry := kept._timer) is not None
        server.pipeline.gate.clear()
        running = (await server.http.get(f"{PATH}/{created['id']}")).json()
        assert running["status"] in ("queued", "in_progress") and expiry.cancelled() and kept._timer is None
        server.pipeline.gate.set()
        response = await ended_response(server.http, created["id"])
        await until(lambda: kept._timer is not None)
    assert response["status"] in ("completed", "incomplete")


async def test_without_a_client_a_restored_response_leaves_the_journal(tmp_path: Path) -> None:
    """Checks that a response in the foreground leaves after `timeouts.resume` and that one in the background stays."""
    path, foreground = tmp_path / "journal", BODY | {"background": False, "stream": True}
    async with journal(path) as left:
        for number, (endpoint, body) in enumerate(((PATH, foreground), ("/responses", foreground), (PATH, BODY))):
            known = admission(number, json.dumps(body).encode())
            kind = {"is_streamed": "stream" in body, "is_background": body["background"]}
            await left.admit(replace(known, endpoint=endpoint, admitted=Instant.now(), **kind))
        left.seal()
    async with served(path, resume_s=0.05):
        await until(lambda: {request.id for request in read_journal(path, Instant.now())} == {"id2"})


async def test_a_coordinator_that_ends_leaves_responses_to_the_next_one(tmp_path: Path) -> None:
    async with served(tmp_path / "journal") as server:
        server.pipeline.gate.clear()
        created = (await server.http.post(PATH, json=BODY)).json()
        server.replies.cache.stop()
        reply = await server.http.get(f"{PATH}/{created['id']}")
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "cluster_stopping"
