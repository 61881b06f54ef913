"""Tests of responses in the background: read, cancelled, failed, streamed again."""

from __future__ import annotations

import asyncio

import pytest

from llamaclust.cluster.front.dialects.openai.response_store import ResponseStore, StoredResponse
from llamaclust.core.errors import QueueFullError, WorkerError
from support.clusters.served import ScriptedEngine, ended_response, events_of, says, until
from support.clusters.tool_chats import served

PATH = "/v1/responses"


async def test_a_response_in_the_background() -> None:
    engine = ScriptedEngine(says("Yes."))
    engine.gate.clear()
    async with served(engine) as http:
        created = (await http.post(PATH, json={"input": "A", "background": True})).json()
        assert created["status"] == "queued" and created["output"] == []
        running = (await http.get(f"{PATH}/{created['id']}")).json()
        assert running["status"] == "in_progress" and running["background"]
        engine.gate.set()
        ended = await ended_response(http, created["id"])
    assert ended["status"] == "completed" and ended["output"][0]["content"][0]["text"] == "Yes."


async def test_a_response_in_the_background_is_cancelled() -> None:
    engine = ScriptedEngine(says("Yes."))
    engine.gate.clear()
    async with served(engine) as http:
        created = (await http.post(PATH, json={"input": "A", "background": True})).json()
        path = f"{PATH}/{created['id']}"
        assert (await http.post(f"{path}/cancel")).json()["status"] == "cancelled"
        assert (await http.get(path)).json()["status"] == "cancelled"
        assert (await http.post(f"{path}/cancel")).json()["status"] == "cancelled"
    assert engine.running == 0


async def test_a_response_in_the_background_that_is_refused_takes_no_place_in_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put, stored = ResponseStore.put, list[str]()

    def noted(store: ResponseStore, owner: str, response: StoredResponse) -> None:
        stored.append(response.response["status"])
        put(store, owner, response)

    monkeypatch.setattr(ResponseStore, "put", noted)
    engine = ScriptedEngine(says("Yes."), refusal=QueueFullError("the queue is full"))
    async with served(engine) as http:
        body = {"input": "A", "background": True}
        assert (await http.post(PATH, json=body)).status_code == 429 and not stored
        engine.refusal = None
        created = (await http.post(PATH, json=body)).json()
        assert (await ended_response(http, created["id"]))["status"] == "completed"
    assert stored == ["queued", "completed"]


async def test_a_response_in_the_background_fails() -> None:
    engine = ScriptedEngine(says("Yes."), failure=WorkerError("lost"), failure_after=1)
    async with served(engine) as http:
        created = (await http.post(PATH, json={"input": "A", "background": True})).json()
        ended = await ended_response(http, created["id"])
        while (items := await http.get(f"{PATH}/{created['id']}/input_items")).status_code == 200:
            assert len(items.json()["data"]) == 1
            await asyncio.sleep(0)
    assert items.status_code == 404
    assert ended["status"] == "failed" and ended["error"] == {"code": "server_error", "message": "lost"}


async def test_a_response_in_the_background_expires_only_once_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine(says("Yes, no."))
    engine.gate.clear()
    async with served(engine, background_s=0.05) as http, asyncio.timeout(60):
        created = (await http.post(PATH, json={"input": "A", "background": True})).json()
        path = f"{PATH}/{created['id']}"
        await asyncio.sleep(0.1)  # an ended response would expire in this time
        assert (await http.get(path)).json()["status"] == "in_progress"
        engine.gate.set()
        # The store has the response before it can expire, so that even a slow poll finds it.
        assert (await ended_response(http, created["id"]))["status"] == "completed"
        monkeypatch.setattr(ResponseStore, "get", lambda store, owner, response_id: None)
        while (reply := await http.get(path)).status_code == 200:
            assert reply.json()["status"] == "completed"
            await asyncio.sleep(0.1)
    assert reply.status_code == 404


async def test_a_repeated_request_for_a_response_in_the_background_does_not_wait_either() -> None:
    engine = ScriptedEngine(says("Yes."))
    engine.gate.clear()
    async with served(engine) as http:
        body, headers = {"input": "A", "background": True}, {"Idempotency-Key": "one"}
        first, second = [(await http.post(PATH, json=body, headers=headers)).json() for _ in range(2)]
        engine.gate.set()
        await ended_response(http, first["id"])
    assert first == second and len(engine.submitted) == 1


async def test_requests_that_repeat_one_at_the_same_moment_do_not_wait_for_its_answer() -> None:
    engine = ScriptedEngine(says("Yes."))
    engine.gate.clear()
    async with served(engine) as http, asyncio.timeout(60):
        body, headers = {"input": "A", "background": True}, {"Idempotency-Key": "one"}
        replies = await asyncio.gather(*(http.post(PATH, json=body, headers=headers) for _ in range(6)))
        assert len({reply.content for reply in replies}) == 1 and replies[0].json()["status"] == "queued"
        engine.gate.set()
        await ended_response(http, replies[0].json()["id"])
    assert len(engine.submitted) == 1


async def test_a_background_stream_is_read_from_any_event_on() -> None:
    async with served(ScriptedEngine(says("Yes, no."))) as http:
        reply = await http.post(PATH, json={"input": "A", "background": True, "stream": True})
        *events, _ = events_of(reply.text)
        assert [event["type"] for event in events[:3]] == [
            "response.created",
            "response.queued",
            "response.in_progress",
        ]
        path = f"{PATH}/{events[0]['response']['id']}"
        again = events_of((await http.get(path, params={"stream": "true"})).text)[:-1]
        rest = events_of((await http.get(path, params={"stream": "true", "starting_after": 4})).text)[:-1]
        whole = (await http.get(path)).json()
        bad = await http.get(path, params={"stream": "true", "starting_after": "x"})
    assert again == events and rest == events[5:] and whole == events[-1]["response"]
    assert bad.status_code == 400


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_that_the_store_lacks_is_kept_for_its_poller(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(ScriptedEngine(says("Yes."))) as http:
        body = {"input": "A", "background": True, "stream": stream}
        reply = await http.post(PATH, json=body)
        created = events_of(reply.text)[0]["response"] if stream else reply.json()
        path = f"{PATH}/{created['id']}"
        stored = await ended_response(http, created["id"])
        monkeypatch.setattr(ResponseStore, "get", lambda store, owner, response_id: None)
        assert (await http.get(path)).json() == stored and stored["status"] == "completed"
        again = await http.get(path, params={"stream": "true"})
        assert again.status_code == (200 if stream else 400) and (not stream or again.text.count("Yes.") > 2)


async def test_other_replies_are_no_responses_in_the_background() -> None:
    engine = ScriptedEngine(says("Yes."))
    engine.gate.clear()
    async with served(engine) as http:
        headers = {"Idempotency-Key": "one"}
        posted = asyncio.create_task(http.post(PATH, json={"input": "A", "stream": True}, headers=headers))
        await until(lambda: engine.running > 0)
        path = f"{PATH}/resp_{engine.submitted[0].request_id}"
        statuses = [(await http.get(path)).status_code, (await http.post(f"{path}/cancel")).status_code]
        engine.gate.set()
        assert (await posted).status_code == 200 and (await http.get(path)).json()["status"] == "completed"
    assert statuses == [404, 404]
