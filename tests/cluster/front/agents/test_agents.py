"""Checks answers to recorded requests of coding agents in their default configuration, and to the results of calls,
with strict templates, large vocabularies and a context of 32k tokens."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import httpx
import pytest

from llamaclust.cluster.front.body import HEADER
from llamaclust.model.chat.template import ChatTemplate
from llamaclust.model.tokenizers.loading import load_tokenizer
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from support.chat.agents.agents import AGENTS
from support.chat.agents.recordings import RecordedRequest, recorded
from support.chat.sample_templates import TEMPLATES as NOTATIONS
from support.chat.strict_templates import STRICT_TEMPLATES
from support.clusters import served
from support.clusters.served import ScriptedEngine, client, events_of, make_app, says
from support.clusters.tool_chats import TEMPLATE
from support.models.tiny_tokenizers import byte_level

LARGE = 262_144
SMALL = 4096
CALLING = [name for name, agent in AGENTS.items() if agent.calls]
TEMPLATES = {name: STRICT_TEMPLATES[name] for name in ("gemma", "mistral", "llama-2")} | {"tools": TEMPLATE}
_HOSTED = {"tools.web_search", "include.reasoning.encrypted_content", "content.input_image"}
OMITTED = {"codex": _HOSTED, "codex-oss": _HOSTED, "claude-code": {"display", "content.image"}}


@cache
def tokenizer_of(vocabulary: int) -> Tokenizer:
    return load_tokenizer(byte_level(vocabulary))


def use_vocabulary(vocabulary: int, context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "CONTEXT", context)
    monkeypatch.setattr(served, "tokenizer", lambda: tokenizer_of(vocabulary))
    monkeypatch.setattr(served, "VOCABULARY", vocabulary)
    monkeypatch.setattr(served, "END", vocabulary - 1)


@pytest.fixture(params=[*((SMALL, name) for name in TEMPLATES), (LARGE, "tools")], ids=str)
def template(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sets the size of the vocabulary and returns a chat template."""
    vocabulary, name = request.param
    use_vocabulary(vocabulary, 1 << 17, monkeypatch)
    return TEMPLATES[name]


@asynccontextmanager
async def serving(template: str, answer: str) -> AsyncIterator[tuple[ScriptedEngine, httpx.AsyncClient]]:
    engine = ScriptedEngine(says(answer))
    with ChatTemplate(template, "<s>", "</s>") as rendered:
        async with client(make_app(engine, rendered, strict_model=False)) as http:
            yield engine, http


def prompt_of(engine: ScriptedEngine) -> str:
    return served.tokenizer().decode(engine.submitted[-1].prompt)


async def send(http: httpx.AsyncClient, request: RecordedRequest) -> httpx.Response:
    """Sends a request as it was recorded, and checks that its answer or stream is not an error."""
    content = json.dumps(request.body).encode() if request.body else None
    reply = await http.request(request.method, request.path, content=content, headers=request.headers)
    assert reply.status_code == 200, reply.text
    if request.body.get("stream"):
        assert all("error" not in event for event in shown(reply))
    return reply


async def post(http: httpx.AsyncClient, request: RecordedRequest, body: dict[str, Any], stream: bool) -> httpx.Response:
    body = body | {"stream": stream}
    if not stream:
        body.pop("stream_options", None)
    return await send(http, RecordedRequest(request.method, request.path, request.headers, body))


def shown(reply: httpx.Response) -> list[dict[str, Any]]:
    """Returns the events of a stream without `[DONE]`."""
    return [event for event in events_of(reply.text) if isinstance(event, dict)]


def texts_of(value: Any) -> Iterator[str]:
    """Yields the values of all fields `text` at any depth."""
    if isinstance(value, dict):
        yield from (value["text"],) if isinstance(value.get("text"), str) else ()
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from texts_of(item)


@pytest.mark.parametrize("name", AGENTS)
async def test_recorded_requests_are_answered(name: str, template: str) -> None:
    async with serving(template, "Done.") as (engine, http):
        for request in recorded(name):
            await send(http, request)
            body = request.body
            texts = [*texts_of(body.get("input") or body.get("messages"))]
            assert all(text.strip() in prompt_of(engine) for text in texts)


@pytest.mark.parametrize("notation", ["hermes", "coder", "glm", "llama"])
@pytest.mark.parametrize("name", AGENTS)
async def test_default_requests_fit_a_context_of_32k(name: str, notation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_vocabulary(SMALL, 1 << 15, monkeypatch)
    async with serving(NOTATIONS[notation], "Done.") as (engine, http):
        for request in recorded(name):
            await send(http, request)
        assert any("one of many" in request for request in map(str, recorded(name)))
    assert max(len(request.prompt) for request in engine.submitted) < 1 << 15


@pytest.mark.parametrize("name", AGENTS)
async def test_ignored_fields_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_vocabulary(SMALL, 1 << 17, monkeypatch)
    async with serving(TEMPLATE, "Done.") as (_, http):
        named = [(await send(http, request)).headers.get(HEADER) for request in recorded(name)]
    assert {field for line in named if line for field in line.split(", ")} == OMITTED.get(name, set())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", CALLING)
async def test_a_call_and_its_result(name: str, template: str, stream: bool) -> None:
    function, arguments = AGENTS[name].calls[0]
    answer = f"<tool_call>{json.dumps({'name': function, 'arguments': arguments})}</tool_call>"
    first = next(request for request in recorded(name) if request.offers_tools)
    async with serving(template, answer) as (engine, http):
        reply = await post(http, first, first.body, stream)
        (made, more) = _FOLLOWED[AGENTS[name].path](reply, stream)
        assert made == (function, arguments)
        place = "input" if "input" in first.body else "messages"
        await post(http, first, first.body | {place: [*first.body[place], *more]}, stream)
        prompt = prompt_of(engine)
    assert function in prompt and "a.txt" in prompt and "one of many" in prompt


Followed = tuple[tuple[str, dict[str, Any]], list[dict[str, Any]]]


def follow_responses(reply: httpx.Response, stream: bool) -> Followed:
    """Returns the call of a reply, and the items of the call and its result."""
    response = shown(reply)[-1]["response"] if stream else reply.json()
    (call,) = response["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "one of many"}
    return (call["name"], json.loads(call["arguments"])), [call, result]


def follow_messages(reply: httpx.Response, stream: bool) -> Followed:
    if stream:
        events = shown(reply)
        start = next(event for event in events if event["type"] == "content_block_start")
        pieces = [event["delta"].get("partial_json", "") for event in events if event["type"] == "content_block_delta"]
        block = {**start["content_block"], "input": json.loads("".join(pieces))}
    else:
        (block,) = reply.json()["content"]
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": "one of many"}
    more = [{"role": "assistant", "content": [block]}, {"role": "user", "content": [result]}]
    return (block["name"], block["input"]), more


def follow_chat(reply: httpx.Response, stream: bool) -> Followed:
    if stream:
        calls = [
            call
            for event in shown(reply)
            for choice in event["choices"]
            for call in choice["delta"].get("tool_calls", ())
        ]
        text = "".join(call["function"]["arguments"] for call in calls)
        call = {**calls[0], "function": {"name": calls[0]["function"]["name"], "arguments": text}}
    else:
        (call,) = reply.json()["choices"][0]["message"]["tool_calls"]
    function = call["function"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "one of many"}
    more = [{"role": "assistant", "content": "", "tool_calls": [call]}, result]
    return (function["name"], json.loads(function["arguments"])), more


_FOLLOWED = {"/v1/responses": follow_responses, "/v1/messages": follow_messages, "/v1/chat/completions": follow_chat}
