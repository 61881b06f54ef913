"""Tests of responses' logprobs, progress, timings, allowed tools, item references, and input items while they are
computed or after they were cancelled."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from llamaclust.cluster.front import json_text
from llamaclust.cluster.front.body import HEADER
from llamaclust.cluster.front.dialects.openai.response_store import StoredResponse
from llamaclust.cluster.front.dialects.openai.response_view import OutputItems, ResponseView, ShownRow
from llamaclust.cluster.front.http.gates import Admission
from llamaclust.cluster.front.replies import reply as reply_module
from llamaclust.cluster.front.replies.reply import Event
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text import sharing
from llamaclust.core.errors import WorkerError
from llamaclust.core.sampler.results import RowResult
from llamaclust.model.chat.tools.events import ContentText, ReasoningText
from support.clusters import resumable
from support.clusters.served import (
    MODEL,
    ScriptedEngine,
    client,
    events_of,
    ids,
    make_app,
    real_engine,
    says,
    tokenizer,
    until,
)
from support.clusters.tool_chats import CALL, served

PATH = "/v1/responses"
TOOL: dict[str, Any] = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
LOGPROBS: dict[str, Any] = {"include": ["message.output_text.logprobs", "reasoning.encrypted_content"]}


async def respond(answer: str, **fields: Any) -> tuple[httpx.Response, ScriptedEngine]:
    engine = ScriptedEngine(says(answer))
    async with served(engine) as http:
        reply = await http.post(PATH, json={"input": "Hi", "max_output_tokens": 120} | fields)
    assert reply.status_code == 200, reply.text
    return reply, engine


def chosen(entries: list[Any]) -> str:
    return b"".join(bytes(entry["bytes"]) for entry in entries).decode()


# -- logprobs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_are_those_of_the_tokens_of_messages(stream: bool) -> None:
    fields = LOGPROBS | {"top_logprobs": 2, "tools": [TOOL], "stream": stream}
    reply, engine = await respond("<think>Hm.</think>So 🦙, then." + CALL, **fields)
    assert engine.submitted[0].top_logprobs == 2 and engine.submitted[0].with_logprobs
    events = events_of(reply.text)[:-1] if stream else []
    response = events[-1]["response"] if stream else reply.json()
    assert response["top_logprobs"] == 2
    (part,) = response["output"][1]["content"]
    assert part["text"] == "So 🦙, then." and chosen(part["logprobs"]) == part["text"]
    assert all(set(entry) == {"token", "logprob", "bytes", "top_logprobs"} for entry in part["logprobs"])
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    if stream:
        assert [entry for event in deltas for entry in event["logprobs"]] == part["logprobs"]
        (done,) = [event for event in events if event["type"] == "response.output_text.done"]
        assert done["logprobs"] == part["logprobs"]
        declared: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
        for event in events:
            declared.validate_python(event)
    Response.model_validate(response)


async def test_an_end_token_is_no_text() -> None:
    reply, _ = await respond("Yes.", **LOGPROBS)
    entries = reply.json()["output"][0]["content"][0]["logprobs"]
    assert chosen(entries) == "Yes." and len(entries) == len(ids("Yes.")) and entries[0]["top_logprobs"] == []


async def test_a_stream_with_logprobs_is_counted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "MAX_REPLY_ENTRIES", 40 * 3 - 1)
    monkeypatch.setattr(reply_module, "MAX_UNREAD_ROWS", 4)
    fields = {"input": "Hi", "max_output_tokens": 40, "top_logprobs": 2, "stream": True}
    async with served(ScriptedEngine(says("Yes."))) as http:
        reply = await http.post(PATH, json=LOGPROBS | fields)
        assert reply.status_code == 400 and reply.json()["error"]["code"] == "reply_too_large"
        assert (await http.post(PATH, json=LOGPROBS | fields | {"max_output_tokens": 39})).status_code == 200


async def test_all_logprobs_of_a_stream_are_rendered_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, int] = {}
    numbered, sized = ResponseView._numbered, StoredResponse.__post_init__

    def spied(view: ResponseView, shown: Any) -> Event:
        threads[shown["type"]] = threading.get_ident()
        return numbered(view, shown)

    def spied_size(stored: StoredResponse) -> None:
        threads["size"] = threading.get_ident()
        sized(stored)

    monkeypatch.setattr(ResponseView, "_numbered", spied)
    monkeypatch.setattr(StoredResponse, "__post_init__", spied_size)
    monkeypatch.setattr(json_text, "_LARGE_ENTRIES", 12)
    async with served(ScriptedEngine(says("So, then."))) as http:
        reply = await http.post(PATH, json=LOGPROBS | {"input": "Hi", "top_logprobs": 2, "stream": True})
        end = events_of(reply.text)[-2]["response"]
        assert (await http.get(f"{PATH}/{end['id']}")).json() == end
    here, ends = threading.get_ident(), ("size", "response.output_text.done", "response.completed")
    assert threads["response.output_text.delta"] == here and all(threads[name] != here for name in ends)


def test_a_token_of_markup_and_text_has_a_logprob() -> None:
    items = OutputItems("a", ())
    texts: Any = SimpleNamespace(token_bytes=[b"<think>Hm.", b"</think>So"].__getitem__)
    earlier, shared = (ShownRow(texts, RowResult(token, -0.5)) for token in range(2))
    assert [*items.take([ReasoningText("Hm.")], [earlier])]
    events = [*items.take([ReasoningText(""), ContentText("So")], [shared])]
    (delta,) = [event for event in events if event["type"] == "response.output_text.delta"]
    assert delta["logprobs"] == [shared]


async def test_logprobs_are_shown_where_they_are_wanted() -> None:
    reply, engine = await respond("Yes.", include=["file_search_call.results"])
    assert reply.headers[HEADER] == "include.file_search_call.results"
    async with served(ScriptedEngine(says("Yes.")), is_strict=True) as http:
        refused = await http.post(PATH, json={"input": "Hi", "include": ["file_search_call.results"]})
    assert refused.status_code == 400 and "file_search_call" in refused.text
    assert reply.json()["output"][0]["content"][0]["logprobs"] == [] and not engine.submitted[0].with_logprobs


# -- llama.cpp's measurements ------------------------------------------------------------------------------------------


async def test_a_stream_says_how_far_its_prompt_is_computed() -> None:
    body = {"input": "a word " * 15, "max_output_tokens": 3, "stream": True, "background": True}
    async with real_engine() as (engine, _), client(make_app(engine)) as http:
        plain = events_of((await http.post(PATH, json=body)).text)
        shown = events_of(
            (await http.post(PATH, json=body | {"return_progress": True, "timings_per_token": True})).text
        )
    assert not any("prompt_progress" in event or "timings" in event for event in plain[:-1])
    *events, _ = shown
    progress = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    assert progress[0]["processed"] == progress[0]["cache"] > 0 and progress[-1]["processed"] == progress[-1]["total"]
    assert {event["type"] for event in events if "prompt_progress" in event} == {"response.in_progress"}
    kinds = [event["type"] for event in events if "prompt_progress" not in event]
    assert kinds[:3] == ["response.created", "response.queued", "response.in_progress"] and "timings" not in events[0]
    numbers = [event["sequence_number"] for event in events if "prompt_progress" not in event]
    assert numbers == [*range(len(numbers))]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert deltas and all(event["timings"]["prompt_per_second"] >= 0 for event in deltas)
    assert events[-1]["timings"]["predicted_n"] == 3


# -- tools -------------------------------------------------------------------------------------------------------------


async def test_allowed_tools_are_the_only_ones() -> None:
    tools = [TOOL, TOOL | {"name": "run"}, TOOL | {"name": "go"}]
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "run"}]}
    reply, engine = await respond("Yes.", tools=tools, tool_choice=choice)
    assert _prompt(engine).startswith("+run<user>")
    response = reply.json()
    assert response["tool_choice"] == choice and len(response["tools"]) == 3
    Response.model_validate(response)
    both = choice | {"mode": "required", "tools": [{"type": "function", "name": name} for name in ("go", "look")]}
    _, engine = await respond(CALL, tools=tools, tool_choice=both)
    assert _prompt(engine).startswith("+look+go<user>") and engine.submitted[0].grammar is not None


def _prompt(engine: ScriptedEngine, place: int = 0) -> str:
    return tokenizer().decode(engine.submitted[place].prompt)


# -- items -------------------------------------------------------------------------------------------------------------


async def test_references_stand_for_stored_items() -> None:
    engine = ScriptedEngine(says("Yes."))
    async with served(engine) as http:
        first = (await http.post(PATH, json={"input": "A"})).json()
        (asked,) = (await http.get(f"{PATH}/{first['id']}/input_items")).json()["data"]
        answer = first["output"][0]["id"]
        references = [{"type": "item_reference", "id": asked["id"]}, {"id": answer}, {"role": "user", "content": "B"}]
        second = (await http.post(PATH, json={"input": references})).json()
        counted = (await http.post(f"{PATH}/input_tokens", json={"input": references})).json()["input_tokens"]
        listed = (await http.get(f"{PATH}/{second['id']}/input_items", params={"order": "asc"})).json()["data"]
    assert _prompt(engine, 1) == "<user>A<assistant>Yes.<user>B<assistant>"
    assert counted == len(engine.submitted[1].prompt)
    assert [item["id"] for item in listed[:2]] == [asked["id"], answer]


async def test_items_of_other_owners_are_not_found() -> None:
    keys = ("key-of-one", "key-of-two")
    async with served(ScriptedEngine(says("Yes.")), api_keys=keys) as http:
        first = (await http.post(PATH, json={"input": "A"}, headers={"X-Api-Key": keys[0]})).json()
        body = {"input": [{"type": "item_reference", "id": first["output"][0]["id"]}]}
        reply = await http.post(PATH, json=body, headers={"X-Api-Key": keys[1]})
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "item_not_found"


@pytest.mark.parametrize("path", [PATH, f"{PATH}/input_tokens", f"{PATH}/compact"])
async def test_references_stand_for_no_more_than_a_body_has(path: str) -> None:
    engine = ScriptedEngine(says("Yes."))
    async with served(engine, max_body_bytes=500) as http:
        first = (await http.post(PATH, json={"input": "A" * 60})).json()
        (asked,) = (await http.get(f"{PATH}/{first['id']}/input_items")).json()["data"]
        references = [{"id": asked["id"]}] * 4
        reply = await http.post(path, json={"model": MODEL, "input": references})
    assert reply.status_code == 400 and "the limit is 500" in reply.text
    assert len(engine.submitted) == 1


async def test_a_response_with_references_is_computed_after_a_kill(tmp_path: Path) -> None:
    fields = {"seed": 7, "max_output_tokens": 20}
    async with resumable.served(tmp_path / "journal", resumable.KilledJournal) as server:
        first = (await server.http.post(PATH, json={"input": "A"} | fields)).json()
        body = {"input": [{"id": first["output"][0]["id"]}, {"role": "user", "content": "B"}]} | fields
        undisturbed = (await server.http.post(PATH, json=body)).json()
        created = (await server.http.post(PATH, json=body | {"background": True})).json()
    async with resumable.served(tmp_path / "journal") as server:
        path = f"{PATH}/{created['id']}"
        while (again := (await server.http.get(path)).json())["status"] in ("queued", "in_progress"):
            await server.http.get("/live")
    texts = [response["output"][0]["content"][0]["text"] for response in (undisturbed, again)]
    assert texts[0] == texts[1] and again["usage"]["input_tokens"] == undisturbed["usage"]["input_tokens"]


async def test_input_items_of_a_response_that_is_computed_or_was_cancelled() -> None:
    engine = ScriptedEngine(says("Yes."))
    engine.gate.clear()
    async with served(engine) as http:
        created = (await http.post(PATH, json={"input": "A", "background": True})).json()
        path = f"{PATH}/{created['id']}"
        await until(lambda: engine.running > 0)
        running = (await http.get(f"{path}/input_items")).json()
        assert (await http.get(path)).json()["status"] == "in_progress"
        follows = {"input": "B", "previous_response_id": created["id"]}
        assert (await http.post(PATH, json=follows)).status_code == 400
        await http.post(f"{path}/cancel")
        cancelled = (await http.get(f"{path}/input_items")).json()
        assert (await http.delete(path)).json()["deleted"]
        assert (await http.get(f"{path}/input_items")).status_code == (await http.get(path)).status_code == 404
    assert running["data"][0]["content"][0]["text"] == "A" and running == cancelled


async def test_an_expired_response_is_not_shown_as_running() -> None:
    engine = ScriptedEngine(says("Yes."), failure=WorkerError("lost"), failure_after=1)
    async with served(engine, background_s=0.01) as http:
        path = f"{PATH}/{(await http.post(PATH, json={'input': 'A', 'background': True})).json()['id']}"
        while (reply := await http.get(path)).status_code == 200:
            assert reply.json()["status"] != "completed"
            await asyncio.sleep(0.05)  # each read restarts the time
    assert reply.status_code == 404


async def test_an_id_that_is_no_text_is_not_listed() -> None:
    async with served(ScriptedEngine(says("Yes."))) as http:
        calls = [{"type": "web_search_call", "id": given, "query": "cats"} for given in (5, "ws_1", None)]
        response = (await http.post(PATH, json={"input": [*calls, {"role": "user", "content": "A"}]})).json()
        items = (await http.get(f"{PATH}/{response['id']}/input_items?order=asc")).json()["data"]
    assert [item["id"].startswith(kind) for item, kind in zip(items, ("item_", "ws_1", "item_"), strict=False)] == [
        True
    ] * 3
    assert all(item["query"] == "cats" for item in items[:3])


@pytest.mark.parametrize(("held_bytes", "status"), [(200, 503), (1000, 200)])
async def test_the_chat_that_a_response_continues_counts_in_the_bytes_of_open_requests(
    held_bytes: int, status: int
) -> None:
    admission = Admission(ApiSettings(max_held_bytes=held_bytes))
    async with client(make_app(ScriptedEngine(says("a" * 60)), admission=admission)) as http:
        first = await http.post(PATH, json={"input": "A"})
        for _ in range(4):  # ended requests hold no bytes
            reply = await http.post(PATH, json={"input": "B", "previous_response_id": first.json()["id"]})
            assert len(reply.request.content) < 200 and reply.status_code == status, reply.text
            assert status == 200 or "the server is busy with" in reply.json()["error"]["message"]
