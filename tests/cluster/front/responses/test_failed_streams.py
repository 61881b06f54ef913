"""Tests of streams of the Responses API that fail: a flat error, then `response.failed`, numbered like all events."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from llamaclust.cluster.front.dialects.openai.response_view import ResponseView
from llamaclust.cluster.front.text.service import TextService
from llamaclust.core.errors import (
    ContextLengthError,
    LlamaclustError,
    ParameterError,
    QueueFullError,
    RequestError,
    WorkerError,
)
from llamaclust.model.chat.template import ChatTemplate
from support.clusters.served import MODEL, ScriptedEngine, events_of, make_app, says, serving
from support.clusters.tool_chats import TEMPLATE, served

PATH = "/v1/responses"
BODY = {"model": MODEL, "input": "Hi", "stream": True}


def check(events: list[dict[str, Any]], code: str, message: str) -> None:
    *_, error, failed = events
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert error["type"] == "error" and message in error["message"] and "error" not in error
    assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": code, "message": error["message"]}
    assert failed["response"]["id"] == events[0]["response"]["id"] and failed["response"]["model"] == MODEL
    if code != "context_length_exceeded":  # The official client lists no such code.
        for event in events:
            TypeAdapter[Any](ResponseStreamEvent).validate_python(event)


FAILURES: list[tuple[LlamaclustError, str]] = [
    (ContextLengthError("has 9 tokens", 9, 8), "context_length_exceeded"),
    (ParameterError("tools", "is not possible"), "invalid_prompt"),
    (RequestError("the model's chat template: no"), "invalid_prompt"),
    (WorkerError("no worker is left"), "server_error"),
]


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("background", [False, True])
async def test_a_stream_that_fails_later(after: int, background: bool) -> None:
    async with served(ScriptedEngine(says("Yes."), failure=WorkerError("lost"), failure_after=after)) as http:
        reply = await http.post(PATH, json=BODY | {"background": background})
        events = events_of(reply.text)
        shown = (await http.get(f"{PATH}/{events[0]['response']['id']}")).json()
    assert events[-1]["type"] == "response.failed" and events[-2]["message"] == "lost"
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    if background:
        assert shown["error"] == events[-1]["response"]["error"] == {"code": "server_error", "message": "lost"}


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LlamaclustError]]:
    """Lets chats fail with the first error of the list, after the stream has begun."""
    errors: list[LlamaclustError] = []

    async def late(service: TextService, chat: object) -> None:
        await asyncio.sleep(0.2)
        raise errors[0]

    monkeypatch.setattr(TextService, "chat", late)
    yield errors


@pytest.mark.parametrize(("error", "code"), FAILURES)
async def test_a_request_that_is_refused_after_its_stream_has_begun(
    refusing: list[LlamaclustError], error: LlamaclustError, code: str
) -> None:
    refusing.append(error)
    async with served(ScriptedEngine(says("Yes.")), prepare_s=0.01) as http:
        reply = await http.post(PATH, json=BODY)
    assert reply.status_code == 200
    check(events_of(reply.text), code, str(error))


async def test_an_internal_error_is_numbered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    events_of_chunk = ResponseView._events_of

    def broken(view: ResponseView, chunk: Any) -> Iterator[Any]:
        yield from events_of_chunk(view, chunk)
        raise KeyError(0)

    monkeypatch.setattr(ResponseView, "_events_of", broken)
    async with served(ScriptedEngine(says("Yes."))) as http:
        events = events_of((await http.post(PATH, json=BODY)).text)
    assert events[-1]["type"] == "response.failed" and "internal error" in events[-2]["message"]
    assert events[-1]["sequence_number"] == events[-2]["sequence_number"] + 1


@asynccontextmanager
async def official(engine: ScriptedEngine, **settings: Any) -> AsyncIterator[AsyncOpenAI]:
    with ChatTemplate(TEMPLATE, "", "") as template:
        async with serving(make_app(engine, template, **settings)) as url:
            http = DefaultAsyncHttpxClient(trust_env=False)
            async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as openai:
                yield openai


async def test_the_official_client_gets_both_events(refusing: list[LlamaclustError]) -> None:
    refusing.append(ParameterError("tools", "is not possible"))
    async with official(ScriptedEngine(says("Yes.")), prepare_s=0.01) as openai:
        events = [event async for event in await openai.responses.create(model=MODEL, input="Hi", stream=True)]
        async with openai.responses.stream(model=MODEL, input="Hi") as stream:
            helped = [event.type async for event in stream]
    assert [event.type for event in events] == ["response.created", "response.in_progress", "error", "response.failed"]
    assert helped == [event.type for event in events]
    last: Any = events[-1]
    assert last.response.error.code == "invalid_prompt" and "is not possible" in last.response.error.message


@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions", "/api/chat"])
async def test_a_reply_that_is_deleted_while_it_begins_leaves_no_unread_error(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks that the event loop reports nothing when a request is deleted at any of its first steps."""
    reports: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reports.append(context))
    busy = QueueFullError("busy")
    messages = {"messages": [{"role": "user", "content": "Hi"}], "model": MODEL, "stream": True}
    for steps in range(0, 40, 2):
        async with served(ScriptedEngine(says("Yes."), failure=busy if steps % 4 else None, failure_after=1)) as http:
            headers = {"Idempotency-Key": f"k{steps}"}
            body = BODY if path == PATH else messages
            posting = asyncio.create_task(http.post(path, json=body, headers=headers))
            for _ in range(steps):
                await asyncio.sleep(0)
            await http.delete(f"/v1/stream/k{steps}")
            posting.cancel() if steps % 3 == 0 else None
            await asyncio.wait([posting], timeout=20.0)
            if not posting.cancelled():
                posting.exception()
    gc.collect()
    await asyncio.sleep(0)
    assert not reports
