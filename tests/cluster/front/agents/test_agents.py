"""Checks answers, whole and streamed, to recorded requests of coding agents in their default configuration and to call
results, with strict templates and large vocabularies. The recordings lack the agents' texts."""

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
from support.chat.strict_templates import STRICT_TEMPLATES
from support.clusters import served
from support.clusters.served import ScriptedEngine, client, events_of, make_app, says
from support.clusters.tool_chats import TEMPLATE
from support.models.tiny_tokenizers import byte_level
from support.paths import DATA

LARGE = 262_144
CLIENTS = ("codex", "claude-code", "opencode")
TEMPLATES = {name: STRICT_TEMPLATES[name] for name in ("gemma", "mistral", "llama-2")} | {"tools": TEMPLATE}
CALLS = {
    "codex": ("exec_command", {"cmd": "cat a.txt"}),
    "claude-code": ("Bash", {"command": "cat a.txt"}),
    "opencode": ("bash", {"command": "cat a.txt"}),
}


@cache
def recorded(name: str) -> list[dict[str, Any]]:
    """Returns a client's recorded requests with their tools, each of which is in the file once."""
    record = json.loads((DATA / f"agents/{name}.json").read_text())
    requests: list[dict[str, Any]] = record["requests"]
    for body in (request["body"] for request in requests):
        body |= {"tools": [record["tools"][tool] for tool in body["tools"]]} if "tools" in body else {}
    return requests


@cache
def large_tokenizer() -> Tokenizer:
    return load_tokenizer(byte_level(LARGE))


@pytest.fixture(params=["few words", "262 thousand words"], autouse=True)
def _vocabulary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "CONTEXT", 1 << 17)
    if request.param != "few words":
        monkeypatch.setattr(served, "tokenizer", large_tokenizer)
        monkeypatch.setattr(served, "VOCABULARY", LARGE)
        monkeypatch.setattr(served, "END", LARGE - 1)


@asynccontextmanager
async def serving(template: str, answer: str) -> AsyncIterator[tuple[ScriptedEngine, httpx.AsyncClient]]:
    engine = ScriptedEngine(says(answer))
    with ChatTemplate(TEMPLATES[template], "<s>", "</s>") as rendered:
        async with client(make_app(engine, rendered, strict_model=False)) as http:
            yield engine, http


def prompt_of(engine: ScriptedEngine) -> str:
    return served.tokenizer().decode(engine.submitted[-1].prompt)


async def send(http: httpx.AsyncClient, request: dict[str, Any], *, stream: bool) -> httpx.Response:
    body = request["body"] | {"stream": stream}
    if not stream:
        body.pop("stream_options", None)
    reply = await http.post(request["path"], json=body, headers=request["headers"])
    assert reply.status_code == 200, reply.text
    return reply


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


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CLIENTS)
async def test_recorded_requests_are_answered(name: str, template: str, stream: bool) -> None:
    async with serving(template, "Done.") as (engine, http):
        for request in recorded(name):
            await send(http, request, stream=stream)
            texts = [*texts_of(request["body"].get("input") or request["body"]["messages"])]
            prompt = prompt_of(engine)
            assert all(text.strip() in prompt for text in texts)


async def test_what_is_left_out_is_named() -> None:
    async with serving("tools", "Done.") as (_, http):
        named = [
            (await send(http, request, stream=False)).headers.get(HEADER, "")
            for name in CLIENTS[:2]
            for request in recorded(name)
        ]
    assert "tools.web_search" in named[0] and "content.input_image" in named[1]
    assert "content.image" in named[3] and "tools.web_search_20250305" in named[4]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CLIENTS)
async def test_a_call_and_its_result(name: str, template: str, stream: bool) -> None:
    function, arguments = CALLS[name]
    answer = f"<tool_call>{json.dumps({'name': function, 'arguments': arguments})}</tool_call>"
    first = next(request for request in recorded(name) if request["body"].get("tools"))
    async with serving(template, answer) as (engine, http):
        reply = await send(http, first, stream=stream)
        followed = {
            "codex": follow_responses,
            "claude-code": follow_messages,
            "opencode": follow_chat,
        }[name](first["body"], reply, stream=stream)
        await send(http, {**first, "body": followed}, stream=stream)
        prompt = prompt_of(engine)
    assert function in prompt and "cat a.txt" in prompt and "one of many" in prompt


def follow_responses(body: dict[str, Any], reply: httpx.Response, *, stream: bool) -> dict[str, Any]:
    response = reply.json() if not stream else shown(reply)[-1]["response"]
    (call,) = response["output"]
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", *CALLS["codex"])
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "one of many"}
    return {**body, "input": [*body["input"], call, result]}


def follow_messages(body: dict[str, Any], reply: httpx.Response, *, stream: bool) -> dict[str, Any]:
    if stream:
        events = shown(reply)
        start = next(event for event in events if event["type"] == "content_block_start")
        pieces = [event["delta"].get("partial_json", "") for event in events if event["type"] == "content_block_delta"]
        block = {**start["content_block"], "input": json.loads("".join(pieces))}
    else:
        (block,) = reply.json()["content"]
    assert (block["type"], block["name"], block["input"]) == ("tool_use", *CALLS["claude-code"])
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": "one of many"}
    more = [{"role": "assistant", "content": [block]}, {"role": "user", "content": [result]}]
    return {**body, "messages": [*body["messages"], *more]}


def follow_chat(body: dict[str, Any], reply: httpx.Response, *, stream: bool) -> dict[str, Any]:
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
    assert (function["name"], json.loads(function["arguments"])) == CALLS["opencode"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "one of many"}
    return {**body, "messages": [*body["messages"], {"role": "assistant", "content": "", "tool_calls": [call]}, result]}
