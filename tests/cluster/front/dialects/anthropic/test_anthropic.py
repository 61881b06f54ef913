"""Tests of Anthropic's Messages API: blocks, events, counts, errors, and the official client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from anthropic import AsyncAnthropic, AuthenticationError, BadRequestError, DefaultAsyncHttpxClient
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from llamaclust.cluster.front.dialects.anthropic.message import MessageView
from llamaclust.cluster.front.text import service as service_module
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.core.errors import QueueFullError, WorkerError
from llamaclust.model.chat.template import ChatTemplate
from support.clusters.served import MODEL, ScriptedEngine, client, events_of, make_app, says, serving, tokenizer
from support.clusters.tool_chats import CALL, TEMPLATE

PATH = "/v1/messages"
HELLO: dict[str, Any] = {"max_tokens": 90, "messages": [{"role": "user", "content": "Hi"}]}
TOOL: dict[str, Any] = {"name": "look", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
WEB = {"type": "web_search_20250305", "name": "web_search"}
RED = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}


async def post(body: dict[str, Any], answer: str = "Yes.", path: str = PATH) -> tuple[httpx.Response, str]:
    """Returns the reply and the engine's prompt."""
    engine = ScriptedEngine(says(answer))
    with ChatTemplate(TEMPLATE, "", "") as template:
        async with client(make_app(engine, template)) as http:
            reply = await http.post(path, json=body)
    return reply, tokenizer().decode(engine.submitted[0].prompt) if engine.submitted else ""


async def message_of(answer: str = "Yes.", **fields: Any) -> dict[str, Any]:
    reply, _ = await post(HELLO | fields, answer)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


async def prompt_of(**fields: Any) -> str:
    reply, prompt = await post(HELLO | fields)
    assert reply.status_code == 200, reply.text
    return prompt


async def stream_of(answer: str, **fields: Any) -> list[dict[str, Any]]:
    reply, _ = await post(HELLO | {"stream": True} | fields, answer)
    assert reply.headers["content-type"].startswith("text/event-stream"), reply.text
    names = [line.removeprefix("event: ") for line in reply.text.split("\n") if line.startswith("event: ")]
    events = events_of(reply.text)
    assert names == [event["type"] for event in events]
    return events


def put_together(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a stream's blocks, assembled like in clients, and asserts the order of the events."""
    blocks: list[dict[str, Any]] = []
    texts: list[str] = []
    is_open = False
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert not is_open and event["index"] == len(blocks)
                is_open = True
                blocks.append(dict(event["content_block"]))
                texts.append("")
            case "content_block_delta":
                assert is_open and event["index"] == len(blocks) - 1
                delta = event["delta"]
                texts[-1] += delta.get("text", "") + delta.get("thinking", "") + delta.get("partial_json", "")
            case "content_block_stop":
                assert is_open and event["index"] == len(blocks) - 1
                is_open = False
                kind = blocks[-1]["type"]
                blocks[-1] |= {"input": json.loads(texts[-1] or "{}")} if kind == "tool_use" else {kind: texts[-1]}
    assert not is_open
    return blocks


# -- messages ----------------------------------------------------------------------------------------------------------


async def test_a_message() -> None:
    message = await message_of(model="claude-x", metadata={"user_id": "u"}, temperature=0.5, top_k=3)
    assert message["id"].startswith("msg_") and message["model"] == MODEL
    assert (message["type"], message["role"]) == ("message", "assistant")
    assert message["content"] == [{"type": "text", "text": "Yes."}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    usage = message["usage"]
    prompt = len(tokenizer().encode("<user>Hi<assistant>", add_special=False))
    assert usage["cache_read_input_tokens"] == 3 and usage["input_tokens"] + 3 == prompt
    assert usage["output_tokens"] > 1 and usage["cache_creation_input_tokens"] == 0


async def test_why_an_answer_ends() -> None:
    stopped = await message_of("One. Two", stop_sequences=[". "])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", ". ")
    assert stopped["content"] == [{"type": "text", "text": "One"}]
    assert (await message_of(max_tokens=1))["stop_reason"] == "max_tokens"
    for end in ("Ro", "</tool_call>"):
        stopped = await message_of(CALL, tools=[TOOL], stop_sequences=[end])
        assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", end)


@pytest.mark.parametrize(
    ("system", "shown"),
    [
        ("Be brief.", "Be brief."),
        (
            [{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "it."}],
            "Be\nit.",
        ),
        ("x-anthropic-billing-header: cc_version=2.1; cc_entrypoint=cli; cch=a5145;Be brief.", "Be brief."),
        ("x-anthropic-billing-header: cc_version=2.1; cch=a5145;\nBe brief.", "Be brief."),
        ("x-anthropic-billing-header: cch=a5145\nBe brief.", "Be brief."),
        ([{"type": "text", "text": "x-anthropic-billing-header: cch=1;"}, {"type": "text", "text": "Be."}], "Be."),
        ("Say x-anthropic-billing-header: cch=1;", "Say x-anthropic-billing-header: cch=1;"),
    ],
)
async def test_system_prompts(system: Any, shown: str) -> None:
    assert await prompt_of(system=system) == f"<system>{shown}<user>Hi<assistant>"


async def test_turns() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "A"}]},
        {"role": "user", "content": "B"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "redacted_thinking", "data": "xx"},
                {"type": "text", "text": "C"},
                {"type": "tool_use", "id": "t1", "name": "look", "input": {"city": "Rom"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "D"},
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sun"}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": True},
            ],
        },
    ]
    prompt = await prompt_of(messages=messages)
    call = '<tool_call>{"name": "look", "arguments": {"city": "Rom"}}</tool_call>'
    assert prompt == f"<user>A\nB<assistant><think>hm</think>C{call}<tool>sun<tool>Error: no<user>D<assistant>"


async def test_a_last_message_of_the_assistant_is_continued() -> None:
    messages = [*HELLO["messages"], {"role": "assistant", "content": "Well, "}]
    assert await prompt_of(messages=messages) == "<user>Hi<assistant>Well, "


async def test_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "answer_grammar", None)  # not used for a count
    body = {key: value for key, value in HELLO.items() if key != "max_tokens"}
    reply, prompt = await post(body | {"system": "Be."}, path=PATH + "/count_tokens")
    expected = len(tokenizer().encode("<system>Be.<user>Hi<assistant>", add_special=False))
    assert reply.json() == {"input_tokens": expected} and prompt == ""


# -- tools and thinking ------------------------------------------------------------------------------------------------


async def test_calls() -> None:
    message = await message_of("So." + CALL, tools=[TOOL])
    text, call = message["content"]
    assert text == {"type": "text", "text": "So."} and message["stop_reason"] == "tool_use"
    assert call.pop("id").startswith("toolu_")
    assert call == {"type": "tool_use", "name": "look", "input": {"city": "Rom"}}


async def test_choices_of_tools() -> None:
    assert (await prompt_of(tools=[TOOL, TOOL | {"name": "run"}])).startswith("+look+run")
    assert (await prompt_of(tools=[TOOL], tool_choice={"type": "none"})).startswith("<user>")
    one = await message_of(CALL * 2, tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert len(one["content"]) == 1
    chosen = {"tools": [TOOL, TOOL | {"name": "run"}], "tool_choice": {"type": "tool", "name": "run"}}
    assert (await prompt_of(**chosen)).startswith("+run<user>")


@pytest.mark.parametrize("thinking", [{"type": "enabled", "budget_tokens": 50}, {"type": "between_tools"}])
async def test_thinking(thinking: dict[str, Any]) -> None:
    message = await message_of("<think>Hm.</think>Yes.", thinking=thinking)
    assert message["content"] == [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "Yes."},
    ]


async def test_a_call_that_was_cut() -> None:
    cut = '<tool_call>{"name": "look", "arguments": {"city": "R'
    message = await message_of(cut, tools=[TOOL], max_tokens=len(tokenizer().encode(cut, add_special=False)))
    assert message["stop_reason"] == "max_tokens"
    assert [*message["content"][0]["input"]] == ["INVALID_JSON"]


async def test_a_call_with_numbers_that_json_lacks() -> None:
    for number in ("1e999", "NaN"):
        (call,) = (await message_of(CALL.replace('"Rom"', number), tools=[TOOL]))["content"]
        assert call["input"] == {"INVALID_JSON": '{"city": ' + number + "}"}


async def test_an_answer_that_obeys_a_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    body = HELLO | {"output_config": {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}}
    engine = ScriptedEngine(says("{}"))
    with ChatTemplate(TEMPLATE, "", "") as template:
        async with client(make_app(engine, template)) as http:
            reply = await http.post(PATH, json=body)
    assert reply.status_code == 200, reply.text
    assert engine.submitted[0].grammar is not None


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["Yes.", "<think>Hm.</think>Yes.", "So." + CALL, CALL * 2, ""])
async def test_a_stream_makes_the_same_message(answer: str) -> None:
    events = await stream_of(answer, tools=[TOOL])
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    start, end = events[0]["message"], events[-2]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["input_tokens"] > 0
    whole = await message_of(answer, tools=[TOOL])
    blocks = put_together(events)
    for block in (*blocks, *whole["content"]):
        block.pop("id", None)
    assert blocks == whole["content"]
    assert end["delta"] == {key: whole[key] for key in ("stop_reason", "stop_sequence")}
    assert end["usage"] == whole["usage"]


async def test_bodies_and_events_have_the_fields_that_the_official_client_declares() -> None:
    declared: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    answer = "<think>Hm.</think>So." + CALL
    for event in await stream_of(answer, tools=[TOOL]):
        if event["type"] != "ping":
            declared.validate_python(event)
    Message.model_validate(await message_of(answer, tools=[TOOL]))


async def test_thinking_ends_with_a_signature() -> None:
    events = await stream_of("<think>Hm.</think>Yes.")
    kinds = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
    assert kinds[0] == "thinking_delta" and kinds[-1] == "text_delta" and kinds.count("signature_delta") == 1


async def test_a_stream_that_fails_ends_with_an_error() -> None:
    engine = ScriptedEngine(says("Yes."), failure=WorkerError("lost"), failure_after=2)
    async with client(make_app(engine)) as http:
        reply = await http.post(PATH, json=HELLO | {"stream": True})
    last = reply.text.strip().split("\n\n")[-1] if reply.status_code == 200 else reply.text
    assert "overloaded_error" in last and "lost" in last


async def test_a_stream_that_meets_a_mistake_of_ours_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    events = MessageView._events

    def broken(view: MessageView, chunk: TextChunk) -> Iterator[Any]:
        yield from events(view, chunk)
        raise KeyError(0)

    monkeypatch.setattr(MessageView, "_events", broken)
    *_, last = await stream_of("Yes.")
    assert last["type"] == "error" and "internal error" in last["error"]["message"]


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": [{"role": "tool", "content": "a"}]}, "role"),
        ({"messages": []}, "messages"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b"}]}]},
            "tool_result",
        ),
        ({"tools": [WEB], "tool_choice": {"type": "tool", "name": "web_search"}}, "'web_search'"),
        ({"tools": [TOOL, TOOL]}, "same name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "run"}}, "'run'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"output_format": {"type": "xml"}}, "output_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
async def test_refusals(fields: dict[str, Any], named: str) -> None:
    reply, _ = await post(HELLO | fields)
    assert reply.status_code == 400
    body = reply.json()
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert named in body["error"]["message"]


async def test_a_prompt_that_is_too_long() -> None:
    reply, _ = await post(HELLO | {"messages": [{"role": "user", "content": "word " * 400}]})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["message"].startswith("prompt is too long: ")


async def test_hints_are_named() -> None:
    reply, _ = await post(HELLO | {"thinking": {"type": "enabled", "display": "omitted"}, "top_secret": 1})
    assert reply.status_code == 200
    assert {"display", "top_secret"} <= {*reply.headers["x-llamaclust-ignored"].split(", ")}


# -- the official client -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def official(engine: ScriptedEngine, **settings: Any) -> AsyncIterator[AsyncAnthropic]:
    with ChatTemplate(TEMPLATE, "", "") as template:
        async with serving(make_app(engine, template, **settings)) as url:
            http = DefaultAsyncHttpxClient(trust_env=False)
            async with AsyncAnthropic(
                base_url=url, api_key="sk-secret-1", max_retries=0, http_client=http
            ) as anthropic:
                yield anthropic


async def test_the_official_client() -> None:
    chat = HELLO | {"max_tokens": 120}
    async with official(ScriptedEngine(says("<think>Hm.</think>So." + CALL)), api_keys=("sk-secret-1",)) as anthropic:
        message = await anthropic.messages.create(model="claude-x", tools=[TOOL], **chat)
        async with anthropic.messages.stream(model="claude-x", tools=[TOOL], **chat) as stream:
            texts = [text async for text in stream.text_stream]
            streamed = await stream.get_final_message()
        counted = await anthropic.messages.count_tokens(model="claude-x", messages=HELLO["messages"])
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert "".join(texts) == "So." and counted.input_tokens > 0
    assert streamed.stop_reason == message.stop_reason == "tool_use"
    assert streamed.content[2].input == {"city": "Rom"}
    assert streamed.usage.output_tokens == message.usage.output_tokens > 0


async def test_the_official_client_understands_errors() -> None:
    async with official(ScriptedEngine(says("a"))) as anthropic:
        with pytest.raises(BadRequestError, match="image input is not supported"):
            image: Any = [{"role": "user", "content": [RED]}]
            strict = {"X-Llamaclust-Strict": "1"}
            await anthropic.messages.create(model="m", max_tokens=1, messages=image, extra_headers=strict)
    async with official(ScriptedEngine(says("a")), api_keys=("sk-secret-2",)) as anthropic:
        with pytest.raises(AuthenticationError):
            await anthropic.messages.create(model="m", **HELLO)
    async with official(ScriptedEngine(says("a"), refusal=QueueFullError("full"))) as anthropic:
        with pytest.raises(Exception, match="rate_limit_error"):
            await anthropic.messages.create(model="m", **HELLO)
