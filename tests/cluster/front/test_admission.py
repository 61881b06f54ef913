"""Tests of requests that are open while the server stops or whose clients leave before the computation begins."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.types import Message, Scope

from llamaclust.cluster.engine.engine import EngineState
from llamaclust.cluster.engine.request_stream import Sink
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.http.gates import Admission, AdmissionGate
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.request import ChatRequest
from llamaclust.cluster.front.text.sharing import current_owner
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.server import serve
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.journal import Journal
from llamaclust.model.chat.template import ChatTemplate
from support.clusters.served import (
    ScriptedEngine,
    ScriptedRequest,
    events_of,
    make_app,
    make_service,
    real_engine,
    says,
    serving,
    until,
)

GENERATION = {"prompt": "Hello", "max_tokens": 3}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
STOPPING = "the cluster is stopping and takes no more requests"
HALF = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\n{"


class SlowTemplate(ChatTemplate):
    """A chat template that renders once a test permits it."""

    def __init__(self) -> None:
        super().__init__("", "", "")
        self.may = asyncio.Event()
        self.waiting, self.given_up = 0, 0

    async def render_async(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> str:
        self.waiting += 1
        try:
            await self.may.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        finally:
            self.waiting -= 1
        return "a prompt"


@dataclass(frozen=True)
class Stopping:
    """A served app that a test stops."""

    admission: Admission
    template: SlowTemplate
    http: httpx.AsyncClient

    def post(self, path: str, body: object) -> asyncio.Task[httpx.Response]:
        return asyncio.create_task(self.http.post(path, json=body))


@asynccontextmanager
async def stoppable(engine: Any) -> AsyncIterator[Stopping]:
    admission, template = Admission(ApiSettings()), SlowTemplate()
    async with (
        serving(make_app(engine, template, admission)) as address,
        httpx.AsyncClient(base_url=address, trust_env=False, timeout=20) as http,
    ):
        yield Stopping(admission, template, http)


@pytest.fixture(autouse=True)
def _nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [record.message for record in caplog.get_records("call") if record.levelno >= logging.WARNING] == []


def assert_told(reply: httpx.Response) -> None:
    assert reply.status_code == 503
    assert reply.json()["error"]["message"] == STOPPING


async def test_a_stopping_server_answers_open_requests_and_refuses_new_ones() -> None:
    engine = ScriptedEngine(says("Hi"))
    async with stoppable(engine) as server:
        engine.gate.clear()
        asked, chat = server.post("/v1/completions", GENERATION), server.post("/v1/chat/completions", CHAT)
        await until(lambda: engine.running == 1 and server.template.waiting == 1)
        server.admission.stop()
        assert_told(await server.post("/v1/completions", GENERATION))
        assert (await server.http.get("/v1/models")).status_code == 200
        idle = asyncio.create_task(server.admission.wait_idle())
        engine.gate.set()
        assert (await asked).json()["choices"][0]["text"] == "Hi"
        assert not idle.done()
        server.template.may.set()
        assert (await chat).status_code == 200
        await idle


@pytest.mark.parametrize(("target", "end"), [(b"POST /v1/completions", b"}}"), (b"DELETE /api/delete", b"}")])
async def test_a_body_that_is_still_to_come_is_not_waited_for(target: bytes, end: bytes) -> None:
    async with stoppable(ScriptedEngine(says("Hi"))) as server:
        reader, writer = await asyncio.open_connection(server.http.base_url.host, server.http.base_url.port)
        writer.write(HALF.replace(b"POST /v1/completions", target))
        await until(lambda: bool(server.admission._open))
        server.admission.stop()
        head, _, body = (await reader.readuntil(end)).partition(b"\r\n\r\n")
        writer.close()
        assert head.startswith(b"HTTP/1.1 503 ")
        error = json.loads(body)["error"]
        assert (error if isinstance(error, str) else error["message"]) == STOPPING
        await server.admission.wait_idle()


async def test_a_request_that_is_refused_may_be_sent_to_its_end() -> None:
    """Checks that the connection stays open, since an early close would reset it and lose the refusal."""
    async with stoppable(ScriptedEngine(says("Hi"))) as server:
        server.admission.stop()
        reader, writer = await asyncio.open_connection(server.http.base_url.host, server.http.base_url.port)
        writer.write(HALF.replace(b"99", b"%d" % (4 << 20)))
        for _ in range(64):
            writer.write(b" " * (1 << 16))
            await writer.drain()
        reply = await reader.read()
        writer.close()
        assert reply.startswith(b"HTTP/1.1 503 ") and b"cluster_stopping" in reply


async def test_chats_in_preparation_count_as_requests_that_are_left() -> None:
    template = SlowTemplate()
    service = make_service(ScriptedEngine(says("Hi")), template)
    messages = ({"role": "user", "content": "Hi"},)
    preparing = asyncio.create_task(service.chat(ChatRequest(messages)))
    await until(lambda: template.waiting == 1)
    assert service.active_requests == 1
    template.may.set()
    await preparing
    assert service.active_requests == 0


async def test_requests_without_reply_get_an_error_at_the_end() -> None:
    engine = ScriptedEngine(says("Hi"))
    async with stoppable(engine) as server:
        engine.gate.clear()
        left = [server.post("/v1/completions", GENERATION), server.post("/v1/chat/completions", CHAT)]
        await until(lambda: engine.running == 1 and server.template.waiting == 1)
        server.admission.end()
        for reply in left:
            assert_told(await reply)
        assert engine.running == 0 and server.template.given_up == 1


@pytest.mark.parametrize("path", ["/v1/completions", "/completion"])
async def test_a_request_that_ends_in_the_moment_in_which_it_starts_leaves_nothing(path: str) -> None:
    engine = ScriptedEngine(says("Hi"))
    async with stoppable(engine) as server:
        engine.gate.clear()
        begin = engine.begin

        def begin_and_end(generation: GenerationRequest, sink: Sink) -> ScriptedRequest:
            server.admission.end()
            return begin(generation, sink)

        engine.begin = begin_and_end  # type: ignore[method-assign]
        assert_told(await server.post(path, {"prompt": "Hello"}))
        assert len(engine.submitted) == 1 and engine.running == 0


def inheritance(folder: Path) -> serve._Inheritance:
    return serve._Inheritance(Journal(folder / "journal", ControlRecord(), 60.0), None)


async def test_a_chat_that_is_rendered_while_a_drain_begins_is_answered(tmp_path: Path) -> None:
    async with real_engine() as (engine, _), stoppable(engine) as server:
        chat = server.post("/v1/chat/completions", {**CHAT, "max_tokens": 2})
        await until(lambda: server.template.waiting == 1)
        draining = asyncio.create_task(serve._drain([engine], server.admission, inheritance(tmp_path)))
        await until(lambda: engine.state is EngineState.DRAINING)
        server.template.may.set()
        assert (await chat).status_code == 200
        await draining


async def test_requests_beyond_the_drain_get_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_DRAIN_S", 0.1)
    async with real_engine() as (engine, pipeline), stoppable(engine) as server:
        asked = {"prompt": "Hello", "max_tokens": 100, "ignore_eos": True}
        async with server.http.stream("POST", "/v1/completions", json={**asked, "stream": True}) as stream:
            lines = stream.aiter_text()
            first = await anext(lines)
            pipeline.gate.clear()
            left = [server.post("/v1/completions", asked), server.post("/v1/chat/completions", CHAT)]
            await until(lambda: len(engine.scheduler.sequences) == 2 and server.template.waiting == 1)
            await serve._drain([engine], server.admission, inheritance(tmp_path))
            events = events_of(first + "".join([text async for text in lines]))
        error = events[-1]["error"]
        assert (error["message"], error["code"]) == ("the cluster is stopping", "cluster_stopping")
        assert [(await reply).status_code for reply in left] == [503, 503]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/apply-template"])
async def test_a_disconnected_client_cancels_chat_rendering(path: str) -> None:
    async with stoppable(ScriptedEngine(says("Hi"))) as server:
        body = CHAT if path == "/v1/chat/completions" else {"messages": CHAT["messages"]}
        asking = server.post(path, body)
        await until(lambda: server.template.waiting == 1)
        asking.cancel()
        await until(lambda: server.template.given_up == 1)
        await server.admission.wait_idle()


async def test_bodies_that_do_not_come_keep_no_others_out() -> None:
    engine = ScriptedEngine(says("Hi"))
    admission = Admission(ApiSettings(max_requests=4))
    async with (
        serving(make_app(engine, admission=admission)) as address,
        httpx.AsyncClient(base_url=address, trust_env=False, timeout=20) as http,
    ):
        halves = []
        for _ in range(4):
            halves.append(await asyncio.open_connection(http.base_url.host, http.base_url.port))
            halves[-1][1].write(HALF)
            await until(lambda: len(admission._unfinished) == len(halves))
        assert (await http.post("/v1/completions", json=GENERATION)).status_code == 200
        head = await halves[0][0].read()  # the oldest was refused in favour of the new one
        assert head.startswith(b"HTTP/1.1 503 ") and b"its body had not arrived" in head
        assert len(admission._unfinished) == 3
        engine.gate.clear()
        whole = [asyncio.create_task(http.post("/v1/completions", json=GENERATION)) for _ in range(4)]
        await until(lambda: engine.running == 4)
        busy = await http.post("/v1/completions", json=GENERATION)
        assert busy.status_code == 503 and busy.json()["error"]["code"] == "server_busy"
        engine.gate.set()
        assert [(await reply).status_code for reply in whole] == [200] * 4
        for reader, writer in halves:
            writer.write_eof()
            await reader.read()  # until the server has closed the connection
            writer.close()


async def test_requests_of_one_owner_keep_no_others_out() -> None:
    """Tests an owner with many requests, many bytes and incomplete bodies."""
    admission = Admission(ApiSettings(max_requests=4, max_held_bytes=1000))
    part = {"type": "http.request", "body": b"a" * 240, "more_body": False}

    async def hold(owner: str, held: AsyncExitStack) -> None:
        current_owner.set(owner)
        admission.check()
        admission.count(held.enter_context(admission.held(has_body=True)), part)

    async with AsyncExitStack() as held:
        for _ in range(4):
            await hold("a", held)
        with pytest.raises(HttpError, match="busy with open requests, 4 of them"):
            await hold("a", held)
        await hold("b", held)
        await hold("c", held)
        current_owner.set("b")
        with pytest.raises(HttpError, match="busy with open requests, 1200 bytes of them"):
            admission.count(next(one for one in admission._open if one.owner == "a"), part)
        for owner in "aaaab":
            current_owner.set(owner)
            held.enter_context(admission.held(has_body=True))
        assert [one.owner for one in admission._unfinished if one.refusal is None] == ["a", "a", "a", "b"]
        task = asyncio.current_task()
        assert task is not None and task.uncancel() == 0, "the one that gave way was of this task"
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)


async def test_a_request_without_body_is_whole() -> None:
    admission = Admission(ApiSettings())
    with admission.held(has_body=False):
        admission.stop()
        await asyncio.sleep(0)


async def test_a_refused_request_may_use_timeouts_while_its_error_is_sent() -> None:
    """The task is not cancelled any more: otherwise Python 3.11.2 would raise CancelledError instead of
    TimeoutError."""
    admission = Admission(ApiSettings())
    headers = [(b"content-length", b"99")]
    scope: Scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "app": Starlette()}
    sent, outstanding, is_waiting = list[Message](), list[int](), asyncio.Event()

    async def receive() -> Message:
        is_waiting.set()
        return await asyncio.Future()

    async def read(_: object, receive: Any, send: Any) -> None:
        await receive()

    async def send(message: Message) -> None:
        task = asyncio.current_task()
        assert task is not None
        outstanding.append(task.cancelling())
        sent.append(message)

    asking = asyncio.create_task(AdmissionGate(read, admission)(scope, receive, send))
    await is_waiting.wait()
    admission.stop()
    admission.end()  # A second signal comes at once.
    await asking
    assert sent[0]["status"] == 503 and b"cluster_stopping" in sent[1]["body"]
    assert outstanding == [0, 0]
