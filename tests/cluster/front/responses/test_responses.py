"""Tests of OpenAI's Responses API: items, events, stored responses, and the official client."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, DefaultAsyncHttpxClient, NotFoundError
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from llamaclust.cluster.front import json_text
from llamaclust.cluster.front.dialects.openai.response_store import ResponseStore, StoredResponse
from llamaclust.cluster.front.dialects.openai.response_view import OutputItems, ReasoningCount
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.text import service as service_module
from llamaclust.model.chat.template import ChatTemplate
from support.clusters.served import MODEL, ScriptedEngine, events_of, make_app, says, serving, tokenizer
from support.clusters.tool_chats import CALL, TEMPLATE, served

PATH = "/v1/responses"
TOOL: dict[str, Any] = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}

ALLOWED = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "look"}]}


async def respond(answer: str = "Yes.", **fields: Any) -> tuple[httpx.Response, str]:
    """Returns the reply and the engine's prompt."""
    engine = ScriptedEngine(says(answer))
    async with served(engine) as http:
        reply = await http.post(PATH, json={"input": "Hi"} | fields)
    return reply, tokenizer().decode(engine.submitted[0].prompt) if engine.submitted else ""


async def response_of(answer: str = "Yes.", **fields: Any) -> dict[str, Any]:
    reply, _ = await respond(answer, **fields)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


async def prompt_of(**fields: Any) -> str:
    reply, prompt = await respond(**fields)
    assert reply.status_code == 200, reply.text
    return prompt


def comparable(value: Any) -> Any:
    """Removes fields with random ids and times."""
    if isinstance(value, dict):
        drawn = ("id", "call_id", "item_id", "created_at", "completed_at")
        return {key: comparable(item) for key, item in value.items() if key not in drawn}
    return [comparable(item) for item in value] if isinstance(value, list) else value


# -- responses ---------------------------------------------------------------------------------------------------------


async def test_a_response() -> None:
    response = await response_of(metadata={"a": "b"}, max_output_tokens=50, temperature=0.5)
    assert response["id"].startswith("resp_") and response["object"] == "response" and response["model"] == MODEL
    assert response["status"] == "completed" and response["error"] is response["incomplete_details"] is None
    (item,) = response["output"]
    assert item["id"].startswith("msg_") and (item["role"], item["status"]) == ("assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": "Yes.", "annotations": [], "logprobs": []}]
    usage = response["usage"]
    assert usage["input_tokens"] == len(tokenizer().encode("<user>Hi<assistant>", add_special=False))
    assert usage["input_tokens_details"]["cached_tokens"] == 3
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert response["metadata"] == {"a": "b"} and response["max_output_tokens"] == 50


async def test_a_response_that_was_cut() -> None:
    response = await response_of("Yes and no.", max_output_tokens=2)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"


async def test_items() -> None:
    items = [
        {"role": "developer", "content": "B"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "C"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "D", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"city": "Rom"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
    ]
    prompt = await prompt_of(input=items, instructions="A")
    assert prompt == f"<system>A\n\nB<user>C<assistant><think>hm</think>D{CALL}<tool>sun<assistant>"


async def test_calls_and_reasoning() -> None:
    response = await response_of("<think>Hm.</think>So." + CALL, tools=[TOOL], max_output_tokens=120)
    thought, message, call = response["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm."}] and thought["summary"] == []
    assert message["content"][0]["text"] == "So."
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "look", '{"city": "Rom"}')
    assert call["call_id"] and call["id"].startswith("fc_")
    assert 0 < response["usage"]["output_tokens_details"]["reasoning_tokens"] < response["usage"]["output_tokens"]
    assert response["tools"][0]["name"] == "look"


async def test_choices_of_tools() -> None:
    run = TOOL | {"name": "run"}
    assert (await prompt_of(tools=[TOOL, run])).startswith("+look+run<user>")
    assert (await prompt_of(tools=[TOOL], tool_choice="none")).startswith("<user>")
    choice = {"type": "function", "name": "run"}
    twice = await response_of(CALL * 2, tools=[TOOL], tool_choice=choice | {"name": "look"}, max_output_tokens=140)
    assert len(twice["output"]) == 1 and twice["parallel_tool_calls"] is False
    assert (await prompt_of(tools=[TOOL, run], tool_choice=choice)).startswith("+run<user>")


async def test_an_answer_that_obeys_a_schema() -> None:
    engine = ScriptedEngine(says("{}"))
    form = {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True}
    async with served(engine) as http:
        reply = await http.post(PATH, json={"input": "Hi", "text": {"format": form}})
    assert reply.status_code == 200, reply.text
    assert engine.submitted[0].grammar is not None and reply.json()["text"]["format"] == form


async def test_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "answer_grammar", None)  # not used for a count
    async with served(ScriptedEngine(says("a"))) as http:
        reply = await http.post(f"{PATH}/input_tokens", json={"input": "Hi", "instructions": "A"})
    expected = len(tokenizer().encode("<system>A<user>Hi<assistant>", add_special=False))
    assert reply.json() == {"object": "response.input_tokens", "input_tokens": expected}


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["Yes.", "<think>Hm.</think>Yes.", "So." + CALL, CALL * 2, ""])
async def test_a_stream_makes_the_same_response(answer: str) -> None:
    fields = {"tools": [TOOL], "max_output_tokens": 140}
    reply, _ = await respond(answer, stream=True, **fields)
    *events, done = events_of(reply.text)
    names = [line.removeprefix("event: ") for line in reply.text.split("\n") if line.startswith("event: ")]
    kinds = [event["type"] for event in events]
    assert done == "[DONE]" and names == kinds
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-2:] == ["response.output_item.done", "response.completed"]
    output = events[-1]["response"]["output"]
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == output
    for place, item in enumerate(output):
        deltas = [event for event in events if event["type"].endswith(".delta") and event["output_index"] == place]
        text = "".join(event["delta"] for event in deltas)
        assert text == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
        assert {event["item_id"] for event in deltas} <= {item["id"]}
    assert comparable(events[-1]["response"]) == comparable(await response_of(answer, **fields))


async def test_the_events_of_a_message() -> None:
    reply, _ = await respond("Yes.", stream=True)
    kinds = [event["type"] for event in events_of(reply.text)[:-1]]
    assert kinds[2:4] == ["response.output_item.added", "response.content_part.added"]
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert {*kinds[4:-4]} == {"response.output_text.delta"}


# -- stored responses --------------------------------------------------------------------------------------------------


async def test_a_response_follows_another() -> None:
    engine = ScriptedEngine(says("Yes."))
    async with served(engine) as http:
        first = (await http.post(PATH, json={"input": "A", "instructions": "S"})).json()
        second = await http.post(PATH, json={"input": "B", "previous_response_id": first["id"]})
        third = await http.post(PATH, json={"input": "C", "previous_response_id": second.json()["id"], "stream": True})
    assert third.status_code == 200 and second.json()["previous_response_id"] == first["id"]
    prompts = [tokenizer().decode(generation.prompt) for generation in engine.submitted]
    assert prompts[1] == "<user>A<assistant>Yes.<user>B<assistant>"
    assert prompts[2] == "<user>A<assistant>Yes.<user>B<assistant>Yes.<user>C<assistant>"


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"background": True}, {"store": False}])
async def test_a_deleted_response_is_not_returned_to_the_same_request_again(more: dict[str, Any]) -> None:
    engine = ScriptedEngine(says("Yes."))
    async with served(engine) as http:
        ids = []
        for _ in range(2):
            reply = await http.post(PATH, json={"input": "A", **more}, headers={"Idempotency-Key": "one"})
            assert reply.status_code == 200, reply.text
            ids.append(f"resp_{engine.submitted[-1].request_id}")
            assert ids[-1] in reply.text
            assert (await http.delete(f"{PATH}/{ids[-1]}")).json()["deleted"]
            assert (await http.delete(f"{PATH}/{ids[-1]}")).status_code == 404
    assert len({*ids}) == 2


async def test_deleting_a_response_leaves_the_replies_of_other_endpoints() -> None:
    engine = ScriptedEngine(says("Yes."))
    async with served(engine) as http:
        body, headers = {"messages": [{"role": "user", "content": "A"}]}, {"Idempotency-Key": "one"}
        first = await http.post("/v1/chat/completions", json=body, headers=headers)
        assert (await http.delete(f"{PATH}/resp_{engine.submitted[0].request_id}")).status_code == 404
        assert (await http.post("/v1/chat/completions", json=body, headers=headers)).content == first.content


async def test_stored_responses_are_read_and_deleted() -> None:
    async with served(ScriptedEngine(says("Yes."))) as http:
        items = [{"role": "user", "content": "A"}, {"role": "user", "content": "B"}]
        response = (await http.post(PATH, json={"input": items})).json()
        path = f"{PATH}/{response['id']}"
        assert (await http.get(path)).json() == response
        newest = (await http.get(f"{path}/input_items", params={"limit": 1})).json()
        rest = (await http.get(f"{path}/input_items", params={"after": newest["last_id"]})).json()
        assert newest["data"][0]["content"] == [{"type": "input_text", "text": "B"}] and newest["has_more"]
        unknown = await http.get(f"{path}/input_items", params={"after": "none"})
        assert unknown.status_code == 400 and unknown.json()["error"]["param"] == "after"
        assert rest["data"][0]["content"] == [{"type": "input_text", "text": "A"}] and not rest["has_more"]
        assert (await http.post(f"{path}/cancel")).status_code == 400
        assert (await http.delete(path)).json() == {"id": response["id"], "object": "response", "deleted": True}
        assert (await http.get(path)).status_code == (await http.delete(path)).status_code == 404


async def test_a_response_that_is_not_stored() -> None:
    async with served(ScriptedEngine(says("Yes."))) as http:
        response = (await http.post(PATH, json={"input": "A", "store": False})).json()
        assert (await http.get(f"{PATH}/{response['id']}")).status_code == 404
        follower = await http.post(PATH, json={"input": "B", "previous_response_id": response["id"]})
    assert follower.status_code == 400 and follower.json()["error"]["code"] == "previous_response_not_found"


async def test_responses_belong_to_a_key() -> None:
    keys = ("sk-secret-1", "sk-secret-2")
    mine, other = ({"Authorization": f"Bearer {key}"} for key in keys)
    async with served(ScriptedEngine(says("Yes.")), api_keys=keys) as http:
        response = (await http.post(PATH, json={"input": "A"}, headers=mine)).json()
        path = f"{PATH}/{response['id']}"
        statuses = [(await http.get(path, headers=headers)).status_code for headers in (mine, other)]
    assert statuses == [200, 404]


def test_tokens_of_reasoning_are_counted_alike_for_any_pieces() -> None:
    text = "Hm, the cat sat. " * 300
    counts = set()
    for length in (1, 7, 1024, len(text)):
        count = ReasoningCount(tokenizer())
        for start in range(0, len(text), length):
            count.add(text[start : start + length])
        counts.add(count.total())
    (tokens,) = counts
    assert 0 <= tokens - len(tokenizer().encode(text, add_special=False)) <= len(text) // 1024


async def test_a_large_response_is_made_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()
    take = OutputItems.take

    def spied(items: OutputItems, events: Any, logprobs: Any) -> Any:
        threads.add(threading.get_ident())
        return take(items, events, logprobs)

    monkeypatch.setattr(OutputItems, "take", spied)
    monkeypatch.setattr(json_text, "_LARGE_ENTRIES", 3)
    response = await response_of("<think>Hm.</think>Yes.")
    assert threads and threading.get_ident() not in threads
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == 3


def stored(name: str, text: str = "") -> StoredResponse:
    return StoredResponse({"id": name, "status": "completed", "text": text}, [], ())


def test_the_store_is_bounded() -> None:
    store = ResponseStore(max_responses=2, max_bytes=300)
    for name in "abc":
        store.put("", stored(name))
    assert store.get("", "a") is None and store.get("", "b") and store.get("", "c")
    store.put("", stored("d", "x" * 150))
    assert store.get("", "b") is None and store.get("", "d")
    store.put("", stored("e", "x" * 400))
    assert store.get("", "e") is None and store.get("", "d")
    with pytest.raises(HttpError, match="not stored"):
        store.followed("other", "d")


def test_an_owner_of_many_responses_does_not_displace_those_of_others() -> None:
    store = ResponseStore(max_responses=3, max_bytes=2000)
    store.put("mine", stored("a"))
    for name in "bcde":
        store.put("other", stored(name))
    assert store.get("mine", "a") and store.get("other", "e") and store.get("other", "c") is None
    for name in "fgh":
        store.put("other", stored(name, "x" * 900))
    assert store.get("mine", "a") and store.get("other", "h") and store.get("other", "f") is None


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input": [{"type": "item_reference", "id": "a"}]}, "'a' is not stored"),
        ({"input": [{"id": "a"}]}, "'a' is not stored"),
        ({"input": [{"type": "item_reference"}]}, "id"),
        ({"input": [{"role": "tool", "content": "a"}]}, "role"),
        ({"input": None}, "input"),
        ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "web_search"),
        ({"tools": [TOOL, TOOL]}, "same name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True, "store": False}, "store"),
        ({"include": "message.output_text.logprobs"}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function"}]}}, "tool_choice"),
        ({"tool_choice": ALLOWED | {"mode": "none"}, "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": ALLOWED}, "not among the tools"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
    ],
)
async def test_refusals(fields: dict[str, Any], named: str) -> None:
    reply, prompt = await respond(**fields)
    assert reply.status_code == 400 and prompt == ""
    assert named in reply.json()["error"]["message"]


# -- the official client -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def official(engine: ScriptedEngine) -> AsyncIterator[AsyncOpenAI]:
    with ChatTemplate(TEMPLATE, "", "") as template:
        async with serving(make_app(engine, template)) as url:
            http = DefaultAsyncHttpxClient(trust_env=False)
            async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as openai:
                yield openai


async def test_bodies_and_events_have_the_fields_that_the_official_client_declares() -> None:
    declared: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    fields = {"tools": [TOOL], "max_output_tokens": 140, "stream": True, "background": True}
    reply, _ = await respond("<think>Hm.</think>So." + CALL, **fields)
    *events, _ = events_of(reply.text)
    for event in events:
        declared.validate_python(event)
    assert {event["type"].split(".")[1] for event in events} >= {"reasoning_text", "output_text", "content_part"}
    for event in events:
        if "response" in event:
            Response.model_validate(event["response"])


STRICT = {"X-Llamaclust-Strict": "1"}


async def test_the_official_client() -> None:
    async with official(ScriptedEngine(says("Yes."))) as openai:
        response = await openai.responses.create(model=MODEL, input="Hi")
        again = await openai.responses.retrieve(response.id)
        async with openai.responses.stream(model=MODEL, input="Hi", previous_response_id=response.id) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        items = await openai.responses.input_items.list(response.id)
        await openai.responses.delete(response.id)
        with pytest.raises(NotFoundError):
            await openai.responses.retrieve(response.id)
        with pytest.raises(BadRequestError, match="image input"):
            image: Any = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]
            await openai.responses.create(model=MODEL, input=image, extra_headers=STRICT)
    assert response.output_text == again.output_text == final.output_text == "Yes."
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed" and len(items.data) == 1


async def test_the_official_client_resumes_a_background_stream() -> None:
    async with official(ScriptedEngine(says("Yes, no."))) as openai:
        stream = await openai.responses.create(model=MODEL, input="Hi", background=True, stream=True)
        events = [event async for event in stream]
        response_id = json.loads(events[0].model_dump_json())["response"]["id"]
        rest = [event async for event in await openai.responses.retrieve(response_id, stream=True, starting_after=3)]
    assert [event.sequence_number for event in rest] == [*range(4, len(events))]
